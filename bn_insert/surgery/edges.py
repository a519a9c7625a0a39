"""Which layers read a site, and whether its channels can be rescaled on the way to them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx, nn

from ..graph.sites import Site
from ..graph.trace import Trace, argument, operation, writes_in_place

_ELEMENTWISE = {"relu", "leaky_relu", "prelu", "rrelu"}


_COPIES = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"} | {
    *("alias", "detach", "contiguous", "clone", "lift_fresh_copy"),
}


_SPATIAL = {
    *(f"{kind}_pool{dims}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for dims in (1, 2, 3)),
    *(f"{kind}{dims}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for dims in (1, 2, 3)),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
}


# Operations that cut values off, and their parameters that say where.
_BOUNDS = {
    **{"clamp": ("min", "max"), "clip": ("min", "max"), "clamp_min": ("min",), "clamp_max": ("max",)},
    **{"hardtanh": ("min_val", "max_val"), "threshold": ("threshold", "value")},
}


_RESHAPES = {"flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze"}


_REDUCTIONS = {"mean", "sum", "amax"}


_CONCATENATIONS = {"cat", "concat", "concatenate"}


@dataclass(frozen=True)
class Consumer:
    """A layer that reads a site's channels: channel c is its input first + c * repeat and the `repeat - 1` next."""

    name: str
    first: int = 0
    repeat: int = 1


@dataclass(frozen=True)
class Edge:
    """Between a site and all layers that read its values; a reason says why its channels keep their scale, else ""."""

    site: str
    consumers: tuple[Consumer, ...] = ()
    reason: str = ""


def find_edges(model: nn.Module, example: Any, sites: Sequence[Site]) -> list[Edge]:
    """Return one edge a site, in the sites' order: its consumers, or the reason why it cannot be equalized.

    Everything between must be positively homogeneous per channel (ReLU, LeakyReLU, PReLU, pooling, dropout, flatten,
    upsampling, zero padding, concatenation), and every consumer a conv or dense layer whose weights are its own.
    Raises GraphError when the model cannot be seen.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    >>> from bn_insert import find_sites
    >>> example = torch.zeros(1, 3, 8, 8)
    >>> find_edges(model, example, find_sites(model, example))
    [Edge(site='0', consumers=(Consumer(name='3', first=0, repeat=36),), reason='')]
    """
    return edges_in(Trace.of(model, example), sites)


def edges_in(trace: Trace, sites: Sequence[Site]) -> list[Edge]:
    """Return what `find_edges` returns, from a trace."""
    return [_edge(trace, site) for site in sites]


@dataclass(frozen=True)
class _Values:
    """Where a site's channels lie in the values that a node gives: on this axis, as in Consumer."""

    node: fx.Node
    axis: int = 1
    first: int = 0
    repeat: int = 1


class _BlockedError(Exception):
    """What stands between a site and its consumers; ends up as the edge's reason."""


def _edge(trace: Trace, site: Site) -> Edge:
    try:
        return Edge(site.name, tuple(_consumers(trace, site)))
    except _BlockedError as error:
        return Edge(site.name, reason=str(error))


def _consumers(trace: Trace, site: Site) -> Iterator[Consumer]:
    calls = trace.calls_of(site.name)
    if len(calls) != 1:
        raise _BlockedError(f"{site.name} is called {len(calls)} times")
    if calls[0].meta["val"].dtype == torch.float16:
        raise _BlockedError("small float16 activations are subnormal, and scaling would change how they are rounded")
    _check_own_weights(trace, calls[0])
    layers = {node: name for name, node in trace.layer_nodes()}
    seen: set[str] = set()
    queue = [_Values(calls[0])]
    while queue:
        values = queue.pop()
        if values.node in trace.outputs:
            raise _BlockedError("its values are an output of the model")
        for user in values.node.users:
            if user.op != "call_function" or not (
                user.users or writes_in_place(user)
            ):  # what nobody reads does not count
                continue
            if user in layers:
                if layers[user] in seen:
                    raise _BlockedError(f"{layers[user]} reads it twice")
                seen.add(layers[user])
                yield _consumer(trace, layers[user], user, values)
            else:
                queue.append(_passed(trace, user, values))


