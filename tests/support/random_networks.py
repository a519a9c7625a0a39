"""Networks without normalization, of any shape, from a description that hypothesis can draw and shrink."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from .networks import randomised

Activation = Literal[
    *("none", "relu", "leaky_relu", "prelu", "relu6", "elu", "gelu", "silu", "sigmoid", "functional", "functional_")
]
Join = Literal["none", "add", "skip", "concat", "twice"]
Head = Literal["flatten", "mean", "adaptive", "conv", "tuple"]


@dataclass(frozen=True)
class Layer:
    """One conv with what stands around it; sizes that do not fit the input at hand are made to fit in building."""

    width: int = 4
    kernel: int = 3
    stride: int = 1
    padded: bool = True
    groups: int = 1
    transposed: bool = False
    bias: bool = True
    activation: Activation = "relu"
    inplace: bool = False
    first: bool = False  # the activation stands in front of the conv, as in pre-activation networks
    pool: Literal["none", "max", "avg", "adaptive"] = "none"
    dropout: bool = False


@dataclass(frozen=True)
class Block:
    """Layers one behind the other, or in two branches, or one layer called twice; named: held as attributes."""

    join: Join = "none"
    left: tuple[Layer, ...] = (Layer(),)
    right: tuple[Layer, ...] = (Layer(),)
    named: bool = False


@dataclass(frozen=True)
class Network:
    """A network and the size of its input; `log_scale` is how far apart the layers' weights are in scale."""

    blocks: tuple[Block, ...] = (Block(),)
    head: Head = "flatten"
    dense: tuple[Layer, ...] = (Layer(),)
    dims: int = 2
    channels: int = 3
    size: int = 8
    classes: int = 4
    log_scale: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class CalibrationSet:
    """Batches of images: their sizes, the values' scale and offset, and whether the last image is constant."""

    sizes: tuple[int, ...] = (4,)
    log_scale: float = 0.0
    offset: float = 0.0
    constant: bool = False
    seed: int = 0


_LAYERS = st.builds(
    Layer,
    width=st.integers(1, 9),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padded=st.booleans(),
    groups=st.sampled_from([1, 1, 2, 9]),
    transposed=st.sampled_from([False] * 5 + [True]),
    bias=st.booleans(),
    activation=st.sampled_from(Activation.__args__),
    inplace=st.booleans(),
    first=st.sampled_from([False] * 4 + [True]),
    pool=st.sampled_from(["none", "none", "max", "avg", "adaptive"]),
    dropout=st.booleans(),
)
_BLOCKS = st.builds(
    Block,
    join=st.sampled_from(["none", "none", *Join.__args__]),
    left=st.lists(_LAYERS, min_size=1, max_size=3).map(tuple),
    right=st.lists(_LAYERS, min_size=1, max_size=2).map(tuple),
    named=st.booleans(),
)
NETWORKS = st.builds(
    Network,
    blocks=st.lists(_BLOCKS, min_size=1, max_size=4).map(tuple),
    head=st.sampled_from(Head.__args__),
    dense=st.lists(_LAYERS, max_size=2).map(tuple),
    dims=st.sampled_from([2, 2, 2, 2, 1, 3]),
    channels=st.integers(1, 4),
    size=st.integers(4, 12),
    classes=st.integers(1, 5),
    log_scale=st.floats(0, 2),
    seed=st.integers(0, 999),
)
CALIBRATION_SETS = st.builds(
    CalibrationSet,
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple).filter(lambda sizes: sum(sizes) > 1),
    log_scale=st.floats(-3, 3),
    offset=st.floats(-100, 100),
    constant=st.booleans(),
    seed=st.integers(0, 999),
)


def built(network: Network, seed: int | None = None) -> nn.Module:
    """Return the network in eval mode; another seed gives the same architecture with other weights."""
    builder = _Builder(network.dims, network.channels, network.size)
    stages = [builder.block(block) for block in network.blocks]
    stages.append(builder.head(network))
    model = randomised(nn.Sequential(*stages), network.seed if seed is None else seed)
    generator = torch.Generator().manual_seed(network.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 ** (network.log_scale * (2 * float(torch.rand((), generator=generator)) - 1)))
    return model


def batches_of(network: Network, calibration: CalibrationSet) -> list[Tensor]:
    generator = torch.Generator().manual_seed(calibration.seed)
    shape = (sum(calibration.sizes), network.channels, *[network.size] * network.dims)
    images = torch.randn(shape, generator=generator) * 10**calibration.log_scale + calibration.offset
    if calibration.constant:
        images[-1] = calibration.offset
    return list(images.split(calibration.sizes))


