"""Work that the ranks of a torch.distributed process group share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from .errors import BNInsertError, CalibrationError

T = TypeVar("T")


def ranks() -> int:
    """Return the number of ranks that share the work: 1 without an initialized process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_every_rank(work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank, and return all ranks' results, in the order of the ranks, on each of them.

    Without an initialized process group: the one result. Results travel by pickle; let them be small.
    When `work` raises on a rank, that error is raised there, and a CalibrationError that quotes it on all the others:
    no rank is left waiting.
    """
    if ranks() == 1:
        return [work()]
    result, error = _attempt(work)
    outcomes: list[tuple[T | None, str | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, None if error is None else _message(error)))
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
