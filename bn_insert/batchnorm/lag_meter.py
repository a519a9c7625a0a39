"""How far the running statistics of Batch Renormalization lag behind the weights during training.

The limits that follow from it are set in `renorm_limits.py`.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from ..statistics.moments import WITH_FLOAT64
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
    """Measures, with hooks, how far batches are from the running statistics of the layers that renormalize them.

    Batches of one image are left out: they do not show how large the distance is by chance. Copies of the network are
    not observed.

    Args:
        network: Its BatchRenorm layers are observed in training mode.
    """

    def __init__(self, network: nn.Module) -> None:
        """Start to observe the layers of a network."""
        self._norms = [module for module in network.modules() if isinstance(module, BatchRenorm)]
        self._handles = [norm.register_forward_pre_hook(self._observe, with_kwargs=True) for norm in self._norms]
        self._open = True
        self._observed: list[Tensor] = []

    @property
    def layers(self) -> int:
        """Number of layers that are observed."""
        return len(self._norms)

    def close(self) -> None:
        """Remove the hooks."""
        self._open = False
        for handle in self._handles:
            handle.remove()

    def read(self) -> Float64[Tensor, 3]:
        """Return the sums of distance and expected distance since the last call, and the number of observations."""
        observed, self._observed = self._observed, []
        device = self._norms[0].running_mean.device if self._norms else torch.device("cpu")
        if device.type not in WITH_FLOAT64:
            device = torch.device("cpu")
        if not observed:
            return torch.zeros(3, dtype=torch.float64, device=device)
        sums = torch.stack([values.to(device, torch.float64) for values in observed]).sum(0)
        return torch.cat([sums, sums.new_tensor([len(observed)])])

    @torch.no_grad()
    def _observe(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recomputed = torch._C._current_graph_task_id() != -1  # within a backward pass
        # set_batchnorm_mode may have changed the class since.
        if recomputed or not (self._open and norm.training and isinstance(norm, BatchRenorm)):
            return
        x = next(chain(args, kwargs.values()))
        if len(x) < 2:
            return
        # Sums in the precision of the statistics: in float64 they would take several times as long.
        dtype = norm.running_mean.dtype
        means = x.mean(tuple(range(2, x.ndim)), dtype=dtype) if x.ndim > 2 else x.to(dtype)
        var, mean = torch.var_mean(means, 0)
        running_var = norm.running_var + norm.eps
        distance = (mean - norm.running_mean).square() / running_var
        self._observed.append(torch.stack([distance.mean(), (var / len(x) / running_var).mean()]))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, whose hooks observe nothing: it would never be read."""
        return {"_norms": [], "_handles": [], "_open": False, "_observed": []}
