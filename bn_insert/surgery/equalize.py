"""Scale channels between neighbouring layers by powers of two, so that activations have unit-like scale.

Which operations between the layers allow it is in the table `OPERATORS` of `graph/operator_rules.py`, which `edges.py`
reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor, nn

from ..graph.copies import unwrapped
from ..statistics.moments import Moments
from .edges import Consumer, Edge
from .layer_weights import exact_inputs, exact_outputs, multiply_inputs, multiply_outputs, number_of_inputs


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
