"""How passes over batches run: the arguments that all functions which measure statistics have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch

from ..errors import CalibrationError, as_passed
from ..support.arguments import is_number

ProgressCallback = Callable[[int], None]
"""Called after each batch with the number of images so far."""


@dataclass(frozen=True)
class PassOptions:
    """How passes over batches run.

    Attributes:
        device: Where to run; None for the model's device.
        autocast: Dtype for the forward passes; None for the model's own. Statistics stay float32 or better.
        tolerance: Stop early, once the statistics are this accurate; see `calibrate`. None for all batches.
        progress: Called after each batch with the number of images so far.
        join_batches: Run several small batches as one where that changes nothing but the time; with a tolerance,
            batches run one by one. Statistics then depend, by rounding errors, on how batches are shared among
            processes.
        spread_by_image: Estimate the sampling error from the spread between images instead of between batches, which
            overestimates it if images of one class follow each other. It takes a little longer. Layers that are called
            several times for an image are an exception.
    """

    device: torch.device | str | None = None
    autocast: torch.dtype | None = None
    tolerance: float | None = None
    progress: ProgressCallback | None = None
    join_batches: bool = False
    spread_by_image: bool = False

    def check_tolerance(self) -> None:
        """Raise CalibrationError for a tolerance that no error can be compared with."""
        tolerance = self.tolerance
        if tolerance is not None and not (is_number(tolerance) and 0 < tolerance < inf):
            raise CalibrationError(
                f"{as_passed('tolerance')} must be a finite number above 0, such as 0.1, not {tolerance!r:.40}"
            )
