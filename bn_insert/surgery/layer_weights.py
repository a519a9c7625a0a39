"""The weights of one conv or dense layer: merging a BatchNorm into them, and multiplying channels where it is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Bool, Float64
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .weight_algebra import Affine, broadcast_channels, fold_inputs, fold_outputs

_BLOCK = 1 << 22  # weights checked at a time: the first dense layer of a VGG16 has a hundred million


def merge_into_outputs(layer: nn.Module, affine: Affine) -> bool:
    """Make a layer compute `affine` of its outputs, if the new weights are finite wherever the old ones are.

    Its parameters are replaced, since other layers may share the old ones.

    Returns:
        Whether the parameters were replaced.
    """
    return _merge(layer, affine, fold_outputs)


def merge_into_inputs(layer: nn.Module, affine: Affine) -> bool:
    """Make a layer compute its outputs for `affine` of its inputs; otherwise as `merge_into_outputs`."""
    return _merge(layer, affine, fold_inputs)


def _merge(layer: nn.Module, affine: Affine, merged: Callable[..., tuple[Tensor, Tensor | None]]) -> bool:
    weight, bias = _parameters(layer)
    new_weight, new_bias = merged(
        weight.detach(),
        None if bias is None else bias.detach(),
        affine,
        transposed=isinstance(layer, _ConvTransposeNd),
        groups=_groups(layer),
    )
    if not _finite(new_weight, new_bias) and _finite(weight, bias):
        return False
    layer.weight = nn.Parameter(new_weight, weight.requires_grad)
    if new_bias is not None:
        layer.bias = nn.Parameter(new_bias, (weight if bias is None else bias).requires_grad)
    return True


def _finite(*tensors: Tensor | None) -> bool:
    bounds = [torch.stack(tensor.aminmax()) for tensor in tensors if tensor is not None]  # aminmax propagates NaN
    return all(bool(bound.isfinite().all()) for bound in bounds)


def number_of_inputs(layer: nn.Module) -> int:
    """Return the number of input channels of a conv, or of input features of a dense layer."""
    return cast(int, layer.in_channels if isinstance(layer, _ConvNd) else layer.in_features)


def multiply_outputs(layer: nn.Module, factors: Float64[Tensor, " outputs"]) -> None:
    """Multiply the weights and the bias of each output channel by its factor, in place."""
    _multiply(layer, _output_axis(layer), factors)
    _, bias = _parameters(layer)
    if bias is not None:
        with torch.no_grad():
            bias.mul_(factors.to(bias))


def multiply_inputs(layer: nn.Module, factors: Float64[Tensor, " inputs"]) -> None:
    """Multiply the weights of each input by its factor, in place."""
    _multiply(layer, _input_axis(layer), factors)


def exact_outputs(layer: nn.Module, factors: Float64[Tensor, " outputs"]) -> Bool[Tensor, " outputs"]:
    """Return for each output channel whether `multiply_outputs` keeps every bit of its weights and bias."""
    _, bias = _parameters(layer)
    exact = _exact_channels(layer, _output_axis(layer), factors)
    return exact if bias is None else exact & _is_exact(bias, factors.to(bias)).cpu()


def exact_inputs(layer: nn.Module, factors: Float64[Tensor, " inputs"]) -> Bool[Tensor, " inputs"]:
    """Return for each input whether `multiply_inputs` keeps every bit of its weights."""
    return _exact_channels(layer, _input_axis(layer), factors)


def _multiply(layer: nn.Module, axis: int, factors: Float64[Tensor, " n"]) -> None:
    weight, _ = _parameters(layer)
    with torch.no_grad():
        weight.mul_(_broadcast(layer, axis, factors))


def _exact_channels(layer: nn.Module, axis: int, factors: Float64[Tensor, " n"]) -> Bool[Tensor, " n"]:
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


def _broadcast(layer: nn.Module, axis: int, factors: Float64[Tensor, " n"]) -> Tensor:
    """Return one factor for each channel, in the weight's dtype and in a shape that multiplies the weight."""
    weight, _ = _parameters(layer)
    return broadcast_channels(factors.to(weight), weight, axis, _groups(layer))


def _parameters(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    return cast(nn.Parameter, layer.weight), cast(nn.Parameter | None, layer.bias)


def _output_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's weight that its output channels are on."""
    return 1 if isinstance(layer, _ConvTransposeNd) else 0


def _input_axis(layer: nn.Module) -> int:
    return 1 - _output_axis(layer)


def _groups(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, _ConvNd) else 1
