"""Copies of a model: unwrapped, independent, or sharing its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain, repeat
from os import PathLike
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from ..errors import GraphError, out_of_memory
from ..support.arguments import usable_device
from ..support.text import first_line
from .closures import deepcopy_with_functions

AnyModule = TypeVar("AnyModule", bound=nn.Module)

# Size of parameters up to which a copy of them costs less than checking each operation of many passes.
_BYTES_TO_COPY = 16 << 20


def unwrapped(model: AnyModule) -> AnyModule:
    """Return the module inside a DataParallel, DistributedDataParallel or compiled model, else the model itself.

    For a model that Lightning Fabric has set up, this is the module that was passed to it.

    Raises:
        GraphError: It is not a module that can be changed; the message says what to do.
    """
    check_module(model)
    inner: nn.Module = model
    while True:
        if isinstance(inner, nn.DataParallel | DistributedDataParallel):
            inner = inner.module
        elif "_orig_mod" in inner._modules:  # torch.compile
            inner = inner.get_submodule("_orig_mod")
        elif "_original_module" in inner._modules:  # Lightning Fabric's setup
            inner = inner.get_submodule("_original_module")
        else:
            return cast(AnyModule, inner)


def check_module(model: object) -> None:
    """Raise GraphError unless `model` is an nn.Module; suggest a fix for common mistakes."""
    if isinstance(model, torch.jit.ScriptModule):
        raise GraphError(
            "the model is a TorchScript program, whose modules cannot be changed; build the nn.Module that it was made "
            "from, and load the program's weights into it: module.load_state_dict(program.state_dict())"
        )
    if isinstance(model, nn.Module):
        return
    if model is None or isinstance(model, bool):
        raise GraphError(
            f"the model is {model}: functions that work in place, such as replace_output and fit_output, do not return "
            "the model; call them without assigning what they return"
        )
    if isinstance(model, str | PathLike):
        raise GraphError(f"the model is a path, {str(model)!r:.80}; load the network first: load_checkpoint(path)")
    if isinstance(model, Mapping):
        raise GraphError(
            "the model is a dict, perhaps a state dict, which has weights and no forward; build the network and load "
            "them: model.load_state_dict(state_dict)"
        )
    if isinstance(model, type) or callable(model):
        name = getattr(model, "__name__", type(model).__name__)
        raise GraphError(f"the model is {name}, which is not a torch.nn.Module; if it builds one, call it: {name}()")
    raise GraphError(f"the model is a {type(model).__name__}, not a torch.nn.Module")


def tied_parameters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the first name of each parameter that a model has under several, with each of its other names."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (other := first.setdefault(id(parameter), name)) != name:
            yield other, name


def check_values(model: nn.Module) -> None:
    """Raise GraphError for a model with tensors on the meta device, which have a shape and no values."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise GraphError(
                f"{type(model).__name__} is on the meta device ({name} has no data); "
                "build it on the CPU, or give it memory (model.to_empty(device='cpu')) and load all of its weights "
                "(model.load_state_dict(state_dict))"
            )


def working_copy(
    model: AnyModule,
    device: torch.device | str | None = None,
    *,
    training: bool = False,
    to_trace: bool = False,
) -> AnyModule:
    """Return a copy in eval mode for temporary use: changes to its flags and hooks do not affect the model.

    A class with a `train` method of its own may change weights there, as in LoRA layers that merge theirs for
    evaluation: a copy of such a model has parameters of its own. Run any other within `protected_parameters`: a forward
    can change the values of the parameters, which are the model's.

    Args:
        model: The model; of a wrapped model (see `unwrapped`), the module inside is copied.
        device: Device of the copy. On the device of its parameters, the copy shares them if it can, and then needs no
            memory.
        training: Return it in train mode instead.
        to_trace: Accept a model on the meta device too: a trace needs no values.

    Raises:
        GraphError: The model is not a module that can be copied, or its tensors have no values.
        CalibrationError: This machine has no such device.
    """
    check_module(model)
    if any(is_lazy(value) for value in (*model.parameters(), *model.buffers())):
        raise GraphError(f"{type(model).__name__} has lazy layers, whose shapes are not known; call it once on a batch")
    if not to_trace:
        check_values(model)
    place = None if device is None else usable_device(device)
    network = deep_copy(model) if _switches_modes_itself(model) else shared_copy(model, place)
    network.eval()  # not what it returns: a class may have a `train` that returns nothing
    if training:
        network.train()
    return network if place is None else network.to(place)


