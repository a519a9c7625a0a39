"""Limits of Batch Renormalization during training: how far it may correct a batch towards the running statistics.

The layers in `batch_renorm.py` store and apply them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import nn

from .batch_renorm import BatchRenorm, check_limits
from .renorm_lag import Lag


class Limits(NamedTuple):
    """The limits of one training step; see BatchRenorm2d.

    Attributes:
        r_max: Limit of r, at least 1; inf for no limit.
        d_max: Limit of d, at least 0; inf for no limit.
    """

    r_max: float = math.inf
    d_max: float = math.inf


@runtime_checkable
class RenormLimits(Protocol):
    """A rule for the limits of each step. It has no state, so that a run resumed at a step continues exactly."""

    def at(self, step: int, learning_rate: float, lag: Lag) -> Limits:
        """Return the limits of a step.

        Args:
            step: Steps since the start of training, from 0.
            learning_rate: Learning rate of the step.
            lag: The lag after the step before.
        """
        ...


@dataclass(frozen=True)
class ConstantLimits:
    """The same limits for every step.

    Args:
        r_max: Limit of r, at least 1; inf for no limit.
        d_max: Limit of d, at least 0; inf for no limit.

    Raises:
        TrainingError: If a limit is out of range.

    Examples:
        >>> ConstantLimits(r_max=3.0).at(step=100, learning_rate=0.01, lag=Lag())
        Limits(r_max=3.0, d_max=inf)
    """

    r_max: float = math.inf
    d_max: float = math.inf

    def __post_init__(self) -> None:
        """Check both limits."""
        check_limits(self.r_max, self.d_max)

    def at(self, step: int, learning_rate: float, lag: Lag) -> Limits:  # noqa: ARG002 - the protocol's
        """Return the limits."""
        return Limits(self.r_max, self.d_max)


@dataclass(frozen=True)
class LimitsByLag:
    """No limits while the running statistics keep up with the weights, and tighter ones the more they lag behind.

    Ioffe's schedule starts as BatchNorm and relaxes, since its statistics are unknown at first. Here they are known at
    first, and the correction is worth less the more they are out of date. `benchmarks/renorm/limit_rules.py` compares
    this rule with others.

    Args:
        threshold: Lag from which there are limits.

    Examples:
        >>> LimitsByLag().at(step=100, learning_rate=0.001, lag=Lag(distance=0.3, expected=0.2))
        Limits(r_max=inf, d_max=inf)
        >>> LimitsByLag().at(step=100, learning_rate=0.03, lag=Lag(distance=0.8, expected=0.2))
        Limits(r_max=1.5, d_max=0.5)
    """

    threshold: float = 1.5

    def at(self, step: int, learning_rate: float, lag: Lag) -> Limits:  # noqa: ARG002 - the protocol's
        """Return the limits: 2 / lag² for d, and 1 + 2 / lag² for r."""
        if lag.ratio < self.threshold:
            return Limits()
        return Limits(1 + 2 / lag.ratio**2, 2 / lag.ratio**2)


def set_renorm_limits(network: nn.Module, limits: Limits) -> None:
    """Set the limits of every Batch Renormalization of a network, in place.

    Args:
        network: The network; BatchNorms that do not renormalize stay as they are.
        limits: In force from the next forward pass on.

    Raises:
        TrainingError: If a limit is out of range; nothing is changed then.
    """
    check_limits(*limits)
    for module in network.modules():
        if isinstance(module, BatchRenorm):
            module.r_max, module.d_max = limits