def _consumer(trace: Trace, name: str, node: fx.Node, values: _Values) -> Consumer:
    channel_axis = 1 if operation(node) != "linear" else len(_shape_of(values.node)) - 1
    if node.args[0] is not values.node or values.axis != channel_axis:
        raise _BlockedError(f"{name} reads it along another axis")
    if len(trace.calls_of(name)) != 1:
        raise _BlockedError(f"{name} is called {len(trace.calls_of(name))} times")
    _check_own_weights(trace, node)
    return Consumer(name, values.first, values.repeat)


def _check_own_weights(trace: Trace, node: fx.Node) -> None:
    """Weight and bias must be the layer's own parameters as they are, read by nothing else."""
    for name in ("weight", "bias"):
        tensor = argument(node, name)
        if isinstance(tensor, fx.Node) and (tensor.op != "placeholder" or len(tensor.users) != 1):
            what = "shared with another layer" if tensor.op == "placeholder" else "computed in each forward pass"
            raise _BlockedError(f"the {name} of {trace.owner(node)} is {what}")


def _passed(trace: Trace, node: fx.Node, values: _Values) -> _Values:
    """Return where the channels lie behind an operation that is positively homogeneous in each of them."""
    name = operation(node)
    place = f"{name} ({trace.owner(node)})" if trace.owner(node) else name
    # getitem: of a max pooling that gives values and their positions.
    shifts = "alpha_dropout" in name and argument(node, "train")  # what it drops gets a value of its own
    copies = name in _ELEMENTWISE | _COPIES and not shifts
    if copies or _is_rectifier(node) or (name == "getitem" and node.args[1] == 0):
        return replace(values, node=node)
    # With an axis fewer, pooling takes the channels for positions.
    if name in _SPATIAL and values.repeat == 1 and len(_shape_of(values.node)) == 2 + int(name[-2]):
        return replace(values, node=node)
    if name in _RESHAPES:
        return _reshaped(node, values, place)
    if name in _REDUCTIONS and values.repeat == 1 and _reduces_positions(node, values):
        return replace(values, node=node)
    if name in {"pad", "constant_pad_nd"} and _pads_positions_with_zeros(node, values):
        return replace(values, node=node)
    if name in _CONCATENATIONS:
        return _concatenated(node, values, place)
    if name in {"add", "sub", "mul", "div"}:
        raise _BlockedError(f"{place} joins it with other values")
    raise _BlockedError(f"{place} behind it does not keep the scale")


def _is_rectifier(node: fx.Node) -> bool:
    """Say whether an operation only cuts values off at zero, as ReLU does."""
    bounds = [argument(node, parameter) for parameter in _BOUNDS.get(operation(node), ())]
    return bool(bounds) and all(bound is None or bound in (0, math.inf, -math.inf) for bound in bounds)


def _reshaped(node: fx.Node, values: _Values, place: str) -> _Values:
    before, after = _shape_of(values.node), _shape_of(node)
    if before[:2] == after[:2]:  # positions among themselves
        return replace(values, node=node)
    if values.axis == 1 and after == (before[0], math.prod(before[1:])):
        positions = math.prod(before[2:])
        return _Values(node, 1, values.first * positions, values.repeat * positions)
    raise _BlockedError(f"{place} mixes channels")


def _reduces_positions(node: fx.Node, values: _Values) -> bool:
    # mean() over everything has no parameter for dimensions.
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = [dims] if isinstance(dims, int) else (dims or [])
    return bool(axes) and all(axis % len(_shape_of(values.node)) > values.axis for axis in axes)


def _pads_positions_with_zeros(node: fx.Node, values: _Values) -> bool:
    if len(argument(node, "pad")) > 2 * (len(_shape_of(values.node)) - 2):
        return False
    if operation(node) == "pad" and argument(node, "mode") != "constant":
        return values.repeat == 1  # reflected or repeated values keep the scale of their channel
    return not argument(node, "value")


def _concatenated(node: fx.Node, values: _Values, place: str) -> _Values:
    tensors = cast("Sequence[fx.Node]", argument(node, "tensors"))
    axis = cast(int, argument(node, "dim")) % len(_shape_of(node))
    if axis != values.axis or tensors.count(values.node) != 1:
        raise _BlockedError(f"{place} joins it with other values")
    before = sum(_shape_of(tensor)[axis] for tensor in tensors[: tensors.index(values.node)])
    return replace(values, node=node, first=values.first + before)


def _shape_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)
