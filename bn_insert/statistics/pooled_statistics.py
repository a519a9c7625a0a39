"""Statistics at several places in a model, pooled over batches and over the processes of a run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from ..support.processes import Ranks, on_every_rank
from .moments import Moments, merge
from .passes import no_batches
from .sampling_error import relative_standard_error


@dataclass(frozen=True)
class Statistics:
    """What was recorded at each place in a model, by the place's name.

    Attributes:
        pooled: Moments of all values.
        spread: What `batch_spread` returns for all forward passes, or `image_spread` for all images.
        passes: How many forward passes values were recorded in, each of them over one batch or several; of a spread
            between images, how many images there are.
        calls: How many times values were recorded.
    """

    pooled: Mapping[str, Moments]
    spread: Mapping[str, Moments]
    passes: Mapping[str, int]
    calls: Mapping[str, int]

    @classmethod
    def merged(cls, parts: Iterable[Statistics]) -> Statistics:
        """Return the statistics of all parts together."""
        pooled: defaultdict[str, list[Moments]] = defaultdict(list)
        spread: defaultdict[str, list[Moments]] = defaultdict(list)
        passes: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for part in parts:
            passes.update(part.passes)
            calls.update(part.calls)
            for name, moments in part.pooled.items():
                pooled[name].append(moments)
                spread[name].append(part.spread[name])
        return cls(merged_moments(pooled), merged_moments(spread), passes, calls)

    def moments(self) -> dict[str, Moments]:
        """Return the moments with their standard errors."""
        return {
            name: replace(
                moments, standard_error=relative_standard_error(moments, self.spread[name], self.passes[name])
            )
            for name, moments in self.pooled.items()
        }


def pooled_over_ranks(function: str, measure: Callable[[], tuple[int, Statistics]]) -> tuple[int, Statistics]:
    """Run a measurement on every rank, and return the images and statistics of all ranks together on each of them.

    Args:
        function: Name of the function that the caller called, for messages.
        measure: Returns the number of images, 0 on a rank without any, and their statistics.

    Raises:
        CalibrationError: If there are no images on any rank, `measure` fails on another rank, or another rank does not
            call the function.
    """
    Ranks.current().meet(function)
    parts = on_every_rank(measure)
    images = sum(images for images, _ in parts)
    if images == 0:
        raise no_batches()
    return images, Statistics.merged(statistics for _, statistics in parts)


def merged_moments(lists: Mapping[str, list[Moments]]) -> dict[str, Moments]:
    """Return the moments of all values of each place."""
    return {name: merge(moments) for name, moments in lists.items()}
