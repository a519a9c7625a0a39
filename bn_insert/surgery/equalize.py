"""Scale channels between neighboring layers by powers of two, so that activations have roughly unit scale.

An edge leads from a site to the layers that read its channels. Where an operation on it, such as ReLU6, does not
preserve the scale, the edge has a reason instead, and stays as it is. What an operation does to channels is in the
table `OPERATORS` of `graph/operator_rules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor, fx, nn

from ..errors import CalibrationError
from ..graph.copies import check_values, unwrapped
from ..graph.operator_rules import (
    Role,
    argument,
    fits_positions,
    flattens_channels,
    has_role,
    keeps_channels,
    layer_parameters,
    operation,
    operator_of,
    writes_in_place,
)
from ..graph.sites import Site, checked_sites
from ..graph.trace import Trace
from ..statistics.moments import Moments
from .scale_weights import exact_inputs, exact_outputs, multiply_inputs, multiply_outputs, number_of_inputs


@dataclass(frozen=True)
class Consumer:
    """A layer that reads a site's channels: channel c is `repeat` of its inputs, from `first + c * repeat` on.

    Attributes:
        name: Qualified name of the layer.
        first: Index of the layer's input at which the site's first channel starts; above 0 after a concatenation.
        repeat: Number of inputs that carry one channel; above 1 after positions were flattened.
    """

    name: str
    first: int = 0
    repeat: int = 1


@dataclass(frozen=True)
class Edge:
    """The connection between a site and all layers that read its channels.

    Attributes:
        site: Name of the site.
        consumers: The layers that read it; empty if it cannot be equalized.
        reason: Why it cannot be equalized; empty if it can.
    """

    site: str
    consumers: tuple[Consumer, ...] = ()
    reason: str = ""


def find_edges(model: nn.Module, example: Any, sites: Sequence[Site]) -> list[Edge]:
    """Return one edge for each site: its consumers, or the reason why it cannot be equalized.

    Every operation in between must be positively homogeneous per channel (ReLU, LeakyReLU, PReLU, pooling, dropout,
    flatten, upsampling, zero padding, concatenation), and every consumer must be a conv or dense layer that shares its
    weights with no other.

    Args:
        model: The model; it is not changed.
        example: One batch, as for `insert_batchnorm`; only its shape matters.
        sites: Sites of the model, as from `find_sites`. The edges are in their order.

    Raises:
        GraphError: The model cannot be traced, or `sites` are not sites of it.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        >>> from bn_insert import find_sites
        >>> example = torch.zeros(1, 3, 8, 8)
        >>> find_edges(model, example, find_sites(model, example))
        [Edge(site='0', consumers=(Consumer(name='3', first=0, repeat=36),), reason='')]
    """
    sites = checked_sites(model, sites)
    return edges_in(Trace.of(model, example), sites)


def edges_in(trace: Trace, sites: Sequence[Site]) -> list[Edge]:
    """Return what `find_edges` returns, for a model that is already traced."""
    if trace.obstacle:
        reason = "torch.export cannot trace the forward, so what may read its values is not known"
        return [Edge(site.name, reason=reason) for site in sites]
    return [_edge(trace, site) for site in sites]


@dataclass(frozen=True)
class _Channels:
    """Where a site's channels are among the values of a node: along `axis`, as in Consumer."""

    node: fx.Node
    axis: int = 1
    first: int = 0
    repeat: int = 1


class _BlockedError(Exception):
    """An obstacle between a site and its consumers; it becomes the edge's reason."""


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
    _check_weights_not_shared(trace, calls[0])
    layers = {node: name for name, node in trace.layer_nodes()}
    seen: set[str] = set()
    queue = [_Channels(calls[0])]
    while queue:
        channels = queue.pop()
        if channels.node in trace.outputs:
            raise _BlockedError("its values are an output of the model")
        for user in channels.node.users:
            if user.op != "call_function" or not (user.users or writes_in_place(user)):
                continue  # nothing reads the result
            if user in layers:
                if layers[user] in seen:
                    raise _BlockedError(f"{layers[user]} reads it twice")
                seen.add(layers[user])
                yield _consumer(trace, layers[user], user, channels)
            else:
                queue.append(_passed(trace, user, channels))


