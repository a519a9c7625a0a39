"""Labeled images for training: `train/` and `val/` with one folder per class, read in batches."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from ..errors import ImageError
from ..support.arguments import check_flags, is_list
from ..support.near_names import missing_folder
from ..support.text import counted, listed, printable
from .batch_interface import Unreadable
from .image_batches import ImageReader
from .image_files import find_images
from .transform import Transform

_LAYOUT = "the layout is train/CLASS/IMAGE and val/CLASS/IMAGE"
NAMES_SHOWN = 5


class LabelledImage(NamedTuple):
    """An image file, and the index of its class."""

    path: Path
    label: int


class LabelledBatch(NamedTuple):
    """Images as the network takes them, and the index of each one's class."""

    images: Float32[Tensor, "images channels height width"]
    labels: Int64[Tensor, " images"]


@dataclass(frozen=True, eq=False)
class ClassFolders:
    """The images of a folder with `train/` and `val/`; created by `open_class_folders`.

    Args:
        folder: The folder that contains `train/` and `val/`.
        classes: Names of the folders in `train/`: the outputs of a network trained on them, in this order. They are
            sorted, unless another order was asked for with `in_order`.
        train: Training images, sorted by path.
        val: Validation images, sorted by path.
        reader: How the files are decoded.
    """

    folder: Path
    classes: tuple[str, ...]
    train: tuple[LabelledImage, ...] = field(repr=False)
    val: tuple[LabelledImage, ...] = field(repr=False)
    reader: ImageReader
    _skipped: dict[Path, str] = field(default_factory=dict, init=False, repr=False)

    @property
    def transform(self) -> Transform:
        """Preprocessing of every image."""
        return self.reader.transform

    @property
    def unreadable(self) -> list[Unreadable]:
        """Files that have been skipped so far, each listed once."""
        return [Unreadable(path, reason) for path, reason in self._skipped.items()]

    @property
    def digest(self) -> str:
        """SHA-256 of the names of all images: runs with the same seed and digest see the same batches."""
        return self.digest_of((*self.train, *self.val))

    def digest_of(self, images: Iterable[LabelledImage]) -> str:
        """Return the SHA-256 of the names of images, relative to the folder, in any order.

        Args:
            images: Some or all of `train` and `val`.
        """
        names = sorted(str(image.path.relative_to(self.folder)) for image in images)
        return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()

    def in_order(self, classes: Sequence[str]) -> ClassFolders:
        """Return the same images with labels for another order of the classes.

        A network that was trained on these classes may have its outputs in another order than the sorted folders.

        Args:
            classes: The names in `classes`, in the order of the outputs.

        Raises:
            ImageError: When these are not the names in `classes`, each once.
        """
        if not is_list(classes) or Counter(classes) != Counter(self.classes):
            raise ImageError(
                f"the classes are {classes!r:.80}, and the folders in {self.folder / 'train'} are "
                f"{listed(self.classes, NAMES_SHOWN)}; pass the names of all folders, each once"
            )
        labels = [[*classes].index(name) for name in self.classes]
        train, val = (
            tuple(LabelledImage(path, labels[label]) for path, label in part) for part in (self.train, self.val)
        )
        return replace(self, classes=tuple(classes), train=train, val=val)

    def batches(self, images: Sequence[LabelledImage], size: int, *, full: bool = False) -> Iterator[LabelledBatch]:
        """Yield images in batches, in their order.

        A file that cannot be read is left out and listed in `unreadable`.

        Args:
            images: The images, some or all of `train` or `val`.
            size: Files per batch.
            full: For images of `train`: replace an unreadable image by another one of its batch, or by another one of
                `train` if the batch has none that can be read, so that the size of a batch follows from the number of
                files alone, in whichever process they are read.

        Raises:
            ImageError: When images in one batch differ in size, with `full` when no training image can be read, and
                for the first unreadable file if the folders were opened with `strict`.
        """
        labels = dict(images)
        decoded = self.reader.read(tuple(image.path for image in images), size, self._skipped)
        with closing(decoded):
            for pixels, paths, unreadable in decoded:
                if pixels is not None:
                    batch = LabelledBatch(pixels, torch.tensor([labels[path] for path in paths]))
                elif full:
                    batch = self._in_place_of(unreadable[0].path)
                else:
                    continue
                if full and unreadable:
                    rows = torch.arange(len(paths) + len(unreadable)) % len(batch.labels)
                    batch = LabelledBatch(batch.images[rows], batch.labels[rows])
                yield batch

    def first_readable(self, images: Sequence[LabelledImage]) -> LabelledBatch:
        """Return the first image that can be read, as a batch of its own.

        Args:
            images: Some or all of `train` or `val`.

        Raises:
            ImageError: When none of them can be read, and for the first unreadable file if the folders were opened with
                `strict`.
        """
        for image in images:
            if image.path not in self._skipped:
                for batch in self.batches((image,), 1):
                    return batch
        raise self.none_readable(images)

    def none_readable(self, images: Sequence[LabelledImage]) -> ImageError:
        """Return the error for images, some or all of `train` or `val`, of which none can be read."""
        part = "training" if images[0] in self.train else "validation"
        reasons = (
            f"; one of them is {each.path}: {self._skipped[each.path]}" for each in images if each.path in self._skipped
        )
        return ImageError(
            f"none of the {len(images)} {part} images can be read{next(reasons, '')}; repair or remove these files"
        )

    def _in_place_of(self, unreadable: Path) -> LabelledBatch:
        """Return the first training image that can be read after one that cannot: mostly one of its class.

        It does not depend on which images were read before, so that a resumed run sees the same.
        """
        start = next(number for number, image in enumerate(self.train) if image.path == unreadable)
        return self.first_readable((*self.train[start:], *self.train[:start]))


