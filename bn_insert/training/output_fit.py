"""A new output layer, fitted to the features of the network before anything else is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..compare.evaluation import outcomes_of
from ..errors import TrainingError
from ..graph.copies import check_module, unwrapped, working_copy
from ..images.batch_interface import sample
from ..images.class_folders import ClassFolders
from ..statistics.passes import Progress
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


def fit_output(
    model: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any],
    *,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> float | None:
    """Fit a dense output layer, in place, to the features that the network computes in eval mode.

    Training with an output layer that knows nothing distorts features that are good already (Kumar et al., "Fine-Tuning
    can Distort Pretrained Features and Underperform Out-of-Distribution", 2022, arXiv:2202.10054). The fit is logistic
    regression with an L2 penalty, by L-BFGS; the penalty with the lowest loss on the validation images is chosen. No
    other layer is changed.

    In an initialized torch.distributed process group, every rank calls this with its own part of the batches, which may
    be empty.

    Args:
        model: A classifier, such as one whose output layer `replace_output` has replaced.
        train: Batches of images and labels, as for `evaluate`; iterated once. Their features are kept in memory.
        validation: The same, of images to choose the penalty by.
        autocast: Dtype for the forward passes.
        progress: Called after each batch with the number of images so far, of both passes together.

    Returns:
        The accuracy on the validation images with the fitted layer. None if it was left as it was: no fit has a lower
        validation loss than log(classes), or the features are not finite, or not one vector for each image.

    Raises:
        CalibrationError: As for `evaluate`.
        TrainingError: If the output layer is not dense.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        >>> images = torch.randn(64, 3, 2, 2)
        >>> labels = (images.mean((1, 2, 3)) > 0).long()
        >>> accuracy = fit_output(model, [(images[:48], labels[:48])], [(images[48:], labels[48:])])
        >>> accuracy > 0.8
        True
    """
    check_module(model)
    model, ranks = unwrapped(model), Ranks.current()
    name, layer = output_layer(model)
    if not isinstance(layer, nn.Linear):
        raise TrainingError(f"the output layer {name} is a {type(layer).__name__}; only a dense layer can be fitted")
    known, seen = _examples(model, train, autocast, progress)
    known_val, _ = _examples(model, validation, autocast, progress, seen)
    if known is None or known_val is None:
        return None
    size = known.features.square().sum(1).mean().sqrt().clamp(min=torch.finfo().tiny)
    known, known_val = (part.prepared(size, bias=layer.bias is not None) for part in (known, known_val))
    # The first rank computes, so that all ranks get the same values to the last bit.
    fit, *_ = on_every_rank(lambda: _best_fit(known, known_val, layer.out_features) if ranks.first else None)
    if fit is None:
        return None
    with torch.no_grad():
        layer.weight.copy_(fit.weights[:, : layer.in_features] / size)
        if layer.bias is not None:
            layer.bias.copy_(fit.weights[:, -1])
    return fit.accuracy


def fit_new_output(
    classifier: Classifier,
    training_set: TrainingSet,
    images: ClassFolders,
    stop: StopCheck,
    on_fit: Callable[[OutputFit], None] | None = None,
) -> None:
    """Fit the output layer of a run that begins with a new one, in place, as `fit_output` does.

    A conv stays as it is, and so does a layer that has other weights than zeros: it was fitted before the run was
    interrupted.

    Args:
        classifier: The network, whose output layer has just been replaced.
        training_set: Where training images are taken from.
        images: Class folders with the validation images.
        stop: Checked after each batch.
        on_fit: Called after each batch, and at the end.

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
    total = -(-count // ranks.count) + len(val)
    report = on_fit or (lambda _fit: None)

    def progress(seen: int) -> None:
        report(OutputFit(min(seen, total), total))
        stop.check()

    accuracy = fit_output(
        classifier.network,
        map(classifier.inputs, training_set.sample(0, count)),
        map(classifier.inputs, images.batches(val, settings.batch_size)) if val else (),
        autocast=torch.bfloat16 if classifier.amp else None,
        progress=progress,
    )
    report(OutputFit(total, total, accuracy))


class _Examples(NamedTuple):
    """The inputs of the output layer for some images, and the labels of the images."""

    features: Float[Tensor, "images features"]
    labels: Int64[Tensor, " images"]

    def prepared(self, size: Float[Tensor, ""], *, bias: bool) -> _Examples:
        """Return the features divided by `size`, with one more that is always 1, whose weights are the biases."""
        features = self.features / size
        return _Examples(F.pad(features, (0, 1), value=1.0) if bias else features, self.labels)


def _examples(
    model: nn.Module, batches: Iterable[Any], autocast: torch.dtype | None, progress: Progress | None, before: int = 0
) -> tuple[_Examples | None, int]:
    """Return the examples of all ranks, None if their features are of no use, and the number of this rank's images.

    Args:
        model: The classifier.
        batches: Images and labels.
        autocast: Dtype for the forward passes.
        progress: Called after each batch with the number of images.
        before: The number of images before these.
    """
    network = working_copy(model)
    inputs: list[Tensor] = []
    output_layer(network)[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0].float().cpu()))
    outcomes = outcomes_of(
        network, batches, autocast=autocast, progress=progress and (lambda seen: progress(before + seen))
    )
    parts = [part for each in Ranks.current().gathered(inputs) for part in each]
    seen = before + sum(map(len, inputs))
    if not parts or any(part.ndim != 2 for part in parts):
        return None, seen
    features = torch.cat(parts)
    if len(features) != outcomes.images or not bool(features.isfinite().all()):
        return None, seen
    return _Examples(features, outcomes.labels.cpu()), seen


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
