"""The metrics of a run for TensorBoard, which is an optional dependency."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import TrainingError, as_passed
from .metrics import EpochMetrics

_EVENTS = "events.out.tfevents.*"


def check_tensorboard(folder: Path) -> None:
    """Raise TrainingError unless the package tensorboard is installed and can write into a folder."""
    if find_spec("tensorboard") is None:
        raise TrainingError(
            "TensorBoard is not installed; install it with pip install 'bn-insert[tensorboard]', or leave out "
            f"{as_passed('tensorboard')}"
        )
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise TrainingError(
            f"cannot write into {folder}: no permission; change it, or leave out {as_passed('tensorboard')}"
        )
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise TrainingError(
            f"cannot write {folder}: it is not a folder; move it away, or leave out {as_passed('tensorboard')}"
        )


def remove_events(folder: Path) -> None:
    """Remove the files of events of a run that is replaced, and the folder if there is nothing else in it.

    A link to a folder is left alone: other runs may write there too.
    """
    events = [] if folder.is_symlink() else list(folder.glob(_EVENTS))
    try:
        for each in events:
            each.unlink()
    except OSError as error:  # the run that replaces it is saved, and worth more
        warnings.warn(f"cannot remove {each}, which is of the run that was replaced: {error.strerror}", stacklevel=2)
    if events:
        with suppress(OSError):  # something else is in it
            folder.rmdir()


@dataclass
class TensorBoard:
    """Writes the metrics of each epoch as scalars; nothing before the first epoch is complete.

    When they cannot be written, as on a full disk, there is one warning, and training continues without them.

    Args:
        folder: Receives a file of events, in place of those of a run that is replaced or resumed.
        history: Epochs of a resumed run, which are written again.
        complete: Whether there are no more, so that they are written at once.
    """

    folder: Path
    history: Sequence[EpochMetrics]
    complete: bool = False
    _writer: Any = field(default=None, init=False)
    _failed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Write the epochs of a run that is complete."""
        if self.complete:
            self._try(())

    def write(self, metrics: EpochMetrics) -> None:
        """Write the metrics of an epoch."""
        self._try((metrics,))

    def _try(self, epochs: Sequence[EpochMetrics]) -> None:
        if self._failed:
            return
        try:
            self._write(epochs)
        except OSError as error:  # the run itself is saved, and worth more
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._failed = True
        warnings.warn(
            f"cannot write {self.folder}: {error.strerror or error}; everything else is saved, and training continues",
            stacklevel=2,
        )

    def _write(self, epochs: Sequence[EpochMetrics]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - imports tensorboard

            for earlier in self.folder.glob(_EVENTS):
                earlier.unlink()
            self._writer = SummaryWriter(str(self.folder))
            epochs = (*self.history, *epochs)
        for metrics in epochs:
            self._add(metrics)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            with suppress(OSError):  # the last epoch was flushed, or has failed to be
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
