"""Merge each BatchNorm into a conv or dense layer: the inverse of an insertion.

Which can be merged, and into which layers, is planned in `fold_plan.py`; weights are changed in `fold_weights.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CalibrationError, GraphError, as_passed
from ..graph.copies import AnyModule, check_values, deep_copy, tied_parameters, unwrapped
from ..graph.inputs import Inputs
from ..graph.layers import NormalizedLayer
from ..graph.trace import Trace
from ..support.arguments import as_tuple
from ..support.near_names import near_names
from ..support.text import listed, untied_layers
from .fold_plan import Fold, other_batchnorms, plan_folds, was_there_before
from .fold_weights import merge_into_inputs, merge_into_outputs
from .history import FoldedBatchNorms, History
from .splice import inserted_batchnorms, splice_out
from .verification import Fault, can_run, fault_here

_NAMES_SHOWN = 20
# Relative to the largest output; folding changed those of networks of 1 to 60 layers by up to 1.3% in bfloat16.
_UNEXPLAINED_BY_16_BITS = 0.1


@dataclass(frozen=True, eq=False)
class FoldResult(Generic[AnyModule]):
    """A model after folding.

    Attributes:
        model: A copy of the model without the folded BatchNorms.
        folded: Qualified names, in the given model, of the BatchNorms that were folded.
        left: Qualified names, in the given model, of the BatchNorms that were left in place.
        untied: Names of layers that share a parameter in the given model, and now have their own, because their
            BatchNorms differ. A class that shares the parameter cannot load the state dict; `load_checkpoint` can.
        others: What acts as a BatchNorm in the forward but is not a BatchNorm module of torch.nn, and therefore stays,
            in words; empty if there is nothing.
    """

    model: AnyModule = field(repr=False)
    folded: tuple[str, ...]
    left: tuple[str, ...]
    untied: tuple[str, ...] = ()
    others: str = ""


def fold_batchnorm(model: AnyModule, example: Any) -> AnyModule:
    """Return a copy of the model in which each BatchNorm is merged into the conv or dense layer that it belongs to.

    Eval outputs stay the same up to rounding (weights are computed in float64 and rounded once). Channels that the
    BatchNorm leaves exactly unchanged, as after `insert_batchnorm` on a CPU, keep their weights and bias bit for bit.
    The given model is not changed; the copy keeps dtype, device, memory format, requires_grad and training flags.

    A BatchNorm is merged into the layer upstream if it is the only reader of that layer's values. After an activation,
    it is merged into the next layer where that is exact: a dense layer, or a conv that does not pad with zeros.
    Pooling, dropout and flatten may be in between. A BatchNorm that changes nothing at all is simply removed. One that
    belongs to no layer (after the input, after an addition, or reading a value that other operations read too, as in
    pre-activation networks) stays unless it can be folded.

    In an nn.Sequential the BatchNorm is removed and the children are renumbered; where a forward calls it by name, or
    depends on the numbers, nn.Identity replaces it. `NormalizedLayer(layer, norm)`, made by `insert_batchnorm`, becomes
    the layer again; any other Sequential stays a Sequential. A layer without bias gets one only if some channel needs
    it.

    Args:
        model: The model, as for `insert_batchnorm`.
        example: One batch, as for `insert_batchnorm`. Only its shape matters to what is folded; both networks run on
            its first two images, and their outputs are compared, unless those of the model differ between two runs.

    Raises:
        GraphError: A BatchNorm that belongs to a layer cannot be folded exactly (the message names it and the
            obstacle), the model cannot be traced, or its forward depends on the folded BatchNorms in ways other than
            calling them.

    Source of the formula: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, section 3.2.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        >>> [type(module).__name__ for module in fold_batchnorm(model, torch.zeros(1, 3, 8, 8))]
        ['Conv2d', 'ReLU', 'Flatten', 'Linear']
    """
    result = fold(model, example)
    if result.others:
        what = "some BatchNorms were not folded" if result.folded else "nothing was folded"
        warnings.warn(
            f"{what}: these are not modules of torch.nn: {result.others}. Fold a network before exporting it, and use "
            "nn.BatchNorm2d with the same values instead of functions and other classes",
            stacklevel=2,
        )
    warn_of_left(sorted(set(result.left) & set(inserted_batchnorms(unwrapped(model)))), stacklevel=2)
    warn_of_untied(result.untied, stacklevel=2)
    return result.model


def warn_of_left(norms: Sequence[str], *, stacklevel: int) -> None:
    """Warn that inserted BatchNorms were not folded, which the original's class cannot load."""
    if norms:
        warnings.warn(
            f"inserted BatchNorms that fold into no layer were left in place: {listed(norms, _NAMES_SHOWN)}",
            stacklevel=stacklevel + 1,
        )


