"""The cases of the study: a pretrained network, images, and how many steps there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import VGG

from bn_insert import load_checkpoint, replace_output

from .images import Part, Split, cifar, clothing, digits, low_contrast, noisy, per_class

Preprocessing = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Places:
    """Where the networks and images of the study are."""

    vgg16: Path
    cifar_vgg: Path
    cifar_folded: Path
    clothing: Path
    cifar: Path


@dataclass(frozen=True)
class Case:
    """One question of the study.

    Attributes:
        title: The case in words.
        load: Returns the network, with the output layer that training starts from.
        images: Returns the images.
        preprocess: From pixels (uint8) to the network's input.
        steps: Steps of training.
        batch: Images per step.
        mirror: Whether training images are mirrored at random.
        knows_classes: Whether the network has the output layer for them already.
        source: Images like those that the network was trained on, where the case's own are of another kind.
        methods: The methods that are compared.
    """

    title: str
    load: Callable[[Places], nn.Module]
    images: Callable[[Places, int], Split]
    preprocess: Preprocessing
    steps: int
    batch: int
    methods: tuple[str, ...]
    mirror: bool = False
    knows_classes: bool = False
    source: Callable[[Places], Part] | None = None


PLAIN = ("plain SGD", "plain AdamW")
INSERTED = ("fresh", "identity", "identity AdamW", "renorm", "equalized", "gamma, beta and head")
FITTED = ("plain SGD, fitted", "plain AdamW, fitted", "identity, fitted", "identity AdamW, fitted")
DETAILS = ("gamma x0.1", "gamma x10", "gamma decay", "momentum 0.01", "no re-estimation")
EVERY = (*PLAIN, *INSERTED, *FITTED)
SHIFTED = (*PLAIN, "fresh", "identity", "source", "source renorm", "source, gamma, beta and head")
DENSE_HEAD = (
    "plain SGD",
    "plain SGD, dropout",
    "plain AdamW",
    "identity",
    "identity, dropout",
    "dense alone",
    "conv alone",
    *FITTED,
)


def unit_range(pixels: Tensor) -> Tensor:
    """Return pixels in 0..1."""
    return pixels.float() / 255


def keras_range(pixels: Tensor) -> Tensor:
    """Return pixels as VGG16's conv layers were trained: BGR, ImageNet's means subtracted, -124..152."""
    return pixels.float().flip(1) - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)


def cifar_range(pixels: Tensor) -> Tensor:
    """Return pixels with CIFAR-10's mean and std removed, as the CIFAR network takes them."""
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.2435, 0.2616])
    return (pixels.float() / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def vgg16_dense_head(places: Places) -> nn.Module:
    """Return the real VGG16 with its own dense layers and a new output layer."""
    network = load_checkpoint(places.vgg16)
    replace_output(network, 10)
    return network


def vgg16_bare_head(places: Places) -> nn.Module:
    """Return the real VGG16's conv layers with pooled features and a new output layer."""
    network = load_checkpoint(places.vgg16)
    assert isinstance(network, VGG)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Sequential(nn.Linear(512, 10))
    nn.init.zeros_(network.classifier[0].weight)
    nn.init.zeros_(network.classifier[0].bias)
    return network


def cifar_vgg(places: Places) -> nn.Module:
    """Return the CIFAR network as it is."""
    return load_checkpoint(places.cifar_vgg)


def cifar_folded(places: Places) -> nn.Module:
    """Return the CIFAR network that was trained with BatchNorm, which is folded, as it is."""
    return load_checkpoint(places.cifar_folded)


def cifar_vgg_new_output(places: Places) -> nn.Module:
    """Return the CIFAR network with a new output layer."""
    network = cifar_vgg(places)
    replace_output(network, 10)
    return network


def cifar_folded_new_output(places: Places) -> nn.Module:
    """Return the CIFAR network that was trained with BatchNorm, which is folded, with a new output layer."""
    network = cifar_folded(places)
    replace_output(network, 10)
    return network


def _few(count: int) -> Callable[[Places, int], Split]:
    def images(places: Places, seed: int) -> Split:
        split = clothing(places.clothing, 32)
        return Split(per_class(split.train, count, seed), split.validation, split.test)

    return images


def _shifted(change: Callable[[Part, int], Part]) -> Callable[[Places, int], Split]:
    def images(places: Places, _: int) -> Split:
        split = cifar(places.cifar)
        parts = (split.train, split.validation, split.test)
        return Split(*(change(part, number) for number, part in enumerate(parts)))

    return images


_NOISE = Case(
    "CIFAR network, its own output layer, CIFAR-10 with noise (sigma 0.2)",
    cifar_vgg,
    _shifted(lambda part, seed: noisy(part, 0.2, seed)),
    cifar_range,
    100,
    16,
    SHIFTED,
    knows_classes=True,
    source=lambda places: cifar(places.cifar).train,
)
_PHOTOGRAPHS = Case(
    "real VGG16 with its own dense head, photographs of clothing, 48 px",
    vgg16_dense_head,
    lambda places, _: clothing(places.clothing, 48),
    unit_range,
    100,
    16,
    DENSE_HEAD,
    mirror=True,
)
_SMALL_PHOTOGRAPHS = Case(
    "CIFAR network, new output layer, 2,848 photographs of clothing, 32 px",
    cifar_vgg_new_output,
    lambda places, _: clothing(places.clothing, 32),
    cifar_range,
    200,
    32,
    EVERY,
    mirror=True,
)
_TEN_A_CLASS = replace(
    _SMALL_PHOTOGRAPHS,
    title="CIFAR network, new output layer, 10 photographs of each kind of clothing, 32 px",
    images=_few(10),
    steps=100,
    batch=16,
)
CASES = {
    "noise": _NOISE,
    "noise, small batches": replace(
        _NOISE,
        title="CIFAR network, its own output layer, CIFAR-10 with noise (sigma 0.2), batches of 4",
        batch=4,
    ),
    "noise, folded": replace(
        _NOISE,
        title="CIFAR network whose own BatchNorm is folded, its own output layer, CIFAR-10 with noise (sigma 0.2)",
        load=cifar_folded,
    ),
    "noise, folded, small batches": replace(
        _NOISE,
        title="CIFAR network whose own BatchNorm is folded, its own output layer, CIFAR-10 with noise (sigma 0.2), "
        "batches of 4",
        load=cifar_folded,
        batch=4,
    ),
    "10 a class": _TEN_A_CLASS,
    "10 a class, fitted": replace(
        _TEN_A_CLASS,
        title="CIFAR network, output layer new or fitted, 10 photographs of each kind of clothing, 32 px",
        methods=(*PLAIN, "identity", "identity AdamW", *FITTED, *DETAILS),
    ),
    "photographs": _PHOTOGRAPHS,
    "own images": Case(
        "CIFAR network, its own output layer, CIFAR-10 images that it was trained on",
        cifar_vgg,
        lambda places, _: cifar(places.cifar),
        cifar_range,
        100,
        32,
        (*PLAIN, "fresh", "identity", "renorm"),
        mirror=True,
        knows_classes=True,
    ),
    "contrast": replace(
        _NOISE,
        title="CIFAR network, its own output layer, CIFAR-10 at a fifth of the contrast",
        images=_shifted(lambda part, _: low_contrast(part, 0.2)),
    ),
    "50 a class": replace(
        _SMALL_PHOTOGRAPHS,
        title="CIFAR network, new output layer, 50 photographs of each kind of clothing, 32 px",
        images=_few(50),
        steps=150,
        batch=16,
    ),
    "all photographs": _SMALL_PHOTOGRAPHS,
    "bare head": replace(
        _PHOTOGRAPHS,
        title="real VGG16's conv layers in their own preprocessing, output layer on pooled features, clothing, 48 px",
        load=vgg16_bare_head,
        preprocess=keras_range,
        methods=(*PLAIN, "fresh", "identity", "identity AdamW", "renorm", *FITTED),
    ),
    "wrong scale": replace(
        _SMALL_PHOTOGRAPHS,
        title="CIFAR network whose own BatchNorm is folded, new output layer, 2,848 photographs of clothing, 32 px, "
        "pixels in 0..1 instead of -2..2",
        load=cifar_folded_new_output,
        preprocess=unit_range,
        methods=(*PLAIN, "fresh", "identity", "identity AdamW", *FITTED),
    ),
    "digits": replace(
        _PHOTOGRAPHS,
        title="real VGG16 with its own dense head, 300 digits, 48 px",
        images=lambda _, __: digits(48),
        mirror=False,
    ),
    "long": replace(
        _SMALL_PHOTOGRAPHS,
        title="CIFAR network, new output layer, 2,848 photographs of clothing, 32 px, 10 epochs",
        steps=890,
        methods=(*PLAIN, "identity", "fresh", *FITTED),
    ),
}
