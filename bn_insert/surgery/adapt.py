"""Move a network to new images without labels: insert BatchNorm, re-estimate its statistics, fold."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isnan, nan
from statistics import median
from typing import Any, Generic, cast, get_args

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..batchnorm.identity_parameters import check_eps, check_momentum
from ..errors import CalibrationError, GraphError, as_passed
from ..graph.copies import AnyModule, check_values, unwrapped
from ..graph.layers import Kind
from ..graph.sites import Placement, SiteOptions
from ..statistics.moments import Moments
from ..statistics.pass_options import PassOptions, ProgressCallback
from ..statistics.passes import preserved_random_state
from ..statistics.recalibrate import reestimate, with_statistics
from ..statistics.shrinkage import Prior
from ..support.arguments import check_dtype, check_flags, check_progress, usable_device
from ..support.text import counted, listed
from .example_input import peeked
from .fold import fold, warn_of_left, warn_of_untied
from .history import AdaptedStatistics, History
from .insert import Insertion, insert_with

_EPS, _MOMENTUM = 1e-5, 0.1  # the defaults of the arguments
_NEARLY_CONSTANT = 0.01  # of the standard deviation on the source: images of one gray left 0 to 0.0002 of a dense layer
_NAMES_SHOWN = 5


@dataclass(frozen=True, eq=False)
class StatisticsShift:
    """How far the statistics of one layer's activations moved from source to target.

    Channels that are constant on the source are left out.

    Attributes:
        layer: Qualified name, in the given model, of the layer that a BatchNorm was inserted after; that of the
            BatchNorm itself if it was there already.
        mean: Difference of the means for each channel, in standard deviations on the source.
        std: Standard deviation on the target divided by that on the source, for each channel; NaN where the target has
            a single value per channel.
        sampling_error: Standard error of mean and std on the target for each channel, relative to std; None where it
            could not be estimated, from a single batch for example.
    """

    layer: str
    mean: Float64[Tensor, " channels"] = field(repr=False)
    std: Float64[Tensor, " channels"] = field(repr=False)
    sampling_error: Float64[Tensor, " channels"] | None = field(repr=False)

    @property
    def size(self) -> float:
        """Root mean square of the differences of the means, in standard deviations; 0 without channels."""
        return float(self.mean.square().mean().sqrt()) if len(self.mean) else 0.0

    @property
    def std_median(self) -> float:
        """Median over the channels of `std`; NaN without finite ones."""
        return median(self._ratios or [nan])

    @property
    def _ratios(self) -> list[float]:
        ratios: list[float] = self.std[self.std.isfinite()].tolist()
        return ratios

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, the size and the median as JSON-ready data; ratios that are not finite are left out."""
        return {
            "layer": self.layer,
            "mean": self.mean.tolist(),
            "mean_size": self.size,
            "std": self._ratios,
            "std_median": None if isnan(self.std_median) else self.std_median,
            "sampling_error": None if self.sampling_error is None else self.sampling_error.tolist(),
        }


