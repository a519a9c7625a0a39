"""The processes that work on one network together, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor, nn

from ..errors import BNInsertError, CalibrationError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's number among those that train together, and how many they are; 0 of 1 without others."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Return this process's place in the default process group."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """This is the process that writes files."""
        return self.rank == 0

    def share(self, items: Sequence[T], *, equal: bool = True) -> list[T]:
        """Return every count-th item from this rank's number on.

        equal: fill up from the beginning so that all ranks have as many: else some would wait for others for ever.
        """
        missing = -len(items) % self.count if equal else 0
        filled = [*items, *(items[number % len(items)] for number in range(missing))] if missing else items
        return list(filled[self.rank :: self.count])

    def total(self, values: Float64[Tensor, " values"]) -> Float64[Tensor, " values"]:
        """Return the sums over all ranks."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, value: T) -> list[T]:
        """Return every rank's value, in the order of the ranks, on each of them."""
        if self.count == 1:
            return [value]
        values: list[T] = [value] * self.count
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Give all ranks the first one's buffers: the running statistics of BatchNorm."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Return once all ranks have come here."""
        if self.count > 1:
            dist.barrier()


def on_every_rank(work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank, and return all ranks' results, in the order of the ranks, on each of them.

    Without an initialized process group: the one result. Results travel by pickle; let them be small.
    When `work` raises on a rank, that error is raised there, and a CalibrationError that quotes it on all the others:
    no rank is left waiting.
    """
    ranks = Ranks.current()
    if ranks.count == 1:
        return [work()]
    result, error = _attempt(work)
    outcomes = ranks.gathered((result, None if error is None else _message(error)))
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(outcomes):
        if message is not None:
            raise CalibrationError(f"rank {rank} failed: {message}")
    return [found for found, _ in outcomes]  # type: ignore[misc]  # without a message there is a result


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # noqa: BLE001 - raised again by the caller, once the other ranks know
        return None, error


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, BNInsertError) else f"{type(error).__name__}: {error}"


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, and leave them afterwards; alone where it started none.

    Yields the device to work on: with NCCL each process's own GPU, with gloo the CPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
