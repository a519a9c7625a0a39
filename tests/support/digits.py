"""The demo's digits, a few of each, in folders that tests may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bn_insert.demo import images_path, network_path
from bn_insert.images.class_folders import ClassFolders, open_class_folders
from bn_insert.images.transform import Transform

IDENTITY_TRANSFORM = Transform(resize=None, crop=None, mean=(0.0,), std=(1.0,))


def copy_digits(folder: Path, count: int, *, start: int = 0, classes: int = 10) -> Path:
    """Copy `count` images of each digit, from number `start` on, to one folder per digit, and return the folder."""
    for digit in range(classes):
        (folder / str(digit)).mkdir(parents=True)
        for image in sorted((images_path() / str(digit)).iterdir())[start : start + count]:
            shutil.copy(image, folder / str(digit))
    return folder


def copy_labelled_digits(folder: Path, train: int = 4, val: int = 2, classes: int = 10) -> Path:
    """Copy images of each digit to train/ and val/, and return the folder."""
    copy_digits(folder / "train", train, classes=classes)
    copy_digits(folder / "val", val, start=train, classes=classes)
    return folder


def save_plain_network(path: Path) -> Path:
    """Write the demo's network as a plain state dict, without settings, and return the path."""
    torch.save(dict(torch.load(network_path(), weights_only=True)), path)
    return path


def open_digits(folder: Path) -> ClassFolders:
    """Return train/ and val/ as the demo network reads them."""
    return open_class_folders(folder, IDENTITY_TRANSFORM)


def images_of(folder: Path) -> Tensor:
    """Return all PNG images below a folder as one batch, pixels in 0..1."""
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.png"))]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
