"""Records the moments of values that hooks observe, and their spread between batches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..support.processes import Ranks
from .moments import Moments, merge, moments_of
from .passes import NotFiniteError, Progress
from .pooling import Statistics, merged_moments
from .recorded_passes import run_through
from .sampling_error import batch_spread

_FEWEST_BATCHES = 8  # fewer are not enough to estimate the spread between batches
_CHANNELS_WITHIN = 0.99
_LONGEST_LIST = 64  # moments kept before they are merged: memory stays constant over any number of batches


def check_tolerance(tolerance: float | None) -> None:
    """Raise CalibrationError for a tolerance that no error can be compared with."""
    if tolerance is not None and not 0 < tolerance < inf:
        raise CalibrationError(f"tolerance must be a finite number above 0, such as 0.1, not {tolerance}")


class Recorder:
    """Pools the moments of the values passed to it, under the name of their place in a model."""

    def __init__(self) -> None:
        """Start with nothing recorded."""
        self._uncommitted: defaultdict[str, list[Moments]] = defaultdict(list)
        self._moments: defaultdict[str, list[Moments]] = defaultdict(list)
        self._spreads: defaultdict[str, list[Moments]] = defaultdict(list)
        self._passes: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self.batches = 0

    def record(self, name: str, values: Tensor) -> Moments:
        """Record and return the moments of values at a place.

        Raises:
            NotFiniteError: If there are values that are not finite.
        """
        # Of this thread alone, unlike `_disable_current_modes`: another thread may be exporting a model.
        with torch._C._DisableTorchDispatch():  # `protected_parameters` would intercept each operation
            moments = moments_of(values)
            finite = isfinite(float((moments.mean + moments.m2).sum()))
        if not finite:
            message = f"the activations of {name} are not finite in {values.dtype}"
            raise NotFiniteError(message, _first_bad_row(values))
        self._uncommitted[name].append(moments)
        return moments

    def uncommitted(self) -> Mapping[str, Moments]:
        """Return the moments of what was recorded during a forward pass and not yet kept or discarded."""
        return merged_moments(self._uncommitted)

    def commit(self, batches: int = 1) -> None:
        """Keep what was recorded during a forward pass over this many batches."""
        for name, of_pass in self.uncommitted().items():
            self._calls[name] += len(self._uncommitted[name])
            self._passes[name] += 1
            _append(self._moments[name], of_pass)
            _append(self._spreads[name], batch_spread(of_pass, batches))
        self.batches += batches
        self._uncommitted.clear()

    def discard(self) -> None:
        """Forget what was recorded during a forward pass that will be run again."""
        self._uncommitted.clear()

    def begin_part(self) -> None:
        """Go on with the next images of the same pass."""

    def pooled(self, name: str) -> Moments:
        """Return the moments of all values recorded at a place, including those of the current pass."""
        return merge([*self._moments[name], *self._uncommitted[name]])

    def run(
        self,
        network: nn.Module,
        batches: Iterable[Any],
        *,
        gather: bool = False,
        autocast: torch.dtype | None = None,
        tolerance: float | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Run batches through a network whose hooks record here, and return the number of images; see `run_through`.

        With a tolerance, the pass ends once `precise_enough` says so; it is asked after each batch, so that none are
        gathered.
        """
        gather = gather and tolerance is None
        enough = lambda: self.precise_enough(tolerance)  # noqa: E731
        return run_through(network, batches, self, gather=gather, autocast=autocast, progress=progress, enough=enough)

    def statistics(self) -> Statistics:
        """Return what was recorded at all places, in host memory."""
        return Statistics(
            {name: moments.cpu() for name, moments in merged_moments(self._moments).items()},
            {name: spread.cpu() for name, spread in merged_moments(self._spreads).items()},
            Counter(self._passes),
            Counter(self._calls),
        )

    def precise_enough(self, tolerance: float | None) -> bool:
        """Return whether enough channels of every place are known to within `tolerance`, relative to their std.

        None is a tolerance that is never reached. Every rank has a part of the batches, so its own error may be larger
        than that of all ranks together.
        """
        if tolerance is None or self.batches < _FEWEST_BATCHES:
            return False
        largest = tolerance * Ranks.current().count ** 0.5
        return all(moments.error_of(_CHANNELS_WITHIN) <= largest for moments in self.statistics().moments().values())


def _append(moments: list[Moments], more: Moments) -> None:
    moments.append(more)
    if len(moments) >= _LONGEST_LIST:
        moments[:] = [merge(moments)]


def _first_bad_row(values: Tensor) -> int:
    return int(values.flatten(1).isfinite().all(1).int().argmin())
