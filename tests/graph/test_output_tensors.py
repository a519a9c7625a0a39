"""Which tensors in what a forward returns are its outputs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bn_insert.graph.outputs import tensors_of


class Holder:
    def __init__(self, value: Any, following: Any = None) -> None:
        self.value, self.following = value, following


def test_tensors_beside_an_object_are_the_outputs_and_those_in_the_object_are_not() -> None:
    logits, time = torch.rand(4, 5), torch.rand(1)
    for outputs in ((Holder(time), logits), {"meta": [Holder(time)], "logits": logits}):
        (found,) = tensors_of(outputs)
        assert found is logits


def test_without_other_tensors_those_in_objects_are_the_outputs_with_the_outermost_first() -> None:
    logits, time = torch.rand(4, 5), torch.rand(1)
    assert [id(each) for each in tensors_of(Holder(Holder(time), [logits]))] == [id(logits), id(time)]


def test_objects_that_are_odd_are_no_error() -> None:
    @dataclass
    class Unset:
        logits: Tensor
        other: Any = field(init=False)

    class Raises(dict[str, Any]):
        def values(self) -> Any:
            raise RuntimeError("no values")

    logits = torch.rand(4, 5)
    chain = Holder(logits)
    for _ in range(3000):
        chain = Holder(logits, chain)
    endless: list[Any] = []
    endless.append(endless)
    for outputs in (Unset(logits), Holder(logits, Raises(a=1)), chain, Holder(logits, endless)):
        assert all(each is logits for each in tensors_of(outputs))
        assert tensors_of(outputs)