def warn_of_untied(layers: Sequence[str], *, stacklevel: int) -> None:
    """Warn that layers which shared a parameter in the original have one each, which its class cannot load."""
    if layers:
        text = untied_layers(layers, "load_checkpoint reads what save_checkpoint writes")
        warnings.warn(text, stacklevel=stacklevel + 1)


def fold(model: AnyModule, example: Any, *, names: Collection[str] | None = None) -> FoldResult[AnyModule]:
    """Return what `fold_batchnorm` returns, with the names of the BatchNorms that were folded and left in place.

    Args:
        model: As for `fold_batchnorm`.
        example: As for `fold_batchnorm`.
        names: Qualified names of the BatchNorms to fold, if not all of them, such as `inserted_batchnorms(model)`; the
            others are left in place.

    Raises:
        GraphError: As for `fold_batchnorm`, or a name is not that of a BatchNorm.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> fold(model, torch.zeros(1, 3, 8, 8)).folded
        ('1',)
    """
    model = unwrapped(model)
    check_values(model)
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    chosen = None if names is None else as_tuple(names)
    for name in chosen or ():
        if name not in norms:
            raise _no_batchnorm(model, name, norms)
    trace = _trace(model, example, required=bool(norms))
    plan = list(plan_folds(trace, chosen)) if trace else []
    folded = {each.norm for each in plan}
    result, untied = _verified(model, plan, example, chosen)
    return FoldResult(
        result,
        tuple(name for name in norms if name in folded),
        tuple(name for name in norms if name not in folded),
        untied,
        other_batchnorms(trace) if trace else "",
    )


def _trace(model: nn.Module, example: Any, *, required: bool) -> Trace | None:
    """Return the trace of a model; None if there is none with any values, and it is not required."""
    try:
        trace = Trace.of(model, example)
        if trace.obstacle:  # with other values, something else could read what a BatchNorm reads
            raise GraphError(trace.obstacle)
    except (GraphError, CalibrationError):
        if required:
            raise
        return None
    return trace


@torch.inference_mode(False)  # whatever the caller's mode: tensors made in inference mode can never be trained
def _verified(
    model: AnyModule, plan: Sequence[Fold], example: Any, names: Collection[str] | None
) -> tuple[AnyModule, tuple[str, ...]]:
    """Return what `_without_batchnorms` returns, after comparing its outputs with those of the model."""
    if not plan:
        return deep_copy(model), ()
    inputs = Inputs.of(example, 0, model)
    result, untied = _without_batchnorms(model, plan)
    fault = _fault_beyond_rounding(model, result, plan, inputs)
    # A forward may refer to children of a Sequential by number, as in `len(self.features)`: then they keep theirs.
    if fault and (kept := [_keeping_numbers(model, each) for each in plan]) != plan:
        plan = kept
        result, untied = _without_batchnorms(model, plan)
        fault = _fault_beyond_rounding(model, result, plan, inputs)
    if fault:
        what = "returns different outputs than with them" if fault.runs else fault.text
        advice = ""
        if names is None:
            apart = any(was_there_before(model, each.norm) for each in plan)
            inserted_only = as_passed("names", option="--inserted-only")
            option = inserted_only if apart else as_passed("names", option="in Python: fold(model, example, names=...)")
            advice = f", or leave in place the BatchNorms that it refers to ({option})"
        raise GraphError(
            f"{type(model).__name__} without the folded BatchNorms {what}. Its forward accesses BatchNorms or layers "
            f"other than by calling them (by index, attribute or list): change it to only call them{advice}"
        )
    return result, untied


