"""The files that a run leaves in its output folder, and the order in which they get their names."""

from __future__ import annotations

import math
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.save import stage_checkpoint
from ..errors import CheckpointError, TrainingError
from ..graph.layers import Kind
from ..images.class_folders import ClassFolders
from ..report import choice_text, output_fit_text, preprocessing_text, read_run, run_report, write_report
from ..support.files import stage_file, staging_folder, write_atomically
from ..support.processes import Ranks
from ..support.text import counted, printable
from .lr_trials import epochs_for_trials
from .metrics import write_curves, write_metrics
from .progress import Progress
from .state import TrainingState, write_state
from .summary import RunSummary, images_text
from .tensorboard import remove_events

STATE, METRICS, CURVES, CLASSES = "state.pth", "metrics.csv", "curves.png", "classes.txt"
BEST, LAST = "best.pth", "last.pth"
TENSORBOARD = "tensorboard"  # a folder: TensorBoard's files have names of their own
REPORTS = ("report.json", "report.html")
RESULTS = (STATE, METRICS, CURVES, CLASSES, *REPORTS, BEST, LAST)


def results_in(folder: Path) -> list[str]:
    """Return the names of the results in a folder, after checking that every result can be written there.

    Raises:
        TrainingError: When the folder is not one, or something other than a regular file has the name of a result.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is not a folder; choose another output folder")
    for path in (folder / name for name in RESULTS):
        # A link may lead to another disk, where no file can be renamed to, or to another result.
        if path.is_symlink() or (path.exists() and not path.is_file()):
            kind = "a symbolic link" if path.is_symlink() else "a folder" if path.is_dir() else "not a regular file"
            raise TrainingError(
                f"cannot write {path}: it is {kind}, and results are regular files; move it away, or choose another "
                "output folder"
            )
    return [name for name in RESULTS if (folder / name).exists()]


def checkpoint_of(folder: Path) -> str:
    """Return the path of the checkpoint that the run in a folder started from; empty if its report does not tell."""
    try:
        run = read_run(folder / REPORTS[0])
    except CheckpointError:
        return ""
    checkpoint = run.get("checkpoint")
    return printable(checkpoint.get("path", "")) if isinstance(checkpoint, dict) else ""


def _beginning(progress: Progress, lr: float | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what came before training, as values and as texts: the fit of the output layer, the learning rate."""
    facts: dict[str, Any] = {}
    losses = progress.trial_losses
    texts = {"Learning rate": choice_text(lr, losses)}
    if progress.fit:
        names = ("new", "fitted", "accuracy", "own_accuracy", "reason", "reestimated_accuracy")
        fit = {name: getattr(progress.fit, name) for name in names}
        facts["output_fit"], texts["Before training"] = fit, output_fit_text(fit)
    if losses:
        # JSON has no number for the loss of a trial that diverged.
        facts["lr_trials"] = [
            {"lr": rate, "loss": loss if math.isfinite(loss) else None} for rate, loss in losses.items()
        ]
    return facts, texts


def _checkpoints_at(progress: Progress) -> list[str]:
    """Return the checkpoints that show the network as it is: none within an epoch.

    There, the running statistics lag behind the weights, and the network would do worse than it can.
    """
    at_end = bool(progress.history) and progress.step == 0
    return [LAST] * at_end + [BEST] * progress.just_improved


def run_facts(
    summary: RunSummary, images: ClassFolders, ranks: Ranks, *, output_replaced: bool, output_kind: Kind | None
) -> dict[str, Any]:
    """Return what the report shows about a run besides settings and epochs.

    Args:
        summary: What the run is about to do.
        images: Its images.
        ranks: Its processes.
        output_replaced: Whether it begins with a new output layer on the model's other layers.
        output_kind: Kind of its output layer.
    """
    return {
        "data": {
            "folder": str(images.folder),
            "classes": len(images.classes),
            "preprocessing": images.transform.to_dict(),
            "output_replaced": output_replaced,
            "output_kind": output_kind,
        }
        | ({"epochs_for_trials": epochs_for_trials(summary.steps)} if summary.lr_untried else {}),
        "batchnorms": summary.batchnorms,
        "parameters": summary.parameters,
        "trained_parameters": summary.trained_parameters,
        "output_layer": summary.output,
        "device": summary.device,
        "processes": ranks.count,
        "overview": summary.texts | {"Preprocessing": preprocessing_text(summary.preprocessing)},
    }


def with_image_counts(facts: Mapping[str, Any], images: ClassFolders, skipped: Collection[str]) -> dict[str, Any]:
    """Return the facts of a run with the numbers of its images, apart from those that could not be read."""
    paths = {images.folder / each for each in skipped}
    train, val = ([image for image in part if image.path not in paths] for part in (images.train, images.val))
    counts = {
        "training_images": len(train),
        "validation_images": len(val),
        "skipped_files": len(paths),
        "largest_class": max(Counter(image.label for image in val).values()) / len(val),
        "validation_digest": images.digest_of(val),
    }
    text = images_text(len(train), len(val), len(images.classes))
    if paths:
        text += f"; {counted(len(paths), 'unreadable file')} skipped"
    return {**facts, "data": facts["data"] | counts, "overview": facts["overview"] | {"Images": text}}


