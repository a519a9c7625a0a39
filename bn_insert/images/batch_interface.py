"""A set of images as batches that are the same in every pass."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float32
from torch import Tensor

from ..errors import ImageError
from ..support.arguments import is_whole

T = TypeVar("T")


class Batch(NamedTuple):
    """Images as the network takes them, and the origin of each; the first value is the input, as from a DataLoader.

    Args:
        images: The images.
        paths: One path per image; a row of a tensor file is written FILE[row].
    """

    images: Float32[Tensor, "images channels *size"]
    paths: tuple[Path, ...]


class Unreadable(NamedTuple):
    """A file that was skipped, and the reason."""

    path: Path
    reason: str


class Batches(ABC):
    """Images in batches; every pass over them yields the same batches in the same order."""

    @property
    @abstractmethod
    def images(self) -> int:
        """Number of images, including those that turn out to be unreadable."""

    @property
    @abstractmethod
    def unreadable(self) -> list[Unreadable]:
        """Files that were skipped in the passes so far, each listed once."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; none is empty, and one with unreadable files has fewer images than the others."""

    @abstractmethod
    def head(self, count: int) -> Batches:
        """Return the first `count` readable images (all of them if there are fewer) as a new set."""

    @abstractmethod
    def part(self, rank: int, ranks: int) -> Batches:
        """Return the share of one of several processes, every ranks-th whole batch, as a new set."""

    @abstractmethod
    def with_pinned_memory(self) -> Batches:
        """Return the same images in page-locked memory, which a GPU can copy from while it computes."""

    @abstractmethod
    def sample(self, count: int | None, seed: int) -> Batches:
        """Return `count` images (None: all) drawn as by the function `sample`, as a new set."""


def dealt(items: Sequence[T], batch_size: int, rank: int, ranks: int) -> list[T]:
    """Return the items of every ranks-th batch, starting with number `rank`: whole batches, each given to one rank."""
    starts = range(rank * batch_size, len(items), ranks * batch_size)
    return [item for start in starts for item in items[start : start + batch_size]]


def sample(items: Sequence[T], count: int | None, seed: int) -> list[T]:
    """Return `count` of the items, drawn at random without replacement; all of them, shuffled, if there are fewer.

    The draw depends only on the seed and on the number of items, in every version of Python, and a smaller count draws
    the beginning of a larger one. No global random state is touched.

    Args:
        items: What to draw from.
        count: How many to draw; None draws all of them.
        seed: Seed for the draw.

    Raises:
        ImageError: For a count below 1.
    """
    check_at_least(1, images=count)
    generator = random.Random(seed)
    keys = [generator.random() for _ in items]  # random() is the one method whose values Python promises to keep
    return [items[position] for position in sorted(range(len(items)), key=keys.__getitem__)[:count]]


def check_at_least(least: int, **options: int | None) -> None:
    """Raise ImageError, naming the option, unless each is a whole number of at least `least`, or None."""
    for name, value in options.items():
        if value is not None and not is_whole(value):
            raise ImageError(f"{name} is {value!r:.40}; use a whole number, {least} or more")
        if value is not None and value < least:
            raise ImageError(f"{name} is {value}; use {least} or more")


def pinned(images: Tensor) -> Tensor:
    """Return the images in page-locked memory; unchanged without a GPU."""
    return images.pin_memory() if torch.cuda.is_available() else images
