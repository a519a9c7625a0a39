"""The training loop, called from Python."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from bn_insert import (
    EpochMetrics,
    RunSummary,
    StepMetrics,
    TrainingSettings,
    finetune,
    insert_batchnorm,
    inserted_batchnorms,
)
from bn_insert.batchnorm.modes import set_batchnorm_mode
from bn_insert.checkpoints.load_network import load_checkpoint
from bn_insert.checkpoints.read_file import read_checkpoint
from bn_insert.demo import network_path
from bn_insert.errors import CheckpointError, DivergenceError, ImageError, TrainingError
from bn_insert.graph.sites import Placement
from bn_insert.images import ClassFolders, open_class_folders
from bn_insert.support import files
from bn_insert.support.processes import Ranks
from bn_insert.surgery.replace_output import output_layer, replace_head, replace_output
from bn_insert.training.dropout import set_dropout
from bn_insert.training.preparation import batchnorm_mode, prepared_network
from bn_insert.training.progress import Progress
from bn_insert.training.schedule import learning_rate
from bn_insert.training.state import TrainingState, load_state
from support.digits import IDENTITY_TRANSFORM, copy_labelled_digits, open_digits
from support.networks import OutputFirst, randomised, small_vgg

# Charts are drawn only where they matter: by the tests of what a run leaves behind, and through the command line.
pytestmark = pytest.mark.usefixtures("one_thread", "no_charts_in_module")

BRIEF = TrainingSettings(opt="sgd", epochs=2, batch_size=8, lr=0.003, fit_output=False)
FILES = {"metrics.csv", "curves.png", "best.pth", "last.pth", "classes.txt", "state.pth"}
FILES |= {"report.html", "report.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_labelled_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def digits(folder: Path) -> ClassFolders:
    """40 digits to train on and 20 to validate with."""
    return open_digits(folder)


@pytest.fixture(scope="module")
def network(digits: ClassFolders) -> nn.Module:
    """A small VGG with BatchNorm behind every layer, and its Dropout."""
    batches = [batch.images for batch in digits.batches(digits.train, 20)]
    return insert_batchnorm(small_vgg(), batches)


def weights_in(folder: Path, name: str = "last.pth", model: nn.Module | None = None) -> dict[str, Tensor]:
    return load_checkpoint(folder / name, model=model).state_dict()


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def stop_after(steps: int) -> Callable[[], bool]:
    """Return what says stop after so many steps; it is asked twice a step by a process alone."""
    asked = itertools.count(1)
    return lambda: next(asked) >= 2 * steps


def dense_network(classes: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


# What a run leaves behind


def test_a_run_writes_metrics_curves_checkpoints_and_its_state(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    seen: list[EpochMetrics] = []
    result = finetune(network, digits, tmp_path / "run", BRIEF, on_epoch=seen.append)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert result.epochs == tuple(seen)
    assert not result.interrupted
    assert result.best == max(seen, key=lambda epoch: epoch.val_accuracy)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "5"), ("2", "10")]
    assert [float(row["val_loss"]) for row in rows] == [epoch.val_loss for epoch in seen]
    assert (tmp_path / "run" / "classes.txt").read_text().split() == [str(digit) for digit in range(10)]


def test_checkpoints_load_with_their_transform_and_give_the_accuracy_that_was_measured(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    result = finetune(network, digits, tmp_path, BRIEF)
    model = load_checkpoint(tmp_path / "last.pth")
    settings = read_checkpoint(tmp_path / "last.pth").settings
    assert settings is not None
    assert settings.transform == IDENTITY_TRANSFORM.to_dict()
    assert settings.classes == digits.classes
    (batch,) = digits.batches(digits.val, 100)
    with torch.inference_mode():
        accuracy = (model(batch.images).argmax(1) == batch.labels).double().mean().item()
    assert accuracy == result.epochs[-1].val_accuracy


def test_the_given_model_and_the_random_state_stay_as_they_are(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    before, state = {key: tensor.clone() for key, tensor in network.state_dict().items()}, torch.get_rng_state()
    finetune(network, digits, tmp_path, replace(BRIEF, epochs=1))
    assert_same_weights(before, network.state_dict())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_running_statistics_are_those_of_the_training_images(digits: ClassFolders, tmp_path: Path) -> None:
    finetune(dense_network(), digits, tmp_path, replace(BRIEF, epochs=1, batch_size=40))
    weights = load_checkpoint(tmp_path / "last.pth", model=dense_network()).state_dict()
    (batch,) = digits.batches(digits.train, 40)
    values = batch.images.flatten(1).double() @ weights["1.weight"].double().T + weights["1.bias"].double()
    torch.testing.assert_close(weights["2.running_mean"].double(), values.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights["2.running_var"].double(), values.var(0), rtol=1e-5, atol=1e-6)


# Resuming


@pytest.fixture(scope="module")
def uninterrupted(
    network: nn.Module, digits: ClassFolders, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    with torch.random.fork_rng(devices=()):
        torch.set_num_threads(1)
        finetune(network, digits, folder, replace(BRIEF, hflip=0.5))
    return weights_in(folder)


@pytest.mark.parametrize("steps", [1, 5, 7])
def test_a_run_that_was_stopped_anywhere_comes_to_exactly_the_same_weights(
    network: nn.Module, digits: ClassFolders, tmp_path: Path, uninterrupted: dict[str, Tensor], steps: int
) -> None:
    settings = replace(BRIEF, hflip=0.5)
    stopped = finetune(network, digits, tmp_path, settings, stop=stop_after(steps))
    assert stopped.interrupted
    assert load_state(tmp_path / "state.pth").progress.step == min(steps, 5)
    torch.manual_seed(1234)  # another process would begin with another random state
    result = finetune(network, digits, tmp_path, settings, resume=True)
    assert not result.interrupted
    assert [epoch.step for epoch in result.epochs] == [5, 10]
    assert_same_weights(weights_in(tmp_path), uninterrupted)


@pytest.mark.parametrize("changes", [{"opt": "adamw", "lr": 1e-4, "amp": True}, {"recalibrate": False}])
def test_resuming_is_exact_with_other_settings_too(
    network: nn.Module, digits: ClassFolders, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = replace(BRIEF, **changes)
    finetune(network, digits, tmp_path / "whole", settings)
    finetune(network, digits, tmp_path / "parts", settings, stop=stop_after(7))
    finetune(network, digits, tmp_path / "parts", settings, resume=True)
    assert_same_weights(weights_in(tmp_path / "parts"), weights_in(tmp_path / "whole"))


def test_a_complete_run_is_resumed_to_nothing_and_more_epochs_lengthen_it(digits: ClassFolders, tmp_path: Path) -> None:
    settings = replace(BRIEF, epochs=1)
    first = finetune(dense_network(), digits, tmp_path, settings)
    assert finetune(dense_network(), digits, tmp_path, settings, resume=True) == first
    told: list[RunSummary] = []
    more = replace(settings, epochs=3)
    longer = finetune(dense_network(), digits, tmp_path, more, resume=True, on_start=told.append)
    assert [epoch.epoch for epoch in longer.epochs] == [1, 2, 3]
    rates = f"{learning_rate(settings, 4, 5):.3g} in the last step to {learning_rate(more, 5, 5):.3g} in the next"
    assert [summary.resumed for summary in told] == [
        "after 1 epoch, for 3 epochs in total instead of 1: the cosine schedule now ends after epoch 3, so "
        f"the learning rate goes from {rates}"
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "in epoch 2, after 2 steps"),
        ({"lr_scheduler": "constant", "epochs": 4}, "in epoch 2, after 2 steps, for 4 epochs in total instead of 2"),
        (
            {"epochs": 1},
            "in epoch 2, after 2 steps: the run is complete; to extend it, use a larger number of epochs (epochs)",
        ),
    ],
)
def test_a_resumed_run_tells_where_it_continues(changes: dict[str, Any], expected: str) -> None:
    progress = Progress(epoch=1, step=2)
    state = TrainingState(asdict(BRIEF), {}, progress, {}, {}, {}, [])
    assert state.resumed(replace(BRIEF, **changes), 5) == expected


def test_a_run_without_its_best_network_is_not_trained_on_unless_that_is_the_last_one(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    done: list[EpochMetrics] = []
    finetune(network, digits, tmp_path, BRIEF, on_epoch=done.append, stop=lambda: bool(done))
    state = load_state(tmp_path / "state.pth")
    assert (state.progress.epoch, state.progress.step > 0) == (1, True)
    best = weights_in(tmp_path, "best.pth")
    (tmp_path / "best.pth").unlink()
    finetune(network, digits, tmp_path, BRIEF, resume=True, stop=lambda: True)
    assert all(torch.equal(value, best[key]) for key, value in weights_in(tmp_path, "best.pth").items())
    (tmp_path / "best.pth").unlink()
    (tmp_path / "last.pth").unlink()
    with pytest.raises(
        TrainingError, match=r"best.pth is missing: it was the network after epoch 1, .* Put it back"
    ) as e:
        finetune(network, digits, tmp_path, BRIEF, resume=True, on_step=lambda _: pytest.fail("it trains"))
    assert "last.pth" not in str(e.value)


def test_resuming_in_an_empty_folder_begins(digits: ClassFolders, tmp_path: Path) -> None:
    assert len(finetune(dense_network(), digits, tmp_path, BRIEF, resume=True).epochs) == 2


def test_resuming_with_other_settings_or_images_names_what_differs(
    folder: Path, digits: ClassFolders, tmp_path: Path
) -> None:
    finetune(dense_network(), digits, tmp_path / "run", BRIEF, facts={"checkpoint": {"path": "net.pth"}})
    with pytest.raises(TrainingError, match=r"state.pth belongs to another run: lr was 0.003 and is now 0.1"):
        finetune(dense_network(), digits, tmp_path / "run", replace(BRIEF, lr=0.1), resume=True)
    other = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with pytest.raises(TrainingError, match=r"its layers differ .* resume with net.pth, which it started from, and"):
        finetune(other, digits, tmp_path / "run", BRIEF, resume=True)
    reversed_classes = digits.in_order(digits.classes[::-1])
    with pytest.raises(TrainingError, match="its classes, or their order, differ from this run's"):
        finetune(dense_network(), reversed_classes, tmp_path / "run", BRIEF, resume=True)
    other_transform = open_class_folders(folder, replace(IDENTITY_TRANSFORM, mean=(0.5,)))
    with pytest.raises(TrainingError, match="its preprocessing differs from this run's"):
        finetune(dense_network(), other_transform, tmp_path / "run", BRIEF, resume=True)
    (tmp_path / "run" / "report.json").write_text("damaged")
    with pytest.raises(TrainingError, match="resume with the network, which it started from, and"):
        finetune(other, digits, tmp_path / "run", BRIEF, resume=True)
    shutil.copytree(folder, tmp_path / "fewer", symlinks=True)
    next((tmp_path / "fewer" / "train" / "3").iterdir()).unlink()
    with pytest.raises(TrainingError, match=r"its image files \(some were added, removed or renamed\) differ from"):
        finetune(dense_network(), open_digits(tmp_path / "fewer"), tmp_path / "run", BRIEF, resume=True)


def test_results_are_neither_replaced_nor_mixed_without_being_asked_for(digits: ClassFolders, tmp_path: Path) -> None:
    finetune(dense_network(), digits, tmp_path, BRIEF)
    with pytest.raises(TrainingError, match=r"already contains results .*resume=True.*overwrite=True"):
        finetune(dense_network(), digits, tmp_path, BRIEF)
    (tmp_path / "notes.txt").write_text("mine")
    result = finetune(dense_network(), digits, tmp_path, replace(BRIEF, epochs=1), overwrite=True)
    assert len(result.epochs) == 1
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"notes.txt"}


def test_a_damaged_state_says_so(digits: ClassFolders, tmp_path: Path) -> None:
    for content in (b"", b"no state", b"\x80\x02}q\x00."):
        (tmp_path / "state.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"state.pth (cannot be read|is not a training state)"):
            finetune(dense_network(), digits, tmp_path, BRIEF, resume=True)
    (tmp_path / "state.pth").unlink()
    (tmp_path / "metrics.csv").touch()
    with pytest.raises(TrainingError, match=r"has no state.pth to resume from"):
        finetune(dense_network(), digits, tmp_path, BRIEF, resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="is not a folder"):
        finetune(dense_network(), digits, tmp_path / "file", BRIEF)


# Replacing another run


def fail_to_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the rename of one result fail, as on a file system that has gone."""
    rename = Path.replace

    def replace_unless_named(self: Path, target: Path) -> Path:
        if Path(target).name == name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace_unless_named)


