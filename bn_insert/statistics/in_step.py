"""Batches of several ranks, in the order in which one process would run them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from itertools import count
from typing import Any

from ..support.processes import Ranks
from .passes import checked_batches
from .recorder import Recorder

_STOPPED = "stopped"
_END = object()


def in_step(
    batches: Iterable[Any], recorder: Recorder, images_in: Callable[[Any, int], int], few: int
) -> Generator[Any]:
    """Yield the batches of this rank; where there are small ones, each in its turn.

    The order is that of one process that takes a batch of each rank in turn. Before a small batch, the recorder of its
    rank gets what those of the other ranks have recorded so far.

    The ranks exchange values in each round. One that fails has to close the generator (`contextlib.closing`): the
    others then end, too, instead of waiting for it.

    Args:
        batches: Those of this rank.
        recorder: The recorder of this rank, which records the batches.
        images_in: Returns the number of images in a batch; the second argument is its number.
        few: Batches with fewer images are small.
    """
    ranks, iterator = Ranks.current(), iter(checked_batches(batches))
    waited_for = True  # by the other ranks

    def exchanged(value: Any) -> list[Any]:
        """Return the values of all ranks; none once a rank has failed."""
        nonlocal waited_for
        values = ranks.gathered(value)
        waited_for = _STOPPED not in values
        return values if waited_for else []

    try:
        for number in count():
            batch = next(iterator, _END)
            sizes = exchanged(None if batch is _END else images_in(batch, number))
            if all(size is None for size in sizes):
                waited_for = False
                return
            for rank, size in enumerate(sizes):
                if size is not None and size < few:
                    parts = exchanged((recorder.images, recorder.recorded()))
                    if not parts:
                        return
                    recorder.set_elsewhere(part for other, part in enumerate(parts) if other != ranks.rank)
                if batch is not _END and rank == ranks.rank:
                    yield batch
    finally:
        if waited_for:
            ranks.gathered(_STOPPED)
