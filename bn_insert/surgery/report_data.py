"""The layers of a network and the statistics of what was inserted after them, as plain data for reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from ..graph.sites import Layer, Site
from ..statistics.moments import Moments

# A channel whose std is below this fraction of its layer's median hardly distinguishes images from each other.
NEAR_CONSTANT = 0.01


def layer_statistics(
    layers: Sequence[Layer],
    moments: Mapping[str, Moments],
    norms: Mapping[str, nn.Module],
    *,
    equalized: bool,
) -> list[dict[str, Any]]:
    """Return one JSON-ready dictionary per layer, in the given order.

    Each has the layer's name, kind, type, output shape and number of parameters, and either `batchnorm` (the module
    that it follows, the number of values, and mean, std, gamma and standard error of each channel) or `reason` (why
    the layer has no new BatchNorm).

    Args:
        layers: All conv and dense layers, as `survey` returns them.
        moments: The moments of each site before equalization, by layer name.
        norms: The inserted BatchNorm of each site, by layer name.
        equalized: Whether the network was equalized. If so, `batchnorm` also has `gamma_before_equalization`, the
            gamma that the layer would have had without.
    """
    return [
        {
            "name": layer.name,
            "kind": layer.kind,
            "type": layer.type_name,
            "output_shape": list(layer.shape),
            "parameters": layer.parameters,
        }
        | (
            {"reason": layer.reason}
            if layer.site is None
            else {"batchnorm": _batchnorm(layer.site, moments[layer.name], norms[layer.name], equalized=equalized)}
        )
        for layer in layers
    ]


def _batchnorm(site: Site, moments: Moments, norm: nn.Module, *, equalized: bool) -> dict[str, Any]:
    std = moments.std
    result = {
        "behind": site.anchor,  # the name of this key is part of the report's format
        "channels": moments.channels,
        "constant_channels": moments.constant_channels,
        "near_constant_channels": int(((std > 0) & (std < NEAR_CONSTANT * std.median())).sum()),
        "count": moments.count,
        "mean": moments.mean.tolist(),
        "std": std.tolist(),
        "standard_error": None if moments.standard_error is None else moments.standard_error.tolist(),
        "gamma": cast(Tensor, norm.weight).tolist(),
    }
    if equalized:
        result["gamma_before_equalization"] = (moments.var + cast(float, norm.eps)).sqrt().tolist()
    return result
