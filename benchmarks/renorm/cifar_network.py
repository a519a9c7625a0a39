"""Train a small VGG without normalization on CIFAR-10 folders, as a network that knows its classes.

    python -m benchmarks.renorm.cifar_network CIFAR_FOLDER --output cifar-vgg.pth --bfloat16

CIFAR_FOLDER has `train/CLASS/IMAGE` and `val/CLASS/IMAGE` (32 x 32). Random crops and mirroring, SGD, cosine, label
smoothing. The weights of the convs are standardized during training (scaled weight standardization, Brock et al. 2021,
arXiv:2101.08692, equation 1), which trains a network without normalization in half the epochs; activations are never
normalized, and the file that is written holds plain convs with an exponential moving average of the weights.
`--batchnorm` trains the same network with BatchNorm behind its convs instead, and folds it into them: no normalization
is left in the file either, as in many checkpoints that are made for inference. `--deep` trains a network with the
thirteen convs of VGG16, at three quarters of their widths, in place of six.
`--bfloat16` computes under autocast: half the time on processors that have it. Interrupted, it continues from the last
complete epoch (`OUTPUT.state`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import ImageFolder
from torchvision.models import VGG

from bn_insert import fold_batchnorm

WIDTHS = ((48, 48), (96, 96), (192, 192))
DEEP_WIDTHS = ((48, 48), (96, 96), (192, 192, 192), (384, 384, 384), (384, 384, 384))
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
BATCH, RATE, WARM_UP_EPOCHS, WEIGHT_DECAY = 128, 0.08, 1, 5e-4
AVERAGE_DECAY = 0.998  # of the moving average, per step: about two and a half epochs
RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))  # 1 / std of ReLU(x), x standard normal


def load_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return the pixels (uint8, N x 3 x 32 x 32) and labels of a part."""
    images = ImageFolder(folder / part)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in images])
    return pixels, torch.tensor(images.targets)


def preprocess(pixels: Tensor) -> Tensor:
    """Return pixels as the network takes them."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


class StandardizedWeight(nn.Module):
    """The weight of a conv: mean 0 and variance RELU_GAIN^2 / fan-in per output channel, times a trained gain."""

    def __init__(self, channels: int) -> None:
        """Begin with a gain of 1."""
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the standardized weight."""
        variance, mean = torch.var_mean(weight, (1, 2, 3), keepdim=True)
        scale = torch.rsqrt(variance * weight[0].numel() + 1e-4)
        return (weight - mean) * scale * self.gain * RELU_GAIN


def plain_weights(network: VGG) -> dict[str, Tensor]:
    """Return the state dict with the weights that the convs compute with, BatchNorm folded into them."""
    if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return fold_batchnorm(network, torch.zeros(2, 3, 32, 32)).state_dict()
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    parameters = {f"{name}.{kind}": getattr(module, kind) for name, module in layers for kind in ("weight", "bias")}
    return {name: value.detach().contiguous() for name, value in parameters.items()}


def make_network(widths: Sequence[Sequence[int]], batchnorm: bool) -> VGG:
    """Return the network with He's initialization, and with standardized weights or BatchNorm."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in widths:
        for width in stage:
            norm = [nn.BatchNorm2d(width)] if batchnorm else []
            layers += [nn.Conv2d(channels, width, 3, padding=1), *norm, nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    network = VGG(nn.Sequential(*layers), num_classes=10, init_weights=False)
    side = 32 // 2 ** len(widths)
    network.avgpool = nn.AdaptiveAvgPool2d(side)
    network.classifier = nn.Sequential(
        nn.Linear(channels * side**2, 256), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(256, 10)
    )
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Conv2d) and not batchnorm:
            parametrize.register_parametrization(module, "weight", StandardizedWeight(module.out_channels))
    return network


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return images mirrored and moved by up to four pixels at random."""
    count = len(pixels)
    mirrored = torch.rand(count, generator=generator) < 0.5
    padded = F.pad(torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels), [4] * 4)
    down, right = torch.randint(0, 9, (2, count, 1), generator=generator)
    rows, columns = ((start + torch.arange(32))[:, None] for start in (down, right))
    return padded[
        torch.arange(count)[:, None, None, None],
        torch.arange(3)[None, :, None, None],
        rows.transpose(2, 1)[..., None].view(count, 1, 32, 1),
        columns.view(count, 1, 1, 32),
    ]


def main() -> None:
    """Train, and save a state dict after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--batchnorm", action="store_true", help="train with BatchNorm, and fold it")
    parser.add_argument("--deep", action="store_true", help="train thirteen convs in place of six")
    options = parser.parse_args()
    torch.manual_seed(0)
    (train, labels), (held_out, held_out_labels) = (load_part(options.folder, part) for part in ("train", "val"))
    network = make_network(DEEP_WIDTHS if options.deep else WIDTHS, options.batchnorm)
    network = network.to(memory_format=torch.channels_last)
    weights = [value for name, value in network.named_parameters() if name.endswith((".weight", ".original"))]
    others = [value for name, value in network.named_parameters() if not name.endswith((".weight", ".original"))]
    groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True)
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY), use_buffers=True)
    state, start = options.output.with_suffix(".state"), 0
    if state.exists():
        saved = torch.load(state)
        network.load_state_dict(saved["network"])
        averaged.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["epoch"]
    steps = len(train) // BATCH
    for epoch in range(start, options.epochs):
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(train), generator=generator)[: steps * BATCH].view(steps, BATCH)
        network.train()
        for number, rows in enumerate(order, epoch * steps):
            warm_up = min(1, (number + 1) / (WARM_UP_EPOCHS * steps))
            for group in optimizer.param_groups:
                group["lr"] = RATE * warm_up * (1 + math.cos(math.pi * number / (options.epochs * steps))) / 2
            images = preprocess(augmented(train[rows], generator)).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
                logits = network(images)
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 2.0)
            optimizer.step()
            averaged.update_parameters(network)
        trained = averaged.module.eval()
        with torch.inference_mode():
            parts = zip(held_out.split(500), held_out_labels.split(500), strict=True)
            correct = sum(int((trained(preprocess(x)).argmax(1) == y).sum()) for x, y in parts)
        print(f"epoch {epoch + 1} of {options.epochs}: accuracy {correct / len(held_out):.2%}", flush=True)
        states = {"network": network, "averaged": averaged, "optimizer": optimizer}
        torch.save({name: value.state_dict() for name, value in states.items()} | {"epoch": epoch + 1}, state)
        torch.save(plain_weights(trained), options.output)


if __name__ == "__main__":
    main()
