"""The output layer that a run starts with: the checkpoint's own, or one that is fitted to the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..batchnorm.modes import needs_several_values
from ..compare.evaluation import Outcomes
from ..errors import CalibrationError, DivergenceError, ImageError
from ..images.class_folders import ClassFolders, LabelledBatch, LabelledImage
from ..statistics.passes import preserved_random_state
from .classifier import Classifier
from .metrics import OutputFit
from .output_fit import can_be_fitted, fit_layer, not_fittable
from .reestimation import reestimate_statistics, reestimated_layers
from .stopping import StopCheck, StoppedError
from .training_set import TrainingSet
from .validation import validate, with_sampled_validation

_TRAINING_IMAGES = 1024  # at most
_ACCURATE = 0.75  # of two classes, twice the accuracy of guessing would be 1


def fit_starting_output(
    classifier: Classifier,
    training_set: TrainingSet,
    images: ClassFolders,
    stop: StopCheck,
    on_fit: Callable[[OutputFit], None] | None = None,
    *,
    new: bool,
) -> OutputFit:
    """Fit the output layer of a run, in place, if it is new, or little better than guessing on the validation images.

    A checkpoint may have been trained on the same number of other classes; its output layer then says little about
    these. It is fitted as `fit_output` does, and stays as it was if that is not possible, or does not make it better.

    Args:
        classifier: The network.
        training_set: Where training images are taken from.
        images: Class folders with the validation images.
        stop: Checked after each batch and before each fit, if this is the only process.
        on_fit: Called after each batch.
        new: Whether the output layer has just been replaced.

    Raises:
        CalibrationError: When it fails on another rank.
        StoppedError: When the run was asked to stop.
    """
    fit = _Fit(classifier, training_set, images, stop, on_fit or (lambda _fit: None), new)
    try:
        return fit.run()
    except ImageError:
        stop.check()  # a signal to the entire process group has ended the processes that decode
        raise
    except CalibrationError as error:  # what cannot run on these images fails once more, later in the run
        if training_set.ranks.count > 1:
            raise
        return OutputFit(0, 0, True, new=new, reason=str(error))


def accuracy_after_reestimation(
    classifier: Classifier, training_set: TrainingSet, images: ClassFolders, stop: StopCheck
) -> float | None:
    """Return the validation accuracy with running statistics re-estimated on training images, which are not kept.

    A few images may have others than those that the network was trained with, and so spoil it before any training.

    Args:
        classifier: The network.
        training_set: Where training images are taken from.
        images: Class folders with the validation images.
        stop: Checked after each batch.

    Returns:
        The accuracy; None if the run re-estimates no statistics, or if they would not be finite.

    Raises:
        StoppedError: When the run was asked to stop.
    """
    settings, network = training_set.settings, classifier.network
    if not settings.recalibrate or not reestimated_layers(network):
        return None
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        with preserved_random_state():
            reestimate_statistics(classifier, training_set.sample(0, settings.recalibration_images), stop)
            return validate(classifier, images, settings.batch_size, training_set.ranks, stop).accuracy
    except DivergenceError:
        return None
    except ImageError:
        stop.check()  # a signal to the entire process group has ended the processes that decode
        raise
    finally:
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(before[name])


@dataclass(frozen=True)
class _Fit:
    classifier: Classifier
    training_set: TrainingSet
    images: ClassFolders
    stop: StopCheck
    report: Callable[[OutputFit], None]
    new: bool

    def run(self) -> OutputFit:
        """Fit the layer if it has to be, and return the result."""
        own = None
        if not self.new:
            begun = OutputFit(0, len(self._val))
            self.report(begun)
            outcomes = self._validate(begun)
            own = outcomes.accuracy
            if not _says_little(outcomes):
                return self._result(accuracy=own, own_accuracy=own)
        name = self.classifier.output
        if name is None:
            reason = "the logits are not the outputs of one nn.Linear or nn.Conv2d"
            return self._result(accuracy=own, own_accuracy=own, reason=reason)
        layer = self.classifier.network.get_submodule(name)
        if not can_be_fitted(layer):
            return self._result(accuracy=own, own_accuracy=own, reason=not_fittable(name, layer))
        try:
            return self._fitted(name, layer, own)
        except CalibrationError as error:
            if own is None or self.training_set.ranks.count > 1:
                raise
            return self._result(accuracy=own, own_accuracy=own, reason=str(error))

    def _fitted(self, name: str, layer: nn.Linear, own: float | None) -> OutputFit:
        settings, ranks = self.training_set.settings, self.training_set.ranks
        count = min(_TRAINING_IMAGES, len(self.images.train))
        chosen_by = ranks.share(with_sampled_validation(self.images, settings.seed).val, equal=False)
        before_accuracy = -(-count // ranks.count) + len(chosen_by)
        total = before_accuracy + len(self._val)
        begun = OutputFit(0, total, new=self.new, own_accuracy=own)
        self.report(begun)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        reason = fit_layer(
            self.classifier.network,
            name,
            self._inputs(self.training_set.sample(0, count)),
            self._inputs(self.images.batches(chosen_by, settings.batch_size)) if chosen_by else (),
            autocast=torch.bfloat16 if self.classifier.amp else None,
            progress=lambda seen: self._progress(begun, seen),
        )
        if reason:
            return self._result(accuracy=own, own_accuracy=own, reason=reason)
        try:
            accuracy = self._validate(begun, before_accuracy).accuracy
        except StoppedError:  # the fit is repeated when the run is resumed, and has to find the layer as it was
            layer.load_state_dict(before)
            raise
        if own is not None and accuracy <= own:
            layer.load_state_dict(before)
            reason = f"a newly fitted one reaches {accuracy:.2%}"
            return self._result(accuracy=own, own_accuracy=own, reason=reason)
        return self._result(accuracy=accuracy, fitted=True, own_accuracy=own)

    def _result(self, **values: Any) -> OutputFit:
        return OutputFit(0, 0, True, new=self.new, **values)

    @property
    def _val(self) -> Sequence[LabelledImage]:
        """The validation images of this process."""
        return self.training_set.ranks.share(self.images.val, equal=False)

    def _validate(self, begun: OutputFit, before: int = 0) -> Outcomes:
        size, ranks = self.training_set.settings.batch_size, self.training_set.ranks
        return validate(
            self.classifier,
            self.images,
            size,
            ranks,
            self.stop,
            progress=lambda seen: self._progress(begun, before + seen),
        )

    def _progress(self, begun: OutputFit, seen: int) -> None:
        self.report(replace(begun, seen=min(seen, begun.images)))
        self.stop.check()

    def _inputs(self, batches: Iterable[LabelledBatch]) -> Iterable[Any]:
        least = 2 if any(map(needs_several_values, self.classifier.network.modules())) else 1
        return (inputs for inputs in self.classifier.each_input(batches) if len(inputs[1]) >= least)


def _says_little(outcomes: Outcomes) -> bool:
    """Return whether the outputs are hardly better than chance, judged by loss and accuracy.

    The accuracy is the mean over the classes that there are images of: at most 1 / classes for answers that do not
    depend on the image. Outputs of other classes may be right about some of these. A network that knows the classes,
    but not images of this kind, may have as high a loss, and is worth more as it is: on noisy CIFAR-10 images, with
    0.33 of them right before training, a fit made the trained network worse.
    """
    if outcomes.loss < math.log(outcomes.classes):
        return False
    images = torch.bincount(outcomes.labels, minlength=outcomes.classes).double()
    correct = torch.bincount(outcomes.labels[outcomes.labels == outcomes.predicted], minlength=outcomes.classes)
    accuracies = (correct / images)[images > 0]
    return float(accuracies.mean()) <= min(2 / len(accuracies), _ACCURATE)
