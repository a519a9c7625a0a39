"""The metrics of a run for TensorBoard, which is an optional dependency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import TrainingError, as_passed
from .metrics import EpochMetrics


def check_tensorboard() -> None:
    """Raise TrainingError unless the package tensorboard is installed."""
    if find_spec("tensorboard") is None:
        raise TrainingError(
            "TensorBoard is not installed; install it with pip install 'bn-insert[tensorboard]', or leave out "
            f"{as_passed('tensorboard')}"
        )


@dataclass
class TensorBoard:
    """Writes the metrics of each epoch as scalars; nothing before the first epoch is complete.

    Args:
        folder: Receives a file of events, in place of those of a run that is replaced or resumed.
        history: Epochs of a resumed run, which are written again.
    """

    folder: Path
    history: Sequence[EpochMetrics]
    _writer: Any = field(default=None, init=False)

    def write(self, metrics: EpochMetrics) -> None:
        """Write the metrics of an epoch."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - imports tensorboard

            for earlier in self.folder.glob("events.out.tfevents.*"):
                earlier.unlink()
            self._writer = SummaryWriter(str(self.folder))
            for past in self.history:
                self._add(past)
        self._add(metrics)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, metrics: EpochMetrics) -> None:
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            part, _, value = name.partition("_")
            self._writer.add_scalar(f"{value}/{part}", getattr(metrics, name), metrics.epoch)
        self._writer.add_scalar("lr", metrics.lr, metrics.epoch)

    def after_epoch(self, then: Callable[[EpochMetrics], None] | None) -> Callable[[EpochMetrics], None]:
        """Return a function for after each epoch, which writes its metrics and calls another function."""

        def write(metrics: EpochMetrics) -> None:
            self.write(metrics)
            if then:
                then(metrics)

        return write
