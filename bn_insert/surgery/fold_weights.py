"""Fold an affine map, such as a BatchNorm's, into the weights of the conv or dense layer before or after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..batchnorm.identity_parameters import kernel_factor

_WEIGHTS_AT_A_TIME = 1 << 20  # the first dense layer of a VGG16 has a hundred million weights


@dataclass(frozen=True, eq=False)
class Affine:
    """A map of channels, such as a BatchNorm's in eval mode: each is multiplied by `scale`, then `shift` is added."""

    scale: Float64[Tensor, " channels"]
    shift: Float64[Tensor, " channels"]

    @property
    def shifts(self) -> bool:
        """Whether some channel is shifted."""
        return bool((self.shift != 0).any())

    @property
    def keeps_order(self) -> bool:
        """Whether no channel changes sign, so that a maximum stays the maximum."""
        return bool((self.scale >= 0).all())

    @property
    def is_identity(self) -> bool:
        """Whether every channel stays exactly the same."""
        return not self.shifts and bool((self.scale == 1).all())


def batchnorm_affine(
    mean: Float[Tensor, " channels"],
    var: Float[Tensor, " channels"],
    gamma: Float[Tensor, " channels"] | None,
    beta: Float[Tensor, " channels"] | None,
    eps: float,
) -> Affine:
    """Return the map of a BatchNorm in eval mode, in float64 on the CPU.

    scale = gamma / sqrt(var + eps) and shift = beta - mean * scale. Where PyTorch's CPU kernel multiplies by exactly a
    power of two, as in BatchNorms made by `insert_batchnorm`, that is the scale: multiplying a weight by it is exact.

    Args:
        mean: Running mean.
        var: Running variance.
        gamma: The BatchNorm's `weight`; None for 1.
        beta: The BatchNorm's `bias`; None for 0.
        eps: Added to the variance.
    """
    dtype = torch.float64 if var.dtype == torch.float64 else torch.float32  # as the kernel computes for half types
    mean, var = mean.detach().to("cpu", dtype), var.detach().to("cpu", dtype)
    gamma = torch.ones_like(var) if gamma is None else gamma.detach().to("cpu", dtype)
    beta = torch.zeros_like(var) if beta is None else beta.detach().to("cpu", dtype)
    factor = kernel_factor(gamma, var, eps).double()
    is_power_of_two = factor.frexp().mantissa.abs() == 0.5
    scale = torch.where(is_power_of_two, factor, gamma.double() / (var.double() + eps).sqrt())
    return Affine(scale, beta.double() - mean.double() * scale)


def fold_outputs(
    weight: Float[Tensor, "first second *taps"],
    bias: Float[Tensor, " outputs"] | None,
    affine: Affine,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Float[Tensor, "first second *taps"], Float[Tensor, " outputs"] | None]:
    """Return weight and bias of a layer that computes `affine` of the outputs of the given layer.

    Args:
        weight: Of a conv or dense layer, or of a transposed conv, where inputs come before outputs.
        bias: None for a layer without bias; it stays None if no channel needs one.
        affine: Map of the layer's output channels.
        transposed: Whether the layer is a transposed conv.
        groups: The conv's groups.
    """
    scaled = _scaled(weight, affine.scale, 1 if transposed else 0, groups)
    scaled_bias = torch.zeros_like(affine.shift) if bias is None else bias.cpu().double() * affine.scale
    return scaled, _shifted(scaled_bias, affine.shift, bias, weight)


def fold_inputs(
    weight: Float[Tensor, "first second *taps"],
    bias: Float[Tensor, " outputs"] | None,
    affine: Affine,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Float[Tensor, "first second *taps"], Float[Tensor, " outputs"] | None]:
    """Return weight and bias of a layer whose outputs for x are those of the given layer for `affine` of x.

    Exact where all outputs read the same number of inputs: without zero padding, and for a transposed conv without a
    shift.

    Args:
        weight: As for `fold_outputs`.
        bias: As for `fold_outputs`.
        affine: Map of the channels of the layer's input. A dense layer after a flatten has several inputs per channel,
            next to each other.
        transposed: Whether the layer is a transposed conv.
        groups: The conv's groups.
    """
    axis = 0 if transposed else 1
    inputs_per_channel = weight.shape[axis] * (groups if axis else 1) // len(affine.scale)
    scale = affine.scale.repeat_interleave(inputs_per_channel)
    shift = affine.shift.repeat_interleave(inputs_per_channel)
    scaled = _scaled(weight, scale, axis, groups)
    if transposed or not affine.shifts:
        return scaled, bias
    parts = _in_float64(weight, broadcast_channels(shift, weight, axis, groups))
    output_shift = torch.cat([(weights * shifts).flatten(1).sum(1) for weights, shifts in parts])
    old_bias = torch.zeros_like(output_shift) if bias is None else bias.cpu().double()
    return scaled, _shifted(old_bias, output_shift, bias, weight)


def broadcast_channels(channels: Tensor, weight: Tensor, axis: int, groups: int) -> Tensor:
    """Return one value per channel in a shape that broadcasts against a weight.

    Args:
        channels: One value for each output or input channel of the layer.
        weight: The layer's weight, of shape (first, second, *taps).
        axis: The axis of these channels, 0 or 1; with groups, axis 1 has only the channels of one group.
        groups: The conv's groups.
    """
    matrix = channels[:, None]
    if axis == 1:
        rows_per_group = len(weight) // groups
        matrix = channels.reshape(groups, 1, -1).expand(groups, rows_per_group, -1).reshape(len(weight), -1)
    return matrix.reshape(*matrix.shape, *(1 for _ in weight.shape[2:]))


def _scaled(weight: Tensor, scale: Tensor, axis: int, groups: int) -> Tensor:
    scaled = torch.empty_like(weight)
    done = 0
    for weights, scales in _in_float64(weight, broadcast_channels(scale, weight, axis, groups)):
        scaled[done : done + len(weights)] = weights * scales
        done += len(weights)
    return scaled


def _in_float64(weight: Tensor, factors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a few rows of the weight at a time, in float64 on the CPU, with their part of the factors.

    The first dense layer of a VGG16 would take 0.8 GB at once, most of the time for allocating it.
    """
    rows = max(1, _WEIGHTS_AT_A_TIME // max(1, weight[:1].numel()))
    for weights, part in zip(weight.split(rows), factors.split(rows), strict=True):
        yield weights.cpu().double(), part


def _shifted(values: Tensor, shift: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor | None:
    """Return the shifted values in the dtype and on the device of the bias; None if there is none and all are 0."""
    like = weight if bias is None else bias
    shifted = torch.where(shift == 0, values, values + shift).to(like.device, like.dtype)  # -0.0 + 0.0 would be 0.0
    return None if bias is None and not shifted.any() else shifted


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
    weight, bias = parameters_of(layer)
    new_weight, new_bias = merged(
        weight.detach(),
        None if bias is None else bias.detach(),
        affine,
        transposed=isinstance(layer, _ConvTransposeNd),
        groups=groups_of(layer),
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


def parameters_of(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return weight and bias of a conv or dense layer."""
    return cast(nn.Parameter, layer.weight), cast(nn.Parameter | None, layer.bias)


def groups_of(layer: nn.Module) -> int:
    """Return the groups of a conv, 1 for a dense layer."""
    return layer.groups if isinstance(layer, _ConvNd) else 1
