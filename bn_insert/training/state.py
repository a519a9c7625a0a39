"""What a training run needs to continue as if it had never stopped."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, TrainingError
from ..images.class_folders import ClassFolders
from ..support.processes import Ranks
from .metrics import EpochMetrics, Totals
from .progress import Progress
from .settings import TrainingSettings

_FORMAT = "bn-insert training state 1"
_MAY_CHANGE = {"epochs"}  # a run may be made longer


@dataclass(frozen=True)
class TrainingState:
    """A run between two steps.

    Args:
        settings: The run's settings by name.
        data: What else has to be the same for the run to continue; see `run_data`.
        progress: How far the run has come.
        model: State dict of the network.
        optimizer: State dict of the optimizer.
        random: For each rank, the states of its generators.
    """

    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    progress: Progress
    model: dict[str, Any]
    optimizer: dict[str, Any]
    random: list[dict[str, Tensor]]

    def check_continues(self, settings: TrainingSettings, data: Mapping[str, Any], path: Path) -> None:
        """Raise TrainingError unless this state, read from `path`, is of a run with these settings and data."""
        advice = "resume with the same options and data, or choose another output folder"
        wanted = asdict(settings)
        for name in sorted((self.settings.keys() | wanted.keys()) - _MAY_CHANGE):
            before, now = self.settings.get(name), wanted.get(name)
            if before != now:
                raise TrainingError(
                    f"{path} belongs to another run: {name} was {before!r} and is now {now!r}; {advice}"
                )
        for name in sorted(self.data.keys() | data.keys()):
            if self.data.get(name) != data.get(name):
                raise TrainingError(f"{path} belongs to another run: its {name} differ from this run's; {advice}")

    def restore(self, network: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, device: torch.device) -> None:
        """Put network, optimizer and this process's generators into this state."""
        network.load_state_dict(self.model)
        optimizer.load_state_dict(self.optimizer)
        set_random_state(self.random[ranks.rank], device)


def run_data(network: nn.Module, images: ClassFolders, ranks: Ranks) -> dict[str, Any]:
    """Return what, apart from the settings, has to be the same for a run to continue."""
    return {
        "images": images.digest,
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
        "model": state.model,
        "optimizer": state.optimizer,
        "random": state.random,
    }
    with path.open("wb") as file:
        torch.save(content, file)


def load_state(path: Path) -> TrainingState:
    """Read a state, on the CPU; no code from the file is ever run.

    Raises:
        CheckpointError: For a file that cannot be read, or is not such a state.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise CheckpointError(
                f"{path} is not a training state written by this version of bn-insert; choose another output folder"
            )
        progress = Progress(
            epoch=content.pop("epoch"),
            step=content.pop("step"),
            seen=Totals(*content.pop("seen")),
            history=tuple(EpochMetrics(**epoch) for epoch in content.pop("history")),
        )
        return TrainingState(progress=progress, **content)
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read: {reason}; start again with overwrite=True (--force)") from error


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
