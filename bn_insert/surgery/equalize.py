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
    return broadcast_channels(factors.to(weight), weight, axis, _groups(layer))


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