class RunFolder:
    """The output folder of a run.

    Each file is replaced atomically. All are written in full before the first gets its name, so a full disk changes
    nothing. They get their names in an order in which a kill or a failing rename leaves a run that can be resumed:

    - `state.pth` comes after the other files, which it describes.
    - Where another run is replaced, the checkpoints come after `state.pth`: until then that run can be resumed, and all
      its other files follow from its state. `restore_checkpoints` makes up for a kill between the two.
    - What the other run had and this one does not have yet is removed last.
    """

    def __init__(
        self,
        folder: Path,
        images: ClassFolders,
        facts: Mapping[str, Any],
        *,
        dropout: str,
        replaced: Sequence[str],
    ) -> None:
        """Describe the folder, and touch nothing.

        Args:
            folder: The folder.
            images: The images of the run, for class names and preprocessing.
            facts: JSON-ready values for the report.
            dropout: The dropout in effect, for the report.
            replaced: Names of another run's results, which stay until this run has results.
        """
        self._folder, self._images, self._replaced = folder, images, tuple(replaced)
        self.facts, self._dropout = facts, dropout

    @property
    def kept(self) -> str:
        """What is left when training fails, as a phrase."""
        saved = (self._folder / STATE).exists()
        return f"{self._folder} keeps what was saved last" if saved else "nothing was written"

    def write(self, network: nn.Module, state: TrainingState) -> None:
        """Write all results of a run.

        Raises:
            CheckpointError: With the path and the reason.
        """
        order = [CLASSES, METRICS, CURVES, *((STATE, LAST, BEST) if self._replaced else (LAST, BEST, STATE))]
        with staging_folder(self._folder / STATE) as staging:
            publish = self._staged(network, state, staging)
            for name in filter(publish.__contains__, order):
                publish[name]()
        written = {*publish, *self._write_reports(state.progress, state.settings, state.skipped)}
        for name in self._replaced:
            if name not in written:
                (self._folder / name).unlink(missing_ok=True)
        if self._replaced:  # this run has written no events yet
            remove_events(self._folder / TENSORBOARD)
        self._replaced = ()

    def rewrite(self, progress: Progress, settings: Mapping[str, Any], skipped: Collection[str]) -> None:
        """Write what follows from the progress of a complete run once more: it may have been damaged or deleted.

        Raises:
            CheckpointError: With the path and the reason.
        """
        with staging_folder(self._folder / STATE) as staging:
            for name, write in self._writers(progress).items():
                stage_file(self._folder / name, write, staging, overwrite=True)()
        self._write_reports(progress, settings, skipped)

    def restore_checkpoints(self, network: nn.Module, progress: Progress) -> None:
        """Write the checkpoints of a run that is resumed at the end of an epoch: a kill may have come before them.

        Within the next epoch, a best.pth that is missing is the same as last.pth where the last epoch is the best.
        """
        for name in _checkpoints_at(progress):
            with staging_folder(self._folder / name) as staging:
                self._staged_checkpoint(network, name, staging)()
        best, last = self._folder / BEST, self._folder / LAST
        if progress.last_is_best and not best.exists() and last.exists():
            write_atomically(best, partial(shutil.copyfile, last))

    def _staged(self, network: nn.Module, state: TrainingState, staging: Path) -> dict[str, Callable[[], None]]:
        """Write the files, apart from the reports, into a staging folder; return functions that name them."""
        checkpoints = _checkpoints_at(state.progress)
        writers = self._writers(state.progress) | {STATE: partial(write_state, state)}
        return {name: self._staged_checkpoint(network, name, staging) for name in checkpoints} | {
            name: stage_file(self._folder / name, write, staging, overwrite=True) for name, write in writers.items()
        }

    def _writers(self, progress: Progress) -> dict[str, Callable[[Path], object]]:
        """Return what writes the classes, and the metrics and curves if there are any."""
        classes = "".join(f"{name}\n" for name in self._images.classes)
        writers: dict[str, Callable[[Path], object]] = {
            CLASSES: lambda path: path.write_text(classes, encoding="utf-8")
        }
        if history := progress.history:
            writers |= {METRICS: partial(write_metrics, history), CURVES: partial(write_curves, history)}
        return writers

    def _staged_checkpoint(self, network: nn.Module, name: str, staging: Path) -> Callable[[], None]:
        transform, classes = self._images.transform.to_dict(), self._images.classes
        return stage_checkpoint(
            network, self._folder / name, staging, transform=transform, classes=classes, overwrite=True
        )

    def _write_reports(self, progress: Progress, settings: Mapping[str, Any], skipped: Collection[str]) -> list[str]:
        """Write the reports, and return the names of those that could be written."""
        epochs = [asdict(epoch) for epoch in progress.history]
        # A limit of Batch Renormalization may be infinite, which JSON has no number for.
        shown = {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in (*settings.items(), ("dropout", self._dropout))
        }
        beginning, texts = _beginning(progress, settings["lr"])
        facts = with_image_counts(self.facts, self._images, skipped)
        facts |= {**beginning, "overview": facts["overview"] | texts}
        data = run_report(self._folder.resolve().name, shown, epochs, facts)
        written = []
        try:
            for name in REPORTS:
                write_report(self._folder / name, data, overwrite=True)
                written.append(name)
        except CheckpointError as error:  # the run itself is saved, and worth more
            warnings.warn(f"{error}; everything else is saved, and training continues", stacklevel=2)
        return written
