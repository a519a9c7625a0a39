"""The training loop: steps, epochs, and where they stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from jaxtyping import Float64
from torch import Tensor

from ..batchnorm.renorm_limits import RenormScheduler
from ..errors import DivergenceError, ImageError
from ..images.class_folders import ClassFolders, LabelledBatch
from ..support.processes import Ranks
from .classifier import Classifier, batch_totals, cross_entropy
from .metrics import EpochMetrics, StepMetrics, Totals
from .progress import Progress
from .reestimation import reestimate_statistics
from .remaining_time import RemainingTime
from .schedule import learning_rate
from .settings import TrainingSettings
from .stopping import StopCheck, StoppedError
from .training_set import TrainingSet
from .validation import validate


@dataclass(frozen=True)
class TrainingLoop:
    """Trains a classifier, step by step and epoch by epoch.

    Args:
        classifier: The network.
        optimizer: Its optimizer.
        renorm_scheduler: Sets the limits of Batch Renormalization after each step.
        training_set: The batches of this process.
        images: Class folders with the validation images.
        settings: Settings of the run.
        ranks: The processes of the run.
        stop: Polled after each step, and during re-estimation and validation.
        save: Called after each epoch, and when the run is stopped.
        on_step: Called after each step.
        on_epoch: Called after each epoch, when it has been saved.
    """

    classifier: Classifier
    optimizer: torch.optim.Optimizer
    renorm_scheduler: RenormScheduler | None
    training_set: TrainingSet
    images: ClassFolders
    settings: TrainingSettings
    ranks: Ranks
    stop: StopCheck
    save: Callable[[Progress], None]
    on_step: Callable[[StepMetrics], None] | None = None
    on_epoch: Callable[[EpochMetrics], None] | None = None

    @cached_property
    def _clock(self) -> RemainingTime:
        settings, trained = self.settings, len(self.images.train)
        reestimated = min(settings.recalibration_images, trained) if settings.recalibrate else 0
        evaluated = (reestimated + len(self.images.val)) / trained
        return RemainingTime(self.training_set.steps, settings.epochs, evaluated)

    def run(self, progress: Progress) -> Progress:
        """Train until the run is complete or stopped, and return the progress."""
        while not progress.complete(self.settings):
            started = time.monotonic()
            progress, stopped = self._train_epoch(progress)
            if not stopped:
                try:
                    metrics = self._evaluate_epoch(progress, started)
                except StoppedError:
                    stopped = True
            if stopped:
                self.save(progress)
                return progress
            self._clock.after_evaluation()
            progress = progress.after_epoch(metrics)
            self.save(progress)
            if self.on_epoch:
                self.on_epoch(metrics)
        return progress

    def _train_epoch(self, progress: Progress) -> tuple[Progress, bool]:
        """Take the remaining steps of an epoch; return the progress, and whether the run was stopped."""
        self.classifier.parallel.train()
        self._clock.begin()
        batches = self.training_set.batches(progress.epoch, progress.step)
        try:
            while progress.step < self.training_set.steps:
                progress, stopped = self._train_step(islice(batches, self.settings.accumulate), progress)
                if stopped:
                    return progress, True
        except ImageError:
            if self.stop.alone():  # a signal to the entire process group has ended the processes that decode
                return progress, True
            raise
        return progress, False

    def _train_step(self, batches: Iterator[LabelledBatch], progress: Progress) -> tuple[Progress, bool]:
        step = progress.epoch * self.training_set.steps + progress.step
        rate = learning_rate(self.settings, step, self.training_set.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        figures = self._accumulate(batches, self.training_set.images_in(progress.step))
        # One exchange per step: all ranks stop, and see that the loss is not finite, after the same step.
        asked = figures.new_tensor([self.stop.requested()])
        *sums, stopping = self.ranks.total(torch.cat([figures, asked])).tolist()
        totals = Totals(*sums)
        mean = totals.loss / totals.images
        if not math.isfinite(mean):
            raise DivergenceError(
                f"the loss is {mean} in step {progress.step + 1} of epoch {progress.epoch + 1} (learning rate "
                f"{rate:.3g})"
            )
        self.optimizer.step()
        if self.renorm_scheduler:
            self.renorm_scheduler.step()
        progress = progress.after_step(totals)
        epoch = progress.epoch + 1
        seconds_left = self._clock.after_step(epoch, progress.step)
        if self.on_step:
            self.on_step(StepMetrics(epoch, progress.step, self.training_set.steps, mean, seconds_left))
        return progress, stopping > 0 or self.stop.alone()

    def _accumulate(self, batches: Iterator[LabelledBatch], images: int) -> Float64[Tensor, " totals"]:
        """Accumulate the gradients of the batches of a step, which have `images` images, and return their totals."""
        figures, seen = None, 0
        for batch in batches:
            inputs, labels = self.classifier.inputs(batch)
            seen += len(labels)
            with self.classifier.without_exchange() if seen < images else nullcontext():
                logits = self.classifier.training_logits(inputs)
                loss = cross_entropy(logits, labels, self.settings.label_smoothing)
                (loss if len(labels) == images else loss * (len(labels) / images)).backward()
            totals = batch_totals(loss, logits, labels)
            figures = totals if figures is None else figures + totals
        if figures is None:
            raise RuntimeError("a step without a batch")
        return figures

    def _evaluate_epoch(self, progress: Progress, started: float) -> EpochMetrics:
        """Re-estimate the running statistics, validate, and return the metrics of an epoch whose steps are done."""
        epoch, steps, settings = progress.epoch, self.training_set.steps, self.settings
        last_step = epoch * steps + progress.step - 1
        self.ranks.share_buffers(self.classifier.network)
        if settings.recalibrate:
            batches = self.training_set.sample(epoch, settings.recalibration_images)
            reestimate_statistics(self.classifier, batches, self.stop)
        validation = validate(self.classifier, self.images, settings.batch_size, self.ranks, self.stop)
        rate = learning_rate(settings, last_step, steps)
        if not math.isfinite(validation.loss):
            raise DivergenceError(
                f"the validation loss is {validation.loss} after epoch {epoch + 1} (learning rate {rate:.3g})"
            )
        return EpochMetrics(
            epoch=epoch + 1,
            step=last_step + 1,
            lr=rate,
            train_loss=progress.seen.loss / progress.seen.images,
            train_accuracy=progress.seen.correct / progress.seen.images,
            val_loss=validation.loss,
            val_accuracy=validation.accuracy,
            seconds=round(time.monotonic() - started, 3),
        )
