"""The layer that computes the logits, and its replacement for another number of classes.

It is found by runs on an example, or by its position, without a trace. `insert_batchnorm` leaves out the layers whose
output reaches the output of a traced network, which may be several: see `graph/sites.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import TrainingError, as_passed
from ..graph.copies import unchanged_attributes, unwrapped, working_copy
from ..graph.inputs import Inputs
from ..graph.layers import NormalizedLayer, layer_kind, outputs_of
from ..graph.outputs import tensors_of
from ..statistics.passes import preserved_random_state
from ..support.text import with_article
from .history import WIDEST_HEAD, History, RemovedBatchNorms, ReplacedHead, ReplacedOutput, new_head, new_output
from .splice import inserted_batchnorms, splice_over


def replace_output(model: nn.Module, classes: int, *, example: Any = None) -> None:
    """Replace a network's output layer, in place, with one for a different number of classes.

    Without an example, the output layer is the nn.Linear that is declared last, or the last nn.Conv2d of a network
    without dense layers, such as SqueezeNet. Whether the forward calls it is not known then: pass an example for a
    network that has further heads, for training or from another task. With one, it is the last nn.Linear or nn.Conv2d
    called that has one output for each logit of the model and affects the logits; if none is called, one whose weight
    affects them.

    The new layer has the device and dtype of the old one. A dense layer gets zero weights and bias: training starts at
    a loss of log(classes) whatever the scale of the layer's input, and the layers before it get their first gradient in
    the second step. A conv, after which there may be a ReLU that passes no gradient at zero, gets normally distributed
    weights with a std of 0.01 and zero bias, as in torchvision's SqueezeNet.

    A BatchNorm that `insert_batchnorm` inserted after the output layer, as in SqueezeNet, where an activation follows
    that layer, belongs to the old classes and is removed.

    Args:
        model: The network to change.
        classes: Number of classes, 2 or more.
        example: One batch, as for `insert_batchnorm`.

    Raises:
        TrainingError: If there are fewer than 2 classes, no such layer is found, or there is a BatchNorm after the
            output layer that `insert_batchnorm` did not insert.
        GraphError: If the model is not an nn.Module.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1000))
        >>> replace_output(model, 10)
        >>> model[-1]
        Linear(in_features=4, out_features=10, bias=True)
    """
    model = unwrapped(model)
    replace_output_layer(model, output_layer(model, example), classes)


def replace_output_layer(model: nn.Module, output: OutputLayer, classes: int) -> str:
    """Replace the output layer that was found, as `replace_output` does, and return the name of the new one."""
    _check_classes(classes)
    old_name, layer = output.found(model, f"build the network for {classes} classes ({as_passed('model')})")
    name = _without_batchnorms(model, layer, _batchnorms_to_remove(model, old_name, output))
    new = new_output(layer, classes)
    _initialize(new)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new.train(layer.training))
    History.of(model).with_change(ReplacedOutput(name, classes)).keep_with(model)
    return name


def replace_head(model: nn.Module, width: int, classes: int, *, example: Any = None) -> list[str]:
    """Replace a network's dense layers, in place, with a new head: Linear, BatchNorm, ReLU and an output layer.

    This replaces the children of an nn.Sequential from its first dense layer to the output layer or, if the output
    layer is not in an nn.Sequential, only the output layer. The new hidden layer gets PyTorch's default initialization,
    drawn from its random state; the output layer has zeros, as for `replace_output`.

    Args:
        model: The network to change.
        width: Number of hidden channels, from 1 to 65,536.
        classes: Number of classes, 2 or more.
        example: As for `replace_output`.

    Returns:
        The qualified names of the new modules.

    Raises:
        TrainingError: As for `replace_output`, for a width out of range, for a conv layer between the dense layers, for
            a network without dense layers, and for an output layer that is not called on the example.
        GraphError: As for `replace_output`.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 1000))
        >>> replace_head(model, 4, classes=10)
        ['1', '2', '3', '4']
        >>> [type(module).__name__ for module in model]
        ['Flatten', 'Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    """
    model = unwrapped(model)
    return replace_dense_layers(model, output_layer(model, example), width, classes)


def replace_dense_layers(model: nn.Module, output: OutputLayer, width: int, classes: int) -> list[str]:
    """Replace the dense layers up to the output layer that was found, as `replace_head` does."""
    _check_classes(classes)
    _check_whole("the width of the head", width)
    if not 1 <= width <= WIDEST_HEAD:
        raise TrainingError(f"a head needs a width of 1 to {WIDEST_HEAD}, not {width}")
    keep = f"keep the head ({as_passed('head', None, '--head keep')})"
    name, layer = output.found(model, keep)
    norms = _batchnorms_to_remove(model, name, output)
    if not isinstance(layer, nn.Linear):
        raise TrainingError(
            f"the output layer {name} is {with_article(layer)}, and a new head takes the place of dense layers; {keep}"
        )
    if not output.called:
        raise TrainingError(
            f"{type(model).__name__} does not call its output layer {name}, but computes with its weight, which a new "
            f"head does not have; {keep}"
        )
    _first_of_head(model, name)  # before anything is changed
    last = _without_batchnorms(model, layer, norms)
    first = _first_of_head(model, last)
    old = model.get_submodule(first)
    modules = new_head(cast(nn.Linear, old), width, classes)
    _initialize(modules[-1])
    for module in modules:
        module.train(layer.training)
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
        raise TrainingError(f"the number of classes is {with_article(classes)}; pass its length, {len(classes)}")
    _check_whole("the number of classes", classes)
    if classes < 2:
        raise TrainingError(f"a classifier needs 2 or more classes, not {classes}")


def _check_whole(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):  # a NumPy integer cannot be stored in a checkpoint
        raise TrainingError(f"{what} is {value!r:.40}, not a whole number (int)")


@torch.no_grad()
def _initialize(layer: nn.Module) -> None:
    """Give an output layer the values that `replace_output` describes."""
    for name, parameter in layer.named_parameters():
        if isinstance(layer, nn.Conv2d) and name == "weight":
            nn.init.normal_(parameter, std=0.01)
        else:
            parameter.zero_()


def _batchnorms_to_remove(model: nn.Module, name: str, output: OutputLayer) -> list[str]:
    """Return the names of the BatchNorms that were inserted after the output layer of this name.

    Raises:
        TrainingError: If another BatchNorm comes after it.
    """
    removed = _inserted_after(model, name)
    for norm in output.norms_after:
        if norm not in removed:
            if norm in inserted_batchnorms(model):
                before = _name_before_insertion(model, name)
                skip = as_passed("skip", (before,), f"--skip {before}")
                advice = f"leave that layer out when inserting BatchNorm ({skip})"
            else:
                advice = "the output layer of a network with its own BatchNorm there cannot be replaced"
            if not output.example_given:
                advice = f"if it is only declared after it, pass one batch (example=images); otherwise, {advice}"
            raise TrainingError(f"BatchNorm {norm} comes after the output layer {name}; {advice}")
    return removed


def _inserted_after(model: nn.Module, name: str) -> list[str]:
    """Return the names of the inserted BatchNorms after the output layer in its own nn.Sequential."""
    parent = name.rpartition(".")[0]
    container = model.get_submodule(parent)
    if not isinstance(container, nn.Sequential) or (container is model and isinstance(model, NormalizedLayer)):
        return []
    children = [(f"{parent}.{each}" if parent else each, child) for each, child in container.named_children()]
    position = [each for each, _ in children].index(name) + 1
    its_own = takewhile(lambda each: not any(map(layer_kind, each[1].modules())), children[position:])
    inserted = inserted_batchnorms(model)
    return [each for each, _ in its_own if each in inserted]


def _without_batchnorms(model: nn.Module, output: nn.Module, norms: Sequence[str]) -> str:
    """Remove the BatchNorms after the output layer, in place, and return that layer's name, which may change.

    Without its BatchNorm, a NormalizedLayer becomes the layer: another object with the same attributes.
    """
    if norms:
        change = RemovedBatchNorms(tuple(norms))
        change.replay(model)
        History.of(model).with_change(change).keep_with(model)
    return next(name for name, module in model.named_modules() if vars(module) is vars(output))


def _name_before_insertion(model: nn.Module, name: str) -> str:
    """Return the name that a layer of an nn.Sequential had before BatchNorms were inserted in front of it."""
    parent, _, number = name.rpartition(".")
    siblings = (norm.rpartition(".") for norm in inserted_batchnorms(model))
    in_front = sum(above == parent and other.isdigit() and int(other) < int(number) for above, _, other in siblings)
    return ".".join(filter(None, [parent, str(int(number) - in_front)])) if number.isdigit() else name


class OutputLayer(NamedTuple):
    """The output layer of a network, by its name, which is the same in a copy.

    Attributes:
        name: Its qualified name; None if the logits are not the outputs of one nn.Linear or nn.Conv2d.
        outputs: Number of logits that the network returns; without a run on an example, of outputs of the layer.
        norms_after: Names of the BatchNorms that come after it.
        called: Whether the network calls the layer (False if it only uses its weight).
        example_given: Whether it was looked for by an example.
    """

    name: str | None
    outputs: int
    norms_after: tuple[str, ...] = ()
    called: bool = True
    example_given: bool = True

    def found(self, model: nn.Module, otherwise: str) -> tuple[str, nn.Linear | nn.Conv2d]:
        """Return the layer's name, and the layer in a model.

        Args:
            model: The network, or a copy of it.
            otherwise: What to do if there is no such layer, for the message.

        Raises:
            TrainingError: If there is no such layer.
        """
        if self.name is None:
            raise TrainingError(
                f"{type(model).__name__} returns {self.outputs} logits, and they are not the outputs of one nn.Linear "
                f"or nn.Conv2d; {otherwise}"
            )
        return self.name, cast("nn.Linear | nn.Conv2d", model.get_submodule(self.name))


def output_layer(model: nn.Module, example: Any = None) -> OutputLayer:
    """Return the output layer of a model that is not wrapped; see `replace_output` for which one it is.

    Raises:
        TrainingError: If the network has neither a dense layer nor a conv, and no example shows what it returns.
    """
    layers = possible_output_layers(model)
    run = None if example is None else _run(model, example)
    if run and run.output.ndim > 1:
        found = _layer_with_an_effect(model, example, layers, run)
        if found or run.output.ndim == 2:
            return found or OutputLayer(None, run.output.shape[1])
    if not layers:
        raise TrainingError(f"{type(model).__name__} has no dense layer and no conv to use as the output layer")
    name = next((name for name in reversed(layers) if isinstance(layers[name], nn.Linear)), [*layers][-1])
    after = _norms_declared_after(model, name)
    return OutputLayer(name, outputs_of(layers[name]), after, example_given=example is not None)


def possible_output_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers that can be output layers, by their names, in the order in which they were declared."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
    }


