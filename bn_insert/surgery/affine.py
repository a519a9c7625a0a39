"""What a BatchNorm does in eval mode, an affine map of each channel, and the weights of a layer that takes it up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..batchnorm.identity import kernel_factor

_BLOCK = 1 << 20  # weights


@dataclass(frozen=True, eq=False)
class Affine:
    """What a BatchNorm does in eval mode: each channel times `scale`, plus `shift`."""

    scale: Float64[Tensor, " channels"]
    shift: Float64[Tensor, " channels"]

    @property
    def shifts(self) -> bool:
        """Some channel is shifted."""
        return bool((self.shift != 0).any())

    @property
    def keeps_order(self) -> bool:
        """No channel is mirrored, so that a maximum stays one."""
        return bool((self.scale >= 0).all())

    @property
    def is_identity(self) -> bool:
        """Every channel is left exactly alone."""
        return not self.shifts and bool((self.scale == 1).all())


def batchnorm_affine(
    mean: Float[Tensor, " channels"],
    var: Float[Tensor, " channels"],
    gamma: Float[Tensor, " channels"] | None,
    beta: Float[Tensor, " channels"] | None,
    eps: float,
) -> Affine:
    """Return scale = gamma / sqrt(var + eps) and shift = beta - mean * scale, in float64 on the CPU.

    Where PyTorch's CPU kernel multiplies by exactly a power of two, as in BatchNorms that `insert_batchnorm` makes,
    that is the scale: multiplying a weight by it is exact.
    """
    dtype = torch.float64 if var.dtype == torch.float64 else torch.float32  # as the kernel computes for half types
    mean, var = mean.detach().to("cpu", dtype), var.detach().to("cpu", dtype)
    gamma = torch.ones_like(var) if gamma is None else gamma.detach().to("cpu", dtype)
    beta = torch.zeros_like(var) if beta is None else beta.detach().to("cpu", dtype)
    factor = kernel_factor(gamma, var, eps).double()
    exact = factor.frexp().mantissa.abs() == 0.5  # of powers of two alone
    scale = torch.where(exact, factor, gamma.double() / (var.double() + eps).sqrt())
    return Affine(scale, beta.double() - mean.double() * scale)


def fold_outputs(
    weight: Float[Tensor, "first second *taps"],
    bias: Float[Tensor, " outputs"] | None,
    affine: Affine,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Float[Tensor, "first second *taps"], Float[Tensor, " outputs"] | None]:
    """Return weight and bias of a layer whose output is `affine` of the given layer's, channel by channel.

    weight: of a conv or dense layer; of a transposed conv (inputs first, then outputs) with `transposed`. The bias
    stays None where no channel needs one.
    """
    scaled = _scaled(weight, affine.scale, 1 if transposed else 0, groups)
    start = torch.zeros_like(affine.shift) if bias is None else bias.cpu().double() * affine.scale
    return scaled, _shifted(start, affine.shift, bias, weight)


def fold_inputs(
    weight: Float[Tensor, "first second *taps"],
    bias: Float[Tensor, " outputs"] | None,
    affine: Affine,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Float[Tensor, "first second *taps"], Float[Tensor, " outputs"] | None]:
    """Return weight and bias of a layer that gives for x what the given layer gives for `affine` of x.

    Exact where every output reads as many inputs as every other: no zero padding, and for a transposed conv no shift.
    A dense layer behind a flatten has several inputs a channel, one behind the other.
    """
    axis = 0 if transposed else 1
    repeats = weight.shape[axis] * (groups if axis else 1) // len(affine.scale)
    scale, shift = affine.scale.repeat_interleave(repeats), affine.shift.repeat_interleave(repeats)
    scaled = _scaled(weight, scale, axis, groups)
    if transposed or not affine.shifts:
        return scaled, bias
    blocks = _blocks(weight, along(shift, weight, axis, groups))
    added = torch.cat([(rows * shifts).flatten(1).sum(1) for rows, shifts in blocks])
    start = torch.zeros_like(added) if bias is None else bias.cpu().double()
    return scaled, _shifted(start, added, bias, weight)


def _scaled(weight: Tensor, scale: Tensor, axis: int, groups: int) -> Tensor:
    scaled = torch.empty_like(weight)
    done = 0
    for rows, scales in _blocks(weight, along(scale, weight, axis, groups)):
        scaled[done : done + len(rows)] = rows * scales
        done += len(rows)
    return scaled


def _blocks(weight: Tensor, grid: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the weight in float64 on the CPU, with its part of the grid, a few rows at a time.

    The first dense layer of a VGG16 would take 0.8 GB at once, and most of the time would go into getting it.
    """
    size = max(1, _BLOCK // max(1, weight[:1].numel()))
    for rows, part in zip(weight.split(size), grid.split(size), strict=True):
        yield rows.cpu().double(), part


def along(vector: Tensor, weight: Tensor, axis: int, groups: int) -> Tensor:
    """Return one value a channel in a shape that multiplies the weight; its second axis counts within each group."""
    grid = vector[:, None]
    if axis == 1:
        rows = len(weight) // groups
        grid = vector.reshape(groups, 1, -1).expand(groups, rows, -1).reshape(len(weight), -1)
    return grid.reshape(*grid.shape, *(1 for _ in weight.shape[2:]))


def _shifted(start: Tensor, shift: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor | None:
    like = weight if bias is None else bias
    shifted = torch.where(shift == 0, start, start + shift).to(like.device, like.dtype)  # -0.0 + 0.0 would be 0.0
    return None if bias is None and not shifted.any() else shifted
