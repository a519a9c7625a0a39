"""States that are well-formed files and no states of this run: refused by the name of the wrong field."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from bn_insert import (
    BNInsertError,
    CheckpointError,
    LearningRateTrial,
    TrainingSettings,
    finetune,
    load_checkpoint,
    read_checkpoint,
)
from bn_insert.images.class_folders import ClassFolders, open_class_folders
from bn_insert.images.transform import Transform
from support.digits import copy_labelled_digits

pytestmark = pytest.mark.usefixtures("no_charts_in_module")

BRIEF = TrainingSettings(opt="sgd", epochs=2, batch_size=8, lr=0.003)
SAME = Transform(resize=None, crop=None, mean=(0.0,), std=(1.0,))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ClassFolders:
    return open_class_folders(copy_labelled_digits(tmp_path_factory.mktemp("digits")), SAME)


@pytest.fixture(scope="module")
def states(digits: ClassFolders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The contents of state.pth after an epoch and two steps."""
    result = {}
    opts: tuple[Literal["sgd", "adamw"], ...] = ("sgd", "adamw")
    for opt in opts:
        folder = tmp_path_factory.mktemp(opt)
        epochs: list[object] = []
        asked = itertools.count()
        settings = TrainingSettings(epochs=2, batch_size=8, lr=0.003, opt=opt)

        def stop(epochs: list[object] = epochs, asked: Iterator[int] = asked) -> bool:
            return bool(epochs) and next(asked) >= 4

        finetune(network(), digits, folder, settings, stop=stop, on_epoch=epochs.append)
        trials = [LearningRateTrial(0.003, 20, 20, 1.5), LearningRateTrial(0.003, 20, 20, 1.5, chosen=True)]
        content = torch.load(folder / "state.pth", weights_only=True)
        result[opt] = content | {"trials": [asdict(trial) for trial in trials]}
    return result


def replaced(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        *path, last = key.split("/")
        target: Any = content
        for part in path:
            target = target[int(part) if isinstance(target, list | tuple) or part.isdigit() else part]
        if value is ...:
            del target[last]
        else:
            target[int(last) if isinstance(target, list) or last.isdigit() else last] = value

    return change


NAN = math.nan
WRONG = [
    *(("epoch", value) for value in (1e18, 10**18, -1, "1", True, torch.tensor(1), ...)),
    *(("step", value) for value in (10**18, -1, 0, "x", ...)),
    *(("seen", value) for value in ((0.0, 0.0, 0.0), (NAN, 1.0, 8.0), (1.0, 9.0, 8.0), (1.0,), 3, ...)),
    *(("history", value) for value in ([], [1], None, [{}], ...)),
    *(("history/0/val_accuracy", value) for value in (NAN, 2.0, "1", ...)),
    *(("history/0/epoch", value) for value in (2, 1.5)),
    *(("settings", value) for value in ([], None, {"lr": torch.ones(2)}, ...)),
    *(("settings/lr", value) for value in (NAN, -0.003, 0.0, 10**400, "x", True, ...)),
    *(("data", value) for value in (1, {"layers": torch.ones(2)}, {"images": {"a": {"b": 1}}}, ...)),
    *(("model", value) for value in (1, {"x": torch.ones(1)}, ...)),
    *(("model/1.weight", value) for value in (torch.ones(2), torch.ones(8, 3072, dtype=torch.int8), None)),
    *(("optimizer", value) for value in (1, {"state": {}, "param_groups": []}, ...)),
    *(("optimizer/param_groups/0/momentum", value) for value in (NAN, 0.5, torch.ones(2), ...)),
    *(("optimizer/param_groups/0/lr", value) for value in (NAN, "x")),
    *(("optimizer/param_groups/0/params", value) for value in ([99], None)),
    *(("optimizer/state", value) for value in ({"0": {}}, {99: {}}, {0: {}}, {0: 1}, ...)),
    *(("optimizer/state/0/momentum_buffer", value) for value in (torch.ones(3), "x", ...)),
    *(("random", value) for value in ([{}], None, [{}, {}], ...)),
    *(("random/0/cpu", value) for value in (torch.zeros(5056, dtype=torch.uint8), torch.ones(3), 1, ...)),
    *(("settings/epochs", value) for value in (0, 1.5, ...)),
    *(("fit", value) for value in (1, {"seen": 0}, ...)),
    *(("fit/accuracy", value) for value in (None, 2.0, NAN)),
    *(("fit/own_accuracy", value) for value in (-1.0, "x")),
    ("fit/reestimated_accuracy", 2.0),
    *(("fit/reason", value) for value in (1, "\x1b[2J", "\ud800")),
    *((f"fit/{name}", 1) for name in ("done", "fitted", "new")),
    ("fit/done", False),
    *(("trials", value) for value in (1, [{}], ...)),
    *(("trials/0/lr", value) for value in (0.0, NAN, 0.03)),
    *(("trials/0/loss", value) for value in (None, NAN)),
    ("trials/1/chosen", False),
    ("extra", 1),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_field_is_named_and_nothing_is_trained(
    key: str, value: object, states: dict[str, dict[str, Any]], digits: ClassFolders, tmp_path: Path
) -> None:
    content = copy.deepcopy(states["sgd"])
    replaced(key, value)(content)
    torch.save(content, tmp_path / "state.pth")
    before = (tmp_path / "state.pth").read_bytes()
    with pytest.raises(BNInsertError, match=r"state\.pth (is damaged|belongs to another run)") as caught:
        finetune(network(), digits, tmp_path, BRIEF, resume=True)
    named = key.rsplit("/", maxsplit=1)[-1] if not key.startswith(("settings", "data")) else "state.pth"
    assert named in str(caught.value).replace("[0]", "/0") or key.split("/", maxsplit=1)[0] in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["state.pth"]
    assert (tmp_path / "state.pth").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        replaced("optimizer/state/0/exp_avg", torch.ones(2)),
        replaced("optimizer/state/0/step", torch.ones(2)),
        replaced("optimizer/state/0/exp_avg_sq", ...),
    ],
)
def test_wrong_moments_of_adamw_are_named(
    change: Callable[[dict[str, Any]], None],
    states: dict[str, dict[str, Any]],
    digits: ClassFolders,
    tmp_path: Path,
) -> None:
    content = copy.deepcopy(states["adamw"])
    change(content)
    torch.save(content, tmp_path / "state.pth")
    settings = TrainingSettings(epochs=2, batch_size=8, lr=0.003, opt="adamw")
    with pytest.raises(CheckpointError, match=r"state\.pth is damaged: the field optimizer\.state\[0\]"):
        finetune(network(), digits, tmp_path, settings, resume=True)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_state_as_it_was_written_continues(
    opt: Any, states: dict[str, dict[str, Any]], digits: ClassFolders, tmp_path: Path
) -> None:
    torch.save(states[opt], tmp_path / "state.pth")
    (tmp_path / "best.pth").touch()  # of the first epoch
    settings = TrainingSettings(epochs=2, batch_size=8, lr=0.003, opt=opt)
    assert len(finetune(network(), digits, tmp_path, settings, resume=True).epochs) == 2


def test_a_state_is_refused_as_a_checkpoint_whatever_its_name(
    states: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    torch.save(states["sgd"], tmp_path / "network.pth")
    wording = r"network\.pth is the state of a training run, for resume=True; after the first epoch, best\.pth"
    with pytest.raises(CheckpointError, match=wording):
        load_checkpoint(tmp_path / "network.pth", model=network)
    with pytest.raises(CheckpointError, match=wording):
        read_checkpoint(tmp_path / "network.pth", key="model")
