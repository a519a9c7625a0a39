"""Networks that others wrote, in training: layers called in another order than declared, and squeeze()."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bn_insert import (
    OutputFit,
    RunSummary,
    TrainingSettings,
    evaluate,
    finetune,
    fit_output,
    insert_batchnorm,
    inserted_batchnorms,
    load_checkpoint,
    replace_head,
    replace_output,
)
from bn_insert.errors import TrainingError
from bn_insert.images import ClassFolders
from bn_insert.statistics.passes import SINGLE_IMAGE
from support.digits import copy_labelled_digits, open_digits
from support.networks import OutputFirst, randomised

pytestmark = pytest.mark.usefixtures("one_thread", "no_charts")

BRIEF = TrainingSettings(opt="sgd", epochs=1, batch_size=8, lr=0.003)


class SpatialTransformer(nn.Module):
    """Declares its output layer before the layers that transform the image, as in PyTorch's tutorial."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 5, 2), nn.Conv2d(4, 6, 5, 2)
        self.fc1, self.fc2 = nn.Linear(6 * 5 * 5, 12), nn.Linear(12, classes)
        self.localization = nn.Sequential(nn.Conv2d(3, 4, 7), nn.MaxPool2d(4), nn.ReLU(True))
        self.fc_loc = nn.Sequential(nn.Linear(4 * 6 * 6, 8), nn.ReLU(True), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        theta = self.fc_loc(self.localization(x).flatten(1)).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.size()), align_corners=False), align_corners=False)
        x = F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))  # type: ignore[no-any-return]


class Cosine(nn.Module):
    """Computes with the weight of its output layer, which is never called."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.embedding, self.output = nn.Linear(3 * 32 * 32, 8), nn.Linear(8, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.embedding(x.flatten(1))), F.normalize(self.output.weight))


class Features(nn.Module):
    """The features of the networks below: a conv, ReLU, and the mean over the positions unless `flat` is False."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5, 4)

    def features(self, x: Tensor, *, flat: bool = True) -> Tensor:
        x = F.relu(self.conv(x))
        return x.mean((2, 3)) if flat else x


class AttentionPooling(Features):
    """Calls a conv with one channel last; a BatchNorm inserted before it is called after the output layer."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.output = nn.Conv2d(6, classes, 1)
        self.attention = nn.Sequential(nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x, flat=False)
        logits = self.output(h).flatten(2)
        return (logits * self.attention(h).flatten(2).softmax(-1)).sum(-1)  # type: ignore[no-any-return]


class Temperature(Features):
    """Multiplies its logits by the output of a layer that is called last."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.output, self.scale = nn.Linear(6, classes), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        return self.output(h) * F.softplus(self.scale(h))  # type: ignore[no-any-return]


class Auxiliary(Features):
    """Calls an auxiliary head last, and does not return what it computes."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.output, self.auxiliary = nn.Linear(6, classes), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        logits = self.output(h).log_softmax(1)
        self.auxiliary_logits = self.auxiliary(h)
        return logits


class TwoOutputs(Auxiliary):
    """Returns a tuple, in training alone unless `always`."""

    always = True

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return (logits, self.auxiliary_logits) if self.always or self.training else logits


class TwoOutputsInTraining(TwoOutputs):
    always = False


class ArcFace(Features):
    """Has the weight of its output layer as a parameter of its own."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.neck, self.weight = nn.Linear(6, 5), nn.Parameter(torch.rand(classes, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.neck(self.features(x))), F.normalize(self.weight))


class ClassEmbedding(Features):
    """Multiplies features by the embeddings of the classes."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.project, self.classes = nn.Linear(6, 5), nn.Embedding(classes, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.features(x)) @ self.classes.weight.T  # type: ignore[no-any-return]


class JoinedHeads(Features):
    """Returns the logits of two heads in one tensor."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, classes // 2), nn.Linear(6, classes // 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        return torch.cat([self.left(h), self.right(h)], 1)


class Conv1dOutput(Features):
    """Computes its logits with a Conv1d."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.output = nn.Conv1d(6, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(x, flat=False).flatten(2)).mean(2)  # type: ignore[no-any-return]


class NormalizedLogits(SpatialTransformer):
    """Has a BatchNorm of its own behind its output layer."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__(classes)
        self.norm = nn.BatchNorm1d(classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))  # type: ignore[no-any-return]


