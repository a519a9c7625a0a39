"""A new output layer, fitted to the features before anything is trained."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bn_insert import (
    OutputFit,
    TrainingError,
    TrainingSettings,
    finetune,
    fit_output,
    insert_batchnorm,
    load_checkpoint,
)
from bn_insert.compare.evaluation import Outcomes
from bn_insert.demo import network_path
from bn_insert.images import ClassFolders
from bn_insert.training import starting_output
from support.commands import forked_ranks
from support.digits import copy_labelled_digits, open_digits

pytestmark = pytest.mark.usefixtures("one_thread", "no_charts")

# Steps so small that they change no weight.
SETTINGS = TrainingSettings(epochs=1, batch_size=10, lr=1e-30)

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ClassFolders:
    """40 digits to train on and 20 to validate with."""
    return open_digits(copy_labelled_digits(tmp_path_factory.mktemp("digits")))


@pytest.fixture(scope="module")
def train(digits: ClassFolders) -> Batches:
    return shuffled(digits, "train")


@pytest.fixture(scope="module")
def val(digits: ClassFolders) -> Batches:
    return shuffled(digits, "val")


def shuffled(digits: ClassFolders, part: str) -> Batches:
    """Return batches of 10."""
    (batch,) = digits.batches(getattr(digits, part), 100)
    order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(0))
    return list(zip(batch.images[order].split(10), batch.labels[order].split(10), strict=True))


def new_network(classes: int = 10, dropout: float = 0.0) -> nn.Module:
    """Return a network that knows digits, but has an output layer of zeros."""
    network = load_checkpoint(network_path())
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    network.classifier[-1] = nn.Linear(network.classifier[-1].in_features, classes)
    nn.init.zeros_(network.classifier[-1].weight)
    nn.init.zeros_(network.classifier[-1].bias)
    return network


@torch.no_grad()
def accuracy(network: nn.Module, batches: Batches) -> float:
    network.eval()
    return float(torch.cat([network(images).argmax(1) == labels for images, labels in batches]).double().mean())


@torch.no_grad()
def features(network: nn.Module, batches: Batches) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs of the output layer in float64, and the labels."""
    network.double().eval()
    images = torch.cat([images for images, _ in batches]).double()
    found = network.classifier[:-1](network.avgpool(network.features(images)).flatten(1))
    network.float()
    return found.numpy(), torch.cat([labels for _, labels in batches]).numpy()


def run_in(folder: Path) -> dict[str, Any]:
    (run,) = json.loads((folder / "report.json").read_text())["runs"]
    return run


def trained(folder: Path) -> dict[str, Tensor]:
    return dict(torch.load(folder / "state.pth", weights_only=True)["model"])


def test_the_fit_is_the_logistic_regression_that_is_best_on_validation_images(train: Batches, val: Batches) -> None:
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - takes each process two seconds

    network = new_network()
    assert fit_output(network, train, val)
    (train_features, train_labels), (val_features, val_labels) = features(network, train), features(network, val)
    scale = np.sqrt((train_features**2).sum(1).mean())
    fits = []
    for penalty in (10.0 ** (-exponent / 2) for exponent in range(2, 13)):
        # scikit-learn's loss is C times the sum of the cross-entropies plus half the sum of the squared weights.
        fit = LogisticRegression(C=1 / (2 * penalty * len(train_features)), tol=1e-8, max_iter=10_000)
        fit.fit(train_features / scale, train_labels)
        loss = -float(fit.predict_log_proba(val_features / scale)[range(20), val_labels].mean())
        fits.append((loss, fit.decision_function(val_features / scale)))
    expected = torch.from_numpy(min(fits, key=lambda fit: fit[0])[1])
    output = network.classifier[-1].double()
    with torch.no_grad():
        found = output(torch.from_numpy(val_features))
    error = (found - found.mean(1, True) - expected + expected.mean(1, True)).abs().max()
    assert error < 0.05 * expected.std()  # L-BFGS ends after 100 iterations


