"""Running statistics re-estimated on training images, under the weights that a network has now."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..batchnorm.modes import uses_batch_statistics
from ..errors import DivergenceError
from ..images.class_folders import LabelledBatch
from ..statistics.pass_options import PassOptions
from ..statistics.passes import NotFiniteError
from ..statistics.recalibrate import reestimate
from .classifier import Classifier
from .stopping import StopCheck


def reestimated_layers(network: nn.Module) -> set[str]:
    """Return the names of the BatchNorms whose running statistics training changes, and re-estimation replaces."""
    return {
        name
        for name, module in network.named_modules()
        if uses_batch_statistics(module) and next(module.buffers(), None) is not None
    }


def reestimate_statistics(classifier: Classifier, batches: Iterable[LabelledBatch], stop: StopCheck) -> None:
    """Replace a network's running statistics, in place, by those of training images.

    The exponential average that training keeps lags behind weights that change fast. A frozen BatchNorm keeps its
    statistics and normalizes by them. All processes of a run get the statistics of the batches of all of them.

    Args:
        classifier: The network.
        batches: Training images, in shuffled batches.
        stop: Checked after each batch.

    Raises:
        DivergenceError: When the statistics are not finite.
        CalibrationError: When they cannot be computed for another reason, such as a failure on another rank.
        StoppedError: When the run was asked to stop.
    """
    network = classifier.network
    names = reestimated_layers(network)
    if not names:
        return
    inputs = (images for images, _ in classifier.each_input(batches))
    options = PassOptions(autocast=torch.bfloat16 if classifier.amp else None, progress=lambda _images: stop.check())
    try:
        result = reestimate(network, inputs, options, names=names, function="finetune").model
    except NotFiniteError as error:
        raise DivergenceError(f"the running statistics could not be estimated: {error}") from error
    with torch.no_grad():
        for name, buffer in result.named_buffers():
            network.get_buffer(name).copy_(buffer)
