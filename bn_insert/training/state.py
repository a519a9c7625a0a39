"""What a training run needs to continue as if it had never stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from ..batchnorm.renorm_limits import RenormScheduler
from ..checkpoints.state_dict import TRAINING_STATE
from ..errors import CheckpointError, TrainingError, as_passed, out_of_memory
from ..images.class_folders import ClassFolders
from ..support.processes import Ranks
from ..support.safe_torch_load import load_torch_file
from ..support.schema import Count, Extent, Finite, Fraction, NotNegative, Positive, SchemaError, checked
from ..support.text import counted, first_line, printable
from .metrics import EpochMetrics, LearningRateTrial, OutputFit, Totals
from .progress import Progress
from .schedule import learning_rate
from .settings import TrainingSettings

_FORMAT = f"{TRAINING_STATE} 7"
_MAY_CHANGE = {"epochs", "patience"}  # a run may be made longer


@dataclass(frozen=True)
class TrainingState:
    """A run between two steps.

    Args:
        settings: The run's settings by name.
        data: What else has to be the same for the run to continue; see `run_data`.
        progress: How far the run has come.
        model: State dict of the network.
        optimizer: State dict of the optimizer.
        renorm: State dict of the RenormScheduler; empty without one.
        random: For each rank, the states of its generators.
        skipped: Image files that could not be read, relative to the folder of the images.
    """

    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    progress: Progress
    model: dict[str, Any]
    optimizer: dict[str, Any]
    renorm: dict[str, float]
    random: list[dict[str, Tensor]]
    skipped: Sequence[str] = ()

    def check_continues(
        self, settings: TrainingSettings, data: Mapping[str, Any], path: Path, *, started_from: str = ""
    ) -> None:
        """Raise TrainingError unless this state is of a run with these settings and data.

        A run that was stopped before its learning rate was chosen can continue with any.

        Args:
            settings: Those of the run that is to continue.
            data: See `run_data`.
            path: The file that the state was read from, for messages.
            started_from: The checkpoint that its run started from, for messages; empty if it is not known.
        """
        advice = "the same options and data, or choose another output folder"
        wanted = asdict(settings)
        may_change = _MAY_CHANGE if self._lr else {"lr", *_MAY_CHANGE}
        for name in sorted((self.settings.keys() | wanted.keys()) - may_change):
            before, now = self.settings.get(name), wanted.get(name)
            if before != now:
                raise TrainingError(
                    f"{path} belongs to another run: {as_passed(name)} was {_given(before)} and is now {_given(now)}; "
                    f"resume with {advice}"
                )
        for name in sorted(self.data.keys() | data.keys()):
            if self.data.get(name) != data.get(name):
                if name in {"layers", "classes"}:
                    advice = f"{started_from or 'the network'}, which it started from, and {advice}"
                what = {
                    "images": "image files (some were added, removed or renamed) differ",
                    "classes": "classes, or their order, differ",
                    "preprocessing": "preprocessing differs",
                    "processes": "number of processes differs",
                }.get(name, f"{name} differ")
                raise TrainingError(f"{path} belongs to another run: its {what} from this run's; resume with {advice}")

    @property
    def _lr(self) -> float | None:
        """Peak learning rate of the run; None if it was stopped before it was chosen."""
        return self.settings.get("lr")

    def with_lr(self, settings: TrainingSettings) -> TrainingSettings:
        """Return settings with the learning rate of this state's run, if they have none."""
        return replace(settings, lr=self._lr) if settings.lr is None else settings

    def with_epochs(self, settings: TrainingSettings, *, own: bool) -> TrainingSettings:
        """Return settings with at least as many epochs as are complete, or with the number of this state's run."""
        return replace(settings, epochs=self.settings["epochs"] if own else max(settings.epochs, self.progress.epoch))

    def resumed(self, settings: TrainingSettings, steps: int) -> str:
        """Return in words where a run with these settings continues, and what another number of epochs changes.

        Args:
            settings: The settings of the run from here on.
            steps: Steps per epoch.
        """
        done = self.progress.epoch * steps + self.progress.step
        where = f"after {counted(self.progress.epoch, 'epoch')}" if done else "at the first step"
        if self._lr is None and settings.lr is None:
            where = "before the first step"
        if self.progress.trials and self._lr is None and settings.lr is None:
            where = f"after {counted(len(self.progress.trials), 'trial')}"
        if self.progress.step:
            where = f"in epoch {self.progress.epoch + 1}, after {counted(self.progress.step, 'step')}"
        if self.progress.epoch >= settings.epochs:
            return f"{where}: the run is complete; to extend it, use a larger number of epochs ({as_passed('epochs')})"
        if self.progress.complete(settings):
            return (
                f"{where}: the run stopped early (patience); to continue, use a larger value ({as_passed('patience')})"
            )
        epochs = self.settings["epochs"]
        if epochs == settings.epochs or epochs < settings.lr_warmup_epochs:
            return where
        where += f", for {counted(settings.epochs, 'epoch')} in total instead of {epochs}"
        if done == 0:
            return where
        planned = replace(settings, epochs=epochs)
        rates = [learning_rate(each, done - 1, steps) for each in (planned, settings)]
        if rates[0] == rates[1]:
            return where
        following = learning_rate(settings, done, steps)
        return (
            f"{where}: the {settings.lr_scheduler} schedule now ends after epoch {settings.epochs}, so the learning "
            f"rate goes from {rates[0]:.3g} in the last step to {following:.3g} in the next"
        )

    def check_fits(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        path: Path,
    ) -> None:
        """Raise CheckpointError unless this state, read from `path`, can be restored.

        Args:
            network: The network of the run.
            optimizer: Its optimizer.
            steps: Steps per epoch.
            path: The file, for messages.
        """
        try:
            if self.progress.step > steps:
                raise SchemaError(f"the field step is {self.progress.step}, and an epoch has {steps} steps")
            _check_model(self.model, network)
            _check_optimizer(self.optimizer, optimizer)
            if len(self.random) != self.data["processes"]:
                raise SchemaError(f"the field random has {len(self.random)} entries, one is needed for each process")
        except SchemaError as error:
            raise _damaged(path, error) from error

    def restore(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        renorm_scheduler: RenormScheduler | None,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        """Put network, optimizer, scheduler and this process's generators into this state."""
        network.load_state_dict(self.model)
        optimizer.load_state_dict(self.optimizer)
        if renorm_scheduler and self.renorm:
            renorm_scheduler.load_state_dict(self.renorm)
        set_random_state(self.random[ranks.rank], device)


def run_data(network: nn.Module, images: ClassFolders, ranks: Ranks) -> dict[str, Any]:
    """Return what, apart from the settings, has to be the same for a run to continue."""
    return {
        "images": images.digest,
        "classes": list(images.classes),
        "processes": ranks.count,
        "preprocessing": images.transform.to_dict(),
        "layers": [f"{key} {tuple(tensor.shape)}" for key, tensor in network.state_dict().items()],
    }


def write_state(state: TrainingState, path: Path) -> None:
    """Write a state."""
    content = {
        "format": _FORMAT,
        "settings": dict(state.settings),
        "data": dict(state.data),
        "epoch": state.progress.epoch,
        "step": state.progress.step,
        "seen": tuple(state.progress.seen),
        "history": [asdict(epoch) for epoch in state.progress.history],
        "fit": state.progress.fit and asdict(state.progress.fit),
        "trials": [asdict(trial) for trial in state.progress.trials],
        "model": state.model,
        "optimizer": state.optimizer,
        "renorm": state.renorm,
        "random": state.random,
        "skipped": list(state.skipped),
    }
    with path.open("wb") as file:
        torch.save(content, file)


_Value = bool | int | float | str | None


class _Content(msgspec.Struct, forbid_unknown_fields=True):
    """The content of a file; of model, optimizer and random more is checked in `TrainingState.check_fits`."""

    format: str
    settings: dict[str, _Value]
    data: dict[str, str | int | list[str] | dict[str, int | list[Finite] | None]]
    epoch: Count
    step: Count
    seen: tuple[Finite, Finite, Finite]
    history: list[EpochMetrics]
    fit: OutputFit | None
    trials: list[LearningRateTrial]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    renorm: dict[Literal["distance", "expected"], NotNegative]
    random: list[dict[str, Any]]
    skipped: list[str]


def load_state(path: Path) -> TrainingState:
    """Read a state, on the CPU; no code from the file is ever run.

    Raises:
        CheckpointError: For a file that cannot be read, or is not such a state; the message names the wrong field.
    """
    try:
        with path.open("rb") as file:
            loaded = load_torch_file(file)
    except Exception as error:  # parsers raise anything for a damaged file
        if out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path} cannot be read: {printable(first_line(error))[:300]}; start again with "
            f"{as_passed('overwrite', True, '--force')}"
        ) from error
    if not isinstance(loaded, dict) or dict.get(loaded, "format") != _FORMAT:
        raise CheckpointError(
            f"{path} is not a training state written by this version of bn-insert; choose another output folder"
        )
    try:
        content: _Content = checked(dict(dict.items(loaded)), _Content)
        _check_progress(content)
        _check_settings(content)
        for number, states in enumerate(content.random):
            _check_random(states, f"random[{number}]")
    except SchemaError as error:
        raise _damaged(path, error) from error
    progress = Progress(
        content.epoch,
        content.step,
        Totals(*content.seen),
        tuple(content.history),
        content.fit,
        tuple(content.trials),
    )
    # The dicts themselves: the state dict of a model carries the versions of its modules.
    model, optimizer = loaded["model"], loaded["optimizer"]
    return TrainingState(
        content.settings,
        content.data,
        progress,
        model,
        optimizer,
        {str(name): value for name, value in content.renorm.items()},
        content.random,
        content.skipped,
    )


