"""The learning rate that short trials choose, where the settings leave it open."""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from bn_insert.report import SMALL_DIFFERENCE
from bn_insert.report.run_verdicts import FIRST_TRIED
from bn_insert.support.processes import Ranks
from bn_insert.training import lr_trials
from bn_insert.training.classifier import Classifier
from bn_insert.training.state import load_state
from support.commands import forked_ranks
from support.digits import copy_labelled_digits, open_digits

pytestmark = pytest.mark.usefixtures("one_thread", "no_charts")

SHORT = TrainingSettings(opt="sgd", epochs=4, batch_size=8, fit_output=False)  # 20 steps, as many as a trial


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

        def run(trial: lr_trials._Trial) -> LearningRateTrial:
            tried.append(trial.lr)
            result = LearningRateTrial(trial.lr, 20, 20, losses.get(trial.lr, math.inf))
            trial.report(result)
            return result

        monkeypatch.setattr(lr_trials._Trial, "run", run)
        return tried

    return use


def dense() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))


def chosen(digits: ClassFolders, folder: Path, settings: TrainingSettings = SHORT) -> float:
    """Return the learning rate of a run that was stopped at its first step."""
    run = finetune(dense(), digits, folder, settings, stop=lambda: True)
    assert run.lr is not None
    assert load_state(folder / "state.pth").settings["lr"] == run.lr
    return run.lr


@pytest.mark.parametrize(("trained", "highest"), [("all", 0.03), ("head", 0.1)])
def test_all_weights_are_never_trained_at_more_than_a_certain_rate(
    digits: ClassFolders,
    tmp_path: Path,
    with_losses: Callable[[dict[float, float]], list[float]],
    trained: Any,
    highest: float,
) -> None:
    rates = with_losses({0.003: 4, 0.01: 3, 0.03: 2, 0.1: 1})
    assert chosen(digits, tmp_path, replace(SHORT, train=trained)) == highest
    assert (0.1 in rates) == (trained == "head")


