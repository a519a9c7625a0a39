"""Train a small VGG without normalization on CIFAR-10 folders, as a network that knows its classes.

    python -m benchmarks.renorm.cifar_network CIFAR_FOLDER --output cifar-vgg.pth

CIFAR_FOLDER has `train/CLASS/IMAGE` and `val/CLASS/IMAGE` (32 x 32). Random crops and mirroring, SGD, cosine, label
smoothing. Interrupted, it continues from the last complete epoch (`OUTPUT.state`).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.models import VGG

WIDTHS = ((48, 48), (96, 96), (192, 192))
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
BATCH, RATE, WARM_UP_EPOCHS = 128, 0.03, 2


def load_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return the pixels (uint8, N x 3 x 32 x 32) and labels of a part."""
    images = ImageFolder(folder / part)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in images])
    return pixels, torch.tensor(images.targets)


def preprocess(pixels: Tensor) -> Tensor:
    """Return pixels as the network takes them."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def make_network() -> VGG:
    """Return the network with He's initialization."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in WIDTHS:
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    network = VGG(nn.Sequential(*layers), num_classes=10, init_weights=False)
    network.avgpool = nn.AdaptiveAvgPool2d(4)
    network.classifier = nn.Sequential(
        nn.Linear(channels * 16, 256), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(256, 10)
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
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
    parser.add_argument("--epochs", type=int, default=26)
    options = parser.parse_args()
    torch.manual_seed(0)
    (train, labels), (held_out, held_out_labels) = (load_part(options.folder, part) for part in ("train", "val"))
    network = make_network().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    state, start = options.output.with_suffix(".state"), 0
    if state.exists():
        saved = torch.load(state)
        network.load_state_dict(saved["network"])
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
            loss = F.cross_entropy(network(images), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 2.0)
            optimizer.step()
        network.eval()
        with torch.inference_mode():
            parts = zip(held_out.split(500), held_out_labels.split(500), strict=True)
            correct = sum(int((network(preprocess(x)).argmax(1) == y).sum()) for x, y in parts)
        print(f"epoch {epoch + 1} of {options.epochs}: accuracy {correct / len(held_out):.2%}", flush=True)
        torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, state)
        torch.save(dict(network.state_dict()), options.output)


if __name__ == "__main__":
    main()
