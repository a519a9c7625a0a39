"""The training images of one process, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..batchnorm.modes import needs_several_values
from ..errors import TrainingError, as_passed
from ..images.augmentation import augmented
from ..images.batch_interface import sample
from ..images.class_folders import ClassFolders, LabelledBatch, LabelledImage
from ..statistics.passes import SINGLE_IMAGE
from ..support.processes import Ranks
from .classifier import Classifier
from .settings import TrainingSettings

# Seeds of epochs and of batches are this far apart, so that neighboring seeds of users share none of them.
_SEED_STRIDE = 1_000_003

_LEAST_RENORM_SAMPLE = 32  # images in a batch of re-estimation


@dataclass(frozen=True)
class TrainingSet:
    """The batches that one process trains on; any of them can be produced without those before it.

    Args:
        images: The images of all processes.
        ranks: This process's share of them.
        settings: Batch size, accumulation, seed and augmentation.
        images_per_epoch: Number of images of this process in one epoch.
    """

    images: ClassFolders
    ranks: Ranks
    settings: TrainingSettings
    images_per_epoch: int

    @classmethod
    def of(cls, images: ClassFolders, classifier: Classifier, settings: TrainingSettings, ranks: Ranks) -> TrainingSet:
        """Return the training set of a network.

        A last batch of one image is left out when a BatchNorm would have to normalize by it, and when the network does
        not run on it.

        Raises:
            TrainingError: When every batch would be too small, or a process would have a single validation image and
                the network does not run on it.
        """
        share, size = -(-len(images.train) // ranks.count), settings.batch_size
        several = any(map(needs_several_values, classifier.network.modules()))
        if several and (size == 1 or share < 2):
            raise TrainingError(
                f"BatchNorm cannot normalize a batch of one image ({share} training images per process, batch "
                f"size {size}); use a batch size of 2 or more, or "
                f"{as_passed('batchnorm', 'renorm')}"
            )
        if not classifier.takes_one_image and (size == 1 or share < 2 or len(images.val) < 2 * ranks.count):
            raise TrainingError(
                f"{type(classifier.network).__name__} cannot run on a single image ({share} training images per "
                f"process, {len(images.val)} validation images, batch size {size}); {SINGLE_IMAGE}"
            )
        left_out = (several or not classifier.takes_one_image) and share % size == 1
        return cls(images, ranks, settings, share - left_out)

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return -(-self._batches_per_epoch // self.settings.accumulate)

    @property
    def _batches_per_epoch(self) -> int:
        return -(-self.images_per_epoch // self.settings.batch_size)

    def images_in(self, step: int) -> int:
        """Return the number of images of a step of an epoch, counted from 0."""
        size = self.settings.batch_size * self.settings.accumulate
        return min(size, self.images_per_epoch - step * size)

    def batches(self, epoch: int, step: int = 0) -> Iterator[LabelledBatch]:
        """Yield the batches of an epoch from a step on, both counted from 0, with images changed at random.

        Each step has `accumulate` batches, the last one perhaps fewer.
        """
        first = step * self.settings.accumulate
        rest = self._order(epoch)[first * self.settings.batch_size : self.images_per_epoch]
        for number, batch in enumerate(self.images.batches(rest, self.settings.batch_size, full=True), first):
            yield self._augmented(batch, epoch * self._batches_per_epoch + number)

    def sample(self, epoch: int, count: int) -> Iterator[LabelledBatch]:
        """Yield this process's share of at most `count` images of an epoch for re-estimation, unchanged.

        The batches are of the training's size, as those that BatchNorm normalizes by. Batch Renormalization normalizes
        by running statistics, which the statistics of a few images are far from: its batches are larger.
        """
        share = self._order(epoch)[: -(-count // self.ranks.count)]
        size = self.settings.batch_size
        if self.settings.batchnorm == "renorm":
            size = max(size, _LEAST_RENORM_SAMPLE)
        yield from self.images.batches(share, size, full=True)

    def _order(self, epoch: int) -> list[LabelledImage]:
        """Return this process's images in the order of an epoch."""
        return self.ranks.share(sample(self.images.train, None, self.settings.seed + _SEED_STRIDE * epoch))

    def _augmented(self, batch: LabelledBatch, number: int) -> LabelledBatch:
        """Change images as the seed, the number of the batch since the start of the run, and the rank decide."""
        seed = self.settings.seed + _SEED_STRIDE * (number * self.ranks.count + self.ranks.rank)
        hflip, crop_scale = self.settings.hflip, self.settings.crop_scale
        return LabelledBatch(augmented(batch.images, seed=seed, hflip=hflip, crop_scale=crop_scale), batch.labels)