@pytest.mark.parametrize("name", ["classes.txt", "state.pth"])
def test_a_rename_that_fails_leaves_the_replaced_run_to_be_resumed_exactly(
    digits: ClassFolders, tmp_path: Path, name: str
) -> None:
    settings = replace(BRIEF, lr_scheduler="constant")  # so that the first epoch is the same in longer runs
    model, run, whole = dense_network(), tmp_path / "run", tmp_path / "whole"
    finetune(model, digits, run, replace(settings, epochs=1))
    before = weights_in(run, "best.pth", model)
    with pytest.MonkeyPatch.context() as patch:
        fail_to_name(patch, name)
        with pytest.raises(CheckpointError, match=rf"{name}: Input/output error"):
            finetune(model, digits, run, replace(settings, lr=0.1, epochs=1), overwrite=True)
    assert_same_weights(weights_in(run, "best.pth", model), before)
    finetune(model, digits, run, settings, resume=True)
    finetune(model, digits, whole, settings)
    for checkpoint in ("last.pth", "best.pth"):
        assert_same_weights(weights_in(run, checkpoint, model), weights_in(whole, checkpoint, model))


@pytest.mark.parametrize("name", ["last.pth", "best.pth"])
def test_a_rename_that_fails_for_a_checkpoint_leaves_the_new_run_which_makes_up_for_it(
    digits: ClassFolders, tmp_path: Path, name: str
) -> None:
    old, new = replace(BRIEF, epochs=1), replace(BRIEF, epochs=1, lr=0.01)
    finetune(dense_network(), digits, tmp_path, old)
    with pytest.MonkeyPatch.context() as patch:
        fail_to_name(patch, name)
        with pytest.raises(CheckpointError, match=rf"{name}: Input/output error"):
            finetune(dense_network(), digits, tmp_path, new, overwrite=True)
    result = finetune(dense_network(), digits, tmp_path, new, resume=True)
    assert len(result.epochs) == 1
    best, last = (weights_in(tmp_path, name, dense_network()) for name in ("best.pth", "last.pth"))
    assert_same_weights(best, last)