def _consumer(trace: Trace, name: str, node: fx.Node, channels: _Channels) -> Consumer:
    channel_axis = len(_shape_of(channels.node)) - 1 if has_role(node, Role.DENSE) else 1
    if node.args[0] is not channels.node or channels.axis != channel_axis:
        raise _BlockedError(f"{name} reads it along another axis")
    if len(trace.calls_of(name)) != 1:
        raise _BlockedError(f"{name} is called {len(trace.calls_of(name))} times")
    _check_weights_not_shared(trace, node)
    return Consumer(name, channels.first, channels.repeat)


def _check_weights_not_shared(trace: Trace, node: fx.Node) -> None:
    """Check that weight and bias are plain parameters that no other operation reads."""
    for name, tensor in layer_parameters(node):
        if tensor.op != "placeholder" or len(tensor.users) != 1:
            what = "shared with another layer" if tensor.op == "placeholder" else "computed in each forward pass"
            raise _BlockedError(f"the {name} of {trace.owner(node)} is {what}")


def _passed(trace: Trace, node: fx.Node, channels: _Channels) -> _Channels:
    """Return where the channels are after an operation that is positively homogeneous in each of them."""
    operator = operator_of(node)
    place = f"{operation(node)} ({trace.owner(node)})" if trace.owner(node) else operation(node)
    if operator is not None and operator.homogeneous(node):
        if operator.elementwise or operator.role is Role.ITEM:
            return replace(channels, node=node)
        if operator.role is Role.RESHAPE:
            return _reshaped(node, channels, place)
        if operator.role is Role.CONCATENATION:
            return _concatenated(node, channels, place)
        if _keeps_channels_apart(node, channels):
            return replace(channels, node=node)
    if has_role(node, Role.ARITHMETIC):
        raise _BlockedError(f"{place} combines it with other values")
    raise _BlockedError(f"{place} does not preserve its scale")


def _keeps_channels_apart(node: fx.Node, channels: _Channels) -> bool:
    """Return whether a homogeneous operation on positions never combines values of different channels."""
    shape = _shape_of(channels.node)
    if has_role(node, Role.PADDING):
        # Constant padding puts only zeros next to a channel; any other padding repeats values of its neighbors.
        copies_values = operation(node) == "pad" and argument(node, "mode") != "constant"
        return fits_positions(node, shape) and (channels.repeat == 1 or not copies_values)
    if channels.repeat != 1:
        return False
    if has_role(node, Role.REDUCTION):
        return _reduces_positions(node, channels)
    return has_role(node, Role.POOLING, Role.RESIZING) and fits_positions(node, shape)


def _reshaped(node: fx.Node, channels: _Channels, place: str) -> _Channels:
    before, after = _shape_of(channels.node), _shape_of(node)
    if keeps_channels(before, after):
        return replace(channels, node=node)
    if channels.axis == 1 and flattens_channels(before, after):
        positions = math.prod(before[2:])
        return _Channels(node, 1, channels.first * positions, channels.repeat * positions)
    raise _BlockedError(f"{place} mixes channels")


def _reduces_positions(node: fx.Node, channels: _Channels) -> bool:
    # mean() over everything has no parameter for dimensions.
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = [dims] if isinstance(dims, int) else (dims or [])
    return bool(axes) and all(axis % len(_shape_of(channels.node)) > channels.axis for axis in axes)