def _given(value: object) -> str:
    return "not given" if value is None else repr(value)


def _damaged(path: Path, error: SchemaError) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: {printable(error)[:300]}; start again with {as_passed('overwrite', True, '--force')}"
    )


def _check_settings(content: _Content) -> None:
    checked(content.settings.get("epochs"), Extent, "settings.epochs")
    lr = content.settings.get("lr")
    if lr is None and content.epoch == content.step == 0:
        return  # stopped before it was chosen
    checked(lr, Positive, "settings.lr")


def _check_progress(content: _Content) -> None:
    if content.epoch != len(content.history):
        raise SchemaError(
            f"the field epoch is {content.epoch}, and the field history has {len(content.history)} epochs"
        )
    for number, epoch in enumerate(content.history):
        for name, value in asdict(epoch).items():
            if not math.isfinite(value) or not 0 <= epoch.val_accuracy <= 1:
                raise SchemaError(f"the field history[{number}].{name} is {value}")
        if epoch.epoch != number + 1:
            raise SchemaError(f"the field history[{number}].epoch is {epoch.epoch}, not {number + 1}")
    _check_beginning(content)
    _, correct, images = content.seen
    if not 0 <= correct <= images or (images > 0) != (content.step > 0):
        raise SchemaError(f"the field seen is {content.seen}, which does not fit the {content.step} steps of the epoch")