def test_nothing_but_the_output_layer_is_changed(train: Batches, val: Batches) -> None:
    network = insert_batchnorm(new_network(), train).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert fit_output(network, train, val)
    assert all(module.training for module in network.modules())
    changed = [name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [name for name in before if "running" not in name and "tracked" not in name][-2:]


def test_features_are_normalized_by_their_batch(train: Batches, val: Batches) -> None:
    network = insert_batchnorm(new_network(), train)
    assert fit_output(network, train, val)
    expected = network.classifier[-1].weight.clone()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 100
    nn.init.zeros_(network.classifier[-1].weight)
    assert fit_output(network, train, val)
    assert torch.equal(network.classifier[-1].weight, expected)


def test_dropout_leads_to_smaller_weights(train: Batches, val: Batches) -> None:
    norms = []
    for dropout in (0.0, 0.9):
        network = new_network(dropout=dropout)
        torch.manual_seed(0)
        assert fit_output(network, train, val)
        norms.append(float(network.classifier[-1].weight.detach().norm()))
    assert norms[1] < 0.7 * norms[0]


def test_few_images_of_most_classes_are_enough(train: Batches, val: Batches) -> None:
    """The strongest penalties give no more than the shares of the classes, which are worse than guessing."""
    images, labels = (torch.cat([batch[part] for batch in train]) for part in (0, 1))
    few = [(labels == number).nonzero()[:1, 0] for number in range(1, 10)]
    kept = torch.cat([(labels == 0).nonzero()[:, 0].repeat(12), *few])
    network = new_network()
    assert fit_output(network, [(images[kept], labels[kept])], val)
    assert accuracy(network, val) > 0.8


def test_a_batch_of_one_image_is_left_out_if_batchnorm_would_normalize_by_it(train: Batches, val: Batches) -> None:
    network = insert_batchnorm(new_network(), train, dropout_before_batchnorm=False)
    other = copy.deepcopy(network)
    single = (torch.rand(1, *train[0][0].shape[1:]), torch.tensor([0]))
    assert fit_output(network, train, val)
    assert fit_output(other, [*train, single], [single, *val])
    assert torch.equal(network.classifier[-1].weight, other.classifier[-1].weight)


def test_batches_that_are_sorted_by_class_bring_about_a_warning(train: Batches, val: Batches) -> None:
    network = insert_batchnorm(new_network(), train, dropout_before_batchnorm=False)
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    order = labels.argsort()
    by_class = list(zip(images[order].split(4), labels[order].split(4), strict=True))
    message = "the batches are sorted by class: 1.0 classes in a batch on average, instead of 3.4 in random order"
    with pytest.warns(UserWarning, match=message):
        fit_output(network, by_class, val)
    fit_output(new_network(), by_class, val)  # no BatchNorm, no warning


def test_features_that_say_nothing_change_nothing(train: Batches, val: Batches) -> None:
    for value in (0.0, math.nan, math.inf):
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.Linear(4, 10))
        nn.init.constant_(network[1].weight, value)
        before = network[2].weight.clone()
        assert not fit_output(network, train, val)
        assert torch.equal(network[2].weight, before)


def test_a_fit_without_images_changes_nothing(train: Batches) -> None:
    network = new_network()
    assert not fit_output(network, [], [])
    assert not fit_output(network, train, [])
    assert not network.classifier[-1].weight.any()


def test_features_of_several_positions_change_nothing() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(3, 10)

        def forward(self, images: Tensor) -> Tensor:
            return self.dense(images.flatten(2).transpose(1, 2)).mean(1)

    network = Positions()
    before = network.dense.weight.clone()
    batches = [(torch.rand(4, 3, 8, 8), torch.arange(4))]
    assert not fit_output(network, batches, batches)
    assert torch.equal(network.dense.weight, before)


