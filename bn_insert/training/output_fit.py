"""An output layer fitted to the features of a network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..batchnorm.batch_renorm import BatchRenorm
from ..batchnorm.modes import needs_several_values
from ..compare.evaluation import outcomes_of
from ..errors import TrainingError
from ..graph.copies import check_module, unwrapped, working_copy
from ..statistics.pass_options import ProgressCallback
from ..support.arguments import check_progress
from ..support.processes import Ranks, on_every_rank
from ..surgery.replace_output import output_layer

_PENALTIES = tuple(10.0 ** (-exponent / 2) for exponent in range(2, 13))  # 0.1 to 1e-6, strong ones first
_SORTED = 0.5  # of the classes that a batch in random order would have
_ITERATIONS, _HISTORY = 100, 10  # of L-BFGS; each entry of its history takes twice the memory of the layer


def fit_output(
    model: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any],
    *,
    example: Any = None,
    autocast: torch.dtype | None = None,
    progress: ProgressCallback | None = None,
) -> bool:
    """Fit a dense output layer, in place, to the features that the network computes in training.

    An untrained output layer distorts pretrained features in the first steps of training (Kumar et al., "Fine-Tuning
    can Distort Pretrained Features and Underperform Out-of-Distribution", 2022, arXiv:2202.10054). The fit is logistic
    regression with an L2 penalty on the weights, by L-BFGS. Features are normalized as in training, by the statistics
    of their batch, so use batches of the size that you train with. Of the penalties, the one with the lowest loss on
    the validation images is chosen. Dropout is on for them, as in training, so that weights that are too large for it
    are not chosen. No other layer is changed, nor are any running statistics.

    In an initialized torch.distributed process group, every rank calls this with its own part of the batches, which may
    be empty.

    A batch of one image is left out if a BatchNorm would have to normalize by it. Batches that are sorted by class
    cause a warning: BatchNorm would normalize them by the statistics of one class.

    Args:
        model: A classifier, such as one whose output layer `replace_output` has replaced.
        train: Batches of images and labels in random order, as for `evaluate`; iterated once. The inputs of the output
            layer are kept in memory.
        validation: The same for the images used to choose the penalty, also in random order; iterated once.
        example: One batch, used to find the output layer, as for `replace_output`.
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
    check_progress(progress)
    model = unwrapped(model)
    name, layer = output_layer(model, example).found(model, "train it without a fit")
    if not can_be_fitted(layer):
        raise TrainingError(not_fittable(name, layer))
    try:
        return not fit_layer(model, name, train, validation, autocast=autocast, progress=progress)
    except NotTheOutputError as error:
        advice = "" if example is not None else "; pass one batch to find it: fit_output(..., example=images)"
        raise TrainingError(f"{error}{advice}") from None


def fit_layer(
    model: nn.Module,
    output: str,
    train: Iterable[Any],
    validation: Iterable[Any],
    *,
    autocast: torch.dtype | None = None,
    progress: ProgressCallback | None = None,
) -> str:
    """Fit the output layer of this name, as `fit_output` does; return why it was not fitted, empty if it was.

    Raises:
        NotTheOutputError: If it does not have one output for each logit.
        CalibrationError: As for `fit_output`.
    """
    layer = cast(nn.Linear, model.get_submodule(output))
    try:
        network = _as_trained(model, dropout=False)
        train_set, seen = _features(network, output, train, autocast=autocast, progress=progress)
        network = _as_trained(model, dropout=True)
        val_set, seen = _features(network, output, validation, autocast=autocast, progress=progress, before=seen)
    except _UnusableError as error:
        return str(error)

    def fit() -> _Layer | None:
        with torch.enable_grad(), torch.autocast(layer.weight.device.type, enabled=False):
            return _best_fit(train_set, val_set, layer, lambda: progress and progress(seen))

    # The first rank computes, so that all ranks get the same values to the last bit.
    ranks = Ranks.current()
    found, *_ = on_every_rank(lambda: fit() if ranks.first else None)
    if found is None:
        return "no fit did better than chance on the validation images"
    with torch.no_grad():
        layer.weight.copy_(found.weight)
        if layer.bias is not None:
            layer.bias.copy_(found.bias)
    return ""


def not_fittable(name: str, layer: nn.Module) -> str:
    """Return why `can_be_fitted` is False for the output layer of this name, as a clause."""
    kind = type(layer).__name__
    return f"the output layer {name} is a {kind}, and only an nn.Linear with a weight of its own can be fitted"


def can_be_fitted(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether `fit_output` can fit a layer: a dense one whose weight is not computed from other parameters."""
    return isinstance(layer, nn.Linear) and "weight" in layer._parameters


class NotTheOutputError(TrainingError):
    """The layer to fit does not have one output for each logit."""


class _UnusableError(Exception):
    """There are no features, or none that a layer could be fitted to; the message is a clause."""


class _Examples(NamedTuple):
    """The inputs of the output layer for some images, and the labels of the images."""

    features: Float[Tensor, "images features"]
    labels: Int64[Tensor, " images"]


def _as_trained(model: nn.Module, *, dropout: bool) -> nn.Module:
    """Return a copy in train mode, with its dropout or without."""
    network = working_copy(model, training=True)
    for module in network.modules():
        # Ranks may have different numbers of batches, so that none may wait for the statistics of the others.
        if isinstance(module, nn.SyncBatchNorm) or (isinstance(module, _DropoutNd) and not dropout):
            module.eval()
        elif isinstance(module, BatchRenorm):
            module.synchronize = False
    return network


def _features(
    network: nn.Module,
    output: str,
    batches: Iterable[Any],
    *,
    autocast: torch.dtype | None,
    progress: ProgressCallback | None,
    before: int = 0,
) -> tuple[_Examples, int]:
    """Return the examples of all ranks, and the number of this rank's images so far.

    Args:
        network: A copy of the classifier.
        output: Name of its output layer.
        batches: Images and labels.
        autocast: Dtype for the forward passes.
        progress: Called after each batch with the number of images so far.
        before: Number of this rank's images before these.

    Raises:
        _UnusableError: If there are no features, or they are of no use.
        NotTheOutputError: If the output layer does not have one output for each logit.
    """
    inputs: list[Tensor] = []
    layer = cast(nn.Linear, network.get_submodule(output))

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        (features,) = args or kwargs.values()
        # A copy: of a view, the entire tensor would be kept.
        inputs.append(features.detach().to(layer.weight.device, torch.float32, copy=True))

    layer.register_forward_pre_hook(keep, with_kwargs=True)
    by_batch = any(map(needs_several_values, network.modules()))
    outcomes = outcomes_of(
        network,
        batches,
        autocast=autocast,
        progress=progress and (lambda seen: progress(before + seen)),
        smallest=2 if by_batch else 1,
    )
    seen = before + sum(map(len, inputs))
    ranks = Ranks.current()
    sent = inputs if ranks.count == 1 else [part.cpu() for part in inputs]  # not to the GPUs of other ranks
    parts = [part.to(layer.weight.device) for each in ranks.gathered(sent) for part in each]
    if outcomes.images == 0:
        raise _UnusableError("there are no images, or only batches of one image")
    if not parts:
        raise _UnusableError("the network uses its weight without calling it")
    if any(part.ndim != 2 for part in parts):
        raise _UnusableError("its inputs are not one vector for each image")
    if outcomes.classes != layer.out_features:
        raise NotTheOutputError(
            f"{output} has {layer.out_features} outputs, and the network returns {outcomes.classes} logits, so it is "
            "not the output layer, and cannot be fitted"
        )
    features = torch.cat(parts)
    if len(features) != outcomes.images:
        raise _UnusableError("its inputs are not one vector for each image")
    if not bool(features.isfinite().all()):
        raise _UnusableError("its inputs contain NaN or Inf")
    if by_batch:
        _warn_if_sorted(outcomes.labels, [len(part) for part in parts])
    return _Examples(features, outcomes.labels.to(features.device)), seen


def _warn_if_sorted(labels: Int64[Tensor, " images"], sizes: Sequence[int]) -> None:
    """Warn if batches of these sizes have less than half of the classes that they would have in random order."""
    fractions = labels.bincount() / len(labels)
    found = sum(len(batch.unique()) for batch in labels.split(list(sizes)))
    expected = sum(float((1 - (1 - fractions) ** size).sum()) for size in sizes)
    if found < _SORTED * expected:
        warnings.warn(
            f"the batches are sorted by class: {found / len(sizes):.1f} classes in a batch on average, instead of "
            f"{expected / len(sizes):.1f} in random order. BatchNorm normalizes them by the statistics of their "
            "classes, so fitting and training fail; shuffle the images: DataLoader(..., shuffle=True)",
            stacklevel=5,
        )


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
