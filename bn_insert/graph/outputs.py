"""The tensors in what a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

_DEEPEST = 16  # objects may refer to each other in long chains


def tensors_of(outputs: Any) -> list[Tensor]:
    """Return the tensors in what a model returns, in order.

    If there are tensors in tuples, lists and dicts, only these are returned: an object next to them may hold anything,
    such as measured times. Otherwise, the tensors in dataclasses, in containers of classes derived from dict or tuple,
    and in attributes of objects of other classes are returned, the outermost ones first.
    """
    leaves = _leaves(outputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if tensors:
        return tensors
    seen: dict[int, Any] = {}  # with the objects: the id of one that is gone would be given to another
    for _ in range(_DEEPEST):
        objects = {id(leaf): leaf for leaf in leaves if not isinstance(leaf, Tensor) and id(leaf) not in seen}
        seen |= objects
        leaves = [leaf for each in objects.values() for value in _held(each) for leaf in _leaves(value)]
        tensors += [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors


def _leaves(value: Any) -> list[Any]:
    try:
        return tree_leaves(value)
    except RecursionError:  # a list may contain itself
        return []


def _held(value: Any) -> list[Any]:
    """Return the values held by an object that pytree treats as a leaf."""
    try:
        if isinstance(value, Mapping):
            return list(value.values())
        if isinstance(value, list | tuple):
            return list(value)
        if callable(value):  # a class, a function or a module
            return []
        if is_dataclass(value):
            return [getattr(value, field.name, None) for field in fields(value)]
        return list(vars(value).values()) if hasattr(value, "__dict__") else []
    except Exception:  # noqa: BLE001 - methods of any class may run
        return []
