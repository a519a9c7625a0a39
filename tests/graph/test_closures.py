"""Copies of networks whose attributes are functions that refer to their modules."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary, ref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bn_insert import find_sites, fold, forward_inputs, insert_batchnorm, inserted_batchnorms
from bn_insert.graph.copies import deep_copy, shared_copy
from support.networks import images, randomised


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.held: Any = None
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))))


@dataclass(frozen=True)
class Step:
    layer: nn.Module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.output = Block(), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.block(x))  # type: ignore[no-any-return]


def wrapped(block: Block) -> None:
    """A decorator around the forward of one module, as libraries put around it."""
    old = block.forward

    @functools.wraps(old)
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return old(*args, **kwargs)

    block.forward = forward  # type: ignore[method-assign]


def closing_over_itself(block: Block) -> None:
    block.forward = lambda x: F.relu(block.second(F.relu(block.first(x))))  # type: ignore[method-assign]


def as_a_default(block: Block) -> None:
    def forward(x: Tensor, first: nn.Module = block.first, *, second: nn.Module = block.second) -> Tensor:
        return F.relu(second(F.relu(first(x))))

    block.forward = forward  # type: ignore[method-assign, assignment]


def of_a_list(block: Block) -> None:
    layers = [block.first, nn.ReLU(), block.second, nn.ReLU()]
    block.forward = lambda x: functools.reduce(lambda value, layer: layer(value), layers, x)  # type: ignore[method-assign]


def bound(block: Block) -> None:
    layers = [block.first, block.second]

    def forward(self: Block, x: Tensor) -> Tensor:
        assert [self.first, self.second] == layers
        return F.relu(layers[1](F.relu(layers[0](x))))

    block.forward = MethodType(forward, block)  # type: ignore[method-assign]


def through_partial(block: Block) -> None:
    block.forward = functools.partial(
        lambda layers, x: layers[1](layers[0](x).relu()).relu(), [block.first, block.second]
    )  # type: ignore[method-assign]


def of_objects(block: Block) -> None:
    first, others = SimpleNamespace(layer=block.first), deque([Step(block.second)], maxlen=1)
    block.forward = lambda x: others[0].layer(first.layer(x).relu()).relu()  # type: ignore[method-assign]


def of_weak_references(block: Block) -> None:
    itself, layers = ref(block), [ref(block.first), ref(block.second)]

    def forward(x: Tensor) -> Tensor:
        assert itself().second is layers[1]()  # type: ignore[union-attr]
        return layers[1]()(layers[0]()(x).relu()).relu()  # type: ignore[misc, no-any-return]

    block.forward = forward  # type: ignore[method-assign, assignment]


def recursive(block: Block) -> None:
    layers = [block.first, block.second]

    def apply(x: Tensor, number: int = 0) -> Tensor:
        return apply(F.relu(layers[number](x)), number + 1) if number < 2 else x

    block.forward = apply  # type: ignore[method-assign]


FORWARDS = (
    wrapped,
    closing_over_itself,
    as_a_default,
    of_a_list,
    bound,
    through_partial,
    of_objects,
    of_weak_references,
    recursive,
)


def changed(change: Callable[[Block], None]) -> Net:
    model = randomised(Net())
    change(model.block)
    return model


@pytest.mark.parametrize("change", FORWARDS)
@pytest.mark.parametrize("copied", [deep_copy, shared_copy])
def test_a_forward_that_refers_to_its_modules_runs_those_of_the_copy(
    change: Callable[[Block], None], copied: Callable[[nn.Module], nn.Module]
) -> None:
    model, x = changed(change), images(2, 9)
    result: Any = copied(model)
    assert torch.equal(result(x), model(x))
    for parameter in result.parameters():
        parameter.grad = None
    result(x).sum().backward()
    assert all(parameter.grad is not None for parameter in result.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(copied(result)(x), model(x))


@pytest.mark.parametrize("change", FORWARDS)
def test_their_layers_get_a_batchnorm_that_can_be_trained_and_folded(change: Callable[[Block], None]) -> None:
    model, x = changed(change), images(6, 9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = insert_batchnorm(model, [x])
    assert inserted_batchnorms(result) == ["block.first.1", "block.second.1"]
    with torch.no_grad():
        assert torch.equal(result(x), model(x))
    result.train()(x).sum().backward()
    for name in inserted_batchnorms(result):
        norm = result.get_submodule(name)
        assert int(norm.num_batches_tracked) == 1
        nn.init.uniform_(norm.weight, 0.5, 2)
    folded = fold(result.eval(), x)
    assert len(folded.folded) == 2
    with torch.no_grad():
        torch.testing.assert_close(folded.model(x), result(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def hooks(model: Net) -> Iterator[tuple[str, Callable[..., None]]]:
    """What hooks of networks for features store, and where."""
    yield "a dict", lambda *args: model.block.seen.__setitem__("out", args[-1])
    yield "an attribute", lambda *args: setattr(model.block, "held", args[-1])
    yield "a nested list", lambda *args: model.block.seen.setdefault("nest", {}).setdefault("deep", []).append(args[-1])


@pytest.mark.parametrize("number", range(3), ids=["dict", "attribute", "nested list"])
def test_what_hooks_of_a_copy_store_is_in_the_copy(number: int) -> None:
    model, x = randomised(Net()), images(4, 9)
    model.block.first.register_forward_hook([hook for _, hook in hooks(model)][number])
    find_sites(model, x)
    result = insert_batchnorm(model, [x])
    assert (model.block.seen, model.block.held) == ({}, None)
    result(x)
    assert (model.block.seen, model.block.held) == ({}, None)
    assert result.block.seen or result.block.held is not None


def test_functions_that_refer_to_no_module_are_shared_and_a_shared_variable_stays_shared() -> None:
    model = randomised(Net())
    calls: list[int] = []
    model.block.held = lambda: calls.append(1)
    last: Any = None

    def remember(*args: Any) -> None:
        nonlocal last
        last = (model.block, args[-1])

    model.block.register_forward_hook(remember)
    model.block.seen["read"] = lambda: (model, last)
    result = deep_copy(model)
    assert result.block.held is model.block.held
    x = images(2, 9)
    result(x)
    module, (block, output) = result.block.seen["read"]()
    assert module is result and block is result.block
    assert torch.equal(output, result.block(x))
    assert last is None


def test_objects_that_a_function_refers_to_beside_modules_stay_the_same(tmp_path: Path) -> None:
    model, lock = randomised(Net()), threading.Lock()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        state = {"model": model, "lock": lock, "file": file, "optimizer": optimizer, "many": [0.0] * 5000}
        model.block.held = lambda: state
        model.block.register_forward_hook(lambda *_: state.__setitem__("calls", state.get("calls", 0) + 1))
        result = deep_copy(model)
        copied = result.block.held()
    assert copied["model"] is result
    for name in ("lock", "file", "optimizer", "many"):
        assert copied[name] is state[name]
    result(images(2, 9))
    assert copied["calls"] == 1 and "calls" not in state


@pytest.mark.parametrize(
    ("hold", "modules"),
    [
        (WeakSet, list),
        (lambda layers: WeakKeyDictionary(dict.fromkeys(layers)), list),
        (lambda layers: WeakValueDictionary(enumerate(layers)), lambda held: list(held.values())),
    ],
)
def test_weak_containers_of_a_copy_hold_its_own_modules(
    hold: Callable[[list[nn.Module]], Any], modules: Callable[[Any], list[nn.Module]]
) -> None:
    model = Block()
    model.held = hold([model.first, model.second])
    copied = deep_copy(model)
    assert {*modules(copied.held)} == {copied.first, copied.second}
    assert {*modules(model.held)} == {model.first, model.second}


class Child(nn.Module):
    """Calls a layer of its parent, which it only has a weak reference to."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent, self.outside = ref(parent), ref(nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.parent().second(x).relu()  # type: ignore[no-any-return, union-attr]


