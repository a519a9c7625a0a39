"""Merge each BatchNorm into the layer behind or in front of which it stands: the way back from an insertion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from ..errors import GraphError
from ..graph.copies import AnyModule, deep_copy, unwrapped
from ..graph.layers import layer_kind
from ..graph.trace import Trace, argument, is_activation, operation, writes_in_place
from .history import Architecture, Folding
from .splice import splice_out
from .weight_algebra import Affine, batchnorm_affine, fold_inputs, fold_outputs

_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_COPIES = {"detach", "alias", "contiguous", "clone"}
_RESHAPES = {"flatten", "view", "reshape"}
_MAXIMA = {"max_pool1d", "max_pool2d", "max_pool3d"}
_AVERAGES = {"avg_pool1d", "avg_pool2d", "avg_pool3d"}
_ADAPTIVE_AVERAGES = {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}
_ALIASES = _DROPOUTS | _COPIES | _RESHAPES
_PASSED = _ALIASES | _MAXIMA | _AVERAGES | _ADAPTIVE_AVERAGES | {"pad"}


def fold_batchnorm(model: AnyModule, example: Any) -> AnyModule:
    """Return a copy of the model in which each BatchNorm is merged into the conv or dense layer that it belongs to.

    Eval outputs stay the same but for rounding (weights are computed in float64 and rounded once). Channels that the
    BatchNorm leaves exactly alone, as after `insert_batchnorm` on a CPU, keep their weights and bias bit for bit.
    The given model is never changed; dtype, device, memory format, requires_grad and training flags are kept.

    model: as for `insert_batchnorm`. example: one batch, as there; only its shape matters. A model without BatchNorm is
    copied without a look.

    A BatchNorm goes into the layer in front of it when it alone takes that layer's values; behind an activation, into
    the next layer where that is exact: a dense layer, or a conv that does not pad with zeros. Pooling, dropout and
    flatten may stand between. One that changes nothing at all just goes. One that belongs to no layer (behind the
    input, an addition, or a value that others read too, as in pre-activation networks) stays unless it can be folded.
    In an nn.Sequential it is removed and the children are renumbered; where a forward calls it by name, nn.Identity
    takes its place. `nn.Sequential(layer, norm)` made by `insert_batchnorm` becomes the layer again; any other
    Sequential stays a Sequential. A layer without bias gets one only if some channel needs it.

    Raises GraphError, naming the BatchNorm and what stands in the way, when one that belongs to a layer cannot be
    folded exactly, and when the model cannot be seen. Source of the formula: Jacob et al., "Quantization and Training
    of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018, section 3.2.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    >>> [type(module).__name__ for module in fold_batchnorm(model, torch.zeros(1, 3, 8, 8))]
    ['Conv2d', 'ReLU', 'Flatten', 'Linear']
    """
    model = unwrapped(model)
    result = deep_copy(model)
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return result
    trace = Trace.of(model, example)
    plan = list(_plan(trace))
    for fold in plan:
        for name in fold.behind:
            _merge(result.get_submodule(name), fold, fold_outputs)
        for name in fold.ahead:
            _merge(result.get_submodule(name), fold, fold_inputs)
    layers = [(name, result.get_submodule(name)) for fold in plan for name in (*fold.behind, *fold.ahead)]
    biases = {name for name, layer in layers if layer.bias is not None and model.get_submodule(name).bias is None}
    norms = {fold.norm: trace.runs_in_sequence(fold.norm) for fold in plan}
    # Another class only if the model itself is a wrapper around one layer.
    result = cast(AnyModule, splice_out(result, norms))
    if norms:
        Architecture.of(model).changed(Folding(norms, tuple(sorted(biases)))).keep_with(result)
    return result


@dataclass(frozen=True)
class _Fold:
    """A BatchNorm, and the layers whose outputs (behind which it stands) or inputs (ahead of it) take it up."""

    norm: str
    affine: Affine
    behind: tuple[str, ...] = ()
    ahead: tuple[str, ...] = ()


def _merge(layer: nn.Module, fold: _Fold, folded: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
    """Give the layer new parameters (not new values: other layers may hold the old ones too)."""
    weight, bias = cast(nn.Parameter, layer.weight), cast(nn.Parameter | None, layer.bias)
    new_weight, new_bias = folded(
        weight.detach(),
        None if bias is None else bias.detach(),
        fold.affine,
        transposed=isinstance(layer, _ConvTransposeNd),
        groups=getattr(layer, "groups", 1),
    )
    if not _finite(new_weight, new_bias) and _finite(weight, bias):
        raise GraphError(
            f"BatchNorm {fold.norm} cannot be folded: its scale takes weights out of the range of {weight.dtype}, or "
            "is not finite itself; mend its statistics, or convert the model to float32 first"
        )
    layer.weight = nn.Parameter(new_weight, weight.requires_grad)
    if new_bias is not None:
        layer.bias = nn.Parameter(new_bias, (weight if bias is None else bias).requires_grad)


def _finite(*tensors: Tensor | None) -> bool:
    bounds = [torch.stack(tensor.aminmax()) for tensor in tensors if tensor is not None]  # NaN is passed on
    return all(bool(bound.isfinite().all()) for bound in bounds)


class _NotExactError(Exception):
    """Says what stands in the way of a fold."""


def _plan(trace: Trace) -> Iterator[_Fold]:
    layers = {node: name for name, node in trace.layer_nodes()}
    calls: dict[str, list[fx.Node]] = {}
    for node in trace.nodes:
        name = trace.owner(node)
        if operation(node) == "batch_norm" and isinstance(trace.modules.get(name), _BatchNorm):
            calls.setdefault(name, []).append(node)
    for name, nodes in calls.items():
        try:
            yield _fold(trace, layers, name, nodes)
        except _NotExactError as obstacle:
            if layer := next(filter(None, (_layer_in_front(node, layers) for node in nodes)), None):
                raise GraphError(f"BatchNorm {name} behind {layer} cannot be folded exactly: {obstacle}") from None


def _fold(trace: Trace, layers: Mapping[fx.Node, str], name: str, calls: Sequence[fx.Node]) -> _Fold:
    norm = cast(_BatchNorm, trace.modules[name])
    if norm.running_mean is None or norm.running_var is None or any(argument(call, "training") for call in calls):
        raise _NotExactError(
            "it has no running statistics and normalizes each batch by its own; make it with track_running_stats=True "
            "and re-estimate them"
        )
    if more := [operation(node) for node in trace.nodes if name in trace.module_names(node) and node not in calls]:
        raise _NotExactError(f"{type(norm).__name__} does more than normalize ({', '.join(more)})")
    affine = batchnorm_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, float(norm.eps))
    if affine.is_identity:
        _check_not_overwritten(trace, calls)
        return _Fold(name, affine)
    try:
        return _Fold(name, affine, behind=_layers_behind(trace, layers, calls, affine))
    except _NotExactError as backward:
        try:
            _check_not_overwritten(trace, calls)
            return _Fold(name, affine, ahead=_layers_ahead(trace, layers, calls, affine))
        except _NotExactError as forward:
            raise _NotExactError(
                f"not into a layer in front of it ({backward}), and not into the next ones ({forward}). Leave the "
                "model unfolded, or insert BatchNorm with placement='before_activation'"
            ) from None


def _layers_behind(
    trace: Trace, layers: Mapping[fx.Node, str], calls: Sequence[fx.Node], affine: Affine
) -> tuple[str, ...]:
    """Return the layers in front of these BatchNorm calls, if their values go nowhere else."""
    found = []
    for call in calls:
        node = call
        while node is call or node not in layers:
            source = _source(node)
            if source is None or not (node is call or _commutes(node, affine)):
                raise _NotExactError(f"{_described(trace, node)} stands between")
            if source.op != "call_function":
                raise _NotExactError("it takes the model's input")
            if len(source.users) != 1:
                raise _NotExactError(f"the values of {_described(trace, source)} are also used elsewhere")
            node = source
        outputs = node.meta["val"].shape
        if len(outputs) != _weight_axes(node) or outputs[1] != len(affine.scale):
            raise _NotExactError(f"{_described(trace, node)} has its channels on another axis")
        found.append(node)
    return _checked(trace, layers, found)


def _layers_ahead(
    trace: Trace, layers: Mapping[fx.Node, str], calls: Sequence[fx.Node], affine: Affine
) -> tuple[str, ...]:
    """Return the layers that take these BatchNorm calls' values, if they take nothing else and nothing else does."""
    found = []
    queue = list(calls)
    while queue:
        node = queue.pop()
        for user in node.users:
            if user.op == "output":
                raise _NotExactError("its values reach the model's output")
            if _source(user) is not node:
                raise _NotExactError(f"{_described(trace, user)} stands behind it")
            if user in layers:
                _check_input(trace, user, affine)
                found.append(user)
            elif _commutes(user, affine):
                queue.append(user)
            else:
                raise _NotExactError(f"{_described(trace, user)} stands behind it")
    return _checked(trace, layers, found)