def _norms_declared_after(model: nn.Module, layer: str) -> tuple[str, ...]:
    names = [name for name, _ in model.named_modules()]
    after = names[names.index(layer) + 1 :]
    return tuple(name for name in after if isinstance(model.get_submodule(name), _BatchNorm))


class _Run(NamedTuple):
    """What a network did with an example.

    Attributes:
        output: Its first output.
        called: Names of the modules that it called, in the order of their last calls.
        sums: Sum of the last input of each BatchNorm, by its name.
    """

    output: Tensor
    called: tuple[str, ...]
    sums: dict[str, float]


def _layer_with_an_effect(
    model: nn.Module, example: Any, layers: Mapping[str, nn.Linear | nn.Conv2d], run: _Run
) -> OutputLayer | None:
    """Return the layer with as many outputs as there are logits that is called last and has an effect on them.

    After these come layers of which only the weight is used, as in a cosine classifier.
    """
    logits = run.output.shape[1]
    uncalled = [name for name in layers if name not in run.called]
    for name in (*reversed(run.called), *reversed(uncalled)):
        if name in layers and outputs_of(layers[name]) == logits:
            called = name in run.called
            changed = _run(model, example, _replace_outputs if called else _replace_weights, name)
            if changed is None or not torch.equal(changed.output, run.output):
                later = run.called[run.called.index(name) + 1 :] if called else run.called
                sums = changed.sums if changed else {}
                norms = tuple(each for each in later if each in run.sums and run.sums[each] != sums.get(each))
                return OutputLayer(name, logits, norms, called)
    return None


