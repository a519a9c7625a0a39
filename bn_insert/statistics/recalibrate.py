"""Re-estimate the running statistics of a model's BatchNorms."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from math import inf
from typing import Any, Generic, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CalibrationError
from ..graph.copies import AnyModule, deep_copy, working_copy
from ..graph.inputs import InputReader
from ..support.processes import Ranks
from .in_step import in_step
from .moments import Moments
from .pass_options import PassOptions, ProgressCallback
from .passes import NotFiniteError
from .pooled_statistics import Statistics, pooled_over_ranks
from .recorder import Recorder
from .shrinkage import Prior

Earlier = Literal["batch", "running"]

_FEW_IMAGES = 16


@dataclass(frozen=True, eq=False)
class Reestimation(Generic[AnyModule]):
    """A model whose BatchNorms have new statistics, and what these were computed from.

    Attributes:
        model: The copy with the new statistics.
        moments: Moments of each BatchNorm's input over these batches only, by its name; a BatchNorm that is never
            called has none.
        images: Number of images, over all processes.
    """

    model: AnyModule = field(repr=False)
    moments: Mapping[str, Moments] = field(repr=False)
    images: int


def recalibrate(
    model: AnyModule,
    batches: Iterable[Any],
    *,
    earlier: Earlier = "batch",
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: ProgressCallback | None = None,
) -> AnyModule:
    """Return a copy of the model whose BatchNorms have the statistics of these batches as running statistics.

    running_mean and running_var become mean and unbiased variance of each BatchNorm's input, pooled over all batches in
    float64. This is neither an exponential average, which lags behind weights that change fast, nor an average of
    averages. The model runs once over the batches, with dropout off. num_batches_tracked becomes the number of batches
    that were pooled, so that a cumulative average (momentum None) continues with the right weight. Nothing else in the
    copy differs. The model itself is not changed, and PyTorch's random state is restored. A BatchNorm that is never
    called keeps its statistics.

    An optimizer keeps training the model that it was created for: after each epoch, validate the copy, but keep
    training the model.

    Inside an initialized torch.distributed process group, every rank calls this with its own part of the batches, which
    may be empty, and gets the statistics of all parts together.

    Args:
        model: A network with BatchNorm.
        batches: As for `insert_batchnorm`. After training, use training images.
        earlier: What each BatchNorm normalizes by while deeper ones are measured.
            "batch": each batch's own, as in training. Pass shuffled batches of the size used in training. Where a batch
            has only one value per channel (a last batch of one image, after a dense layer), the statistics of all
            batches so far are used.
            "running": the model's running statistics, as in eval mode. Suitable where these are accurate, as after an
            insertion; the result does not depend on how the images are divided into batches.
        device: Where to run; by default the model's device.
        autocast: Dtype for the forward pass.
        progress: Called after each batch with the number of images so far.

    Raises:
        CalibrationError: If no BatchNorm has running statistics, if there are no data or fewer than two values per
            channel, if values are not finite (the message names the BatchNorm), or if the model cannot run on a batch.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3 ("PreciseBN", as "batch" here).

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> x = torch.rand(100, 4)
        >>> result = recalibrate(model, x.split(30))
        >>> torch.allclose(result[1].running_var, model[0](x).var(0))
        True
    """
    options = PassOptions(device, autocast, progress=progress)
    return reestimate(model, batches, options, earlier=earlier, function="recalibrate").model


def reestimate(
    model: AnyModule,
    batches: Iterable[Any],
    options: PassOptions,
    *,
    names: Collection[str] | None = None,
    earlier: Earlier = "batch",
    priors: Mapping[str, Prior] | None = None,
    single_batch: bool = False,
    layers: Mapping[str, str] | None = None,
    function: str,
) -> Reestimation[AnyModule]:
    """Return what `recalibrate` returns, with the moments that were measured.

    Args:
        model: As for `recalibrate`.
        batches: As for `recalibrate`.
        options: How to run them.
        names: Qualified names of the BatchNorms; the others normalize by their running statistics. None for all.
        earlier: As for `recalibrate`.
        priors: By the BatchNorm's name: statistics that those of all batches are moved towards, as far as they may
            differ by chance.
        single_batch: Whether there is one batch on all ranks together. With earlier="batch", it then normalizes by the
            statistics that the result will have. Of several batches, those with few images normalize by the statistics
            of all images so far, moved towards the prior; larger ones by their own, as those of many images will
            hardly be moved.
        layers: By the BatchNorm's name: the name of the layer that it follows in the caller's model, for messages.
        function: Name of the public function, for messages.

    Raises:
        CalibrationError: As for `recalibrate`.
    """
    if earlier not in get_args(Earlier):
        raise CalibrationError(f"earlier must be one of {', '.join(get_args(Earlier))}, not {earlier!r}")
    options.check_tolerance()
    network = working_copy(model, options.device)
    norms = with_statistics(network, names)
    if not norms:
        raise CalibrationError(f"{type(model).__name__} has no BatchNorm with running statistics to re-estimate")
    if earlier == "running":
        _check_finite(norms)
    priors, layers = priors or {}, layers or {}
    recorder = Recorder()

    def measure() -> tuple[int, Statistics]:
        few = inf if single_batch else _FEW_IMAGES
        with ExitStack() as stack:
            shares = batches
            if Ranks.current().count > 1 and priors and not single_batch and options.tolerance is None:
                reader = InputReader(network)
                in_turn = in_step(
                    batches, recorder, lambda batch, number: len(reader.inputs(batch, number)), _FEW_IMAGES
                )
                shares = stack.enter_context(closing(in_turn))
            stack.enter_context(
                _recording_inputs(norms, priors, recorder, layers, by_batch=earlier == "batch", few=few)
            )
            images = recorder.run(network, shares, options)
        return images, recorder.statistics()

    images, statistics = pooled_over_ranks(function, measure)
    with torch.inference_mode(False):  # whatever the caller's mode: the result is to be trained
        result = deep_copy(model)
        for name, norm in with_statistics(result, names).items():
            if name in statistics.pooled:
                _set_statistics(norm, _place(name, layers), statistics.pooled[name], priors.get(name), images)
                calls = statistics.calls[name]
                norm.num_batches_tracked = torch.full_like(cast(Tensor, norm.num_batches_tracked), calls)
    return Reestimation(result, statistics.moments(), images)


def with_statistics(model: nn.Module, names: Collection[str] | None = None) -> dict[str, _BatchNorm]:
    """Return the BatchNorms of a model that have running statistics, by name: all, or those of the given names."""
    modules = dict(model.named_modules())
    return {
        name: norm
        for name, norm in modules.items()
        if isinstance(norm, _BatchNorm) and _statistics(norm) and (names is None or name in names)
    }


def _statistics(norm: _BatchNorm) -> list[Tensor]:
    """Return running mean and variance; an empty list for a BatchNorm that always normalizes by the batch."""
    return [tensor for tensor in (norm.running_mean, norm.running_var) if tensor is not None]


def _check_finite(norms: Mapping[str, _BatchNorm]) -> None:
    for name, norm in norms.items():
        if not all(tensor.isfinite().all() for tensor in _statistics(norm)):
            raise CalibrationError(
                f"the running statistics of BatchNorm {name} contain NaN or Inf, and earlier='running' normalizes with "
                "them; use earlier='batch'"
            )


@contextmanager
def _recording_inputs(
    norms: Mapping[str, _BatchNorm],
    priors: Mapping[str, Prior],
    recorder: Recorder,
    layers: Mapping[str, str],
    *,
    by_batch: bool,
    few: float,
) -> Iterator[None]:
    """Record the input of each BatchNorm, and with by_batch make it normalize by that input's statistics.

    With a prior, a batch of fewer than `few` images is normalized by the statistics of all images so far, moved towards
    the prior. Its own would hardly be moved from there, and deeper layers would be measured as if nothing were adapted.

    The outputs are those of train mode, without its side effects: active dropout, processes that wait for each other
    (SyncBatchNorm), and an error for a single value per channel.
    """

    def hook(name: str) -> Callable[[_BatchNorm, tuple[Any, ...], dict[str, Any]], None]:
        def record(norm: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values: Tensor = next(chain(args, kwargs.values()))
            if values.ndim < 2:
                raise ValueError(f"{_place(name, layers)} needs a batch (got {values.ndim}D input)")
            layer = layers.get(name, name)
            moments, images = recorder.record(name, values, by_image=name in priors, layer=layer), len(values)
            if by_batch and moments.count:
                prior = priors.get(name) if len(values) < few else None
                if prior is not None or moments.count == 1:
                    moments, images = recorder.pooled(name), recorder.images_everywhere + len(values)
                _set_statistics(norm, _place(name, layers), moments, prior, images, unbiased=False)

        return record

    with ExitStack() as hooks:
        for name, norm in norms.items():
            hooks.callback(norm.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        yield


def _place(name: str, layers: Mapping[str, str]) -> str:
    """Return which BatchNorm it is, in words: an inserted one by the layer that it follows."""
    return f"the BatchNorm after {layers[name]}" if name in layers else f"BatchNorm {name}"


def _set_statistics(
    norm: _BatchNorm, place: str, moments: Moments, prior: Prior | None, images: int, *, unbiased: bool = True
) -> None:
    if moments.count < 2 and prior is None:
        raise CalibrationError(
            f"a variance needs at least two values per channel and {place} received {moments.count}; "
            "use more images, or larger batches"
        )
    mean, var = moments.mean, moments.var if unbiased and moments.count > 1 else moments.m2 / moments.count
    if prior is not None:
        # A single value has no variance.
        mean, var = prior.shrunk(mean, var if moments.count > 1 else prior.var.to(var), images, moments.by_image)
    old = _statistics(norm)[0]
    mean, var = mean.to(old.device, old.dtype), var.to(old.device, old.dtype)
    if not (mean.isfinite().all() and var.isfinite().all()):
        raise NotFiniteError(f"mean or variance of the input of {place} is not finite in {old.dtype}")
    norm.running_mean, norm.running_var = mean, var
