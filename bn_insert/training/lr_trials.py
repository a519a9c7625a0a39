"""The learning rate of a run, chosen by short trials of a few learning rates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from itertools import count, islice

from ..errors import DivergenceError, ImageError
from ..images.class_folders import ClassFolders, LabelledBatch
from ..statistics.passes import preserved_random_state
from .classifier import Classifier
from .metrics import LearningRateTrial, Totals
from .preparation import make_optimizer, make_renorm_scheduler
from .reestimation import reestimate_statistics
from .remaining_time import STEPS_BEFORE_ESTIMATE, seconds_with_trials
from .schedule import learning_rate
from .settings import Optimizer, TrainingSettings
from .step import TrainingStep
from .stopping import StoppedError
from .training_set import TrainingSet
from .validation import SAMPLE, validate, with_sampled_validation

TRIAL_STEPS = 20

_WARMUP = 0.1  # fraction of the steps
_USUAL = 3  # trials: one, and one on either side of it
# Learning rates by their index, see `_rate`.
_FIRST: dict[Optimizer, int] = {"sgd": -5, "adamw": -7}
_LOWEST, _HIGHEST = -12, 0
# The highest for all weights: 20 steps at more may look good, and more of them destroy pretrained features.
_HIGHEST_FOR_ALL: dict[Optimizer, int] = {"sgd": -3, "adamw": -5}
# What fraction lower the loss has to be at a higher (1) and at a lower (-1) learning rate: smaller differences say
# little after so few steps. Less is asked of a higher one, because the learning rate of a run falls: on average it is
# half of that of the trial.
_MARGINS = {1: 0.03, -1: 0.1}


def untried_learning_rate(settings: TrainingSettings, steps: int) -> float | None:
    """Return the learning rate of a run that is too short for trials; None for a run that is long enough.

    Args:
        settings: Settings of the run.
        steps: Steps per epoch.
    """
    return _rate(_FIRST[settings.opt]) if settings.epochs < epochs_for_trials(steps) else None


def epochs_for_trials(steps: int) -> int:
    """Return how many epochs of this many steps make a run long enough for trials."""
    return -(-TRIAL_STEPS // steps)


def choose_learning_rate(
    step: TrainingStep,
    training_set: TrainingSet,
    images: ClassFolders,
    on_trial: Callable[[LearningRateTrial], None] | None = None,
    *,
    complete: Sequence[LearningRateTrial] = (),
) -> float:
    """Search for a learning rate by short trials, and return one that neither neighbor clearly beats.

    A trial trains a copy of the network for `TRIAL_STEPS` steps on the first batches of the run. After a short warm-up,
    its learning rate stays where it is, as it does in the beginning of a longer run: if it fell, as at the end of a
    run, it would look better than it is. The loss of a trial is the mean of the validation loss at its end and the
    training loss of its second half. Neighboring learning rates differ by a factor of about three (0.001, 0.003, 0.01,
    ...). From 0.003 (0.0003 for AdamW), the search moves up as long as the loss is at least 3% lower there, to at most
    0.03 (0.003) if all weights are trained, or else down as long as it is at least 10% lower. If trials diverge, it
    first moves down to the highest learning rate at which they do not.

    Args:
        step: The step of the run, with its network, settings and processes; the network is not changed.
        training_set: The batches of this process.
        images: Class folders with the validation images.
        on_trial: Called after each step of a trial and at its end, and with the chosen one.
        complete: Results of trials that do not have to be repeated; they are reported first.

    Raises:
        DivergenceError: If all trials diverge.
        StoppedError: If the run was asked to stop.
    """
    first = _FIRST[step.settings.opt]
    whole = step.settings.train == "all" and not step.settings.freeze_features
    highest = _HIGHEST_FOR_ALL[step.settings.opt] if whole else _HIGHEST
    sampled = with_sampled_validation(images, step.settings.seed)
    report = on_trial or (lambda _trial: None)
    trials = {trial.lr: trial for trial in complete}
    for trial in complete:
        report(trial)

    def seconds_left(per_step: float, taken: int) -> float:
        trial_steps = max(1, _USUAL - len(trials)) * TRIAL_STEPS - taken
        return seconds_with_trials(per_step, trial_steps, step.settings, images, training_set.steps)

    def loss(index: int) -> float:
        if not _LOWEST <= index <= highest:
            return math.inf
        lr = _rate(index)
        if lr not in trials:
            trials[lr] = _Trial(step, training_set, sampled, lr, report, seconds_left).run()
        reached = trials[lr].loss
        return math.inf if reached is None else reached

    best = first
    while math.isinf(loss(best)) and best > _LOWEST:
        best -= 1
    if math.isinf(loss(best)):
        raise DivergenceError(f"the loss is not finite at any learning rate from {_rate(first):g} to {_rate(best):g}")
    for direction, margin in _MARGINS.items():
        while loss(best + direction) < (1 - margin) * loss(best):
            best += direction
    report(replace(trials[_rate(best)], chosen=True))
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
    seconds_left: Callable[[float, int], float]

    def run(self) -> LearningRateTrial:
        """Return the result of the trial."""
        with preserved_random_state():  # each trial begins in the state in which the run will
            classifier = self.step.classifier.copied(self.step.ranks)
            steps = self._train(classifier)
            loss = math.inf
            if len(steps) == TRIAL_STEPS:
                second_half = reduce(Totals.plus, steps[TRIAL_STEPS // 2 :])
                loss = (self._validation_loss(classifier) + second_half.mean_loss) / 2
        result = LearningRateTrial(self.lr, len(steps), TRIAL_STEPS, loss)
        self.report(result)
        return result

    def _train(self, classifier: Classifier) -> list[Totals]:
        """Take the steps of the trial until it diverges, and return the totals of each."""
        taken: list[Totals] = []
        settings = self.step.settings
        schedule = replace(settings, epochs=1, lr=self.lr, lr_scheduler="constant", lr_warmup_epochs=_WARMUP)
        optimizer = make_optimizer(classifier.network, settings)
        with make_renorm_scheduler(classifier.network, settings) or nullcontext() as renorm_scheduler:
            step = replace(self.step, classifier=classifier, optimizer=optimizer, renorm_scheduler=renorm_scheduler)
            classifier.parallel.train()
            started = time.monotonic()
            try:
                for number, (batches, images) in enumerate(islice(self._steps(), TRIAL_STEPS)):
                    totals, stopping = step.take(batches, images, learning_rate(schedule, number, TRIAL_STEPS))
                    if stopping:
                        raise StoppedError
                    if not math.isfinite(totals.mean_loss):
                        return taken
                    taken.append(totals)
                    self._report_step(number + 1, time.monotonic() - started)
            except ImageError:
                step.stop.check()  # a signal to the entire process group has ended the processes that decode
                raise
        return taken

    def _report_step(self, taken: int, seconds: float) -> None:
        left = None if taken < STEPS_BEFORE_ESTIMATE else self.seconds_left(seconds / taken, taken)
        self.report(LearningRateTrial(self.lr, taken, TRIAL_STEPS, seconds_left=left))

    def _validation_loss(self, classifier: Classifier) -> float:
        settings, ranks, stop = self.step.settings, self.step.ranks, self.step.stop
        ranks.share_buffers(classifier.network)
        try:
            if settings.recalibrate:
                reestimate_statistics(classifier, self.training_set.sample(0, SAMPLE), stop)
        except DivergenceError:
            return math.inf
        loss = validate(classifier, self.images, settings.batch_size, ranks, stop).loss
        return loss if math.isfinite(loss) else math.inf

    def _steps(self) -> Iterator[tuple[Iterator[LabelledBatch], int]]:
        """Yield the batches of each step and the number of their images, epoch after epoch."""
        for epoch in count():
            batches = self.training_set.batches(epoch)
            for number in range(self.training_set.steps):
                yield islice(batches, self.step.settings.accumulate), self.training_set.images_in(number)
