"""Run a classifier on images: its accuracy on labeled images, and its predictions for images without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from ..errors import CalibrationError, as_passed
from ..graph.copies import working_copy
from ..graph.inputs import Inputs
from ..graph.outputs import tensors_of
from ..statistics.pass_options import ProgressCallback
from ..statistics.passes import NumberedBatch, for_each_batch, under_autocast
from ..support.arguments import is_list, is_number, is_whole
from ..support.processes import on_every_rank


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a classifier on labeled images.

    Attributes:
        images: Number of images.
        accuracy: Fraction of the images whose largest logit is that of their class.
        loss: Mean cross-entropy, in nats; NaN or Inf if logits are.
        classes: Name of each class, in the order of the logits.
        class_accuracy: Accuracy on the images of each class; NaN for a class without images.
        confusion: Number of images by their class (outer tuple) and by the class predicted (inner tuple).
    """

    images: int
    accuracy: float
    loss: float
    classes: tuple[str, ...]
    class_accuracy: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, the most probable first.

    Attributes:
        path: Path of its file, or None if the batch has no attribute `paths`.
        labels: Indices of the classes.
        classes: Names of the classes.
        probabilities: Softmax of the logits; NaN if a logit is not finite.
    """

    path: Path | None
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


class Outcomes(NamedTuple):
    """The outcome for each labeled image.

    There is no matrix of counts: with 20,000 classes it would take gigabytes, and validation does not need it.

    Attributes:
        loss: Mean cross-entropy; NaN without images.
        labels: The index of each image's class.
        predicted: The index of the class predicted for it.
        classes: Number of classes; 0 without images.
    """

    loss: float
    labels: Int64[Tensor, " images"]
    predicted: Int64[Tensor, " images"]
    classes: int

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def accuracy(self) -> float:
        """Fraction of the images whose class is predicted; NaN without images."""
        return float((self.labels == self.predicted).double().mean())

    def evaluation(self, classes: Sequence[str]) -> Evaluation:
        """Return the counts for each class, with their names."""
        pairs = self.labels * self.classes + self.predicted
        confusion = torch.bincount(pairs, minlength=self.classes**2).reshape(self.classes, self.classes)
        per_class = confusion.diagonal() / confusion.sum(1, dtype=torch.float64)  # 0 / 0 is NaN
        counts = tuple(map(tuple, confusion.tolist()))
        return Evaluation(
            self.images, self.accuracy, self.loss, tuple(classes), tuple(per_class.tolist()), confusion=counts
        )


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    classes: Sequence[str] = (),
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Run a classifier in eval mode on labeled images, and return its accuracy, loss and confusion matrix.

    The model is not changed, and PyTorch's random state is restored. Inside an initialized torch.distributed process
    group, every rank calls this with its own part of the batches, which may be empty, and gets the result for all parts
    together.

    Args:
        model: A network that returns one logit per class for each image. If it has several outputs (tuples, lists,
            dicts), the first is used.
        batches: Tuples, lists or dicts whose first value is the input and whose second value is an integer tensor with
            the index of each image's class, as from a DataLoader; iterated once.
        classes: Names of the classes, in the order of the logits, such as `read_checkpoint(path).settings.classes`.
            Defaults to their indices.
        device: Where to run; by default the model's device.
        autocast: Dtype for the forward pass.
        progress: Called after each batch with the number of images so far.

    Raises:
        CalibrationError: If there are no images, a batch has no labels or a label out of range, the model cannot run on
            a batch or does not return one logit per class, or `classes` does not name each class.

    Examples:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> nn.init.eye_(model.weight)
        Parameter containing:
        tensor([[1., 0.],
                [0., 1.]], requires_grad=True)
        >>> found = evaluate(model, [(torch.tensor([[3.0, 0], [2, 1], [0, 1]]), torch.tensor([0, 1, 1]))])
        >>> found.class_accuracy, found.confusion
        ((1.0, 0.5), ((1, 0), (1, 1)))
    """
    network = working_copy(model, device)
    outcomes = outcomes_of(network, batches, classes=classes, autocast=autocast, progress=progress)
    if outcomes.images == 0:
        raise CalibrationError("there are no images to evaluate the model on: the iterable yielded no batches")
    return outcomes.evaluation(_names(classes, outcomes.classes, model))