def test_the_last_checkpoint_of_a_run_stopped_in_an_epoch_is_that_of_the_epoch_before(
    digits: ClassFolders, tmp_path: Path
) -> None:
    for folder, epoch in ((tmp_path / "first", 1), (tmp_path, 2)):
        steps: list[StepMetrics] = []

        def stopped(steps: list[StepMetrics] = steps, epoch: int = epoch) -> bool:
            return any(step.epoch == epoch for step in steps)

        assert finetune(dense_network(), digits, folder, BRIEF, on_step=steps.append, stop=stopped).interrupted
    assert not (tmp_path / "first" / "last.pth").exists()
    assert_same_weights(*(weights_in(tmp_path, name, dense_network()) for name in ("last.pth", "best.pth")))
    last = weights_in(tmp_path, model=dense_network())
    assert not torch.equal(load_state(tmp_path / "state.pth").model["1.weight"], last["1.weight"])


def test_the_folder_with_the_images_is_no_output_folder(digits: ClassFolders) -> None:
    before = sorted(digits.folder.rglob("*"))
    with pytest.raises(TrainingError, match="is the folder with the images; choose another output folder"):
        finetune(load_checkpoint(network_path()), digits, digits.folder, BRIEF)
    for inside in ("train", "val/run", "run/../train/3/run"):
        with pytest.raises(TrainingError, match=r"(train|val).* is in the folder with the images of each class;"):
            finetune(load_checkpoint(network_path()), digits, digits.folder / inside, BRIEF)
    assert sorted(digits.folder.rglob("*")) == before


def test_two_runs_do_not_write_into_one_folder(digits: ClassFolders, tmp_path: Path) -> None:
    messages = []

    def others(step: StepMetrics) -> None:
        for options in ({}, {"resume": True}, {"overwrite": True}) if step.step == 1 else ():
            with pytest.raises(CheckpointError) as error:
                finetune(dense_network(), digits, tmp_path, BRIEF, **options)
            messages.append(str(error.value))

    finetune(dense_network(), digits, tmp_path, replace(BRIEF, epochs=1), on_step=others)
    message = (
        f"{tmp_path} is in use: another run is writing its results there; wait until it has ended, or choose another"
    )
    assert messages == [f"{message} output folder"] * 3
    assert len(finetune(dense_network(), digits, tmp_path, BRIEF, resume=True).epochs) == 2


