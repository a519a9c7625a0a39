"""Functions among the attributes of a model that refer to its modules, such as a wrapped forward or a hook.

`copy.deepcopy` takes functions and weak references as they are, so that a copy of the model would run layers of the
original, and its hooks would store what they see there.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from itertools import chain
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary, ref

from torch import Tensor, nn

_TENSORS_AND_CHILDREN = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, tuple, set, frozenset, dict, OrderedDict, deque)
_WEAK_CONTAINERS = (WeakSet, WeakValueDictionary, WeakKeyDictionary)
_MOST_ITEMS = 1000  # a longer container holds data, not modules
_DEEPEST = 20  # of containers in containers


def deepcopy_with_functions(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy of a model in which functions and weak references refer to the modules of the copy.

    Tensors that `copy.deepcopy` refuses are copied without their history: the weight that old-style weight_norm
    computes, outputs that a forward keeps.

    Args:
        model: The model.
        memo: As for `copy.deepcopy`.
    """
    modules = {id(module) for module in model.modules()}
    functions: list[FunctionType] = []
    has_weak_references = False
    for value in _reachable(chain.from_iterable(vars(module).values() for module in model.modules())):
        if _is_about(value, modules):
            functions.append(value)
        elif isinstance(value, Tensor) and value.grad_fn:
            memo.setdefault(id(value), value.detach().clone())
        elif type(value) in (ref, *_WEAK_CONTAINERS):
            has_weak_references |= any(id(each) in modules for each in _parts(value))
    cells: dict[int, CellType] = {}  # functions may share a variable
    copies = {id(each): _with_empty_cells(each, cells) for each in functions}
    memo.update(copies)
    result = copy.deepcopy(model, memo)
    translation = _Translation(id(model), memo)
    for function in functions:
        new = copies[id(function)]
        new.__defaults__ = translation.of(function.__defaults__)
        new.__kwdefaults__ = translation.of(function.__kwdefaults__)
        vars(new).update({name: translation.of(value) for name, value in vars(function).items()})
        for cell in function.__closure__ or ():
            for value in _contents(cell):
                cells[id(cell)].cell_contents = translation.of(value)
    if functions:
        _bind_copies(result, copies)
    if has_weak_references:
        for module in result.modules():
            others = vars(module).keys() - set(_TENSORS_AND_CHILDREN)
            vars(module).update({name: translation.of(vars(module)[name]) for name in others})
    return result


def modules_held_elsewhere(model: nn.Module) -> set[int]:
    """Return the ids of the modules that a forward may reach in other ways than by the name of a child.

    These are in a list, a dict, a dataclass, a partial, a weak reference or a closure, also as children of modules
    outside the model, such as a slice of an nn.Sequential. Hooks do not count, nor does what a module knows of itself.
    """
    modules = {id(module) for module in model.modules()}
    found: set[int] = set()
    for module in model.modules():
        values = [
            value for name, value in vars(module).items() if name not in _TENSORS_AND_CHILDREN and "_hooks" not in name
        ]
        reached = {id(each) for each in _reachable(values, through_methods=False, unless_in=modules)}
        found |= reached & modules - {id(module)}
    return found


def _is_about(value: Any, modules: set[int]) -> bool:
    """Return whether a value is a function that reaches one of the modules."""
    return isinstance(value, FunctionType) and any(id(each) in modules for each in _reachable([value]))


def _reachable(
    values: Iterable[Any], *, through_methods: bool = True, unless_in: set[int] | None = None
) -> Iterator[Any]:
    """Yield the values and what is in them, each once.

    Args:
        values: Where to begin.
        through_methods: Whether the objects that methods are bound to count.
        unless_in: Modules other than these are entered; by default none is.
    """
    waiting, seen = list(values), set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, nn.Module):
            waiting += vars(value).values() if unless_in is not None and id(value) not in unless_in else ()
        elif isinstance(value, MethodType):
            waiting += (value.__self__, value.__func__) if through_methods else (value.__func__,)
        else:
            waiting += _parts(value)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, _CONTAINERS):
        values = value.values() if isinstance(value, dict) else value
        return values if len(value) <= _MOST_ITEMS else ()
    if isinstance(value, _WEAK_CONTAINERS):
        return [*value, *(() if isinstance(value, WeakSet) else value.values())]
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, FunctionType):
        captured = [each for cell in value.__closure__ or () for each in _contents(cell)]
        return [*captured, value.__defaults__, value.__kwdefaults__, vars(value)]
    if type(value) is ref:
        return (value(),)
    return vars(value).values() if _is_record(value) else ()


