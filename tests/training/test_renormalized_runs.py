"""Fine-tuning with Batch Renormalization."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bn_insert import BatchRenorm2d, TrainingSettings, finetune, insert_batchnorm, save_checkpoint
from bn_insert.batchnorm.renorm_limits import RenormScheduler
from bn_insert.checkpoints.load_network import load_checkpoint
from bn_insert.demo import network_path
from bn_insert.errors import TrainingError
from bn_insert.images import ClassFolders
from bn_insert.support.processes import Ranks
from bn_insert.surgery.replace_output import output_layer
from bn_insert.training.preparation import prepared_network
from support.commands import AS_STORED, forked_ranks, run
from support.digits import copy_labelled_digits, open_digits
from support.networks import small_vgg

pytestmark = pytest.mark.usefixtures("one_thread", "no_charts")

BRIEF = TrainingSettings(opt="sgd", epochs=2, batch_size=8, lr=0.003, batchnorm="renorm", dropout=0.0, fit_output=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_labelled_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def digits(folder: Path) -> ClassFolders:
    """40 digits to train on and 20 to validate with."""
    return open_digits(folder)


@pytest.fixture(scope="module")
def network(digits: ClassFolders) -> nn.Module:
    batches = [batch.images for batch in digits.batches(digits.train, 20)]
    return insert_batchnorm(small_vgg(), batches)


def weights_in(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder / "last.pth").state_dict()


def stop_after(steps: int) -> Callable[[], bool]:
    """Return what says stop after this many steps; it is asked twice a step by a process alone."""
    asked = itertools.count(1)
    return lambda: next(asked) >= 2 * steps


@pytest.mark.parametrize("changes", [{"renorm_r_max": 1.1, "renorm_d_max": 0.2}, {"lr": 0.02}])
def test_a_run_that_was_stopped_comes_to_exactly_the_same_weights(
    network: nn.Module, digits: ClassFolders, tmp_path: Path, changes: dict[str, float]
) -> None:
    settings = replace(BRIEF, **changes)
    finetune(network, digits, tmp_path / "whole", settings)
    assert finetune(network, digits, tmp_path / "parts", settings, stop=stop_after(7)).interrupted
    finetune(network, digits, tmp_path / "parts", settings, resume=True)
    whole, parts = weights_in(tmp_path / "whole"), weights_in(tmp_path / "parts")
    assert whole.keys() == parts.keys() == network.state_dict().keys()
    assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []


def test_limits_change_what_is_learned_and_a_run_is_not_resumed_with_others(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    settings = replace(BRIEF, epochs=1)
    finetune(network, digits, tmp_path / "free", settings)
    finetune(network, digits, tmp_path / "limited", replace(settings, renorm_r_max=1.0, renorm_d_max=0.0))
    free, limited = weights_in(tmp_path / "free"), weights_in(tmp_path / "limited")
    assert not all(torch.equal(free[key], limited[key]) for key in free)
    with pytest.raises(TrainingError, match=r"renorm_r_max was 1\.0 and is now 2\.0"):
        changed = replace(settings, renorm_r_max=2.0, renorm_d_max=0.0)
        finetune(network, digits, tmp_path / "limited", changed, resume=True)


def test_a_scheduler_sets_the_limits_where_the_settings_name_none(
    network: nn.Module, digits: ClassFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lags: list[float] = []
    original = RenormScheduler.step

    def watched(scheduler: RenormScheduler) -> None:
        original(scheduler)
        lags.append(scheduler.lag)

    monkeypatch.setattr(RenormScheduler, "step", watched)
    settings = replace(BRIEF, batch_size=4, recalibrate=False, lr_scheduler="constant")
    finetune(network, digits, tmp_path / "low", replace(settings, lr=1e-5))
    assert len(lags) == 20
    assert max(lags) < 2
    lags.clear()
    finetune(network, digits, tmp_path / "high", replace(settings, lr=0.01))
    assert lags[0] < 2 < max(lags)
    assert "renorm" in torch.load(tmp_path / "high" / "state.pth")
    lags.clear()
    finetune(network, digits, tmp_path / "off", replace(settings, epochs=1, renorm_r_max=math.inf))
    assert lags == []


def test_the_tightest_limits_train_as_batchnorm(network: nn.Module, digits: ClassFolders, tmp_path: Path) -> None:
    settings = replace(BRIEF, epochs=1, batch_size=20, recalibrate=False)
    finetune(network, digits, tmp_path / "renorm", replace(settings, renorm_r_max=1.0, renorm_d_max=0.0))
    finetune(network, digits, tmp_path / "plain", replace(settings, batchnorm="train"))
    torch.testing.assert_close(weights_in(tmp_path / "renorm"), weights_in(tmp_path / "plain"), rtol=1e-3, atol=1e-4)


def test_batches_of_one_image_are_trained_on_and_none_is_left_out(digits: ClassFolders, tmp_path: Path) -> None:
    batches = [batch.images for batch in digits.batches(digits.train, 20)]
    network = insert_batchnorm(load_checkpoint(network_path()), batches)  # which knows the digits
    result = finetune(network, digits, tmp_path / "one", replace(BRIEF, epochs=1, batch_size=1, lr=1e-4))
    assert result.epochs[-1].step == 40
    assert result.epochs[-1].train_accuracy > 0.9
    result = finetune(network, digits, tmp_path / "last", replace(BRIEF, epochs=1, batch_size=13, lr=1e-4))
    assert result.epochs[-1].step == 4
    with pytest.raises(TrainingError, match="or batchnorm='renorm'"):
        finetune(network, digits, tmp_path / "plain", replace(BRIEF, batch_size=1, batchnorm="train"))


def test_frozen_features_do_not_renormalize(network: nn.Module) -> None:
    settings = replace(BRIEF, freeze_features=True)
    prepared: Any = prepared_network(
        network, output_layer(network), settings, 10, device=torch.device("cpu"), ranks=Ranks()
    )[0]
    assert not any(isinstance(module, BatchRenorm2d) for module in prepared.features.modules())
    assert any(type(module).__name__ == "BatchRenorm1d" for module in prepared.classifier.modules())


@pytest.mark.parametrize("changes", [{"train": "head"}, {"freeze_features": True}])
def test_a_run_in_which_little_or_nothing_renormalizes_needs_no_limits(
    network: nn.Module, digits: ClassFolders, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert finetune(network, digits, tmp_path, replace(BRIEF, epochs=1, batch_size=20, **changes)).epochs


def test_infinite_limits_are_in_the_report(network: nn.Module, digits: ClassFolders, tmp_path: Path) -> None:
    finetune(network, digits, tmp_path, replace(BRIEF, epochs=1, batch_size=20, renorm_r_max=math.inf))
    text = (tmp_path / "report.json").read_text()
    settings = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["runs"][0]["settings"]
    assert (settings["renorm_r_max"], settings["renorm_d_max"]) == ("inf", None)
    assert settings["batchnorm"] == "renorm"


@pytest.mark.parametrize(
    ("changes", "wording"),
    [
        ({"renorm_r_max": 0.5}, "renorm_r_max is 0.5; use 1 or more"),
        ({"renorm_d_max": -1.0}, "renorm_d_max is -1.0; use 0 or more"),
        ({"renorm_d_max": math.nan}, "renorm_d_max is nan"),
        ({"renorm_d_max": 1.0, "batchnorm": "train"}, "renorm_d_max is a limit of Batch Renormalization; leave it out"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], wording: str) -> None:
    with pytest.raises(TrainingError, match=wording):
        replace(BRIEF, **changes)


def test_two_processes_with_synchronized_statistics_are_one_with_twice_the_batch(
    network: nn.Module, folder: Path, tmp_path: Path
) -> None:
    save_checkpoint(network, tmp_path / "n.pth")
    options = ("finetune", tmp_path / "n.pth", folder, *AS_STORED, "--device", "cpu", "--epochs", 1, "--dropout", 0)
    options += (
        "--batchnorm",
        "renorm",
        "--renorm-r-max",
        1.5,
        "--renorm-d-max",
        0.5,
        "--no-recalibrate",
        "--no-fit-output",
        "--opt",
        "sgd",
    )
    alone = run(*options, "--output-dir", tmp_path / "alone", "-b", 8)
    assert alone.exit_code == 0, alone.output
    shared = (*options, "--output-dir", tmp_path / "shared", "-b", 4, "--sync-bn")
    done = forked_ranks(2, "-m", "bn_insert", *shared, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(weights_in(tmp_path / "shared"), weights_in(tmp_path / "alone"), rtol=1e-3, atol=1e-5)