def test_an_output_layer_without_bias_is_fitted_too(train: Batches, val: Batches) -> None:
    network = new_network()
    network.classifier[-1] = nn.Linear(network.classifier[-1].in_features, 10, bias=False)
    assert fit_output(network, train, val)
    assert accuracy(network, val) > 0.8


def test_a_layer_that_cannot_be_fitted_is_refused(train: Batches, val: Batches) -> None:
    convs = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(
        TrainingError,
        match=r"the output layer 0 is a Conv2d, and only an nn\.Linear with a weight of its own can be fitted",
    ):
        fit_output(convs, train, val)
    computed = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(3 * 32 * 32, 10)))
    with pytest.raises(TrainingError, match="the output layer 1 is a ParametrizedLinear, and only"):
        fit_output(computed, train, val)

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy, self.value = nn.Linear(3 * 32 * 32, 10), nn.Linear(3 * 32 * 32, 1)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return self.policy(images.flatten(1)), self.value(images.flatten(1))

    with pytest.raises(TrainingError, match="value has 1 outputs, and the network returns 10 logits"):
        fit_output(TwoHeads(), train, val)


def test_ambient_modes_and_defaults_make_no_difference(train: Batches, val: Batches) -> None:
    plain, no_grad, double, half = (new_network() for _ in range(4))
    assert fit_output(plain, train, val)
    with torch.no_grad():
        assert fit_output(no_grad, train, val)
    torch.set_default_dtype(torch.float64)
    try:
        assert fit_output(double, train, val)
    finally:
        torch.set_default_dtype(torch.float32)
    assert fit_output(half, train, val, autocast=torch.bfloat16)
    weights = [network.classifier[-1].weight for network in (plain, no_grad, double, half)]
    assert all(torch.equal(weight, weights[0]) for weight in weights[:3])
    assert not torch.equal(weights[3], weights[0])
    assert accuracy(half, val) > 0.8


def test_progress_counts_the_images_of_both_passes(train: Batches, val: Batches) -> None:
    seen: list[int] = []
    fit_output(new_network(), train, val, progress=seen.append)
    assert seen[:7] == [10, 20, 30, 40, 50, 60, 60]
    assert set(seen[7:]) == {60}


def test_a_run_reports_the_accuracy_of_its_fit(digits: ClassFolders, tmp_path: Path) -> None:
    fits: list[OutputFit] = []
    run = finetune(new_network(3), digits, tmp_path, SETTINGS, on_fit=fits.append)
    assert [fit.seen for fit in fits[:7]] == [0, 10, 20, 30, 40, 50, 60]
    assert {fit.images for fit in fits[:-1]} == {80}
    assert [fit for fit in fits[:-1] if fit.done or not fit.new] == []
    assert fits[-1] == OutputFit(0, 0, True, run.epochs[0].val_accuracy, fitted=True, new=True)
    assert run.epochs[0].val_accuracy > 0.8


def test_an_output_layer_that_knows_the_classes_is_kept(digits: ClassFolders, tmp_path: Path) -> None:
    fits: list[OutputFit] = []
    own = load_checkpoint(network_path())
    run = finetune(own, digits, tmp_path, SETTINGS, on_fit=fits.append)
    kept = own.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in trained(tmp_path).items())
    accuracy = run.epochs[0].val_accuracy
    assert fits[:-1] == [OutputFit(0, 20), OutputFit(10, 20), OutputFit(20, 20)]
    assert fits[-1] == OutputFit(0, 0, True, accuracy, own_accuracy=accuracy)
    sentence = f"Output layer kept: validation accuracy {accuracy:.2%} before training."
    assert run_in(tmp_path)["overview"]["Before training"] == sentence


