"""Scale the weights of single channels of a conv or dense layer, where that loses no bits."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Bool, Float64
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .fold_weights import broadcast_channels, groups_of, parameters_of

_WEIGHTS_AT_A_TIME = 1 << 22  # the first dense layer of a VGG16 has a hundred million weights


def number_of_inputs(layer: nn.Module) -> int:
    """Return the number of input channels of a conv, or of input features of a dense layer."""
    return cast(int, layer.in_channels if isinstance(layer, _ConvNd) else layer.in_features)


def multiply_outputs(layer: nn.Module, factors: Float64[Tensor, " outputs"]) -> None:
    """Multiply the weights and the bias of each output channel by its factor, in place."""
    _multiply(layer, _output_axis(layer), factors)
    _, bias = parameters_of(layer)
    if bias is not None:
        with torch.no_grad():
            bias.mul_(factors.to(bias))


def multiply_inputs(layer: nn.Module, factors: Float64[Tensor, " inputs"]) -> None:
    """Multiply the weights of each input by its factor, in place."""
    _multiply(layer, _input_axis(layer), factors)


def exact_outputs(layer: nn.Module, factors: Float64[Tensor, " outputs"]) -> Bool[Tensor, " outputs"]:
    """Return for each output channel whether `multiply_outputs` keeps every bit of its weights and bias."""
    _, bias = parameters_of(layer)
    exact = _exact_channels(layer, _output_axis(layer), factors)
    return exact if bias is None else exact & _is_exact(bias, factors.to(bias)).cpu()


def exact_inputs(layer: nn.Module, factors: Float64[Tensor, " inputs"]) -> Bool[Tensor, " inputs"]:
    """Return for each input whether `multiply_inputs` keeps every bit of its weights."""
    return _exact_channels(layer, _input_axis(layer), factors)


def _multiply(layer: nn.Module, axis: int, factors: Float64[Tensor, " n"]) -> None:
    weight, _ = parameters_of(layer)
    with torch.no_grad():
        weight.mul_(_broadcast(layer, axis, factors))


def _exact_channels(layer: nn.Module, axis: int, factors: Float64[Tensor, " n"]) -> Bool[Tensor, " n"]:
    weight, _ = parameters_of(layer)
    broadcast = _broadcast(layer, axis, factors).expand(len(weight), *(-1 for _ in weight.shape[1:]))
    rows = max(1, _WEIGHTS_AT_A_TIME // max(1, weight[:1].numel()))
    blocks = zip(weight.split(rows), broadcast.split(rows), strict=True)
    exact = torch.cat([_is_exact(part, by).reshape(len(part), weight.shape[1], -1).all(2) for part, by in blocks])
    exact = exact.all(1) if axis == 0 else exact.view(groups_of(layer), -1, exact.shape[1]).all(1).flatten()
    return exact.cpu()


def _is_exact(values: Tensor, factors: Tensor) -> Bool[Tensor, "*shape"]:
    product = values.detach() * factors
    return (product / factors == values) & product.isfinite() & factors.isfinite() & (factors != 0)


def _broadcast(layer: nn.Module, axis: int, factors: Float64[Tensor, " n"]) -> Tensor:
    """Return one factor for each channel, in the weight's dtype and in a shape that multiplies the weight."""
    weight, _ = parameters_of(layer)
    return broadcast_channels(factors.to(weight), weight, axis, groups_of(layer))


def _output_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's weight that its output channels are on."""
    return 1 if isinstance(layer, _ConvTransposeNd) else 0


def _input_axis(layer: nn.Module) -> int:
    return 1 - _output_axis(layer)
