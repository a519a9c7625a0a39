"""The predictions of a network before and after a change, on the same images, with or without labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..graph.copies import working_copy
from ..graph.inputs import Inputs
from ..statistics.pass_options import ProgressCallback
from ..statistics.passes import NumberedBatch, failures_named, for_each_batch
from .evaluation import first_output, labels_in


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy on the images of one class.

    Attributes:
        label: Index of the class.
        images: Number of images.
        before: Fraction of them that the original classifies correctly.
        after: Fraction of them that the changed network classifies correctly.
    """

    label: int
    images: int
    before: float
    after: float


@dataclass(frozen=True)
class PredictionComparison:
    """Predictions of an original and a changed network.

    Attributes:
        images: Number of images.
        classes: Number of classes; 0 if the outputs are not class scores.
        entropy_before: Mean entropy of the original's class probabilities, in nats; NaN without classes.
        entropy_after: The same for the changed network.
        agreement: Fraction of images (for dense prediction: of positions) for which both predict the same class; NaN
            without classes.
        per_class: Accuracy for each class that has labeled images; empty without labels.
        classes_before: Effective number of classes that the original predicts: the exponential of the entropy of the
            class probabilities averaged over the images; NaN without classes.
        classes_after: The same for the changed network.
    """

    images: int
    classes: int
    entropy_before: float
    entropy_after: float
    agreement: float
    per_class: tuple[ClassAccuracy, ...] = ()
    classes_before: float = nan
    classes_after: float = nan

    @property
    def labelled(self) -> int:
        """Number of images with a label."""
        return sum(each.images for each in self.per_class)

    @property
    def accuracy_before(self) -> float:
        """Accuracy of the original on all labeled images; NaN without labels."""
        return self._mean([each.before for each in self.per_class])

    @property
    def accuracy_after(self) -> float:
        """Accuracy of the changed network on all labeled images; NaN without labels."""
        return self._mean([each.after for each in self.per_class])

    def _mean(self, accuracies: list[float]) -> float:
        correct = sum(value * each.images for value, each in zip(accuracies, self.per_class, strict=True))
        return correct / self.labelled if self.labelled else float("nan")


def compare_predictions(
    original: nn.Module, changed: nn.Module, batches: Iterable[Any], *, progress: ProgressCallback | None = None
) -> PredictionComparison:
    """Run two networks in eval mode on the same images, and return how their predictions differ.

    No labels are needed. If a batch is a tuple or list whose second value is an integer tensor with one label per
    image, as from a DataLoader, the accuracy for each class is measured too. The networks are not changed, and
    PyTorch's random state is restored.

    Args:
        original: A network that returns one score (logit) per class.
        changed: The same network after a change, such as the one that `adapt_statistics` makes.
        batches: As for `insert_batchnorm`.
        progress: Called after each batch with the number of images so far.

    Raises:
        CalibrationError: If there are no images, or a network cannot run on a batch.

    Examples:
        >>> model = nn.Linear(4, 3)
        >>> compare_predictions(model, model, [(torch.rand(8, 4), torch.zeros(8, dtype=torch.long))]).agreement
        1.0
    """
    networks = {"original": working_copy(original)}
    if changed is not original:
        networks["changed network"] = working_copy(changed)
    totals = _Totals()

    def run(batch: NumberedBatch) -> None:
        logits = []
        for role, network in networks.items():
            inputs = Inputs.of(batch.value, batch.number, network)
            with failures_named(f"the {role} ({type(network).__name__})", batch):
                output = first_output(network, inputs)
            if output is None:
                raise CalibrationError(f"{type(network).__name__} returns no tensor, so there are no logits to compare")
            logits.append(output)
        totals.add(logits[0].cpu().double(), logits[-1].cpu().double(), labels_in(batch))

    images = for_each_batch(original, batches, run, progress=progress)
    if images == 0:
        raise CalibrationError("there are no images to compare the predictions on: the iterable yielded no batches")
    return totals.comparison(images)


@dataclass
class _Totals:
    """Sums over the batches so far."""

    classes: int = 0
    predictions: int = 0
    entropy: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    probabilities: list[Tensor | float] = field(default_factory=lambda: [0.0, 0.0])  # of each class
    agreeing: int = 0
    labels: list[Tensor] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)

    def add(self, before: Tensor, after: Tensor, labels: Tensor | None) -> None:
        if before.ndim < 2 or before.shape[1] < 2:
            return
        self.classes = before.shape[1]
        for number, logits in enumerate((before, after)):
            log_probabilities = logits.log_softmax(1)
            self.entropy[number] -= (log_probabilities.exp() * log_probabilities).nan_to_num().sum()
            self.probabilities[number] += log_probabilities.exp().nan_to_num().transpose(0, 1).flatten(1).sum(1)
        predicted = torch.stack([before.argmax(1), after.argmax(1)])
        self.agreeing += int((predicted[0] == predicted[1]).sum())
        self.predictions += predicted[0].numel()
        if labels is not None and before.ndim == 2:
            self.labels.append(labels)
            self.correct.append(predicted == labels)

    def comparison(self, images: int) -> PredictionComparison:
        if not self.predictions:
            return PredictionComparison(images, 0, float("nan"), float("nan"), float("nan"))
        before, after = (self.entropy / self.predictions).tolist()
        agreement = self.agreeing / self.predictions
        shares = (torch.as_tensor(sums) / self.predictions for sums in self.probabilities)
        predicted = (-(share * share.log()).nan_to_num().sum() for share in shares)
        return PredictionComparison(
            images,
            self.classes,
            before,
            after,
            agreement,
            tuple(self._per_class()),
            *(float(entropy.exp()) for entropy in predicted),
        )

    def _per_class(self) -> list[ClassAccuracy]:
        if not self.labels:
            return []
        labels, correct = torch.cat(self.labels), torch.cat(self.correct, 1).double()
        return [
            ClassAccuracy(label, int((labels == label).sum()), *correct[:, labels == label].mean(1).tolist())
            for label in labels.unique().tolist()
        ]
