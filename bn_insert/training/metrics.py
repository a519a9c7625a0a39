"""Measurements of the steps and epochs of a run, and of what comes before them: as values, a table and a figure."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class OutputFit:
    """Progress of the fit of an output layer before training, and its result at the end.

    A model's own output layer is first checked, in a pass of its own, and fitted only if it is little better than
    guessing.

    Args:
        seen: Images that this process has run through the network so far; 0 when the check or the fit begins.
        images: Images that it runs through the network for the check or the fit.
        done: Whether the fit is complete, or was not necessary.
        accuracy: Accuracy on the validation images with which training begins; None before the fit is complete, and if
            the layer is new and was not fitted.
        fitted: Whether the layer was fitted; if not, it is as it was.
        new: Whether the layer is new, because the model's own does not have one output per class.
        own_accuracy: Accuracy of the model's own output layer on them; None before it has been checked, and if
            it cannot be.
        reason: Why the layer was kept although it is new or little better than guessing, as a clause; otherwise empty.
        reestimated_accuracy: `accuracy` after the running statistics have been re-estimated on the training images, and
            nothing trained; None if they are not re-estimated, or if that was not measured.
    """

    seen: int
    images: int
    done: bool = False
    accuracy: float | None = None
    fitted: bool = False
    new: bool = False
    own_accuracy: float | None = None
    reason: str = ""
    reestimated_accuracy: float | None = None


@dataclass(frozen=True)
class LearningRateTrial:
    """Progress of a trial of a learning rate, and its result at the end.

    Args:
        lr: Peak learning rate.
        step: Steps taken so far.
        steps: Steps of a complete trial.
        loss: Mean of the validation loss after the trial and the training loss of its second half; infinite if the
            trial diverged, None while it is running.
        chosen: Whether the run uses this learning rate; reported once more after all trials.
        seconds_left: Estimated time until the run ends, if there are three trials; None while it is not known.
    """

    lr: float
    step: int
    steps: int
    loss: float | None = None
    chosen: bool = False
    seconds_left: float | None = None


@dataclass(frozen=True)
class StepMetrics:
    """One step of training; all numbers are counted from 1.

    Args:
        epoch: The epoch.
        step: The step within it.
        steps: Steps per epoch.
        loss: Mean loss of the batch.
        seconds_left: Estimated time until the run ends; None while it is not known.
    """

    epoch: int
    step: int
    steps: int
    loss: float
    seconds_left: float | None = None


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch; losses are means over images, and accuracies fractions of them.

    Args:
        epoch: The epoch, from 1.
        step: Steps since the start of the run.
        lr: Learning rate of the epoch's last step.
        train_loss: Mean loss on the training images, taken while the weights change, in train mode.
        train_accuracy: Accuracy on the training images, taken likewise.
        val_loss: Mean loss on the validation images after the epoch.
        val_accuracy: Accuracy on the validation images after the epoch.
        seconds: Duration of training, re-estimation and validation.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


class Totals(NamedTuple):
    """Sums over images: of their losses, of those classified correctly, and of the images themselves."""

    loss: float = 0.0
    correct: float = 0.0
    images: float = 0.0

    @property
    def mean_loss(self) -> float:
        """Mean loss of an image."""
        return self.loss / self.images

    def plus(self, other: Totals) -> Totals:
        """Return the sums over the images of both."""
        return Totals(self.loss + other.loss, self.correct + other.correct, self.images + other.images)


def write_metrics(epochs: Sequence[EpochMetrics], path: Path) -> None:
    """Write the epochs as CSV, one per line."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(EpochMetrics)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(epoch) for epoch in epochs)


def write_curves(epochs: Sequence[EpochMetrics], path: Path) -> None:
    """Write a PNG with loss and accuracy over the epochs."""
    # Without pyplot, which would look for a display and keep global state.
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes half a second, and only this function needs it

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    numbers = [epoch.epoch for epoch in epochs]
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        for part, label in (("train", "training"), ("val", "validation")):
            axes.plot(numbers, [getattr(epoch, f"{part}_{name}") for epoch in epochs], marker=".", label=label)
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if name == "accuracy":  # where the margin would go beyond 0 and 1; markers there stay whole
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, 0), min(high, 1))
            for line in axes.lines:
                line.set_clip_on(False)
        axes.legend()
    figure.savefig(path, format="png", dpi=120)