def _checked(trace: Trace, layers: Mapping[fx.Node, str], found: Sequence[fx.Node]) -> tuple[str, ...]:
    """Return the names of the layers that these calls are of, if they are all their calls and the weights are free."""
    names = tuple(dict.fromkeys(layers[node] for node in found))
    for name in names:
        nodes = trace.calls_of(name)
        if not set(nodes) <= set(found):
            raise _NotExactError(f"{_described(trace, nodes[0])} is also called elsewhere")
        weight = cast(fx.Node, argument(nodes[0], "weight"))
        computed = [each for each in ("weight", "bias") if each not in trace.modules[name]._parameters]
        if weight.op != "placeholder" or computed:
            raise _NotExactError(
                f"the {(computed or ['weight'])[0]} of {_described(trace, nodes[0])} is computed (weight_norm, a "
                "parametrization): make it a plain parameter first"
            )
        if not all(user in layers for user in weight.users):
            raise _NotExactError(f"the weight of {_described(trace, nodes[0])} is also used elsewhere")
    return names


def _check_not_overwritten(trace: Trace, calls: Sequence[fx.Node]) -> None:
    """Check that without the BatchNorm no in-place operation behind it would overwrite a value that others read."""
    for call in calls:
        node, shared = call, False
        while node.op == "call_function" and (node is call or operation(node) in _ALIASES) and not shared:
            node = _source(node) or node
            shared = node.op != "call_function" or len(node.users) > 1
        behind = trace.reached(call, lambda node: operation(node) in _ALIASES)
        if shared and (overwriting := [node for node in behind if writes_in_place(node)]):
            raise _NotExactError(
                f"{_described(trace, overwriting[0])} works in place on values that are also used elsewhere"
            )