def test_results_of_a_run_that_ended_just_before_the_folder_was_reserved_are_kept(
    digits: ClassFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved = files.output_folder

    def after_another(folder: Path) -> AbstractContextManager[None]:
        with monkeypatch.context() as patch:
            patch.setattr("bn_insert.training.finetune.output_folder", reserved)
            finetune(dense_network(), digits, folder, BRIEF)
        return reserved(folder)

    monkeypatch.setattr("bn_insert.training.finetune.output_folder", after_another)
    with pytest.raises(TrainingError, match="already contains results"):
        finetune(dense_network(), digits, tmp_path, replace(BRIEF, lr=0.1))


def test_a_file_system_without_locks_does_without(
    digits: ClassFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    finetune(dense_network(), digits, tmp_path, replace(BRIEF, epochs=1))
    assert {path.name for path in tmp_path.iterdir()} >= FILES


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_what_a_killed_process_has_forked_does_not_keep_its_folder(tmp_path: Path) -> None:
    read, write = os.pipe()
    killed = os.fork()
    if killed == 0:
        with files.output_folder(tmp_path / "run"):
            if os.fork() == 0:
                os.close(write)
                os.read(read, 1)  # until the test has closed its end
            os._exit(0)
    os.waitpid(killed, 0)
    os.close(read)
    try:
        with files.output_folder(tmp_path / "run"):
            pass
    finally:
        os.close(write)


def test_what_only_the_replaced_run_had_goes_last(digits: ClassFolders, tmp_path: Path) -> None:
    finetune(dense_network(), digits, tmp_path, replace(BRIEF, epochs=1))
    stopped = finetune(dense_network(), digits, tmp_path, replace(BRIEF, lr=0.01), overwrite=True, stop=stop_after(1))
    assert stopped.interrupted
    names = {path.name for path in tmp_path.iterdir()}
    assert names & {"best.pth", "last.pth", "metrics.csv", "curves.png"} == set()
    assert {"state.pth", "classes.txt", "report.html", "report.json"} <= names


@pytest.mark.parametrize("name", ["best.pth", "last.pth", "state.pth", "metrics.csv", "report.html"])
@pytest.mark.parametrize("kind", ["a folder", "a symbolic link"])
def test_a_result_that_cannot_be_written_is_found_before_the_first_step(
    digits: ClassFolders, tmp_path: Path, name: str, kind: str
) -> None:
    if kind == "a folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to(tmp_path / "classes.txt")
    seen: list[object] = []
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(TrainingError, match=rf"cannot write .*{name}: it is {kind}.*move it away"):
            finetune(dense_network(), digits, tmp_path, BRIEF, on_step=seen.append, **options)
    assert seen == []
    assert [path.name for path in tmp_path.iterdir()] == [name]


# Batches of one


def test_a_last_batch_of_one_is_left_out_in_front_of_batchnorm(digits: ClassFolders, tmp_path: Path) -> None:
    sizes: list[int] = []
    model = dense_network()
    model[2].register_forward_pre_hook(lambda norm, inputs: sizes.append(len(inputs[0])) if norm.training else None)
    finetune(model, digits, tmp_path, replace(BRIEF, epochs=1, batch_size=13))
    assert sizes == [13, 13, 13]


def test_it_is_trained_on_where_no_batchnorm_normalizes_by_it(digits: ClassFolders, tmp_path: Path) -> None:
    settings = replace(BRIEF, epochs=1, batch_size=13)
    frozen = finetune(dense_network(), digits, tmp_path / "a", replace(settings, batchnorm="freeze-statistics"))
    without = finetune(load_checkpoint(network_path()), digits, tmp_path / "b", replace(settings, lr=1e-4))
    assert frozen.epochs[0].step == without.epochs[0].step == 4


def test_a_batch_size_of_one_is_refused_with_batchnorm(digits: ClassFolders, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"batch of one image .*batchnorm=.renorm"):
        finetune(dense_network(), digits, tmp_path, replace(BRIEF, batch_size=1))


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({"batch_size": 7}, "renorm"),
        ({"batch_size": 8}, "train"),
        ({"batch_size": 1}, "renorm"),
        ({"batch_size": 4, "batchnorm": "train"}, "train"),
        ({"batch_size": 32, "batchnorm": "renorm"}, "renorm"),
        ({"batch_size": 4, "head": 8}, "train"),
        ({"batch_size": 4, "sync_bn": True}, "train"),
    ],
)
def test_batches_too_small_to_normalize_by_are_renormalized_unless_a_mode_is_given(
    network: nn.Module, changes: dict[str, Any], mode: str
) -> None:
    assert batchnorm_mode(network, replace(BRIEF, **changes)) == mode


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()], ids=str
)
def test_small_batches_are_not_renormalized_without_statistics_to_correct_towards(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    assert batchnorm_mode(model, replace(BRIEF, batch_size=4)) == "train"


def test_a_run_says_records_and_resumes_the_mode_that_it_chose(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    summaries: list[RunSummary] = []
    settings = replace(BRIEF, batch_size=4)
    finetune(network, digits, tmp_path, settings, on_start=summaries.append)
    assert re.search(r"; \d+ BatchNorm layers, with Batch Renormalization$", summaries[0].texts["Trained"])
    (run,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert run["settings"]["batchnorm"] == "renorm"
    finetune(network, digits, tmp_path, replace(settings, epochs=3), resume=True)
    with pytest.raises(TrainingError, match="batchnorm was 'renorm' and is now 'train'"):
        finetune(network, digits, tmp_path, replace(settings, batchnorm="train"), resume=True)


# What is trained


@pytest.mark.parametrize(
    ("changes", "still"),
    [
        ({"batchnorm": "freeze"}, {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}),
        ({"batchnorm": "freeze-statistics"}, {"running_mean", "running_var", "num_batches_tracked"}),
        ({"batchnorm": "train"}, set()),
    ],
)
def test_batchnorm_modes_hold_through_a_run(
    network: nn.Module, digits: ClassFolders, tmp_path: Path, changes: dict[str, Any], still: set[str]
) -> None:
    finetune(network, digits, tmp_path, replace(BRIEF, lr=1e-4, **changes))
    before, after = network.state_dict(), weights_in(tmp_path)
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert norms
    same = {key for key in before if torch.equal(before[key], after[key])}
    for tensor in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert all((f"{norm}.{tensor}" in same) == (tensor in still) for norm in norms), tensor


@pytest.mark.parametrize(
    ("changes", "wording"),
    [
        ({"batchnorm": "freeze"}, "4 BatchNorm layers, frozen"),
        ({"train": "head"}, "4 BatchNorm layers, frozen"),
        ({"freeze_features": True}, "gamma and beta of 2 of 4 BatchNorm layers"),
        ({"batchnorm": "freeze-statistics"}, "4 BatchNorm layers"),
    ],
)
def test_a_run_says_how_many_batchnorms_it_trains(
    network: nn.Module, digits: ClassFolders, tmp_path: Path, changes: dict[str, Any], wording: str
) -> None:
    told: list[RunSummary] = []
    finetune(network, digits, tmp_path, replace(BRIEF, **changes), on_start=told.append, stop=lambda: True)
    assert told[0].texts["Trained"].split("; ")[1] == wording


def test_frozen_features_keep_weights_and_statistics_while_the_classifier_learns(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    finetune(network, digits, tmp_path, replace(BRIEF, freeze_features=True))
    before, after = network.state_dict(), weights_in(tmp_path)
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if key.startswith("features.")} <= same
    # A BatchNorm takes away what a bias in front of it does, so that such a bias may learn nothing.
    assert {key for key in before if key.startswith("classifier.") and not key.endswith(".bias")}.isdisjoint(same)


@pytest.mark.parametrize(("gamma", "noted"), [(1.0, False), (30.0, True)])
def test_large_inputs_of_a_new_output_layer_are_noted(
    digits: ClassFolders, tmp_path: Path, gamma: float, noted: bool
) -> None:
    model = dense_network(classes=4)
    nn.init.constant_(model[2].weight, gamma)
    told: list[RunSummary] = []
    finetune(model, digits, tmp_path, replace(BRIEF, epochs=1), on_start=told.append)
    assert told[0].output.startswith("4 replaced, 4 to 10 classes")
    assert ("inputs are large (about 30)" in told[0].output) == noted
    (run,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert run["data"]["output_replaced"], "for the advice after a failed run"


@pytest.mark.parametrize("name", ["on_start", "on_fit", "on_trial", "on_step", "on_epoch", "stop"])
def test_a_callback_that_cannot_be_called_is_refused_before_anything_is_written(
    name: str, network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    callbacks: dict[str, Any] = {name: 5}
    with pytest.raises(TrainingError, match=f"{name} is 5; pass a function, or None"):
        finetune(network, digits, tmp_path / "run", BRIEF, **callbacks)
    assert not (tmp_path / "run").exists()


def test_a_new_head_is_not_advised_where_the_output_layer_is_a_conv(digits: ClassFolders, tmp_path: Path) -> None:
    body = [nn.Conv2d(3, 4, 5, 4), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(*body, nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.constant_(model[1].weight, 30.0)
    told: list[RunSummary] = []
    run = finetune(model, digits, tmp_path, replace(BRIEF, epochs=1, lr=30.0), on_start=told.append)
    texts = [told[0].output, *(verdict.text for verdict in run.health)]
    assert "large (about 30), which makes training difficult: check the preprocessing" in texts[0]
    assert any("Try " in text for text in texts)
    assert [text for text in texts if "head" in text] == []


def test_other_classes_get_a_new_output_layer(network: nn.Module, tmp_path: Path) -> None:
    four = open_digits(copy_labelled_digits(tmp_path / "four", train=6, classes=4))
    finetune(network, four, tmp_path / "run", BRIEF)
    assert load_checkpoint(tmp_path / "run" / "best.pth").classifier[-1].out_features == 4  # type: ignore[union-attr,index]


def test_a_new_output_layer_begins_at_the_loss_of_guessing_and_keeps_dtype_and_name() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(8, 6, bias=False, dtype=torch.float64)))
    replace_output(model, 3)
    layer: Any = next(iter(model[1].children()))
    assert (layer.out_features, layer.bias, layer.weight.dtype) == (3, None, torch.float64)
    assert not layer.weight.any()
    loss = nn.functional.cross_entropy(model(torch.rand(4, 8, dtype=torch.float64)), torch.tensor([0, 1, 2, 0]))
    assert loss.item() == pytest.approx(math.log(3))


def network_with_conv_output() -> nn.Sequential:
    """Return a network whose logits come from a conv, as SqueezeNet's do."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU())
    return nn.Sequential(features, nn.Conv2d(8, 1000, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_conv_that_returns_the_logits_is_replaced_and_learns(tmp_path: Path) -> None:
    four = open_digits(copy_labelled_digits(tmp_path / "four", train=6, classes=4))
    images = [torch.rand(8, 3, 32, 32)]
    model = insert_batchnorm(network_with_conv_output(), images, skip="1")
    finetune(model, four, tmp_path / "run", BRIEF)
    trained: Any = load_checkpoint(tmp_path / "run" / "best.pth", model=network_with_conv_output)
    assert (trained[1].out_channels, trained(images[0]).shape) == (4, (8, 4))
    assert trained[1].bias.any()  # zeros in front of a ReLU would have stayed zeros


def test_networks_whose_output_cannot_be_replaced_are_refused() -> None:
    with pytest.raises(TrainingError, match="Sequential has no dense layer and no conv"):
        replace_output(nn.Sequential(nn.ReLU()), 3)
    with pytest.raises(TrainingError, match="0 is a Conv2d, and a new head takes the place of dense layers"):
        replace_head(nn.Sequential(nn.Conv2d(3, 4, 1)), 8, 3)
    with pytest.raises(TrainingError, match="BatchNorm 1 comes after the output layer 0"):
        replace_output(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), 3)
    with pytest.raises(TrainingError, match="2 or more"):
        replace_output(nn.Sequential(nn.Linear(4, 4)), 1)


def test_a_batchnorm_behind_the_output_layer_goes_with_the_old_classes(tmp_path: Path) -> None:
    four = open_digits(copy_labelled_digits(tmp_path / "four", train=6, classes=4))
    images = [torch.rand(8, 3, 32, 32)]
    model = insert_batchnorm(network_with_conv_output(), images)
    assert inserted_batchnorms(model) == ["0.1", "0.4", "2"]
    summaries: list[RunSummary] = []
    finetune(model, four, tmp_path / "run", BRIEF, on_start=summaries.append)
    assert summaries[0].output == "1 replaced, 1000 to 4 classes, and the BatchNorm after it removed"
    trained: Any = load_checkpoint(tmp_path / "run" / "best.pth", model=network_with_conv_output)
    assert inserted_batchnorms(trained) == ["0.1", "0.4"]
    assert trained(images[0]).shape == (8, 4)
    assert inserted_batchnorms(model) == ["0.1", "0.4", "2"]


@pytest.mark.parametrize("placement", ["before_activation", "after_activation"])
def test_squeezenet_with_batchnorm_gets_another_number_of_classes(placement: Placement) -> None:
    images = torch.rand(2, 3, 64, 64)
    model = insert_batchnorm(randomised(torchvision.models.squeezenet1_1()), [images], placement=placement)
    inserted = inserted_batchnorms(model)
    replace_output(model, 7)
    assert model(images).shape == (2, 7)
    assert inserted_batchnorms(model) == inserted[:-1]


def test_an_inserted_batchnorm_of_another_layer_is_not_removed_with_the_output_layer() -> None:
    model = insert_batchnorm(OutputFirst(), [torch.rand(4, 3, 8, 8)])
    with pytest.raises(TrainingError, match=r"BatchNorm conv.1 comes after the output layer output"):
        replace_output(model, 3)
    assert inserted_batchnorms(model) == ["conv.1"]


def test_a_head_that_cannot_be_replaced_leaves_the_network_as_it_was() -> None:
    model = insert_batchnorm(network_with_conv_output(), [torch.rand(8, 3, 32, 32)])
    with pytest.raises(TrainingError, match="1 is a Conv2d, and a new head takes the place of dense layers"):
        replace_head(model, 8, 4)
    assert inserted_batchnorms(model) == ["0.1", "0.4", "2"]


def test_a_head_with_a_batchnorm_behind_its_output_layer_is_replaced_where_a_forward_calls_it_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.output = nn.Conv2d(3, 4, 3), nn.Linear(4, 1000)

        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.conv(x).relu().mean((2, 3)))  # type: ignore[no-any-return]

    images = torch.rand(4, 3, 8, 8)
    model = insert_batchnorm(Named().eval(), [images], include_output=True)
    assert inserted_batchnorms(model) == ["conv.1", "output.1"]
    replace_head(model, 6, 3)
    assert model(images).shape == (4, 3)


def test_only_the_batchnorm_of_the_output_layer_is_removed_with_it() -> None:
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 5, 1), nn.ReLU()]
    model = insert_batchnorm(nn.Sequential(*layers).eval(), [torch.rand(8, 4)])
    with pytest.raises(TrainingError, match="BatchNorm 5 comes after the output layer 0"):
        replace_output(model, 3)
    assert inserted_batchnorms(model) == ["1", "5"]


def test_the_output_conv_with_a_batchnorm_elsewhere_behind_it_is_named_as_the_option_to_skip_it_takes_it() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)]
    pooled = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model, batches = nn.Sequential(nn.Sequential(*layers), *pooled), [torch.rand(4, 3, 8, 8)]
    inserted = insert_batchnorm(model, batches, placement="after_activation")
    with pytest.raises(TrainingError, match=r"comes after the output layer 0.6; .* \(skip=\('0.4',\)\)"):
        replace_output(inserted, 3)
    replace_output(insert_batchnorm(model, batches, placement="after_activation", skip=("0.4",)), 3)


def test_half_precision_is_trained_in_float32(digits: ClassFolders, tmp_path: Path) -> None:
    finetune(load_checkpoint(network_path()).half(), digits, tmp_path, replace(BRIEF, epochs=1, lr=1e-4))
    assert {tensor.dtype for tensor in weights_in(tmp_path).values()} == {torch.float32}


def test_dropout_is_set_and_stored(network: nn.Module, digits: ClassFolders, tmp_path: Path) -> None:
    finetune(network, digits, tmp_path, replace(BRIEF, epochs=1, dropout=0.125))
    settings = read_checkpoint(tmp_path / "last.pth").settings
    assert settings is not None
    assert set(settings.dropout.values()) == {0.125}


def test_dropout_is_off_by_default_with_batchnorm_and_the_report_says_so(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    finetune(network, digits, tmp_path, replace(BRIEF, epochs=1))
    settings = read_checkpoint(tmp_path / "last.pth").settings
    assert settings is not None
    assert settings.dropout == {"classifier.3": 0.0, "classifier.7": 0.0}
    (run,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert not run["data"]["output_replaced"]
    assert run["settings"]["dropout"] == "none (switched off: 0.5 (classifier.3), 0.5 (classifier.7))"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dropout": 0.25}, "0.25 (classifier.3), 0.25 (classifier.7)"),
        ({"batchnorm": "freeze"}, "0.5 (classifier.3), 0.5 (classifier.7)"),
    ],
)
def test_dropout_stays_on_where_it_is_asked_for_or_does_no_harm(
    network: nn.Module, changes: dict[str, Any], expected: str
) -> None:
    settings = replace(BRIEF, **({"batchnorm": "train"} | changes))
    prepared, _ = prepared_network(
        network, output_layer(network), settings, 10, device=torch.device("cpu"), ranks=Ranks()
    )
    assert str(set_dropout(prepared, settings.dropout)) == expected


class FunctionalDropout(nn.Module):
    """Drops values by a function and by a module, before a BatchNorm."""

    def __init__(self, *, switched_off: bool = False) -> None:
        super().__init__()
        self.switched_off = switched_off
        self.dropout, self.fc, self.norm = nn.Dropout(0.25), nn.Linear(3 * 32 * 32, 10), nn.BatchNorm1d(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.dropout(x.flatten(1)), 0.5, training=self.training and not self.switched_off)
        return self.norm(self.fc(x))


class DropsLast(FunctionalDropout):
    """Drops values after its BatchNorm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.norm(self.fc(x.flatten(1))), 0.5, training=self.training)


def test_dropout_that_is_called_as_a_function_after_the_last_batchnorm_is_not_said_to_spoil_its_statistics() -> None:
    with pytest.warns(UserWarning, match=r"stays on although dropout is to be off, .* of any BatchNorm after it\."):
        set_dropout(DropsLast(), None, torch.rand(2, 3, 32, 32))


def test_dropout_that_is_called_as_a_function_is_named() -> None:
    network, example = FunctionalDropout(), torch.rand(2, 3, 32, 32)
    with pytest.warns(UserWarning, match=r"FunctionalDropout calls dropout as a function \(p = .*0\.5 \(F\.dropout\)"):
        dropout = set_dropout(network, None, example)
    assert str(dropout) == "0.5 (F.dropout) (switched off: 0.25 (dropout))"
    assert network.norm.num_batches_tracked == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asked for, or harmless
        assert str(set_dropout(network, 0.125, example)) == "0.125 (dropout), 0.5 (F.dropout)"
        set_batchnorm_mode(network, "freeze")
        set_dropout(network, None, example)
        assert str(set_dropout(FunctionalDropout(switched_off=True), 0, example)) == "none"


def test_dropout_stays_on_in_a_network_without_batchnorm() -> None:
    assert str(set_dropout(load_checkpoint(network_path()), None)) == "0.5 (classifier.2), 0.5 (classifier.5)"


class FlattenedByView(nn.Module):
    """Takes contiguous activations alone, as many networks written by hand do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 8 * 8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.fc(x.view(len(x), -1))


def test_a_network_that_flattens_by_view_is_fine_tuned(digits: ClassFolders, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="view"):
        FlattenedByView()(torch.rand(2, 3, 32, 32).to(memory_format=torch.channels_last))
    assert finetune(FlattenedByView(), digits, tmp_path, BRIEF).best is not None


@pytest.mark.parametrize(
    ("changes", "wording"),
    [
        ({"dropout": 0.5}, "Sequential as it is trained has no dropout layer"),
        ({"freeze_features": True}, "Sequential has no features"),
        ({"sync_bn": True}, "sync_bn works on GPUs only"),
    ],
)
def test_what_a_network_cannot_take_is_refused(
    digits: ClassFolders, tmp_path: Path, changes: dict[str, Any], wording: str
) -> None:
    with pytest.raises(TrainingError, match=wording):
        finetune(dense_network(), digits, tmp_path / "run", replace(BRIEF, **changes))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_says_what_to_try_and_keeps_the_last_epoch(
    digits: ClassFolders, tmp_path: Path
) -> None:
    settings = replace(BRIEF, lr=1e6, batch_size=20, batchnorm="freeze")
    model = load_checkpoint(network_path())
    with pytest.raises(DivergenceError, match=r"epoch 1 .*nothing was written\. Try the usual learning rate") as raised:
        finetune(model, digits, tmp_path / "at once", settings)
    assert str(raised.value).endswith(
        "Try the usual learning rate (lr=0.003), a longer warm-up (lr_warmup_epochs=1) or a network with "
        "BatchNorm (bn-insert insert)."
    )
    assert not (tmp_path / "at once").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bn_insert.training.loop.learning_rate", lambda *_arguments: 1e6)
        longer = r"or a new run that is long enough for learning rate trials \(epochs=10 or more\)\.$"
        with pytest.raises(DivergenceError, match=rf"Try a third of this learning rate \(lr=0.001\), .* {longer}"):
            finetune(model, digits, tmp_path / "at once", replace(settings, lr=None))
    # The rate explodes in the second epoch: what the first gave is still there.
    finetune(model, digits, tmp_path / "later", replace(BRIEF, lr=1e-4, epochs=1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "later").iterdir()}
    broken = load_state(tmp_path / "later" / "state.pth")
    assert broken.progress.history
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bn_insert.training.loop.learning_rate", lambda *_arguments: 1e6)
        with pytest.raises(DivergenceError, match="keeps what was saved last"):
            finetune(model, digits, tmp_path / "later", replace(BRIEF, lr=1e-4, epochs=3), resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "later").iterdir()} == before


def test_a_report_that_cannot_be_written_does_not_end_the_run(
    network: nn.Module, digits: ClassFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_data: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bn_insert.report.page.page", fail)
    with pytest.warns(UserWarning, match=r"report\.html: No space left on device; everything else is saved"):
        result = finetune(network, digits, tmp_path, BRIEF)
    assert len(result.epochs) == 2
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"report.html"}


# Settings


@pytest.mark.parametrize(
    ("changes", "wording"),
    [
        ({"epochs": 0}, "epochs is 0; use 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": 0.0}, "lr is 0.0; use a finite learning rate above 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"momentum": 1.0, "opt": "sgd"}, "momentum is 1.0; use 0 or more, but less than 1"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; use 0 or more, but less than 1"),
        ({"dropout": 1.0}, "dropout is 1.0; use 0 or more, but less than 1"),
        ({"hflip": 1.5}, "hflip is 1.5; use 0 to 1"),
        ({"momentum": 0.5}, "opt='adamw' does not use momentum; leave it out, or use it with opt='sgd'"),
        ({"lr_gamma": 0.5}, "lr_scheduler='cosine' does not use lr_gamma; .* with lr_scheduler='step'"),
        ({"lr_step_size": 2, "lr_scheduler": "constant"}, "lr_scheduler='constant' does not use lr_step_size"),
        ({"dropout": -1.0}, "dropout is -1.0"),
        ({"lr_warmup_epochs": 11.0}, "lr_warmup_epochs is 11.0; use 0 to 10, the number of epochs"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], wording: str) -> None:
    with pytest.raises(TrainingError, match=wording):
        TrainingSettings(**changes)


def test_the_learning_rate_rises_then_follows_its_schedule() -> None:
    settings = TrainingSettings(epochs=4, lr=1.0, lr_warmup_epochs=1.5, lr_scheduler="constant")
    rates = [learning_rate(settings, step, 4) for step in range(16)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[:7] == sorted(rates[:7])
    assert set(rates[6:]) == {1.0}
    stepped = replace(settings, lr_warmup_epochs=0.0, lr_scheduler="step", lr_step_size=2)
    assert [learning_rate(stepped, step, 1) for step in range(4)] == pytest.approx([1.0, 1.0, 0.1, 0.1])
    cosine = replace(settings, lr_warmup_epochs=2.0, lr_scheduler="cosine")
    assert [learning_rate(cosine, step, 1) for step in range(2, 4)] == pytest.approx([1.0, 0.5])


# Labelled images


def test_classes_are_the_folders_of_train_in_order(tmp_path: Path) -> None:
    folder = copy_labelled_digits(tmp_path / "data", classes=3)
    (folder / "train" / ".hidden").mkdir()
    shutil.rmtree(folder / "val" / "1")
    images = open_digits(folder)
    assert images.classes == ("0", "1", "2")
    assert [image.label for image in images.train] == [0] * 4 + [1] * 4 + [2] * 4
    assert [image.label for image in images.val] == [0, 0, 2, 2]


def spoil(folder: Path, how: str) -> None:
    if how == "missing":
        shutil.rmtree(folder)
    elif how == "a file":
        shutil.rmtree(folder)
        folder.touch()
    elif how in ("train", "val"):
        shutil.rmtree(folder / how)
    elif how == "one class":
        shutil.rmtree(folder / "train" / "1")
    elif how == "no val classes":
        for digit in "01":
            shutil.rmtree(folder / "val" / digit)
    elif how == "unknown class":
        (folder / "val" / "1").rename(folder / "val" / "one")
    else:
        part, _, digit = how.partition("/")
        for image in (folder / part / digit).iterdir():
            image.unlink()


@pytest.mark.parametrize(
    ("how", "wording"),
    [
        ("missing", "data does not exist; the layout is train/CLASS/IMAGE and val/CLASS/IMAGE"),
        ("a file", "data is not a folder"),
        ("train", "data has no folder train/; the layout is"),
        ("val", "data has no folder val/"),
        ("one class", "train has 1 class folder, but at least 2 are needed"),
        ("no val classes", "val has no class folders"),
        ("unknown class", "val has classes that .*train does not have: one"),
        ("train/1", "train/1 contains no image"),
        ("val/0", "val/0 contains no image"),
    ],
)
def test_data_that_cannot_be_used_says_why(tmp_path: Path, how: str, wording: str) -> None:
    folder = copy_labelled_digits(tmp_path / "data", classes=2)
    spoil(folder, how)
    with pytest.raises(ImageError, match=wording):
        open_digits(folder)


@pytest.mark.parametrize(("name", "fault"), [(b"caf\xe9", "is not valid UTF-8"), (b"a\nb", "contains a line break")])
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_that_cannot_be_a_line_of_text_is_refused_before_training(
    tmp_path: Path, name: bytes, fault: str, part: str
) -> None:
    folder = copy_labelled_digits(tmp_path / "data", classes=2)
    (folder / part / "1").rename(folder / part / os.fsdecode(name))
    with pytest.raises(ImageError, match=rf"class folder '(caf.udce9|a.nb)' in .*{part} {fault}; rename"):
        open_digits(folder)


def test_options_that_do_not_fit_the_images_are_refused(folder: Path) -> None:
    with pytest.raises(ImageError, match="the network takes 4"):
        open_class_folders(folder, IDENTITY_TRANSFORM, channels=4)
    with pytest.raises(ImageError, match="workers is -1"):
        open_class_folders(folder, IDENTITY_TRANSFORM, workers=-1)


def test_an_unreadable_image_is_replaced_in_training_left_out_of_validation_and_told(tmp_path: Path) -> None:
    folder = copy_labelled_digits(tmp_path / "data", classes=2)
    for part in ("train", "val"):
        damaged = next((folder / part / "0").iterdir())
        damaged.unlink()
        damaged.write_bytes(b"no image")
    images = open_digits(folder)
    result = finetune(dense_network(2), images, tmp_path / "run", replace(BRIEF, epochs=1, batch_size=4))
    assert result.epochs[0].step == 2
    assert result.epochs[0].val_accuracy in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    assert len(images.unreadable) == 2
    assert [len(batch.labels) for batch in images.batches(images.train, 4, full=True)] == [4, 4]
    assert [len(batch.labels) for batch in images.batches(images.train, 4)] == [3, 4]


def test_images_of_which_none_can_be_read_are_an_error(tmp_path: Path) -> None:
    for part, wording in (("val", "none of the 4 validation images"), ("train", "none of the 8 training images")):
        folder = copy_labelled_digits(tmp_path / part, classes=2)
        for image in (folder / part).rglob("*.png"):
            image.unlink()
            image.write_bytes(b"no image")
        with pytest.raises(ImageError, match=rf"{wording} can be read; one of them is .*png: "):
            finetune(dense_network(2), open_digits(folder), tmp_path / "run", BRIEF, on_start=pytest.fail)
        assert not (tmp_path / "run").exists()


def test_workers_decode_the_same_batches(folder: Path, digits: ClassFolders) -> None:
    by_workers = open_class_folders(folder, IDENTITY_TRANSFORM, workers=1)
    for mine, theirs in zip(digits.batches(digits.train, 16), by_workers.batches(digits.train, 16), strict=True):
        assert torch.equal(mine.images, theirs.images)
        assert torch.equal(mine.labels, theirs.labels)


# Several processes


def test_shares_are_of_equal_size_and_cover_everything() -> None:
    items = list(range(10))
    shares = [Ranks(rank, 4).share(items) for rank in range(4)]
    assert {len(share) for share in shares} == {3}
    assert set(itertools.chain(*shares)) == set(items)
    exact = [Ranks(rank, 4).share(items, equal=False) for rank in range(4)]
    assert sorted(itertools.chain(*exact)) == items
    assert Ranks(1, 4).share([7]) == [7]
