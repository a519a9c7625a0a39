"""Fine-tune a network on labeled images: what `bn-insert finetune` does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DivergenceError, TrainingError, as_passed
from ..graph.copies import check_module, unwrapped
from ..graph.layers import layer_kind
from ..images.class_folders import ClassFolders
from ..report import Verdict, run_health
from ..report.run_verdicts import lower_rate_advice
from ..statistics.passes import preserved_random_state
from ..support.arguments import check_flags, check_functions, usable_device
from ..support.files import StrPath, check_folder, is_same_file, output_folder
from ..support.processes import Ranks, on_every_rank
from ..surgery.replace_output import output_layer
from .classifier import Classifier
from .dropout import set_dropout
from .loop import TrainingLoop
from .lr_trials import choose_learning_rate
from .metrics import EpochMetrics, LearningRateTrial, OutputFit, StepMetrics
from .preparation import batchnorm_mode, make_optimizer, make_renorm_scheduler, prepared_network, replaces_output
from .progress import Progress
from .results import BEST, LAST, STATE, TENSORBOARD, RunFolder, checkpoint_of, results_in, run_facts, with_image_counts
from .settings import TrainingSettings
from .starting_output import accuracy_after_reestimation, fit_starting_output
from .state import TrainingState, load_state, random_state, run_data
from .step import TrainingStep
from .stopping import StopCheck, StoppedError
from .summary import RunSummary, summarize
from .tensorboard import TensorBoard, check_tensorboard
from .training_set import TrainingSet
from .unused_settings import unused_settings


@dataclass(frozen=True)
class FineTuning:
    """The outcome of a run.

    Args:
        epochs: Metrics of all complete epochs, including those before the run was resumed.
        best: The first epoch with the highest validation accuracy; None before the first epoch is complete.
        interrupted: Whether the run was stopped before its last epoch, so that it can be resumed.
        health: What is wrong with the run, in words, or that nothing is; see `run_health` in `bn_insert.report`.
        lr: Peak learning rate, given or chosen; None if the run was stopped before it was chosen.
    """

    epochs: tuple[EpochMetrics, ...]
    best: EpochMetrics | None
    interrupted: bool
    health: tuple[Verdict, ...] = ()
    lr: float | None = None


def finetune(
    model: nn.Module,
    images: ClassFolders,
    output_dir: StrPath,
    settings: TrainingSettings | None = None,
    *,
    resume: bool = False,
    resume_epochs: bool = False,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    on_start: Callable[[RunSummary], None] | None = None,
    on_fit: Callable[[OutputFit], None] | None = None,
    on_trial: Callable[[LearningRateTrial], None] | None = None,
    on_step: Callable[[StepMetrics], None] | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    stop: Callable[[], bool] | None = None,
    facts: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
) -> FineTuning:
    """Train a copy of a classifier on labeled images, and write the results into a folder.

    The output layer is first fitted to the features that the network computes for up to 1,024 training images
    (`settings.fit_output`, see `fit_output`) if it is new, or if it is little better than guessing on the validation
    images, for example because the checkpoint was trained on the same number of other classes. In the latter case, the
    original layer is kept if the fit does not raise the validation accuracy. The output layer of a new head
    (`settings.head`) is not fitted. The network is then validated once more with running statistics re-estimated on the
    training images, because a few images may spoil them.

    The learning rate is chosen next if `settings.lr` is None: copies of the network are trained for 20 steps each at
    several learning rates, starting at 0.0003 (0.003 for SGD) and moving in the direction in which the loss is clearly
    lower. A run of fewer than 20 steps uses the starting value.

    After each epoch the running statistics of BatchNorm are re-estimated on training images (`settings.recalibrate`),
    the network is validated, and these files are written, each completely or not at all: metrics.csv, curves.png,
    last.pth, best.pth if its validation accuracy is the highest so far, classes.txt, state.pth, from which the run can
    be resumed, and the report of the run, report.html, with its data, report.json.

    The copy is in float32 instead of half precision, in channels_last memory format unless its forward takes only
    contiguous tensors, and has a new output layer if the model does not return one logit per class. Dropout is switched
    off if a BatchNorm normalizes by the batch, unless `settings.dropout` asks for it. An epoch's last batch is left out
    if it is a single image that a BatchNorm would have to normalize by, or on which the network does not run, because
    squeeze() removes its batch axis; in validation, such an image joins the batch before it. PyTorch's random state is
    restored.

    In a torch.distributed process group all ranks call this function: batches are per rank, gradients are averaged by
    DistributedDataParallel, and only the first rank writes.

    Args:
        model: The classifier; it is left unchanged.
        images: Training and validation images, from `open_class_folders` in `bn_insert.images`.
        output_dir: Output directory; created if missing. One that contains results is refused without `resume` or
            `overwrite`.
        settings: Settings of the run; None uses the defaults.
        resume: Continue from state.pth, with the same settings and images; on a CPU the weights are exactly those of
            an uninterrupted run. Resuming a complete run rewrites every file that can be derived from state.pth:
            best.pth only if the last epoch is the best. An incomplete run whose last epoch is not its best needs its
            best.pth. A run is started if the folder has no results.
        resume_epochs: Resume the run with its original number of epochs, instead of `settings.epochs`.
        overwrite: Replace the results in the folder, as soon as this run has results.
        device: Where to train.
        on_start: Called before the fit, the trials and the first step, also when a run is resumed.
        on_fit: Called after each batch of the fit of the output layer, and at its end, even if it was not necessary.
        on_trial: Called after each step of a learning rate trial, at its end with its loss, and once more with the
            chosen trial.
        on_step: Called after each step.
        on_epoch: Called after each epoch.
        stop: Polled after each step, and with one process also during the fit; once it returns True, the run writes
            state.pth and ends. To stop without delay, the statistics are not re-estimated, so last.pth remains the
            network after the last complete epoch.
        facts: JSON-ready values that the report shows unchanged, such as the checkpoint that the model came from.
        tensorboard: Also write losses, accuracies and learning rates for TensorBoard, into the folder tensorboard in
            the output folder; the package tensorboard must be installed.

    Returns:
        Metrics of the epochs, whether the run was stopped, and what seems to be wrong with it.

    Raises:
        TrainingError: When training or resuming as requested is not possible, or a result cannot be written into the
            output folder.
        DivergenceError: When the loss is not finite; the files stay as they were after the last complete epoch.
        ImageError: When images cannot be read.
        CheckpointError: When state.pth cannot be read, or results cannot be written.
        GraphError: When the model is not a module.
    """
    settings = TrainingSettings() if settings is None else settings
    device, ranks = usable_device(device, TrainingError), Ranks.current()
    folder = _folder(output_dir)
    _check_arguments(
        model,
        images,
        settings,
        {"on_start": on_start, "on_fit": on_fit, "on_trial": on_trial, "on_step": on_step}
        | {"on_epoch": on_epoch, "stop": stop},
        {"resume_epochs": resume_epochs, "tensorboard": tensorboard},
        folder=folder,
        tensorboard=folder / TENSORBOARD if tensorboard else None,
    )
    check_output_dir(folder, resume=resume, overwrite=overwrite)
    with ExitStack() as closing, preserved_random_state():
        _on_first_rank(lambda: closing.enter_context(output_folder(folder)), ranks)
        # Once more, now that no other run can change it.
        check_output_dir(folder, resume=resume, overwrite=overwrite)
        existing = results_in(folder)
        # Each process has its own random sequence, for dropout.
        torch.manual_seed(settings.seed * 1000 + ranks.rank)
        model, classes, example = unwrapped(model), len(images.classes), _example(images)
        given_mode, settings = settings.batchnorm, replace(settings, batchnorm=batchnorm_mode(model, settings))
        given_output = output_layer(model, example)
        network, output = prepared_network(model, given_output, settings, classes, device=device, ranks=ranks)
        dropout = set_dropout(network, settings.dropout, example)
        classifier = Classifier.of(network, output, classes, device, ranks, amp=settings.amp, example=example)
        training_set = TrainingSet.of(images, classifier, settings, ranks)
        state, data, progress = None, run_data(network, images, ranks), Progress()
        skipped: Sequence[str] = ()
        if resume and existing:
            state = load_state(folder / STATE)
            settings = state.with_lr(settings)
            state.check_continues(settings, data, folder / STATE, started_from=checkpoint_of(folder))
            settings = state.with_epochs(settings, own=resume_epochs)
        summary = summarize(
            model,
            given_output,
            network,
            images,
            settings,
            device=device,
            dropout=str(dropout),
            steps=training_set.steps,
            unused=unused_settings(network, replace(training_set, settings=settings), given_mode),
        )
        settings = replace(settings, lr=summary.lr)
        optimizer, renorm_scheduler = make_optimizer(network, settings), make_renorm_scheduler(network, settings)
        step = TrainingStep(classifier, optimizer, renorm_scheduler, settings, ranks, StopCheck(stop, ranks))
        new_output = replaces_output(given_output, settings, classes)
        facts = {
            **(facts or {}),
            **run_facts(
                summary,
                images,
                ranks,
                output_replaced=new_output,
                output_kind=layer_kind(network.get_submodule(output)) if output else None,
            ),
        }
        if state:
            state.check_fits(network, optimizer, training_set.steps, folder / STATE)
            _check_best(state.progress, settings, folder, existing)
            state.restore(network, optimizer, renorm_scheduler, ranks, device)
            progress = state.progress
            skipped = state.skipped if progress.complete(settings) else ()  # which reads all images again otherwise
            summary = replace(summary, resumed=state.resumed(settings, training_set.steps))
            del state  # it has a second copy of the weights
        results = RunFolder(folder, images, facts, dropout=str(dropout), replaced=() if resume else existing)
        run = _Run(step, training_set, images, data, results, new_output, skipped, on_fit, on_trial, on_step)
        ranks.wait()  # no rank looks into the folder after the first rank changes it
        closing.enter_context(renorm_scheduler or nullcontext())
        _on_first_rank(lambda: results.restore_checkpoints(network, progress), ranks)
        if tensorboard and ranks.first:
            writer = TensorBoard(folder / TENSORBOARD, progress.history, progress.complete(settings))
            closing.callback(writer.close)
            on_epoch = writer.after_epoch(on_epoch)
        if on_start:
            on_start(summary)
        return run.train(progress, on_epoch)


def _check_arguments(
    model: nn.Module,
    images: ClassFolders,
    settings: TrainingSettings,
    callbacks: Mapping[str, object],
    flags: Mapping[str, object],
    *,
    folder: Path,
    tensorboard: Path | None,
) -> None:
    """Check what a run is given, and that TensorBoard's files can be written into the folder for them."""
    check_module(model)
    if not isinstance(images, ClassFolders):
        raise TrainingError(
            f"images is {images!r:.80}, not class folders; open them with bn_insert.images.open_class_folders(path)"
        )
    if not isinstance(settings, TrainingSettings):
        raise TrainingError(f"settings is {settings!r:.80}; pass TrainingSettings(epochs=10), for example")
    if is_same_file(folder, images.folder):
        raise TrainingError(f"{folder} is the folder with the images; choose another output folder")
    for part in ("train", "val"):
        if folder.resolve().is_relative_to((images.folder / part).resolve()):
            raise TrainingError(
                f"{folder} is in the folder with the images of each class; choose another output folder"
            )
    check_functions(TrainingError, callbacks)
    check_flags(TrainingError, **flags)
    if tensorboard:
        check_tensorboard(tensorboard)