def _switches_modes_itself(model: nn.Module) -> bool:
    """Return whether a module has its own code for switching between train mode and eval mode."""
    return any(
        getattr(module.train, "__func__", None) is not nn.Module.train
        or getattr(module.eval, "__func__", None) is not nn.Module.eval
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    )


def shared_copy(model: AnyModule, device: torch.device | str | None = None) -> AnyModule:
    """Return a copy whose parameters share their memory with the model's.

    Args:
        model: The model; of a wrapped model (see `unwrapped`), the module inside is copied.
        device: Device of the copy's parameters. On another device than theirs, they are copied there.
    """
    model = unwrapped(model)
    shared: dict[int, Any] = {id(parameter): _on_device(parameter, device) for parameter in model.parameters()}
    return _copied(model, shared)


def deep_copy(model: AnyModule) -> AnyModule:
    """Return an independent copy, even of a model with tensors computed from its parameters, which deepcopy refuses.

    Args:
        model: The model; of a wrapped model (see `unwrapped`), the module inside is copied.
    """
    return _copied(unwrapped(model), {})


def _copied(model: AnyModule, memo: dict[int, Any]) -> AnyModule:
    try:
        result = cast(AnyModule, deepcopy_with_functions(model, memo))
    except Exception as error:  # any object among the attributes may raise anything
        if out_of_memory(error):
            raise
        raise GraphError(
            f"{type(model).__name__} cannot be copied: {first_line(error)}{_uncopyable(model)}; remove it, or give its "
            "class a __deepcopy__"
        ) from error
    # torch.fx builds the containers of a GraphModule, and the module itself, anew and in train mode.
    modules = dict(model.named_modules())
    _check_independent(model, modules, result)
    for name, module in result.named_modules():
        module.training = modules[name].training
        if isinstance(module, torch.jit.ScriptModule):
            for parameter in module.parameters():
                if not parameter.is_leaf:
                    parameter.detach_().requires_grad_()  # PyTorch computes it from the original's
    return result


def _check_independent(model: nn.Module, modules: Mapping[str, nn.Module], result: nn.Module) -> None:
    """Raise GraphError if a copy shares a module with the model, as some frozen networks are written to do."""
    originals = {id(module) for module in modules.values()}
    for name, module in result.named_modules():
        if id(module) in originals:
            raise GraphError(
                f"{type(model).__name__} cannot be copied: a copy shares {name or 'itself'} "
                f"({type(module).__name__}) with it, whose __deepcopy__ returns the module itself, so that changing "
                "the copy would change the model; let it return a new module, or remove that method"
            )


def _uncopyable(model: nn.Module) -> str:
    """Return which attribute cannot be copied, in words; empty if each can by itself."""
    memo: dict[int, Any] = {id(each): each for each in (*model.modules(), *model.parameters())}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            try:
                copy.deepcopy(value, memo)
            except Exception:  # noqa: BLE001 - as above
                return f" (attribute {f'{name}.{attribute}'.lstrip('.')})"
    return ""


@contextmanager
def unchanged_attributes(model: nn.Module) -> Iterator[None]:
    """Undo what a forward does to the attributes of the modules of a model, and to lists, dicts and sets among them.

    A copy's forward reaches the original where a hook finds it in a global variable, as in `lambda *_:
    MODEL.outputs.append(...)`. What it stores there during a trace has no values.
    """
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    contents: list[tuple[Any, Any]] = [
        (value, copy.copy(value))
        for _, attributes in before
        for value in attributes.values()
        if isinstance(value, list | dict | set)
    ]
    try:
        yield
    finally:
        for attributes, kept in before:
            if not _same_items(attributes, kept):
                attributes.clear()
                attributes.update(kept)
        for container, items in contents:
            if isinstance(container, list):
                container[:] = items
            elif isinstance(container, set) or not _same_items(container, items):
                container.clear()
                container.update(items)


