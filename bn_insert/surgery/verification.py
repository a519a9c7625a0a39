"""Whether a changed model still runs, and computes the same, on the first images.

The command `insert` also compares the outputs on more images, with a tolerance: `compare/outputs.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..graph.copies import unchanged_attributes, unwrapped, working_copy
from ..graph.inputs import Inputs
from ..graph.outputs import tensors_of
from ..statistics.passes import preserved_random_state
from ..support.processes import on_every_rank
from ..support.text import first_line, listed

_CHECKED_ROWS = 2  # two images are enough to see that a network runs and computes the same
# Relative; on a CPU nothing differs, and on a GPU about 1e-6 in float32. In 16 bits each BatchNorm may round to another
# number there, and the differences of many layers add up.
_LARGEST_DIFFERENCE = 1e-3
_ROUNDINGS = 16
# Fraction of the values of an output that rounding may turn into others: classes, or infinities.
_FEW = 0.01
_NAMES_SHOWN = 5


class Fault(NamedTuple):
    """What is wrong with a changed model.

    Attributes:
        text: The predicate of a sentence about the model.
        runs: Whether its forward runs at all.
    """

    text: str
    runs: bool


def fault_of(
    model: nn.Module, result: nn.Module, batch: Inputs | None, norms: Mapping[str, nn.Module] | None = None
) -> Fault | None:
    """Return what is wrong with a changed model on the first images of any rank; None if its outputs are the same.

    Args:
        model: The model before the change.
        result: The model after it.
        batch: The first batch of this rank, if it has one.
        norms: The inserted modules of the result, by the names of their anchors in the model: each has to be called
            whenever its anchor is.
    """
    faults = on_every_rank(lambda: None if batch is None else fault_here(model, result, batch, norms))
    return next(filter(None, faults), None)


def can_run(model: nn.Module, batch: Inputs) -> bool:
    """Return whether a model runs on the first images of a batch."""
    with preserved_random_state(), torch.no_grad(), unchanged_attributes(unwrapped(model)), suppress(Exception):
        batch.rows(0, _CHECKED_ROWS).run(working_copy(model))
        return True
    return False


def error_on_one_image(model: nn.Module, result: nn.Module, batch: Inputs | None) -> str:
    """Return what a changed model raises on one image of any rank, if the model runs on it; empty if nothing.

    BatchNorm needs the batch axis, which squeeze() in a forward removes where there is a single image.

    Args:
        model: The model before the change.
        result: The model after it.
        batch: The first batch of this rank, if it has one.
    """
    errors = on_every_rank(lambda: "" if batch is None else _error_on(batch.rows(0, 1), model, result))
    return next(filter(None, errors), "")


def _error_on(image: Inputs, model: nn.Module, result: nn.Module) -> str:
    with preserved_random_state(), torch.no_grad(), unchanged_attributes(unwrapped(model)):
        try:
            image.run(working_copy(result))
        except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
            with suppress(Exception):
                image.run(working_copy(model))
                return first_line(error)
    return ""


def fault_here(
    model: nn.Module,
    result: nn.Module,
    batch: Inputs,
    norms: Mapping[str, nn.Module] | None = None,
    *,
    largest: float | None = None,
) -> Fault | None:
    """Return what `fault_of` returns, for the first images of a batch, on this rank only.

    Args:
        model: As for `fault_of`.
        result: As for `fault_of`.
        batch: As for `fault_of`.
        norms: As for `fault_of`.
        largest: Largest tolerated output difference, relative to the largest output; by default what
            rounding in the dtype of the parameters and outputs explains.
    """
    names = {id(module): name for name, module in result.named_modules()}
    norm_of = {anchor: names[id(norm)] for anchor, norm in (norms or {}).items()}
    for part in (batch.rows(0, _CHECKED_ROWS), batch):
        with preserved_random_state(), torch.no_grad(), unchanged_attributes(unwrapped(model)):
            seed = torch.initial_seed()
            try:
                torch.manual_seed(seed)
                expected, called = _run_counting(part, working_copy(model), norm_of)
            except Exception:  # noqa: BLE001 - it may take only whole batches; calibration has run on this one
                continue
            try:
                torch.manual_seed(seed)
                actual, norms_called = _run_counting(part, working_copy(result), norm_of.values())
            except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
                return Fault(f"cannot run: {first_line(error)}", runs=False)
        rounding = _rounding(model, expected)
        tolerance = max(largest or _LARGEST_DIFFERENCE, _ROUNDINGS * rounding)
        if not _same_outputs(expected, actual, tolerance) and _repeats(model, part, expected, rounding):
            return Fault("returns different outputs than without", runs=True)
        # Calls of a class with its own `__call__` are not seen.
        skipped = [norm for anchor, norm in norm_of.items() if 0 < called[anchor] != norms_called[norm]]
        if skipped:
            return Fault(f"does not call {listed(skipped, _NAMES_SHOWN)} whenever it calls the layer", runs=True)
        if any(tensor.is_floating_point() for tensor in tensors_of(expected)):
            break
        # For two images, the classes may be the same by chance.
    return None


def _run_counting(inputs: Inputs, network: nn.Module, names: Iterable[str]) -> tuple[Any, Counter[str]]:
    """Return the outputs of a network, and how often it called each of the named modules."""
    called: Counter[str] = Counter()
    for name in names:
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: called.update([name]))
    return inputs.run(network), called


def _repeats(model: nn.Module, inputs: Inputs, outputs: Any, rounding: float) -> bool:
    """Return whether a model computes the same again, as it does not with noise that PyTorch's seed does not set."""
    with preserved_random_state(), torch.no_grad(), unchanged_attributes(unwrapped(model)):
        torch.manual_seed(torch.initial_seed())
        again = inputs.run(working_copy(model))
    return _same_outputs(outputs, again, rounding)


def _rounding(model: nn.Module, outputs: Any) -> float:
    """Return the relative distance of neighboring numbers in the coarsest dtype of the parameters and outputs."""
    tensors = [*model.parameters(), *tensors_of(outputs)]
    return max((torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.is_floating_point()), default=0.0)


def _same_outputs(expected: Any, actual: Any, largest: float) -> bool:
    """Return whether outputs are the same, up to a difference relative to the largest value of each tensor."""
    pairs = tensors_of(expected), tensors_of(actual)
    return len(pairs[0]) == len(pairs[1]) and all(
        first.shape == second.shape and (not first.numel() or _agree(first, second, largest))
        for first, second in zip(*pairs, strict=True)
    )


def _agree(expected: Tensor, actual: Tensor, largest: float) -> bool:
    first, second = (tensor.detach().cpu() for tensor in (expected, actual))  # other devices lack float64
    if first.layout is not torch.strided:
        first, second = first.to_dense(), second.to_dense()
    few = max(largest, _FEW)
    same = (first == second) | ((first != first) & (second != second))  # noqa: PLR0124 - NaN equals NaN here
    if not (first.is_floating_point() or first.is_complex()):  # classes, masks, pixels
        return float((~same).double().mean()) <= few
    finite = first.isfinite() & second.isfinite()  # a forward may fill in -inf
    if float((~same & ~finite).double().mean()) > few:
        return False
    wide = torch.complex128 if first.is_complex() else torch.float64
    first, second = (torch.where(finite, tensor, 0).to(wide) for tensor in (first, second))
    return bool((second - first).abs().max() <= largest * first.abs().max())