def _check_input(trace: Trace, layer: fx.Node, affine: Affine) -> None:
    """Check that a layer reads these channels, and that a shift of its input shifts all of its output alike."""
    inputs = argument(layer, "input").meta["val"].shape
    described = _described(trace, layer)
    if len(inputs) != _weight_axes(layer) or inputs[1] % len(affine.scale):
        raise _NotExactError(f"{described} has its channels on another axis")
    if affine.shifts and operation(layer) != "linear":
        if isinstance(trace.modules[trace.owner(layer)], _ConvTransposeNd):
            raise _NotExactError(f"{described} is transposed: its borders would get less of the shift")
        padding = argument(layer, "padding")
        if padding == "same":
            padding = [size - 1 for size in argument(layer, "weight").meta["val"].shape[2:]]
        if padding != "valid" and any(padding):
            raise _NotExactError(f"{described} pads with zeros, which the BatchNorm would have shifted")


def _weight_axes(layer: fx.Node) -> int:
    return argument(layer, "weight").meta["val"].ndim


def _commutes(node: fx.Node, affine: Affine) -> bool:
    """Say whether it is the same to do this operation before or after an affine map of each channel."""
    name, source = operation(node), _source(node)
    if name not in _PASSED or source is None:
        return False
    if name in _DROPOUTS:
        return not argument(node, "train")
    before, after = source.meta["val"].shape, node.meta["val"].shape
    if name in _RESHAPES:
        return after == before or (len(after) == 2 and after == (before[0], prod(before[1:])))
    return name in _COPIES or (
        _is_spatial(node, before)
        and (not affine.shifts or not _brings_zeros(node))
        and (name not in _MAXIMA or affine.keeps_order)
    )


def _is_spatial(node: fx.Node, before: Sequence[int]) -> bool:
    """Say whether a pad or pool leaves the first two axes alone (pooling takes a missing axis for no batch axis)."""
    name = operation(node)
    if name == "pad":
        return len(argument(node, "pad")) <= 2 * (len(before) - 2) and not argument(node, "value")
    return len(before) == 2 + int(name[-2])


def _brings_zeros(node: fx.Node) -> bool:
    """Say whether an operation puts zeros of its own, or another divisor, into the means or borders."""
    name = operation(node)
    if name == "pad":
        return argument(node, "mode") == "constant"
    if name not in _AVERAGES:
        return False
    padded = any(argument(node, "padding")) and argument(node, "count_include_pad")
    return padded or (name != "avg_pool1d" and argument(node, "divisor_override") is not None)


def _layer_in_front(node: fx.Node, layers: Mapping[fx.Node, str]) -> str | None:
    """Return the layer that alone leads to this node, through activations, pooling and the like, and to no other."""
    source = _source(node)
    while source and len(source.users) == 1 and source not in layers:
        source = _source(source) if is_activation(source) or operation(source) in _PASSED else None
    return layers.get(source) if source and len(source.users) == 1 else None


def _source(node: fx.Node) -> fx.Node | None:
    """Return the node whose values an operation works on."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def _described(trace: Trace, node: fx.Node) -> str:
    """Return "conv features.3", or "relu features.1" and the like."""
    name = trace.owner(node)
    module = trace.modules.get(name)
    kind = layer_kind(module) if module and operation(node).startswith(("conv", "linear")) else None
    return f"{kind or operation(node)} {name}".rstrip()
