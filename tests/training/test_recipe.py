"""What is trained, on what, and for how long: the options of a run besides its optimizer."""

from __future__ import annotations

import errno
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_insert import RunSummary, StepMetrics, TrainingSettings, finetune, fold_batchnorm, insert_batchnorm
from bn_insert.checkpoints.load_network import load_checkpoint
from bn_insert.errors import CalibrationError, DivergenceError, TrainingError
from bn_insert.images import ClassFolders
from bn_insert.images.augmentation import augmented
from bn_insert.statistics.passes import NotFiniteError
from bn_insert.support.processes import Ranks
from bn_insert.surgery.replace_output import output_layer
from bn_insert.training.preparation import prepared_network
from bn_insert.training.reestimation import reestimate_statistics
from bn_insert.training.remaining_time import RemainingTime
from bn_insert.training.results import RunFolder
from bn_insert.training.stopping import StopCheck
from support.digits import copy_labelled_digits, open_digits
from support.networks import small_vgg

pytestmark = pytest.mark.usefixtures("one_thread", "no_charts")

BRIEF = TrainingSettings(opt="sgd", epochs=1, batch_size=8, lr=0.003)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ClassFolders:
    """40 digits to train on and 20 to validate with."""
    return open_digits(copy_labelled_digits(tmp_path_factory.mktemp("digits")))


@pytest.fixture(scope="module")
def network(digits: ClassFolders) -> nn.Module:
    """A small VGG with BatchNorm behind every layer."""
    batches = [batch.images for batch in digits.batches(digits.train, 20)]
    return insert_batchnorm(small_vgg(), batches)


def dense_network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, 10))


def prepared(model: nn.Module, classes: int = 10, **changes: Any) -> nn.Module:
    settings, device = replace(BRIEF, **({"batchnorm": "train"} | changes)), torch.device("cpu")
    return prepared_network(model, output_layer(model), settings, classes, device=device, ranks=Ranks())[0]


def changed(before: nn.Module, folder: Path) -> set[str]:
    """Return the tensors of the last checkpoint that a run has changed, by name."""
    after = load_checkpoint(folder / "last.pth").state_dict()
    return {name for name, value in before.state_dict().items() if not torch.equal(after[name], value)}


def names_of(model: nn.Module, *kinds: type[nn.Module]) -> set[str]:
    modules = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return {name for name in model.state_dict() if name.rpartition(".")[0] in modules}


def stop_after(steps: int) -> Callable[[], bool]:
    asked = itertools.count(1)
    return lambda: next(asked) >= 2 * steps


# What is trained


