"""Batch Renormalization as a function: statistics of a batch, what it is normalized by, and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, distributed

from ..errors import TrainingError


@dataclass(eq=False)
class Normalization:
    """What one forward pass normalizes by: for its backward pass, and for recomputing it."""

    count: int  # values per channel, over all ranks, as for mean and var
    local_mean: Float[Tensor, " channels"]
    local_var: Float[Tensor, " channels"]
    mean: Float[Tensor, " channels"]
    var: Float[Tensor, " channels"]
    running_mean: Float[Tensor, " channels"]
    running_var: Float[Tensor, " channels"]
    r: Float[Tensor, " channels"]
    d: Float[Tensor, " channels"]
    clipped: Shaped[Tensor, " channels"] | None  # channels where a limit is in force; None without limits
    eps: float
    synchronized: bool
    recomputed: bool = False

    def apply(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return the output, computed with the eval-mode kernel."""
        mean, var = self.running_mean, self.running_var
        if self.clipped is not None:
            scale = torch.ones_like(self.r) if weight is None else weight
            shift = torch.zeros_like(self.d) if bias is None else bias
            # A channel without a limit in force takes the running statistics: the output is then that of eval mode to
            # the bit, and it does not jump when limits are introduced.
            mean, var = torch.where(self.clipped, self.mean, mean), torch.where(self.clipped, self.var, var)
            weight = torch.where(self.clipped, scale * self.r, scale)
            bias = torch.where(self.clipped, scale * self.d + shift, shift)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=self.eps)


def renormalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, normalization: Normalization) -> Tensor:
    """Return `normalization.apply(x, weight, bias)`, with the gradients of batch normalization."""
    output: Tensor = _Renormalize.apply(x, weight, bias, normalization)
    return output


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per channel of this process's batch, in float64 for float64 and else in float32.

    On CPU and CUDA they come from the kernel that nn.BatchNorm uses.
    """
    channels = x.shape[1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.numel() == 0:
        return torch.zeros(channels, dtype=dtype, device=x.device), torch.zeros(channels, dtype=dtype, device=x.device)
    if x.numel() == channels:
        return x.detach().reshape(channels).to(dtype, copy=True), torch.zeros(channels, dtype=dtype, device=x.device)
    if x.device.type in ("cpu", "cuda"):
        # Given statistics make the kernel answer for half types in their dtype; what it writes there is not used.
        unused = torch.zeros(2, channels, dtype=dtype, device=x.device)
        return torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
    var, mean = torch.var_mean(x.to(dtype), [0, *range(2, x.dim())], correction=0)
    return mean, var


def pool_over_ranks(count: int, mean: Tensor, var: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return count, mean and biased variance of the batches of all ranks, computed in float64.

    Source of the formula: Chan et al., 1979.
    """
    own = torch.cat([mean.new_tensor([count], dtype=torch.float64), mean.double(), var.double()])
    gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, own)
    ranks = torch.stack(gathered)
    counts = ranks[:, :1]
    means, variances = ranks[:, 1:].chunk(2, dim=1)
    total = counts.sum()
    # For empty batches, zeros rather than NaN.
    weights = counts / total.clamp_min(1)
    pooled = (weights * means).sum(0)
    pooled_var = (weights * (variances + (means - pooled).square())).sum(0)
    return int(total), pooled.to(mean.dtype), pooled_var.to(var.dtype)


class _Renormalize(torch.autograd.Function):
    """The forward pass of a `Normalization` with the gradients of batch normalization."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, normalization: Normalization) -> Tensor:
        return normalization.apply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 - as PyTorch calls it
        x, weight, _, normalization = inputs
        ctx.save_for_backward(x, weight)
        ctx.normalization = normalization

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        normalization: Normalization = ctx.normalization
        scale = normalization.r if weight is None else weight * normalization.r
        grad_x: Tensor | None
        # dot: sum of grad * normalized x per channel; total: sum of grad.
        if normalization.count == 1:
            grad_x, total = _single_value_backward(grad, x, scale, normalization)
            grad_weight = normalization.d * total
        else:
            if normalization.synchronized:
                grad_x, dot, total = _synchronized_backward(grad, x, scale, normalization, needs_x)
            else:
                grad_x, dot, total = _batchnorm_backward(grad, x, scale, normalization, needs_x)
            grad_weight = normalization.r * dot + normalization.d * total
        return (
            grad_x if needs_x else None,
            grad_weight if needs_weight else None,
            total if needs_bias else None,
            None,
        )


def _batchnorm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, normalization: Normalization, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    invstd = (normalization.var + normalization.eps).rsqrt()
    if x.numel() == 0:  # one rank's batch; the kernel divides by zero
        return torch.zeros_like(x), torch.zeros_like(invstd), torch.zeros_like(invstd)
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, scale, None, None, normalization.mean, invstd, True, normalization.eps, [needs_x, True, True]
    )


def _single_value_backward(
    grad: Tensor, x: Tensor, scale: Tensor, normalization: Normalization
) -> tuple[Tensor, Tensor]:
    # The output of a channel where d_max is in force does not depend on x.
    if normalization.clipped is not None:
        scale = scale.masked_fill(normalization.clipped, 0)
    if x.numel() == 0:  # the value is on another rank
        return torch.zeros_like(x), torch.zeros_like(normalization.mean)
    grad_x, _, total = torch.ops.aten.native_batch_norm_backward(
        grad,
        x,
        scale,
        normalization.running_mean.to(scale.dtype),
        normalization.running_var.to(scale.dtype),
        None,
        None,
        False,
        normalization.eps,
        [True, True, True],
    )
    return grad_x, total


def _synchronized_backward(
    grad: Tensor, x: Tensor, scale: Tensor, normalization: Normalization, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradient of x from sums over all ranks, and this rank's own sums, which DDP averages."""
    if torch.is_grad_enabled():
        raise TrainingError("a BatchRenorm with synchronize=True has no second derivatives; set synchronize=False")
    mean = normalization.mean
    _, dot, total = _batchnorm_backward(grad, x, scale, normalization, needs_x=False)
    if not needs_x:
        return None, dot, total
    sums = torch.stack([dot, total]).double()
    distributed.all_reduce(sums)
    mean_dot, mean_total = (sums / normalization.count).to(mean.dtype)
    invstd = (normalization.var + normalization.eps).rsqrt()
    shape = (-1, *[1] * (x.dim() - 2))
    centered = (x - mean.view(shape)) * (invstd * mean_dot).view(shape)
    grad_x = (grad - mean_total.view(shape) - centered) * (scale * invstd).view(shape)
    return grad_x.to(x.dtype), dot, total
