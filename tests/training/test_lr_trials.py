"""The learning rate that short trials choose, where the settings leave it open."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bn_insert import (
    DivergenceError,
    LearningRateTrial,
    RunSummary,
    TrainingSettings,
    finetune,
    insert_batchnorm,
)
from bn_insert.images import ClassFolders
from bn_insert.training import lr_trials
from support.digits import copy_labelled_digits, open_digits

pytestmark = pytest.mark.usefixtures("one_thread", "no_charts")

SHORT = TrainingSettings(epochs=4, batch_size=8)  # 20 steps, as many as a trial


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ClassFolders:
    """40 digits to train on and 20 to validate with."""
    return open_digits(copy_labelled_digits(tmp_path_factory.mktemp("digits")))


@pytest.fixture(scope="module")
def network(digits: ClassFolders) -> nn.Module:
    """A BatchNorm between two dense layers, and a dropout."""
    torch.manual_seed(3)
    plain = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10)
    )
    return insert_batchnorm(plain, [batch.images for batch in digits.batches(digits.train, 20)])


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / "state.pth", weights_only=True)["model"])


@pytest.fixture
def with_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[float, float]], list[float]]:
    """Replace trials by a table of losses, infinite for other rates; the list has the rates that were tried."""

    def use(losses: dict[float, float]) -> list[float]:
        tried: list[float] = []

        def run(trial: lr_trials._Trial) -> float:
            tried.append(trial.lr)
            return losses.get(trial.lr, math.inf)

        monkeypatch.setattr(lr_trials._Trial, "run", run)
        return tried

    return use


def chosen(digits: ClassFolders, folder: Path, settings: TrainingSettings = SHORT) -> float:
    """Return the learning rate of a run that was stopped at its first step."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    finetune(model, digits, folder, settings, stop=lambda: True)
    return float(torch.load(folder / "state.pth", weights_only=True)["settings"]["lr"])


@pytest.mark.parametrize(
    ("losses", "tried"),
    [
        ({0.01: 2, 0.003: 3, 0.03: 4}, [0.01, 0.003, 0.03]),
        ({0.01: 3, 0.003: 2, 0.001: 1, 0.0003: 2}, [0.01, 0.003, 0.001, 0.0003]),
        ({0.01: 3, 0.003: 4, 0.03: 2, 0.1: 1, 0.3: 2}, [0.01, 0.003, 0.03, 0.1, 0.3]),
        ({0.001: 2, 0.0003: 3}, [0.01, 0.003, 0.001, 0.0003]),
    ],
)
def test_the_search_follows_the_falling_loss_until_it_rises(
    digits: ClassFolders,
    tmp_path: Path,
    with_losses: Callable[[dict[float, float]], list[float]],
    losses: dict[float, float],
    tried: list[float],
) -> None:
    rates = with_losses(losses)
    assert chosen(digits, tmp_path) == min(losses, key=losses.__getitem__)
    assert rates == tried


def test_adamw_starts_at_a_lower_rate(
    digits: ClassFolders, tmp_path: Path, with_losses: Callable[[dict[float, float]], list[float]]
) -> None:
    rates = with_losses({0.0003: 1})
    assert chosen(digits, tmp_path, replace(SHORT, opt="adamw")) == 0.0003
    assert rates[0] == 0.0003


def test_a_run_shorter_than_a_trial_has_none(
    digits: ClassFolders, tmp_path: Path, with_losses: Callable[[dict[float, float]], list[float]]
) -> None:
    rates = with_losses({})
    assert chosen(digits, tmp_path, replace(SHORT, epochs=3)) == 0.01
    assert rates == []


def test_a_run_that_diverges_at_every_rate_writes_nothing(
    network: nn.Module,
    digits: ClassFolders,
    tmp_path: Path,
    with_losses: Callable[[dict[float, float]], list[float]],
) -> None:
    with_losses({})
    with pytest.raises(DivergenceError, match=r"no learning rate from 0\.01 down to 1e-06 kept the loss finite"):
        finetune(network, digits, tmp_path / "run", SHORT)
    assert not (tmp_path / "run").exists()


def test_trials_leave_no_trace_in_the_run(network: nn.Module, digits: ClassFolders, tmp_path: Path) -> None:
    trials: list[LearningRateTrial] = []
    summaries: list[RunSummary] = []
    settings = replace(SHORT, dropout=0.5, hflip=0.5)
    finetune(
        network, digits, tmp_path / "open", settings, on_start=summaries.append, on_trial=trials.append, device="cpu"
    )
    complete = [trial for trial in trials if trial.loss is not None]
    assert [trial.step for trial in trials if trial.lr == complete[0].lr] == [*range(1, 21), 20]
    rate = min(complete, key=lambda trial: trial.loss or 0).lr
    finetune(network, digits, tmp_path / "given", replace(settings, lr=rate), on_start=summaries.append)
    opened, given = (weights_of(tmp_path / name) for name in ("open", "given"))
    assert [name for name in given if not torch.equal(opened[name], given[name])] == []
    assert [summary.lr for summary in summaries] == [None, rate]


def test_the_loss_of_a_trial_is_that_of_a_run_as_long(network: nn.Module, digits: ClassFolders, tmp_path: Path) -> None:
    """A run of 20 steps with a warm-up of two: mean of its last validation loss and of its last ten training losses."""
    trials: list[LearningRateTrial] = []
    finetune(network, digits, tmp_path / "open", SHORT, on_trial=trials.append)
    first = next(trial for trial in trials if trial.loss is not None)
    steps: list[float] = []
    given = replace(SHORT, lr=first.lr, lr_warmup_epochs=0.4)
    run = finetune(network, digits, tmp_path / "given", given, on_step=lambda metrics: steps.append(metrics.loss))
    expected = (run.epochs[-1].val_loss + sum(steps[10:]) / 10) / 2
    # Re-estimated on the images in the order of the first epoch instead of the last.
    assert first.loss == pytest.approx(expected, rel=1e-3)


def test_a_run_stopped_in_a_trial_is_resumed_with_trials(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    polls = iter([False] * 3)
    stopped = finetune(network, digits, tmp_path / "parts", SHORT, stop=lambda: next(polls, True))
    assert stopped.interrupted
    assert stopped.epochs == ()
    finetune(network, digits, tmp_path / "parts", SHORT, resume=True)
    finetune(network, digits, tmp_path / "whole", SHORT)
    whole, parts = (weights_of(tmp_path / name) for name in ("whole", "parts"))
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_a_resumed_run_keeps_its_rate_without_further_trials(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    trials: list[LearningRateTrial] = []
    started: list[int] = []
    finetune(
        network,
        digits,
        tmp_path / "run",
        SHORT,
        on_step=lambda metrics: started.append(metrics.step),
        stop=lambda: len(started) >= 3,
    )
    rate = torch.load(tmp_path / "run" / "state.pth", weights_only=True)["settings"]["lr"]
    finetune(network, digits, tmp_path / "run", SHORT, resume=True, on_trial=trials.append)
    assert trials == []
    assert torch.load(tmp_path / "run" / "state.pth", weights_only=True)["settings"]["lr"] == rate