@dataclass(frozen=True, eq=False)
class Adaptation(Generic[AnyModule]):
    """A model adapted to new images, and how it was obtained.

    Attributes:
        model: The adapted copy, without the inserted BatchNorms unless `keep_batchnorm` was set.
        with_batchnorm: The adapted copy before folding.
        insertion: What was inserted, with the statistics of the source; None if the model was adapted with its own
            BatchNorms.
        folded: Qualified names, in `with_batchnorm`, of the BatchNorms that were folded.
        shifts: How far the statistics moved, one for each BatchNorm, in the order in which they are called.
        target_images: Number of images of the target, over all processes.
        changed: Whether any statistics of the adapted copy differ from those of the source. With very few images and
            `shrink`, chance may explain all differences.
        left: Qualified names, in `with_batchnorm`, of inserted BatchNorms that could not be folded into any layer, and
            stay.
        untied: As in `FoldResult`.
        target_moments: Moments of the activations on the target, by the names in `shifts`, as measured.
        adapted_before: What the source must be, because the model had been adapted before; empty if it had not, or if
            the source was not needed.
    """

    model: AnyModule = field(repr=False)
    with_batchnorm: AnyModule = field(repr=False)
    insertion: Insertion[AnyModule] | None = field(repr=False)
    folded: tuple[str, ...] = field(repr=False)
    shifts: tuple[StatisticsShift, ...] = field(repr=False)
    target_images: int
    changed: bool = field(repr=False)
    left: tuple[str, ...] = field(default=(), repr=False)
    untied: tuple[str, ...] = field(default=(), repr=False)
    target_moments: Mapping[str, Moments] = field(default_factory=dict, repr=False)
    adapted_before: str = field(default="", repr=False)

    @property
    def source_images(self) -> int:
        """Number of images of the source, over all processes; 0 without a source."""
        return self.insertion.images if self.insertion else 0

    @property
    def constant(self) -> str:
        """What is wrong with a target on which activations hardly vary, although they did on the source; or empty."""
        names = [shift.layer for shift in self.shifts if shift.std_median < _NEARLY_CONSTANT]
        if not names or not self.changed:
            return ""
        inserted = [name for name in names if self.insertion and name in self.insertion.norms]
        skip = as_passed("skip", inserted, " ".join(f"--skip {name}" for name in inserted))
        leave_out = f", or leave out these layers ({skip})" if inserted else ""
        return (
            f"the activations of {listed(names, _NAMES_SHOWN)} hardly vary on the target images (their standard "
            f"deviation is below {_NEARLY_CONSTANT:.0%} of that on the source), so that adapting magnifies rounding "
            f"errors; use images that differ from each other{leave_out}"
        )


def adapt(
    model: AnyModule,
    source: Iterable[Any] | None,
    target: Iterable[Any],
    *,
    layers: Kind | Iterable[Kind] = ("conv", "dense"),
    include_output: bool = False,
    skip: Iterable[str] = (),
    placement: Placement = "before_activation",
    keep_batchnorm: bool = False,
    shrink: bool = True,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    tolerance: float | None = None,
    progress: ProgressCallback | None = None,
) -> Adaptation[AnyModule]:
    """Adapt a model as `adapt_statistics` does, and return it together with everything measured on the way.

    This is what the command `bn-insert adapt` runs. Arguments and errors are those of `adapt_statistics`.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
        >>> x = torch.rand(64, 3, 8, 8)
        >>> adaptation = adapt(model, x.split(16), (x / 4).split(16))
        >>> adaptation
        Adaptation(target_images=64)
        >>> [(shift.layer, shift.std.median() < 0.3) for shift in adaptation.shifts]
        [('0', tensor(True))]
    """
    check_progress(progress)
    check_flags(GraphError, keep_batchnorm=keep_batchnorm, shrink=shrink)
    model = unwrapped(model)
    insertion = None
    of_source = 0  # images of this process
    options = PassOptions(device, autocast, tolerance, progress)

    def count_source(images: int) -> None:
        nonlocal of_source
        of_source = images
        if progress:
            progress(images)

    def count_target(images: int) -> None:
        if progress:
            progress(of_source + images)

    _check_arguments(eps, momentum, options)
    if source is None:
        if with_statistics(model):  # otherwise a source is missing, which is reported below
            _check_nothing_chosen(
                layers=layers,
                include_output=include_output,
                skip=skip,
                placement=placement,
                eps=eps,
                momentum=momentum,
            )
    else:
        if not keep_batchnorm:
            _check_no_momentum(momentum)
            source = _checked_to_fold(model, source)
        site_options = SiteOptions.checked(layers, include_output, skip, placement)
        source_options = replace(options, progress=count_source, spread_by_image=True)
        with _naming("source"):
            insertion = insert_with(model, source, site_options, source_options, eps=eps, momentum=momentum)
    options = replace(options, progress=count_target)
    return adapt_inserted(model, insertion, target, options, keep_batchnorm=keep_batchnorm, shrink=shrink)


