"""Image files as batches: decoded, also by several processes, stacked and normalized."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import ImageError, as_passed
from ..support.arguments import check_flags
from .batch_interface import Batch, Batches, Unreadable, check_at_least, dealt, pinned, sample
from .image_files import MODES, find_images, read_pixels
from .tensor_batches import TENSOR_SUFFIXES
from .transform import Transform
from .worker_processes import begin_worker, signals_held_back


def image_batches(
    source: str | Path | Sequence[str | Path],
    transform: Transform,
    *,
    batch_size: int = 32,
    workers: int = 0,
    channels: int = 3,
    strict: bool = False,
    pin_memory: bool = False,
) -> ImageBatches:
    """Return the images of a folder (sorted), or the given files (in that order), as batches.

    Args:
        source: A folder that is searched recursively, or image files.
        transform: Preprocessing of each picture.
        batch_size: Images per batch.
        workers: Processes that decode; 0 decodes in this process.
        channels: Channels that the network takes: 3 converts every picture to RGB, 1 to gray; see `read_image` in
            `image_files.py`.
        strict: Raise an error for the first unreadable file; otherwise such files are skipped and listed in
            `unreadable`.
        pin_memory: Put batches into page-locked memory where there is a GPU.

    Raises:
        ImageError: For a folder without images, a transform that does not fit the channels, and options out of range.
    """
    check_at_least(1, batch_size=batch_size)
    check_flags(ImageError, strict=strict)
    reader = ImageReader(transform, channels, workers, strict)
    paths = find_images(source) if isinstance(source, str | Path) else source
    if not paths:
        raise ImageError("the list of image files is empty; pass at least one")
    return ImageBatches(tuple(map(Path, paths)), reader, batch_size, pin_memory)


@dataclass(frozen=True, eq=False)
class ImageBatches(Batches):
    """Image files as batches; created by `image_batches`.

    Args:
        paths: The files, in the order of the batches.
        reader: How they are decoded.
        batch_size: Files per batch.
        pin_memory: Put batches into page-locked memory where there is a GPU.
        limit: Number of readable images after which a pass ends; None is no limit.
    """

    paths: tuple[Path, ...] = field(repr=False)
    reader: ImageReader
    batch_size: int
    pin_memory: bool
    limit: int | None = None
    _skipped: dict[Path, str] = field(default_factory=dict, init=False, repr=False)

    @property
    def images(self) -> int:
        """Number of images, including those that turn out to be unreadable."""
        return len(self.paths) if self.limit is None else min(len(self.paths), self.limit)

    @property
    def unreadable(self) -> list[Unreadable]:
        """Files that were skipped in the passes so far, each listed once."""
        return [Unreadable(path, reason) for path, reason in self._skipped.items()]

    def head(self, count: int) -> ImageBatches:
        """Return the first `count` readable images (all of them if there are fewer) as a new set."""
        check_at_least(1, images=count)
        return replace(self, limit=min(count, self.images))

    def part(self, rank: int, ranks: int) -> ImageBatches:
        """Return the share of one of several processes, every ranks-th whole batch, as a new set."""
        share = dealt(self.paths[: self.images], self.batch_size, rank, ranks)
        return replace(self, paths=tuple(share), limit=None)

    def with_pinned_memory(self) -> ImageBatches:
        """Return the same images in page-locked memory, which a GPU can copy from while it computes."""
        return replace(self, pin_memory=True)

    def sample(self, count: int | None, seed: int) -> ImageBatches:
        """Return `count` images (None: all) drawn as by the function `sample`, as a new set."""
        return replace(self, paths=tuple(sample(self.paths[: self.images], count, seed)), limit=None)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            ImageError: When images in one batch differ in size, when no file can be read, when a worker process is
                killed, and with `strict` for the first unreadable file.
        """
        missing = self.images
        if missing == 0:  # the share of a process may be empty
            return
        decoded = self.reader.read(self.paths, min(self.batch_size, missing), self._skipped, wanted=missing)
        with closing(decoded):
            for images, paths, _ in decoded:
                if images is not None:
                    wanted = images[:missing]
                    yield Batch(pinned(wanted) if self.pin_memory else wanted, paths[:missing])
                    missing -= len(wanted)
                if missing == 0:
                    return
        if missing == self.images:
            path, reason = self.unreadable[0]
            if len(self.paths) == 1:
                raise ImageError(f"the only image file cannot be read: {path}: {reason}")
            raise ImageError(f"none of the {len(self.paths)} image files can be read; the first is {path}: {reason}")


class DecodedBatch(NamedTuple):
    """One batch of image files; `images` is None when none of them can be read."""

    images: Float32[Tensor, "images channels height width"] | None
    paths: tuple[Path, ...]
    unreadable: tuple[Unreadable, ...]


