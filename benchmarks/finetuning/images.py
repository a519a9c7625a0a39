"""The images of the study, decoded once: training, validation and test images of a data set."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as transforms


@dataclass(frozen=True)
class Part:
    """Images (uint8, N x 3 x side x side) and their classes (int64, N)."""

    pixels: Tensor
    classes: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.pixels)

    def __getitem__(self, rows: Tensor) -> Part:
        """Return some of the images."""
        return Part(self.pixels[rows], self.classes[rows])


@dataclass(frozen=True)
class Split:
    """Three parts without a common image: training, validation (it chooses settings) and test (it chooses nothing)."""

    train: Part
    validation: Part
    test: Part

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return int(self.train.classes.max()) + 1


def clothing(folder: Path, side: int) -> Split:
    """Return the photographs of clothing: `val` is the test part, a tenth of `train` the validation part."""
    train, test = _folder(folder / "train", side), _folder(folder / "val", side)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held_out = len(train) // 10
    return Split(train[order[held_out:]], train[order[:held_out]], test)


def cifar(folder: Path) -> Split:
    """Return CIFAR-10: 5,000 images of `train`, and of `val`, which the network has not seen, 500 and 1,000 others."""
    train, others = _folder(folder / "train", 32), _folder(folder / "val", 32)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(train), generator=generator)[:5000]
    order = torch.randperm(len(others), generator=generator)
    return Split(train[chosen], others[order[:500]], others[order[500:1500]])


def digits(side: int) -> Split:
    """Return scikit-learn's digits, enlarged: 300 images to train on, 200 to choose and 500 to test."""
    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16 * 255
    pixels = torch.nn.functional.interpolate(pixels, size=(side, side), mode="bilinear")
    part = Part(pixels.round().to(torch.uint8).repeat(1, 3, 1, 1), torch.tensor(found.target))
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
    return Split(part[order[:300]], part[order[300:500]], part[order[500:1000]])


def solar_cells(side: int) -> Split:
    """Return photographs of solar cells of the package elpv-dataset, functional and defective ones.

    300 to train on, 200 to choose and 600 to test. A cell is defective if this is the more probable (0.5 and above).

    Source: Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in
    Electroluminescence Imagery", 2018.
    """
    from elpv_dataset.utils import load_dataset  # noqa: PLC0415 - one data set of several

    found, probabilities, _ = load_dataset()
    pixels = transforms.resize(torch.from_numpy(found)[:, None], [side, side], antialias=True)
    part = Part(pixels.repeat(1, 3, 1, 1), torch.from_numpy(probabilities >= 0.5).long())
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
    train = per_class(part[order[:800]], 150, 0)
    return Split(train, part[order[800:1000]], part[order[1000:1600]])


def cifar_enlarged(folder: Path, side: int) -> Split:
    """Return CIFAR-10, enlarged, as photographs new to a network: 300 to train on, 200 to choose and 500 to test."""
    split = cifar(folder)
    parts = (per_class(split.train, 30, 0), split.validation[torch.arange(200)], split.test[torch.arange(500)])
    return Split(*(_resized(part, side) for part in parts))


def fashion_mnist(folder: Path, side: int) -> Split:
    """Return Fashion-MNIST, enlarged: 300 pictures to train on, 200 to choose and, of `t10k`, 500 to test.

    Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
    Algorithms", 2017, arXiv:1708.07747. The folder is /usr/share/datasets/fashion-mnist of the Debian package
    dataset-fashion-mnist.
    """
    found, test = (_idx(folder, name) for name in ("train", "t10k"))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    parts = (per_class(found[order[200:]], 30, 0), found[order[:200]], test[torch.arange(500)])
    return Split(*(_resized(part, side) for part in parts))


def houses(folder: Path, side: int) -> Split:
    """Return photographs of bathrooms, bedrooms, kitchens and fronts of houses: 300, 200 and 500, of other houses each.

    Source: Ahmed and Moustafa, "House Price Estimation from Visual and Textual Features", 2016, arXiv:1609.08399; the
    folder "Houses Dataset" of github.com/emanhamed/Houses-dataset.
    """
    kinds = ("bathroom", "bedroom", "frontal", "kitchen")
    numbers = sorted(int(path.name.partition("_")[0]) for path in folder.glob(f"*_{kinds[0]}.jpg"))
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0)).tolist()

    def part(first: int, last: int) -> Part:
        chosen = [numbers[row] for row in order[first:last]]
        images = [_decoded(str(folder / f"{number}_{kind}.jpg"), side) for number in chosen for kind in kinds]
        return Part(_stacked(images), torch.arange(len(kinds)).repeat(len(chosen)))

    return Split(part(0, 75), part(75, 125), part(125, 250))


def hands(folder: Path, side: int) -> Split:
    """Return photographs of hands that sign the digits 0 to 9: 618 to train on, 413 to choose and 1,031 to test.

    Each of 218 students gave at most one photograph of a digit.

    Source: Mavi, "A New Dataset and Proposed Convolutional Neural Network Architecture for Classification of American
    Sign Language Digits", 2020, arXiv:2011.08927; the folder "Dataset" of
    github.com/ardamavi/Sign-Language-Digits-Dataset.
    """
    part = _folder(folder, side)
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
    return Split(part[order[:618]], part[order[618:1031]], part[order[1031:]])


def per_class(part: Part, count: int, seed: int) -> Part:
    """Return `count` images of each class, chosen at random."""
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
    classes = part.classes[order]
    rows = [order[classes == number][:count] for number in range(int(classes.max()) + 1)]
    return part[torch.cat(rows)]


def noisy(part: Part, sigma: float, seed: int) -> Part:
    """Return images with Gaussian noise; sigma is in units of pixels in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(part.pixels.shape, generator=generator) * sigma * 255
    return Part((part.pixels + noise).round().clamp(0, 255).to(torch.uint8), part.classes)


def low_contrast(part: Part, factor: float) -> Part:
    """Return images whose contrast is reduced around their own mean."""
    mean = part.pixels.float().mean((1, 2, 3), keepdim=True)
    return Part(((part.pixels - mean) * factor + mean).round().to(torch.uint8), part.classes)


def _resized(part: Part, side: int) -> Part:
    return Part(transforms.resize(part.pixels, [side, side], antialias=True), part.classes)


def _idx(folder: Path, name: str) -> Part:
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as images:
        pixels = torch.frombuffer(bytearray(images.read()), dtype=torch.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as labels:
        classes = torch.frombuffer(bytearray(labels.read()), dtype=torch.uint8, offset=8).long()
    return Part(pixels.expand(-1, 3, -1, -1), classes)


@cache
def _folder(folder: Path, side: int) -> Part:
    images = ImageFolder(str(folder), loader=lambda path: _decoded(path, side))
    return Part(_stacked(pixels for pixels, _ in images), torch.tensor(images.targets))


def _stacked(images: Iterable[np.ndarray]) -> Tensor:
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])


def _decoded(path: str, side: int) -> np.ndarray:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if image.size != (side, side):
        image = transforms.center_crop(transforms.resize(image, [side]), [side, side])
    return np.array(image)
