"""Loss and accuracy of a network on the validation images."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import TrainingError
from ..images.class_folders import ClassFolders
from ..support.processes import Ranks
from .classifier import Classifier, batch_totals, cross_entropy, evaluating
from .metrics import Totals
from .stopping import StopCheck


class Validation(NamedTuple):
    """Mean loss and accuracy over the validation images of all processes."""

    loss: float
    accuracy: float


def validate(
    classifier: Classifier, images: ClassFolders, batch_size: int, ranks: Ranks, stop: StopCheck
) -> Validation:
    """Run a network in eval mode on all validation images that can be read; every image counts once.

    Args:
        classifier: The network; the training flags of its modules are restored.
        images: Class folders whose `val` images are used.
        batch_size: Images per batch.
        ranks: The processes that share the images.
        stop: Checked after each batch.

    Raises:
        TrainingError: When no validation image can be read.
        StoppedError: When the run was asked to stop.
    """
    share = ranks.share(images.val, equal=False)
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.inference_mode(), evaluating(classifier.network):
        for batch in images.batches(share, batch_size) if share else ():
            inputs, labels = classifier.inputs(batch)
            with classifier.autocast():
                logits = classifier.network(inputs)
            sums += batch_totals(cross_entropy(logits, labels), logits, labels).cpu()
            stop.check()
    totals = Totals(*ranks.total(sums.to(classifier.device)).tolist())
    if totals.images == 0:
        path, reason = images.unreadable[-1]
        raise TrainingError(f"no validation image can be read; one of them is {path}: {reason}")
    return Validation(totals.loss / totals.images, totals.correct / totals.images)
