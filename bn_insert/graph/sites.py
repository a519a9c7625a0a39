"""The conv and dense layers of a model, and the sites where a BatchNorm can be inserted.

Output layers are found here by tracing. `surgery/replace_output.py`, which replaces one for other classes, finds it by
running the network on an example, or else takes the last dense layer or, without any, the last conv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, cast, get_args

import msgspec
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import GraphError, as_passed
from ..support.arguments import as_tuple, check_flags
from ..support.schema import Count, Extent
from ..support.text import listed
from .copies import unwrapped
from .inputs import MAKING_BATCHES
from .layers import Kind, layer_kind
from .operator_rules import MOVING_AXES, Role, argument, has_role, is_layer, operation
from .trace import Trace

Placement = Literal["before_activation", "after_activation"]

_NAMES_SHOWN = 20
_MOVES = {*MOVING_AXES, "t", "numpy_T"}


@dataclass(frozen=True)
class Site:
    """A place where a BatchNorm can be inserted.

    Attributes:
        name: Qualified name of the conv or dense layer.
        kind: "conv" or "dense".
        anchor: Qualified name of the module that the BatchNorm follows: the layer itself, or its activation.
        channels: Number of channels that the BatchNorm has.
        dims: 1, 2 or 3, for BatchNorm1d, BatchNorm2d or BatchNorm3d.
        calls: How many times one forward pass calls the anchor; 0 if that depends on the values of its input.
        in_sequence: Whether an nn.Sequential runs the anchor as its child, so that the BatchNorm can be its next child.
    """

    name: str
    kind: Kind
    anchor: str
    channels: Extent
    dims: Annotated[int, msgspec.Meta(ge=1, le=3)]
    calls: Count
    in_sequence: bool


@dataclass(frozen=True)
class Layer:
    """A conv or dense layer of a model, with its site or the reason why it has none.

    Attributes:
        name: Qualified name.
        kind: "conv" or "dense".
        type_name: Name of the module's class.
        shape: Shape of the output for a few images of the example, batch axis included; empty if the layer is never
            called.
        parameters: Number of parameters.
        site: Where the layer's BatchNorm is inserted, or None.
        reason: Why there is no site; empty if there is one.
    """

    name: str
    kind: Kind
    type_name: str
    shape: tuple[int, ...]
    parameters: int
    site: Site | None
    reason: str = ""


def find_sites(
    model: nn.Module,
    example: Any,
    *,
    layers: Kind | Iterable[Kind] = ("conv", "dense"),
    include_output: bool = False,
    skip: Iterable[str] = (),
    placement: Placement = "before_activation",
) -> list[Site]:
    """Return the sites for a BatchNorm, in the order in which a forward pass completes their layers.

    Args:
        model: The model; it is not changed.
        example: One batch, as for `insert_batchnorm`; only its shape matters.
        layers: "conv", "dense" or both.
        include_output: Include the output layer (no activation between it and the model's output).
        skip: Glob patterns of qualified names of layers to leave out.
        placement: "before_activation" (directly after the layer) or "after_activation" (after its activation).

    Raises:
        GraphError: The model cannot be traced, or a `skip` pattern matches no layer.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        >>> [site.name for site in find_sites(model, torch.zeros(1, 3, 8, 8))]
        ['0']
    """
    found = survey(model, example, layers=layers, include_output=include_output, skip=skip, placement=placement)
    return [layer.site for layer in found if layer.site is not None]


def survey(
    model: nn.Module,
    example: Any,
    *,
    layers: Kind | Iterable[Kind] = ("conv", "dense"),
    include_output: bool = False,
    skip: Iterable[str] = (),
    placement: Placement = "before_activation",
) -> list[Layer]:
    """Return every conv and dense layer with its site, or with the reason why it has none.

    Layers are in the order in which a forward pass completes them; those never called come last.

    Args:
        model: The model; it is not changed.
        example: One batch, as for `insert_batchnorm`; only its shape matters.
        layers: As for `find_sites`.
        include_output: As for `find_sites`.
        skip: As for `find_sites`.
        placement: As for `find_sites`.

    Raises:
        GraphError: The model cannot be traced, or a `skip` pattern matches no layer.
    """
    options = SiteOptions.checked(layers, include_output, skip, placement)
    return layers_in(Trace.of(model, example), options)


def reasons_without_sites(layers: Iterable[Layer], trace: Trace) -> str:
    """Return why a model has no site: each layer with its reason, and operations outside torch.nn layers."""
    by_reason: dict[str, list[str]] = {}
    for layer in layers:
        by_reason.setdefault(layer.reason.partition(":")[0], []).append(layer.name or "the model")
    found = [f"{listed(names, _NAMES_SHOWN)} ({reason})" for reason, names in by_reason.items()]
    if others := _operations_outside_layers(trace):
        described = [_described(name, trace) for name in others if name in trace.modules]
        place = f" in {listed(described, _NAMES_SHOWN)}" if described else ""
        found.append(f"conv or dense operations{place} that are not modules of torch.nn")
    return "; ".join(found) or "there is no conv or dense layer"


def layers_of_other_classes(trace: Trace, options: SiteOptions) -> str:
    """Return the layers that would get a BatchNorm if they were modules of torch.nn, in words; empty without any.

    These are modules in TorchScript, or of a class of the user's own, that run a conv or dense operation with a weight
    of their own, or with a parameter of another module. A module with a constant kernel, such as a blur, does not
    count.
    """
    weights = {name for name, each in trace.model.named_parameters(remove_duplicate=False) if each.ndim > 1}
    roles = [role for role, kind in ((Role.CONV, "conv"), (Role.DENSE, "dense")) if kind in options.kinds]
    others = []
    for name, nodes in _operations_outside_layers(trace).items():
        module = trace.modules.get(name)
        is_scripted = isinstance(module, torch.jit.ScriptModule)
        if module is None or (type(module).__module__.startswith("torch.") and not is_scripted):
            continue
        operations = [node for node in nodes if has_role(node, *roles)]
        trained = {trace.parameters.get(argument(node, "weight")) for node in operations} & weights
        if (
            operations
            and (trained or any(weight.ndim > 1 for _, weight in module.named_parameters(recurse=False)))
            and not any(map(trace.normalization_downstream, nodes))
            and (options.include_output or not any(map(trace.reaches_output, nodes)))
            and not any(fnmatchcase(name, pattern) for pattern in options.skip)
        ):
            others.append(_described(name, trace))
    return listed(others, _NAMES_SHOWN) if others else ""


def _operations_outside_layers(trace: Trace) -> dict[str, list[fx.Node]]:
    """Return the conv and dense operations that are not in such a layer of torch.nn, by the name of their module."""
    known = {node for _, node in trace.layer_nodes()}
    found: dict[str, list[fx.Node]] = {}
    for node in trace.nodes:
        if is_layer(node) and node not in known:
            found.setdefault(_owner(node, trace), []).append(node)
    return found


def _owner(node: fx.Node, trace: Trace) -> str:
    """Return the name of the module that an operation runs in; in TorchScript, of the module that has its weight."""
    by_weight = trace.aliases.get(trace.parameters.get(argument(node, "weight"), "").rpartition(".")[0], "")
    return by_weight if isinstance(trace.modules[by_weight], torch.jit.ScriptModule) else trace.owner(node)


def _described(name: str, trace: Trace) -> str:
    module = trace.modules[name]
    kind = (
        f"TorchScript {module.original_name}" if isinstance(module, torch.jit.ScriptModule) else type(module).__name__
    )
    return f"{name or 'the model'} ({kind})"


@dataclass(frozen=True)
class SiteOptions:
    """Which layers get a site and where it is: the arguments of `find_sites`, checked."""

    kinds: tuple[str, ...]
    include_output: bool
    skip: tuple[str, ...]
    placement: str

    @classmethod
    def checked(cls, layers: Iterable[str], include_output: bool, skip: Iterable[str], placement: str) -> SiteOptions:
        """Return the options; raise GraphError for an invalid kind of layer, pattern or placement."""
        check_flags(GraphError, include_output=include_output)
        kinds, patterns = as_tuple(layers), as_tuple(skip)
        if not kinds or not all(kind in get_args(Kind) for kind in kinds):
            raise GraphError(f"layers must be one or both of {', '.join(get_args(Kind))}, not {kinds!r}")
        if others := [pattern for pattern in patterns if not isinstance(pattern, str)]:
            raise GraphError(
                f"{as_passed('skip')} has the pattern {others[0]!r:.40}; pass names of layers or glob patterns, such "
                "as 'features.*', or an empty list to skip none"
            )
        if placement not in get_args(Placement):
            raise GraphError(f"placement must be one of {', '.join(get_args(Placement))}, not {placement!r}")
        return cls(kinds, include_output, patterns, placement)


def checked_sites(model: nn.Module, sites: Iterable[Site]) -> tuple[Site, ...]:
    """Return sites as a tuple; raise GraphError if they are not sites of the model."""
    if isinstance(sites, Site):
        raise GraphError(f"sites is one Site, of the layer {sites.name}; pass a list of sites")
    sites = as_tuple(sites)
    if others := [site for site in sites if not isinstance(site, Site)]:
        raise GraphError(f"sites has {others[0]!r:.60}; pass the sites that find_sites(model, batch) returns")
    model = unwrapped(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for site in sites:
        if site.anchor not in modules or site.name not in modules or layer_kind(modules[site.name]) != site.kind:
            raise GraphError(
                f"{type(model).__name__} has no {site.kind} layer {site.name}, for which there is a site; pass the "
                "sites that find_sites returns for this model"
            )
    return sites


def layers_in(trace: Trace, options: SiteOptions) -> list[Layer]:
    """Return what `survey` returns, for a model that is already traced."""
    found = [_layer(trace, name, module, options) for name, module in trace.layers_in_order()]
    names = [*(layer.name for layer in found), *_operations_outside_layers(trace)]
    for pattern in options.skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise GraphError(
                f"the skip pattern {pattern!r} matches no conv or dense layer; the layers are: "
                f"{', '.join(layer.name for layer in found)}"
            )
    return found


def _layer(trace: Trace, name: str, module: nn.Module, options: SiteOptions) -> Layer:
    kind = layer_kind(module)
    if kind is None:
        raise TypeError(f"{name} is neither a conv nor a dense layer")
    calls = trace.calls_of(name)
    shape = tuple(calls[-1].meta["val"].shape) if calls else ()
    without_batch = isinstance(module, _ConvNd) and len(shape) == len(module.kernel_size) + 1
    if without_batch and name not in trace.vectorized:
        raise GraphError(
            f"the layer {name} received one image without a batch axis; a batch has the shape N x C x H x W; "
            f"{MAKING_BATCHES}"
        )
    parameters = sum(parameter.numel() for parameter in module.parameters())
    anchor, reason = _anchor(trace, name, kind, calls, options)
    site = None
    if anchor is not None:
        dims = 1 if kind == "dense" else len(shape) - 2
        in_sequence = trace.runs_in_sequence(anchor)
        site = Site(name, kind, anchor, shape[1], dims, 0 if trace.obstacle else len(calls), in_sequence)
    return Layer(name, kind, type(module).__name__, shape, parameters, site, reason)


def _anchor(trace: Trace, name: str, kind: Kind, calls: list[fx.Node], options: SiteOptions) -> tuple[str | None, str]:
    """Return the module that the layer's BatchNorm follows, or None and the reason why there is none."""
    reason = _reason_against(trace, name, kind, calls, options)
    if reason or options.placement == "before_activation" or any(map(trace.reaches_output, calls)):
        return (None, reason) if reason else (name, "")  # an output layer has no activation to follow
    activations = {trace.activation_module(call) for call in calls}
    anchor = activations.pop() if len(activations) == 1 else None
    if anchor is None:
        return None, "not directly followed by an activation module"
    if len(trace.nodes_in(anchor)) != len(calls):
        return None, f"the activation {anchor} is shared with other layers"
    return anchor, ""


def _reason_against(  # noqa: PLR0911 - one return for each reason is easiest to read
    trace: Trace, name: str, kind: Kind, calls: list[fx.Node], options: SiteOptions
) -> str:
    if name in trace.vectorized:
        return "called in torch.vmap, where the values of a batch cannot be measured"
    if not calls:
        return _why_not_in_graph(trace, name)
    if norm := next(filter(None, map(trace.normalization_downstream, calls)), None):
        return f"already followed by a normalization: {norm}"
    if kind not in options.kinds:
        return f"{kind} layers are not selected"
    if any(fnmatchcase(name, pattern) for pattern in options.skip):
        return "skipped by pattern"
    if not options.include_output and any(map(trace.reaches_output, calls)):
        return "output layer"
    if not options.include_output and any(map(trace.leaves_recording, calls)):
        return "possibly an output layer: its consumers could not be traced"
    if all(map(trace.is_gate, calls)):
        return "part of a gate: its output multiplies other activations, as in squeeze-and-excite blocks"
    outputs = [call.meta["val"] for call in calls]
    if any(output.is_complex() for output in outputs):
        return "complex output, which BatchNorm does not support"
    shapes = (tuple(output.shape) for output in outputs)
    wrong = next((shape for shape in shapes if len(shape) < 2 or (kind == "dense" and len(shape) != 2)), None)
    if wrong is not None:
        described = " x ".join(map(str, ("batch", *wrong[1:]))) if len(wrong) > 1 else str(wrong)
        return f"the output, {described}, is not batch x channels: BatchNorm1d would normalize the wrong axis"
    if any(_rearranges(trace, name, call) for call in calls):
        return "its class changes the shape, or the order of the axes, of what its operation returns"
    return ""


def _rearranges(trace: Trace, name: str, call: fx.Node) -> bool:
    """Return whether a layer of a class of its own returns other channels than its operation, or on another axis."""
    shape = call.meta["val"].shape
    axes = {call: 1}  # of the channels in what the layer computes from them
    for node in trace.nodes:
        value, sources = node.meta.get("val"), [each for each in node.all_input_nodes if each in axes]
        if node is call or not sources or name not in trace.module_names(node) or not isinstance(value, Tensor):
            continue
        axes[node] = _moved(node, axes[sources[0]], value.ndim)
        returned = node in trace.outputs or any(name not in trace.module_names(user) for user in node.users)
        if returned and (axes[node], value.ndim, value.shape[1:2]) != (1, len(shape), shape[1:2]):
            return True
    return False


def _moved(node: fx.Node, axis: int, ndim: int) -> int:
    """Return the axis on which an operation puts what was on an axis of its input."""
    if operation(node) not in _MOVES:
        return axis
    numbered = torch.empty(*range(1, ndim + 1), device="meta")  # each axis is told by its extent
    moved = cast(Callable[..., Tensor], node.target)(numbered, *node.args[1:], **node.kwargs)
    return list(moved.shape).index(axis + 1)


def _why_not_in_graph(trace: Trace, name: str) -> str:
    if name in trace.called:
        return "called, but without a conv or dense operation in the trace"
    if trace.reads_weights_of(name):
        ways = "by layer.forward(x), a function such as F.conv2d, or a __call__ of its own"
        return f"the weight is used, but not by a module call: {ways}"
    return "never called for the first batch" if trace.obstacle else "never called in a forward pass"
