"""Insert BatchNorm: trace the model, calibrate, make identity BatchNorms, splice them in."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, cast

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..batchnorm.dropout_before_batchnorm import dropout_functions_upstream, dropouts_upstream
from ..batchnorm.dropout_calls import dropout_calls
from ..batchnorm.identity_parameters import batchnorm_dtype, check_eps, check_momentum, identity_batchnorm
from ..errors import CalibrationError, GraphError, as_passed
from ..graph.copies import AnyModule, deep_copy, unwrapped
from ..graph.inputs import reference_tensor
from ..graph.layers import Kind
from ..graph.sites import (
    Layer,
    Placement,
    Site,
    SiteOptions,
    checked_sites,
    layers_in,
    layers_of_other_classes,
    reasons_without_sites,
)
from ..statistics.calibrate import calibrate_sites
from ..statistics.moments import Moments
from ..statistics.pass_options import PassOptions, ProgressCallback
from ..statistics.passes import SINGLE_IMAGE, preserved_random_state
from ..support.arguments import check_flags, check_progress
from .equalize import Edge, check_moments, edges_in
from .equalize import equalize as equalize_channels
from .example_input import peeked
from .history import History, InsertedBatchNorms
from .report_data import layer_statistics
from .splice import splice_after
from .verification import Fault, error_on_one_image, fault_of


@dataclass(frozen=True, eq=False)
class Insertion(Generic[AnyModule]):
    """A model with BatchNorm inserted, and how it was obtained.

    Attributes:
        model: The copy with BatchNorm.
        layers: Every conv and dense layer of the original, with its site or the reason why it has none.
        moments: Moments of the activations at each site, by the name of its layer, as measured.
        norms: The inserted BatchNorms, by the name of their layer.
        edges: With `equalize`, one per site: which layers read its channels, or why they kept their scale.
        images: Number of images calibrated on, over all processes.
        dropouts_before_batchnorm: Active dropout layers of the original whose values a BatchNorm normalizes, whether it
            was inserted or not: a mapping from their names in `model` to those in the original. See the function
            `dropouts_before_batchnorm`.
        nothing: Why no BatchNorm was inserted; empty if one was.
        fault: What is wrong with the outputs for the first images; empty if they are the same as before.
        others: Layers whose classes are not from torch.nn, after which no BatchNorm can be inserted, in words.
        one_image: Why the copy cannot run on a single image, which a network with `squeeze()` mistakes for an input
            without a batch axis; empty if it can, or if the original cannot either.
        dropout_functions: Dropouts that a forward calls as functions and whose values a BatchNorm normalizes, in words;
            empty if there are none. Those that the forward calls only in train mode, in a branch, are not seen.
    """

    model: AnyModule = field(repr=False)
    layers: tuple[Layer, ...] = field(repr=False)
    moments: Mapping[str, Moments] = field(repr=False)
    norms: Mapping[str, nn.Module] = field(repr=False)
    edges: tuple[Edge, ...] = field(repr=False)
    images: int
    dropouts_before_batchnorm: Mapping[str, str] = field(default_factory=dict, repr=False)
    nothing: str = field(default="", repr=False)
    fault: str = field(default="", repr=False)
    others: str = field(default="", repr=False)
    one_image: str = field(default="", repr=False)
    dropout_functions: str = field(default="", repr=False)

    @property
    def sites(self) -> list[Site]:
        """Where BatchNorms were inserted, in the order in which a forward pass completes them."""
        return [layer.site for layer in self.layers if layer.site is not None]

    def layer_statistics(self) -> list[dict[str, Any]]:
        """Return what was found and done at each layer as JSON-ready data, for a report."""
        return layer_statistics(self.layers, self.moments, self.norms, equalized=bool(self.edges))


def insert(
    model: AnyModule,
    batches: Iterable[Any],
    *,
    layers: Kind | Iterable[Kind] = ("conv", "dense"),
    include_output: bool = False,
    skip: Iterable[str] = (),
    placement: Placement = "before_activation",
    equalize: bool = False,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    dropout_before_batchnorm: bool = True,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    tolerance: float | None = None,
    progress: ProgressCallback | None = None,
) -> Insertion[AnyModule]:
    """Like `insert_batchnorm`, but return the model with all measurements.

    This is what the command `bn-insert insert` runs. Arguments and errors are those of `insert_batchnorm`.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
        >>> insertion = insert(model, [torch.rand(16, 3, 8, 8)])
        >>> insertion
        Insertion(images=16)
        >>> [(layer.name, layer.reason) for layer in insertion.layers]
        [('0', ''), ('3', 'output layer')]
        >>> insertion.moments["0"].std.shape
        torch.Size([8])
    """
    return insert_with(
        model,
        batches,
        SiteOptions.checked(layers, include_output, skip, placement),
        PassOptions(device, autocast, tolerance, progress, join_batches=True),
        equalize=equalize,
        eps=eps,
        momentum=momentum,
        dropout_before_batchnorm=dropout_before_batchnorm,
    )


def insert_with(
    model: AnyModule,
    batches: Iterable[Any],
    site_options: SiteOptions,
    pass_options: PassOptions,
    *,
    equalize: bool = False,
    eps: float,
    momentum: float | None,
    dropout_before_batchnorm: bool = True,
) -> Insertion[AnyModule]:
    """Do what `insert` does.

    Args:
        model: As for `insert_batchnorm`.
        batches: As for `insert_batchnorm`.
        site_options: Which layers get a BatchNorm, and where.
        pass_options: How to calibrate.
        equalize: As for `insert_batchnorm`.
        eps: As for `insert_batchnorm`.
        momentum: As for `insert_batchnorm`.
        dropout_before_batchnorm: As for `insert_batchnorm`.
    """
    check_eps(eps)
    check_momentum(momentum)
    check_progress(pass_options.progress)
    check_flags(GraphError, equalize=equalize, dropout_before_batchnorm=dropout_before_batchnorm)
    with preserved_random_state():
        peek = peeked(model, batches, "insert_batchnorm")
        trace = peek.trace_of(model)
        found = layers_in(trace, site_options)
        sites = [layer.site for layer in found if layer.site is not None]
        images, moments = calibrate_sites(model, sites, peek.batches, pass_options)
    edges = edges_in(trace, sites) if equalize else []
    anchors = {site.anchor for site in sites}
    dropouts, functions = dropouts_upstream(trace, anchors), dropout_functions_upstream(trace, anchors)

    def inserted(sites: Sequence[Site]) -> tuple[AnyModule, dict[str, nn.Module], Fault | None]:
        result, norms = _with_norms(model, sites, moments, edges, eps=eps, momentum=momentum)
        by_anchor = {site.anchor: norms[site.name] for site in sites}
        return result, norms, fault_of(model, result, peek.first, by_anchor) if sites else None

    result, norms, fault = inserted(sites)
    # A forward may refer to children of a Sequential by number, as in `self.features[2].weight`, or hold them in a
    # list: then they keep their numbers.
    if fault and any(site.in_sequence for site in sites):
        sites = [replace(site, in_sequence=False) for site in sites]
        result, norms, fault = inserted(sites)
        by_name = {site.name: site for site in sites}
        found = [replace(layer, site=by_name.get(layer.name)) for layer in found]
    message = _fault_text(model, fault) if fault else ""
    if fault and not fault.runs:
        raise GraphError(message)
    on_one_image = error_on_one_image(model, result, peek.first) if sites and not fault else ""
    # An insertion renumbers the children of an nn.Sequential, but keeps their order.
    renamed = dict(zip(_dropouts(model), _dropouts(result).items(), strict=True))
    if not dropout_before_batchnorm:
        for name in dropouts:
            renamed[name][1].p = 0.0
    return Insertion(
        result,
        tuple(found),
        moments,
        norms,
        tuple(edges),
        images=images,
        dropouts_before_batchnorm={renamed[name][0]: name for name in dropouts},
        dropout_functions=_dropout_functions_text(model, functions, peek.first or peek.example),
        nothing="" if sites else reasons_without_sites(found, trace),
        fault=message,
        others=layers_of_other_classes(trace, site_options) if sites else "",
        one_image=_one_image_text(model, on_one_image) if on_one_image else "",
    )


def _fault_text(model: nn.Module, fault: Fault) -> str:
    return (
        f"{type(unwrapped(model)).__name__} with BatchNorm inserted {fault.text}. Its forward accesses layers other "
        "than by calling them (by index, attribute or list); skip those layers (skip), or change it to only call them"
    )


def _one_image_text(model: nn.Module, error: str) -> str:
    return (
        f"with BatchNorm inserted, {type(unwrapped(model)).__name__} cannot run on a single image: {error}. "
        f"{SINGLE_IMAGE}, or skip the layers after it ({as_passed('skip')})"
    )


def _dropout_functions_text(model: nn.Module, callers: Mapping[str, float], example: Any) -> str:
    """Return in words which modules call dropout as a function, if a forward in train mode calls it with effect."""
    if not callers or not dropout_calls(model, example):
        return ""
    model = unwrapped(model)
    named = (
        f"{type(model.get_submodule(name)).__name__}{f' ({name} in the original)' * bool(name)} with p = {p:g}"
        for name, p in callers.items()
    )
    return (
        f"dropout before BatchNorm is called as a function in the forward of {', '.join(named)}, and stays on: in "
        "training it distorts the statistics of the BatchNorm, and finetune cannot switch it off. Use nn.Dropout "
        "modules instead"
    )


def insert_batchnorm(
    model: AnyModule,
    batches: Iterable[Any],
    *,
    layers: Kind | Iterable[Kind] = ("conv", "dense"),
    include_output: bool = False,
    skip: Iterable[str] = (),
    placement: Placement = "before_activation",
    equalize: bool = False,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    dropout_before_batchnorm: bool = True,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    tolerance: float | None = None,
    progress: ProgressCallback | None = None,
) -> AnyModule:
    """Return a copy of the model with BatchNorm after its conv and dense layers and unchanged outputs in eval mode.

    On a CPU the outputs are equal bit for bit. The given model is never changed, nor is PyTorch's random state.

    Inside an initialized `torch.distributed` process group, every rank calls this with its own part of the batches
    (sharding a stream is up to the caller), and all get the same result, computed from all parts together.

    Args:
        model: The network. A DataParallel, DistributedDataParallel or compiled model is unwrapped first, and the result
            is not wrapped.
        batches: The calibration set: any iterable of tensors, or of tuples, lists or dicts whose first value is the
            input, such as a DataLoader. If the forward takes several inputs, each batch is a tuple that starts with
            them, or a dict with their names; if its only parameter is annotated as a dict or a list, each batch is
            that. Any of these may come in a tuple with labels. Iterated once. The mean and variance of the activations
            become the running statistics.
        layers: `"conv"`, `"dense"` or both.
        include_output: Whether to insert after the output layer too (a layer with no activation between it and the
            model's output).
        skip: Glob patterns on qualified names of layers to leave alone.
        placement: `"before_activation"` (directly after the layer) or `"after_activation"` (after the activation that
            follows it).
        equalize: Whether to rescale channels between neighboring layers by powers of two first, where the graph allows
            it, so that gamma is between 0.7 and 1.42. Outputs stay equal bit for bit; weights do not.
        eps: Added to the variance in each BatchNorm.
        momentum: Momentum of the running statistics; None means a cumulative average, as in PyTorch.
        dropout_before_batchnorm: Whether to keep dropout layers whose values a BatchNorm normalizes. They distort its
            statistics in training (see `dropouts_before_batchnorm`); False sets their p to 0 in the copy, and warns of
            dropout that the forward calls as a function, which cannot be switched off.
        device: Where to calibrate. Default: where the model is.
        autocast: Dtype for the calibration's forward pass; statistics stay float32 or better.
        tolerance: Stop calibrating once the statistics are this accurate; see `calibrate`.
        progress: Called after each batch with the number of images so far.

    Raises:
        GraphError: The model cannot be traced, or a `skip` pattern matches no layer.
        CalibrationError: No usable statistics can be computed from the batches.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
        >>> result = insert_batchnorm(model, [torch.rand(16, 3, 8, 8)])
        >>> [type(module).__name__ for module in result]
        ['Conv2d', 'BatchNorm2d', 'ReLU', 'Flatten', 'Linear']
        >>> x = torch.rand(2, 3, 8, 8)
        >>> torch.equal(result(x), model(x))
        True
    """
    insertion = insert(
        model,
        batches,
        layers=layers,
        include_output=include_output,
        skip=skip,
        placement=placement,
        equalize=equalize,
        eps=eps,
        momentum=momentum,
        dropout_before_batchnorm=dropout_before_batchnorm,
        device=device,
        autocast=autocast,
        tolerance=tolerance,
        progress=progress,
    )
    if insertion.fault:
        raise GraphError(insertion.fault)
    if insertion.nothing:
        warnings.warn(f"no BatchNorm was inserted: {insertion.nothing}", stacklevel=2)
    if insertion.others:
        warnings.warn(
            f"no BatchNorm was inserted after layers that are not modules of torch.nn: {insertion.others}", stacklevel=2
        )
    if insertion.one_image:
        warnings.warn(insertion.one_image, stacklevel=2)
    if insertion.dropout_functions and not dropout_before_batchnorm:
        warnings.warn(insertion.dropout_functions, stacklevel=2)
    return insertion.model


def insert_at(
    model: AnyModule,
    sites: Sequence[Site],
    moments: Mapping[str, Moments],
    *,
    edges: Sequence[Edge] = (),
    eps: float = 1e-5,
    momentum: float | None = 0.1,
) -> AnyModule:
    """Return a copy of the model with an identity BatchNorm at each site, made from the site's moments.

    This is the second half of `insert_batchnorm`, for callers who inspect sites and moments in between.

    Args:
        model: As for `insert_batchnorm`.
        sites: From `find_sites`.
        moments: From `calibrate`, by the name of each site's layer.
        edges: From `find_edges`; they are equalized before the BatchNorms are inserted.
        eps: Added to the variance in each BatchNorm.
        momentum: Momentum of the running statistics; None means a cumulative average.

    Raises:
        CalibrationError: A site has no usable moments.
        GraphError: `sites` are not sites of the model.
    """
    check_eps(eps)
    check_momentum(momentum)
    sites = checked_sites(model, sites)
    check_moments(moments, [site.name for site in sites])
    return _with_norms(model, sites, moments, edges, eps=eps, momentum=momentum)[0]


@torch.inference_mode(False)  # whatever the caller's mode: tensors made in inference mode can never be trained
def _with_norms(
    model: AnyModule,
    sites: Sequence[Site],
    moments: Mapping[str, Moments],
    edges: Sequence[Edge],
    *,
    eps: float,
    momentum: float | None,
) -> tuple[AnyModule, dict[str, nn.Module]]:
    """Return a copy with a BatchNorm at each site, and those BatchNorms by the sites' names."""
    result = deep_copy(model)
    scaled = equalize_channels(result, edges, moments)
    norms = {site: _norm_for(result, site, scaled[site.name], eps, momentum) for site in sites}
    spliced = cast(AnyModule, splice_after(result, norms))  # another class only if the model itself is a layer
    if sites:
        History.of(model).with_change(InsertedBatchNorms(tuple(sites))).keep_with(spliced)
    return spliced, {site.name: norm for site, norm in norms.items()}


def _dropouts(model: nn.Module) -> dict[str, _DropoutNd]:
    return {name: each for name, each in unwrapped(model).named_modules() if isinstance(each, _DropoutNd)}


def _norm_for(model: nn.Module, site: Site, moments: Moments, eps: float, momentum: float | None) -> nn.Module:
    layer, container = model.get_submodule(site.name), model.get_submodule(site.name.rpartition(".")[0])
    dtype = batchnorm_dtype(layer)
    try:
        norm = identity_batchnorm(moments, site.dims, eps=eps, momentum=momentum, dtype=dtype)
    except CalibrationError as error:
        raise CalibrationError(f"{site.kind} layer {site.name}: {error}") from None
    # A layer that was built in a forward pass is in train mode, whatever the mode of the model.
    return norm.to(reference_tensor(layer).device).train(layer.training and container.training)
