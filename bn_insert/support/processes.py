"""Helpers for distributed runs (torchrun)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor, nn

from ..errors import BNInsertError, CalibrationError

T = TypeVar("T")

_LONGEST_WAIT = timedelta(minutes=2)  # ranks that work together start within seconds


@dataclass(frozen=True)
class Ranks:
    """This process's rank among the processes that work together, and their number.

    Attributes:
        rank: The rank, counted from 0; 0 for a process on its own.
        count: Number of processes; 1 for a process on its own.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Return this process's rank in the default process group."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the first rank, the one that writes files."""
        return self.rank == 0

    def share(self, items: Sequence[T], *, equal: bool = True) -> list[T]:
        """Return this rank's share of the items: every count-th, starting at its rank.

        Args:
            items: The items, the same on all ranks.
            equal: Repeat items from the beginning, so that all ranks get the same number. Ranks that exchange gradients
                at each step would otherwise wait for each other forever.
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
        """Return the values of all ranks on each of them, in the order of the ranks."""
        if self.count == 1:
            return [value]
        values: list[T] = [value] * self.count
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the first rank's buffers, such as BatchNorm's running statistics, to all ranks."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Wait until all ranks have reached this point."""
        if self.count > 1:
            dist.barrier()

    def meet(self, function: str) -> None:
        """Wait until all ranks have called a function whose work they share, for at most two minutes.

        Through the group's key-value store, not by a collective: one would pair with whatever collective the other
        ranks run instead, such as that of DistributedDataParallel, or wait for the group's own timeout.

        Args:
            function: Name of the function, the same on all ranks, for messages too.

        Raises:
            CalibrationError: If some ranks have not called it by then.
        """
        if self.count == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        place = f"bn_insert/{function}"
        meeting, waiting = divmod(store.add(place, 1) - 1, self.count)  # each meeting takes as many as there are ranks
        if waiting == self.count - 1:
            store.set(f"{place}/{meeting}", "")
        try:
            store.wait([f"{place}/{meeting}"], _LONGEST_WAIT)
        except RuntimeError as error:  # of a subclass that differs between stores
            arrived = store.add(place, 0) - meeting * self.count
            store.add(place, -1)  # a later call starts a new meeting
            raise CalibrationError(
                f"{function} was called on {arrived} of {self.count} ranks (this is rank {self.rank}), and waited "
                f"{_LONGEST_WAIT.total_seconds():.0f} s for the others. Call it on every rank of the process group, "
                "each with its own part of the batches, which may be empty; or call it before init_process_group, and "
                "load the result on every rank"
            ) from error


def on_every_rank(work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank, and return the results of all ranks on each of them, in the order of the ranks.

    An error on one rank stops all of them, so that no rank waits for another forever. Without an initialized process
    group, there is only one result.

    Args:
        work: Its result is pickled and sent to all ranks, so it should be small.

    Raises:
        CalibrationError: If `work` fails on another rank; the message quotes that error, and has its class if it is
            a CalibrationError. On that rank itself, the error is raised as it is.
    """
    ranks = Ranks.current()
    if ranks.count == 1:
        return [work()]
    result, error = _attempt(work)
    kind = type(error) if isinstance(error, CalibrationError) else CalibrationError
    outcomes = ranks.gathered((result, None if error is None else (kind, _message(error))))
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise failure[0](f"rank {rank} failed: {failure[1]}")
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
    """Join the process group if torchrun started this process, and leave it afterwards.

    Args:
        device: The requested device. On a GPU the processes communicate by NCCL, on a CPU by gloo.

    Yields:
        The device to use: with NCCL, each process's own GPU.
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
