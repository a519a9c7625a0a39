import math

import pytest
import torch
from torch import Tensor, nn

from bn_insert import CalibrationError, compare_predictions


class Scores(nn.Module):
    """Returns its input as scores, scaled."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


SCORES = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.5], [0.0, 0.0, 9.0]])


class Squeezed(Scores):
    """Loses the batch axis of a single image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze()


def test_a_single_image_counts_where_squeeze_removes_its_axis() -> None:
    labelled = [(part, part.argmax(1)) for part in SCORES.split(3)]
    found = compare_predictions(Squeezed(1.0), Squeezed(-1.0), labelled)
    assert (found.images, found.labelled, found.classes) == (4, 4, 3)
    assert (found.accuracy_before, found.accuracy_after) == (1, 0)


def test_a_network_without_a_tensor_among_its_outputs_is_named() -> None:
    class Nothing(Scores):
        def forward(self, _: Tensor) -> None:
            return None

    with pytest.raises(CalibrationError, match="Nothing returns no tensor, so there are no"):
        compare_predictions(Nothing(1.0), Nothing(1.0), [SCORES])


def test_entropy_and_agreement_need_no_labels() -> None:
    found = compare_predictions(Scores(1.0), Scores(-1.0), SCORES.split(3))
    expected = torch.distributions.Categorical(logits=SCORES).entropy().mean()
    assert found.entropy_before == pytest.approx(float(expected), rel=1e-6)
    assert (found.images, found.classes, found.agreement, found.per_class) == (4, 3, 0.0, ())
    assert math.isnan(found.accuracy_before)
    shares = SCORES.double().softmax(1).mean(0)
    assert found.classes_before == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-6)


def test_labels_give_the_accuracy_of_each_class_and_of_all() -> None:
    labels = torch.tensor([0, 1, 2, 2])
    batches = list(zip(SCORES.split(3), labels.split(3), strict=True))
    found = compare_predictions(Scores(1.0), Scores(-1.0), batches)
    assert [(each.label, each.images, each.before, each.after) for each in found.per_class] == [
        (0, 1, 1.0, 0.0),
        (1, 1, 1.0, 0.0),
        (2, 2, 0.5, 0.0),
    ]
    assert (found.accuracy_before, found.accuracy_after, found.labelled) == (0.75, 0.0, 4)


def test_outputs_that_are_not_class_scores_have_no_entropy() -> None:
    found = compare_predictions(Scores(1.0), Scores(2.0), [SCORES[:, :1]])
    assert found.classes == 0
    assert math.isnan(found.entropy_after)


def test_without_images_there_is_nothing_to_compare() -> None:
    with pytest.raises(CalibrationError, match="no images to compare the predictions on"):
        compare_predictions(Scores(1.0), Scores(2.0), [])
