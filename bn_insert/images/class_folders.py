"""Labelled images: `train/` and `val/` with one folder a class, read in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from ..errors import ImageError
from .batches import Unreadable, check_at_least
from .decoding import Chunk, decode
from .files import MODES, find_images
from .transform import Transform

_LAYOUT = "the layout is train/CLASS/IMAGE and val/CLASS/IMAGE"


class LabelledImage(NamedTuple):
    """An image file, and the position of its class among the classes."""

    path: Path
    label: int


class LabelledBatch(NamedTuple):
    """Images as the network takes them, and the position of each one's class."""

    images: Float32[Tensor, "images channels height width"]
    labels: Int64[Tensor, " images"]


@dataclass(frozen=True, eq=False)
class ClassFolders:
    """The images of a folder with `train/` and `val/`; `open_class_folders` makes one.

    classes: names of the folders in `train/`, sorted: the outputs of a network trained on them, in this order.
    """

    folder: Path
    classes: tuple[str, ...]
    train: tuple[LabelledImage, ...] = field(repr=False)
    val: tuple[LabelledImage, ...] = field(repr=False)
    transform: Transform
    channels: int
    workers: int
    _skipped: dict[Path, str] = field(default_factory=dict, init=False, repr=False)

    @property
    def unreadable(self) -> list[Unreadable]:
        """Files that had to be skipped so far, each named once."""
        return [Unreadable(path, reason) for path, reason in self._skipped.items()]

    @property
    def digest(self) -> str:
        """SHA-256 of the names of all images: runs with the same seed and digest see the same batches."""
        names = sorted(str(image.path.relative_to(self.folder)) for image in (*self.train, *self.val))
        return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()

    def batches(self, images: Sequence[LabelledImage], size: int, *, full: bool = False) -> Iterator[LabelledBatch]:
        """Give the images in batches of `size`, in their order.

        A file that cannot be read is left out and listed in `unreadable`; with `full` another image of its batch takes
        its place, so that batches have the size that their number of files says, whichever process reads them.
        Raises ImageError when pictures in one batch differ in size, and with `full` when all of a batch are damaged.
        """
        labels = dict(images)
        workers = 0 if len(images) <= size else self.workers
        paths = tuple(image.path for image in images)
        decoding = decode(paths, self.transform, channels=self.channels, size=size, workers=workers, strict=False)
        with closing(decoding):
            for chunk in decoding:
                self._note(chunk)
                if chunk.pixels is None:
                    if full:
                        path, reason = chunk.unreadable[0]
                        raise ImageError(
                            f"none of the {len(chunk.unreadable)} images of a batch can be read; the first is {path}: "
                            f"{reason}; mend or remove them"
                        )
                    continue
                pixels = self.transform.normalize(torch.from_numpy(chunk.pixels))
                targets = torch.tensor([labels[path] for path in chunk.paths])
                if full and chunk.unreadable:
                    rows = torch.arange(len(chunk.paths) + len(chunk.unreadable)) % len(chunk.paths)
                    pixels, targets = pixels[rows], targets[rows]
                yield LabelledBatch(pixels, targets)

    def _note(self, chunk: Chunk) -> None:
        if chunk.differing:
            raise ImageError(f"pictures of one batch differ in size: {chunk.differing}; give a crop (--crop)")
        for path, reason in chunk.unreadable:
            self._skipped.setdefault(path, reason)


def open_class_folders(
    folder: str | Path, transform: Transform, *, channels: int = 3, workers: int = 0
) -> ClassFolders:
    """Return the labelled images of a folder that has `train/` and `val/`, each with one folder a class.

    transform: the same for both, without random crops.  channels: what the network takes, 1 or 3.  workers: processes
    that decode; 0 decodes in this one.  Hidden folders do not count; `val/` may lack classes that `train/` has.
    Raises ImageError, naming the folder, when one is missing, when there are fewer than two classes, when `val/` has a
    class that `train/` has not, and when a class has no image.
    """
    folder = Path(folder)
    check_at_least(0, workers=workers)
    if channels not in MODES:
        raise ImageError(f"image files give 1 or 3 channels, but the network takes {channels}")
    transform.check_channels(channels)
    if not folder.is_dir():
        fault = "is not a folder" if folder.exists() else "does not exist"
        raise ImageError(f"{folder} {fault}; {_LAYOUT}")
    for name in ("train", "val"):
        if not (folder / name).is_dir():
            raise ImageError(f"{folder} has no folder {name}/; {_LAYOUT}")
    classes = _classes(folder / "train")
    if len(classes) < 2:
        raise ImageError(f"{folder / 'train'} has {len(classes)} class folders, and 2 are the least; {_LAYOUT}")
    in_val = _classes(folder / "val")
    if not in_val:
        raise ImageError(f"{folder / 'val'} has no class folders; {_LAYOUT}")
    if unknown := [name for name in in_val if name not in classes]:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise ImageError(
            f"{folder / 'val'} has classes that {folder / 'train'} has not: {shown}; give the folders the same names"
        )
    train, val = (
        tuple(
            LabelledImage(path, label)
            for label, name in enumerate(classes)
            if name in present
            for path in find_images(folder / part / name)
        )
        for part, present in (("train", classes), ("val", in_val))
    )
    return ClassFolders(folder, tuple(classes), train, val, transform, channels, workers)


def _classes(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise ImageError(f"cannot read the folder {folder}: {error.strerror}; mend or remove it") from error
