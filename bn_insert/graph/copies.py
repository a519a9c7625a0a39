"""Copies of a model: unwrapped, independent, or sharing its parameters."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def unwrapped(model: AnyModule) -> AnyModule:
    """Return the module inside a DataParallel, DistributedDataParallel or compiled model, else the model itself."""
    inner: nn.Module = model
    while True:
        if isinstance(inner, nn.DataParallel | DistributedDataParallel):
            inner = inner.module
        elif "_orig_mod" in inner._modules:  # torch.compile
            inner = inner.get_submodule("_orig_mod")
        else:
            return cast(AnyModule, inner)


def working_copy(model: AnyModule, device: torch.device | str | None = None) -> AnyModule:
    """Return a copy in eval mode for temporary use: changes to its flags and hooks do not affect the model.

    Args:
        model: The model; of a wrapped model (see `unwrapped`), the module inside is copied.
        device: Device of the copy. On the device of its parameters, the copy shares them and needs no memory.
    """
    network = shared_copy(model, device).eval()
    return network if device is None else network.to(device)


def shared_copy(model: AnyModule, device: torch.device | str | None = None) -> AnyModule:
    """Return a copy whose parameters share their memory with the model's.

    Args:
        model: The model; of a wrapped model (see `unwrapped`), the module inside is copied.
        device: Device of the copy's parameters. On another device than theirs, they are copied there.
    """
    model = unwrapped(model)
    shared: dict[int, Tensor] = {id(parameter): _on_device(parameter, device) for parameter in model.parameters()}
    return copy.deepcopy(model, _computed(model) | shared)


def deep_copy(model: AnyModule) -> AnyModule:
    """Return an independent copy, even of a model with tensors computed from its parameters, which deepcopy refuses.

    Args:
        model: The model; of a wrapped model (see `unwrapped`), the module inside is copied.
    """
    model = unwrapped(model)
    return copy.deepcopy(model, _computed(model))


def _computed(model: nn.Module) -> dict[int, Any]:
    """Return copies of attributes that deepcopy refuses, such as the weight that old-style weight_norm computes."""
    values = chain.from_iterable(vars(module).values() for module in model.modules())
    return {id(value): value.detach().clone() for value in values if isinstance(value, Tensor) and value.grad_fn}


def _on_device(parameter: nn.Parameter, device: torch.device | str | None) -> nn.Parameter:
    """Return a new parameter with the same memory, or a copy on another device.

    Not the parameter itself: a forward may assign to `weight.data`.
    """
    moved = parameter.detach() if device is None else parameter.detach().to(device)
    return nn.Parameter(moved, requires_grad=parameter.requires_grad)
