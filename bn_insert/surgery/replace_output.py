"""The layer that computes the logits, and its replacement for another number of classes.

It is found by its position, without a trace. `insert_batchnorm` leaves out the layers whose output reaches the
output of a traced network, which may be several: see `graph/sites.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import TrainingError, as_passed
from ..graph.copies import check_module
from ..graph.layers import NormalizedLayer, layer_kind
from .history import WIDEST_HEAD, History, RemovedBatchNorms, ReplacedHead, ReplacedOutput, new_head, new_output
from .splice import inserted_batchnorms, splice_over


def replace_output(model: nn.Module, classes: int) -> None:
    """Replace a network's output layer, in place, by one for another number of classes.

    The output layer is the last nn.Linear, or the last nn.Conv2d of a network without dense layers, such as SqueezeNet.
    The new one has the device and dtype of the old one. A dense layer gets zero weights and bias: training starts at a
    loss of log(classes) whatever the scale of the layer's input, and the layers before it get their first gradient in
    the second step. A conv, after which there may be a ReLU that passes no gradient at zero, gets normal weights with a
    std of 0.01 and zero bias, as in torchvision's SqueezeNet.

    A BatchNorm that `insert_batchnorm` inserted after the output layer, as in SqueezeNet, where an activation follows
    that layer, belongs to the old classes and is removed.

    Args:
        model: The network to change.
        classes: Number of classes, 2 or more.

    Raises:
        TrainingError: If there are fewer than 2 classes, the network has neither a dense layer nor a conv, or there is
            a BatchNorm after the output layer that `insert_batchnorm` did not insert.
        GraphError: If the model is not an nn.Module.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1000))
        >>> replace_output(model, 10)
        >>> model[-1]
        Linear(in_features=4, out_features=10, bias=True)
    """
    check_module(model)
    _check_classes(classes)
    _, _, norms = _replaceable_output(model)
    name, output = _without_batchnorms(model, norms)
    new = new_output(output, classes)
    _initialize(new)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new.train(output.training))
    History.of(model).with_change(ReplacedOutput(name, classes)).keep_with(model)


def replace_head(model: nn.Module, width: int, classes: int) -> list[str]:
    """Replace a network's dense layers, in place, by a new head: Linear, BatchNorm, ReLU and an output layer.

    What is replaced are the children of an nn.Sequential from its first dense layer to the output layer, or, if the
    output layer is not in an nn.Sequential, the output layer alone. The new hidden layer is initialized by PyTorch's
    default and its random state; the output layer has zeros, as for `replace_output`.

    Args:
        model: The network to change.
        width: Number of hidden channels, from 1 to 65,536.
        classes: Number of classes, 2 or more.

    Returns:
        The qualified names of the new modules.

    Raises:
        TrainingError: As for `replace_output`, for a width out of range, for a conv layer between the dense layers, and
            for a network without dense layers.
        GraphError: As for `replace_output`.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 1000))
        >>> replace_head(model, 4, classes=10)
        ['1', '2', '3', '4']
        >>> [type(module).__name__ for module in model]
        ['Flatten', 'Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    """
    check_module(model)
    _check_classes(classes)
    _check_whole("the width of the head", width)
    if not 1 <= width <= WIDEST_HEAD:
        raise TrainingError(f"a head needs a width of 1 to {WIDEST_HEAD}, not {width}")
    last, output, norms = _replaceable_output(model)
    if not isinstance(output, nn.Linear):
        raise TrainingError(
            f"the output layer {last} is a {type(output).__name__}, and a new head takes the place of dense layers; "
            f"keep the head ({as_passed('head', None, '--head keep')})"
        )
    _first_of_head(model, last)  # before anything is changed
    last, output = _without_batchnorms(model, norms)
    first = _first_of_head(model, last)
    old = model.get_submodule(first)
    modules = new_head(cast(nn.Linear, old), width, classes)
    _initialize(modules[-1])
    for module in modules:
        module.train(output.training)
    replaced = splice_over(model, first, last, modules)
    History.of(model).with_change(ReplacedHead((first, last), width, classes)).keep_with(model)
    return replaced


def _first_of_head(model: nn.Module, last: str) -> str:
    """Return the name of the first module of the head whose output layer is `last`.

    Raises:
        TrainingError: A conv layer is between the dense layers.
    """
    parent = last.rpartition(".")[0]
    container = model.get_submodule(parent)
    first = last
    if isinstance(container, nn.Sequential):
        names = [name for name, _ in container.named_children()]
        dense = [name for name, child in container.named_children() if isinstance(child, nn.Linear)]
        first = f"{parent}.{dense[0]}" if parent else dense[0]
        for name in names[names.index(dense[0]) : names.index(dense[-1])]:
            if any(layer_kind(module) == "conv" for module in container.get_submodule(name).modules()):
                raise TrainingError(
                    f"{name} of {parent or type(model).__name__} has a conv layer between the dense layers, so that "
                    f"they cannot be replaced by a new head; keep them ({as_passed('head', None, '--head keep')})"
                )
    return first


def _check_classes(classes: int) -> None:
    if isinstance(classes, list | tuple):
        raise TrainingError(f"the number of classes is a {type(classes).__name__}; pass its length, {len(classes)}")
    _check_whole("the number of classes", classes)
    if classes < 2:
        raise TrainingError(f"a classifier needs 2 or more classes, not {classes}")


def _check_whole(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):  # one of NumPy cannot be stored in a checkpoint
        raise TrainingError(f"{what} is {value!r:.40}, not a whole number (int)")


@torch.no_grad()
def _initialize(layer: nn.Module) -> None:
    """Give an output layer the values that `replace_output` describes."""
    for name, parameter in layer.named_parameters():
        if isinstance(layer, nn.Conv2d) and name == "weight":
            nn.init.normal_(parameter, std=0.01)
        else:
            parameter.zero_()


def _replaceable_output(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d, list[str]]:
    """Return the output layer, and the names of the BatchNorms that were inserted behind it.

    Raises:
        TrainingError: If another BatchNorm comes after it.
    """
    name, output = output_layer(model)
    inserted = _inserted_behind(model, name)
    modules = list(model.named_modules())
    after_output = modules[[module for _, module in modules].index(output) + 1 :]
    for norm_name, norm in after_output:
        if isinstance(norm, _BatchNorm) and norm_name not in inserted:
            before = _name_before_insertion(model, name)
            skip = as_passed("skip", (before,), f"--skip {before}")
            raise TrainingError(
                f"BatchNorm {norm_name} comes after the output layer {name}; leave that layer out when inserting "
                f"BatchNorm ({skip})"
            )
    return name, output, inserted


def _inserted_behind(model: nn.Module, name: str) -> list[str]:
    """Return the names of the inserted BatchNorms behind the output layer in its own nn.Sequential."""
    parent = name.rpartition(".")[0]
    container = model.get_submodule(parent)
    if not isinstance(container, nn.Sequential) or (container is model and isinstance(model, NormalizedLayer)):
        return []
    children = [(f"{parent}.{each}" if parent else each, child) for each, child in container.named_children()]
    position = [each for each, _ in children].index(name) + 1
    its_own = takewhile(lambda each: not any(map(layer_kind, each[1].modules())), children[position:])
    inserted = inserted_batchnorms(model)
    return [each for each, _ in its_own if each in inserted]


def _without_batchnorms(model: nn.Module, norms: Sequence[str]) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Remove the BatchNorms behind the output layer, in place, and return that layer, whose name may change."""
    if norms:
        change = RemovedBatchNorms(tuple(norms))
        change.replay(model)
        History.of(model).with_change(change).keep_with(model)
    return output_layer(model)


def _name_before_insertion(model: nn.Module, name: str) -> str:
    """Return the name that a layer of an nn.Sequential had before BatchNorms were inserted in front of it."""
    parent, _, number = name.rpartition(".")
    siblings = (norm.rpartition(".") for norm in inserted_batchnorms(model))
    in_front = sum(above == parent and other.isdigit() and int(other) < int(number) for above, _, other in siblings)
    return ".".join(filter(None, [parent, str(int(number) - in_front)])) if number.isdigit() else name


def output_layer(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Return the last dense layer and its qualified name, or the last Conv2d of a network without dense layers.

    Raises:
        TrainingError: If the network has neither.
    """
    modules = [(name, module) for name, module in model.named_modules() if name]
    dense = [(name, module) for name, module in modules if isinstance(module, nn.Linear)]
    convs = [(name, module) for name, module in modules if isinstance(module, nn.Conv2d) and module.groups == 1]
    if dense:
        return dense[-1]
    if convs:
        return convs[-1]
    raise TrainingError(f"{type(model).__name__} has no dense layer and no conv to use as the output layer")
