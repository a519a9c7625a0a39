"""The remaining time of a run, estimated from the steps and epochs so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..images.class_folders import ClassFolders
from .settings import TrainingSettings

STEPS_BEFORE_ESTIMATE = 3  # the first ones allocate memory and fill caches
_EVALUATION = 1 / 3  # cost of an image without a backward pass, which takes twice as long as the forward pass


def evaluated_images(settings: TrainingSettings, images: ClassFolders) -> float:
    """Return how many images re-estimation and validation run on after an epoch, per image trained on."""
    trained = len(images.train)
    reestimated = min(settings.recalibration_images, trained) if settings.recalibrate else 0
    return (reestimated + len(images.val)) / trained


def seconds_with_trials(
    per_step: float, trial_steps: int, settings: TrainingSettings, images: ClassFolders, steps: int
) -> float:
    """Return the estimated seconds of trials and of the run that follows.

    Args:
        per_step: Seconds of a step.
        trial_steps: Steps of the trials that are left.
        settings: Settings of the run.
        images: Its images.
        steps: Steps per epoch.
    """
    evaluations = steps * evaluated_images(settings, images) * _EVALUATION
    return per_step * (trial_steps + settings.epochs * (steps + evaluations))


@dataclass
class RemainingTime:
    """The clock of a run, from its start or from where it was resumed.

    Args:
        steps: Steps per epoch.
        epochs: Epochs of the run.
        evaluated: Images that re-estimation and validation run on after an epoch, per image trained on.
    """

    steps: int
    epochs: int
    evaluated: float
    _timed: int = field(default=0, init=False)
    _seconds: float = field(default=0.0, init=False)
    _begun: float = field(default=0.0, init=False)
    _evaluation: float | None = field(default=None, init=False)

    def begin(self) -> None:
        """Begin to time steps."""
        self._begun = time.monotonic()

    def after_step(self, epoch: int, step: int) -> float | None:
        """Return the seconds until the run ends; None while too few steps have been timed.

        Args:
            epoch: The epoch, from 1.
            step: Complete steps of that epoch.
        """
        now = time.monotonic()
        self._seconds, self._timed, self._begun = self._seconds + now - self._begun, self._timed + 1, now
        if self._timed < STEPS_BEFORE_ESTIMATE:
            return None
        per_step = self._seconds / self._timed
        evaluation = self._evaluation
        if evaluation is None:
            evaluation = per_step * self.steps * self.evaluated * _EVALUATION
        epochs_left = self.epochs - epoch
        return per_step * (self.steps - step + self.steps * epochs_left) + evaluation * (epochs_left + 1)

    def after_evaluation(self) -> None:
        """Note that an epoch has been re-estimated, validated and saved."""
        self._evaluation = time.monotonic() - self._begun