def open_class_folders(
    folder: str | Path, transform: Transform, *, channels: int = 3, workers: int = 0, strict: bool = False
) -> ClassFolders:
    """Return the labeled images of a folder that has `train/` and `val/`, each with one folder per class.

    Hidden folders are ignored; `val/` may lack classes that `train/` has.

    Args:
        folder: The folder that contains `train/` and `val/`.
        transform: Preprocessing of training and validation images alike, without random crops.
        channels: Channels that the network takes, 1 or 3.
        workers: Processes that decode; 0 decodes in this process.
        strict: Raise an error for the first unreadable file instead of skipping it.

    Raises:
        ImageError: When a folder is missing, when there are fewer than two classes, when `val/` has a class that
            `train/` does not have, when a class has no image, and when the name of a class cannot be written as one
            line of UTF-8 text. The message names the folder.
    """
    check_flags(ImageError, strict=strict)
    if not isinstance(folder, str | Path):
        raise ImageError(f"the folder is {folder!r:.40}; pass the path of one with train/ and val/")
    folder = Path(folder)
    reader = ImageReader(transform, channels, workers, strict)
    classes, in_val = _classes_in(folder)
    train, val = (
        tuple(
            LabelledImage(path, label)
            for label, name in enumerate(classes)
            if name in present
            for path in find_images(folder / part / name)
        )
        for part, present in (("train", classes), ("val", in_val))
    )
    return ClassFolders(folder, tuple(classes), train, val, reader)


def check_class_folders(folder: str | Path) -> None:
    """Check before other work that `open_class_folders` can open a folder, as far as names tell.

    Raises:
        ImageError: As `open_class_folders` does, but images are not searched for.
    """
    _classes_in(Path(folder))


def _classes_in(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the classes in `train/` and in `val/`, after checking them."""
    if not folder.is_dir():
        raise ImageError(f"{missing_folder(folder)}; {_LAYOUT}")
    for name in ("train", "val"):
        if not (folder / name).is_dir():
            raise ImageError(f"{folder} has no folder {name}/{_parent_meant(folder)}; {_LAYOUT}")
    classes = class_names(folder / "train")
    if len(classes) < 2:
        found = counted(len(classes), "class folder")
        raise ImageError(f"{folder / 'train'} has {found}, but at least 2 are needed; {_LAYOUT}")
    in_val = class_names(folder / "val")
    if not in_val:
        raise ImageError(f"{folder / 'val'} has no class folders; {_LAYOUT}")
    if unknown := [name for name in in_val if name not in classes]:
        raise ImageError(
            f"{folder / 'val'} has classes that {folder / 'train'} does not have: {listed(unknown, NAMES_SHOWN)}; use "
            "the same folder names in both"
        )
    return classes, in_val


def _parent_meant(folder: Path) -> str:
    """Return " (did you mean data?)" for data/train, or "" if the parent is not such a folder either."""
    parent = folder.parent if folder.name else folder.resolve().parent
    found = (parent / "train").is_dir() and (parent / "val").is_dir()
    return f" (did you mean {printable(parent)}?)" if found else ""


def class_names(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted; raises ImageError for one that cannot be printed."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise ImageError(
            f"cannot read the folder {folder}: {error.strerror}; fix its permissions or remove it"
        ) from error
    for name in names:
        _check_class_name(name, folder)
    return names


def _check_class_name(name: str, folder: Path) -> None:
    """Raise ImageError for a name that cannot be a line of a text file: results list the classes one per line."""
    try:
        name.encode()
    except UnicodeEncodeError:
        fault = "is not valid UTF-8"
    else:
        if name.splitlines() == [name]:
            return
        fault = "contains a line break"
    # !a escapes what a terminal could not print or would obey.
    raise ImageError(f"the name of the class folder {name!a} in {folder} {fault}; rename the folder")
