"""The two data sets of the fine-tuning benchmark: real images that come inside scikit-learn and scikit-image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from skimage import color, data
from sklearn.datasets import load_digits
from torch import Tensor

CLASSES = 10
SIZE = 48
VALIDATION_IMAGES = 200
PICTURES = (
    "astronaut",
    "brick",
    "cat",
    "coffee",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "retina",
)
# The means that VGG's own preprocessing subtracts from pixels in 0..255.
PIXEL_MEANS = (123.68, 116.779, 103.939)


@dataclass(frozen=True)
class Split:
    """Training and validation images (pixels 0..1, three equal channels) with their classes."""

    train_images: Tensor
    train_classes: Tensor
    validation_images: Tensor
    validation_classes: Tensor


def load_split(dataset: str, input_range: str) -> Split:
    """Return the data set "digits" or "pictures", its pixels in the range "0..1" or "-120..150"."""
    split = _digits() if dataset == "digits" else _pictures()
    return Split(
        _scaled(split.train_images, input_range),
        split.train_classes,
        _scaled(split.validation_images, input_range),
        split.validation_classes,
    )


def _scaled(images: Tensor, input_range: str) -> Tensor:
    rgb = images.expand(-1, 3, -1, -1)
    if input_range == "-120..150":
        rgb = rgb * 255 - torch.tensor(PIXEL_MEANS).view(1, 3, 1, 1)
    return rgb.contiguous(memory_format=torch.channels_last)


def _digits() -> Split:
    """scikit-learn's 1,797 digits, enlarged from 8x8 to 48x48; the split is fixed."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear")
    classes = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    validation, train = order[:VALIDATION_IMAGES], order[VALIDATION_IMAGES:]
    return Split(images[train], classes[train], images[validation], classes[validation])


def _pictures() -> Split:
    """Grey 48x48 crops of ten pictures; the class is the picture.

    Crops for training lie in the left 60 % of a picture, those for validation in the right 35 %: no pixel is in both.
    """
    generator = torch.Generator().manual_seed(0)
    train, validation = [], []
    for name in PICTURES:
        picture = _grey(name)
        width = picture.shape[1]
        train.append(_crops(picture[:, : int(0.6 * width)], 120, generator))
        validation.append(_crops(picture[:, int(0.65 * width) :], VALIDATION_IMAGES // CLASSES, generator))
    images, classes = torch.cat(train), _classes_of(train)
    order = torch.randperm(len(images), generator=generator)  # statistics are taken from the first few images
    return Split(images[order], classes[order], torch.cat(validation), _classes_of(validation))


def _grey(name: str) -> Tensor:
    """A picture as [height, width] in 0..1."""
    picture = getattr(data, name)()
    grey = color.rgb2gray(picture) if picture.ndim == 3 else picture / 255.0
    return torch.tensor(grey, dtype=torch.float32)


def _crops(region: Tensor, count: int, generator: torch.Generator) -> Tensor:
    height, width = region.shape
    tops = torch.randint(height - SIZE + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(width - SIZE + 1, (count,), generator=generator).tolist()
    corners = zip(tops, lefts, strict=True)
    return torch.stack([region[None, top : top + SIZE, left : left + SIZE] for top, left in corners])


def _classes_of(crops: list[Tensor]) -> Tensor:
    return torch.cat([torch.full((len(images),), index) for index, images in enumerate(crops)])
