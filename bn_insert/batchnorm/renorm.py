"""Batch Renormalization: a BatchNorm whose training forward pass is its eval forward pass, within limits."""

from __future__ import annotations

import math
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import TrainingError

# Passes that leave no graph (under `no_grad`, as reentrant checkpointing runs them) and can still be recomputed.
_GRAPHLESS_PASSES = 64
# A recomputation whose batch statistics differ by less, in standard deviations, is of the same batch: kernels on a GPU
# do not sum in the same order each time. Two batches differ by about 1 / sqrt(values per channel).
_SAME_BATCH = 1e-2


class _BatchRenorm(_BatchNorm):
    """What BatchRenorm1d, 2d and 3d share."""

    # Defaults of the class, so that an nn.BatchNorm whose __class__ is set to a BatchRenorm is complete.
    _r_max: float = math.inf
    _d_max: float = math.inf
    synchronize: bool = False
    # None only without running statistics, which the constructor and `to_renorm` refuse.
    running_mean: Tensor
    running_var: Tensor

    def __init__(  # noqa: PLR0917 - the positions of nn.BatchNorm's arguments
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        r_max: float = math.inf,
        d_max: float = math.inf,
        synchronize: bool = False,
    ) -> None:
        if not track_running_stats:
            raise TrainingError(
                "Batch Renormalization normalizes by running statistics and cannot do without them; use nn.BatchNorm "
                "for track_running_stats=False"
            )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:  # which the constructors of older releases do not know
            self.register_parameter("bias", None)
        self.r_max = r_max
        self.d_max = d_max
        self.synchronize = synchronize

    @property
    def r_max(self) -> float:
        """Largest ratio between the standard deviations of the batch and of the running statistics, either way."""
        return self._r_max

    @r_max.setter
    def r_max(self, value: float) -> None:
        if not value >= 1:
            raise TrainingError(f"r_max must be at least 1 (1: nn.BatchNorm, inf: no limit), got {value}")
        self._r_max = float(value)

    @property
    def d_max(self) -> float:
        """Largest distance between the means of the batch and of the running statistics, in standard deviations."""
        return self._d_max

    @d_max.setter
    def d_max(self, value: float) -> None:
        if not value >= 0:
            raise TrainingError(f"d_max must be at least 0 (0: nn.BatchNorm, inf: no limit), got {value}")
        self._d_max = float(value)

    def forward(self, input: Shaped[Tensor, "batch channels *space"]) -> Shaped[Tensor, "batch channels *space"]:  # noqa: A002 - as nn.BatchNorm names it
        """Normalize a batch; in training mode, move the running statistics afterwards."""
        # Running statistics can still be removed by hand; without them there is nothing to renormalize to.
        if not self.training or self.running_mean is None:
            return super().forward(input)
        self._check_input_dim(input)
        return self._train_forward(input)

    # Keeping passes for a recomputation is a side effect that a compiled graph cannot have.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _train_forward(self, x: Tensor) -> Tensor:
        passes = _kept_passes(self)
        in_backward = torch._C._current_graph_task_id() != -1
        with torch.no_grad():
            mean, var = _batch_moments(x)
            normalization = passes.find(mean, var, self.eps) if in_backward else None
            if normalization is None:
                normalization = self._normalization(x, mean, var)
        # Without gradients it is a reentrant checkpoint within another, which comes again.
        normalization.recomputed |= in_backward and torch.is_grad_enabled()
        if normalization.count == 0:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        output = _Renormalize.apply(x, self.weight, self.bias, normalization)
        if not in_backward:
            passes.keep(normalization, in_graph=output.requires_grad)
            self._move_statistics(normalization)
        return output

    def _normalization(self, x: Tensor, local_mean: Tensor, local_var: Tensor) -> _Normalization:
        count = x.numel() // x.shape[1]
        mean, var = local_mean, local_var
        synchronized = self.synchronize and distributed.is_available() and distributed.is_initialized()
        if synchronized:
            count, mean, var = _pool_over_ranks(count, mean, var)
        running_mean = self.running_mean.to(mean.dtype)
        running_std = (self.running_var.to(var.dtype) + self.eps).sqrt()
        # The ratio says nothing of a single value, whose normalized value is 0.
        ratio = (var + self.eps).sqrt() / running_std if count > 1 else torch.ones_like(var)
        distance = (mean - running_mean) / running_std
        r, d, clipped = ratio, distance, None
        if self.r_max < math.inf or self.d_max < math.inf:
            r, d = ratio.clamp(1 / self.r_max, self.r_max), distance.clamp(-self.d_max, self.d_max)
            clipped = (r != ratio) | (d != distance)
        return _Normalization(
            count=count,
            local_mean=local_mean,
            local_var=local_var,
            mean=mean,
            var=var,
            # Copies: the buffers move before the backward pass.
            running_mean=self.running_mean.clone(),
            running_var=self.running_var.clone(),
            r=r,
            d=d,
            clipped=clipped,
            eps=self.eps,
            synchronized=synchronized,
        )

    @torch.no_grad()
    def _move_statistics(self, normalization: _Normalization) -> None:
        factor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1 / float(self.num_batches_tracked)
        count = normalization.count
        self.running_mean.lerp_(normalization.mean.to(self.running_mean.dtype), factor)
        if count > 1:
            unbiased = normalization.var * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)

    def extra_repr(self) -> str:
        """Return the settings, limits among them where there are any."""
        shown = super().extra_repr()
        if self.r_max < math.inf or self.d_max < math.inf:
            shown += f", r_max={self.r_max}, d_max={self.d_max}"
        return f"{shown}, synchronize=True" if self.synchronize else shown


