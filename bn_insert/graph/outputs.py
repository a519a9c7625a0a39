"""The tensors in what a model returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_of(outputs: Any) -> list[Tensor]:
    """Return the tensors in what a model returns, in order.

    They may be in containers, also of classes derived from dict or tuple, in dataclasses, and in attributes of objects
    of other classes.
    """
    return list(_tensors(outputs, set()))


def _tensors(outputs: Any, seen: set[int]) -> Iterator[Tensor]:
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen:  # objects may refer to each other
            seen.add(id(leaf))
            for each in _held(leaf):
                yield from _tensors(each, seen)


def _held(value: Any) -> list[Any]:
    """Return what an object has that PyTorch takes for a single value."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if callable(value):  # a class, a function or a module
        return []
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    return list(vars(value).values()) if hasattr(value, "__dict__") else []
