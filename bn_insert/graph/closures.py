"""Functions among the attributes of a model that refer to its modules, such as a wrapped forward or a hook.

`copy.deepcopy` takes functions as they are, so that a copy of the model would run layers of the original, and its hooks
would store what they see there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

_TENSORS_AND_CHILDREN = ("_parameters", "_buffers", "_modules")


def deepcopy_with_functions(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy of a model in which functions refer to the modules of the copy.

    Args:
        model: The model.
        memo: As for `copy.deepcopy`.
    """
    modules = {id(module) for module in model.modules()}
    functions = [each for each in _functions(_attributes(model)) if _reaches(each, modules)]
    cells: dict[int, CellType] = {}  # functions may share a variable
    copies = {id(each): _with_empty_cells(each, cells) for each in functions}
    memo.update(copies)
    result = copy.deepcopy(model, memo)

    def translated(value: Any) -> Any:
        return copy.deepcopy(value, memo) if _reaches(value, modules) else memo.get(id(value), value)

    for function in functions:
        new = copies[id(function)]
        new.__defaults__ = translated(function.__defaults__)
        new.__kwdefaults__ = translated(function.__kwdefaults__)
        vars(new).update({name: translated(value) for name, value in vars(function).items()})
        for cell in function.__closure__ or ():
            for value in _contents(cell):
                cells[id(cell)].cell_contents = translated(value)
    if functions:
        _bind_copies(result, copies)
    return result


def _attributes(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield from (value for name, value in vars(module).items() if name not in _TENSORS_AND_CHILDREN)


def _functions(values: Iterable[Any]) -> list[FunctionType]:
    return [each for each in _reachable(values) if isinstance(each, FunctionType)]


def _reaches(value: Any, modules: set[int]) -> bool:
    return any(id(each) in modules for each in _reachable([value]))


def _reachable(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the values and what is in them, each once; modules are not entered."""
    waiting, seen = list(values), set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            waiting += _parts(value)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, FunctionType):
        captured = [each for cell in value.__closure__ or () for each in _contents(cell)]
        return [*captured, value.__defaults__, value.__kwdefaults__, vars(value)]
    return ()


def _contents(cell: CellType) -> Iterator[Any]:
    """Yield the value of a variable, if it has one yet."""
    try:
        yield cell.cell_contents
    except ValueError:
        return


def _with_empty_cells(function: FunctionType, cells: dict[int, CellType]) -> FunctionType:
    closure = tuple(cells.setdefault(id(cell), CellType()) for cell in function.__closure__ or ())
    new = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
    new.__qualname__, new.__doc__, new.__module__ = function.__qualname__, function.__doc__, function.__module__
    return new


def _bind_copies(model: nn.Module, copies: Mapping[int, FunctionType]) -> None:
    """Let methods among the attributes be those of copied functions: deepcopy keeps the function of a method."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, MethodType) and (function := copies.get(id(value.__func__))):
                vars(module)[name] = MethodType(function, value.__self__)
