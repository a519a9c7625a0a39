"""Re-estimate the running statistics of the BatchNorms that a model has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CalibrationError
from ..graph.copies import AnyModule, deep_copy, working_copy
from .moments import Moments
from .passes import Progress, run_through
from .recorder import Recorder

Earlier = Literal["batch", "running"]


def recalibrate(
    model: AnyModule,
    batches: Iterable[Any],
    *,
    earlier: Earlier = "batch",
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> AnyModule:
    """Return a copy of the model whose BatchNorms have the statistics of these batches as running statistics.

    running_mean and running_var become mean and unbiased variance of each BatchNorm's input, pooled over all batches in
    float64: not an exponential average, which lags behind weights that change fast, nor an average of averages. One
    pass, dropout off. num_batches_tracked becomes the number of batches that were pooled, so that a cumulative average
    (momentum None) goes on from there with the right weight. Everything else is as it was, and so is PyTorch's random
    state; the given model is never changed. A BatchNorm that is never called keeps its statistics.

    batches: as for `insert_batchnorm`; after training, of the training images. Each process takes its own: inside a
        process group give all of them the same batches, or take one's result.
    earlier: what a BatchNorm's values are normalized with on their way to the deeper ones. "batch": each batch's own
        statistics, as in training; give shuffled batches of the training's size. Where a batch has one value a channel
        (a last batch of one image behind a dense layer), everything seen so far is used. "running": the running
        statistics that the model has, as in eval mode; right when those are good, as after an insertion, and
        independent of how the images are put into batches.
    device, autocast, progress: as for `insert_batchnorm`.
    Raises CalibrationError for a model without running statistics, for no data, for fewer than two values a channel,
    for values that are not finite (naming the BatchNorm), and when the model cannot run on a batch.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3 ("PreciseBN", as "batch" here).

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    >>> x = torch.rand(100, 4)
    >>> result = recalibrate(model, x.split(30))
    >>> torch.allclose(result[1].running_var, model[0](x).var(0))
    True
    """
    if earlier not in get_args(Earlier):
        raise CalibrationError(f"earlier is one of {', '.join(get_args(Earlier))}, not {earlier!r}")
    network = working_copy(model, device)
    norms = _with_statistics(network)
    if not norms:
        raise CalibrationError(f"{type(model).__name__} has no BatchNorm with running statistics to re-estimate")
    if earlier == "running":
        _check_finite(norms)
    recorder = Recorder()
    with _recording_in_front_of(norms, recorder, by_batch=earlier == "batch"):
        if run_through(network, batches, recorder, autocast=autocast, progress=progress) == 0:
            raise CalibrationError("the calibration set is empty: no batch arrived")
    result = deep_copy(model)
    moments = recorder.statistics().pooled
    for name, norm in _with_statistics(result).items():
        if name in moments:
            _set_statistics(norm, name, moments[name])
            norm.num_batches_tracked = torch.full_like(cast(Tensor, norm.num_batches_tracked), recorder.calls[name])
    return result


def _with_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    modules = dict(model.named_modules())
    return {name: norm for name, norm in modules.items() if isinstance(norm, _BatchNorm) and _statistics(norm)}


def _statistics(norm: _BatchNorm) -> list[Tensor]:
    """Return running mean and variance; nothing for a BatchNorm that always normalizes by the batch."""
    return [tensor for tensor in (norm.running_mean, norm.running_var) if tensor is not None]


def _check_finite(norms: Mapping[str, _BatchNorm]) -> None:
    for name, norm in norms.items():
        if not all(tensor.isfinite().all() for tensor in _statistics(norm)):
            raise CalibrationError(
                f"the running statistics of BatchNorm {name} hold NaN or Inf, and earlier='running' normalizes with "
                "them; use earlier='batch'"
            )


@contextmanager
def _recording_in_front_of(norms: Mapping[str, _BatchNorm], recorder: Recorder, *, by_batch: bool) -> Iterator[None]:
    """Record what each BatchNorm is given; by_batch: and make these its statistics, just before it normalizes.

    That gives what training mode gives, without what else comes with it: live dropout, processes that wait for each
    other (SyncBatchNorm), and the refusal of a single value a channel.
    """

    def hook(name: str) -> Callable[[_BatchNorm, tuple[Any, ...], dict[str, Any]], None]:
        def record(norm: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values: Tensor = next(chain(args, kwargs.values()))
            moments = recorder.record(name, values)
            if by_batch and moments.count:
                moments = moments if moments.count > 1 else recorder.pooled(name)
                _set_statistics(norm, name, moments, unbiased=False)

        return record

    with ExitStack() as hooks:
        for name, norm in norms.items():
            hooks.callback(norm.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        yield


def _set_statistics(norm: _BatchNorm, name: str, moments: Moments, *, unbiased: bool = True) -> None:
    if moments.count < 2:
        raise CalibrationError(
            f"a variance needs at least two values per channel and BatchNorm {name} was given {moments.count}; "
            "give more images, or larger batches"
        )
    old = _statistics(norm)[0]
    mean = moments.mean.to(old.device, old.dtype)
    var = (moments.var if unbiased else moments.m2 / moments.count).to(old.device, old.dtype)
    if not (mean.isfinite().all() and var.isfinite().all()):
        raise CalibrationError(f"mean or variance in front of BatchNorm {name} is not finite in {old.dtype}")
    norm.running_mean, norm.running_var = mean, var
