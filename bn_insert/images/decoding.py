"""Decode image files, batch by batch, in this process or in worker processes."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch.utils.data import DataLoader, Dataset

from ..errors import ImageError
from .batches import Unreadable
from .files import read_pixels
from .transform import Transform


class Chunk(NamedTuple):
    """The result of decoding one batch of files.

    Args:
        pixels: The pictures; None when no file can be read, and when sizes differ.
        paths: The files that were read.
        unreadable: The files that cannot be read.
        differing: Two pictures that differ in size, as a phrase; empty when all are alike.
    """

    pixels: UInt8[np.ndarray, "images channels height width"] | None
    paths: tuple[Path, ...]
    unreadable: tuple[Unreadable, ...]
    differing: str = ""


def decode(
    paths: tuple[Path, ...], transform: Transform, *, channels: int, size: int, workers: int, strict: bool
) -> Generator[Chunk, None, None]:
    """Yield the decoded files, `size` at a time and in their order; PyTorch's random state is left alone.

    Args:
        paths: The files.
        transform: Preprocessing; of it resizing and cropping are done here.
        channels: 1 or 3; every picture is converted to grey or RGB.
        size: Files per chunk.
        workers: Processes that decode; 0 decodes in this process.
        strict: End a chunk at the first unreadable file.

    Raises:
        ImageError: When a worker process is killed.
    """
    chunks = _Chunks(paths, size, transform, channels, strict)
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
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # otherwise it would draw from the global one
        )
        with _signals_held_back():
            decoded = iter(loader)
    try:
        yield from decoded
    except RuntimeError as error:
        raise ImageError(
            f"a process that decodes images ended early, perhaps out of memory ({error}); use fewer workers (--workers)"
        ) from error


@dataclass(frozen=True)
class _Chunks(Dataset[Chunk]):
    """Files decoded chunk by chunk, in the worker processes.

    Pixels are sent as uint8, a quarter of the size of the input, and as NumPy arrays: tensors would be sent through
    shared memory, of which a Docker container has 64 MB, and are no faster.
    """

    paths: tuple[Path, ...]
    chunk_size: int
    transform: Transform
    channels: int
    strict: bool

    def __len__(self) -> int:
        return len(range(0, len(self.paths), self.chunk_size))

    def __getitem__(self, number: int) -> Chunk:
        start = number * self.chunk_size
        paths, pixels, unreadable = [], [], []
        for path in self.paths[start : start + self.chunk_size]:
            result = read_pixels(path, self.transform, self.channels)
            if isinstance(result, Unreadable):
                unreadable.append(result)
                if self.strict:
                    break
            else:
                paths.append(path)
                pixels.append(result)
        differing = _differing(paths, pixels)
        if differing or not pixels:
            return Chunk(None, tuple(paths), tuple(unreadable), differing)
        # Pillow's memory order is height, width, channels; without `out` stack would keep it.
        batch = np.stack(pixels, out=np.empty((len(pixels), *pixels[0].shape), np.uint8))
        return Chunk(batch, tuple(paths), tuple(unreadable))


def _differing(paths: Sequence[Path], pixels: Sequence[UInt8[np.ndarray, "channels _ _"]]) -> str:
    """Return the first picture and the first that differs from it in size, as a phrase; empty when all are alike."""
    other = next((number for number, each in enumerate(pixels) if each.shape != pixels[0].shape), None)
    if other is None:
        return ""
    sizes = (f"{paths[number]} has {pixels[number].shape[2]} x {pixels[number].shape[1]}" for number in (0, other))
    return " and ".join(sizes)


_SIGNALS = {signal.SIGINT, signal.SIGTERM}


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Keep signals from ending a worker process before it has started; this process receives its own a moment later."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(_number: int) -> None:
    torch.set_num_threads(1)
    # Signals to a whole process group (Ctrl-C, or from a scheduler) are for the main process, which ends the workers
    # when its results are complete: a worker that dies of one would end it with a traceback from PyTorch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        os.setpgrp()
        while signal.sigpending() & _SIGNALS:  # sent to the group while this process was in it
            signal.sigwait(_SIGNALS)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _unchanged(chunk: Any) -> Any:
    return chunk