class BatchRenorm1d(_BatchRenorm, nn.BatchNorm1d):
    """Batch Renormalization of N x C or N x C x L inputs; see BatchRenorm2d."""


class BatchRenorm2d(_BatchRenorm, nn.BatchNorm2d):
    """Batch Renormalization of N x C x H x W inputs: nn.BatchNorm2d that trains from its eval function.

    In training mode the batch is normalized by its own mean and variance, then corrected towards the running
    statistics::

        r = clip(sqrt((var_B + eps) / (running_var + eps)), 1 / r_max, r_max)
        d = clip((mean_B - running_mean) / sqrt(running_var + eps), -d_max, d_max)
        y = weight * ((x - mean_B) / sqrt(var_B + eps) * r + d) + bias

    No gradient flows through r and d, so the gradients are those of batch normalization. The running statistics move
    after the forward pass, as those of nn.BatchNorm2d do. Source: Ioffe, "Batch Renormalization", 2017,
    arXiv:1702.03275.

    Without limits (the default) y is the output in eval mode, for batches of any size: it is computed by the same
    kernel, so on a CPU `model.train()(x)` equals `model.eval()(x)` bit for bit. The same holds, with limits, for each
    channel that they do not change. `r_max=1, d_max=0` is nn.BatchNorm2d. Both limits may be set between steps.

    Parameters, buffers and state-dict keys are those of nn.BatchNorm2d, and eval mode is inherited from it.

    - Single values: where the batch has one value per channel (a dense layer and one image), the gradient of batch
      normalization is zero. The gradient is then that of eval mode, and zero in channels where d_max is in force.
      `running_mean` moves; `running_var` stays, since one value has no variance.
    - Gradient checkpointing, reentrant or not: a recomputed forward pass uses the statistics that the first one used,
      and does not move them again. Any other forward pass inside a backward pass does not move them either. Without
      a graph (reentrant checkpointing) up to 64 forward passes of a layer can be pending at a time.
    - Second derivatives take r and d as constants. They are not available with `synchronize` over several processes.
    - torch.compile breaks the graph at this layer in training mode, not in eval mode. torch.export needs eval mode.
    - `nn.SyncBatchNorm.convert_sync_batchnorm` replaces this layer, like every BatchNorm, by an nn.SyncBatchNorm,
      which does not renormalize. Pass `synchronize=True` instead.

    Args:
        num_features: number of channels C.
        eps: added to variances.
        momentum: weight of the batch in the running statistics; None for a cumulative average.
        affine: whether there are a weight and a bias per channel.
        track_running_stats: must be True; it is here because nn.BatchNorm2d has it.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: whether there is a bias, where `affine` is True.
        r_max: limit of r, at least 1.
        d_max: limit of d, at least 0.
        synchronize: take the statistics over the batches of all processes of torch.distributed's default group,
            in the forward and backward pass, as nn.SyncBatchNorm does; on CPUs too. Without a group it does nothing.

    Raises:
        TrainingError: `track_running_stats` is False, `r_max` is below 1, or `d_max` is below 0.

    Example:
        >>> norm = BatchRenorm2d(8)
        >>> x = torch.rand(2, 8, 4, 4)
        >>> expected = norm.eval()(x)
        >>> torch.equal(norm.train()(x), expected)
        True
    """


