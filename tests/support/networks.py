"""The networks that the tests of the core library run on; none has weights as freshly initialised."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import VGG
from torchvision.models.vgg import cfgs, make_layers

AnyModule = TypeVar("AnyModule", bound=nn.Module)

# The others only repeat layers that these have; each is inserted into, equalized and folded in test_architectures.py.
DEPTHS = ("vgg11", "vgg16")


def randomised(model: AnyModule, seed: int = 0) -> AnyModule:
    """Return the model, in eval mode, with weights, biases and BatchNorm state drawn from a seed of their own.

    Each wide layer has two dead channels, one of them with a bias, and one of 16 times the others' scale.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                _randomise_layer(module, generator)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 2, generator=generator)
                module.running_var.uniform_(0.1, 5, generator=generator)
                module.weight.normal_(1, 0.5, generator=generator)
                module.bias.normal_(0, 2, generator=generator)
                module.num_batches_tracked.fill_(7)
    return model.eval()


def _randomise_layer(layer: nn.modules.conv._ConvNd | nn.Linear, generator: torch.Generator) -> None:
    fan_in = layer.weight[0].numel()
    layer.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    if layer.bias is not None:
        layer.bias.normal_(0, 0.5, generator=generator)
    if len(layer.weight) >= 8 and not getattr(layer, "transposed", False):
        layer.weight[[2, 5]] = 0
        layer.weight[3] *= 16
        if layer.bias is not None:
            layer.bias[5] = 0
            layer.bias[3] *= 16


def images(count: int, size: int = 32, seed: int = 1, channels: int = 3) -> Tensor:
    """Return images whose channels have different means and scales."""
    generator = torch.Generator().manual_seed(seed)
    scales, shifts = torch.linspace(0.5, 2, channels), torch.linspace(-1, 1, channels)
    noise = torch.randn(count, channels, size, size, generator=generator)
    return noise * scales[:, None, None] + shifts[:, None, None]


def features(count: int, width: int, seed: int = 1) -> Tensor:
    """Return rows of inputs for dense layers."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 0.5


def sequential(*modules: nn.Module) -> nn.Sequential:
    return randomised(nn.Sequential(*modules))


def torchvision_vgg(name: str) -> VGG:
    """Return torchvision's own network of this name, at full width but for the dense layers.

    Those would be nine tenths of the memory and of the time.
    """
    with torch.device("meta"):
        vgg = torchvision.models.get_model(name, weights=None, init_weights=False)
        _replace_dense(vgg, flat=512 * 7 * 7, widths=(48, 32, 10))
    return randomised(vgg.to_empty(device="cpu"))


def narrow_vgg(name: str) -> VGG:
    """Return torchvision's `vgg11`, `vgg16` or `vgg16_bn` with an eighth of the channels."""
    plan = cfgs[{"vgg11": "A", "vgg16": "D"}[name.removesuffix("_bn")]]
    widths = [value if value == "M" else int(value) // 8 for value in plan]
    with torch.device("meta"):
        vgg = VGG(make_layers(widths, batch_norm=name.endswith("_bn")), init_weights=False)
        _replace_dense(vgg, flat=512 // 8 * 7 * 7, widths=(48, 32, 10))
    return randomised(vgg.to_empty(device="cpu"))


def small_vgg(dropout: float = 0.5) -> VGG:
    """Return a VGG of torchvision's class and layout for images of 16 x 16, two convs deep and a few channels wide."""
    with torch.device("meta"):
        vgg = VGG(make_layers([8, "M", 12, "M"]), init_weights=False, dropout=dropout)
        vgg.avgpool = nn.AdaptiveAvgPool2d(2)
        _replace_dense(vgg, flat=12 * 2 * 2, widths=(24, 16, 10))
    return randomised(vgg.to_empty(device="cpu"))


def _replace_dense(vgg: VGG, flat: int, widths: tuple[int, ...]) -> None:
    for width, place in zip(widths, (0, 3, 6), strict=True):
        vgg.classifier[place] = nn.Linear(flat, width)
        flat = width


class HeldAsAttributes(nn.Module):
    """Layers as attributes, activations as functions, a ModuleList and a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)])
        self.heads = nn.ModuleDict({"hidden": nn.Linear(8, 12), "logits": nn.Linear(12, 5)})

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.leaky_relu(block(x), 0.1)
        x = F.relu(self.heads["hidden"](x.mean((2, 3))))
        return self.heads["logits"](x)


class SlicedInForward(nn.Module):
    """A Sequential whose own forward is never run: one part is sliced, the other looped over."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features[:2](x)
        for module in self.features[2:]:
            x = module(x)
        return x


class SlicesAsAttributes(nn.Module):
    """One stack of layers held whole and again in two parts, as networks for perceptual losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.lower, self.upper = self.features[:2], self.features[2:]

    def forward(self, x: Tensor) -> Tensor:
        return self.upper(self.lower(x))


class TwoNames(nn.Module):
    """One conv under two names, called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = self.first
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(x)))


class CalledTwice(nn.Module):
    """One conv that a forward pass calls twice, on values of different scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv(self.relu(self.conv(x)))))


class CalledFromTwoSequentials(nn.Module):
    """One conv and one ReLU that two Sequentials hold."""

    def __init__(self) -> None:
        super().__init__()
        conv, relu = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.lower = nn.Sequential(conv, relu)
        self.upper = nn.Sequential(conv, relu, nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.upper(self.lower(x))


class SeveralOutputs(nn.Module):
    """A hidden conv, two heads with a squashing function each, and a dense auxiliary output, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.classes = nn.Conv2d(8, 4, 1)
        self.mask = nn.Conv2d(8, 1, 1)
        self.auxiliary = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        auxiliary = self.auxiliary(x.mean((2, 3)))
        return {"classes": self.classes(x).softmax(1), "mask": torch.sigmoid(self.mask(x)), "auxiliary": auxiliary}


class TokenMixer(nn.Module):
    """Dense layers on 3-D inputs, batch x tokens x channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mix(F.relu(self.embed(x)))).mean(1))


class WithUnusedLayer(nn.Module):
    """A conv that no forward pass calls."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)))


class RegisteredBackwards(nn.Module):
    """Layers registered in the opposite order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.hidden = nn.Linear(8, 6)
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.relu(self.conv(x)).mean((2, 3)))))


class ViewsActivations(nn.Module):
    """A forward that changes its input in place, and flattens by a view that channels_last activations do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.hidden = nn.Linear(8 * 6 * 6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.mul_(2))
        return self.head(F.relu(self.hidden(F.relu(x).view(len(x), -1))))


AWKWARD: tuple[Callable[[], nn.Module], ...] = (
    HeldAsAttributes,
    SlicedInForward,
    SlicesAsAttributes,
    TwoNames,
    SeveralOutputs,
    WithUnusedLayer,
    RegisteredBackwards,
)
"""Networks for 3-channel images with one awkward property each."""


class OutputFirst(nn.Module):
    """A network whose output layer is declared before its other layer."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(4, 1000)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.conv(x).relu().mean((2, 3)))  # type: ignore[no-any-return]