def _folder(output_dir: StrPath) -> Path:
    if not isinstance(output_dir, str | PathLike) or not fspath(output_dir):
        raise TrainingError(f"output_dir is {output_dir!r:.40}; pass the path of a folder")
    return Path(output_dir)


@dataclass(frozen=True)
class _Run:
    """A run that is ready to start, or to continue."""

    step: TrainingStep
    training_set: TrainingSet
    images: ClassFolders
    data: Mapping[str, Any]
    results: RunFolder
    new_output: bool
    skipped_before: Collection[str]
    on_fit: Callable[[OutputFit], None] | None
    on_trial: Callable[[LearningRateTrial], None] | None
    on_step: Callable[[StepMetrics], None] | None

    def train(self, progress: Progress, on_epoch: Callable[[EpochMetrics], None] | None) -> FineTuning:
        """Train, and return the outcome; a complete run only gets its reports once more."""
        settings = self.step.settings
        if progress.complete(settings):
            skipped = self.skipped()
            _on_first_rank(lambda: self.results.rewrite(progress, asdict(settings), skipped), self.step.ranks)
        else:
            progress, settings = self._train(progress, on_epoch)
        health = run_health(
            [asdict(epoch) for epoch in progress.history],
            asdict(settings),
            with_image_counts(self.results.facts, self.images, self.skipped())["data"],
            output_fit=asdict(progress.fit) if progress.fit else None,
            trials=progress.trial_losses,
        )
        return FineTuning(progress.history, progress.best, not progress.complete(settings), tuple(health), settings.lr)

    def _train(
        self, progress: Progress, on_epoch: Callable[[EpochMetrics], None] | None
    ) -> tuple[Progress, TrainingSettings]:
        """Train, after the fit of the output layer and the choice of the learning rate, if they are not done yet.

        Returns:
            The progress, and the settings in effect.
        """
        step, settings = self.step, self.step.settings
        # Trials that did not come to a choice are reported again by those that do, or are void with a given rate.
        trials = list(progress.trials) if any(trial.chosen for trial in progress.trials) else []

        def on_trial(trial: LearningRateTrial) -> None:
            if trial.loss is not None:
                trials.append(trial)
            if self.on_trial:
                self.on_trial(trial)

        try:
            begun = progress.epoch or progress.step
            if settings.fit_output and settings.head is None and not progress.fit and not begun:
                fit = fit_starting_output(
                    step.classifier, self.training_set, self.images, step.stop, self.on_fit, new=self.new_output
                )
                progress = replace(progress, fit=fit)
                if fit.accuracy is not None:
                    accuracy = accuracy_after_reestimation(step.classifier, self.training_set, self.images, step.stop)
                    fit = replace(fit, reestimated_accuracy=accuracy)
                    progress = replace(progress, fit=fit)
                if self.on_fit:
                    self.on_fit(fit)
            if settings.lr is None:
                lr = choose_learning_rate(step, self.training_set, self.images, on_trial, complete=progress.trials)
                settings = replace(settings, lr=lr)
            progress = replace(progress, trials=tuple(trials))
            step = replace(step, settings=settings)
            loop = TrainingLoop(step, self.training_set, self.images, self._save, self.on_step, on_epoch)
            return loop.run(progress), settings
        except StoppedError:  # before the first step
            progress = replace(progress, trials=tuple(trials))
            self._save(progress, settings)
            return progress, settings
        except DivergenceError as error:
            advice = _advice(settings, self.results.facts, progress)
            raise DivergenceError(f"{error}: training diverged; {self.results.kept}. {advice}") from error

    def skipped(self) -> list[str]:
        """Return the files that no process could read, relative to the folder of the images; all ranks call this."""
        paths = [str(each.path.relative_to(self.images.folder)) for each in self.images.unreadable]
        gathered = self.step.ranks.gathered(paths)
        return sorted({*self.skipped_before, *(path for paths in gathered for path in paths)})

    def _save(self, progress: Progress, settings: TrainingSettings) -> None:
        classifier, renorm_scheduler, ranks = self.step.classifier, self.step.renorm_scheduler, self.step.ranks
        random = ranks.gathered(random_state(classifier.device))
        state = TrainingState(
            settings=asdict(settings),
            data=self.data,
            progress=progress,
            model=classifier.network.state_dict(),
            optimizer=self.step.optimizer.state_dict(),
            renorm=renorm_scheduler.state_dict() if renorm_scheduler else {},
            random=random,
            skipped=self.skipped(),
        )
        _on_first_rank(lambda: self.results.write(classifier.network, state), ranks)