def test_a_network_that_re_estimation_alone_spoils_says_so_and_how_to_keep_its_statistics(
    train: Batches, tmp_path: Path
) -> None:
    data = copy_labelled_digits(tmp_path / "data", train=2, val=6, classes=3)
    for path in data.glob("train/*/*.png"):  # few images that differ little
        Image.open(path).point(lambda value: 96 + value // 16).save(path)
    network = insert_batchnorm(load_checkpoint(network_path()), [images for images, _ in train])
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    fits: list[OutputFit] = []
    run = finetune(network, open_digits(data), tmp_path / "run", SETTINGS, on_fit=fits.append)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    accuracy = run.epochs[0].val_accuracy
    assert fits[-1].accuracy == 1
    assert fits[-1].reestimated_accuracy == pytest.approx(accuracy, abs=0.06)  # on as many images in another order
    keeping = "(batchnorm='freeze-statistics'), or train on more images."
    assert any(verdict.text.endswith(keeping) for verdict in run.health)
    told = run_in(tmp_path / "run")["overview"]["Before training"]
    assert "training images alone lowers it to" in told
    assert "; batchnorm='freeze-statistics' keeps them as they are." in told
    settings = replace(SETTINGS, batchnorm="freeze-statistics")
    run = finetune(network, open_digits(data), tmp_path / "frozen", settings, on_fit=fits.append)
    assert (run.epochs[0].val_accuracy, fits[-1].reestimated_accuracy) == (1, None)


def of_other_classes() -> nn.Module:
    """Return a network that knows the classes in another order, which is as bad as other classes."""
    network = load_checkpoint(network_path())
    with torch.no_grad():
        for tensor in (network.classifier[-1].weight, network.classifier[-1].bias):
            tensor.copy_(tensor.roll(1, 0))
    return network


def test_an_output_layer_of_as_many_other_classes_is_fitted_anew(digits: ClassFolders, tmp_path: Path) -> None:
    fits: list[OutputFit] = []
    run = finetune(of_other_classes(), digits, tmp_path, SETTINGS, on_fit=fits.append)
    before = accuracy(of_other_classes(), [(batch.images, batch.labels) for batch in digits.batches(digits.val, 10)])
    assert before < 0.2
    assert fits[1:4] == [OutputFit(10, 20), OutputFit(20, 20), OutputFit(0, 80, own_accuracy=before)]
    assert fits[-1] == OutputFit(0, 0, True, run.epochs[0].val_accuracy, True, own_accuracy=before)
    assert run.epochs[0].val_accuracy > 0.8
    sentence = run_in(tmp_path)["overview"]["Before training"]
    assert (
        f"little better than guessing on these classes (validation accuracy {before:.2%}), so it was fitted anew"
        in sentence
    )
    finetune(of_other_classes(), digits, tmp_path, replace(SETTINGS, epochs=2), on_fit=fits.clear, resume=True)
    assert run_in(tmp_path)["overview"]["Before training"] == sentence
    assert sentence.split("s output")[1] in (tmp_path / "report.html").read_text()


def poor_fit(model: nn.Module, output: str, *_: object, **__: object) -> str:
    nn.init.zeros_(model.get_parameter(f"{output}.weight"))
    return ""


@pytest.mark.parametrize("better", [True, False])
def test_an_output_layer_that_says_little_is_fitted_anew_if_that_is_more_accurate(
    better: bool, digits: ClassFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that knows some of the classes, and is certain of wrong answers for the others."""
    network = load_checkpoint(network_path())
    layer = network.classifier[-1]
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            tensor[2:] = tensor[2:].roll(1, 0)
            tensor.mul_(30)
    if not better:
        monkeypatch.setattr(starting_output, "fit_layer", poor_fit)
    own = accuracy(network, [(batch.images, batch.labels) for batch in digits.batches(digits.val, 10)])
    assert 0.1 < own <= 0.2
    fits: list[OutputFit] = []
    finetune(network, digits, tmp_path, replace(SETTINGS, lr=1e-30), on_fit=fits.append)
    sentence = run_in(tmp_path)["overview"]["Before training"]
    beginning = "The checkpoint's output layer is little better than guessing on these classes"
    if better:
        assert (fits[-1].fitted, fits[-1].own_accuracy) == (True, own)
        fitted = fits[-1].accuracy
        assert fitted is not None
        assert fitted > own
        outcome = f"so it was fitted anew: validation accuracy {fitted:.2%} before training"
        assert sentence == f"{beginning} (validation accuracy {own:.2%}), {outcome}."
    else:
        reason = "a newly fitted one reaches 10.00%"
        assert fits[-1] == OutputFit(0, 0, True, own, own_accuracy=own, reason=reason)
        assert sentence == f"{beginning} (validation accuracy {own:.2%}), but was kept, because {reason}."
        assert torch.equal(trained(tmp_path)[f"classifier.{len(network.classifier) - 1}.weight"], layer.weight)


@pytest.mark.parametrize(
    ("images", "correct", "loss", "little"),
    [
        ((20,) * 10, (2,) * 10, 4.0, True),
        ((20,) * 10, (2,) * 10, 2.0, False),  # below ln(10)
        ((20,) * 10, (4,) * 10, 4.0, True),
        ((20,) * 10, (5,) * 10, 4.0, False),  # more than twice as accurate as guessing
        ((20,) * 5 + (0,) * 5, (20, 18, 0, 0, 0) + (0,) * 5, 4.0, True),  # classes without images
        ((95,) + (5,) * 9, (95,) + (0,) * 9, 4.0, True),  # always the largest class
        ((50, 50) + (0,) * 8, (40, 30) + (0,) * 8, 4.0, True),
        ((50, 50) + (0,) * 8, (40, 40) + (0,) * 8, 4.0, False),
    ],
)
def test_outputs_that_say_little_are_told_by_loss_and_by_the_mean_over_classes(
    images: tuple[int, ...], correct: tuple[int, ...], loss: float, little: bool
) -> None:
    labels = torch.arange(10).repeat_interleave(torch.tensor(images))
    wrong = (labels + 1) % 10
    right = torch.cat([torch.arange(count) < few for count, few in zip(images, correct, strict=True)])
    assert starting_output._says_little(Outcomes(loss, labels, torch.where(right, labels, wrong), 10)) is little


def test_an_output_layer_that_cannot_be_fitted_stays_and_the_reason_is_told(
    digits: ClassFolders, tmp_path: Path
) -> None:
    fits: list[OutputFit] = []
    convs = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    finetune(convs, digits, tmp_path / "new", SETTINGS, on_fit=fits.append)
    reason = "the output layer 0 is a Conv2d, and only an nn.Linear with a weight of its own can be fitted"
    assert fits == [OutputFit(0, 0, True, new=True, reason=reason)]
    sentence = run_in(tmp_path / "new")["overview"]["Before training"]
    assert sentence == f"The new output layer was not fitted, because {reason}."
    torch.manual_seed(0)
    convs[0] = nn.Conv2d(3, 10, 1)
    nn.init.constant_(convs[0].bias, 9.0)
    nn.init.zeros_(convs[0].weight)
    finetune(convs, digits, tmp_path / "guess", SETTINGS, on_fit=fits.append)
    assert (fits[-1].new, fits[-1].fitted, fits[-1].reason) == (False, False, reason)
    assert ", but was kept, because the output" in run_in(tmp_path / "guess")["overview"]["Before training"]


def test_a_new_head_and_a_run_without_fit_have_none(digits: ClassFolders, tmp_path: Path) -> None:
    fits: list[OutputFit] = []
    finetune(new_network(3), digits, tmp_path / "head", replace(SETTINGS, head=4), on_fit=fits.append)
    run = finetune(new_network(3), digits, tmp_path / "off", replace(SETTINGS, fit_output=False), on_fit=fits.append)
    assert run.epochs[0].val_loss == pytest.approx(math.log(10))
    assert fits == []


@pytest.mark.parametrize("batch_size", [13, 19])
def test_a_last_batch_of_one_image_is_left_out(digits: ClassFolders, tmp_path: Path, batch_size: int) -> None:
    network = insert_batchnorm(new_network(3), [batch.images for batch in digits.batches(digits.train, 20)])
    fits: list[OutputFit] = []
    finetune(network, digits, tmp_path, replace(SETTINGS, batch_size=batch_size), on_fit=fits.append)
    assert 59 in [fit.seen for fit in fits]
    assert 60 not in [fit.seen for fit in fits]
    assert fits[-1].accuracy is not None


def test_a_run_that_cannot_be_fitted_says_why_in_its_first_step(digits: ClassFolders, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 3))
    with pytest.raises(TrainingError, match=r"cannot run on a batch of shape \(10, 3, 32, 32\): .* must have one size"):
        finetune(network, digits, tmp_path / "run", SETTINGS)
    assert not (tmp_path / "run").exists()


def test_a_run_stopped_during_the_fit_is_resumed_with_it(digits: ClassFolders, tmp_path: Path) -> None:
    settings = replace(SETTINGS, lr=1e-3)
    fits: list[OutputFit] = []
    for seen in (2, 8):  # in the first pass, and between two fits
        fits.clear()
        run = finetune(
            new_network(3),
            digits,
            tmp_path / "parts",
            settings,
            on_fit=fits.append,
            stop=lambda seen=seen: len(fits) >= seen,
            overwrite=True,
        )
        assert (run.interrupted, len(fits)) == (True, seen)
    finetune(new_network(3), digits, tmp_path / "parts", settings, on_fit=fits.append, resume=True)
    assert fits[-1].accuracy is not None
    finetune(new_network(3), digits, tmp_path / "whole", settings)
    parts, whole = (trained(tmp_path / name) for name in ("parts", "whole"))
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_a_run_stopped_while_its_fit_is_measured_is_resumed_with_the_fit(digits: ClassFolders, tmp_path: Path) -> None:
    fits: list[OutputFit] = []

    def measuring() -> bool:
        return bool(fits) and fits[-1].seen > 60

    stopped = finetune(of_other_classes(), digits, tmp_path / "parts", SETTINGS, on_fit=fits.append, stop=measuring)
    assert stopped.interrupted
    finetune(of_other_classes(), digits, tmp_path / "parts", SETTINGS, resume=True)
    finetune(of_other_classes(), digits, tmp_path / "whole", SETTINGS)
    assert run_in(tmp_path / "parts")["output_fit"] == run_in(tmp_path / "whole")["output_fit"]


def test_a_layer_that_is_not_called_as_a_module_is_not_fitted(train: Batches, val: Batches) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3 * 32 * 32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x.flatten(1), self.fc.weight, self.fc.bias)

    assert not fit_output(Functional(), train, val)


def test_a_run_stopped_after_the_fit_is_resumed_without_it(digits: ClassFolders, tmp_path: Path) -> None:
    fits: list[OutputFit] = []
    finetune(new_network(3), digits, tmp_path, SETTINGS, on_fit=fits.append, stop=lambda: bool(fits) and fits[-1].done)
    fits.clear()
    finetune(new_network(3), digits, tmp_path, SETTINGS, on_fit=fits.append, resume=True)
    assert fits == []


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
settings = TrainingSettings(epochs=1, batch_size=10, lr=1e-30, dropout=0.0)
finetune(network, images, "ranks", settings, on_fit=fits.append)
print(json.dumps([fits[-1].seen, fits[-1].images, fits[-1].accuracy]))
dist.destroy_process_group()
"""


def test_two_ranks_fit_the_same_layer_to_the_images_of_both(tmp_path: Path) -> None:
    folder = copy_labelled_digits(tmp_path / "digits")
    alone = finetune(new_network(3), open_digits(folder), tmp_path / "alone", replace(SETTINGS, dropout=0.0))
    (tmp_path / "script.py").write_text(RANKS)
    done = forked_ranks(2, "script.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == second == [0, 0, alone.epochs[0].val_accuracy]
    ranks, one = (trained(tmp_path / name) for name in ("ranks", "alone"))
    assert all((ranks[name] - one[name]).norm() <= 0.05 * one[name].norm() for name in one)