class Parent(Block):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.first(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [deep_copy, shared_copy])
def test_a_weak_reference_of_a_child_refers_to_its_parent_in_the_copy(copied: Callable[[nn.Module], Any]) -> None:
    model = randomised(Parent())
    result = copied(model)
    assert result.child.parent() is result and model.child.parent() is model
    assert result.child.outside is model.child.outside
    result(images(2, 9)).sum().backward()
    assert result.second.weight.grad is not None and model.second.weight.grad is None


def test_a_layer_that_a_child_calls_by_a_weak_reference_gets_a_batchnorm() -> None:
    model, x = randomised(Parent()), images(6, 9)
    result = insert_batchnorm(model, [x])
    assert inserted_batchnorms(result) == ["first.1", "second.1"]
    with torch.no_grad():
        before = result(x)
        assert torch.equal(before, model(x))
        model.second.weight.zero_()
        assert torch.equal(before, result(x))


def test_a_copied_forward_keeps_its_annotations() -> None:
    model = randomised(Net())

    def forward(batch: dict[str, Tensor]) -> Tensor:
        return model.output(model.block(batch["image"]))  # type: ignore[no-any-return]

    model.forward = forward  # type: ignore[method-assign, assignment]
    assert forward_inputs(deep_copy(model)) == forward_inputs(model)
    assert forward_inputs(model).takes_dict
