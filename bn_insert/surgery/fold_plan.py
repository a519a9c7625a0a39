"""Which BatchNorms of a model can be folded exactly, and the layers that each of them is merged into."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import GraphError, as_passed
from ..graph.layers import layer_kind
from ..graph.operator_rules import (
    Role,
    argument,
    fits_positions,
    flattens_channels,
    has_role,
    is_activation,
    is_layer,
    keeps_channels,
    layer_parameters,
    operation,
    operator_of,
    writes_in_place,
)
from ..graph.trace import Trace
from ..support.text import listed
from .fold_weights import Affine, batchnorm_affine
from .splice import inserted_batchnorms

# Operations that pass values on, and may return the very tensor that they take.
_ALIASES = (Role.DROPOUT, Role.COPY, Role.RESHAPE)
# Operations that may be between a BatchNorm and the layer that it is folded into.
_PASSED = (*_ALIASES, Role.POOLING, Role.PADDING)
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Fold:
    """One BatchNorm, and the layers whose weights it is merged into.

    With no layer upstream and none downstream the BatchNorm changes nothing, and is only removed.

    Attributes:
        norm: Qualified name of the BatchNorm.
        affine: Its map of each channel in eval mode.
        in_sequence: Whether an nn.Sequential runs it as its child.
        upstream: Names of the layers whose outputs it reads, to be merged into them.
        downstream: Names of the layers that read its output, to be merged into them.
    """

    norm: str
    affine: Affine
    in_sequence: bool
    upstream: tuple[str, ...] = ()
    downstream: tuple[str, ...] = ()


class _NotExactError(Exception):
    """An obstacle to a fold, as part of a message."""


def plan_folds(trace: Trace, names: Collection[str] | None = None) -> Iterator[Fold]:
    """Yield a fold for every BatchNorm of a traced model except those that belong to no layer.

    Args:
        trace: Of the model.
        names: Qualified names of the BatchNorms to fold; None is all of them.

    Raises:
        GraphError: A BatchNorm that belongs to a layer cannot be folded exactly.
    """
    layers = {node: name for name, node in trace.layer_nodes()}
    calls: dict[str, list[fx.Node]] = {}
    for node in trace.nodes:
        name = trace.owner(node)
        wanted = names is None or name in names
        if wanted and operation(node) == "batch_norm" and isinstance(trace.modules.get(name), _BatchNorm):
            calls.setdefault(name, []).append(node)
    for name, nodes in calls.items():
        try:
            yield _fold(trace, layers, name, nodes)
        except _NotExactError as obstacle:
            if layer := next(filter(None, (_owning_layer(node, layers) for node in nodes)), None):
                raise GraphError(
                    f"BatchNorm {name} after layer {layer} cannot be folded exactly: {obstacle}"
                    f"{_way_around(trace.model, name, names)}"
                ) from None


def _way_around(model: nn.Module, name: str, names: Collection[str] | None) -> str:
    """Return how to fold without a BatchNorm that the network had before, or "" if that would not help."""
    if names is not None or not was_there_before(model, name):
        return ""
    only = as_passed("names=inserted_batchnorms(model)", option="--inserted-only")
    return f". Or fold only the BatchNorms that bn-insert inserted ({only}): {name} is not one of them, and stays"


def was_there_before(model: nn.Module, name: str) -> bool:
    """Return whether bn-insert inserted other BatchNorms into a network, and not this one."""
    inserted = inserted_batchnorms(model)
    return bool(inserted) and name not in inserted


def other_batchnorms(trace: Trace) -> str:
    """Return what works as a BatchNorm in a forward but is not a BatchNorm module of torch.nn; "" without any."""
    found: dict[str, str] = {}
    for node in trace.nodes:
        name = trace.owner(node)
        module = trace.modules.get(name)
        if isinstance(module, _NormBase):
            continue
        place = f"{name or 'the model'} ({type(module).__name__})" if module else name
        if has_role(node, Role.NORMALIZATION) and "batch_norm" in operation(node):
            found[name] = f"{operation(node)} in {place}"
        elif module and {"running_mean", "running_var"} <= dict(module.named_buffers(recurse=False)).keys():
            found.setdefault(name, place)  # frozen, or of another package
    return listed(list(found.values()), _NAMES_SHOWN) if found else ""


def _fold(trace: Trace, layers: Mapping[fx.Node, str], name: str, calls: Sequence[fx.Node]) -> Fold:
    norm = cast(_BatchNorm, trace.modules[name])
    if norm.running_mean is None or norm.running_var is None or any(argument(call, "training") for call in calls):
        raise _NotExactError(
            "it has no running statistics and normalizes each batch by that batch's own; create it with "
            "track_running_stats=True and re-estimate them"
        )
    if more := [operation(node) for node in trace.nodes if name in trace.module_names(node) and node not in calls]:
        raise _NotExactError(f"{type(norm).__name__} does more than normalize ({', '.join(more)})")
    affine = batchnorm_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, float(norm.eps))
    in_sequence = trace.runs_in_sequence(name)
    if affine.is_identity:
        _check_not_overwritten(trace, calls)
        return Fold(name, affine, in_sequence)
    try:
        return Fold(name, affine, in_sequence, upstream=_layers_upstream(trace, layers, calls, affine))
    except _NotExactError as upstream:
        try:
            _check_not_overwritten(trace, calls)
            return Fold(name, affine, in_sequence, downstream=_layers_downstream(trace, layers, calls, affine))
        except _NotExactError as downstream:
            reasons = f"neither into the layer upstream ({upstream}) nor into the layers downstream ({downstream})"
            sources = [source for call in calls if (source := _source(call)) not in layers]
            if any(not _is_in_layer(trace, source, layers) for source in sources) and not was_there_before(
                trace.model, name
            ):
                placement = as_passed("placement", "before_activation", "--placement before-activation")
                reasons += f"; insert BatchNorm with {placement}"
            raise _NotExactError(reasons) from None


def _is_in_layer(trace: Trace, node: fx.Node | None, layers: Mapping[fx.Node, str]) -> bool:
    """Return whether an operation runs in a layer, as in a hook on it."""
    return node is not None and not set(layers.values()).isdisjoint(trace.module_names(node))


def _layers_upstream(
    trace: Trace, layers: Mapping[fx.Node, str], calls: Sequence[fx.Node], affine: Affine
) -> tuple[str, ...]:
    """Return the layers that these BatchNorm calls read, if nothing else reads their values."""
    found = []
    for call in calls:
        node = call
        while node is call or node not in layers:
            source = _source(node)
            if source is None or not (node is call or _commutes(node, affine)):
                raise _NotExactError(f"{_described(trace, node)} is in between")
            if source.op != "call_function":
                raise _NotExactError("it reads the model's input")
            if len(source.users) != 1:
                raise _NotExactError(f"the values of {_described(trace, source)} are also used elsewhere")
            node = source
        outputs = node.meta["val"].shape
        if len(outputs) != _weight_axes(node) or outputs[1] != len(affine.scale):
            raise _NotExactError(f"{_described(trace, node)} has its channels on another axis")
        found.append(node)
    return _checked(trace, layers, found)


def _layers_downstream(
    trace: Trace, layers: Mapping[fx.Node, str], calls: Sequence[fx.Node], affine: Affine
) -> tuple[str, ...]:
    """Return the layers that read these BatchNorm calls, if they read nothing else and nothing else reads the calls."""
    found = []
    queue = list(calls)
    while queue:
        node = queue.pop()
        for user in node.users:
            if user.op == "output":
                raise _NotExactError("its values reach the model's output")
            if _source(user) is not node:
                raise _NotExactError(f"{_described(trace, user)} is in between")
            if user in layers:
                _check_input(trace, user, affine)
                found.append(user)
            elif _commutes(user, affine):
                queue.append(user)
            else:
                raise _NotExactError(f"{_described(trace, user)} is in between")
    return _checked(trace, layers, found)


def _checked(trace: Trace, layers: Mapping[fx.Node, str], found: Sequence[fx.Node]) -> tuple[str, ...]:
    """Return the names of the called layers, if these are all their calls and nothing else uses their parameters."""
    names = tuple(dict.fromkeys(layers[node] for node in found))
    for name in names:
        nodes = trace.calls_of(name)
        if not set(nodes) <= set(found):
            raise _NotExactError(f"{_described(trace, nodes[0])} is also called elsewhere")
        module, tensors = trace.modules[name], dict(layer_parameters(nodes[0]))
        for kind in ("weight", "bias"):
            tensor = tensors.get(kind)
            if kind not in module._parameters or (tensor and tensor.op != "placeholder"):
                way = _way_to_parameter(module, kind)
                raise _NotExactError(f"the {kind} of {_described(trace, nodes[0])} is {way}")
        for kind, tensor in tensors.items():
            # Other layers that share it keep it: the fold gives the layer one of its own.
            if not all(user in layers and argument(user, kind) is tensor for user in tensor.users):
                raise _NotExactError(f"the {kind} of {_described(trace, nodes[0])} is also used elsewhere")
    return names


def _way_to_parameter(layer: nn.Module, name: str) -> str:
    """Return what the weight or bias of a layer is instead of a parameter, and how to make it one."""
    if is_parametrized(layer, name):
        steps = cast(ParametrizationList, cast(nn.ModuleDict, layer.parametrizations)[name])
        kinds = ", ".join(type(step).__name__.lstrip("_") for step in steps)
        remove = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
        return f"computed by the parametrization {kinds}; remove it first, with {remove}"
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm) and hook.name == name:
            kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            return f"computed by {kind}; remove it first, with torch.nn.utils.remove_{kind}(layer)"
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return f"computed by pruning; remove that first, with torch.nn.utils.prune.remove(layer, {name!r})"
    if name in layer._buffers:
        return "a buffer; make it an nn.Parameter first"
    return f"computed by {type(layer).__name__}; replace it with a plain layer with the computed {name} first"


def _check_not_overwritten(trace: Trace, calls: Sequence[fx.Node]) -> None:
    """Check that without the BatchNorm no in-place operation downstream would overwrite a value that others read."""
    for call in calls:
        node, shared = call, False
        while node.op == "call_function" and (node is call or has_role(node, *_ALIASES)) and not shared:
            node = _source(node) or node
            shared = node.op != "call_function" or len(node.users) > 1
        downstream = trace.downstream(call, lambda node: has_role(node, *_ALIASES))
        if shared and (overwriting := [node for node in downstream if writes_in_place(node)]):
            raise _NotExactError(
                f"{_described(trace, overwriting[0])} works in place on values that are also used elsewhere"
            )


def _check_input(trace: Trace, layer: fx.Node, affine: Affine) -> None:
    """Check that a layer reads these channels, and that a shift of its input shifts every output value alike."""
    inputs = argument(layer, "input").meta["val"].shape
    described = _described(trace, layer)
    if len(inputs) != _weight_axes(layer) or inputs[1] % len(affine.scale):
        raise _NotExactError(f"{described} has its channels on another axis")
    if affine.shifts and has_role(layer, Role.CONV):
        if isinstance(trace.modules[trace.owner(layer)], _ConvTransposeNd):
            raise _NotExactError(f"{described} is transposed, and its borders would get less of the shift")
        padding = argument(layer, "padding")
        if padding == "same":
            padding = [size - 1 for size in argument(layer, "weight").meta["val"].shape[2:]]
        if padding != "valid" and any(padding):
            raise _NotExactError(f"{described} pads with zeros, which the BatchNorm would have shifted")


def _weight_axes(layer: fx.Node) -> int:
    return argument(layer, "weight").meta["val"].ndim


def _commutes(node: fx.Node, affine: Affine) -> bool:
    """Return whether this operation and an affine map of each channel can be swapped."""
    operator, source = operator_of(node), _source(node)
    if operator is None or source is None or not operator.scale(node):
        return False
    if (affine.shifts and not operator.shift(node)) or (operator.needs_order and not affine.keeps_order):
        return False
    before, after = _shape_of(source), _shape_of(node)
    if operator.role is Role.RESHAPE:
        return keeps_channels(before, after) or flattens_channels(before, after)
    return operator.elementwise or fits_positions(node, before)


def _owning_layer(node: fx.Node, layers: Mapping[fx.Node, str]) -> str | None:
    """Return the layer that only this node depends on, through activations, pooling and the like."""
    source = _source(node)
    while source and len(source.users) == 1 and source not in layers:
        source = _source(source) if is_activation(source) or has_role(source, *_PASSED) else None
    return layers.get(source) if source and len(source.users) == 1 else None


def _source(node: fx.Node) -> fx.Node | None:
    """Return the node whose values an operation works on."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def _shape_of(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _described(trace: Trace, node: fx.Node) -> str:
    """Return "conv features.3", "relu features.1" and the like."""
    name = trace.owner(node)
    module = trace.modules.get(name)
    kind = layer_kind(module) if module and is_layer(node) else None
    return f"{kind or operation(node)} {name}".rstrip()