@pytest.mark.parametrize(
    ("losses", "tried"),
    [
        ({0.003: 2, 0.001: 3, 0.01: 4}, [0.003, 0.01, 0.001]),
        ({0.003: 3, 0.01: 4, 0.001: 2, 0.0003: 1, 0.0001: 2}, [0.003, 0.01, 0.001, 0.0003, 0.0001]),
        ({0.003: 3, 0.001: 4, 0.01: 1, 0.03: 2}, [0.003, 0.01, 0.03]),
        ({0.0003: 2, 0.0001: 3}, [0.003, 0.001, 0.0003, 0.0001]),
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


@pytest.mark.parametrize(
    ("neighbor", "loss", "rate"), [(0.001, 1.81, 0.003), (0.001, 1.79, 0.001), (0.01, 1.95, 0.003), (0.01, 1.93, 0.01)]
)
def test_a_lower_rate_needs_a_loss_that_is_lower_by_ten_percent_and_a_higher_one_by_three(
    digits: ClassFolders,
    tmp_path: Path,
    with_losses: Callable[[dict[float, float]], list[float]],
    *,
    neighbor: float,
    loss: float,
    rate: float,
) -> None:
    with_losses({0.003: 2, neighbor: loss})
    assert chosen(digits, tmp_path) == rate


def test_the_margins_are_those_that_are_printed() -> None:
    higher, lower = (f"{lr_trials._MARGINS[direction]:.0%}" for direction in (1, -1))
    assert f"a higher learning rate must lower the loss by {higher}, a lower one by {lower}" == SMALL_DIFFERENCE


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
    summaries: list[RunSummary] = []
    short = replace(SHORT, epochs=3)
    for settings, rate in ((short, 0.003), (replace(short, opt="adamw"), 0.0003)):
        folder = tmp_path / settings.opt
        run = finetune(dense(), digits, folder, settings, stop=lambda: True, on_start=summaries.append)
        assert run.lr == summaries[-1].lr == rate
    assert rates == []


def test_a_run_that_diverges_at_every_rate_writes_nothing(
    network: nn.Module,
    digits: ClassFolders,
    tmp_path: Path,
    with_losses: Callable[[dict[float, float]], list[float]],
) -> None:
    with_losses({})
    with pytest.raises(DivergenceError, match=r"at any learning rate from 0\.003 to 1e-06: .* Check"):
        finetune(network, digits, tmp_path / "run", SHORT)
    assert not (tmp_path / "run").exists()


def test_trials_leave_no_trace_in_the_run(network: nn.Module, digits: ClassFolders, tmp_path: Path) -> None:
    trials: list[LearningRateTrial] = []
    summaries: list[RunSummary] = []
    settings = replace(SHORT, dropout=0.5, hflip=0.5)
    rate = finetune(network, digits, tmp_path / "open", settings, on_start=summaries.append, on_trial=trials.append).lr
    assert [trial.lr for trial in trials if trial.chosen] == [rate]
    complete = [trial for trial in trials if trial.loss is not None and not trial.chosen]
    trials = [trial for trial in trials if not trial.chosen]
    assert [trial.step for trial in trials if trial.lr == complete[0].lr] == [*range(1, 21), 20]
    finetune(network, digits, tmp_path / "given", replace(settings, lr=rate), on_start=summaries.append)
    opened, given = (weights_of(tmp_path / name) for name in ("open", "given"))
    assert [name for name in given if not torch.equal(opened[name], given[name])] == []
    (run,) = json.loads((tmp_path / "open" / "report.json").read_text())["runs"]
    assert [(trial["lr"], trial["loss"]) for trial in run["lr_trials"]] == [(each.lr, each.loss) for each in complete]
    assert run["overview"]["Learning rate"].startswith(f"{rate:g}, chosen by trials of 0.003 (loss ")
    assert load_state(tmp_path / "open" / "state.pth").progress.trials[:-1] == tuple(complete)
    assert [summary.lr for summary in summaries] == [None, rate]


def test_the_time_of_trials_and_run_is_estimated_from_the_third_step_on(
    network: nn.Module, digits: ClassFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(1000))
    monkeypatch.setattr(lr_trials.time, "monotonic", lambda: float(next(seconds)))
    trials: list[LearningRateTrial] = []
    finetune(network, digits, tmp_path, SHORT, on_trial=trials.append, stop=lambda: len(trials) >= 22)
    # A second a step: three trials, and 4 epochs of 5 steps, with 40 + 20 images to run on after 40 to train on.
    run = 4 * (5 + 5 * 1.5 / 3)
    first, second = (trials[:20], trials[21:])
    assert [trial.seconds_left for trial in first[:3]] == [None, None, 57 + run]
    assert first[-1].seconds_left == 40 + run
    assert second[0].seconds_left is None


def test_the_loss_of_a_trial_is_that_of_a_run_as_long(network: nn.Module, digits: ClassFolders, tmp_path: Path) -> None:
    """A run of 20 steps with a warm-up of two: mean of its last validation loss and of its last ten training losses."""
    trials: list[LearningRateTrial] = []
    finetune(network, digits, tmp_path / "open", SHORT, on_trial=trials.append)
    first = next(trial for trial in trials if trial.loss is not None)
    steps: list[float] = []
    given = replace(SHORT, lr=first.lr, lr_warmup_epochs=0.4, lr_scheduler="constant")
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


def test_trials_that_are_complete_are_not_repeated_when_a_run_is_resumed(digits: ClassFolders, tmp_path: Path) -> None:
    trials: list[LearningRateTrial] = []
    summaries: list[RunSummary] = []

    def second_trial() -> bool:
        return len(trials) > 25

    stopped = finetune(dense(), digits, tmp_path / "parts", SHORT, on_trial=trials.append, stop=second_trial)
    assert stopped.lr is None
    (first,) = (trial for trial in trials if trial.loss is not None)
    assert load_state(tmp_path / "parts" / "state.pth").progress.trials == (first,)
    trials.clear()
    finetune(dense(), digits, tmp_path / "parts", SHORT, resume=True, on_trial=trials.append, on_start=summaries.append)
    assert [trial for trial in trials if trial.lr == first.lr and not trial.chosen] == [first]
    assert summaries[0].resumed == "after 1 trial"
    finetune(dense(), digits, tmp_path / "whole", SHORT)
    whole, parts = (load_state(tmp_path / name / "state.pth") for name in ("whole", "parts"))
    assert parts.progress.trials == whole.progress.trials
    assert [name for name in whole.model if not torch.equal(whole.model[name], parts.model[name])] == []


def test_a_given_learning_rate_ends_the_trials_of_a_run_that_is_resumed(digits: ClassFolders, tmp_path: Path) -> None:
    trials: list[LearningRateTrial] = []
    finetune(dense(), digits, tmp_path, SHORT, on_trial=trials.append, stop=lambda: len(trials) > 25)
    run = finetune(dense(), digits, tmp_path, replace(SHORT, lr=0.003), resume=True)
    assert run.lr == 0.003
    assert load_state(tmp_path / "state.pth").progress.trials == ()


def test_a_run_stopped_in_a_trial_is_resumed_with_other_epochs_or_a_learning_rate(
    digits: ClassFolders, tmp_path: Path
) -> None:
    assert finetune(dense(), digits, tmp_path, SHORT, stop=lambda: True).lr is None
    summaries: list[RunSummary] = []
    longer = replace(SHORT, epochs=5)
    run = finetune(dense(), digits, tmp_path, longer, resume=True, stop=lambda: True, on_start=summaries.append)
    assert run.lr is None
    assert summaries[0].resumed == "before the first step, for 5 epochs in total instead of 4"
    given = replace(SHORT, lr=0.003)
    assert finetune(dense(), digits, tmp_path, given, resume=True, stop=lambda: True).lr == 0.003


def test_a_diverged_trial_reports_the_steps_before_it_diverged(
    digits: ClassFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lr_trials, "_rate", lambda index: 1e38 if index == -5 else 10.0**index)
    trials: list[LearningRateTrial] = []
    finetune(dense(), digits, tmp_path, SHORT, on_trial=trials.append, stop=lambda: len(trials) > 20)
    steps = len([trial for trial in trials if trial.lr == 1e38 and trial.loss is None])
    assert 0 < steps < 20
    assert trials[steps] == LearningRateTrial(1e38, steps, 20, math.inf)


def test_the_network_of_a_trial_is_freed_before_the_next(
    digits: ClassFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By reference counts alone: the garbage collector does not run when a GPU's memory gets scarce."""
    copies: list[weakref.ref[nn.Module]] = []
    copied = Classifier.copied

    def recorded(classifier: Classifier, ranks: Ranks) -> Classifier:
        assert [copy for copy in copies if copy()] == []
        result = copied(classifier, ranks)
        copies.append(weakref.ref(result.network))
        return result

    monkeypatch.setattr(Classifier, "copied", recorded)
    gc.disable()
    try:
        finetune(dense(), digits, tmp_path, SHORT, stop=lambda: len(copies) > 2)
    finally:
        gc.enable()
    assert len(copies) > 2


RANKS = """
import json
import torch.distributed as dist
from bn_insert import Ranks, TrainingSettings, finetune
from bn_insert.images import Transform, open_class_folders
from bn_insert.training import lr_trials
from torch import nn

lr_trials.TRIAL_STEPS = 2
dist.init_process_group("gloo")
first = Ranks.current().first
trials = []
images = open_class_folders("digits", Transform(None, None, (0.0,), (1.0,)))
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
model(next(images.batches(images.train, 4)).images)

def result(folder, stop):
    trials.clear()
    settings = TrainingSettings(epochs=1, batch_size=4, fit_output=False)
    run = finetune(model, images, folder, settings, stop=stop, on_trial=trials.append)
    return [run.lr, run.interrupted, [(trial.lr, trial.step, trial.loss) for trial in trials]]

results = [result("whole", None), result("stopped", lambda: not first and len(trials) >= 4)]
print(json.dumps(results))
dist.destroy_process_group()
"""


def test_two_ranks_choose_the_same_rate_and_stop_together_in_a_trial(tmp_path: Path) -> None:
    folder = copy_labelled_digits(tmp_path / "digits", train=2, val=1)
    for unused in sorted((folder / "val").iterdir())[1:]:
        shutil.rmtree(unused)  # the second rank has no share of the one image left
    (tmp_path / "script.py").write_text(RANKS)
    done = forked_ranks(2, "script.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == second
    (rate, interrupted, trials), stopped = first
    assert (rate in [trial[0] for trial in trials], interrupted) == (True, False)
    assert stopped == [None, True, trials[:4]]


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
    rate = load_state(tmp_path / "run" / "state.pth").settings["lr"]
    run = finetune(network, digits, tmp_path / "run", SHORT, resume=True, on_trial=trials.append)
    assert trials == []
    assert run.lr == rate
    assert load_state(tmp_path / "run" / "state.pth").settings["lr"] == rate


def test_verdicts_know_the_learning_rates_at_which_trials_start() -> None:
    assert {
        opt: lr_trials.untried_learning_rate(TrainingSettings(opt=opt, epochs=1), steps=1) for opt in FIRST_TRIED
    } == FIRST_TRIED