def test_batchnorm_and_the_head_alone_are_trained_without_gradients_of_other_weights(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    trained = [name for name, each in prepared(network, train="batchnorm").named_parameters() if each.requires_grad]
    output = {"classifier.8.weight", "classifier.8.bias"}
    assert set(trained) == output | {
        name for name in names_of(network, _BatchNorm) if name.endswith(("weight", "bias"))
    }
    finetune(network, digits, tmp_path, replace(BRIEF, train="batchnorm"))
    # The inputs of the first BatchNorm stay the same, so its mean is that of before, to the last bit here.
    assert changed(network, tmp_path) | {"features.1.running_mean"} == output | names_of(network, _BatchNorm)
    after = load_checkpoint(tmp_path / "last.pth").state_dict()
    torch.testing.assert_close(after["features.1.running_mean"], network.state_dict()["features.1.running_mean"])


def test_the_head_alone_is_trained_while_statistics_stay(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    finetune(network, digits, tmp_path, replace(BRIEF, train="head"))
    assert changed(network, tmp_path) == {"classifier.8.weight", "classifier.8.bias"}


@pytest.mark.parametrize(
    ("changes", "wording"),
    [
        ({"train": "head", "freeze_features": True}, "freeze_features and train='head' both select"),
        ({"train": "batchnorm", "batchnorm": "freeze"}, "use train='head'"),
        ({"head": 0}, "head is 0; use 1 or more"),
        ({"head": 1 << 17}, "head is 131072; use at most 65536"),
        ({"accumulate": 0}, "accumulate is 0; use 1 or more"),
        ({"patience": 0}, "patience is 0; use 1 or more"),
        ({"crop_scale": 0.0}, "crop_scale is 0.0; use a fraction of the area"),
    ],
)
def test_settings_that_cannot_be_are_named(changes: dict[str, Any], wording: str) -> None:
    with pytest.raises(TrainingError, match=wording):
        TrainingSettings(**changes)


@pytest.mark.parametrize(
    ("field", "value", "usable"),
    [
        ("epochs", "5", "a whole number"),
        ("epochs", 2.5, "a whole number"),
        ("epochs", True, "a whole number"),
        ("batch_size", 8.0, "a whole number"),
        ("batch_size", torch.tensor(8), "a whole number"),
        ("head", "512", "a whole number or None"),
        ("lr", "0.1", "a number or None"),
        ("lr", True, "a number or None"),
        ("hflip", None, "a number"),
        ("weight_decay", [0.1], "a number"),
        ("amp", "no", "True or False"),
        ("recalibrate", 1, "True or False"),
        ("opt", "adam", "'sgd' or 'adamw'"),
        ("train", None, "'all', 'batchnorm' or 'head'"),
    ],
)
def test_settings_of_another_kind_are_named(field: str, value: object, usable: str) -> None:
    with pytest.raises(TrainingError) as error:
        TrainingSettings(**{field: value})
    assert str(error.value) == f"{field} is {value!r}; use {usable}"


def test_a_dict_in_place_of_settings_is_named(network: nn.Module, digits: ClassFolders, tmp_path: Path) -> None:
    settings: Any = {"epochs": 3}
    with pytest.raises(TrainingError, match=r"settings is \{'epochs': 3\}; pass TrainingSettings\(epochs=10\)"):
        finetune(network, digits, tmp_path, settings)


def test_settings_keep_numbers_of_numpy_as_those_of_python_which_can_be_saved() -> None:
    given = {"epochs": np.int64(2), "lr": np.float32(0.5), "hflip": np.float64(0.5), "amp": np.bool_(True)}
    settings: Any = TrainingSettings(**given, opt="sgd", momentum=0)
    kept = [getattr(settings, field) for field in (*given, "momentum")]
    assert kept == [2, 0.5, 0.5, True, 0.0]
    assert list(map(type, kept)) == [int, float, float, bool, float]


def test_a_network_without_batchnorm_has_none_to_train() -> None:
    with pytest.raises(TrainingError, match=r"has no BatchNorm to train; insert it first .*train='head'"):
        prepared(dense_network(), train="batchnorm")


# A new head


def types_in(module: Any) -> list[str]:
    return [type(each).__name__ for each in module]


def test_a_new_head_is_trained_saved_loaded_and_folded(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    result = finetune(network, digits, tmp_path, replace(BRIEF, head=12, train="head"))
    assert changed_features(network, tmp_path) == set()
    model = load_checkpoint(tmp_path / "last.pth").eval()
    classifier = model.get_submodule("classifier")
    assert types_in(classifier) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert classifier[0].out_features == 12  # type: ignore[index]
    (batch,) = digits.batches(digits.val, 100)
    with torch.inference_mode():
        logits = model(batch.images)
        folded = fold_batchnorm(model, batch.images)(batch.images)
    assert (logits.argmax(1) == batch.labels).double().mean().item() == result.epochs[-1].val_accuracy
    torch.testing.assert_close(folded, logits, rtol=1e-4, atol=1e-4)


def changed_features(before: nn.Module, folder: Path) -> set[str]:
    after = load_checkpoint(folder / "last.pth").state_dict()
    features = {name: value for name, value in before.state_dict().items() if name.startswith("features.")}
    return {name for name, value in features.items() if not torch.equal(after[name], value)}


def test_a_new_head_of_any_network_is_replayed_from_its_history(digits: ClassFolders, tmp_path: Path) -> None:
    finetune(dense_network(), digits, tmp_path, replace(BRIEF, head=5))
    model = load_checkpoint(tmp_path / "last.pth", model=dense_network)
    assert types_in(model) == ["Flatten", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert model.state_dict()["1.weight"].shape == (5, 3 * 32 * 32)


def test_a_run_with_a_new_head_is_resumed_exactly(network: nn.Module, digits: ClassFolders, tmp_path: Path) -> None:
    settings = replace(BRIEF, epochs=2, head=12, crop_scale=0.5, hflip=0.5, accumulate=2)
    finetune(network, digits, tmp_path / "whole", settings)
    assert finetune(network, digits, tmp_path / "parts", settings, stop=stop_after(4)).interrupted
    finetune(network, digits, tmp_path / "parts", settings, resume=True)
    whole, parts = (load_checkpoint(tmp_path / name / "last.pth").state_dict() for name in ("whole", "parts"))
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_batchnorm_of_a_new_head_is_trained_where_the_others_are_frozen(network: nn.Module) -> None:
    result = prepared(network, head=12, batchnorm="freeze").train()
    result(torch.rand(4, 3, 32, 32))
    assert [name for name, each in result.named_modules() if isinstance(each, _BatchNorm) and each.training] == [
        "classifier.1"
    ]


# Accumulated gradients


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulated_gradients_are_those_of_the_batches_together(
    digits: ClassFolders, tmp_path: Path, smoothing: float
) -> None:
    # Without the fit of the output layer, which amplifies the rounding errors of its features.
    settings = replace(BRIEF, batch_size=16, label_smoothing=smoothing, fit_output=False)
    together = finetune(dense_network(), digits, tmp_path / "together", settings)
    parts = finetune(dense_network(), digits, tmp_path / "parts", replace(settings, batch_size=4, accumulate=4))
    assert parts.epochs[-1].step == together.epochs[-1].step == 3  # the last one has 8 images
    assert parts.epochs[-1].train_loss == pytest.approx(together.epochs[-1].train_loss, rel=1e-5)
    weights = [load_checkpoint(tmp_path / name / "last.pth", model=dense_network) for name in ("together", "parts")]
    torch.testing.assert_close(weights[0].state_dict(), weights[1].state_dict(), rtol=1e-4, atol=1e-5)


# Stopping early


def test_a_run_stops_when_it_has_not_improved_for_its_patience_and_is_complete(
    digits: ClassFolders, tmp_path: Path
) -> None:
    settings = replace(BRIEF, epochs=9, lr=1e-30, patience=2)
    result = finetune(dense_network(), digits, tmp_path, settings)
    assert len(result.epochs) == 3
    assert not result.interrupted
    summaries: list[RunSummary] = []
    again = finetune(dense_network(), digits, tmp_path, settings, resume=True, on_start=summaries.append)
    assert again.epochs == result.epochs
    assert summaries[0].resumed.endswith("(patience); to continue, use a larger value (patience)")
    assert len(finetune(dense_network(), digits, tmp_path, replace(settings, patience=3), resume=True).epochs) == 4


# Augmentation


def test_a_random_crop_depends_on_its_seed_alone_and_keeps_the_size(digits: ClassFolders) -> None:
    images = next(digits.batches(digits.train, 4)).images
    state = torch.get_rng_state()
    first, second, other = (augmented(images, seed=seed, crop_scale=0.3) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert first.shape == images.shape
    assert not torch.equal(first, images)
    assert not torch.equal(first, other)
    assert torch.equal(augmented(images, seed=1), images)


def test_a_random_crop_keeps_at_least_its_fraction_of_the_area() -> None:
    ramp = torch.arange(100.0).expand(64, 1, 100, 100) / 99
    cropped = augmented(ramp, seed=0, crop_scale=0.25)
    widths = cropped.amax((1, 2, 3)) - cropped.amin((1, 2, 3))
    assert widths.min() > (0.25 * 3 / 4) ** 0.5 - 0.05  # the narrowest crop has the least area and is upright
    assert widths.max() > 0.9


# Before and during a run


def test_the_summary_says_what_a_run_is_about_to_do(network: nn.Module, digits: ClassFolders, tmp_path: Path) -> None:
    seen: list[RunSummary] = []
    finetune(network, digits, tmp_path, replace(BRIEF, train="batchnorm", accumulate=2), on_start=seen.append)
    (summary,) = seen
    assert summary.classes == {str(digit): (4, 2) for digit in range(10)}
    assert (summary.epochs, summary.steps, summary.device) == (1, 3, "cpu")
    assert summary.output == "classifier.8, with 10 classes as in the checkpoint"
    assert summary.dropout == "none (switched off: 0.5 (classifier.3), 0.5 (classifier.7))"
    assert summary.batchnorms == 4
    assert 0 < summary.trained_parameters < summary.parameters == sum(each.numel() for each in network.parameters())


PLAIN = "has no effect: the network has no BatchNorm"


@pytest.mark.parametrize(
    ("plain", "changes", "expected"),
    [
        (False, {}, []),
        (False, {"recalibrate": False, "norm_weight_decay": 0.1, "batchnorm": "train", "fit_output": False}, []),
        (
            True,
            {"recalibrate": False, "norm_weight_decay": 0.1, "batchnorm": "freeze"},
            [f"batchnorm='freeze' {PLAIN}", f"recalibrate=False {PLAIN}", f"norm_weight_decay=0.1 {PLAIN}"],
        ),
        (
            False,
            {"train": "head", "batchnorm": "train"},
            ["batchnorm='train' has no effect: all BatchNorm layers are frozen"],
        ),
        (False, {"train": "head", "batchnorm": "freeze"}, []),
        (False, {"freeze_features": True, "batchnorm": "train"}, []),  # the classifier has BatchNorm too
        (
            False,
            {"batchnorm": "freeze-statistics", "recalibrate": False, "norm_weight_decay": 0.1},
            ["recalibrate=False has no effect: BatchNorm keeps its statistics"],
        ),
        (False, {"batchnorm": "renorm", "sync_bn": True}, ["sync_bn=True has no effect: there is one process"]),
        (
            False,
            {"head": 8, "fit_output": False},
            ["fit_output=False has no effect: the output layer of a new head is not fitted"],
        ),
        (False, {"epochs": 3, "patience": 1}, []),
        (False, {"epochs": 3, "patience": 2}, ["patience=2 has no effect: the run has 3 epochs"]),
        (False, {"epochs": 3, "lr_scheduler": "step", "lr_step_size": 2}, []),
        (
            False,
            {"epochs": 2, "lr_scheduler": "step", "lr_step_size": 2},
            ["lr_scheduler='step' has no effect: the run ends before its first step (lr_step_size=2)"],
        ),
        (False, {"batch_size": 40, "accumulate": 2}, ["accumulate=2 has no effect: an epoch has one batch"]),
    ],
)
def test_the_summary_says_which_settings_have_no_effect(
    network: nn.Module,
    digits: ClassFolders,
    tmp_path: Path,
    *,
    plain: bool,
    changes: dict[str, Any],
    expected: list[str],
) -> None:
    seen: list[RunSummary] = []
    model = dense_network() if plain else network
    finetune(model, digits, tmp_path, replace(BRIEF, **changes), on_start=seen.append, stop=lambda: True)
    assert list(seen[0].unused) == expected


def test_weight_decay_has_an_effect_on_other_normalizations_than_batchnorm(
    digits: ClassFolders, tmp_path: Path
) -> None:
    seen: list[RunSummary] = []
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 30 * 30, 10))
    settings = replace(BRIEF, norm_weight_decay=0.01)
    finetune(model, digits, tmp_path, settings, on_start=seen.append, stop=lambda: True)
    assert seen[0].unused == ()


def test_the_time_left_counts_steps_and_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("bn_insert.training.remaining_time.time.monotonic", lambda: now)
    clock, left = RemainingTime(steps=4, epochs=2, evaluated=1.5), []
    clock.begin()
    for step in range(1, 5):
        now += 2
        left.append(clock.after_step(1, step))
    # An image costs a third without its backward pass: 4 steps of 2 s, and 4 s of evaluation, in each epoch.
    assert left == [None, None, 2 + 4 + 8 + 4, 4 + 8 + 4]
    now += 10
    clock.after_evaluation()
    clock.begin()
    now += 2
    assert clock.after_step(2, 1) == 3 * 2 + 10


def test_the_time_left_counts_the_saving_of_each_epoch(
    digits: ClassFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    write, after_evaluation = RunFolder.write, RemainingTime.after_evaluation
    monkeypatch.setattr(RunFolder, "write", lambda *args: (write(*args), order.append("saved")))
    monkeypatch.setattr(
        RemainingTime, "after_evaluation", lambda self: (after_evaluation(self), order.append("measured"))
    )
    finetune(dense_network(), digits, tmp_path, replace(BRIEF, epochs=1))
    assert order == ["saved", "measured"]


def test_steps_tell_the_time_left_once_some_are_timed(digits: ClassFolders, tmp_path: Path) -> None:
    seen: list[StepMetrics] = []
    finetune(dense_network(), digits, tmp_path, BRIEF, on_step=seen.append)
    assert [metrics.seconds_left is None for metrics in seen] == [True, True, False, False, False]


# TensorBoard


def test_tensorboard_that_is_not_installed_is_an_error_before_anything_is_written(
    digits: ClassFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bn_insert.training.tensorboard.find_spec", lambda _name: None)
    with pytest.raises(TrainingError, match=r"not installed; install it with pip install 'bn-insert\[tensorboard\]'"):
        finetune(dense_network(), digits, tmp_path / "run", BRIEF, tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_each_epoch_once_also_when_a_run_is_resumed(
    digits: ClassFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            Path(folder).mkdir(exist_ok=True)
            Path(folder, "events.out.tfevents.1").touch()

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            pass

        close = flush

    monkeypatch.setattr("bn_insert.training.tensorboard.find_spec", lambda _name: object())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    finetune(dense_network(), digits, tmp_path, BRIEF, tensorboard=True)
    assert {name for name, _, _ in written} == {"loss/train", "loss/val", "accuracy/train", "accuracy/val", "lr"}
    written.clear()
    result = finetune(dense_network(), digits, tmp_path, replace(BRIEF, epochs=2), resume=True, tensorboard=True)
    losses = [(value, step) for name, value, step in written if name == "loss/val"]
    assert losses == [(epoch.val_loss, epoch.epoch) for epoch in result.epochs]
    once = written.copy()
    written.clear()
    finetune(dense_network(), digits, tmp_path, replace(BRIEF, epochs=2), resume=True, tensorboard=True)
    assert written == once, "of a run that was complete"


@pytest.mark.parametrize("kept", [None, "notes.txt"])
def test_events_of_a_run_that_is_replaced_go_with_it_and_nothing_else(
    digits: ClassFolders, tmp_path: Path, kept: str | None
) -> None:
    events = tmp_path / "tensorboard" / "events.out.tfevents.1"
    events.parent.mkdir()
    events.touch()
    finetune(dense_network(), digits, tmp_path, replace(BRIEF, epochs=1))
    assert events.exists(), "of nothing that was replaced"
    if kept:
        (events.parent / kept).touch()
    finetune(dense_network(), digits, tmp_path, replace(BRIEF, epochs=2), resume=True)
    assert events.exists()
    finetune(dense_network(), digits, tmp_path, replace(BRIEF, epochs=1), overwrite=True)
    assert not events.exists()
    assert [path.name for path in tmp_path.glob("tensorboard/*")] == ([kept] if kept else [])
    assert events.parent.exists() == bool(kept)


class FailingWriter:
    """A writer of events on a full disk."""

    def __init__(self, folder: str) -> None:
        Path(folder).mkdir()

    def add_scalar(self, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_whose_events_for_tensorboard_cannot_be_written_warns_once_and_goes_on(
    digits: ClassFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bn_insert.training.tensorboard.find_spec", lambda _name: object())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=FailingWriter))
    with pytest.warns(UserWarning, match="tensorboard: No space left on device; everything else is saved") as warned:
        result = finetune(dense_network(), digits, tmp_path, replace(BRIEF, epochs=2), tensorboard=True)
    assert (len(warned), len(result.epochs)) == (1, 2)
    assert (tmp_path / "state.pth").exists()


def test_a_place_where_tensorboard_cannot_write_is_an_error_before_training(
    digits: ClassFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bn_insert.training.tensorboard.find_spec", lambda _name: object())
    folder = tmp_path / "tensorboard"
    folder.touch()
    with pytest.raises(TrainingError, match="tensorboard: it is not a folder; move it away"):
        finetune(dense_network(), digits, tmp_path, BRIEF, tensorboard=True)
    folder.unlink()
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _mode: path != folder)
    with pytest.raises(TrainingError, match=r"cannot write into .*tensorboard: no permission"):
        finetune(dense_network(), digits, tmp_path, BRIEF, tensorboard=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


# Failures on other ranks


def fail_on_rank_1(kind: type[CalibrationError], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "current", classmethod(lambda cls: cls(0, 2)))
    monkeypatch.setattr(Ranks, "meet", lambda *_: None)
    monkeypatch.setattr(Ranks, "gathered", lambda _, mine: [mine, (None, (kind, "its reason"))])


@pytest.mark.parametrize(("kind", "raised"), [(CalibrationError, CalibrationError), (NotFiniteError, DivergenceError)])
def test_only_statistics_that_are_not_finite_are_divergence_also_on_another_rank(
    kind: type[CalibrationError], raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    classifier = SimpleNamespace(
        network=network, amp=False, each_input=lambda batches: [(each, None) for each in batches]
    )
    fail_on_rank_1(kind, monkeypatch)
    with pytest.raises(raised, match="rank 1 failed: its reason") as failure:
        reestimate_statistics(classifier, [torch.rand(8, 3)], StopCheck(None, Ranks(0, 1)))  # type: ignore[arg-type]
    assert type(failure.value) is raised
