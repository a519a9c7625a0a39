"""Stopping a run at a safe point, when the caller asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..support.processes import Ranks


class StoppedError(Exception):
    """Ends a fit, a trial, re-estimation or validation early; it is repeated when the run is resumed."""


@dataclass(frozen=True)
class StopCheck:
    """The caller's `stop` function, polled by the run.

    Args:
        asked: Returns True once the run should stop; None never stops it.
        ranks: The processes of the run.
    """

    asked: Callable[[], bool] | None
    ranks: Ranks

    def requested(self) -> bool:
        """Return whether this process was asked to stop."""
        return bool(self.asked and self.asked())

    def alone(self) -> bool:
        """Return whether a stop was requested in a single-process run."""
        return self.ranks.count == 1 and self.requested()

    def check(self) -> None:
        """Raise StoppedError if a process without others was asked to stop.

        In the fit, re-estimation and validation the shares of several processes differ in size, so that they could not
        agree on a batch to stop after; they finish it.
        """
        if self.alone():
            raise StoppedError