class BatchRenorm3d(_BatchRenorm, nn.BatchNorm3d):
    """Batch Renormalization of N x C x D x H x W inputs; see BatchRenorm2d."""


BATCH_RENORMS: dict[type[_BatchNorm], type[BatchRenorm1d | BatchRenorm2d | BatchRenorm3d]] = {
    nn.BatchNorm1d: BatchRenorm1d,
    nn.BatchNorm2d: BatchRenorm2d,
    nn.BatchNorm3d: BatchRenorm3d,
}
_BATCHNORMS = {renorm: norm for norm, renorm in BATCH_RENORMS.items()}


def to_renorm(
    norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d,
    *,
    r_max: float = math.inf,
    d_max: float = math.inf,
    synchronize: bool = False,
) -> BatchRenorm1d | BatchRenorm2d | BatchRenorm3d:
    """Return a BatchRenorm that shares the parameters and buffers of a BatchNorm.

    An optimizer or a graph that knows the parameters keeps working. Training flag, eps, momentum, hooks and other
    attributes are taken over; a handle of a hook removes it from the given module only. The given module stays as it
    is.

    Args:
        norm: an nn.BatchNorm1d, 2d or 3d with running statistics.
        r_max: see BatchRenorm2d.
        d_max: see BatchRenorm2d.
        synchronize: see BatchRenorm2d.

    Raises:
        TrainingError: `norm` is of another class, such as a subclass with a forward pass of its own; it has no running
            statistics; or a limit is out of range.

    Example:
        >>> norm = nn.BatchNorm2d(8)
        >>> renorm = to_renorm(norm)
        >>> renorm.weight is norm.weight, renorm.running_mean is norm.running_mean
        (True, True)
    """
    if type(norm) not in BATCH_RENORMS:
        raise TrainingError(
            f"Batch Renormalization can replace nn.BatchNorm1d, 2d and 3d, not {type(norm).__name__}; its forward pass "
            "may do something else"
        )
    if norm.running_mean is None:
        raise TrainingError(
            "Batch Renormalization normalizes by running statistics, and this BatchNorm has none "
            "(track_running_stats=False)"
        )
    renorm = _sharing_state(norm, BATCH_RENORMS[type(norm)])
    renorm.r_max = r_max
    renorm.d_max = d_max
    renorm.synchronize = synchronize
    return renorm


def to_batchnorm(
    renorm: BatchRenorm1d | BatchRenorm2d | BatchRenorm3d,
) -> nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d:
    """Return a BatchNorm that shares the parameters and buffers of a BatchRenorm: the way back from `to_renorm`.

    Args:
        renorm: a BatchRenorm1d, 2d or 3d.

    Raises:
        TrainingError: `renorm` is of another class.

    Example:
        >>> renorm = BatchRenorm2d(8)
        >>> norm = to_batchnorm(renorm)
        >>> type(norm).__name__, norm.weight is renorm.weight
        ('BatchNorm2d', True)
    """
    if type(renorm) not in _BATCHNORMS:
        raise TrainingError(f"BatchRenorm1d, 2d and 3d can become BatchNorms, not {type(renorm).__name__}")
    norm = _sharing_state(renorm, _BATCHNORMS[type(renorm)])
    for setting in ("_r_max", "_d_max", "synchronize"):
        norm.__dict__.pop(setting, None)
    return norm