def _run(
    model: nn.Module, example: Any, change: Callable[[nn.Module], object] | None = None, layer: str = ""
) -> _Run | None:
    """Run a copy of a model, in which a layer is changed; None if it cannot run or returns no tensor."""
    network = working_copy(model)
    if change:
        change(network.get_submodule(layer))
    called: dict[str, None] = {}
    sums: dict[str, float] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            called.pop(name, None)
            called[name] = None
            if isinstance(module, _BatchNorm) and args:
                sums[name] = args[0].float().sum().item()

        return hook

    for name, module in network.named_modules():
        module.register_forward_pre_hook(note(name))
    try:
        with preserved_random_state(), torch.no_grad(), unchanged_attributes(model):
            outputs = Inputs.of(example, 0, network).run(network)
    except Exception:  # noqa: BLE001 - whatever it is, training raises it again, with its context
        return None
    tensors = tensors_of(outputs)
    return _Run(tensors[0], tuple(called), sums) if tensors else None


def _replace_outputs(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _module, _args, output: _other_values(output))


def _replace_weights(layer: nn.Module) -> None:
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(_other_values(parameter), requires_grad=False))


def _other_values(tensor: Tensor) -> Tensor:
    """Return positive values, which pass a ReLU, all different, so that no softmax is the same for them."""
    values = torch.linspace(1, 2, tensor.numel(), device=tensor.device)
    return values.to(tensor.dtype).reshape(tensor.shape)
