"""Pools the moments of values that hooks observe, and the spread between batches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from .moments import Moments, merge, moments_of
from .passes import NotFiniteError
from .sampling_error import batch_spread, relative_standard_error


@dataclass(frozen=True)
class Statistics:
    """By the name of a place in a model: the moments of its values, and how far its batches are apart."""

    pooled: Mapping[str, Moments]
    spread: Mapping[str, Moments]

    @classmethod
    def merged(cls, parts: Iterable[Statistics]) -> Statistics:
        """Return the statistics of all parts together."""
        pooled: defaultdict[str, list[Moments]] = defaultdict(list)
        spread: defaultdict[str, list[Moments]] = defaultdict(list)
        for part in parts:
            for name, moments in part.pooled.items():
                pooled[name].append(moments)
                spread[name].append(part.spread[name])
        return cls(
            {name: merge(found) for name, found in pooled.items()},
            {name: merge(found) for name, found in spread.items()},
        )

    def moments(self) -> dict[str, Moments]:
        """Return the moments with their standard errors."""
        return {
            name: replace(moments, standard_error=relative_standard_error(moments, self.spread[name]))
            for name, moments in self.pooled.items()
        }


class Recorder:
    """Pools the moments of the values that hooks show it, under one name for each place in a model."""

    def __init__(self) -> None:
        """Start with nothing recorded."""
        self._pending: defaultdict[str, list[Moments]] = defaultdict(list)
        self._parts: defaultdict[str, list[Moments]] = defaultdict(list)
        self._spreads: defaultdict[str, list[Moments]] = defaultdict(list)
        self._batches = 0
        self.calls: Counter[str] = Counter()

    def record(self, name: str, values: Tensor) -> Moments:
        """Take and return the moments of values at this place; raises CalibrationError where they are not finite."""
        moments = moments_of(values)
        if not (moments.mean.isfinite().all() and moments.m2.isfinite().all()):
            raise NotFiniteError(name, _first_bad_row(values), values.dtype)
        self._pending[name].append(moments)
        return moments

    def commit(self) -> None:
        """Keep what one pass has shown."""
        for name, parts in self._pending.items():
            self.calls[name] += len(parts)
            of_batch = merge(parts)
            _append(self._parts[name], of_batch)
            _append(self._spreads[name], batch_spread(of_batch))
        self._batches += 1
        self._pending.clear()

    def discard(self) -> None:
        """Forget what a pass has shown that is run again."""
        self._pending.clear()

    def pooled(self, name: str) -> Moments:
        """Return the moments of everything that this place has shown so far, in the pass at hand too."""
        return merge([*self._parts[name], *self._pending[name]])

    def statistics(self) -> Statistics:
        """Return what all places have shown, in host memory."""
        return Statistics(
            {name: merge(parts).cpu() for name, parts in self._parts.items()},
            {name: merge(parts).cpu() for name, parts in self._spreads.items()},
        )

    def precise_to(self, tolerance: float) -> bool:
        """Say whether enough channels of every place are known to within `tolerance`, relative to their std."""
        if self._batches < _FEWEST_BATCHES:
            return False
        found = self.statistics().moments().values()
        return all(moments.error_of(_CHANNELS_WITHIN) <= tolerance for moments in found)


def _append(parts: list[Moments], part: Moments) -> None:
    parts.append(part)
    if len(parts) >= 64:  # keep memory flat over any number of batches
        parts[:] = [merge(parts)]


_FEWEST_BATCHES = 8  # fewer say too little about how far batches are apart


_CHANNELS_WITHIN = 0.99


def _first_bad_row(output: Tensor) -> int:
    return int(output.flatten(1).isfinite().all(1).int().argmin())