def _concatenated(node: fx.Node, channels: _Channels, place: str) -> _Channels:
    tensors = cast("Sequence[fx.Node]", argument(node, "tensors"))
    axis = cast(int, argument(node, "dim")) % len(_shape_of(node))
    if axis != channels.axis or tensors.count(channels.node) != 1:
        raise _BlockedError(f"{place} combines it with other values")
    preceding = sum(_shape_of(tensor)[axis] for tensor in tensors[: tensors.index(channels.node)])
    return replace(channels, node=node, first=channels.first + preceding)


def _shape_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def equalize(model: nn.Module, edges: Sequence[Edge], moments: Mapping[str, Moments]) -> dict[str, Moments]:
    """Scale a model's channels in place without changing its outputs, and return the moments after scaling.

    Each channel of an edge's site is divided by the power of two nearest to its standard deviation, and its consumers'
    weights are multiplied by it. That is exact in floating point: the outputs stay the same bit for bit. A channel
    keeps its scale if it is constant, or if its weights would overflow or lose bits as subnormal numbers.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019,
    arXiv:1906.04721, where the scales are real numbers computed from weight ranges.

    Args:
        model: The model, as for `insert_batchnorm`; it is changed.
        edges: The edges to equalize, as from `find_edges`.
        moments: Moments of the activations, by the names of the sites.

    Returns:
        The moments that the activations of each site have after scaling, by the names of the sites.

    Raises:
        CalibrationError: A site has no moments.
    """
    edges = [edge for edge in edges if not edge.reason]
    check_moments(moments, [edge.site for edge in edges])
    model, result = unwrapped(model), dict(moments)
    check_values(model)
    for edge in edges:
        scale = _scale_exactly(model, edge, power_of_two_scales(moments[edge.site]))
        result[edge.site] = moments[edge.site].scaled(1 / scale)
    return result


def check_moments(moments: Mapping[str, Moments], names: Iterable[str]) -> None:
    """Raise CalibrationError unless there are moments for the layers of these names."""
    for name in names:
        if not isinstance(moments, Mapping) or name not in moments:
            raise CalibrationError(
                f"moments has none for the layer {name}; pass the dict that calibrate returns for these sites"
            )


def power_of_two_scales(moments: Moments) -> Float64[Tensor, " channels"]:
    """Return the power of two nearest to each channel's standard deviation by ratio; 1 for constant channels."""
    exponents = moments.std.log2().round()
    return torch.where(exponents.isfinite(), exponents, 0.0).exp2()


def _scale_exactly(model: nn.Module, edge: Edge, wanted: Float64[Tensor, " channels"]) -> Float64[Tensor, " channels"]:
    """Scale one edge's layers in place where that is exact, and return the scale that was applied to each channel."""
    layer = model.get_submodule(edge.site)
    consumers = [(model.get_submodule(consumer.name), consumer) for consumer in edge.consumers]
    exact = exact_outputs(layer, 1 / wanted)
    for reader, consumer in consumers:
        inputs = exact_inputs(reader, _input_factors(reader, consumer, wanted))
        exact &= _inputs_of(consumer, inputs, len(wanted)).all(1)
    scale = torch.where(exact, wanted, 1.0)
    multiply_outputs(layer, 1 / scale)
    for reader, consumer in consumers:
        multiply_inputs(reader, _input_factors(reader, consumer, scale))
    return scale


def _input_factors(
    reader: nn.Module, consumer: Consumer, scale: Float64[Tensor, " channels"]
) -> Float64[Tensor, " inputs"]:
    """Return a factor for each input of the reader: the scale of the site's channel that it carries, else 1."""
    factors = torch.ones(number_of_inputs(reader), dtype=torch.float64)
    _inputs_of(consumer, factors, len(scale)).copy_(scale[:, None])
    return factors


def _inputs_of(consumer: Consumer, inputs: Tensor, channels: int) -> Shaped[Tensor, "channels repeat"]:
    """Return the part of a vector over a reader's inputs that belongs to the site's channels, as a view."""
    return inputs[consumer.first :][: channels * consumer.repeat].view(channels, consumer.repeat)
