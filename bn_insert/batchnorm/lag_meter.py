"""How far the running statistics of Batch Renormalization lag behind the weights during training.

The limits that follow from it are set in `renorm_limits.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from .batch_renorm import BatchRenorm

_STEP = 0.1  # weight of a step in the averages: that of a batch in PyTorch's running statistics


class Lag(NamedTuple):
    """How far the means of recent batches were from the running means, and how far they would be by chance.

    Both are averages over channels and layers, in running variances. With accurate running statistics they agree. When
    the weights move faster than the running averages follow, the distance grows.

    Attributes:
        distance: Mean square of d, running average over the steps; 0 before the first.
        expected: The same by chance: the variance of a mean over the images of a batch.
    """

    distance: float = 0.0
    expected: float = 0.0

    def after(self, distance: float, expected: float) -> Lag:
        """Return the lag after one more step."""
        if self == Lag():
            return Lag(distance, expected)
        return Lag(*(old + (new - old) * _STEP for old, new in zip(self, (distance, expected), strict=True)))

    @property
    def ratio(self) -> float:
        """Root mean square of d relative to that by chance; 1 while nothing is known."""
        return math.sqrt(self.distance / self.expected) if self.expected > 0 else 1.0


class LagMeter:
    """Measures, by hooks, the distance of the batches that the layers of a network renormalize.

    Batches of one image are left out: they do not show what chance amounts to.

    Args:
        network: Its BatchRenorm layers are observed in training mode.
    """

    def __init__(self, network: nn.Module) -> None:
        """Start to observe the layers of a network."""
        norms = [module for module in network.modules() if isinstance(module, BatchRenorm)]
        self._handles = [norm.register_forward_pre_hook(self._observe) for norm in norms]
        self._device = norms[0].running_mean.device if norms else torch.device("cpu")
        self._observed: list[Float64[Tensor, 2]] = []

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def read(self) -> Float64[Tensor, 2]:
        """Return the means of distance and expected distance since the last call; zeros without an observation."""
        observed, self._observed = self._observed, []
        if not observed:
            return torch.zeros(2, dtype=torch.float64, device=self._device)
        return torch.stack([values.to(self._device) for values in observed]).mean(0)

    @torch.no_grad()
    def _observe(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        # A pass within a backward pass is a recomputation.
        if not norm.training or len(x) < 2 or torch._C._current_graph_task_id() != -1:
            return
        assert isinstance(norm, BatchRenorm)
        # Sums in the precision of the statistics: in float64 they would take several times as long.
        means = x.mean(tuple(range(2, x.ndim)), dtype=norm.running_mean.dtype) if x.ndim > 2 else x
        var, mean = torch.var_mean(means.double(), 0)
        running_var = norm.running_var.double() + norm.eps
        distance = (mean - norm.running_mean.double()).square() / running_var
        self._observed.append(torch.stack([distance.mean(), (var / len(x) / running_var).mean()]))
