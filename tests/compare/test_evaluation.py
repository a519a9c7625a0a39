"""Accuracy, loss and confusion matrix of a classifier, and its predictions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bn_insert import CalibrationError, evaluate, predict
from bn_insert.compare.evaluation import outcomes_of
from bn_insert.images import Batch
from support.networks import SeveralOutputs, images, small_vgg

EYE = torch.eye(3)


class Given(nn.Module):
    """Returns its inputs, which are logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def labelled(count: int = 30, batch_size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(10, (count,), generator=generator)
    return list(zip(images(count, 16).split(batch_size), labels.split(batch_size), strict=True))


def test_accuracy_loss_and_confusion_equal_those_of_a_plain_loop() -> None:
    model, batches = small_vgg(), labelled()
    with torch.inference_mode():
        logits = torch.cat([model(x) for x, _ in batches]).double()
    labels = torch.cat([y for _, y in batches])
    found = evaluate(model, batches)
    assert found.images == 30
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    predicted = logits.argmax(1)
    assert found.accuracy == pytest.approx(float((predicted == labels).double().mean()))
    for row in range(10):
        expected = [int(((labels == row) & (predicted == column)).sum()) for column in range(10)]
        assert list(found.confusion[row]) == expected
        accuracy = expected[row] / sum(expected) if sum(expected) else math.nan
        assert found.class_accuracy[row] == pytest.approx(accuracy, nan_ok=True)


def test_the_size_of_batches_does_not_matter() -> None:
    one, two = (evaluate(small_vgg(), labelled(batch_size=size)) for size in (7, 30))
    assert one.confusion == two.confusion
    assert one.loss == pytest.approx(two.loss, rel=1e-6)


class Squeezed(nn.Module):
    """Loses the batch axis of a single image, which the BatchNorm or the user of the logits misses."""

    def __init__(self, *, batchnorm: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 10, 3), nn.BatchNorm1d(10) if batchnorm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).amax((2, 3), keepdim=True).squeeze())  # type: ignore[no-any-return]


@pytest.mark.parametrize("batchnorm", [False, True])
def test_a_last_image_alone_whose_batch_axis_is_lost_counts_as_the_others_do(batchnorm: bool) -> None:
    torch.manual_seed(0)
    model, batches = Squeezed(batchnorm=batchnorm).eval(), labelled(17, 8)
    whole, parts = (evaluate(model, each) for each in (labelled(17, 17), batches))
    assert parts.confusion == whole.confusion
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    one = predict(model, [batches[-1]])
    assert [each.labels for each in one] == [each.labels for each in predict(model, labelled(17, 17))[-1:]]


def test_the_parts_of_several_ranks_are_evaluated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = labelled()
    whole = evaluate(small_vgg(), batches)
    parts = [outcomes_of(small_vgg(), part) for part in (batches[1:], [], batches[:1])]
    monkeypatch.setattr("bn_insert.compare.evaluation.on_every_rank", lambda _measure: parts)
    pooled = evaluate(small_vgg(), [])
    assert pooled.loss == pytest.approx(whole.loss)
    assert replace(pooled, loss=whole.loss) == whole


def test_dropout_and_training_flags_do_not_matter_and_stay() -> None:
    model, batches = small_vgg(dropout=0.5).train(), labelled()
    state = torch.random.get_rng_state()
    assert evaluate(model, batches) == evaluate(small_vgg(), batches)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_class_without_images_has_no_accuracy() -> None:
    found = evaluate(Given(), [(EYE[[0, 0, 1]], torch.tensor([0, 1, 1]))], classes=("ant", "bee", "cat"))
    assert found.classes == ("ant", "bee", "cat")
    assert found.class_accuracy[:2] == (1.0, 0.5)
    assert math.isnan(found.class_accuracy[2])
    assert found.confusion == ((1, 0, 0), (1, 1, 0), (0, 0, 0))


def test_a_dict_and_labels_of_another_integer_type_are_taken() -> None:
    found = evaluate(Given(), [{"images": EYE, "labels": torch.tensor([0, 1, 0], dtype=torch.uint8)}])
    assert (found.images, found.classes) == (3, ("0", "1", "2"))
    assert found.accuracy == pytest.approx(2 / 3)


def test_logits_that_are_not_finite_show_in_the_loss() -> None:
    found = evaluate(Given(), [(EYE * torch.nan, torch.arange(3))])
    assert math.isnan(found.loss)


