"""Batch Renormalization: a BatchNorm whose training forward pass is its eval forward pass, within limits."""

from __future__ import annotations

import math
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor, distributed, nn
from torch._compile import _disable_dynamo
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import TrainingError
from ..support.arguments import check_flags, is_number
from ..support.text import with_article
from .batch_renorm_function import Normalization, batch_moments, pool_over_ranks, renormalize
from .gradient_checkpointing import kept_passes


def check_limits(r_max: float = 1.0, d_max: float = 0.0) -> None:
    """Raise TrainingError unless r_max is at least 1 and d_max at least 0."""
    if not (is_number(r_max) and r_max >= 1):
        raise TrainingError(f"r_max must be at least 1 (1: nn.BatchNorm, inf: no limit), got {r_max!r:.40}")
    if not (is_number(d_max) and d_max >= 0):
        raise TrainingError(f"d_max must be at least 0 (0: nn.BatchNorm, inf: no limit), got {d_max!r:.40}")


class _BatchRenorm(_BatchNorm):
    """What BatchRenorm1d, 2d and 3d share."""

    # Defaults of the class, so that an nn.BatchNorm whose __class__ is set to a BatchRenorm is complete.
    _r_max: float = math.inf
    _d_max: float = math.inf
    synchronize: bool = False
    # Declared by each class: the class whose forward pass it has in eval mode.
    eval_class: ClassVar[type[_BatchNorm]]
    # None only without running statistics, which the constructor and `set_batchnorm_mode` refuse.
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
        check_flags(TrainingError, synchronize=synchronize)
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
        check_limits(r_max=value)
        self._r_max = float(value)

    @property
    def d_max(self) -> float:
        """Largest distance between the means of the batch and of the running statistics, in standard deviations."""
        return self._d_max

    @d_max.setter
    def d_max(self, value: float) -> None:
        check_limits(d_max=value)
        self._d_max = float(value)

    def forward(self, input: Shaped[Tensor, "batch channels *space"]) -> Shaped[Tensor, "batch channels *space"]:  # noqa: A002 - as nn.BatchNorm names it
        """Normalize a batch; in training mode, move the running statistics afterwards."""
        # Running statistics can still be removed by hand; without them there is nothing to renormalize to.
        if not self.training or self.running_mean is None:
            return super().forward(input)
        self._check_input_dim(input)
        return self._train_forward(input)

    # Keeping passes for a recomputation is a side effect that a compiled graph cannot have. Not torch.compiler.disable:
    # it would import the compiler at once, which is half of the time of `import bn_insert`.
    @_disable_dynamo
    def _train_forward(self, x: Tensor) -> Tensor:
        passes = kept_passes(self)
        in_backward = torch._C._current_graph_task_id() != -1
        with torch.no_grad():
            mean, var = batch_moments(x)
            normalization = passes.find(mean, var, self.eps) if in_backward else None
            if normalization is None:
                normalization = self._normalization(x, mean, var)
        # Without gradients, this is a reentrant checkpoint within another, and will be recomputed once more.
        normalization.recomputed |= in_backward and torch.is_grad_enabled()
        if normalization.count == 0:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        output = renormalize(x, self.weight, self.bias, normalization)
        if not in_backward:
            passes.keep(normalization, in_graph=output.requires_grad)
            self._move_statistics(normalization)
        return output

    def _normalization(self, x: Tensor, local_mean: Tensor, local_var: Tensor) -> Normalization:
        count = x.numel() // x.shape[1]
        mean, var = local_mean, local_var
        synchronized = self.synchronize and distributed.is_available() and distributed.is_initialized()
        if synchronized:
            count, mean, var = pool_over_ranks(count, mean, var)
        running_mean = self.running_mean.to(mean.dtype)
        running_std = (self.running_var.to(var.dtype) + self.eps).sqrt()
        # The ratio says nothing about a single value, whose normalized value is 0.
        ratio = (var + self.eps).sqrt() / running_std if count > 1 else torch.ones_like(var)
        distance = (mean - running_mean) / running_std
        r, d, clipped = ratio, distance, None
        if self.r_max < math.inf or self.d_max < math.inf:
            r, d = ratio.clamp(1 / self.r_max, self.r_max), distance.clamp(-self.d_max, self.d_max)
            clipped = (r != ratio) | (d != distance)
        return Normalization(
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
    def _move_statistics(self, normalization: Normalization) -> None:
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
        """Return the settings, including the limits if there are any."""
        shown = super().extra_repr()
        if self.r_max < math.inf or self.d_max < math.inf:
            shown += f", r_max={self.r_max}, d_max={self.d_max}"
        return f"{shown}, synchronize=True" if self.synchronize else shown


class BatchRenorm1d(_BatchRenorm, nn.BatchNorm1d):
    """Batch Renormalization of N x C or N x C x L inputs; see BatchRenorm2d."""

    eval_class = nn.BatchNorm1d


class BatchRenorm2d(_BatchRenorm, nn.BatchNorm2d):
    """Batch Renormalization of N x C x H x W inputs: nn.BatchNorm2d that trains from its eval function.

    In training mode the batch is normalized by its own mean and variance, then corrected towards the running
    statistics:

        r = clip(sqrt((var_B + eps) / (running_var + eps)), 1 / r_max, r_max)
        d = clip((mean_B - running_mean) / sqrt(running_var + eps), -d_max, d_max)
        y = weight * ((x - mean_B) / sqrt(var_B + eps) * r + d) + bias

    No gradient flows through r and d, so the gradients are those of batch normalization. The running statistics are
    updated after the forward pass, like those of nn.BatchNorm2d. Source: Ioffe, "Batch Renormalization", 2017,
    arXiv:1702.03275.

    Without limits (the default) y is the output in eval mode, for batches of any size: it is computed by the same
    kernel, so on a CPU `model.train()(x)` equals `model.eval()(x)` bit for bit. With limits, the same holds for each
    channel that they leave unchanged. `r_max=1, d_max=0` is nn.BatchNorm2d. Both limits may be changed between steps.

    Parameters, buffers and state-dict keys are those of nn.BatchNorm2d, and eval mode is inherited from it.

    - Single values: where the batch has one value per channel (a dense layer and one image), the gradient of batch
      normalization is zero. The gradient of eval mode is used instead, except in channels where d_max is in force,
      where it is zero. `running_mean` is updated; `running_var` is not, since one value has no variance.
    - Gradient checkpointing, reentrant or not: a recomputed forward pass uses the statistics that the first one used,
      and does not update them again. No other forward pass inside a backward pass updates them either. Without a graph
      (reentrant checkpointing) up to 64 forward passes of a layer can be pending at a time.
    - Second derivatives treat r and d as constants. They are not available with `synchronize` over several processes.
    - torch.compile breaks the graph at this layer in training mode, but not in eval mode. torch.export requires eval
      mode.
    - `nn.SyncBatchNorm.convert_sync_batchnorm` replaces this layer, like every BatchNorm, with an nn.SyncBatchNorm,
      which does not renormalize. Pass `synchronize=True` instead.

    Args:
        num_features: Number of channels C.
        eps: Added to variances.
        momentum: Weight of the batch in the running statistics; None for a cumulative average.
        affine: Whether the layer has a weight and a bias per channel.
        track_running_stats: Must be True; present because nn.BatchNorm2d has it.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers.
        bias: Whether the layer has a bias if `affine` is True.
        r_max: Limit of r, at least 1.
        d_max: Limit of d, at least 0.
        synchronize: Take the statistics over the batches of all processes of torch.distributed's default group, in the
            forward and backward pass, as nn.SyncBatchNorm does, but on CPUs too. Has no effect without a group.

    Raises:
        TrainingError: If `track_running_stats` is False, `r_max` is below 1, or `d_max` is below 0.

    Examples:
        >>> norm = BatchRenorm2d(8)
        >>> x = torch.rand(2, 8, 4, 4)
        >>> expected = norm.eval()(x)
        >>> torch.equal(norm.train()(x), expected)
        True
    """

    eval_class = nn.BatchNorm2d


class BatchRenorm3d(_BatchRenorm, nn.BatchNorm3d):
    """Batch Renormalization of N x C x D x H x W inputs; see BatchRenorm2d."""

    eval_class = nn.BatchNorm3d


BatchRenorm: TypeAlias = BatchRenorm1d | BatchRenorm2d | BatchRenorm3d
BATCH_RENORMS: dict[type[_BatchNorm], type[BatchRenorm]] = {
    nn.BatchNorm1d: BatchRenorm1d,
    nn.BatchNorm2d: BatchRenorm2d,
    nn.BatchNorm3d: BatchRenorm3d,
}
PLAIN_BATCHNORMS: dict[type[_BatchNorm], type[_BatchNorm]] = {renorm: norm for norm, renorm in BATCH_RENORMS.items()}
# What a BatchRenorm holds beyond an nn.BatchNorm.
SETTINGS = ("_r_max", "_d_max", "synchronize")


def check_can_renormalize(norm: _BatchNorm, name: str = "") -> None:
    """Raise TrainingError, with the module's name, unless a BatchNorm is a BatchRenorm or can be made one."""
    found = f"BatchNorm {name}".strip()
    if isinstance(norm, nn.SyncBatchNorm):
        raise TrainingError(
            f"{found} is an nn.SyncBatchNorm, which cannot renormalize; keep nn.BatchNorm and pass synchronize=True, "
            "which also takes the statistics over all processes"
        )
    if type(norm) not in BATCH_RENORMS and type(norm) not in PLAIN_BATCHNORMS:
        raise TrainingError(
            f"{found} is {with_article(norm)}, whose forward pass may do something else; Batch Renormalization can "
            "replace nn.BatchNorm1d, 2d and 3d themselves"
        )
    if norm.running_mean is None:
        raise TrainingError(
            f"{found} keeps no running statistics (track_running_stats=False), and Batch Renormalization normalizes "
            "by them"
        )


def can_renormalize(norm: _BatchNorm) -> bool:
    """Return whether a BatchNorm is a BatchRenorm or can be made one."""
    try:
        check_can_renormalize(norm)
    except TrainingError:
        return False
    return True
