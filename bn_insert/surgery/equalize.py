"""Scale channels between neighbouring layers by powers of two, so that activations have unit-like scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float64, Shaped
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..graph.copies import unwrapped
from ..statistics.moments import Moments
from .edges import Consumer, Edge
from .weight_algebra import broadcast_channels

_BLOCK = 1 << 22  # weights checked at a time: the first dense layer of a VGG16 has a hundred million


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
    """
    model, result = unwrapped(model), dict(moments)
    for edge in edges:
        if not edge.reason:
            scale = _scale_exactly(model, edge, power_of_two_scales(moments[edge.site]))
            result[edge.site] = moments[edge.site].scaled(1 / scale)
    return result


def power_of_two_scales(moments: Moments) -> Float64[Tensor, " channels"]:
    """Return the power of two nearest to each channel's standard deviation by ratio; 1 for constant channels."""
    exponents = moments.std.log2().round()
    return torch.where(exponents.isfinite(), exponents, 0.0).exp2()


def _scale_exactly(model: nn.Module, edge: Edge, wanted: Float64[Tensor, " channels"]) -> Float64[Tensor, " channels"]:
    """Scale one edge's layers in place where that is exact, and return the scale that was applied to each channel."""
    layer = model.get_submodule(edge.site)
    consumers = [(model.get_submodule(consumer.name), consumer) for consumer in edge.consumers]
    exact = _exact_outputs(layer, 1 / wanted)
    for reader, consumer in consumers:
        exact_inputs = _exact_channels(reader, _input_axis(reader), _input_factors(reader, consumer, wanted))
        exact &= _inputs_of(consumer, exact_inputs, len(wanted)).all(1)
    scale = torch.where(exact, wanted, 1.0)
    weight, bias = _parameters(layer)
    with torch.no_grad():
        weight.mul_(_broadcast(layer, _output_axis(layer), 1 / scale))
        if bias is not None:
            bias.mul_((1 / scale).to(bias))
        for reader, consumer in consumers:
            factors = _input_factors(reader, consumer, scale)
            _parameters(reader)[0].mul_(_broadcast(reader, _input_axis(reader), factors))
    return scale


def _exact_outputs(layer: nn.Module, factors: Float64[Tensor, " channels"]) -> Bool[Tensor, " channels"]:
    """Return for each output channel whether multiplying its weights and bias is exact."""
    _, bias = _parameters(layer)
    exact = _exact_channels(layer, _output_axis(layer), factors)
    return exact if bias is None else exact & _is_exact(bias, factors.to(bias)).cpu()


def _exact_channels(layer: nn.Module, axis: int, factors: Float64[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Return for each channel on an axis of the weight whether multiplying keeps every bit of it."""
    weight, _ = _parameters(layer)
    broadcast = _broadcast(layer, axis, factors).expand(len(weight), *(-1 for _ in weight.shape[1:]))
    rows = max(1, _BLOCK // max(1, weight[:1].numel()))
    blocks = zip(weight.split(rows), broadcast.split(rows), strict=True)
    exact = torch.cat([_is_exact(part, by).reshape(len(part), weight.shape[1], -1).all(2) for part, by in blocks])
    exact = exact.all(1) if axis == 0 else exact.view(_groups(layer), -1, exact.shape[1]).all(1).flatten()
    return exact.cpu()


def _is_exact(values: Tensor, factors: Tensor) -> Bool[Tensor, "*shape"]:
    product = values.detach() * factors
    return (product / factors == values) & product.isfinite() & factors.isfinite() & (factors != 0)


def _input_factors(
    reader: nn.Module, consumer: Consumer, scale: Float64[Tensor, " channels"]
) -> Float64[Tensor, " inputs"]:
    """Return a factor for each input of the reader: the scale of the site's channel that it holds, else 1."""
    inputs = reader.in_channels if isinstance(reader, _ConvNd) else reader.in_features
    factors = torch.ones(cast(int, inputs), dtype=torch.float64)
    _inputs_of(consumer, factors, len(scale)).copy_(scale[:, None])
    return factors


def _inputs_of(consumer: Consumer, inputs: Tensor, channels: int) -> Shaped[Tensor, "channels repeat"]:
    """Return the part of a vector over a reader's inputs that belongs to the site's channels, as a view."""
    return inputs[consumer.first :][: channels * consumer.repeat].view(channels, consumer.repeat)


def _broadcast(layer: nn.Module, axis: int, factors: Float64[Tensor, " n"]) -> Tensor:
    """Return one factor for each channel, in the weight's dtype and in a shape that multiplies the weight."""
    weight, _ = _parameters(layer)
    return broadcast_channels(factors.to(weight), weight, axis, _groups(layer))


def _parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    return cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)


def _output_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's weight that its output channels are on."""
    return 1 if isinstance(layer, _ConvTransposeNd) else 0


def _input_axis(layer: nn.Module) -> int:
    return 1 - _output_axis(layer)


def _groups(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, _ConvNd) else 1
