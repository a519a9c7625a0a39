"""Running statistics re-estimated on training images, under the weights that a network has now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from ..batchnorm.modes import uses_batch_statistics
from ..errors import CalibrationError, DivergenceError, TrainingError
from ..images.class_folders import LabelledBatch
from ..statistics.recalibrate import recalibrate
from .classifier import Classifier, evaluating
from .stopping import StopCheck


def reestimate_statistics(
    classifier: Classifier, batches: Iterable[LabelledBatch], stop: StopCheck, *, freeze_features: bool
) -> None:
    """Replace a network's running statistics, in place, by those of training images.

    The exponential average that training keeps lags behind weights that change fast. All processes of a run get the
    statistics of the batches of all of them.

    Args:
        classifier: The network.
        batches: Training images, in shuffled batches.
        stop: Checked after each batch.
        freeze_features: Re-estimate the classifier alone; the frozen features keep their statistics.

    Raises:
        DivergenceError: When the statistics are not finite.
        StoppedError: When the run was asked to stop.
    """
    inputs: Iterator[Tensor] = (classifier.inputs(batch)[0] for batch in batches)
    part = classifier.network
    if freeze_features:
        part, inputs = classifier.network.get_submodule("classifier"), _features(classifier, inputs)
    if not any(uses_batch_statistics(module) and next(module.buffers(), None) is not None for module in part.modules()):
        return
    autocast = torch.bfloat16 if classifier.amp else None
    try:
        result = recalibrate(part, inputs, autocast=autocast, progress=lambda _images: stop.check())
    except CalibrationError as error:
        raise DivergenceError(f"the running statistics could not be estimated: {error}") from error
    with torch.no_grad():
        for name, buffer in result.named_buffers():
            part.get_buffer(name).copy_(buffer)


def _features(classifier: Classifier, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the input of the network's classifier for each batch of images."""
    seen: list[Tensor] = []
    head = classifier.network.get_submodule("classifier")
    with ExitStack() as hooks:
        hooks.callback(head.register_forward_pre_hook(lambda _module, args: seen.append(args[0])).remove)
        for images in inputs:
            with evaluating(classifier.network), classifier.autocast():
                classifier.network(images)
            if not seen:
                raise TrainingError(f"{type(classifier.network).__name__} does not call its classifier")
            yield seen.pop()
