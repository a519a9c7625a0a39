"""A new output layer, fitted to the features of the network before anything else is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..compare.evaluation import outcomes_of
from ..graph.copies import working_copy
from ..images.batch_interface import sample
from ..images.class_folders import ClassFolders, LabelledBatch
from ..support.processes import Ranks, on_every_rank
from ..surgery.replace_output import output_layer
from .classifier import Classifier
from .stopping import StopCheck
from .training_set import TrainingSet

_VALIDATION_IMAGES = 256  # at most
_PENALTIES = tuple(10.0**-exponent for exponent in range(1, 8))  # strong ones first
_ITERATIONS = 100


@dataclass(frozen=True)
class OutputFit:
    """Progress of the fit of a new output layer, and its result at the end.

    Args:
        seen: Images that this process has run through the network so far.
        images: Images that it runs through the network.
        accuracy: Accuracy on up to 256 validation images with the fitted layer; None until it is fitted, and at the end
            if it was not.
    """

    seen: int
    images: int
    accuracy: float | None = None


class _Examples(NamedTuple):
    """The inputs of the output layer for some images, and the labels of the images."""

    features: Float[Tensor, "images features"]
    labels: Int64[Tensor, " images"]

    def prepared(self, size: Float[Tensor, ""], *, bias: bool) -> _Examples:
        """Return the features divided by `size`, with one more that is always 1, whose weights are the biases."""
        features = self.features / size
        return _Examples(F.pad(features, (0, 1), value=1.0) if bias else features, self.labels)


def fit_output(
    classifier: Classifier,
    training_set: TrainingSet,
    images: ClassFolders,
    stop: StopCheck,
    on_fit: Callable[[OutputFit], None] | None = None,
) -> None:
    """Fit a new, dense output layer, in place, to the features that the network computes in eval mode.

    Starting to train with an output layer that knows nothing distorts features that are good already: Kumar et al.,
    "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", 2022, arXiv:2202.10054. The fit
    is logistic regression with an L2 penalty, by L-BFGS. The penalty with the lowest loss on validation images is
    chosen. The layer stays as it is, with zeros, where no fit has a lower loss than that, where features are not finite
    or not one vector for each image, and where it has been fitted before, as in a run that is resumed.

    Args:
        classifier: The network, whose output layer has just been replaced.
        training_set: Where training images are taken from.
        images: Class folders with the validation images.
        stop: Checked after each batch.
        on_fit: Called after each batch, and at the end with the accuracy.

    Raises:
        CalibrationError: When the network is no classifier, or cannot run.
        StoppedError: When the run was asked to stop.
    """
    settings, ranks = training_set.settings, training_set.ranks
    _, layer = output_layer(classifier.network)
    if not isinstance(layer, nn.Linear) or bool(layer.weight.detach().any()):
        return
    val = ranks.share(sample(images.val, _VALIDATION_IMAGES, settings.seed), equal=False)
    count = min(settings.recalibration_images, len(images.train))
    reported = _Reported(-(-count // ranks.count) + len(val), stop, on_fit)
    train = _examples(classifier, training_set.sample(0, count), ranks, reported)
    validation = _examples(classifier, images.batches(val, settings.batch_size) if val else (), ranks, reported)
    fit = None
    if train and validation:
        size = train.features.square().sum(1).mean().sqrt().clamp(min=torch.finfo().tiny)
        train, validation = (part.prepared(size, bias=layer.bias is not None) for part in (train, validation))
        # The first rank computes, so that all ranks get the same values to the last bit.
        fit, *_ = on_every_rank(lambda: _best_fit(train, validation, classifier.classes) if ranks.first else None)
        if fit:
            _assign(layer, fit.weights, size)
    reported.end(fit.accuracy if fit else None)


def _assign(layer: nn.Linear, weights: Float[Tensor, "classes features"], size: Float[Tensor, ""]) -> None:
    """Give a layer the weights of prepared examples."""
    with torch.no_grad():
        layer.weight.copy_(weights[:, : layer.in_features] / size)
        if layer.bias is not None:
            layer.bias.copy_(weights[:, -1])


@dataclass
class _Reported:
    """Reports the progress of several passes over images as one."""

    images: int
    stop: StopCheck
    on_fit: Callable[[OutputFit], None] | None
    before: int = 0

    def during(self, seen: int) -> None:
        if self.on_fit:
            self.on_fit(OutputFit(min(self.before + seen, self.images), self.images))
        self.stop.check()

    def end(self, accuracy: float | None) -> None:
        if self.on_fit:
            self.on_fit(OutputFit(self.images, self.images, accuracy))


def _examples(
    classifier: Classifier, batches: Iterable[LabelledBatch], ranks: Ranks, reported: _Reported
) -> _Examples | None:
    """Return the examples of all processes; None if their features are of no use, or there are none."""
    network = working_copy(classifier.network)
    inputs: list[Tensor] = []
    output_layer(network)[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0].float().cpu()))
    autocast = torch.bfloat16 if classifier.amp else None
    outcomes = outcomes_of(network, map(classifier.inputs, batches), autocast=autocast, progress=reported.during)
    reported.before += sum(map(len, inputs))
    parts = [part for each in ranks.gathered(inputs) for part in each]
    if not parts or any(part.ndim != 2 for part in parts):
        return None
    features = torch.cat(parts)
    if len(features) != outcomes.images or not bool(features.isfinite().all()):
        return None
    return _Examples(features, outcomes.labels.cpu())


class _Fit(NamedTuple):
    """Weights of the output layer, for each feature, and their accuracy on validation images."""

    weights: Float[Tensor, "classes features"]
    accuracy: float


def _best_fit(train: _Examples, validation: _Examples, classes: int) -> _Fit | None:
    """Return the fit with the lowest validation loss; None if it is not lower than that of zeros."""
    weights = torch.zeros(classes, train.features.shape[1], requires_grad=True)
    best, lowest = None, math.log(classes)
    for penalty in _PENALTIES:
        _minimize(weights, train, penalty)
        logits = F.linear(validation.features, weights.detach())
        loss = F.cross_entropy(logits, validation.labels).item()
        if not loss < lowest:
            break
        accuracy = (logits.argmax(1) == validation.labels).double().mean().item()
        best, lowest = _Fit(weights.detach().clone(), accuracy), loss
    return best


def _minimize(weights: Tensor, examples: _Examples, penalty: float) -> None:
    """Minimize cross-entropy plus penalty * |weights|^2, in place, from the weights as they are."""
    optimizer = torch.optim.LBFGS([weights], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        fitted = F.cross_entropy(F.linear(examples.features, weights), examples.labels)
        total = fitted + penalty * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
