"""The layer that gives the logits, for other classes than a network was trained on."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import TrainingError
from .history import History, ReplacedOutput


def replace_output(model: nn.Module, classes: int) -> None:
    """Give a network, in place, a new output layer for so many classes, its weights and bias zero.

    The last nn.Linear is taken for the output layer.  Zeros make training begin at the loss log(classes), whatever the
    scale of the activations in front; the layers before it get their first gradient in the second step.  Device and
    dtype stay.
    Raises TrainingError for a network without a dense layer, one with a BatchNorm behind its last dense layer, and
    fewer than 2 classes.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1000))
    >>> replace_output(model, 10)
    >>> model[-1]
    Linear(in_features=4, out_features=10, bias=True)
    """
    if classes < 2:
        raise TrainingError(f"a network for {classes} classes has nothing to tell apart; give 2 or more")
    modules = list(model.named_modules())
    name, output = output_layer(model)
    behind = modules[[module for _, module in modules].index(output) + 1 :]
    for norm_name, norm in behind:
        if isinstance(norm, _BatchNorm):
            raise TrainingError(
                f"BatchNorm {norm_name} stands behind the output layer {name}; leave that layer out when inserting"
            )
    new = nn.Linear(
        output.in_features,
        classes,
        bias=output.bias is not None,
        device=output.weight.device,
        dtype=output.weight.dtype,
    )
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new.train(output.training))
    History.of(model).with_change(ReplacedOutput(name, classes)).keep_with(model)


def output_layer(model: nn.Module) -> tuple[str, nn.Linear]:
    """Return the last dense layer and its qualified name; raises TrainingError where there is none."""
    dense = [(name, module) for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
    if not dense:
        raise TrainingError(f"{type(model).__name__} has no dense layer that could give one logit a class")
    return dense[-1]
