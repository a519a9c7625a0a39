"""A new output layer, fitted to the features before anything is trained."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from bn_insert import (
    CalibrationError,
    OutputFit,
    TrainingError,
    TrainingSettings,
    finetune,
    fit_output,
    load_checkpoint,
)
from bn_insert.demo import network_path
from bn_insert.images import ClassFolders
from support.commands import forked_ranks
from support.digits import copy_labelled_digits, open_digits

pytestmark = pytest.mark.usefixtures("one_thread", "no_charts")

# Steps so small that they change no weight.
SETTINGS = TrainingSettings(epochs=1, batch_size=8, lr=1e-30)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ClassFolders:
    """40 digits to train on and 20 to validate with."""
    return open_digits(copy_labelled_digits(tmp_path_factory.mktemp("digits")))


@pytest.fixture
def network() -> nn.Module:
    """A network that knows digits, but has an output layer for three other classes."""
    result = load_checkpoint(network_path())
    result.classifier[-1] = nn.Linear(result.classifier[-1].in_features, 3)
    return result


def trained(folder: Path) -> dict[str, Tensor]:
    return dict(torch.load(folder / "state.pth", weights_only=True)["model"])


def logits(network: nn.Module, weights: dict[str, Tensor], features: Tensor) -> Tensor:
    name = next(reversed(dict(network.named_modules())))
    return features @ weights[f"{name}.weight"].double().T + weights[f"{name}.bias"].double()


def features_of(network: nn.Module, digits: ClassFolders, part: str) -> tuple[Tensor, np.ndarray]:
    """Return the inputs of the output layer in float64, and the labels."""
    network.double().eval()
    (batch,) = digits.batches(getattr(digits, part), 100)
    with torch.no_grad():
        features = network.classifier[:-1](network.avgpool(network.features(batch.images.double())).flatten(1))
    network.float()
    return features, batch.labels.numpy()


def test_the_fit_is_the_logistic_regression_that_is_best_on_validation_images(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    finetune(network, digits, tmp_path, SETTINGS)
    (train, train_labels), (val, val_labels) = (features_of(network, digits, part) for part in ("train", "val"))
    size = float(train.square().sum(1).mean().sqrt())
    with_ones = [np.pad(features.numpy() / size, ((0, 0), (0, 1)), constant_values=1) for features in (train, val)]
    fits = []
    for penalty in [10.0**-exponent for exponent in range(1, 8)]:
        # scikit-learn's loss is C times the sum of the cross-entropies plus half the sum of the squared weights.
        strength = 1 / (2 * penalty * len(train))
        fit = LogisticRegression(C=strength, fit_intercept=False, tol=1e-8, max_iter=10_000)
        fit.fit(with_ones[0], train_labels)
        loss = -float(fit.predict_log_proba(with_ones[1])[range(20), val_labels].mean())
        fits.append((loss, fit.decision_function(with_ones[1])))
    expected = torch.from_numpy(min(fits, key=lambda fit: fit[0])[1])
    found = logits(network, trained(tmp_path), val)
    error = (found - found.mean(1, True) - expected + expected.mean(1, True)).abs().max()
    assert error < 0.05 * expected.std()  # L-BFGS ends after 100 iterations


def test_the_accuracy_that_is_reported_is_that_of_a_network_that_is_not_trained_further(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    fits: list[OutputFit] = []
    run = finetune(network, digits, tmp_path, SETTINGS, on_fit=fits.append)
    assert [fit.seen for fit in fits] == [8, 16, 24, 32, 40, 48, 56, 60, 60]
    assert {fit.images for fit in fits} == {60}
    assert [fit.accuracy for fit in fits[:-1]] == [None] * 8
    assert fits[-1].accuracy == run.epochs[0].val_accuracy > 0.8


def test_nothing_but_the_output_layer_is_changed(network: nn.Module, digits: ClassFolders, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    finetune(network, digits, tmp_path, SETTINGS)
    after = trained(tmp_path)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == list(before)[-2:]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_an_output_layer_that_is_kept_is_not_fitted(digits: ClassFolders, tmp_path: Path) -> None:
    fits: list[OutputFit] = []
    finetune(load_checkpoint(network_path()), digits, tmp_path, SETTINGS, on_fit=fits.append)
    assert fits == []
    kept = load_checkpoint(network_path()).state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in trained(tmp_path).items())


def test_without_the_fit_a_new_output_layer_starts_with_zeros(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    run = finetune(network, digits, tmp_path, replace(SETTINGS, fit_output=False))
    assert run.epochs[0].val_loss == pytest.approx(math.log(10))


def test_features_that_say_nothing_leave_zeros(digits: ClassFolders, tmp_path: Path) -> None:
    torch.manual_seed(0)
    blind = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.Linear(4, 3))
    nn.init.zeros_(blind[1].weight)
    fits: list[OutputFit] = []
    run = finetune(blind, digits, tmp_path, SETTINGS, on_fit=fits.append)
    assert fits[-1] == OutputFit(60, 60, None)
    assert run.epochs[0].val_loss == pytest.approx(math.log(10))


def test_an_output_layer_without_bias_is_fitted_too(network: nn.Module, digits: ClassFolders, tmp_path: Path) -> None:
    network.classifier[-1] = nn.Linear(network.classifier[-1].in_features, 3, bias=False)
    run = finetune(network, digits, tmp_path, SETTINGS)
    assert run.epochs[0].val_accuracy > 0.8


def test_dropout_is_off_while_features_are_computed(network: nn.Module, digits: ClassFolders, tmp_path: Path) -> None:
    for name, dropout in (("on", 0.9), ("off", 0.0)):
        finetune(network, digits, tmp_path / name, replace(SETTINGS, dropout=dropout))
    on, off = (trained(tmp_path / name) for name in ("on", "off"))
    assert all(torch.equal(on[name], off[name]) for name in on)


def test_a_conv_as_the_output_layer_is_not_fitted(digits: ClassFolders, tmp_path: Path) -> None:
    fits: list[OutputFit] = []
    convs = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    finetune(convs, digits, tmp_path, SETTINGS, on_fit=fits.append)
    assert fits == []


def test_a_network_whose_output_layer_is_a_conv_cannot_be_fitted() -> None:
    convs = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(TrainingError, match="the output layer 0 is a Conv2d; only a dense layer can be fitted"):
        fit_output(convs, [], [])


def test_a_fit_without_images_changes_nothing(network: nn.Module) -> None:
    before = network.classifier[-1].weight.clone()
    assert fit_output(network, [], []) is None
    assert torch.equal(network.classifier[-1].weight, before)


def test_progress_counts_the_images_of_both_passes(network: nn.Module, digits: ClassFolders) -> None:
    seen: list[int] = []
    train, val = (list(digits.batches(part, 30)) for part in (digits.train, digits.val))
    network.classifier[-1] = nn.Linear(network.classifier[-1].in_features, 10)
    assert (fit_output(network, train, val, progress=seen.append) or 0) > 0.8
    assert seen == [30, 40, 60]


def test_a_run_stopped_during_the_fit_is_resumed_with_it(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, lr=1e-3)
    fits: list[OutputFit] = []
    run = finetune(network, digits, tmp_path / "parts", settings, on_fit=fits.append, stop=lambda: len(fits) >= 2)
    assert (run.interrupted, len(fits)) == (True, 2)
    finetune(network, digits, tmp_path / "parts", settings, on_fit=fits.append, resume=True)
    assert fits[-1].accuracy is not None
    finetune(network, digits, tmp_path / "whole", settings)
    parts, whole = (trained(tmp_path / name) for name in ("parts", "whole"))
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_a_run_stopped_after_the_fit_is_resumed_without_it(
    network: nn.Module, digits: ClassFolders, tmp_path: Path
) -> None:
    fits: list[OutputFit] = []

    def fitted() -> bool:
        return bool(fits) and fits[-1].accuracy is not None

    finetune(network, digits, tmp_path, SETTINGS, on_fit=fits.append, stop=fitted)
    fits.clear()
    finetune(network, digits, tmp_path, SETTINGS, on_fit=fits.append, resume=True)
    assert fits == []


def test_a_network_that_is_no_classifier_is_refused(digits: ClassFolders, tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(3 * 32 * 32, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.dense(images.flatten(1))[:, None]

    with pytest.raises(CalibrationError, match="not one logit per class for each image"):
        finetune(Twice(), digits, tmp_path / "run", SETTINGS)
    assert not (tmp_path / "run").exists()


RANKS = """
import json
import torch
import torch.distributed as dist
from bn_insert import Ranks, TrainingSettings, finetune, load_checkpoint
from bn_insert.demo import network_path
from bn_insert.images import Transform, open_class_folders

dist.init_process_group("gloo")
network = load_checkpoint(network_path())
network.classifier[-1] = torch.nn.Linear(network.classifier[-1].in_features, 3)
images = open_class_folders("digits", Transform(None, None, (0.0,), (1.0,)))
fits = []
finetune(network, images, "ranks", TrainingSettings(epochs=1, batch_size=8, lr=1e-30), on_fit=fits.append)
print(json.dumps([[fit.seen, fit.images, fit.accuracy] for fit in fits]))
dist.destroy_process_group()
"""


def test_two_ranks_fit_the_same_layer_to_the_images_of_both(network: nn.Module, tmp_path: Path) -> None:
    folder = copy_labelled_digits(tmp_path / "digits")
    alone = finetune(network, open_digits(folder), tmp_path / "alone", SETTINGS)
    (tmp_path / "script.py").write_text(RANKS)
    done = forked_ranks(2, "script.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == second
    assert first[-1] == [30, 30, alone.epochs[0].val_accuracy]
    ranks, one = (trained(tmp_path / name) for name in ("ranks", "alone"))
    assert all((ranks[name] - one[name]).norm() <= 0.05 * one[name].norm() for name in one)