class Squeezed(nn.Module):
    """Loses the batch axis of a single image."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv, self.hidden, self.output = nn.Conv2d(3, 4, 3, 2), nn.Linear(4, 6), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).mean((2, 3), keepdim=True).squeeze()
        return self.output(F.relu(self.hidden(x)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ClassFolders:
    """40 digits to train on and 20 to validate with."""
    return open_digits(copy_labelled_digits(tmp_path_factory.mktemp("digits")))


def images_of(digits: ClassFolders) -> Tensor:
    return next(digits.batches(digits.train, 40)).images


def trained_in(folder: Path, model: nn.Module, build: Callable[[], nn.Module]) -> set[str]:
    """Return the names of the tensors of a model that a run in a folder has changed."""
    before, after = model.state_dict(), load_checkpoint(folder / "last.pth", model=build).state_dict()
    return {name for name in after if not torch.equal(before[name], after[name])}


def with_batchnorm(model: nn.Module, digits: ClassFolders) -> nn.Module:
    return insert_batchnorm(randomised(model).eval(), [images_of(digits)])


# The output layer


@pytest.mark.parametrize("classes", [4, 10])
def test_a_run_replaces_and_fits_the_layer_that_is_called_last(
    digits: ClassFolders, tmp_path: Path, classes: int
) -> None:
    model = with_batchnorm(SpatialTransformer(classes), digits)
    told: list[RunSummary] = []
    fits: list[OutputFit] = []
    finetune(model, digits, tmp_path, BRIEF, on_start=told.append, on_fit=fits.append)
    assert told[0].output == (
        "fc2 replaced, 4 to 10 classes" if classes == 4 else "fc2, with 10 classes as in the checkpoint"
    )
    assert fits[-1].accuracy is not None
    trained: Any = load_checkpoint(tmp_path / "last.pth", model=lambda: SpatialTransformer(classes))
    assert (trained.fc2.out_features, trained.fc_loc[3].out_features) == (10, 6)
    assert inserted_batchnorms(trained) == inserted_batchnorms(model) != []


def test_a_resumed_run_has_the_same_output_layer(digits: ClassFolders, tmp_path: Path) -> None:
    model = with_batchnorm(SpatialTransformer(), digits)
    finetune(model, digits, tmp_path / "whole", BRIEF)
    asked = itertools.count()
    stopped = finetune(
        model, digits, tmp_path / "parts", replace(BRIEF, fit_output=False), stop=lambda: next(asked) > 3
    )
    assert stopped.interrupted
    finetune(model, digits, tmp_path / "parts", replace(BRIEF, fit_output=False), resume=True)
    finetune(model, digits, tmp_path / "plain", replace(BRIEF, fit_output=False))
    plain, parts = (
        load_checkpoint(tmp_path / name / "last.pth", model=SpatialTransformer).state_dict()
        for name in ("plain", "parts")
    )
    assert [name for name in plain if not torch.equal(plain[name], parts[name])] == []


def test_only_the_layer_that_is_called_last_is_trained_as_the_head(digits: ClassFolders, tmp_path: Path) -> None:
    model = randomised(SpatialTransformer(10)).eval()
    finetune(model, digits, tmp_path, replace(BRIEF, train="head", fit_output=False))
    assert trained_in(tmp_path, model, lambda: SpatialTransformer(10)) == {"fc2.weight", "fc2.bias"}


def test_with_an_example_the_functions_take_the_layer_that_is_called_last(digits: ClassFolders) -> None:
    images = images_of(digits)
    labels = torch.tensor([image.label for image in digits.train])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    batches = [(images[part], labels[part]) for part in order.split(10)]
    model = with_batchnorm(SpatialTransformer(), digits)
    replace_output(model, 10, example=images)
    assert model(images).shape == (40, 10)
    with pytest.raises(TrainingError, match=r"fc_loc.3 has 6 outputs, .* fit_output\(..., example=images\)"):
        fit_output(model, batches, batches)
    assert fit_output(model, batches, batches, example=images)
    assert replace_head(model, 5, 3, example=images) == ["fc2.0", "fc2.1", "fc2.2", "fc2.3"]
    assert model(images).shape == (40, 3)


def test_a_batchnorm_of_a_layer_that_is_declared_later_and_called_earlier_does_not_come_after_the_output() -> None:
    images = torch.rand(4, 3, 8, 8)
    model = insert_batchnorm(OutputFirst(), [images])
    replace_output(model, 3, example=images)
    assert model(images).shape == (4, 3)
    assert inserted_batchnorms(model) == ["conv.1"]


def test_a_network_with_a_batchnorm_of_its_own_behind_the_output_layer_keeps_its_classes(
    digits: ClassFolders, tmp_path: Path
) -> None:
    expected = "^BatchNorm norm comes after the output layer fc2; the output layer of a network with its own BatchNorm"
    with pytest.raises(TrainingError, match=f"{expected} there cannot be replaced$"):
        finetune(NormalizedLogits().eval(), digits, tmp_path / "run", BRIEF)
    told: list[RunSummary] = []
    finetune(NormalizedLogits(10).eval(), digits, tmp_path / "run", BRIEF, on_start=told.append)
    assert told[0].output == "fc2, with 10 classes as in the checkpoint"


def test_without_an_example_a_batchnorm_that_is_declared_after_the_output_layer_is_refused_with_the_example() -> None:
    class OutputFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output, self.conv, self.norm = nn.Linear(4, 10), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.norm(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]

    with pytest.raises(TrainingError, match=r"only declared after it, pass one batch \(example=images\); other"):
        replace_output(OutputFirst(), 3)
    replace_output(OutputFirst(), 3, example=torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("build", "batchnorm"),
    [(AttentionPooling, True), (AttentionPooling, False), (Temperature, False), (Auxiliary, True)],
)
def test_the_output_layer_has_as_many_outputs_as_logits_and_an_effect_on_them_whatever_is_called_after_it(
    digits: ClassFolders, tmp_path: Path, build: Callable[[int], nn.Module], batchnorm: bool
) -> None:
    for classes, output in (
        (10, "output, with 10 classes as in the checkpoint"),
        (4, "output replaced, 4 to 10 classes"),
    ):
        model = with_batchnorm(build(classes), digits) if batchnorm else build(classes)
        told: list[RunSummary] = []
        finetune(model, digits, tmp_path / str(classes), BRIEF, on_start=told.append)
        assert told[0].output == output
        trained = load_checkpoint(tmp_path / str(classes) / "last.pth", model=lambda classes=classes: build(classes))
        assert trained(images_of(digits)).shape == (40, 10)


def test_a_head_that_has_no_effect_on_the_logits_is_not_trained_alone(digits: ClassFolders, tmp_path: Path) -> None:
    model = randomised(Auxiliary(10)).eval()
    finetune(model, digits, tmp_path, replace(BRIEF, train="head", fit_output=False))
    assert trained_in(tmp_path, model, lambda: Auxiliary(10)) == {"output.weight", "output.bias"}


@pytest.mark.parametrize("build", [TwoOutputs, TwoOutputsInTraining])
def test_a_network_that_returns_a_tuple_is_refused_before_anything_is_fitted(
    digits: ClassFolders, tmp_path: Path, build: Callable[[int], nn.Module]
) -> None:
    fits: list[OutputFit] = []
    with pytest.raises(TrainingError, match=r"returns a tuple for .* only classifiers can be fine-tuned"):
        finetune(build(10), digits, tmp_path / "run", BRIEF, on_fit=fits.append)
    assert not fits
    assert not (tmp_path / "run").exists()


def test_of_several_outputs_the_first_is_the_one_whose_layer_is_replaced() -> None:
    model, images = TwoOutputs(), torch.rand(2, 3, 32, 32)
    replace_output(model, 3, example=images)
    assert [logits.shape[1] for logits in model(images)] == [3, 4]


@pytest.mark.parametrize("build", [ArcFace, ClassEmbedding, JoinedHeads, Conv1dOutput])
def test_logits_that_no_layer_computes_are_trained_as_they_are(
    digits: ClassFolders, tmp_path: Path, build: Callable[[int], nn.Module]
) -> None:
    told: list[RunSummary] = []
    fits: list[OutputFit] = []
    model = randomised(build(10)).eval()
    finetune(model, digits, tmp_path, BRIEF, on_start=told.append, on_fit=fits.append)
    assert told[0].output == "not found among the layers; the 10 outputs of the network are kept"
    assert not fits[-1].fitted
    assert fits[-1].reason in {"", "the logits are not the outputs of one nn.Linear or nn.Conv2d"}
    before, after = model.state_dict(), load_checkpoint(tmp_path / "last.pth", model=lambda: build(10)).state_dict()
    assert [name for name in after if torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize(
    ("classes", "settings", "advice"),
    [
        (4, {}, r"returns 4 logits, .*; build the network for 10 classes \(model\)"),
        (10, {"head": 8}, r"returns 10 logits, .*; keep the head"),
        (10, {"train": "head"}, r"no head to train; leave out train='head'"),
    ],
)
def test_a_layer_that_does_not_exist_is_not_replaced(
    digits: ClassFolders, tmp_path: Path, classes: int, settings: dict[str, Any], advice: str
) -> None:
    for build in (ArcFace, JoinedHeads, Conv1dOutput):
        with pytest.raises(TrainingError, match=advice):
            finetune(build(classes), digits, tmp_path / "run", replace(BRIEF, **settings))
    assert not (tmp_path / "run").exists()


def test_a_layer_that_does_not_exist_is_not_fitted(digits: ClassFolders) -> None:
    images = images_of(digits)
    batches = [(images, torch.arange(40) % 4)]
    with pytest.raises(TrainingError, match="ArcFace returns 4 logits, and they are not the outputs of one"):
        fit_output(ArcFace(), batches, batches, example=images)
    with pytest.raises(TrainingError, match="neck has 5 outputs, and the network returns 4 logits") as refused:
        fit_output(ArcFace(), batches, batches, example=torch.rand(2))  # the network does not run on it
    assert "example" not in str(refused.value)


def test_an_output_layer_that_is_not_called_gets_no_new_head(digits: ClassFolders, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"Cosine does not call its output layer output, .*; keep the head"):
        finetune(Cosine(), digits, tmp_path / "run", replace(BRIEF, head=8))
    assert not (tmp_path / "run").exists()
    fits: list[OutputFit] = []
    finetune(Cosine(), digits, tmp_path / "run", BRIEF, on_fit=fits.append)
    assert fits[-1].reason == "the network uses its weight without calling it"


def test_in_a_network_with_nan_no_batchnorm_before_the_output_layer_comes_after_it() -> None:
    images = torch.rand(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)).eval()
    nn.init.constant_(model[0].weight, math.nan)
    replace_output(model, 3, example=images)
    assert model(images).shape == (4, 3)


def test_a_conv_that_is_called_last_is_the_output_layer_of_a_network_with_dense_layers_too() -> None:
    class GatedConvs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.output, self.gate = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv(x))
            return self.output(x * self.gate(x.mean((2, 3))).sigmoid()[..., None, None]).mean((2, 3))  # type: ignore[no-any-return]

    model, images = GatedConvs(), torch.rand(2, 3, 8, 8)
    replace_output(model, 3, example=images)
    assert model(images).shape == (2, 3)


def test_an_output_layer_whose_weight_alone_is_used_is_the_last_one_declared(
    digits: ClassFolders, tmp_path: Path
) -> None:
    told: list[RunSummary] = []
    finetune(Cosine(), digits, tmp_path, replace(BRIEF, fit_output=False), on_start=told.append)
    assert told[0].output == "output replaced, 4 to 10 classes"


def test_an_example_that_does_not_fit_leaves_the_last_layer_declared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    replace_output(model, 3, example=torch.rand(2, 5))
    assert model(torch.rand(2, 4)).shape == (2, 3)


def test_the_layer_that_is_taken_for_the_output_is_named_where_a_network_cannot_run(
    digits: ClassFolders, tmp_path: Path
) -> None:
    class OfFourClasses(SpatialTransformer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).view(len(x), 4)

    with pytest.raises(TrainingError, match=r"cannot run on a batch .*; fc2 is assumed to be its output layer"):
        finetune(OfFourClasses(), digits, tmp_path / "run", replace(BRIEF, batch_size=7))


# Single images


@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize(("batch_size", "steps"), [(13, 3), (19, 3)])
def test_a_network_that_takes_no_single_image_is_trained_and_validated_on_all_images(
    digits: ClassFolders, tmp_path: Path, batch_size: int, steps: int, batchnorm: bool
) -> None:
    model = randomised(Squeezed()).eval()
    if batchnorm:
        with pytest.warns(UserWarning, match="cannot run on a single image"):
            model = insert_batchnorm(model, [images_of(digits)])
    fits: list[OutputFit] = []
    run = finetune(model, digits, tmp_path, replace(BRIEF, batch_size=batch_size), on_fit=fits.append)
    assert run.epochs[0].step == steps, "a last batch of one image is left out"
    assert fits[-1].accuracy is not None
    trained = load_checkpoint(tmp_path / "last.pth", model=Squeezed)
    found = evaluate(trained, digits.batches(digits.val, 20))
    assert (run.epochs[0].val_accuracy, run.epochs[0].val_loss) == (found.accuracy, pytest.approx(found.loss))


@pytest.mark.parametrize(("train", "val", "batch_size"), [(4, 2, 1), (1, 1, 2)])
def test_a_run_in_which_every_batch_would_be_a_single_image_is_refused_before_it_begins(
    tmp_path: Path, train: int, val: int, batch_size: int
) -> None:
    digits = open_digits(copy_labelled_digits(tmp_path / "digits", train=train, val=val, classes=2))
    if val == 1:
        digits = replace(digits, val=digits.val[:1])
    with pytest.raises(TrainingError, match="Squeezed cannot run on a single image") as refused:
        finetune(Squeezed(), digits, tmp_path / "run", replace(BRIEF, batch_size=batch_size))
    assert SINGLE_IMAGE in str(refused.value)
    assert not (tmp_path / "run").exists()