def _sharing_state(module: nn.Module, cls: type[nn.Module]) -> Any:
    # The dicts of parameters, buffers and hooks are copied, so that one module can gain or lose an entry by itself.
    shared = cls.__new__(cls)
    shared.__dict__.update({name: _shallow_copy(value) for name, value in vars(module).items()})
    return shared


def _shallow_copy(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | set) else value


@dataclass(eq=False)
class _Normalization:
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
        """Return the output, by the kernel of eval mode."""
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


class _Renormalize(torch.autograd.Function):
    """The forward pass of a `_Normalization` with the gradients of batch normalization."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, normalization: _Normalization) -> Tensor:
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
        normalization: _Normalization = ctx.normalization
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
    grad: Tensor, x: Tensor, scale: Tensor, normalization: _Normalization, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    invstd = (normalization.var + normalization.eps).rsqrt()
    if x.numel() == 0:  # one rank's batch; the kernel divides by zero
        return torch.zeros_like(x), torch.zeros_like(invstd), torch.zeros_like(invstd)
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, scale, None, None, normalization.mean, invstd, True, normalization.eps, [needs_x, True, True]
    )


def _single_value_backward(
    grad: Tensor, x: Tensor, scale: Tensor, normalization: _Normalization
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
    grad: Tensor, x: Tensor, scale: Tensor, normalization: _Normalization, needs_x: bool
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


def _batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
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


def _pool_over_ranks(count: int, mean: Tensor, var: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return count, mean and biased variance of the batches of all ranks: Chan et al., 1979, in float64."""
    own = torch.cat([mean.new_tensor([count], dtype=torch.float64), mean.double(), var.double()])
    gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, own)
    ranks = torch.stack(gathered)
    counts = ranks[:, :1]
    means, variances = ranks[:, 1:].chunk(2, dim=1)
    total = counts.sum()
    # Of empty batches alone, zeros rather than NaN.
    weights = counts / total.clamp_min(1)
    pooled = (weights * means).sum(0)
    pooled_var = (weights * (variances + (means - pooled).square())).sum(0)
    return int(total), pooled.to(mean.dtype), pooled_var.to(var.dtype)


class _Passes:
    """Forward passes of one layer that may be recomputed.

    Gradient checkpointing runs a forward pass again within the backward pass, when the running statistics have moved
    already. What the first pass normalized by is kept: by the graph where there is one, so that it goes with the graph,
    or by a queue of bounded length. Which pass it was is recognized by the statistics of its batch, so that several
    passes may be pending, in any order.
    """

    def __init__(self) -> None:
        self._passes: list[weakref.ref[_Normalization]] = []
        self._graphless: deque[_Normalization] = deque(maxlen=_GRAPHLESS_PASSES)

    def keep(self, normalization: _Normalization, *, in_graph: bool) -> None:
        if not in_graph:
            self._graphless.append(normalization)
        self._passes = [kept for kept in self._passes if kept() is not None]
        self._passes.append(weakref.ref(normalization))

    def find(self, mean: Tensor, var: Tensor, eps: float) -> _Normalization | None:
        """Return the pass over a batch with these statistics, or None."""
        kept = [normalization for ref in self._passes if (normalization := ref()) is not None]
        if not kept:
            return None
        means = torch.stack([normalization.local_mean for normalization in kept])
        variances = torch.stack([normalization.local_var for normalization in kept])
        spread = var + eps
        differences = torch.maximum((means - mean).abs() / spread.sqrt(), (variances - var).abs() / spread)
        distances = differences.amax(1).tolist()
        same = [index for index, distance in enumerate(distances) if distance < _SAME_BATCH]
        if not same:
            return None
        # Of equal batches, the latest that was not recomputed: backward passes go from the last to the first.
        best = min(same, key=lambda index: (round(distances[index], 4), kept[index].recomputed, -index))
        return kept[best]


# Beside the modules and not in them: nothing of it is copied, pickled or left behind by a conversion.
_kept: weakref.WeakKeyDictionary[nn.Module, _Passes] = weakref.WeakKeyDictionary()


def _kept_passes(module: nn.Module) -> _Passes:
    return _kept.setdefault(module, _Passes())