def _advice(settings: TrainingSettings, facts: Mapping[str, Any], progress: Progress) -> str:
    """Return what to try after a run has diverged: also a rate whose trial had a higher, but finite loss."""
    if settings.lr is None:  # all trials diverged
        return "Check the preprocessing and the weights of the network."
    others = [f"a longer warm-up ({as_passed('lr_warmup_epochs', 1)})"] * (settings.lr_warmup_epochs < 1)
    others += ["a network with BatchNorm (bn-insert insert)"] * (not facts["batchnorms"])
    data = facts["data"]
    new_output = data["output_replaced"] or bool(progress.fit and progress.fit.fitted)
    return lower_rate_advice(
        asdict(settings),
        new_head=new_output and data["output_kind"] != "conv",
        others=others,
        epochs_for_trials=data.get("epochs_for_trials"),
    )


def _example(images: ClassFolders) -> Tensor:
    """Return a batch for which a network can be traced.

    Raises:
        ImageError: When no training image, or no validation image, can be read.
    """
    images.first_readable(images.val)  # else a run would end after its first epoch
    return images.first_readable(images.train).images.repeat(2, 1, 1, 1)  # a BatchNorm needs more than one image


def check_output_dir(
    output_dir: StrPath, *, resume: bool = False, overwrite: bool = False, inputs: Iterable[StrPath] = ()
) -> None:
    """Check before the work that `finetune` can write its results into a folder.

    Args:
        output_dir: As for `finetune`.
        resume: As for `finetune`.
        overwrite: As for `finetune`.
        inputs: Files that the run starts from. If one of them is a result in the folder, directly or through a link, it
            is refused even with `overwrite`. A run that is resumed may have been given its own checkpoint, because its
            weights come from state.pth.

    Raises:
        TrainingError: The folder contains results that are not to be replaced, or cannot be resumed from; or both
            resuming and replacing are asked for.
        CheckpointError: No file can be written into the folder.
    """
    check_flags(TrainingError, resume=resume, overwrite=overwrite)
    folder = _folder(output_dir)
    if resume and overwrite:
        raise TrainingError(
            f"{as_passed('resume', True)} continues the run in {folder}, and {as_passed('overwrite', True, '--force')} "
            "replaces it; leave out one of them"
        )
    existing = results_in(folder)
    check_folder(folder)
    replaced = () if resume else existing
    for each in inputs:
        if any(is_same_file(folder / name, each) for name in replaced):
            raise TrainingError(
                f"{folder} contains the input {each}, which the results would replace; choose another output folder, "
                f"or continue that run with {as_passed('resume', True)}"
            )
    if existing and not (resume or overwrite):
        resuming = f"continue with {as_passed('resume', True)}, " if STATE in existing else ""
        raise TrainingError(
            f"{folder} already contains results ({existing[0]}): {resuming}replace them with "
            f"{as_passed('overwrite', True, '--force')}, or choose another output folder"
        )
    if resume and existing and STATE not in existing:
        raise TrainingError(
            f"{folder} has no {STATE} to resume from; start again with {as_passed('overwrite', True, '--force')}"
        )


def _check_best(progress: Progress, settings: TrainingSettings, folder: Path, existing: Sequence[str]) -> None:
    """Raise TrainingError if a run would train on without the best.pth that later epochs are compared with."""
    best = None if BEST in existing else progress.best
    last = LAST in existing or progress.step == 0
    if best and not progress.complete(settings) and not (progress.last_is_best and last):
        copy = f", copy {LAST} to it to continue without that network," if LAST in existing else ""
        raise TrainingError(
            f"{folder / BEST} is missing: it was the network after epoch {best.epoch}, with the best validation "
            f"accuracy so far, {best.val_accuracy:.2%}, and only a later epoch that is better would write it again. "
            f"Put it back{copy} or start again with "
            f"{as_passed('overwrite', True, '--force')}"
        )


def _on_first_rank(work: Callable[[], None], ranks: Ranks) -> None:
    """Run `work` on the first rank; all ranks raise if it fails, so that none waits for one whose disk is full."""
    on_every_rank(lambda: work() if ranks.first else None)