def _check_beginning(content: _Content) -> None:
    lr = content.settings.get("lr")
    if lr is not None and content.trials and sum(trial.lr == lr for trial in content.trials) < 2:
        raise SchemaError("the field trials does not have the learning rate that was chosen")
    if fit := content.fit:
        for name in ("accuracy", "own_accuracy", "reestimated_accuracy"):
            checked(getattr(fit, name), Fraction | None, f"fit.{name}")
        measured = fit.fitted or fit.own_accuracy is not None or not (fit.new or fit.reason)
        if not fit.done or (measured and fit.accuracy is None) or (fit.new and not (fit.fitted or fit.reason)):
            raise SchemaError("the field fit is not the result of a fit")
        if not fit.reason.isprintable():
            raise SchemaError("the field fit.reason has characters that cannot be printed")
    for number, trial in enumerate(content.trials):
        checked(trial.lr, Positive, f"trials[{number}].lr")
        chosen = lr is not None and 0 < number == len(content.trials) - 1
        if trial.loss is None or math.isnan(trial.loss) or trial.chosen != chosen:
            raise SchemaError(f"the field trials[{number}] is not the result of a trial")


def _check_model(model: Mapping[str, Any], network: nn.Module) -> None:
    wanted = network.state_dict()
    for key in sorted(wanted.keys() ^ dict(model).keys()):
        raise SchemaError(f"the field model.{key} is " + ("missing" if key in wanted else "not one of the network"))
    for key, value in wanted.items():
        _check_tensor(model[key], value.shape, value.dtype, f"model.{key}")


