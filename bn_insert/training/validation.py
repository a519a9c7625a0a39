"""Loss and accuracy of a network on the validation images."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..compare.evaluation import Outcomes, outcomes_of
from ..graph.copies import working_copy
from ..images.batch_interface import sample
from ..images.class_folders import ClassFolders
from ..statistics.pass_options import ProgressCallback
from ..support.processes import Ranks
from .classifier import Classifier
from .stopping import StopCheck

SAMPLE = 256  # images at most, where an estimate is enough


def with_sampled_validation(images: ClassFolders, seed: int) -> ClassFolders:
    """Return class folders with at most `SAMPLE` of the validation images."""
    return replace(images, val=tuple(sample(images.val, SAMPLE, seed)))


def validate(
    classifier: Classifier,
    images: ClassFolders,
    batch_size: int,
    ranks: Ranks,
    stop: StopCheck,
    *,
    progress: ProgressCallback | None = None,
) -> Outcomes:
    """Run a network in eval mode on all validation images that can be read; every image counts once.

    Args:
        classifier: The network; it is not changed.
        images: Class folders whose `val` images are used.
        batch_size: Images per batch.
        ranks: The processes that share the images.
        stop: Checked after each batch.
        progress: Called after each batch with the number of this process's images so far.

    Raises:
        ImageError: When no validation image can be read.
        StoppedError: When the run was asked to stop.
    """
    share = ranks.share(images.val, equal=False)

    def after_batch(seen: int) -> None:
        if progress:
            progress(seen)
        stop.check()

    outcomes = outcomes_of(
        working_copy(classifier.network),
        classifier.each_input(images.batches(share, batch_size)) if share else (),
        autocast=torch.bfloat16 if classifier.amp else None,
        progress=after_batch,
    )
    if outcomes.images == 0:
        raise images.none_readable(images.val)
    return outcomes
