"""One pass over image files: the batches that they decode to, and the files that cannot be read."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor

from ..errors import ImageError
from .batches import Unreadable, check_at_least
from .decoding import decode
from .files import MODES
from .tensor_batches import TENSOR_SUFFIXES
from .transform import Transform


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
        channels: Channels that the network takes: 3 converts every picture to RGB, 1 to grey.
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
            ImageError: When pictures in one batch differ in size, when a worker process is killed, and with `strict`
                for the first unreadable file.
        """
        # A single batch is ready no earlier with a second process, and is read here without reading ahead.
        workers = 0 if (len(paths) if wanted is None else wanted) <= size else self.workers
        chunks = decode(paths, self.transform, channels=self.channels, size=size, workers=workers, strict=self.strict)
        with closing(chunks):
            for chunk in chunks:
                if self.strict and chunk.unreadable:
                    path, reason = chunk.unreadable[0]
                    raise ImageError(
                        f"cannot read {path}: {reason}; repair or remove the file, or leave out strict (--strict) to "
                        "skip unreadable files"
                    )
                if chunk.differing:
                    raise ImageError(
                        f"pictures in one batch differ in size: {chunk.differing}; set a crop (--crop), or use a "
                        "batch size of 1"
                    )
                for path, reason in chunk.unreadable:
                    skipped.setdefault(path, reason)
                pixels = chunk.pixels
                images = None if pixels is None else self.transform.normalize(torch.from_numpy(pixels))
                yield DecodedBatch(images, chunk.paths, chunk.unreadable)
