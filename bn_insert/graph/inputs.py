"""The inputs that a model's forward takes from a batch: one tensor, several, or a dict."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import CalibrationError, GraphError
from ..support.text import counted, listed, with_article
from .compiled import uncompiled
from .copies import check_module, protected_parameters

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_KEYWORD = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
_MAPPING = re.compile(r"(\w+\.)*(dict|Dict|Mapping|MutableMapping|OrderedDict)\b")
_SEQUENCE = re.compile(r"(\w+\.)*(list|List|tuple|Tuple|Sequence)(\[.*\])?( \| None)?")
_CONTAINERS = (tuple, list, Mapping)
_KINDS_SHOWN = 4
_LABELS = {"label", "labels", "target", "targets"}  # with these, a forward may return its loss

MAKING_BATCHES = (
    "to make batches, use DataLoader(dataset, batch_size=32) for a dataset, with a transform to tensors for PIL "
    "images, torch.stack for a list of tensors, torch.from_numpy for an array, or image.unsqueeze(0) for one image"
)
"""How to make batches of single images, for messages."""


@dataclass(frozen=True)
class Inputs:
    """Arguments for one call of a model's forward; tensors have the batch in dimension 0."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Any, number: int, model: nn.Module) -> Inputs:
        """Return what the model takes from a batch, on the model's device.

        Floating-point tensors are converted to the dtype of the model's first floating-point weight.

        Args:
            batch: As for `insert_batchnorm`.
            number: The batch's number in error messages.
            model: Its forward's parameters determine which values of the batch are used.

        Raises:
            CalibrationError: If the batch does not contain what the forward takes.
        """
        return InputReader(model).inputs(batch, number)

    def mapped(self, change: Callable[[Tensor], Any]) -> Inputs:
        """Return the inputs with `change` applied to every tensor."""
        if (tensor := self.only_tensor) is not None:
            return Inputs((change(tensor),))
        return Inputs(*tree_map_only(Tensor, change, (self.args, dict(self.kwargs))))

    def rows(self, start: int, stop: int) -> Inputs:
        """Return the images from `start` up to `stop`."""
        return self.mapped(lambda tensor: tensor[start:stop])

    def run(self, model: nn.Module) -> Any:
        """Call the model on copies of the tensors, since it may change them in place.

        Raises:
            GraphError: The model changes its parameters in place.
        """
        copies = self.mapped(torch.clone)
        with protected_parameters(model), uncompiled():
            return model(*copies.args, **copies.kwargs)

    @property
    def only_tensor(self) -> Tensor | None:
        """The tensor that is the forward's only argument, as it is for most models; None if there is more."""
        alone = len(self.args) == 1 and not self.kwargs
        return self.args[0] if alone and isinstance(self.args[0], Tensor) else None

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the forward's parameters."""
        if (tensor := self.only_tensor) is not None:
            return [tensor]
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    @property
    def shapes(self) -> str:
        """The shapes of all tensors, for messages."""
        return " and ".join(str(tuple(tensor.shape)) for tensor in self.tensors)

    @property
    def conversion(self) -> str:
        """Advice for a model that fails on integer images; empty for floating-point inputs."""
        tensor = self.only_tensor
        if tensor is None or tensor.is_floating_point():
            return ""
        return (
            f"The inputs are {tensor.dtype}: convert and scale images to floating point first, as for training, and "
            "put them before the labels in a batch"
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.tensors[0])


class InputReader:
    """Takes from batches what a model's forward takes, after looking at the model once."""

    def __init__(self, model: nn.Module) -> None:
        """Look at the forward's parameters, and at the device and dtype of the model."""
        self._forward = forward_inputs(model)
        self._target = reference_tensor(model)

    def inputs(self, batch: Any, number: int) -> Inputs:
        """Return what `Inputs.of` returns for the model."""
        if isinstance(batch, Inputs):
            return batch
        inputs = _read(batch, batch, number, self._forward)
        if not self._target.is_meta and (without := [each for each in inputs.tensors if each.is_meta]):
            raise CalibrationError(
                f"batch {number} is on the meta device, where tensors have a shape and no values; pass one with "
                f"values, or where its shape alone matters, torch.zeros{tuple(without[0].shape)}"
            )
        return inputs.mapped(self._moved)

    def _moved(self, tensor: Tensor) -> Tensor:
        dtype = self._target.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self._target.device, dtype, non_blocking=True)


def reference_tensor(model: nn.Module) -> Tensor:
    """Return a tensor with the device and dtype that a model's inputs need.

    This is the model's first floating-point parameter with more than one axis, since a temperature or a scale may have
    a dtype of its own. Without one, it is the first parameter or buffer, or else an empty tensor on the CPU.
    """
    floating = [each for each in (*model.parameters(), *model.buffers()) if each.is_floating_point()]
    weights = (each for each in floating if isinstance(each, nn.Parameter) and each.ndim > 1)
    return next(weights, floating[0] if floating else torch.zeros(()))


