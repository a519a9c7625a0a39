"""Run sample inputs through a model once, and give every site the moments of its activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..graph.copies import working_copy
from ..graph.inputs import reference_tensor
from ..graph.sites import Site
from ..support.processes import Ranks, on_every_rank
from .micro_batches import run_in_micro_batches
from .moments import Moments
from .passes import ForwardDone, Progress, run_through
from .recorder import Recorder, Statistics


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
