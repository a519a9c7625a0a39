"""What `bn-insert finetune` prints while it runs, and at its end."""

from __future__ import annotations

import math
import shlex
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bn_insert.support.text import counted, listed

from .console import (
    print_error,
    print_line,
    print_note,
    print_note_from_handler,
    print_result,
    print_warning,
    run_progress,
)

if TYPE_CHECKING:
    from bn_insert import EpochMetrics, FineTuning, LearningRateTrial, OutputFit, RunSummary, StepMetrics

_CLASSES_SHOWN = 20


class FinetuneDisplay:
    """A progress bar during the fit, a trial or an epoch, and a line when it is complete; a context manager."""

    def __init__(self, images: int, images_per_step: int) -> None:
        """Print nothing yet.

        Args:
            images: Number of training images.
            images_per_step: Images of a step, in all processes.
        """
        self._images, self._images_per_step = images, min(images, images_per_step)
        self._epochs = self._batchnorms = self._trained = 0
        self._bar = ExitStack()
        self._update: Callable[[str, int], None] | None = None
        self._estimated = False
        self._losses: list[float] = []

    def __enter__(self) -> FinetuneDisplay:
        """Return this display."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove the bar."""
        self.close()

    def start(self, summary: RunSummary) -> None:
        """Print what the run is about to do."""
        self._epochs, self._batchnorms = summary.epochs, summary.batchnorms
        _print_summary(summary)

    def stopping(self, signal_number: int) -> None:
        """Say that a signal has been received; called by its handler."""
        again = "press Ctrl-C again" if signal_number == signal.SIGINT else "send the signal again"
        print_note_from_handler(f"Stopping after the current step; {again} to stop immediately.")

    def fit(self, fit: OutputFit) -> None:
        """Advance the bar of the fit of the output layer; print a line at its end."""
        if fit.done:
            from bn_insert.report import output_fit_text  # noqa: PLC0415 - once in a run

            self.close()
            print_note(output_fit_text(asdict(fit)))
            return
        checking = not fit.new and fit.own_accuracy is None
        if fit.seen == 0:
            self.close()
        if self._update is None:
            self._update = self._bar.enter_context(run_progress(fit.images))
        self._update("checking the output layer" if checking else "fitting the output layer", fit.seen)

    def trial(self, trial: LearningRateTrial) -> None:
        """Advance the bar of a trial; print a line at its end, and the chosen learning rate."""
        if trial.chosen:
            from bn_insert.report import SMALL_DIFFERENCE  # noqa: PLC0415 - once in a run

            lower = trial.loss is not None and min(self._losses, default=trial.loss) < trial.loss
            print_note(f"Learning rate: {trial.lr:g}{f' ({SMALL_DIFFERENCE})' * lower}.")
            return
        if trial.loss is not None:
            self.close()
            self._losses.append(trial.loss)
            outcome = "diverged" if math.isinf(trial.loss) else f"loss {trial.loss:.4f}"
            print_note(f"Trial with learning rate {trial.lr:g}: {outcome} after {counted(trial.step, 'step')}.")
            return
        self._estimate(trial.seconds_left, ", trials included")
        if self._update is None:
            self._update = self._bar.enter_context(run_progress(trial.steps * self._images_per_step))
        self._update(f"trial with learning rate {trial.lr:g}", trial.step * self._images_per_step)

    def step(self, metrics: StepMetrics) -> None:
        """Advance the bar, and print the estimated time once it is known."""
        self._estimate(metrics.seconds_left)
        if self._update is None:
            self._update = self._bar.enter_context(run_progress(self._images))
        left = "" if metrics.seconds_left is None else f", about {_duration(metrics.seconds_left)} left"
        title = f"epoch {metrics.epoch} of {self._epochs}{left}"
        self._update(title, self._images * metrics.step // metrics.steps)

    def epoch(self, metrics: EpochMetrics) -> None:
        """Print the line of a complete epoch."""
        self.close()
        self._trained += 1
        print_line(
            f"epoch {metrics.epoch} of {self._epochs}: lr {metrics.lr:.3g}, "
            f"training loss {metrics.train_loss:.4f}, accuracy {metrics.train_accuracy:.2%}; "
            f"validation loss {metrics.val_loss:.4f}, accuracy {metrics.val_accuracy:.2%}; {metrics.seconds:.1f} s"
        )

    def _estimate(self, seconds_left: float | None, what: str = "") -> None:
        """Print the estimated time, once."""
        if seconds_left is not None and not self._estimated:
            self._estimated = True
            print_note(f"Estimated time left: {_duration(seconds_left)}{what}.")

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
        self._update = None

    def conclude(
        self, result: FineTuning, output_dir: Path, seconds: float, *, model: str | None, resume: bool, force: bool
    ) -> None:
        """Print the outcome of a run, what seems to be wrong with it, and what to do next.

        Args:
            result: The outcome.
            output_dir: Where it is.
            seconds: Duration of the command.
            model: --model.
            resume: Whether the command had --resume.
            force: Whether it had --force.
        """
        from bn_insert.report import EARLY_STOP, worst  # noqa: PLC0415 - only at the end of a run

        if result.interrupted:
            option = "" if resume else " with --resume" + " instead of --force" * force
            print_error(f"interrupted; the run is saved in {output_dir}, and the same command{option} continues it")
        elif result.best:
            best = f"best validation accuracy {result.best.val_accuracy:.2%} in epoch {result.best.epoch}"
            failed = worst(result.health) == "bad"
            done = f"Wrote {output_dir}" if self._trained else f"{output_dir} was already complete"
            print_result(f"{done}: {best} ({_duration(seconds)}).", good=not failed)
            for verdict in result.health:
                if verdict.state == "bad":
                    print_warning(verdict.text)
                elif verdict.state == "check" or verdict.subject == EARLY_STOP:
                    print_note(verdict.text)
            if not (output_dir / "best.pth").exists():
                print_warning(
                    f"{output_dir / 'best.pth'} is missing, and state.pth has only the network after the last epoch, "
                    "which is in last.pth. To get the best network again, repeat the run in another folder."
                )
            elif not failed:
                file = shlex.quote(str(output_dir / "best.pth"))
                option = f" --model {shlex.quote(model)}" if model else ""
                print_note(
                    f"Next: bn-insert evaluate {file} DATA{option}, with class folders of images that were not used "
                    "here."
                )
                if self._batchnorms:
                    print_note(f"To remove its BatchNorm: bn-insert fold {file} -o OUTPUT{option}.")


def _print_summary(summary: RunSummary) -> None:
    for title, text in summary.texts.items():
        print_note(f"{title}: {text}.")
    names = [f"{name} {counts[0]:,}/{counts[1]:,}" for name, counts in summary.classes.items()]
    print_note(f"Classes (training/validation): {listed(names, _CLASSES_SHOWN)}.")
    if missing := [name for name, counts in summary.classes.items() if not counts[1]]:
        warn_of_classes_not_validated(f"No validation images of {listed(missing, _CLASSES_SHOWN)}", len(missing))
    lr = "to be chosen in short trials (--lr sets it)" if summary.lr is None else f"{summary.lr:g}"
    untried = " (the run is too short for trials; --lr sets it)" if summary.lr_untried else ""
    print_note(f"Learning rate: {lr}{untried}.")
    for text in summary.unused:
        print_note(f"{text}.")
    if not summary.batchnorms:
        print_note("The network has no BatchNorm; bn-insert insert adds it without changing the outputs.")
    if summary.resumed:
        print_note(f"Resumed {summary.resumed}.")


def warn_of_classes_not_validated(text: str, count: int) -> None:
    """Warn of classes without validation images, given what is the matter with them and how many they are."""
    these = "this class" if count == 1 else "these classes"
    print_warning(f"{text}: the validation accuracy says nothing about {these}.")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