def _same_items(first: Mapping[Any, Any], second: Mapping[Any, Any]) -> bool:
    return first.keys() == second.keys() and all(first[key] is second[key] for key in second)


def _on_device(parameter: nn.Parameter, device: torch.device | str | None) -> nn.Parameter:
    """Return a new parameter with the same memory, or a copy on another device.

    Not the parameter itself: a forward may assign to `weight.data`. A parameter made in inference mode can take no
    gradient outside of it; its copy can.
    """
    moved = parameter.detach() if device is None else parameter.detach().to(device)
    if moved.is_inference() and not torch.is_inference_mode_enabled():
        moved = moved.clone()
    return nn.Parameter(moved, requires_grad=parameter.requires_grad)


class protected_parameters(TorchDispatchMode):  # noqa: N801 - a context manager
    """Raises GraphError where a forward would write to the memory of the parameters of a network.

    Neither version counters, which `.data` bypasses, nor a comparison afterwards would do: by then the values are gone.
    Checking each operation costs some microseconds; copying the parameters of a VGG16 takes 550 MB.
    """

    supports_higher_order_operators = True  # such as torch.cond, whose branches may write to none of their inputs

    def __init__(self, network: nn.Module) -> None:
        """Protect the parameters of a network."""
        super().__init__()
        self._model = type(network).__name__
        self._names = {_memory(parameter): name for name, parameter in network.named_parameters()}
        self._names.pop(None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check the tensors that an operation writes to, and run it."""
        kwargs = kwargs or {}
        if not isinstance(func, HigherOrderOperator) and func._schema.is_mutable:
            for number, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[number] if number < len(args) else kwargs.get(argument.name)
                    for tensor in value if isinstance(value, list | tuple) else (value,):
                        self._check(tensor, func)
        return func(*args, **kwargs)

    def _check(self, tensor: Any, operation: Any) -> None:
        name = self._names.get(_memory(tensor)) if isinstance(tensor, Tensor) else None
        if name is not None:
            raise _changed(self._model, name, f" ({operation})")


@contextmanager
def protected_passes(network: nn.Module) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Protect the parameters of a network during many passes; yield a function that returns a context for each.

    In a small network, checking each operation takes longer than most operations. Its parameters are checked during the
    first pass only; afterwards they are compared with a copy, and restored.

    Raises:
        GraphError: The forward changes parameters in place.
    """
    checked = protected_parameters(network)
    comparable = all(map(_is_one_array, network.parameters()))
    if not comparable or parameter_bytes(network) > _BYTES_TO_COPY:
        yield lambda: checked
        return
    # The memory itself: a forward may give the copy's parameter another by assigning to `weight.data`.
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    before = {name: (parameter, parameter.clone()) for name, parameter in parameters.items()}
    contexts: Iterator[AbstractContextManager[object]] = chain([checked], repeat(nullcontext()))
    changed: list[str] = []
    try:
        yield lambda: next(contexts)
    finally:
        for name, (parameter, kept) in before.items():
            if not (torch.equal(parameter, kept) or torch.allclose(parameter, kept, rtol=0, atol=0, equal_nan=True)):
                parameter.copy_(kept)
                changed.append(name)
    if changed:
        raise _changed(type(network).__name__, changed[0])


def parameter_bytes(network: nn.Module) -> int:
    """Return the size of all parameters together."""
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


def _changed(model: str, parameter: str, operation: str = "") -> GraphError:
    return GraphError(
        f"the forward of {model} changes its parameter {parameter} in place{operation}, so running it would change the "
        "model; let it compute a new tensor, such as weight.clamp(-1, 1), or use torch.nn.utils.parametrize"
    )


def _memory(tensor: Tensor) -> int | None:
    """Return the address of the memory of a tensor, or None if it has none."""
    if not _is_one_array(tensor) or tensor.device.type == "meta":
        return None
    return tensor.untyped_storage().data_ptr() or None


def _is_one_array(tensor: Tensor) -> bool:
    """Return whether a tensor is not made of several, as a sparse one is, or a quantized one of torchao."""
    return tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)