def predict(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    top: int = 1,
    classes: Sequence[str] = (),
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: ProgressCallback | None = None,
) -> list[Prediction]:
    """Run a classifier in eval mode on images, and return the most probable classes of each, in order.

    The model is not changed, and PyTorch's random state is restored.

    Args:
        model: As for `evaluate`.
        batches: As for `insert_batchnorm`; iterated once. Batches of `bn_insert.images` include the path of each image.
        top: Number of classes for each image; all of them if there are fewer.
        classes: As for `evaluate`.
        device: Where to run; by default the model's device.
        autocast: Dtype for the forward pass.
        progress: Called after each batch with the number of images so far.

    Raises:
        CalibrationError: If `top` is less than 1, the model cannot run on a batch or does not return one logit per
            class, or `classes` does not name each class.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = model[1].weight.zero_(), model[1].bias.copy_(torch.tensor([0.25, 0.75]).log())
        >>> found = predict(model, [torch.rand(8, 4)], top=2, classes=["cat", "dog"])
        >>> len(found), found[0].classes, round(found[0].probabilities[0], 2)
        (8, ('dog', 'cat'), 0.75)
    """
    if not (is_whole(top) and top >= 1):
        raise CalibrationError(f"top is {top!r:.40}; use a whole number, 1 or more")
    network = working_copy(model, device)
    predictions: list[Prediction] = []

    def run(batch: NumberedBatch) -> None:
        logits = _logits(network, batch, autocast)
        names = _names(classes, logits.shape[1], model)
        paths = getattr(batch.value, "paths", None) or [None] * len(logits)
        # Sorted by logits: different ones may have the same probability.
        labels = logits.sort(dim=1, descending=True, stable=True).indices[:, :top]
        probabilities = logits.softmax(1).gather(1, labels)
        for path, label, values in zip(paths, labels.tolist(), probabilities.tolist(), strict=True):
            predictions.append(Prediction(path, tuple(label), tuple(names[each] for each in label), tuple(values)))

    for_each_batch(network, batches, run, progress=progress)
    return predictions


def outcomes_of(
    network: nn.Module,
    batches: Iterable[Any],
    *,
    classes: Sequence[str] = (),
    autocast: torch.dtype | None = None,
    progress: ProgressCallback | None = None,
    smallest: int = 1,
) -> Outcomes:
    """Run a working copy of a classifier on labeled images, and return the outcomes for those of all ranks.

    Args:
        network: From `working_copy`.
        batches: As for `evaluate`.
        classes: As for `evaluate`; checked in the first batch.
        autocast: Dtype for the forward pass.
        progress: Called after each batch with the number of images so far.
        smallest: Batches with fewer images are left out.

    Raises:
        CalibrationError: As for `evaluate`, but not if there are no images.
    """

    def measure() -> Outcomes:
        parts: list[Outcomes] = []

        def run(batch: NumberedBatch) -> None:
            if len(batch.inputs) < smallest:
                return
            logits = _logits(network, batch, autocast)
            if not parts:
                _names(classes, logits.shape[1], network)
            labels = _labels(batch, logits.shape[1])
            loss = float(F.cross_entropy(logits, labels))
            parts.append(Outcomes(loss, labels, logits.argmax(1), logits.shape[1]))

        for_each_batch(network, batches, run, progress=progress)
        return _joined(parts)

    return _joined(on_every_rank(measure))


def _joined(parts: Sequence[Outcomes]) -> Outcomes:
    parts = [part for part in parts if part.images]
    if not parts:
        none = torch.zeros(0, dtype=torch.int64)
        return Outcomes(float("nan"), none, none, 0)
    labels = torch.cat([part.labels for part in parts])
    loss = sum(part.loss * part.images for part in parts) / len(labels)
    return Outcomes(loss, labels, torch.cat([part.predicted for part in parts]), parts[-1].classes)


