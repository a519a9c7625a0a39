"""What each epoch of a training run gave: as values, as a table in a file, as a figure."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch: losses are means over images, accuracies fractions of them.

    epoch: from 1.  step: steps since the beginning of the run.  lr: of the epoch's last step.  The training figures are
    taken while the weights change, with dropout.  seconds: training, re-estimation and validation.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


def write_metrics(epochs: Sequence[EpochMetrics], path: Path) -> None:
    """Write the epochs as CSV, one line each."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(EpochMetrics)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(epoch) for epoch in epochs)


def write_curves(epochs: Sequence[EpochMetrics], path: Path) -> None:
    """Write a PNG with loss and accuracy over the epochs."""
    # Without pyplot: no window system is asked for, and no global state is touched.
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second that only this function needs

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    numbers = [epoch.epoch for epoch in epochs]
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        for part, label in (("train", "training"), ("val", "validation")):
            axes.plot(numbers, [getattr(epoch, f"{part}_{name}") for epoch in epochs], marker=".", label=label)
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, format="png", dpi=120)