def adapt_inserted(
    model: AnyModule,
    insertion: Insertion[AnyModule] | None,
    target: Iterable[Any],
    options: PassOptions = PassOptions(),  # noqa: B008 - it is frozen
    *,
    keep_batchnorm: bool = False,
    shrink: bool = True,
) -> Adaptation[AnyModule]:
    """Do the second half of `adapt`, after the insertion: one insertion serves several targets.

    Args:
        model: The model that BatchNorm was inserted into.
        insertion: What `insert` returned for it; None for a model that is adapted with its own BatchNorms.
        target: As for `adapt_statistics`.
        options: How to run the batches of the target.
        keep_batchnorm: As for `adapt_statistics`.
        shrink: As for `adapt_statistics`.

    Raises:
        GraphError: As for `adapt_statistics`.
        CalibrationError: As for `adapt_statistics`.
    """
    if insertion is not None and insertion.fault:
        raise GraphError(insertion.fault)
    inserted = insertion.model if insertion else model
    norms = with_statistics(inserted)
    if not norms:
        raise _nothing_to_adapt(model, insertion)
    check_values(inserted)
    layer_of = _layers_of(norms, insertion)
    priors = {name: _prior(norm, insertion, layer_of.get(name)) for name, norm in norms.items()} if shrink else {}
    with preserved_random_state(), _naming("target"):
        peek = peeked(inserted, target, "adapt_statistics", most=2)
        try:
            found = reestimate(
                inserted,
                peek.batches,
                options,
                priors=priors,
                single_batch=peek.read == 1,
                layers=layer_of,
                function="adapt_statistics",
            )
        except CalibrationError as error:
            raise CalibrationError(f"{error}{_for_one_image(error, inserted=bool(layer_of), shrink=shrink)}") from error
    moments = {layer_of.get(name, name): each for name, each in found.moments.items()}
    shifts = tuple(_shift(layer_of.get(name, name), norms[name], each) for name, each in found.moments.items())
    changed = any(not _same_statistics(norms[name], norm) for name, norm in with_statistics(found.model).items())
    if changed:
        History.of(found.model).with_change(AdaptedStatistics(found.images)).keep_with(unwrapped(found.model))
    result = Adaptation(
        found.model,
        found.model,
        insertion,
        (),
        shifts,
        found.images,
        changed,
        target_moments=moments,
        adapted_before=_adapted_before(model, insertion),
    )
    if insertion is None or keep_batchnorm:
        return result
    try:
        # The result is checked on the example: on images rather than on zeros.
        folds = fold(found.model, peek.first or peek.example, names=set(layer_of))
    except GraphError as error:
        raise _unless_kept(f"{error}; {result.constant}" if result.constant else error) from error
    left = tuple(name for name in folds.left if name in layer_of)
    return replace(result, model=folds.model, folded=folds.folded, left=left, untied=folds.untied)