def _check_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    own = optimizer.state_dict()
    if state.keys() != own.keys():
        raise SchemaError(f"the field optimizer must have the fields {', '.join(own)}")
    _check_groups(state["param_groups"], own["param_groups"])
    _check_moments(state["state"], optimizer)


def _check_groups(groups: object, own: list[dict[str, Any]]) -> None:
    if not isinstance(groups, list) or len(groups) != len(own):
        raise SchemaError("the field optimizer.param_groups does not have the groups of this run")
    for number, (group, wanted) in enumerate(zip(groups, own, strict=True)):
        place = f"optimizer.param_groups[{number}]"
        if not isinstance(group, dict) or group.keys() != wanted.keys():
            raise SchemaError(f"the field {place} must have the fields {', '.join(wanted)}")
        for name, value in wanted.items():
            if name == "lr":  # set in each step
                checked(group[name], Finite, f"{place}.lr")
            elif type(group[name]) is not type(value) or repr(group[name]) != repr(value):
                raise SchemaError(f"the field {place}.{name} is {group[name]!r:.60}, not {value!r:.60}")


def _check_moments(moments: object, optimizer: torch.optim.Optimizer) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(moments, dict):
        raise SchemaError("the field optimizer.state is not a dict")
    for key, values in moments.items():
        place = f"optimizer.state[{key!r:.20}]"
        if type(key) is not int or not 0 <= key < len(parameters) or not isinstance(values, dict):
            raise SchemaError(f"the field {place} does not belong to a parameter of the network")
        if values.keys() != _MOMENTS[type(optimizer)]:
            raise SchemaError(f"the field {place} must have the fields {', '.join(sorted(_MOMENTS[type(optimizer)]))}")
        for name, value in values.items():
            if name == "step":
                _check_tensor(value, torch.Size(), torch.float32, f"{place}.step")
            elif value is not None:
                _check_tensor(value, parameters[key].shape, parameters[key].dtype, f"{place}.{name}")


_MOMENTS = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}


def _check_random(states: Mapping[str, Any], place: str) -> None:
    if "cpu" not in states or not states.keys() <= {"cpu", "cuda"}:
        raise SchemaError(f"the field {place} must have the fields cpu and cuda")
    for name, value in states.items():
        size = torch.get_rng_state().shape if name == "cpu" else torch.Size([16])
        _check_tensor(value, size, torch.uint8, f"{place}.{name}")
    try:
        torch.Generator().set_state(states["cpu"])
    except RuntimeError as error:
        raise SchemaError(f"the field {place}.cpu is not the state of a generator: {first_line(error)}") from error


def _check_tensor(value: object, shape: torch.Size, dtype: torch.dtype, place: str) -> None:
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided or value.is_meta:
        raise SchemaError(f"the field {place} is not a dense tensor")
    if value.shape != shape or value.dtype != dtype:
        raise SchemaError(f"the field {place} is {tuple(value.shape)} {value.dtype}, not {tuple(shape)} {dtype}")


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of PyTorch's generators that training on a device draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put PyTorch's generators into the states that `random_state` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
