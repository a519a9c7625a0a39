"""The output layer that a run starts with: the checkpoint's own, or one that is fitted to the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..batchnorm.modes import needs_several_values
from ..compare.evaluation import Outcomes
from ..errors import CalibrationError, ImageError
from ..images.class_folders import ClassFolders, LabelledBatch
from ..surgery.replace_output import output_layer
from .classifier import Classifier
from .metrics import OutputFit
from .output_fit import can_be_fitted, fit_layer
from .stopping import StopCheck
from .training_set import TrainingSet
from .validation import validate, with_sampled_validation

_TRAINING_IMAGES = 1024  # at most


def fit_starting_output(
    classifier: Classifier,
    training_set: TrainingSet,
    images: ClassFolders,
    stop: StopCheck,
    on_fit: Callable[[OutputFit], None] | None = None,
    *,
    new: bool,
) -> OutputFit:
    """Fit the output layer of a run, in place, if it is new or only guesses the classes of the validation images.

    A checkpoint may have been trained on as many other classes as there are; its output layer then says nothing about
    these. It is fitted as `fit_output` does, and stays as it was if that is not possible.

    Args:
        classifier: The network.
        training_set: Where training images are taken from.
        images: Class folders with the validation images.
        stop: Checked after each batch and before each fit, if this is the only process.
        on_fit: Called after each batch, and with the result.
        new: Whether the output layer has just been replaced by one of zeros.

    Raises:
        CalibrationError: When it fails on another rank.
        StoppedError: When the run was asked to stop.
    """
    images = with_sampled_validation(images, training_set.settings.seed)
    fit = _Fit(classifier, training_set, images, stop, on_fit or (lambda _fit: None), new)
    try:
        result = fit.run()
    except ImageError:
        stop.check()  # a signal to the entire process group has ended the processes that decode
        raise
    except CalibrationError as error:
        if training_set.ranks.count > 1:
            raise
        result = fit.result(reason=str(error))  # the first step fails too, and says more
    fit.report(result)
    return result


@dataclass(frozen=True)
class _Fit:
    classifier: Classifier
    training_set: TrainingSet
    images: ClassFolders  # with a sample of the validation images
    stop: StopCheck
    report: Callable[[OutputFit], None]
    new: bool

    def run(self) -> OutputFit:
        """Fit the layer if it has to be, and return the result."""
        own = None
        if not self.new:
            outcomes = self._validate(0)
            own = outcomes.accuracy
            if not _guesses(outcomes):
                return self.result(accuracy=own, own_accuracy=own)
        name, layer = output_layer(self.classifier.network)
        if not can_be_fitted(layer):
            reason = f"{name} is a {type(layer).__name__}, and only an nn.Linear can be"
            return self.result(accuracy=own, own_accuracy=own, reason=reason)
        settings, val = self.training_set.settings, self._val
        before = 0 if self.new else len(val)
        reason = fit_layer(
            self.classifier.network,
            layer,
            self._inputs(self.training_set.sample(0, self._training_images)),
            self._inputs(self.images.batches(val, settings.batch_size)) if val else (),
            autocast=torch.bfloat16 if self.classifier.amp else None,
            progress=lambda seen: self._progress(before + seen),
        )
        if reason:
            return self.result(accuracy=own, own_accuracy=own, reason=reason)
        accuracy = self._validate(self._total - len(val)).accuracy
        return self.result(fitted=True, accuracy=accuracy, own_accuracy=own)

    def result(
        self,
        *,
        fitted: bool = False,
        accuracy: float | None = None,
        own_accuracy: float | None = None,
        reason: str = "",
    ) -> OutputFit:
        """Return the result of the fit."""
        return OutputFit(self._total, self._total, True, accuracy, fitted, own_accuracy, reason)

    @property
    def _val(self) -> Any:
        return self.training_set.ranks.share(self.images.val, equal=False)

    @property
    def _training_images(self) -> int:
        return min(_TRAINING_IMAGES, len(self.images.train))

    @property
    def _total(self) -> int:
        """Images that this process runs through the network: validation images for the fit and the accuracy."""
        passes = 2 if self.new else 3
        return -(-self._training_images // self.training_set.ranks.count) + passes * len(self._val)

    def _validate(self, before: int) -> Outcomes:
        size, ranks = self.training_set.settings.batch_size, self.training_set.ranks
        return validate(
            self.classifier, self.images, size, ranks, self.stop, progress=lambda seen: self._progress(before + seen)
        )

    def _progress(self, seen: int) -> None:
        self.report(OutputFit(min(seen, self._total), self._total))
        self.stop.check()

    def _inputs(self, batches: Iterable[LabelledBatch]) -> Iterable[Any]:
        least = 2 if any(map(needs_several_values, self.classifier.network.modules())) else 1
        return (self.classifier.inputs(batch) for batch in batches if len(batch.labels) >= least)


def _guesses(outcomes: Outcomes) -> bool:
    """Return whether a network does no better than guessing: its loss is not lower, nor its accuracy clearly higher.

    The accuracy is the mean over the classes, which is 1 / classes for any answers that do not depend on the image;
    clearly higher is more than two standard errors of such answers.
    """
    if outcomes.loss < math.log(outcomes.classes):
        return False
    images = torch.bincount(outcomes.labels, minlength=outcomes.classes).double()
    correct = torch.bincount(outcomes.labels[outcomes.labels == outcomes.predicted], minlength=outcomes.classes)
    present = images > 0
    chance = 1 / outcomes.classes
    accuracy = (correct[present] / images[present]).mean()
    error = (chance * (1 - chance) / images[present]).sum().sqrt() / present.sum()
    return bool(accuracy <= chance + 2 * error)
