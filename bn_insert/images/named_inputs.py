"""Several inputs of a network in one tensor file, a tensor for each, with the same number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import ImageError
from .batch_interface import Batches, Unreadable, check_at_least
from .tensor_batches import TensorBatches, read_tensors, shape_text


class NamedInputs(NamedTuple):
    """The inputs of a batch, and the origin of each of its rows.

    Args:
        inputs: By the name of the forward's parameter.
        paths: One per row, written FILE[row].
    """

    inputs: dict[str, Tensor]
    paths: tuple[Path, ...]


def named_input_batches(
    path: str | Path, names: Sequence[str] | Literal["all"], *, batch_size: int = 32, pin_memory: bool = False
) -> NamedInputBatches:
    """Return tensors of a file, one for each input of a network, as batches.

    Floating-point tensors and uint8 pixels become float32; other integers, such as indices, stay as they are.

    Args:
        path: A .pt, .pth or .safetensors file with a dict of tensors, of any shape with the rows in dimension 0.
        names: Names of the inputs; "all" takes all tensors of the dict.
        batch_size: Rows per batch.
        pin_memory: Put batches into page-locked memory where there is a GPU.

    Raises:
        ImageError: Naming the file, for a tensor that is missing, for different numbers of rows, and for the reasons of
            `tensor_batches`.
    """
    check_at_least(1, batch_size=batch_size)
    path = Path(path)
    tensors = read_tensors(path, names)
    rows = {len(tensor) if tensor.ndim else 0 for tensor in tensors.values()}
    if len(rows) > 1 or rows == {0}:
        shapes = ", ".join(f"{name} {shape_text(tensor)}" for name, tensor in tensors.items())
        raise ImageError(f"{path} has the shapes {shapes}: inputs need the same number of rows, one or more")
    return NamedInputBatches(
        {
            name: TensorBatches(path, tensor, range(len(tensor)), batch_size, pin_memory, _dtype(tensor))
            for name, tensor in tensors.items()
        }
    )


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() or tensor.dtype == torch.uint8 else tensor.dtype


@dataclass(frozen=True, eq=False)
class NamedInputBatches(Batches):
    """The inputs of a network as batches; created by `named_input_batches`.

    Args:
        parts: The rows of each input, by its name; the same rows in the same order.
    """

    parts: dict[str, TensorBatches]

    @property
    def images(self) -> int:
        """Number of rows."""
        return self._first.images

    @property
    def unreadable(self) -> list[Unreadable]:
        """Always empty: a tensor file can be read completely or not at all."""
        return []

    def __iter__(self) -> Iterator[NamedInputs]:  # type: ignore[override]
        """Yield the batches: the forward takes a dict with its names as it takes images."""
        for batches in zip(*self.parts.values(), strict=True):
            yield NamedInputs(dict(zip(self.parts, (batch.images for batch in batches), strict=True)), batches[0].paths)

    def head(self, count: int) -> NamedInputBatches:
        """Return the first `count` rows (all of them if there are fewer) as a new set."""
        return self._each(lambda part: part.head(count))

    def part(self, rank: int, ranks: int) -> NamedInputBatches:
        """Return the share of one of several processes, every ranks-th whole batch, as a new set."""
        return self._each(lambda part: part.part(rank, ranks))

    def with_pinned_memory(self) -> NamedInputBatches:
        """Return the same rows in page-locked memory, which a GPU can copy from while it computes."""
        return self._each(lambda part: part.with_pinned_memory())

    def sample(self, count: int | None, seed: int) -> NamedInputBatches:
        """Return `count` rows (None: all) drawn as by the function `sample`, as a new set."""
        return self._each(lambda part: part.sample(count, seed))

    @property
    def _first(self) -> TensorBatches:
        return next(iter(self.parts.values()))

    def _each(self, change: Callable[[TensorBatches], TensorBatches]) -> NamedInputBatches:
        return NamedInputBatches({name: change(part) for name, part in self.parts.items()})
