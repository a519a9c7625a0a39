"""Limits of Batch Renormalization during training: how far it may correct a batch towards the running statistics.

The layers in `batch_renorm.py` store and apply them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType

from torch import nn

from ..errors import TrainingError
from ..graph.copies import check_module
from ..support.arguments import is_number
from ..support.processes import Ranks
from .batch_renorm import BatchRenorm, check_limits
from .lag_meter import Lag, LagMeter


def set_renorm_limits(network: nn.Module, r_max: float = math.inf, d_max: float = math.inf) -> None:
    """Set the limits of every Batch Renormalization of a network, in place.

    Args:
        network: The network; BatchNorms that do not renormalize stay as they are.
        r_max: Limit of r, at least 1, from the next forward pass on; see BatchRenorm2d.
        d_max: Limit of d, at least 0.

    Raises:
        TrainingError: If a limit is out of range; nothing is changed then.
        GraphError: If the network is not a module.
    """
    check_module(network)
    check_limits(r_max, d_max)
    for module in network.modules():
        if isinstance(module, BatchRenorm):
            module.r_max, module.d_max = r_max, d_max


def limits_at(lag: float, threshold: float) -> tuple[float, float]:
    """Return r_max and d_max at a lag: no limits below the threshold; above it, a larger lag has tighter limits."""
    return (math.inf, math.inf) if lag < threshold else (1 + 2 / lag**2, 2 / lag**2)


class RenormScheduler:
    """Limits Batch Renormalization while the running statistics lag behind the weights, as at high learning rates.

    Ioffe's schedule starts as BatchNorm and relaxes, because the running statistics are unknown at first. With inserted
    BatchNorm, they are known at first, and become inaccurate when the weights change faster than the running averages
    can follow. So there are no limits at first. The lag is the distance between batch means and running means, relative
    to what it would be by chance, averaged over channels, layers and about ten steps. From `threshold` on, r is
    limited to 1 + 2 / lag² and d to 2 / lag². This rule was chosen among others by measurement
    (`benchmarks/renorm/limit_rules.py`).

    Call `step` after each step of the optimizer, as with a learning rate scheduler. The layers are observed by hooks
    until `close` is called, or to the end of a `with` block. Inside a process group of `torch.distributed` the lag is
    averaged over all processes, which must call `step` together.

    Args:
        network: A network whose BatchNorms renormalize; see `set_batchnorm_mode`.
        threshold: Lag from which limits apply; must be positive.

    Raises:
        TrainingError: If no layer of the network renormalizes, or the threshold is out of range.
        GraphError: If the network is not a module.

    Examples:
        >>> from bn_insert import set_batchnorm_mode
        >>> model = nn.Sequential(nn.BatchNorm2d(3))  # whose running mean is 0
        >>> set_batchnorm_mode(model, "renorm")
        >>> scheduler = RenormScheduler(model)
        >>> output = model.train()(torch.randn(8, 3, 4, 4) + 5)
        >>> scheduler.step()
        >>> scheduler.lag > 2, model[0].d_max < 1
        (True, True)
    """

    def __init__(self, network: nn.Module, *, threshold: float = 2.0) -> None:
        """Start to observe the layers of a network, without limits."""
        check_module(network)
        if not (is_number(threshold) and threshold > 0):
            raise TrainingError(f"threshold is {threshold!r:.40}; use a lag above 0, such as 2")
        self._network = network
        self._threshold = threshold
        self._meter = LagMeter(network)
        if not self._meter.layers:
            raise TrainingError(
                f"{type(network).__name__} has no layer that renormalizes; call set_batchnorm_mode(model, 'renorm') "
                "first"
            )
        self._lag = Lag()
        set_renorm_limits(network)

    @property
    def lag(self) -> float:
        """Root mean square distance between batch means and running means, relative to what it would be by chance."""
        return self._lag.ratio

    def step(self) -> None:
        """Set the limits for the next step from what was observed since the last call."""
        distances, expected, observations = Ranks.current().total(self._meter.read()).tolist()
        if expected > 0:
            self._lag = self._lag.after(distances / observations, expected / observations)
            set_renorm_limits(self._network, *limits_at(self.lag, self._threshold))

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed training run needs to continue exactly."""
        return self._lag._asdict()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from a state that `state_dict` returned."""
        self._lag = Lag(**state)
        set_renorm_limits(self._network, *limits_at(self.lag, self._threshold))

    def close(self) -> None:
        """Stop observing the layers; their limits stay as they are."""
        self._meter.close()

    def __enter__(self) -> RenormScheduler:
        """Return the scheduler."""
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: object, _traceback: TracebackType | None) -> None:
        """Stop observing the layers."""
        self.close()