@dataclass(frozen=True)
class ImageReader:
    """How image files become batches.

    Args:
        transform: Preprocessing of each picture.
        channels: Channels that the network takes: 3 converts every picture to RGB, 1 to gray.
        workers: Processes that decode; 0 decodes in this process.
        strict: Raise an error for the first unreadable file instead of skipping it.

    Raises:
        ImageError: For options out of range, and a transform that does not fit the channels.
    """

    transform: Transform
    channels: int
    workers: int
    strict: bool = False

    def __post_init__(self) -> None:
        """Check the options before any file is read."""
        if not isinstance(self.transform, Transform):
            raise ImageError(
                f"transform is {self.transform!r:.80}; pass a bn_insert.images.Transform: Transform() for the "
                "preprocessing of torchvision's networks"
            )
        check_at_least(0, workers=self.workers)
        if self.channels not in MODES:
            raise ImageError(
                f"image files provide 1 or 3 channels, but the network takes {self.channels}; such images are read "
                f"from tensor files only ({', '.join(TENSOR_SUFFIXES)}), of shape N x {self.channels} x H x W"
            )
        self.transform.check_channels(self.channels)

    def read(
        self, paths: tuple[Path, ...], size: int, skipped: dict[Path, str], *, wanted: int | None = None
    ) -> Generator[DecodedBatch, None, None]:
        """Yield the files as batches, in their order.

        Args:
            paths: The files.
            size: Files per batch.
            skipped: Receives the files that cannot be read, with the reason for each.
            wanted: Number of images after which the caller stops; None reads all of them.

        Raises:
            ImageError: When images in one batch differ in size, when a worker process is killed, and with `strict`
                for the first unreadable file.
        """
        # A second process would not make a single batch ready earlier; here, nothing is read ahead.
        workers = 0 if (len(paths) if wanted is None else wanted) <= size else self.workers
        chunks = _decode(_Chunks(paths, size, self), workers)
        with closing(chunks):
            for chunk in chunks:
                if self.strict and chunk.unreadable:
                    path, reason = chunk.unreadable[0]
                    raise ImageError(
                        f"cannot read {path}: {reason}; repair or remove the file, or leave out "
                        f"{as_passed('strict')} to skip unreadable files"
                    )
                if chunk.differing:
                    raise ImageError(
                        f"images in one batch differ in size: {chunk.differing}; set a crop ({as_passed('crop')})"
                    )
                for path, reason in chunk.unreadable:
                    skipped.setdefault(path, reason)
                pixels = chunk.pixels
                images = None if pixels is None else self.transform.normalize(torch.from_numpy(pixels))
                yield DecodedBatch(images, chunk.paths, chunk.unreadable)


class _Chunk(NamedTuple):
    """The result of decoding one batch of files.

    Args:
        pixels: The images; None when no file can be read, and when sizes differ.
        paths: The files that were read.
        unreadable: The files that cannot be read.
        differing: Two images that differ in size, as a phrase; empty when all are alike.
    """

    pixels: UInt8[np.ndarray, "images channels height width"] | None
    paths: tuple[Path, ...]
    unreadable: tuple[Unreadable, ...]
    differing: str = ""


def _decode(chunks: _Chunks, workers: int) -> Generator[_Chunk, None, None]:
    """Yield the chunks in their order; PyTorch's random state is left alone.

    Args:
        chunks: The files.
        workers: Processes that decode; 0 decodes in this process.

    Raises:
        ImageError: When a worker process is killed.
    """
    if workers == 0:
        yield from map(chunks.__getitem__, range(len(chunks)))
        return
    with warnings.catch_warnings():
        # More workers than cores, and forking a process with threads, as PyTorch's loader always does.
        warnings.simplefilter("ignore")
        loader = DataLoader(
            chunks,
            batch_size=None,
            num_workers=min(workers, len(chunks)),
            collate_fn=_unchanged,
            worker_init_fn=begin_worker,
            generator=torch.Generator(),  # otherwise it would draw from the global one
        )
        with signals_held_back():
            decoded = iter(loader)
    try:
        yield from decoded
    except RuntimeError as error:
        raise ImageError(
            f"a process that decodes images ended early, perhaps out of memory ({error}); use fewer workers "
            f"({as_passed('workers')})"
        ) from error


@dataclass(frozen=True)
class _Chunks(Dataset[_Chunk]):
    """Files decoded chunk by chunk, in the worker processes.

    Pixels are sent as uint8, a quarter of the size of the input, and as NumPy arrays: tensors would be sent through
    shared memory, of which a Docker container has 64 MB, and are no faster.
    """

    paths: tuple[Path, ...]
    chunk_size: int
    reader: ImageReader

    def __len__(self) -> int:
        return len(range(0, len(self.paths), self.chunk_size))

    def __getitem__(self, number: int) -> _Chunk:
        start = number * self.chunk_size
        paths, pixels, unreadable = [], [], []
        for path in self.paths[start : start + self.chunk_size]:
            result = read_pixels(path, self.reader.transform, self.reader.channels)
            if isinstance(result, Unreadable):
                unreadable.append(result)
                if self.reader.strict:
                    break
            else:
                paths.append(path)
                pixels.append(result)
        differing = _differing(paths, pixels)
        if differing or not pixels:
            return _Chunk(None, tuple(paths), tuple(unreadable), differing)
        # Pillow's memory order is height, width, channels; without `out` stack would keep it.
        batch = np.stack(pixels, out=np.empty((len(pixels), *pixels[0].shape), np.uint8))
        return _Chunk(batch, tuple(paths), tuple(unreadable))


def _differing(paths: Sequence[Path], pixels: Sequence[UInt8[np.ndarray, "channels _ _"]]) -> str:
    """Return the first picture and the first that differs from it in size, as a phrase; empty when all are alike."""
    other = next((number for number, each in enumerate(pixels) if each.shape != pixels[0].shape), None)
    if other is None:
        return ""
    sizes = (f"{paths[number]} has {pixels[number].shape[2]} x {pixels[number].shape[1]}" for number in (0, other))
    return " and ".join(sizes)


def _unchanged(chunk: Any) -> Any:
    return chunk
