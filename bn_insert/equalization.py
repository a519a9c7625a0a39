"""Scale channels between neighbouring layers by powers of two, so that activations have unit-like scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float64, Shaped
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .affine import along
from .graph import Trace, argument, operation, unwrapped, writes_in_place
from .moments import Moments
from .sites import Site

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

_BLOCK = 1 << 22  # weights checked at a time: the first dense layer of a VGG16 has a hundred million


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
    trace = Trace.of(model, example)
    return [_edge(trace, site) for site in sites]


def equalize(model: nn.Module, edges: Sequence[Edge], moments: Mapping[str, Moments]) -> dict[str, Moments]:
    """Scale a model's channels in place, without changing its function, and return the moments that its sites now have.

    Each channel of an edge's site is divided by the power of two that is nearest to its std, and its consumers' weights
    are multiplied by it: exact in floating point, so that the outputs stay the same bit for bit. A channel whose
    weights would overflow, or lose bits as subnormal numbers, keeps its scale, and so does a constant one.

    model: as for `insert_batchnorm`. edges: as `find_edges` gives. moments: by the sites' names. Source: Nagel et al.,
    "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, arXiv:1906.04721; there with real
    scales, from weight ranges.
    """
    model, result = unwrapped(model), dict(moments)
    for edge in edges:
        if not edge.reason:
            scale = _scale_exactly(model, edge, power_of_two_scales(moments[edge.site]))
            result[edge.site] = moments[edge.site].scaled(1 / scale)
    return result


def power_of_two_scales(moments: Moments) -> Float64[Tensor, " channels"]:
    """Return the power of two nearest to each channel's std (by ratio); 1 for constant channels."""
    exponents = moments.std.log2().round()
    return torch.where(exponents.isfinite(), exponents, 0.0).exp2()


def _multiply_outputs(layer: nn.Module, wanted: Float64[Tensor, " channels"]) -> Float64[Tensor, " channels"]:
    """Multiply a layer's output channels in place where that is exact, and return the factor that each really got."""
    weight, bias = _parameters(layer)
    factors = torch.where(_exact_outputs(layer, wanted), wanted, 1.0)
    with torch.no_grad():
        weight.mul_(_grid(layer, _outputs(layer), factors))
        if bias is not None:
            bias.mul_(factors.to(bias))
    return factors


def _exact_outputs(layer: nn.Module, factors: Float64[Tensor, " channels"]) -> Bool[Tensor, " channels"]:
    _, bias = _parameters(layer)
    exact = _exact_channels(layer, _outputs(layer), factors)
    return exact if bias is None else exact & _is_exact(bias, factors.to(bias)).cpu()


def _scale_exactly(model: nn.Module, edge: Edge, wanted: Float64[Tensor, " channels"]) -> Float64[Tensor, " channels"]:
    """Scale one edge's layers in place where that is exact, and return the scale that each channel really got."""
    layer = model.get_submodule(edge.site)
    readers = [(model.get_submodule(consumer.name), consumer) for consumer in edge.consumers]
    exact = _exact_outputs(layer, 1 / wanted)
    for reader, consumer in readers:
        columns = _exact_channels(reader, _inputs(reader), _columns(reader, consumer, wanted))
        exact &= _of_consumer(columns, consumer, len(wanted)).all(1)
    scale = torch.where(exact, wanted, 1.0)
    _multiply_outputs(layer, 1 / scale)
    with torch.no_grad():
        for reader, consumer in readers:
            factors = _grid(reader, _inputs(reader), _columns(reader, consumer, scale))
            _parameters(reader)[0].mul_(factors)
    return scale


def _parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    return cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)


def _outputs(layer: nn.Module) -> int:
    """Return the axis of a layer's weight that its output channels are on."""
    return 1 if isinstance(layer, _ConvTransposeNd) else 0


def _inputs(layer: nn.Module) -> int:
    return 1 - _outputs(layer)


def _columns(reader: nn.Module, consumer: Consumer, scale: Float64[Tensor, " channels"]) -> Float64[Tensor, " inputs"]:
    """Return a factor for every input of the reader: the scale of the channel that it comes from, else 1."""
    inputs = reader.in_channels if isinstance(reader, _ConvNd) else reader.in_features
    columns = torch.ones(cast(int, inputs), dtype=torch.float64)
    _of_consumer(columns, consumer, len(scale)).copy_(scale[:, None])
    return columns


def _of_consumer(inputs: Tensor, consumer: Consumer, channels: int) -> Shaped[Tensor, "channels repeat"]:
    """Return the part of a vector over a reader's inputs that belongs to the site's channels, as a view."""
    return inputs[consumer.first :][: channels * consumer.repeat].view(channels, consumer.repeat)


def _grid(layer: nn.Module, axis: int, factors: Float64[Tensor, " n"]) -> Tensor:
    """Return one factor a channel, in the weight's dtype and in a shape that multiplies it."""
    weight, _ = _parameters(layer)
    return along(factors.to(weight), weight, axis, _groups(layer))


def _groups(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, _ConvNd) else 1


def _exact_channels(layer: nn.Module, axis: int, factors: Float64[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Say for each channel on an axis of the weight whether multiplying keeps every bit of it."""
    weight, _ = _parameters(layer)
    grid = _grid(layer, axis, factors).expand(len(weight), *(-1 for _ in weight.shape[1:]))
    rows = max(1, _BLOCK // max(1, weight[:1].numel()))
    blocks = zip(weight.split(rows), grid.split(rows), strict=True)
    exact = torch.cat([_is_exact(part, by).reshape(len(part), weight.shape[1], -1).all(2) for part, by in blocks])
    exact = exact.all(1) if axis == 0 else exact.view(_groups(layer), -1, exact.shape[1]).all(1).flatten()
    return exact.cpu()


def _is_exact(values: Tensor, factors: Tensor) -> Bool[Tensor, "*shape"]:
    product = values.detach() * factors
    return (product / factors == values) & product.isfinite() & factors.isfinite() & (factors != 0)


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