def adapt_statistics(
    model: AnyModule,
    source: Iterable[Any] | None,
    target: Iterable[Any],
    *,
    layers: Kind | Iterable[Kind] = ("conv", "dense"),
    include_output: bool = False,
    skip: Iterable[str] = (),
    placement: Placement = "before_activation",
    keep_batchnorm: bool = False,
    shrink: bool = True,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    tolerance: float | None = None,
    progress: ProgressCallback | None = None,
) -> AnyModule:
    """Return a copy of the model adapted to new images, without labels and without training.

    BatchNorm is inserted with the statistics of `source`, images of the kind that the model was trained on; its
    statistics are re-estimated on `target`, the images that it is to work on; and the BatchNorms are folded. Each
    channel of each layer then has, on the target, the mean and standard deviation that it had on the source. The result
    has the modules of the given model, with different weights and biases (a layer without bias gets one). BatchNorms
    that the model already has are re-estimated too, and stay.

    Inside an initialized `torch.distributed` process group, every rank calls this with its own part of both, and all
    get the same result.

    Args:
        model: The network, as for `insert_batchnorm`. It is not changed.
        source: Batches, as for `insert_batchnorm`; None for a model with BatchNorm, whose running statistics are those
            of the source.
        target: Batches, as for `insert_batchnorm`; no labels are used. Each layer normalizes by the statistics of the
            batch (of all images so far, if the batch has fewer than 16, unless `shrink` is False) while those of deeper
            layers are measured, so pass shuffled batches. A single image is enough if it differs clearly; a warning is
            issued if nothing was changed.
        layers: Kinds of layers to insert BatchNorm after: `"conv"`, `"dense"` or both.
        include_output: Whether to insert BatchNorm after the output layer too.
        skip: Glob patterns on qualified names of layers to insert none after.
        placement: As for `insert_batchnorm`. After an activation, folding is not always exact; where it is not, it is
            refused.
        keep_batchnorm: Keep the inserted BatchNorms, to train the model further.
        shrink: Move statistics only to the extent that the difference exceeds sampling error: with few images, the
            source's statistics are kept in part. False takes the target's statistics as they are.
        eps: Added to the variance in each inserted BatchNorm.
        momentum: Momentum of the running statistics in BatchNorms that are kept; None means a cumulative average.
        device: Where to run. Default: where the model is.
        autocast: Dtype for the forward passes; statistics stay float32 or better.
        tolerance: Stop each of the two passes once the statistics are this accurate; see `calibrate`.
        progress: Called after each batch with the number of images so far, those of both passes together.

    Raises:
        GraphError: The model cannot be traced, a `skip` pattern matches no layer, layers are chosen without a source
            or a momentum without `keep_batchnorm`, there is nothing to adapt, or a BatchNorm cannot be folded.
        CalibrationError: No usable statistics can be computed from the batches.

    Sources: Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation", 2016, arXiv:1603.04779;
    Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", 2020,
    arXiv:2006.16971.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
        >>> x = torch.rand(64, 3, 8, 8)
        >>> darker = x / 4
        >>> adapted = adapt_statistics(model, x.split(16), darker.split(16))
        >>> [type(module).__name__ for module in adapted]
        ['Conv2d', 'ReLU', 'Flatten', 'Linear']
    """
    adaptation = adapt(
        model,
        source,
        target,
        layers=layers,
        include_output=include_output,
        skip=skip,
        placement=placement,
        keep_batchnorm=keep_batchnorm,
        shrink=shrink,
        eps=eps,
        momentum=momentum,
        device=device,
        autocast=autocast,
        tolerance=tolerance,
        progress=progress,
    )
    if not adaptation.changed:
        several = adaptation.target_images > 1
        advice = ", or shrink=False to take their statistics as they are" if several else ""
        warnings.warn(
            f"nothing was adapted: with {counted(adaptation.target_images, 'target image')}, the difference from the "
            f"source is within sampling error{', or due to a single unusual image' * several}. If the images are of "
            f"the kind that the model knows, there is nothing to gain; if of another kind, pass more of them{advice}",
            stacklevel=2,
        )
    for text in filter(None, (adaptation.adapted_before, adaptation.constant)):
        warnings.warn(text, stacklevel=2)
    warn_of_left(adaptation.left, stacklevel=2)
    warn_of_untied(adaptation.untied, stacklevel=2)
    return adaptation.model


def _check_nothing_chosen(
    *,
    layers: Kind | Iterable[Kind],
    include_output: bool,
    skip: Iterable[str],
    placement: Placement,
    eps: float,
    momentum: float | None,
) -> None:
    """Raise GraphError for arguments that matter only to BatchNorms that are inserted, although none is."""
    options = SiteOptions.checked(layers, include_output, skip, placement)
    chosen = {
        "layers": len(options.kinds) < len(get_args(Kind)),
        "include_output": include_output,
        "skip": bool(options.skip),
        "placement": placement != "before_activation",
        "eps": eps != _EPS,
        "momentum": momentum != _MOMENTUM,
    }
    if names := [as_passed(name) for name, is_chosen in chosen.items() if is_chosen]:
        raise GraphError(
            f"leave out {' and '.join(names)}: without a source, no BatchNorm is inserted, and every BatchNorm of the "
            "model is adapted"
        )


def _check_arguments(eps: float, momentum: float | None, options: PassOptions) -> None:
    """Raise CalibrationError for values that are wrong whatever the batches: later errors name source or target."""
    check_eps(eps)
    check_momentum(momentum)
    options.check_tolerance()
    if options.device is not None:
        usable_device(options.device)
    if options.autocast:
        check_dtype("autocast", options.autocast)


def _check_no_momentum(momentum: float | None) -> None:
    """Raise GraphError for a momentum of BatchNorms that do not stay."""
    if momentum != _MOMENTUM:
        raise GraphError(
            f"leave out {as_passed('momentum')}, which matters only to BatchNorms that stay: those that are inserted "
            f"are folded again, unless they are kept ({as_passed('keep_batchnorm', True)})"
        )


