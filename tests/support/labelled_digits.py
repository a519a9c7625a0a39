"""The demo's digits in train/ and val/, for tests that fine-tune."""

from __future__ import annotations

import shutil
from pathlib import Path

from bn_insert.demo import images_path
from bn_insert.images.class_folders import ClassFolders, open_class_folders
from bn_insert.images.transform import Transform

AS_IT_IS = Transform(resize=None, crop=None, mean=(0.0,), std=(1.0,))


def link_digits(folder: Path, train: int = 4, val: int = 2, classes: int = 10) -> Path:
    """Make train/ and val/ with so many images of each digit, and return the folder."""
    for digit in range(classes):
        images = sorted((images_path() / str(digit)).iterdir())
        for part, chosen in (("train", images[:train]), ("val", images[train : train + val])):
            (folder / part / str(digit)).mkdir(parents=True)
            for image in chosen:
                shutil.copy(image, folder / part / str(digit))
    return folder


def open_digits(folder: Path) -> ClassFolders:
    """Return them as the demo network takes them."""
    return open_class_folders(folder, AS_IT_IS)
