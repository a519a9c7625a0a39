"""An output layer fitted to the features of a network, before anything else is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..batchnorm.batch_renorm import BatchRenorm
from ..batchnorm.modes import needs_several_values
from ..compare.evaluation import outcomes_of
from ..errors import CalibrationError, ImageError, TrainingError
from ..graph.copies import check_module, unwrapped, working_copy
from ..images.class_folders import ClassFolders, LabelledBatch
from ..statistics.passes import Progress
from ..support.processes import Ranks, on_every_rank
from ..surgery.replace_output import output_layer
from .classifier import Classifier
from .stopping import StopCheck
from .training_set import TrainingSet
from .validation import validate, with_sampled_validation

_TRAINING_IMAGES = 1024  # at most
_PENALTIES = tuple(10.0 ** (-exponent / 2) for exponent in range(2, 13))  # 0.1 to 1e-6, strong ones first
_ITERATIONS, _HISTORY = 100, 10  # of L-BFGS; each entry of its history takes twice the memory of the layer


@dataclass(frozen=True)
class OutputFit:
    """Progress of the fit of a new output layer, and its result at the end.

    Args:
        seen: Images that this process has run through the network so far.
        images: Images that it runs through the network.
        done: Whether the fit is complete.
        accuracy: Accuracy of the network with the fitted layer on up to 256 validation images; None before the fit is
            complete, and if the layer was left as it was.
    """

    seen: int
    images: int
    done: bool = False
    accuracy: float | None = None


def fit_output(
    model: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any],
    *,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> bool:
    """Fit a dense output layer, in place, to the features that the network computes in training.

    An untrained output layer distorts pretrained features in the first steps of training (Kumar et al., "Fine-Tuning
    can Distort Pretrained Features and Underperform Out-of-Distribution", 2022, arXiv:2202.10054). The fit is logistic
    regression with an L2 penalty on the weights, by L-BFGS. Features are normalized as in training, by the statistics
    of their batch, so use batches of the size that you train with. Of the penalties, the one with the lowest loss on
    the validation images is chosen, with the dropout of training, which large weights would not get along with. No
    other layer is changed, and no running statistics.

    In an initialized torch.distributed process group, every rank calls this with its own part of the batches, which may
    be empty.

    Args:
        model: A classifier, such as one whose output layer `replace_output` has replaced.
        train: Batches of images and labels in random order, as for `evaluate`; iterated once. The inputs of the output
            layer are kept in memory.
        validation: The same for the images that choose the penalty; iterated once.
        autocast: Dtype for the forward passes.
        progress: Called after each batch with the number of images so far, of both passes together, and before each
            fit.

    Returns:
        Whether the layer was fitted. It is left as it was if no fit has a lower validation loss than log(classes), if
        there are no images, or if the features are not finite, or not one vector for each image.

    Raises:
        CalibrationError: As for `evaluate`, but not if there are no images.
        TrainingError: If the output layer is not an nn.Linear with a weight of its own, or does not have one output for
            each logit.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        >>> images = torch.randn(64, 3, 2, 2)
        >>> labels = (images.mean((1, 2, 3)) > 0).long()
        >>> fit_output(model, [(images[:48], labels[:48])], [(images[48:], labels[48:])])
        True
        >>> (model(images).argmax(1) == labels).double().mean().item() > 0.9
        True
    """
    check_module(model)
    model, ranks = unwrapped(model), Ranks.current()
    name, layer = output_layer(model)
    if not can_be_fitted(layer):
        raise TrainingError(
            f"the output layer {name} is a {type(layer).__name__} that cannot be fitted; only an nn.Linear with a "
            "weight of its own can be"
        )
    train_set, seen = _features(_as_trained(model, dropout=False), train, autocast, progress)
    val_set, seen = _features(_as_trained(model, dropout=True), validation, autocast, progress, seen)
    if train_set is None or val_set is None:
        return False

    def fit() -> _Layer | None:
        with torch.enable_grad(), torch.autocast(layer.weight.device.type, enabled=False):
            return _best_fit(train_set, val_set, layer, lambda: progress and progress(seen))

    # The first rank computes, so that all ranks get the same values to the last bit.
    found, *_ = on_every_rank(lambda: fit() if ranks.first else None)
    if found:
        with torch.no_grad():
            layer.weight.copy_(found.weight)
            if layer.bias is not None:
                layer.bias.copy_(found.bias)
    return found is not None


def can_be_fitted(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether `fit_output` can fit a layer: a dense one whose weight is not computed from other parameters."""
    return isinstance(layer, nn.Linear) and "weight" in layer._parameters


def fit_new_output(
    classifier: Classifier,
    training_set: TrainingSet,
    images: ClassFolders,
    stop: StopCheck,
    on_fit: Callable[[OutputFit], None] | None = None,
) -> None:
    """Fit the output layer of a run that begins with a new one, in place, as `fit_output` does.

    A layer that `fit_output` cannot fit stays as it is, and so does one that has other weights than zeros: it was
    fitted before the run was interrupted.

    Args:
        classifier: The network, whose output layer has just been replaced.
        training_set: Where training images are taken from.
        images: Class folders with the validation images.
        stop: Checked after each batch and before each fit, if this is the only process.
        on_fit: Called after each batch, and at the end.

    Raises:
        CalibrationError: When it fails on another rank.
        StoppedError: When the run was asked to stop.
    """
    settings, ranks, size = training_set.settings, training_set.ranks, training_set.settings.batch_size
    _, layer = output_layer(classifier.network)
    if not can_be_fitted(layer) or bool(layer.weight.detach().any()):
        return
    images = with_sampled_validation(images, settings.seed)
    val = ranks.share(images.val, equal=False)
    least = 2 if any(map(needs_several_values, classifier.network.modules())) else 1
    count = min(_TRAINING_IMAGES, len(images.train))
    total = -(-count // ranks.count) + len(val)
    report = on_fit or (lambda _fit: None)

    def progress(seen: int) -> None:
        report(OutputFit(min(seen, total), total))
        stop.check()

    def inputs(batches: Iterable[LabelledBatch]) -> Iterable[Any]:
        return (classifier.inputs(batch) for batch in batches if len(batch.labels) >= least)

    try:
        fitted = fit_output(
            classifier.network,
            inputs(training_set.sample(0, count)),
            inputs(images.batches(val, size)) if val else (),
            autocast=torch.bfloat16 if classifier.amp else None,
            progress=progress,
        )
        accuracy = validate(classifier, images, size, ranks, stop).accuracy if fitted else None
    except ImageError:
        stop.check()  # a signal to the entire process group has ended the processes that decode
        raise
    except CalibrationError:
        if ranks.count > 1:
            raise
        accuracy = None  # the first step fails too, and says more
    report(OutputFit(total, total, True, accuracy))


class _Examples(NamedTuple):
    """The inputs of the output layer for some images, and the labels of the images."""

    features: Float[Tensor, "images features"]
    labels: Int64[Tensor, " images"]


def _as_trained(model: nn.Module, *, dropout: bool) -> nn.Module:
    """Return a copy in train mode, with its dropout or without."""
    network = working_copy(model).train()
    for module in network.modules():
        # Ranks may have different numbers of batches, so that none may wait for the statistics of the others.
        if isinstance(module, nn.SyncBatchNorm) or (isinstance(module, _DropoutNd) and not dropout):
            module.eval()
        elif isinstance(module, BatchRenorm):
            module.synchronize = False
    return network


def _features(
    network: nn.Module, batches: Iterable[Any], autocast: torch.dtype | None, progress: Progress | None, before: int = 0
) -> tuple[_Examples | None, int]:
    """Return the examples of all ranks, or None if their features are of no use, and the number of images so far.

    Args:
        network: A copy of the classifier.
        batches: Images and labels.
        autocast: Dtype for the forward passes.
        progress: Called after each batch with the number of images so far.
        before: Number of this rank's images before these.

    Raises:
        TrainingError: If the output layer does not have one output for each logit.
    """
    inputs: list[Tensor] = []
    name, layer = output_layer(network)

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        (features,) = args or kwargs.values()
        # A copy: of a view, the entire tensor would be kept.
        inputs.append(features.detach().to(layer.weight.device, torch.float32, copy=True))

    layer.register_forward_pre_hook(keep, with_kwargs=True)
    outcomes = outcomes_of(
        network, batches, autocast=autocast, progress=progress and (lambda seen: progress(before + seen))
    )
    seen = before + sum(map(len, inputs))
    ranks = Ranks.current()
    sent = inputs if ranks.count == 1 else [part.cpu() for part in inputs]  # not to the GPUs of other ranks
    parts = [part.to(layer.weight.device) for each in ranks.gathered(sent) for part in each]
    if not parts or any(part.ndim != 2 for part in parts):
        return None, seen
    if outcomes.classes != layer.out_features:
        raise TrainingError(
            f"{name} has {layer.out_features} outputs, and the network returns {outcomes.classes} logits, so it is "
            "not the output layer, and cannot be fitted"
        )
    features = torch.cat(parts)
    if len(features) != outcomes.images or not bool(features.isfinite().all()):
        return None, seen
    return _Examples(features, outcomes.labels.to(features.device)), seen


class _Layer(NamedTuple):
    """Weight and bias of a dense layer; the bias is zero for a layer without one."""

    weight: Float[Tensor, "classes features"]
    bias: Float[Tensor, " classes"]


def _best_fit(
    train_set: _Examples, val_set: _Examples, layer: nn.Linear, before_each: Callable[[], object]
) -> _Layer | None:
    """Return the fit with the lowest validation loss; None if it is not lower than that of zeros."""
    scale = train_set.features.square().sum(1).mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    train_set, val_set = (part._replace(features=part.features / scale) for part in (train_set, val_set))
    weight = train_set.features.new_zeros(layer.weight.shape, requires_grad=True)
    bias = train_set.features.new_zeros(layer.out_features, requires_grad=layer.bias is not None)
    best, lowest = None, math.log(layer.out_features)
    for penalty in _PENALTIES:
        before_each()
        _minimize(weight, bias, train_set, penalty)
        with torch.no_grad():
            loss = F.cross_entropy(F.linear(val_set.features, weight, bias), val_set.labels).item()
        if loss < lowest:
            best, lowest = _Layer((weight.detach() / scale).cpu(), bias.detach().cpu().clone()), loss
        elif best:
            break
    return best


def _minimize(weight: Tensor, bias: Tensor, examples: _Examples, penalty: float) -> None:
    """Minimize cross-entropy plus penalty * |weight|^2, in place, from the values as they are."""
    parameters = [parameter for parameter in (weight, bias) if parameter.requires_grad]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=_ITERATIONS, history_size=_HISTORY, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        fitted = F.cross_entropy(F.linear(examples.features, weight, bias), examples.labels)
        total = fitted + penalty * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