@dataclass(frozen=True)
class ForwardInputs:
    """What a model's forward takes; returned by `forward_inputs`.

    Attributes:
        model: Name of the model's class.
        names: Names of the parameters without a default, in the order of the forward's parameters.
        by_position: How many of these, the first, are positional-only.
        by_name: How many of these, the last, are keyword-only.
        takes_dict: Whether there is only one such parameter, and it is annotated as a dict.
        sequence: If there is only one such parameter, and it is annotated as a list, tuple or sequence: list or tuple.
        optional: Whether there are parameters with a default, or variadic ones.
        by_name_if_given: Names of the parameters with a default that a dict is passed to by name, where there are no
            others; None for any name (only `**kwargs`).
    """

    model: str
    names: tuple[str, ...]
    by_position: int
    by_name: int
    takes_dict: bool
    sequence: type[list[Any]] | type[tuple[Any, ...]] | None = None
    optional: bool = False
    by_name_if_given: frozenset[str] | None = frozenset()

    @property
    def several(self) -> bool:
        """Whether the forward takes more than one input."""
        return len(self.names) > 1

    def takes_if_given(self, name: str) -> bool:
        """Return whether the forward takes an optional value of this name."""
        return self.by_name_if_given is None or name in self.by_name_if_given

    def named(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments and keyword arguments for values by name; others than those of `names` are left out."""
        args = tuple(values[name] for name in self.names[: self.by_position])
        return args, {name: values[name] for name in self.names[self.by_position :]}

    def ordered(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments and keyword arguments for values in the order of `names`; those beyond it are left out."""
        last = len(self.names) - self.by_name
        return tuple(values[:last]), dict(zip(self.names[last:], values[last:], strict=False))


def forward_inputs(model: nn.Module) -> ForwardInputs:
    """Return what a model's forward takes, or its `__call__` if its class has its own.

    Args:
        model: The network. It is not run.

    Raises:
        GraphError: The model is not a module, or has no forward.

    Examples:
        >>> forward_inputs(nn.Bilinear(3, 4, 5)).names
        ('input1', 'input2')
    """
    check_module(model)
    parameters = _parameters(model)
    required = [each for each in parameters if each.kind not in _VARIADIC and each.default is each.empty]
    kinds = [each.kind for each in required]
    optional = [each for each in parameters if each.kind in _KEYWORD and each not in required]
    takes_any = [each.kind for each in parameters] == [inspect.Parameter.VAR_KEYWORD]
    return ForwardInputs(
        type(model).__name__,
        tuple(each.name for each in required),
        kinds.count(inspect.Parameter.POSITIONAL_ONLY),
        kinds.count(inspect.Parameter.KEYWORD_ONLY),
        takes_dict=len(required) == 1 and _MAPPING.match(_text(required[0].annotation)) is not None,
        sequence=_sequence(required[0].annotation) if len(required) == 1 else None,
        optional=len(parameters) > len(required),
        by_name_if_given=None if takes_any else frozenset(each.name for each in optional),
    )


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """Return the parameters of the function that runs when a model is called."""
    if type(model).__call__ is not nn.Module.__call__:
        parameters = list(inspect.signature(model.__call__).parameters.values())
        if inspect.Parameter.VAR_POSITIONAL not in {each.kind for each in parameters}:  # else it passes them on
            return parameters
    if not callable(model.forward):
        raise GraphError(f"{type(model).__name__} has no forward, but {model.forward!r:.40} in its place")
    return list(inspect.signature(model.forward).parameters.values())


def _sequence(annotation: Any) -> type[list[Any]] | type[tuple[Any, ...]] | None:
    """Return the class of a sequence that an annotation stands for; None if it stands for anything else."""
    found = _SEQUENCE.fullmatch(_text(annotation))
    return None if found is None else tuple if found[2].lower() == "tuple" else list


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else str(getattr(annotation, "__name__", annotation))


def _read(value: Any, batch: Any, number: int, forward: ForwardInputs) -> Inputs:
    if isinstance(value, Tensor) and not forward.several:
        return Inputs((), {forward.names[0]: value}) if forward.by_name else Inputs((value,))
    if isinstance(value, Mapping) and value:
        if forward.takes_dict:
            return _checked(*forward.ordered([dict(value)]), batch, number, forward)
        if forward.names and set(forward.names) <= value.keys():
            return _checked(*forward.named(value), batch, number, forward)
        if not forward.names and forward.takes_if_given(next(iter(value))):  # else, the first value is the input
            given = {name: each for name, each in value.items() if forward.takes_if_given(name) and name not in _LABELS}
            return _checked((), given, batch, number, forward)
        if not forward.several:
            return _read(next(iter(value.values())), batch, number, forward)
    if isinstance(value, (tuple, list)) and value:
        inputs = _read_sequence(value, batch, number, forward)
        if inputs is not None:
            return inputs
    raise _not_a_batch(batch, number, forward)


def _read_sequence(value: Sequence[Any], batch: Any, number: int, forward: ForwardInputs) -> Inputs | None:
    """Return what `_read` returns for a tuple or list, or None if it has fewer values than the forward takes."""
    if forward.sequence and all(isinstance(each, Tensor) for each in value):
        return _checked(*forward.ordered([forward.sequence(value)]), batch, number, forward)
    if value is batch and _are_samples(value):
        raise _not_a_batch(batch, number, forward)
    alone = len(forward.names) == 1 and not (forward.optional or forward.sequence)
    if alone and value is not batch and len(value) > 1 and all(map(_is_input, value)):
        name = forward.names[0]
        raise CalibrationError(
            f"batch {number} has {with_article(value)} of {len(value)} inputs, but {forward.model} takes one: "
            f"{name}; if it takes all of them together, annotate that parameter ({name}: list[Tensor]), and "
            "otherwise pass batches with one of them, or torch.stack(images) if these are single images"
        )
    if not forward.several or isinstance(value[0], (tuple, list, Mapping)):  # (inputs, labels)
        return _read(value[0], batch, number, forward)
    if len(value) >= len(forward.names):
        return _checked(*forward.ordered(value[: len(forward.names)]), batch, number, forward)
    return None


def _is_input(value: Any) -> bool:
    """Return whether a value is a batch of images or features, rather than of labels or numbers."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1


def _are_samples(values: Sequence[Any]) -> bool:
    """Return whether each value is what a dataset has for one image: a tuple, list or dict with a label or a number.

    None contains a tensor that has a batch axis besides the three of an image.
    """
    return len(values) > 1 and all(
        isinstance(each, _CONTAINERS)
        and any(map(_is_label, _values(each)[1:]))
        and not any(isinstance(leaf, Tensor) and leaf.ndim > 3 for leaf in tree_leaves(_values(each)))
        for each in values
    )


def _is_label(value: Any) -> bool:
    return isinstance(value, int | float | str) or getattr(value, "ndim", None) == 0


def _values(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, Mapping) else container)


def _checked(args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any, number: int, forward: ForwardInputs) -> Inputs:
    inputs = Inputs(args, kwargs)
    if not inputs.tensors:
        raise _not_a_batch(batch, number, forward)
    lengths = {tuple(tensor.shape[:1]) for tensor in inputs.tensors}
    if len(lengths) != 1 or () in lengths:
        raise CalibrationError(
            f"batch {number} has inputs of shapes {inputs.shapes}; all need the same number of images in dimension 0"
        )
    return inputs


def _not_a_batch(batch: Any, number: int, forward: ForwardInputs) -> CalibrationError:
    """Return the error for a batch in which what the forward takes is not found; it says how to make batches."""
    empty = hasattr(batch, "__len__") and getattr(batch, "shape", None) != () and not len(batch)
    described = f"an empty {type(batch).__name__}" if empty else _with_contents(batch)
    advice = f"; {MAKING_BATCHES}" if not empty and _holds_images(batch) else ""
    if forward.several:
        return CalibrationError(
            f"batch {number} is {described}, but {forward.model} takes {', '.join(forward.names)}; pass a tuple of "
            f"these, or a dict with these names{advice}"
        )
    return CalibrationError(
        f"batch {number} is {described}; a batch is a tensor, or a tuple, list or dict whose first value is the input "
        f"tensor{advice}"
    )


def _holds_images(batch: Any) -> bool:
    """Return whether a value that is not a batch contains arrays or samples."""
    nested = isinstance(batch, tuple | list) and bool(batch) and isinstance(batch[0], _CONTAINERS) and bool(batch[0])
    leaves = tree_leaves(batch)
    return nested or any(hasattr(leaf, "__array_interface__") for leaf in leaves)  # of NumPy or PIL


def _with_contents(batch: Any) -> str:
    """Return "an ndarray", "a tuple (ndarray, int)", "a list of 2 tuples (ndarray, int)" and the like."""
    described, inner = with_article(batch), batch
    alike = isinstance(batch, tuple | list) and all(isinstance(each, type(batch[0])) for each in batch)
    if alike and isinstance(batch[0], _CONTAINERS) and batch[0]:
        inner = batch[0]
        described += f" of {counted(len(batch), type(inner).__name__)}"
    if not isinstance(inner, _CONTAINERS):
        return described
    return f"{described} ({listed([type(each).__name__ for each in _values(inner)], _KINDS_SHOWN)})"
