"""The layer that computes the logits, and its replacement for another number of classes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import TrainingError
from .history import History, ReplacedOutput


def replace_output(model: nn.Module, classes: int) -> None:
    """Replace a network's output layer, in place, by one for another number of classes.

    The output layer is the last nn.Linear. The new one has zero weights and bias, and the device and dtype of the old
    one. With zeros, training starts at a loss of log(classes) whatever the scale of the layer's input; the layers
    before it get their first gradient in the second step.

    Args:
        model: The network to change.
        classes: Number of classes, 2 or more.

    Raises:
        TrainingError: If there are fewer than 2 classes, the network has no dense layer, or there is a BatchNorm after
            the last one.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1000))
        >>> replace_output(model, 10)
        >>> model[-1]
        Linear(in_features=4, out_features=10, bias=True)
    """
    if isinstance(classes, bool) or not isinstance(classes, int):
        raise TrainingError(f"the number of classes is {classes!r:.40}, not a whole number")
    if classes < 2:
        raise TrainingError(f"a classifier needs 2 or more classes, not {classes}")
    modules = list(model.named_modules())
    name, output = output_layer(model)
    after_output = modules[[module for _, module in modules].index(output) + 1 :]
    for norm_name, norm in after_output:
        if isinstance(norm, _BatchNorm):
            raise TrainingError(
                f"BatchNorm {norm_name} comes after the output layer {name}; skip that layer when inserting BatchNorm"
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
    """Return the qualified name of the last dense layer, and the layer.

    Raises:
        TrainingError: If the network has no dense layer.
    """
    dense = [(name, module) for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
    if not dense:
        raise TrainingError(f"{type(model).__name__} has no dense layer to use as the output layer")
    return dense[-1]