def _logits(
    network: nn.Module, batch: NumberedBatch, autocast: torch.dtype | None
) -> Float64[Tensor, "images classes"]:
    """Return the logits of a batch, on the CPU: other devices lack float64."""
    with under_autocast(network, autocast):
        logits = first_output(network, batch.inputs)
    if logits is None or logits.ndim != 2 or len(logits) != len(batch.inputs) or logits.shape[1] < 2:
        found = "no tensor" if logits is None else f"the shape {tuple(logits.shape)}"
        raise CalibrationError(
            f"the output of {type(network).__name__} is {found} for {batch}, not one logit per class for each image; "
            "only classifiers with two or more classes can be evaluated"
        )
    return logits.cpu().double()


def first_output(network: nn.Module, inputs: Inputs) -> Tensor | None:
    """Return the first tensor among the outputs.

    A single image whose batch axis squeeze() in the forward removes runs together with a copy of itself.
    """
    alone = len(inputs) == 1
    try:
        output = first_tensor(inputs.run(network))
    except Exception:  # a BatchNorm or a concatenation may raise anything without the axis
        if not alone:
            raise
        output = None
    if alone and (output is None or output.ndim == 1):
        pair = first_tensor(inputs.mapped(lambda tensor: torch.cat([tensor, tensor])).run(network))
        return pair if pair is None else pair[:1]
    return output


def first_tensor(outputs: Any) -> Tensor | None:
    """Return the first tensor among the outputs of a network; None without any."""
    return next(iter(tensors_of(outputs)), None)


def _labels(batch: NumberedBatch, classes: int) -> Int64[Tensor, " images"]:
    labels = labels_in(batch)
    if labels is None:
        raise CalibrationError(
            f"{batch} has {_instead_of_labels(batch)}; pass a tuple (images, labels), where labels is a tensor of "
            "integers (int64), the index of each image's class"
        )
    if wrong := labels[(labels < 0) | (labels >= classes)].tolist():
        raise CalibrationError(f"{batch} has the label {wrong[0]}, but the model's classes are 0 to {classes - 1}")
    return labels


def labels_in(batch: NumberedBatch) -> Int64[Tensor, " images"] | None:
    """Return the labels of a batch on the CPU, or None unless one integer per image follows the network's inputs."""
    labels = _after_inputs(batch)
    if not isinstance(labels, Tensor) or labels.shape != (len(batch.inputs),):
        return None
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    return labels.cpu().long() if whole else None


def _instead_of_labels(batch: NumberedBatch) -> str:
    """Describe what a batch contains instead of labels, to follow "has" in a message."""
    found = _after_inputs(batch)
    if isinstance(found, Tensor):
        advice = ""
        if found.shape[:-1] == (len(batch.inputs),):
            one_hot = found.shape[-1] > 1
            advice = " (if they are one-hot, use labels.argmax(1))" if one_hot else " (use labels.flatten())"
        return f"labels of {found.dtype} and shape {tuple(found.shape)}{advice}"
    numbers = isinstance(found, tuple | list) and all(map(is_number, found))  # others may be paths or names
    return f"labels of type {type(found).__name__}" if numbers or isinstance(found, np.ndarray) else "no labels"


def _after_inputs(batch: NumberedBatch) -> Any:
    """Return the first value of a batch after the network's inputs; None without one."""
    value, inputs = batch.value, batch.inputs
    others: Sequence[Any] = ()
    if isinstance(value, Mapping):
        by_name = (
            inputs.kwargs.keys() if inputs.kwargs and inputs.kwargs.keys() <= value.keys() else {next(iter(value))}
        )
        others = [each for name, each in value.items() if name not in by_name]
    elif isinstance(value, tuple | list):
        # The inputs may be in a tuple of their own, or the first values.
        in_own = isinstance(value[0], tuple | list | Mapping)
        others = value[1 if in_own else len(inputs.args) + len(inputs.kwargs) :]
    return next(iter(others), None)


def _names(classes: Sequence[str], count: int, model: nn.Module) -> tuple[str, ...]:
    if not classes:
        return tuple(map(str, range(count)))
    if not is_list(classes):
        raise CalibrationError(f"classes is {classes!r:.40}; pass a list with the name of each class")
    if len(classes) != count:
        names = as_passed(
            "name each of its classes, in the order of the outputs", option="pass one folder for each of its classes"
        )
        raise CalibrationError(
            f"{type(model).__name__} has {count} outputs, but there are {len(classes)} classes; if these are other "
            f"classes, fine-tune it first; otherwise {names}"
        )
    return tuple(classes)
