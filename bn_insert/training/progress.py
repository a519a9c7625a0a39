"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .metrics import EpochMetrics, LearningRateTrial, OutputFit, Totals
from .settings import TrainingSettings


@dataclass(frozen=True)
class Progress:
    """How far a run has come, between two steps.

    Args:
        epoch: Complete epochs.
        step: Complete steps of the current epoch.
        seen: Losses and correct predictions of these steps.
        history: Metrics of the complete epochs.
        fit: Result of the check and fit of the output layer, before the first step; None if there was none, or not yet.
        trials: Results of the learning rate trials so far, and last the chosen one once more; empty if there were none.
    """

    epoch: int = 0
    step: int = 0
    seen: Totals = field(default_factory=Totals)
    history: tuple[EpochMetrics, ...] = ()
    fit: OutputFit | None = None
    trials: tuple[LearningRateTrial, ...] = ()

    @property
    def best(self) -> EpochMetrics | None:
        """The first epoch with the highest validation accuracy."""
        return max(self.history, key=lambda epoch: epoch.val_accuracy, default=None)

    @property
    def just_improved(self) -> bool:
        """Whether the last step ended an epoch that is the best so far."""
        return self.step == 0 and self.last_is_best

    @property
    def last_is_best(self) -> bool:
        """Whether the last complete epoch is the best so far."""
        return bool(self.history) and self.best is self.history[-1]

    @property
    def trial_losses(self) -> dict[float, float]:
        """The loss of each learning rate that was tried, infinite if it diverged."""
        return {trial.lr: trial.loss for trial in self.trials if trial.loss is not None}

    def complete(self, settings: TrainingSettings) -> bool:
        """Return whether all epochs are complete, or the patience with epochs that are not the best is exhausted."""
        if self.epoch >= settings.epochs:
            return True
        waited = self.epoch - self.best.epoch if self.best else 0
        return self.step == 0 and settings.patience is not None and waited >= settings.patience

    def after_step(self, totals: Totals) -> Progress:
        """Return the progress one step later."""
        return replace(self, step=self.step + 1, seen=self.seen.plus(totals))

    def after_epoch(self, metrics: EpochMetrics) -> Progress:
        """Return the progress at the start of the next epoch."""
        return replace(self, epoch=self.epoch + 1, step=0, seen=Totals(), history=(*self.history, metrics))
