"""The training loop: steps, epochs, and where they stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from ..errors import DivergenceError, ImageError
from ..images.class_folders import ClassFolders, LabelledBatch
from .metrics import EpochMetrics, StepMetrics
from .progress import Progress
from .reestimation import reestimate_statistics
from .remaining_time import RemainingTime, evaluated_images
from .schedule import learning_rate
from .settings import TrainingSettings
from .step import TrainingStep
from .stopping import StoppedError
from .training_set import TrainingSet
from .validation import validate


@dataclass(frozen=True)
class TrainingLoop:
    """Trains a classifier, step by step and epoch by epoch.

    Args:
        step: Takes the steps of the run.
        training_set: The batches of this process.
        images: Class folders with the validation images.
        save: Called after each epoch, and when the run is stopped, with the settings.
        on_step: Called after each step.
        on_epoch: Called after each epoch, when it has been saved.
    """

    step: TrainingStep
    training_set: TrainingSet
    images: ClassFolders
    save: Callable[[Progress, TrainingSettings], None]
    on_step: Callable[[StepMetrics], None] | None = None
    on_epoch: Callable[[EpochMetrics], None] | None = None

    @cached_property
    def _clock(self) -> RemainingTime:
        settings = self.step.settings
        return RemainingTime(self.training_set.steps, settings.epochs, evaluated_images(settings, self.images))

    def run(self, progress: Progress) -> Progress:
        """Train until the run is complete or stopped, and return the progress."""
        while not progress.complete(self.step.settings):
            started = time.monotonic()
            progress, stopped = self._train_epoch(progress)
            if not stopped:
                try:
                    metrics = self._evaluate_epoch(progress, started)
                except StoppedError:
                    stopped = True
            if stopped:
                self.save(progress, self.step.settings)
                return progress
            progress = progress.after_epoch(metrics)
            self.save(progress, self.step.settings)
            self._clock.after_evaluation()
            if self.on_epoch:
                self.on_epoch(metrics)
        return progress

    def _train_epoch(self, progress: Progress) -> tuple[Progress, bool]:
        """Take the remaining steps of an epoch; return the progress, and whether the run was stopped."""
        self.step.classifier.parallel.train()
        self._clock.begin()
        batches = self.training_set.batches(progress.epoch, progress.step)
        try:
            while progress.step < self.training_set.steps:
                progress, stopped = self._train_step(islice(batches, self.step.settings.accumulate), progress)
                if stopped:
                    return progress, True
        except ImageError:
            if self.step.stop.alone():  # a signal to the entire process group has ended the processes that decode
                return progress, True
            raise
        return progress, False

    def _train_step(self, batches: Iterable[LabelledBatch], progress: Progress) -> tuple[Progress, bool]:
        number = progress.epoch * self.training_set.steps + progress.step
        rate = learning_rate(self.step.settings, number, self.training_set.steps)
        totals, stopping = self.step.take(batches, self.training_set.images_in(progress.step), rate)
        if not math.isfinite(totals.mean_loss):
            raise DivergenceError(
                f"the loss is {totals.mean_loss} in step {progress.step + 1} of epoch {progress.epoch + 1} (learning "
                f"rate {rate:.3g})"
            )
        progress = progress.after_step(totals)
        epoch = progress.epoch + 1
        seconds_left = self._clock.after_step(epoch, progress.step)
        if self.on_step:
            metrics = StepMetrics(epoch, progress.step, self.training_set.steps, totals.mean_loss, seconds_left)
            self.on_step(metrics)
        return progress, stopping

    def _evaluate_epoch(self, progress: Progress, started: float) -> EpochMetrics:
        """Re-estimate the running statistics, validate, and return the metrics of an epoch whose steps are done."""
        epoch, steps, settings = progress.epoch, self.training_set.steps, self.step.settings
        classifier, ranks, stop = self.step.classifier, self.step.ranks, self.step.stop
        last_step = epoch * steps + progress.step - 1
        ranks.share_buffers(classifier.network)
        if settings.recalibrate:
            batches = self.training_set.sample(epoch, settings.recalibration_images)
            reestimate_statistics(classifier, batches, stop)
        validation = validate(classifier, self.images, settings.batch_size, ranks, stop)
        rate = learning_rate(settings, last_step, steps)
        if not math.isfinite(validation.loss):
            raise DivergenceError(
                f"the validation loss is {validation.loss} after epoch {epoch + 1} (learning rate {rate:.3g})"
            )
        return EpochMetrics(
            epoch=epoch + 1,
            step=last_step + 1,
            lr=rate,
            train_loss=progress.seen.mean_loss,
            train_accuracy=progress.seen.correct / progress.seen.images,
            val_loss=validation.loss,
            val_accuracy=validation.accuracy,
            seconds=round(time.monotonic() - started, 3),
        )
