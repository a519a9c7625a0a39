"""Whether a changed model still runs, and computes the same, on the first images.

The command `insert` also compares the outputs on more images, with a tolerance: `compare/outputs.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..graph.copies import unchanged_attributes, unwrapped, working_copy
from ..graph.inputs import Inputs
from ..statistics.passes import preserved_random_state
from ..support.processes import on_every_rank
from ..support.text import first_line

_CHECKED_ROWS = 2  # two images are enough to see that a network runs and computes the same
# Relative; on a CPU nothing differs, and on a GPU about 1e-6 in float32. In 16 bits each BatchNorm may round to another
# number there, and the differences of many layers add up.
_LARGEST_DIFFERENCE = 1e-3
_ROUNDINGS = 16


class Fault(NamedTuple):
    """What is wrong with a changed model.

    Attributes:
        text: The predicate of a sentence about the model.
        runs: Whether its forward runs at all.
    """

    text: str
    runs: bool


def fault_of(model: nn.Module, result: nn.Module, batch: Inputs | None, *, one_image: bool = False) -> Fault | None:
    """Return what is wrong with a changed model on the first images of any rank; None if its outputs are the same.

    Args:
        model: The model before the change.
        result: The model after it.
        batch: The first batch of this rank, if it has one.
        one_image: Whether to run one image alone, whose batch axis squeeze() in a forward removes, if the model runs on
            it; otherwise it is two images, or the whole batch where the model runs on no part of it.
    """

    def fault() -> Fault | None:
        if batch is None:
            return None
        return _fault_here(model, result, (batch.rows(0, 1),) if one_image else (batch.rows(0, _CHECKED_ROWS), batch))

    return next(filter(None, on_every_rank(fault)), None)


def _fault_here(model: nn.Module, result: nn.Module, parts: Iterable[Inputs]) -> Fault | None:
    for part in parts:
        with preserved_random_state(), torch.inference_mode(), unchanged_attributes(unwrapped(model)):
            seed = torch.initial_seed()
            try:
                torch.manual_seed(seed)
                expected = part.run(working_copy(model))
            except Exception:  # noqa: BLE001 - it may take whole batches alone; calibration has run on this one
                continue
            try:
                torch.manual_seed(seed)
                actual = part.run(working_copy(result))
            except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
                return Fault(f"cannot run: {first_line(error)}", runs=False)
        same = _same_outputs(expected, actual, max(_LARGEST_DIFFERENCE, _ROUNDINGS * _rounding(model, expected)))
        return None if same else Fault("returns other outputs than without", runs=True)
    return None


def _rounding(model: nn.Module, outputs: Any) -> float:
    """Return the relative distance of neighbouring numbers in the coarsest dtype of the parameters and outputs."""
    tensors = [*model.parameters(), *(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))]
    return max((torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.is_floating_point()), default=0.0)


def _same_outputs(expected: Any, actual: Any, largest: float) -> bool:
    pairs = [[leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)] for outputs in (expected, actual)]
    if len(pairs[0]) != len(pairs[1]):
        return False
    for first, second in zip(*pairs, strict=True):
        if first.shape != second.shape:
            return False
        if first.is_floating_point() and first.numel() and first.isfinite().all():
            scale = first.double().abs().max()
            if not (second.double() - first.double()).abs().max() <= largest * scale:
                return False
    return True
