"""What a run is about to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import as_passed
from ..images.class_folders import ClassFolders
from ..support.text import counted
from ..surgery.replace_output import OutputLayer
from .lr_trials import untried_learning_rate
from .preparation import replaces_output
from .settings import TrainingSettings

_LARGE_INPUTS = 8.0  # gradients of the output layer grow with them; those of trained VGGs are about 1 to 4


@dataclass(frozen=True)
class RunSummary:
    """What a run is about to do.

    Args:
        classes: Numbers of training and of validation images of each class, by its name.
        preprocessing: The preprocessing of the images, as in `Transform.to_dict`.
        device: Where the network is trained.
        parameters: Number of parameters of the network.
        trained_parameters: Number of parameters that are trained.
        batchnorms: Number of BatchNorm layers.
        dropout: Which dropout layers are on, and which were switched off, in words.
        output: What became of the output layer, in words.
        lr: Peak learning rate; None if it will be chosen in trials.
        epochs: Epochs of the run.
        steps: Steps per epoch.
        resumed: Where a resumed run continues, and what a change of its epochs means, in words; empty for a new run.
        lr_untried: Whether `lr` is neither given nor chosen, because the run is too short for trials.
        renorm: Whether BatchNorms are trained with Batch Renormalization.
        trained_batchnorms: Number of BatchNorm layers whose gamma or beta is trained.
        unused: Which settings have no effect, and why, each as a sentence without its period.
    """

    classes: Mapping[str, tuple[int, int]]
    preprocessing: Mapping[str, Any]
    device: str
    parameters: int
    trained_parameters: int
    batchnorms: int
    dropout: str
    output: str
    lr: float | None
    epochs: int
    steps: int
    resumed: str = ""
    lr_untried: bool = False
    renorm: bool = False
    trained_batchnorms: int = 0
    unused: tuple[str, ...] = ()

    @property
    def texts(self) -> dict[str, str]:
        """What a screen or a page shows of most runs, by its title."""
        train, val = (sum(counts[part] for counts in self.classes.values()) for part in (0, 1))
        trained = f"{self.trained_parameters:,} of {self.parameters:,} parameters"
        norms = counted(self.batchnorms, "BatchNorm layer")
        if self.renorm and self.trained_batchnorms:
            norms += ", with Batch Renormalization"
        if self.batchnorms and not self.trained_batchnorms:
            norms += ", frozen"
        elif self.trained_batchnorms < self.batchnorms:
            norms = f"gamma and beta of {self.trained_batchnorms} of {norms}"
        return {
            "Images": images_text(train, val, len(self.classes)),
            "Output layer": self.output,
            "Trained": f"{trained}; {norms}",
            "Dropout": self.dropout,
            "Steps": f"{self.epochs * self.steps:,} ({counted(self.epochs, 'epoch')} of {self.steps:,})",
            "Device": self.device,
        }


def images_text(train: int, val: int, classes: int) -> str:
    """Return the numbers of images and classes as a phrase."""
    return f"{train:,} for training and {val:,} for validation, {classes} {'class' if classes == 1 else 'classes'}"


def summarize(
    model: nn.Module,
    output: OutputLayer,
    network: nn.Module,
    images: ClassFolders,
    settings: TrainingSettings,
    *,
    device: torch.device,
    dropout: str,
    steps: int,
    unused: tuple[str, ...],
) -> RunSummary:
    """Return the summary of a run.

    Args:
        model: The model as it was given.
        output: Its output layer.
        network: The network as it is trained.
        images: The images.
        settings: The settings.
        device: Where the network is.
        dropout: The dropout in effect, in words.
        steps: Steps per epoch.
        unused: Which settings have no effect.
    """
    counts = [Counter(image.label for image in part) for part in (images.train, images.val)]
    parameters = list(network.parameters())
    untried = untried_learning_rate(settings, steps) if settings.lr is None else None
    return RunSummary(
        {name: (counts[0][label], counts[1][label]) for label, name in enumerate(images.classes)},
        images.transform.to_dict(),
        str(device),
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        _batchnorms(network),
        dropout,
        _output(model, output, network, settings, len(images.classes)),
        settings.lr if untried is None else untried,
        settings.epochs,
        steps,
        lr_untried=untried is not None,
        renorm=settings.batchnorm == "renorm" and _batchnorms(network) > 0,
        trained_batchnorms=sum(
            isinstance(module, _BatchNorm) and any(each.requires_grad for each in module.parameters())
            for module in network.modules()
        ),
        unused=unused,
    )


def _batchnorms(network: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in network.modules())


def _output(model: nn.Module, output: OutputLayer, network: nn.Module, settings: TrainingSettings, classes: int) -> str:
    if settings.head is not None:
        return f"new head with {settings.head} channels, BatchNorm and {classes} classes"
    if output.name is None:
        return f"not found among the layers; the {output.outputs} outputs of the network are kept"
    if not replaces_output(output, settings, classes):
        return f"{output.name}, with {classes} classes as in the checkpoint"
    replaced = f"{output.name} replaced, {output.outputs} to {classes} classes"
    if _batchnorms(network) < _batchnorms(model):
        replaced += ", and the BatchNorm after it removed"
    layer = model.get_submodule(output.name)
    size = _size_of_inputs(model, layer)
    if size > _LARGE_INPUTS:
        new_head = (
            f", or use a new head ({as_passed('head', 512)})" if isinstance(layer, nn.Linear) and output.called else ""
        )
        replaced += (
            f"; its inputs are large (about {size:.2g}), which makes training difficult: check the preprocessing"
            f"{new_head}"
        )
    return replaced


def _size_of_inputs(model: nn.Module, layer: nn.Module) -> float:
    """Return the root mean square of what the last BatchNorm before a layer passes on; 0 without one."""
    size, channels = 0.0, cast("nn.Linear | nn.Conv2d", layer).weight.shape[1]
    for module in model.modules():
        if module is layer:
            break
        if isinstance(module, _BatchNorm) and module.affine and module.num_features == channels:
            gamma, beta = module.weight.detach().double(), module.bias.detach().double()
            size = float((gamma.square() + beta.square()).mean().sqrt())
    return size