def _is_record(value: Any) -> bool:
    """Return whether a value is an object that only holds others: a dataclass or a SimpleNamespace."""
    if isinstance(value, nn.Module | type):
        return False
    return isinstance(value, SimpleNamespace) or (is_dataclass(value) and hasattr(value, "__dict__"))


def _contents(cell: CellType) -> Iterator[Any]:
    """Yield the value of a variable, if it has one yet."""
    try:
        yield cell.cell_contents
    except ValueError:
        return


@dataclass(frozen=True)
class _Translation:
    """Maps objects that the model's functions refer to, to their counterparts in the copy.

    Modules and functions of the model become those of the copy; containers of them, weak ones included, dataclasses,
    methods, partials and weak references are made anew.
    Anything else, such as an optimizer, a lock or a list of outputs, stays the same object.

    Args:
        model: Its id.
        memo: That of `copy.deepcopy`, with the functions.
    """

    model: int
    memo: dict[int, Any]
    same: dict[int, Any] = field(default_factory=dict)  # what stays as it is, and what is being looked at

    def of(self, value: Any, depth: int = 0) -> Any:
        if id(value) in self.memo:
            return self.memo[id(value)]
        if id(value) in self.same or depth > _DEEPEST:
            return value
        self.same[id(value)] = value
        new = self._made_anew(value, depth + 1)
        if new is not value:
            del self.same[id(value)]
            self.memo[id(value)] = new  # other functions may share it
        return new

    def _made_anew(self, value: Any, depth: int) -> Any:
        if isinstance(value, nn.Module):
            parts = {id(module) for module in value.modules()}
            made_of_the_model = self.model not in parts and any(part in self.memo for part in parts)
            return copy.deepcopy(value, self.memo) if made_of_the_model else value
        if type(value) not in (*_CONTAINERS, *_WEAK_CONTAINERS, MethodType, partial, ref) and not _is_record(value):
            return value
        old: list[Any] = [value.__self__, value.__func__] if isinstance(value, MethodType) else [*_parts(value)]
        new = [self.of(each, depth) for each in old]
        if all(first is second for first, second in zip(old, new, strict=True)):
            return value
        return _like(value, new)


def _like(value: Any, parts: list[Any]) -> Any:
    """Return a value of the same kind with other parts."""
    if isinstance(value, MethodType):
        return MethodType(parts[1], parts[0])
    if isinstance(value, partial):
        return partial(parts[0], *parts[1], **parts[2])
    if isinstance(value, ref):
        return ref(parts[0], value.__callback__)
    if isinstance(value, deque):
        return deque(parts, value.maxlen)
    if isinstance(value, (*_CONTAINERS, *_WEAK_CONTAINERS)):
        return type(value)(_items(value, parts))
    made = copy.copy(value)
    vars(made).update(zip(vars(value), parts, strict=True))
    return made


def _items(container: Any, parts: list[Any]) -> Iterable[Any]:
    """Return what a container with other parts is made of."""
    if isinstance(container, dict):
        return zip(container, parts, strict=True)
    if isinstance(container, WeakKeyDictionary | WeakValueDictionary):
        half = len(parts) // 2  # keys, and then values
        return zip(parts[:half], parts[half:], strict=True)
    return parts


def _with_empty_cells(function: FunctionType, cells: dict[int, CellType]) -> FunctionType:
    closure = tuple(cells.setdefault(id(cell), CellType()) for cell in function.__closure__ or ())
    new = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
    for name in ("__qualname__", "__doc__", "__module__", "__annotations__", "__type_params__"):
        if hasattr(function, name):  # __type_params__ since Python 3.12
            setattr(new, name, getattr(function, name))
    return new


def _bind_copies(model: nn.Module, copies: Mapping[int, FunctionType]) -> None:
    """Make methods among the attributes use the copied functions: deepcopy keeps the function of a method."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, MethodType) and (function := copies.get(id(value.__func__))):
                vars(module)[name] = MethodType(function, value.__self__)
