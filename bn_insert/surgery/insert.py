"""insert_batchnorm: see the graph, calibrate, make identity BatchNorms, splice them in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..batchnorm.identity import check_eps, identity_batchnorm
from ..errors import CalibrationError
from ..graph.copies import AnyModule, deep_copy, shared_copy
from ..graph.inputs import Inputs, reference_tensor
from ..graph.layers import Kind
from ..graph.sites import Placement, Site, find_sites
from ..statistics.calibrate import calibrate
from ..statistics.moments import Moments
from ..statistics.passes import Progress, checked, preserved_random_state
from ..support.processes import on_every_rank
from .edges import Edge, find_edges
from .equalize import equalize as equalize_channels
from .history import Architecture, Insertion
from .splice import splice_after


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
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> AnyModule:
    """Return a copy of the model with BatchNorm behind its conv and dense layers and unchanged outputs in eval mode.

    On a CPU the outputs are equal bit for bit.  The given model is never changed, nor is PyTorch's random state.

    model: of a DataParallel, DistributedDataParallel or compiled model the module in it is taken, and returned.
    batches: the calibration set: any iterable of tensors, or of tuples, lists or dicts whose first value is the input
        (a DataLoader as it is).  Where the forward takes several inputs, a batch is a tuple that begins with them or a
        dict with their names; where its one parameter is annotated as a dict, that dict; each maybe in a tuple with
        labels.  It is iterated once; its activations' mean and variance become the running statistics.
    layers: "conv", "dense" or both.
    include_output: also behind the output layer (no activation between it and the model's output).
    skip: glob patterns on qualified names; layers that fit one are left alone.
    placement: "before_activation" (behind the layer) or "after_activation" (behind the activation that follows it).
    equalize: first scale channels between neighbouring layers by powers of two, where the graph allows it, so that
        gamma lies between 0.7 and 1.42. Outputs stay equal bit for bit; the weights do not.
    eps, momentum: of the BatchNorms; momentum None means a cumulative average, as in PyTorch.
    device: where to calibrate; default: where the model is.  autocast: dtype for the calibration's forward pass.
    tolerance: end calibration early, once the statistics are this exact, as `calibrate` says.
    progress: called after each batch with the number of images so far.
    Inside an initialized torch.distributed process group every rank calls this with its own part of the batches (who
    shards a stream is up to the caller), and gets the same result from all parts together.
    Raises GraphError when the model cannot be seen, CalibrationError when the batches give no usable statistics.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    >>> result = insert_batchnorm(model, [torch.rand(16, 3, 8, 8)])
    >>> [type(module).__name__ for module in result]
    ['Conv2d', 'BatchNorm2d', 'ReLU', 'Flatten', 'Linear']
    >>> x = torch.rand(2, 3, 8, 8)
    >>> torch.equal(result(x), model(x))
    True
    """
    with preserved_random_state():
        example, batches = _peek(model, batches)
        sites = find_sites(model, example, layers=layers, include_output=include_output, skip=skip, placement=placement)
        moments = calibrate(
            model, sites, batches, device=device, autocast=autocast, tolerance=tolerance, progress=progress
        )
    edges = find_edges(model, example, sites) if equalize else ()
    return insert_at(model, sites, moments, edges=edges, eps=eps, momentum=momentum)


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

    edges: from `find_edges`: equalized before the BatchNorms go in.

    The second half of `insert_batchnorm`, for callers who want to look at sites and moments in between.
    """
    return insert_with_norms(model, sites, moments, edges=edges, eps=eps, momentum=momentum)[0]


def insert_with_norms(
    model: AnyModule,
    sites: Sequence[Site],
    moments: Mapping[str, Moments],
    *,
    edges: Sequence[Edge] = (),
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    shared: bool = False,
) -> tuple[AnyModule, dict[str, nn.Module]]:
    """Return what `insert_at` does, and in it the BatchNorm of each site, by the site's name.

    shared: weights that stay as they are share their memory with the model's, for callers who change neither.
    """
    check_eps(eps)
    result = shared_copy(model) if shared and not edges else deep_copy(model)
    moments = equalize_channels(result, edges, moments)
    norms = {
        site: _norm_for(result.get_submodule(site.name), site, moments[site.name], eps, momentum) for site in sites
    }
    spliced = cast(AnyModule, splice_after(result, norms))  # another class only if the model itself is a layer
    if sites:
        Architecture.of(model).changed(Insertion(tuple(sites))).keep_with(spliced)
    return spliced, {site.name: norm for site, norm in norms.items()}


def _norm_for(layer: nn.Module, site: Site, moments: Moments, eps: float, momentum: float | None) -> nn.Module:
    weight = next(layer.parameters())
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    try:
        norm = identity_batchnorm(moments, site.dims, eps=eps, momentum=momentum, dtype=dtype)
    except CalibrationError as error:
        raise CalibrationError(f"{site.kind} layer {site.name}: {error}") from None
    return norm.to(weight.device).train(layer.training)


@dataclass(frozen=True)
class _Like:
    """What one input tensor is like."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _peek(model: nn.Module, batches: Iterable[Any]) -> tuple[Inputs, Iterator[Any]]:
    """Return an example of the input, and all batches; a rank without any batch learns the shapes from the others."""
    iterator: Iterator[Any] = iter(())
    found: list[Any] = []

    def own_shapes() -> Inputs | None:
        nonlocal iterator
        iterator = iter(checked(batches))
        found.extend(islice(iterator, 1))
        if not found:
            return None
        return Inputs.of(found[0], 0, model).mapped(lambda tensor: _Like(tuple(tensor.shape), tensor.dtype))

    shapes = next((each for each in on_every_rank(own_shapes) if each is not None), None)
    if shapes is None:
        raise CalibrationError("the calibration set is empty: no batch arrived")
    device = reference_tensor(model).device
    zeros = tree_map_only(
        _Like, lambda like: torch.zeros(like.shape, dtype=like.dtype, device=device), (shapes.args, dict(shapes.kwargs))
    )
    return Inputs(*zeros), chain(found, iterator)