class _Builder:
    """Makes modules one behind the other, and keeps account of what comes out of them."""

    def __init__(self, dims: int, channels: int, size: int) -> None:
        self.dims, self.channels, self.size = dims, channels, size

    def block(self, block: Block) -> nn.Module:
        if block.join == "none":
            return self.chain(block.left, block.named)
        if block.join == "twice":
            layer = self.layer(block.left[0], self.channels, same=True)
            return Twice(_held(layer, block.named))
        channels = self.channels
        last = channels if block.join == "skip" else block.left[-1].width
        left = self.chain(block.left, block.named, last=last, same=True)
        width, self.channels = self.channels, channels
        if block.join == "skip":
            return Added(left, nn.Identity())
        right = self.chain(block.right, block.named, last=width if block.join == "add" else None, same=True)
        if block.join == "add":
            return Added(left, right)
        self.channels += width
        return Concatenated(left, right)

    def chain(
        self, layers: tuple[Layer, ...], named: bool, *, last: int | None = None, same: bool = False
    ) -> nn.Module:
        modules: list[nn.Module] = []
        for number, layer in enumerate(layers):
            width = last if last is not None and number == len(layers) - 1 else layer.width
            modules += self.layer(layer, width, same=same)
        return _held(modules, named)

    def layer(self, layer: Layer, width: int, *, same: bool = False) -> list[nn.Module]:
        """Return conv, activation, pooling and dropout; `same` keeps the size of the image."""
        conv = self._conv(layer, width, same)
        activation = _activation(layer.activation, layer.inplace)
        modules = [*activation, conv] if layer.first else [conv, *activation]
        if layer.pool == "adaptive" and not same:
            self.size = min(self.size, 3)
            modules.append(getattr(nn, f"AdaptiveAvgPool{self.dims}d")(self.size))
        elif layer.pool in ("max", "avg") and not same and self.size >= 4:
            self.size //= 2
            modules.append(getattr(nn, f"{layer.pool.capitalize()}Pool{self.dims}d")(2))
        if layer.dropout:
            modules.append(nn.Dropout(0.5, inplace=layer.inplace))
        return modules

    def _conv(self, layer: Layer, width: int, same: bool) -> nn.Module:
        inputs, self.channels = self.channels, width
        groups = gcd(gcd(inputs, width), layer.groups) if layer.groups < 9 else gcd(inputs, width)
        options = {"groups": groups, "bias": layer.bias}
        if layer.transposed and not same and self.size <= 6:
            self.size = (self.size - 1) * 2 + 2
            return getattr(nn, f"ConvTranspose{self.dims}d")(inputs, width, 2, stride=2, **options)
        if same:
            kernel = layer.kernel // 2 * 2 + 1
            return getattr(nn, f"Conv{self.dims}d")(inputs, width, kernel, padding=kernel // 2, **options)
        kernel = min(layer.kernel, self.size)
        padding = kernel // 2 if layer.padded else 0
        self.size = (self.size + 2 * padding - kernel) // layer.stride + 1
        return getattr(nn, f"Conv{self.dims}d")(inputs, width, kernel, layer.stride, padding, **options)

    def head(self, network: Network) -> nn.Module:
        if network.head == "conv":
            return getattr(nn, f"Conv{self.dims}d")(self.channels, network.classes, 1)
        if network.head == "tuple":
            return DenseAndPixelOutputs(self.channels, network.classes, self.dims)
        if network.head == "flatten":
            front: list[nn.Module] = [nn.Flatten()]
            width = self.channels * self.size**self.dims
        else:
            pool = getattr(nn, f"AdaptiveAvgPool{self.dims}d")(1)
            front = [GlobalMean()] if network.head == "mean" else [pool, nn.Flatten()]
            width = self.channels
        for layer in network.dense:
            front += [nn.Linear(width, layer.width, bias=layer.bias), *_activation(layer.activation, layer.inplace)]
            front += [nn.Dropout(0.5, inplace=layer.inplace)] if layer.dropout else []
            width = layer.width
        return nn.Sequential(*front, nn.Linear(width, network.classes))


def _activation(name: Activation, inplace: bool) -> list[nn.Module]:
    modules: dict[str, list[nn.Module]] = {
        "none": [],
        "relu": [nn.ReLU(inplace)],
        "leaky_relu": [nn.LeakyReLU(0.1, inplace)],
        "prelu": [nn.PReLU()],
        "relu6": [nn.ReLU6(inplace)],
        "elu": [nn.ELU(inplace=inplace)],
        "gelu": [nn.GELU()],
        "silu": [nn.SiLU(inplace)],
        "sigmoid": [nn.Sigmoid()],
        "functional": [Functional(inplace=False)],
        "functional_": [Functional(inplace=True)],
    }
    return modules[name]


def _held(modules: list[nn.Module], named: bool) -> nn.Module:
    return Named(modules) if named else nn.Sequential(*modules)


class Named(nn.Module):
    """Layers held as attributes, and run by a forward of its own."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.names = [f"layer_{number}" for number in range(len(modules))]
        for name, module in zip(self.names, modules, strict=True):
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


class Functional(nn.Module):
    """ReLU as a function, in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(x) if self.inplace else F.relu(x)


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class Added(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class Concatenated(Added):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class GlobalMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class DenseAndPixelOutputs(nn.Module):
    """A dense and a pixel-wise output."""

    def __init__(self, channels: int, classes: int, dims: int) -> None:
        super().__init__()
        self.pixels = getattr(nn, f"Conv{dims}d")(channels, 1, 1)
        self.classes = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.classes(x.flatten(2).mean(2)), {"pixels": torch.sigmoid(self.pixels(x))}