@pytest.mark.parametrize(
    ("batches", "wording"),
    [
        ([], "no images to evaluate the model on"),
        ([EYE], "batch 0 of shape (3, 3) has no labels; pass a tuple (images, labels)"),
        ([(EYE,)], "has no labels"),
        ([(EYE, [0, 1, 2])], "has labels of type list; pass a tuple"),
        ([(EYE, np.arange(3))], "has labels of type ndarray; pass a tuple"),
        ([(EYE, ("ant.png", "bee.png", "cat.png"))], "batch 0 of shape (3, 3) has no labels; pass a tuple"),
        ([(EYE, torch.arange(3)[:, None])], "has labels of torch.int64 and shape (3, 1) (use labels.flatten()); pass"),
        ([(EYE, torch.arange(2))], "has labels of torch.int64 and shape (2,); pass a tuple"),
        (
            [(EYE, torch.rand(3))],
            "batch 0 of shape (3, 3) has labels of torch.float32 and shape (3,); pass a tuple (images, labels), where "
            "labels is a tensor of integers (int64)",
        ),
        (
            [(EYE, EYE)],
            "has labels of torch.float32 and shape (3, 3) (if they are one-hot, use labels.argmax(1)); pass a tuple",
        ),
        ([(EYE, torch.tensor([0, 3, 1]))], "has the label 3, but the model's classes are 0 to 2"),
        ([(EYE, torch.tensor([0, -1, 1]))], "has the label -1"),
        ([(torch.rand(3, 1), torch.zeros(3, dtype=torch.long))], "is the shape (3, 1) for batch 0 of shape (3, 1)"),
        ([(torch.rand(3, 2, 4), torch.zeros(3, dtype=torch.long))], "only classifiers with two or more classes"),
    ],
)
def test_what_cannot_be_evaluated_is_named(batches: list[Any], wording: str) -> None:
    with pytest.raises(CalibrationError) as refusal:
        evaluate(Given(), batches)
    assert wording in str(refusal.value)


def test_names_must_be_those_of_all_classes() -> None:
    for run in (evaluate, predict):
        with pytest.raises(CalibrationError, match="has 3 outputs, but there are 2 classes"):
            run(Given(), [(EYE, torch.arange(3))], classes=("ant", "bee"))  # type: ignore[operator]
    with pytest.raises(CalibrationError, match="has 3 outputs, but there are 4 classes"):
        evaluate(Given(), [(EYE, torch.arange(3)), (EYE, torch.tensor([3, 3, 3]))], classes=("a", "b", "c", "d"))


def test_predictions_are_in_the_order_of_the_images_and_the_most_probable_first() -> None:
    probabilities = torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]])
    batch = Batch(probabilities.log(), (Path("a.png"), Path("b.png")))
    found = predict(Given(), [batch], top=2, classes=("x", "y", "z"))
    assert [each.path for each in found] == [Path("a.png"), Path("b.png")]
    assert [each.classes for each in found] == [("y", "z"), ("x", "z")]
    assert [each.labels for each in found] == [(1, 2), (0, 2)]
    assert [each.probabilities for each in found] == [pytest.approx((0.5, 0.3)), pytest.approx((0.7, 0.2))]


def test_predictions_of_a_plain_tensor_have_no_path_and_at_most_all_classes() -> None:
    (found,) = predict(Given(), [EYE[:1]], top=9)
    assert found.path is None
    assert (found.labels, found.classes) == ((0, 1, 2), ("0", "1", "2"))
    assert sum(found.probabilities) == pytest.approx(1)
    assert predict(Given(), []) == []


def test_logits_so_large_that_their_probabilities_are_equal_are_still_ordered() -> None:
    (found,) = predict(Given(), [torch.tensor([[-2000.0, -1000.0, 1000.0]])], top=3)
    assert found.labels == (2, 1, 0)
    assert found.probabilities == (1.0, 0.0, 0.0)


def test_no_class_cannot_be_asked_for() -> None:
    with pytest.raises(CalibrationError, match="top is 0; use a whole number, 1 or more"):
        predict(Given(), [EYE], top=0)


def test_of_several_outputs_a_map_is_not_one_logit_per_class() -> None:
    with pytest.raises(CalibrationError, match="the output of SeveralOutputs is the shape"):
        predict(SeveralOutputs(), [images(2, 8)])


class Indexed(nn.Module):
    """A classifier that takes images and an integer for each."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.embedding = nn.Linear(4, 3), nn.Embedding(3, 3)

    def forward(self, image: Tensor, index: Tensor) -> Tensor:
        return self.dense(image) + 100 * self.embedding(index)  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["tuple in a tuple", "flat", "dict"])
def test_labels_follow_all_inputs_of_a_network_with_several(form: str) -> None:
    model, x, index = Indexed().eval(), torch.rand(20, 4), torch.randint(0, 3, (20,))
    labels = model(x, index).argmax(1)
    batch: Any = {
        "tuple in a tuple": ((x, index), labels),
        "flat": (x, index, labels),
        "dict": {"image": x, "index": index, "label": labels},
    }[form]
    assert evaluate(model, [batch]).accuracy == 1
    with pytest.raises(CalibrationError, match="has no labels"):
        evaluate(model, [(x, index)])


class TakesDict(nn.Module):
    """A classifier that takes a batch as a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.dense(batch["image"])  # type: ignore[no-any-return]


def test_labels_in_a_dict_follow_what_the_network_takes_of_it() -> None:
    x = torch.rand(20, 4)
    takes_dict, takes_image = TakesDict().eval(), nn.Linear(4, 3).eval()
    labels = takes_dict({"image": x}).argmax(1)
    assert evaluate(takes_dict, [{"image": x, "label": labels}]).accuracy == 1
    labels = takes_image(x).argmax(1)
    assert evaluate(takes_image, [{"data": {"input": x}, "label": labels}]).accuracy == 1
