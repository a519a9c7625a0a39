"""What a training run needs to go on from where it was as if it had never ended."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, TrainingError
from .metrics import EpochMetrics
from .settings import TrainingSettings

_FORMAT = "bn-insert training state 1"
_MAY_CHANGE = {"epochs"}  # a run may be made longer


@dataclass
class TrainingState:
    """Where a run is, between two steps.

    epoch: from 0.  step: steps done in this epoch.  seen: sum of losses, images classified right, and images, of this
    epoch so far.  history: the epochs that are complete.  model, optimizer: their state dicts.  random: of each rank,
    its generators' states.  settings, data: what must be the same for the run to go on.
    """

    settings: dict[str, Any]
    data: dict[str, Any]
    epoch: int = 0
    step: int = 0
    seen: tuple[float, float, float] = (0.0, 0.0, 0.0)
    history: list[EpochMetrics] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    random: list[dict[str, Tensor]] = field(default_factory=list)

    @classmethod
    def beginning(cls, settings: TrainingSettings, data: Mapping[str, Any]) -> TrainingState:
        """Return the state before the first step."""
        return cls(asdict(settings), dict(data))

    @property
    def best(self) -> EpochMetrics | None:
        """The first epoch with the highest validation accuracy."""
        return max(self.history, key=lambda epoch: epoch.val_accuracy, default=None)

    def check_continues(self, other: TrainingState, path: Path) -> None:
        """Raise TrainingError unless a run begun like `other` would be the run that this state in `path` is of."""
        advice = "resume with the same options and data, or choose another output folder"
        for name in sorted((self.settings.keys() | other.settings.keys()) - _MAY_CHANGE):
            before, now = self.settings.get(name), other.settings.get(name)
            if before != now:
                raise TrainingError(f"{path} is of another run: {name} was {before!r} and is {now!r}; {advice}")
        for name in sorted(self.data.keys() | other.data.keys()):
            if self.data.get(name) != other.data.get(name):
                raise TrainingError(f"{path} is of another run: its {name} are not those of this one; {advice}")


def write_state(state: TrainingState, path: Path) -> None:
    """Write a state."""
    content = {each.name: getattr(state, each.name) for each in fields(TrainingState)}
    content |= {"format": _FORMAT, "history": [asdict(epoch) for epoch in state.history]}
    with path.open("wb") as file:
        torch.save(content, file)


def load_state(path: Path) -> TrainingState:
    """Read a state, on the CPU; no code from the file is ever run. Raises CheckpointError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise CheckpointError(
                f"{path} is no training state that this bn-insert writes; choose another output folder"
            )
        content["history"] = [EpochMetrics(**epoch) for epoch in content["history"]]
        content["seen"] = tuple(content["seen"])
        return TrainingState(**content)
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read: {reason}; begin again with overwrite=True (--force)") from error


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