def _keeping_numbers(model: nn.Module, each: Fold) -> Fold:
    """Return a fold that changes the place of no module that the model had before an insertion."""
    container = model.get_submodule(each.norm.rpartition(".")[0])
    return replace(each, in_sequence=each.in_sequence and isinstance(container, NormalizedLayer))


def _fault_beyond_rounding(model: nn.Module, result: nn.Module, plan: Sequence[Fold], inputs: Inputs) -> Fault | None:
    """Return what is wrong with a folded model on the first images, apart from rounding."""
    fault = fault_here(model, result, inputs)
    if fault is None or not fault.runs:
        return fault
    # In 16 bits, rounding the folded weights alone changes outputs of a deep network by half.
    try:
        exact = deep_copy(model).double()
        inputs_in_float64 = inputs.mapped(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    except (TypeError, RuntimeError):  # the device lacks float64
        exact = None
    if exact is None or not can_run(exact, inputs_in_float64):
        # The forward casts to another dtype or runs under autocast, perhaps in 16 bits.
        return fault_here(model, result, inputs, largest=_UNEXPLAINED_BY_16_BITS)
    return fault_here(exact, _without_batchnorms(exact, plan)[0], inputs_in_float64)


def _tied_where_equal(model: nn.Module, result: nn.Module) -> list[str]:
    """Let layers share a parameter, in place, as in a model before the folds, where its values are still equal.

    Returns:
        The names of the layers whose values are not.
    """
    found = set()
    for other, name in tied_parameters(model):
        layer, _, kind = name.rpartition(".")
        if torch.equal(result.get_parameter(name), result.get_parameter(other)):
            setattr(result.get_submodule(layer), kind, result.get_parameter(other))
        else:
            found |= {layer, other.rpartition(".")[0]}
    return sorted(found)


def _no_batchnorm(model: nn.Module, name: object, norms: Sequence[str]) -> GraphError:
    """Return the error for a name that no BatchNorm of the model has."""
    near = " or ".join(near_names(str(name), norms))
    advice = f"did you mean {near}?" if near else f"its BatchNorms are: {listed(norms, _NAMES_SHOWN) or 'none'}"
    return GraphError(f"names has {name!r:.60}, which is not a BatchNorm of {type(model).__name__}; {advice}")


def _without_batchnorms(model: AnyModule, plan: Sequence[Fold]) -> tuple[AnyModule, tuple[str, ...]]:
    """Return a copy of the model with every fold of the plan applied, and the layers that share no parameter now."""
    result = deep_copy(model)
    for each in plan:
        merges = [(name, merge_into_outputs) for name in each.upstream]
        merges += [(name, merge_into_inputs) for name in each.downstream]
        for name, merge in merges:
            layer = result.get_submodule(name)
            if not merge(layer, each.affine):
                raise GraphError(
                    f"BatchNorm {each.norm} cannot be folded: its scale is not finite, or takes weights out of "
                    f"the range of {cast(Tensor, layer.weight).dtype}; repair its statistics, or convert "
                    "the model to float32 first"
                )
    untied = tuple(_tied_where_equal(model, result))
    layers = [(name, result.get_submodule(name)) for each in plan for name in (*each.upstream, *each.downstream)]
    biases = {name for name, layer in layers if layer.bias is not None and model.get_submodule(name).bias is None}
    norms = {each.norm: each.in_sequence for each in plan}
    # Another class only if the model itself is a wrapper around one layer.
    result = cast(AnyModule, splice_out(result, norms))
    change = FoldedBatchNorms(norms, tuple(sorted(biases)), untied)
    History.of(model).with_change(change).keep_with(result)
    return result, untied
