"""The first batches of every rank, read before the work begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..errors import GraphError
from ..graph.copies import check_module
from ..graph.inputs import Inputs, reference_tensor
from ..graph.trace import MOST_TRACED, Trace
from ..statistics.passes import checked_batches, no_batches
from ..support.processes import Ranks, on_every_rank


@dataclass(frozen=True)
class _TensorSpec:
    """Shape and dtype of one input tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Peek:
    """What the first batches of every rank show.

    Attributes:
        example: An example input of a few zeros; a rank without batches gets the shapes from the others.
        first: The first batch of this rank; None without batches.
        batches: All batches of this rank.
        read: How many batches were read on all ranks together.
    """

    example: Inputs
    first: Inputs | None
    batches: Iterator[Any]
    read: int

    def trace_of(self, model: nn.Module) -> Trace:
        """Return the trace of a model for zeros or, if its forward depends on values, for the first batch of all ranks.

        Raises:
            GraphError: If it can be traced for neither.
        """
        try:
            trace = Trace.of(model, self.example)
        except GraphError:  # as when a forward takes lengths, or checks values
            pass
        else:
            if not trace.obstacle:
                return trace
        # Ranks have devices of their own.
        on_cpu = None if self.first is None else self.first.mapped(lambda tensor: tensor.cpu())
        batch = next(batch for batch in Ranks.current().gathered(on_cpu) if batch is not None)
        device = reference_tensor(model).device
        return Trace.of(model, batch.mapped(lambda tensor: tensor.to(device)), whole=True)


def peeked(model: nn.Module, batches: Iterable[Any], function: str, *, most: int = 1) -> Peek:
    """Read the first batches of every rank.

    Args:
        model: What the batches are for.
        batches: Those of this rank.
        function: Name of the function that every rank has called, for messages.
        most: How many batches to read.
    """
    check_module(model)
    Ranks.current().meet(function)
    iterator: Iterator[Any] = iter(())
    first: list[Any] = []
    inputs: list[Inputs] = []

    def read() -> tuple[Inputs | None, int]:
        nonlocal iterator
        iterator = iter(checked_batches(batches))
        first.extend(islice(iterator, most))
        if not first:
            return None, 0
        inputs.append(Inputs.of(first[0], 0, model))
        return inputs[0].mapped(lambda tensor: _TensorSpec(tuple(tensor.shape), tensor.dtype)), len(first)

    found = on_every_rank(read)
    specs = next((each for each, _ in found if each is not None), None)
    if specs is None:
        raise no_batches()
    device = reference_tensor(model).device
    zeros = tree_map_only(
        _TensorSpec,
        lambda spec: torch.zeros(min(spec.shape[0], MOST_TRACED), *spec.shape[1:], dtype=spec.dtype, device=device),
        (specs.args, dict(specs.kwargs)),
    )
    return Peek(Inputs(*zeros), inputs[0] if inputs else None, chain(first, iterator), sum(count for _, count in found))
