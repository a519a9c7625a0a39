"""The learning rate of a run, chosen by short trials of a few learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count, islice

import torch

from ..errors import DivergenceError, ImageError
from ..images.batches import sample
from ..images.class_folders import ClassFolders, LabelledBatch
from ..statistics.passes import preserved_random_state
from .classifier import Classifier
from .metrics import Totals
from .preparation import make_optimizer, make_renorm_scheduler
from .reestimation import reestimate_statistics
from .schedule import learning_rate
from .settings import Optimizer
from .step import TrainingStep
from .stopping import StoppedError
from .training_set import TrainingSet
from .validation import validate

TRIAL_STEPS = 20
"""Steps of a trial; a run of fewer steps is too short for trials."""

_SCORED_IMAGES = 256  # for re-estimation, and for validation
_WARM_UP = 0.1  # fraction of the steps
_FIRST: dict[Optimizer, int] = {"sgd": -4, "adamw": -7}
_LOWEST, _HIGHEST = -12, 0


@dataclass(frozen=True)
class LearningRateTrial:
    """How far a trial of a learning rate has come.

    Args:
        lr: Peak learning rate.
        step: Steps that have been taken.
        steps: Steps of the trial.
        loss: Outcome of the trial: the mean of the validation loss after it and of the training loss over its second
            half. Infinite if it diverged; None before its end.
    """

    lr: float
    step: int
    steps: int
    loss: float | None = None


def choose_learning_rate(
    step: TrainingStep,
    training_set: TrainingSet,
    images: ClassFolders,
    on_trial: Callable[[LearningRateTrial], None] | None = None,
) -> float:
    """Return the learning rate whose trial has the lowest loss.

    A trial trains a copy of the network for `TRIAL_STEPS` steps, with a warm-up and a cosine schedule of its own, on
    the first batches of the run. Its loss is the mean of two: the validation loss at its end, when the learning rate
    has fallen, and the training loss over its second half, which shows steps that are too large. Each learning rate is
    about three times the one before (0.001, 0.003, 0.01, ...): from 0.01 (0.0003 for AdamW), the search follows the
    direction in which the loss falls until it rises. A run of fewer steps than a trial gets the first rate untried.

    Args:
        step: The step of the run, for its network, settings and processes; the network is not changed.
        training_set: The batches of this process.
        images: Class folders with the validation images.
        on_trial: Called after each step of a trial, and at its end.

    Raises:
        DivergenceError: If all trials diverge.
        StoppedError: If the run was asked to stop.
    """
    settings = step.settings
    first = _FIRST[settings.opt]
    if settings.epochs * training_set.steps < TRIAL_STEPS:
        return _rate(first)
    scored = replace(images, val=tuple(sample(images.val, _SCORED_IMAGES, settings.seed)))
    losses: dict[int, float] = {}

    def loss(index: int) -> float:
        if not _LOWEST <= index <= _HIGHEST:
            return math.inf
        if index not in losses:
            trial = _Trial(step, training_set, scored, _rate(index), on_trial or (lambda _trial: None))
            losses[index] = trial.run()
        return losses[index]

    best = first
    while math.isinf(loss(best)) and best > _LOWEST:
        best -= 1
    direction = -1 if loss(best - 1) < loss(best) else 1
    while loss(best + direction) < loss(best):
        best += direction
    if math.isinf(loss(best)):
        raise DivergenceError(f"no learning rate from {_rate(first):g} down to {_rate(best):g} kept the loss finite")
    return _rate(best)


def _rate(index: int) -> float:
    """Return 10 ** (index / 2), rounded to one digit."""
    return float(f"{10 ** (index / 2):.0e}")


@dataclass(frozen=True)
class _Trial:
    """A short run at one learning rate, on a copy of the network."""

    step: TrainingStep
    training_set: TrainingSet
    images: ClassFolders
    lr: float
    report: Callable[[LearningRateTrial], None]

    def run(self) -> float:
        """Return its loss; infinity if it diverged."""
        with preserved_random_state():
            torch.manual_seed(self.step.settings.seed * 1000 + self.step.ranks.rank)  # as for the run itself
            classifier = self.step.classifier.copied(self.step.ranks)
            try:
                loss = self._loss(classifier)
            except DivergenceError:
                loss = math.inf
        loss = loss if math.isfinite(loss) else math.inf
        self.report(LearningRateTrial(self.lr, TRIAL_STEPS, TRIAL_STEPS, loss))
        return loss

    def _loss(self, classifier: Classifier) -> float:
        settings, ranks, stop = self.step.settings, self.step.ranks, self.step.stop
        schedule = replace(settings, epochs=1, lr=self.lr, lr_scheduler="cosine", lr_warmup_epochs=_WARM_UP)
        optimizer = make_optimizer(classifier.network, settings)
        with make_renorm_scheduler(classifier.network, settings) or nullcontext() as renorm_scheduler:
            step = replace(self.step, classifier=classifier, optimizer=optimizer, renorm_scheduler=renorm_scheduler)
            classifier.parallel.train()
            second_half = Totals()
            try:
                for number, (batches, images) in enumerate(islice(self._steps(), TRIAL_STEPS)):
                    totals, stopping = step.take(batches, images, learning_rate(schedule, number, TRIAL_STEPS))
                    if stopping:
                        raise StoppedError
                    if not math.isfinite(totals.mean_loss):
                        return math.inf
                    if number >= TRIAL_STEPS // 2:
                        second_half = second_half.plus(totals)
                    self.report(LearningRateTrial(self.lr, number + 1, TRIAL_STEPS))
            except ImageError:
                stop.check()  # a signal to the entire process group has ended the processes that decode
                raise
        ranks.share_buffers(classifier.network)
        if settings.recalibrate:
            reestimate_statistics(classifier, self.training_set.sample(0, _SCORED_IMAGES), stop)
        validation = validate(classifier, self.images, settings.batch_size, ranks, stop)
        return (validation.loss + second_half.mean_loss) / 2

    def _steps(self) -> Iterator[tuple[Iterator[LabelledBatch], int]]:
        """Yield the batches of each step and the number of their images, epoch after epoch."""
        for epoch in count():
            batches = self.training_set.batches(epoch)
            for number in range(self.training_set.steps):
                yield islice(batches, self.step.settings.accumulate), self.training_set.images_in(number)