def _checked_to_fold(model: nn.Module, source: Iterable[Any]) -> Iterable[Any]:
    """Return the batches, after checking that BatchNorms in this model can be folded: not after both passes."""
    with preserved_random_state(), _naming("source"):
        peek = peeked(model, source, "adapt_statistics")
    if obstacle := peek.trace_of(model).obstacle:
        raise _unless_kept(obstacle)
    return peek.batches


@contextmanager
def _naming(argument: str) -> Iterator[None]:
    """Let the error for batches say which batches."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"{as_passed(argument, option=argument.upper())}: {error}") from error


def _for_one_image(error: CalibrationError, *, inserted: bool, shrink: bool) -> str:
    """Return what else helps where a single image has no variance; empty for other errors."""
    if shrink or "at least two values" not in str(error):
        return ""
    only = f"adapt only conv layers ({as_passed('layers', 'conv')}), or " if inserted else ""
    return f"; or {only}leave out {as_passed('shrink', False, '--no-shrink')}"


def _adapted_before(model: nn.Module, insertion: Insertion[Any] | None) -> str:
    """Return what the source must be if a model was adapted before; empty where no statistics of it were used."""
    earlier = History.of(model).adaptations
    if not earlier or insertion is None or not insertion.sites:
        return ""
    # Training on labeled images changes what the network knows, but is no part of its history.
    return (
        f"this network was already {earlier[-1].description}: {as_passed('source', option='SOURCE')} must be images of "
        "the kind that it was adapted to (or fine-tuned on since then), not of the kind that the original was trained "
        "on, which would make it worse. To adapt to other images, adapt the original instead"
    )


def _unless_kept(obstacle: object) -> GraphError:
    """Return the error for an obstacle that prevents only folding."""
    return GraphError(f"{obstacle}. Or keep the BatchNorms ({as_passed('keep_batchnorm', True)})")


def _nothing_to_adapt(model: nn.Module, insertion: Insertion[Any] | None) -> GraphError | CalibrationError:
    name = type(model).__name__
    if insertion is None:
        source = as_passed("source", option="SOURCE (bn-insert adapt CHECKPOINT SOURCE TARGET)")
        return CalibrationError(
            f"{name} has no BatchNorm: pass images of the kind that it was trained on as {source}, so that BatchNorm "
            "can be inserted"
        )
    return GraphError(f"nothing to adapt: no BatchNorm can be inserted into {name}: {insertion.nothing}")


def _layers_of(norms: Mapping[str, nn.Module], insertion: Insertion[Any] | None) -> dict[str, str]:
    """Return the name of the layer that each inserted BatchNorm follows, by the name of the BatchNorm."""
    if insertion is None:
        return {}
    layers = {id(norm): layer for layer, norm in insertion.norms.items()}
    return {name: layers[id(norm)] for name, norm in norms.items() if id(norm) in layers}


def _prior(norm: _BatchNorm, insertion: Insertion[Any] | None, layer: str | None) -> Prior:
    """Return the statistics of the source for a BatchNorm, inserted after a layer or there already (None)."""
    mean, var = _statistics(norm)
    if insertion is None or layer is None:
        return Prior.of(mean, var)
    return Prior.of(mean, var, standard_error=insertion.moments[layer].standard_error, images=insertion.images)


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    mean, var = (cast(Tensor, each).detach().cpu().double() for each in (norm.running_mean, norm.running_var))
    return mean, var


def _same_statistics(first: _BatchNorm, second: _BatchNorm) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_statistics(first), _statistics(second), strict=True))


def _shift(layer: str, norm: _BatchNorm, target: Moments) -> StatisticsShift:
    """Return how far the moments of a BatchNorm's input are from its running statistics."""
    mean, var = _statistics(norm)
    varying = var > 0
    std = var[varying].sqrt()
    return StatisticsShift(
        layer,
        (target.mean[varying] - mean[varying]) / std,
        target.std[varying] / std,
        None if target.standard_error is None else target.standard_error[varying],
    )
