"""Run sample inputs through a model once, and give every site the moments of its activations."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CalibrationError
from .forward import ForwardDone, NotFiniteError, Progress, run_through
from .graph import working_copy
from .micro_batches import run_in_micro_batches
from .model_inputs import reference_tensor
from .moments import Moments, merge, moments_of
from .precision import batch_spread, relative_standard_error
from .process_group import Ranks, on_every_rank
from .sites import Site

_FEWEST_BATCHES = 8  # fewer say too little about how far batches are apart
_CHANNELS_WITHIN = 0.99


def calibrate(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Moments]:
    """Return the moments of each site's activations over the whole calibration set, by the site's name.

    One pass of the unmodified network in eval mode, ended behind the last site: a BatchNorm that changes nothing
    changes no statistics downstream either. Moments are pooled over all batches in float64 (not an average of
    averages). Inside an initialized torch.distributed process group every rank calls this with its own part of the
    batches, be it empty, and gets the moments of all parts together.

    batches: tensors, or tuples, lists or dicts whose first value is the input, of any batch size.
    device: where to run; default: where the model is. autocast: a dtype for the forward; statistics stay float32 or
    better. tolerance: end early, once the error of mean and std (three standard errors, estimated between batches and
    relative to std) is below it for 99 % of the channels of every site. progress: called after each batch with the
    number of images so far.
    The model is left as it is, and so is PyTorch's random state. Raises CalibrationError for no data, for values that
    are not finite (naming layer and parameter or image), and when the model cannot run on a batch.
    """
    if not sites:
        return {}
    if tolerance is not None and not 0 < tolerance < inf:
        raise CalibrationError(f"tolerance is a number above 0, such as 0.1, not {tolerance}")
    recorder = Recorder()

    def own_part() -> tuple[int, Statistics]:
        network = working_copy(model, device)
        with _recording_behind(sites, network, recorder):
            images = run_through(
                network,
                batches,
                recorder,
                autocast=autocast,
                progress=progress,
                enough=lambda: tolerance is not None and recorder.precise_to(tolerance * Ranks.current().count ** 0.5),
            )
        return images, recorder.statistics()

    parts = on_every_rank(own_part)
    if sum(images for images, _ in parts) == 0:
        raise CalibrationError("the calibration set is empty: no batch arrived")
    moments = Statistics.merged(statistics for _, statistics in parts).moments()
    silent = [site.name for site in sites if site.name not in moments]
    if silent:
        raise CalibrationError(f"the layer {silent[0]} was never called on the calibration set")
    return moments


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


@contextmanager
def _recording_behind(sites: Sequence[Site], network: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Record what comes out of each site's anchor, and end each pass behind the last one."""
    calls: Counter[str] = Counter()
    wanted = Counter({site.name: site.calls for site in sites})

    def begin(*_: object) -> None:
        calls.clear()

    def hook(site: Site) -> Callable[[nn.Module, Any, Tensor], None]:
        def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            # Before returning: an in-place activation behind the layer overwrites this tensor.
            recorder.record(site.name, output)
            calls[site.name] += 1
            if calls >= wanted:
                raise ForwardDone

        return record

    with ExitStack() as hooks:
        hooks.callback(network.register_forward_pre_hook(begin).remove)
        own: set[int] = set()
        for site in sites:
            handle = network.get_submodule(site.anchor).register_forward_hook(hook(site))
            hooks.callback(handle.remove)
            own.add(handle.id)
        if reference_tensor(network).device.type == "cpu":  # a GPU wants as much at once as there is
            run_in_micro_batches(network, calls, own)
        yield


def _first_bad_row(output: Tensor) -> int:
    return int(output.flatten(1).isfinite().all(1).int().argmin())
