"""Settings that leave a run as it would be without them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..batchnorm.modes import BatchNormMode
from ..errors import as_passed
from ..support.text import counted
from .parameter_groups import NORMS
from .reestimation import reestimated_layers
from .training_set import TrainingSet


def unused_settings(network: nn.Module, training_set: TrainingSet, given_mode: BatchNormMode | None) -> tuple[str, ...]:
    """Return which settings of a run have no effect on it, and why, each as a sentence without its period.

    Settings that exclude each other whatever the network are refused by `TrainingSettings`.

    Args:
        network: The network as it is trained.
        training_set: Its training images, and the settings.
        given_mode: What was given for `batchnorm`, before it was chosen.
    """
    found = (*_of_batchnorm(network, training_set, given_mode), *_of_length(training_set))
    return tuple(f"{name} has no effect: {why}" for name, why in found)


def _of_batchnorm(
    network: nn.Module, training_set: TrainingSet, given_mode: BatchNormMode | None
) -> Iterator[tuple[str, str]]:
    settings = training_set.settings
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    trained = any(parameter.requires_grad for norm in norms for parameter in norm.parameters())
    by_batch = bool(reestimated_layers(network))
    why = "the network has no BatchNorm"
    if norms:
        why = "BatchNorm keeps its statistics" if trained else "all BatchNorm layers are frozen"
    frozen_otherwise = settings.train == "head" or settings.freeze_features
    if given_mode and (not norms or (given_mode != "freeze" and frozen_otherwise and not (trained or by_batch))):
        yield as_passed("batchnorm", given_mode), why
    if not settings.recalibrate and not by_batch:
        yield as_passed("recalibrate", False, "--no-recalibrate"), why
    decayed = (
        parameter for module in network.modules() if isinstance(module, NORMS) for parameter in module.parameters()
    )
    if settings.norm_weight_decay and not any(parameter.requires_grad for parameter in decayed):
        yield as_passed("norm_weight_decay", settings.norm_weight_decay), why
    if settings.sync_bn and not by_batch:
        yield as_passed("sync_bn", True), why
    elif settings.sync_bn and training_set.ranks.count == 1:
        yield as_passed("sync_bn", True), "there is one process"
    if settings.head is not None and not settings.fit_output:
        no_fit = as_passed("fit_output", False, "--no-fit-output")
        yield no_fit, "the output layer of a new head is not fitted"


def _of_length(training_set: TrainingSet) -> Iterator[tuple[str, str]]:
    settings, epochs = training_set.settings, training_set.settings.epochs
    if settings.patience is not None and settings.patience >= epochs - 1:
        yield as_passed("patience", settings.patience), f"the run has {counted(epochs, 'epoch')}"
    decays = epochs - 1 / training_set.steps - settings.lr_warmup_epochs >= settings.lr_step_size
    if settings.lr_scheduler == "step" and not decays:
        step = as_passed("lr_step_size", settings.lr_step_size)
        yield as_passed("lr_scheduler", "step"), f"the run ends before its first step ({step})"
    if settings.accumulate > 1 and training_set.images_per_epoch <= settings.batch_size:
        yield as_passed("accumulate", settings.accumulate), "an epoch has one batch"
