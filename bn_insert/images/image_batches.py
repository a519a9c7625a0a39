"""A folder of images, or a tensor file, as batches for calibration and comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..errors import ImageError
from .batches import Batch, Batches, Unreadable, check_at_least, dealt, pinned, sample
from .decoding import Chunk, decode
from .files import IMAGE_SUFFIXES, MODES, find_images
from .tensor_batches import TENSOR_SUFFIXES, TensorBatches, tensor_batches
from .transform import Transform

__all__ = [
    "IMAGE_SUFFIXES",
    "TENSOR_SUFFIXES",
    "Batch",
    "Batches",
    "ImageBatches",
    "TensorBatches",
    "Transform",
    "Unreadable",
    "find_images",
    "image_batches",
    "open_batches",
    "sample",
    "tensor_batches",
]


def open_batches(
    source: str | Path,
    transform: Transform,
    *,
    images: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    workers: int = 0,
    channels: int = 3,
    strict: bool = False,
    pin_memory: bool = False,
) -> Batches:
    """Return the images of a folder, of a tensor file, or of one image file, as batches in random order.

    images: how many to draw at random, by `seed`; None takes all.  channels: what the network takes.  transform,
    workers and strict are for image files alone: a tensor file's values are taken as they are.
    Raises ImageError for a source of another kind, and as `find_images`, `image_batches` and `tensor_batches` do.
    """
    source = Path(source)
    suffix = source.suffix.lower()
    known = f"tensor files ({', '.join(TENSOR_SUFFIXES)}) and images ({', '.join(IMAGE_SUFFIXES)})"
    check_at_least(1, images=images)
    if not source.exists():
        raise ImageError(f"{source} does not exist; give a folder of images, or a file: {known}")
    if source.is_file() and suffix in TENSOR_SUFFIXES:
        tensors = tensor_batches(source, batch_size=batch_size, channels=channels, pin_memory=pin_memory)
        return tensors.sample(images, seed)
    if not source.is_dir() and not (source.is_file() and suffix in IMAGE_SUFFIXES):
        raise ImageError(f"{source} is neither a folder of images nor a file of a kind that is read: {known}")
    files = image_batches(
        source if source.is_dir() else [source],
        transform,
        batch_size=batch_size,
        workers=workers,
        channels=channels,
        strict=strict,
        pin_memory=pin_memory,
    )
    return files.sample(images, seed)


def image_batches(
    source: str | Path | Sequence[Path],
    transform: Transform,
    *,
    batch_size: int = 32,
    workers: int = 0,
    channels: int = 3,
    strict: bool = False,
    pin_memory: bool = False,
) -> ImageBatches:
    """Return the images of a folder (sorted), or of the given files (in that order), as batches.

    channels: 3 makes every picture RGB and 1 makes it grey, see `image_files.read_image`.  workers: processes that
    decode; 0 decodes in this one.  strict: the first file that cannot be read is an error; else such files are skipped
    and listed in `unreadable`.  pin_memory: put batches into page-locked memory where there is a GPU.
    Raises ImageError for a folder without images, a transform that does not fit the channels, and options out of range.
    """
    check_at_least(1, batch_size=batch_size)
    check_at_least(0, workers=workers)
    if channels not in MODES:
        raise ImageError(
            f"image files give 1 or 3 channels, but the network takes {channels}; "
            f"give a tensor file ({', '.join(TENSOR_SUFFIXES)}) of shape N x {channels} x H x W"
        )
    transform.check_channels(channels)
    paths = find_images(source) if isinstance(source, str | Path) else source
    if not paths:
        raise ImageError("the list of image files is empty; give at least one")
    return ImageBatches(tuple(paths), transform, batch_size, workers, channels, strict, pin_memory)


@dataclass(frozen=True, eq=False)
class ImageBatches(Batches):
    """Image files as batches; `image_batches` makes one.

    limit: after how many images that can be read a pass ends; None is no limit.
    """

    paths: tuple[Path, ...] = field(repr=False)
    transform: Transform
    batch_size: int
    workers: int
    channels: int
    strict: bool
    pin_memory: bool
    limit: int | None = None
    _skipped: dict[Path, str] = field(default_factory=dict, init=False, repr=False)

    @property
    def images(self) -> int:
        """Number of images, those included that turn out to be unreadable."""
        return len(self.paths) if self.limit is None else min(len(self.paths), self.limit)

    @property
    def unreadable(self) -> list[Unreadable]:
        """Files that the passes so far had to skip, each named once."""
        return [Unreadable(path, reason) for path, reason in self._skipped.items()]

    def head(self, count: int) -> ImageBatches:
        """Return the first `count` images that can be read (all where there are fewer) as a set of their own."""
        check_at_least(1, images=count)
        return replace(self, limit=min(count, self.images))

    def part(self, rank: int, ranks: int) -> ImageBatches:
        """Return the share of one of several processes: every ranks-th whole batch, as a set of their own."""
        share = dealt(self.paths[: self.images], self.batch_size, rank, ranks)
        return replace(self, paths=tuple(share), limit=None)

    def with_pinned_memory(self) -> ImageBatches:
        """Return the same images in page-locked memory, from which a GPU copies while it computes."""
        return replace(self, pin_memory=True)

    def sample(self, count: int | None, seed: int) -> ImageBatches:
        """Return `count` images (None: all) drawn as by the function `sample`, as a set of their own."""
        return replace(self, paths=tuple(sample(self.paths[: self.images], count, seed)), limit=None)

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches.

        Raises ImageError when pictures in one batch differ in size, when no file could be read, when a process that
        decodes was killed, and if strict for the first file that cannot be read.
        """
        missing = self.images
        if missing == 0:  # a process may have no share
            return
        size = min(self.batch_size, missing)
        # A single batch is ready no earlier with a second process, and is read here without reading ahead.
        workers = 0 if missing == size else self.workers
        decoding = decode(
            self.paths, self.transform, channels=self.channels, size=size, workers=workers, strict=self.strict
        )
        with closing(decoding):
            for chunk in decoding:
                self._note(chunk)
                if chunk.pixels is not None:
                    images = self.transform.normalize(torch.from_numpy(chunk.pixels[:missing]))
                    paths = chunk.paths[:missing]
                    missing -= len(images)
                    yield Batch(pinned(images) if self.pin_memory else images, paths)
                if missing == 0:
                    return
        if missing == self.images:
            path, reason = self.unreadable[0]
            raise ImageError(f"none of the {len(self.paths)} image files can be read; the first is {path}: {reason}")

    def _note(self, chunk: Chunk) -> None:
        """Keep account of the files that could not be read."""
        if self.strict and chunk.unreadable:
            path, reason = chunk.unreadable[0]
            raise ImageError(
                f"cannot read {path}: {reason}; mend or remove it, or leave out strict (--strict) to skip such files"
            )
        if chunk.differing:
            raise ImageError(
                f"pictures of one batch differ in size: {chunk.differing}; give a crop (--crop), or a batch size of 1"
            )
        for path, reason in chunk.unreadable:
            self._skipped.setdefault(path, reason)
