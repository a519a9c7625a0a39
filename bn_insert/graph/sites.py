"""Which layers a model has, and where a BatchNorm goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import GraphError
from .layers import Kind, layer_kind
from .trace import Trace

Placement = Literal["before_activation", "after_activation"]


@dataclass(frozen=True)
class Site:
    """One place where a BatchNorm goes.

    name: qualified name of the conv or dense layer. anchor: qualified name of the module behind which the BatchNorm
    goes (the layer itself, or its activation). channels: of the BatchNorm. dims: 1, 2 or 3, as in BatchNorm1d, 2d, 3d.
    calls: how often one forward pass calls the anchor. in_sequence: the anchor is run by an nn.Sequential around it, so
    that the BatchNorm can stand behind it as a sibling.
    """

    name: str
    kind: Kind
    anchor: str
    channels: int
    dims: int
    calls: int
    in_sequence: bool


@dataclass(frozen=True)
class Layer:
    """One conv or dense layer of a model, and whether a BatchNorm goes behind it.

    shape: of its output for the example, batch included; empty when the layer is never called. parameters: their
    number. site: where its BatchNorm goes, or None and then `reason` says why.
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
    """Return the places where a BatchNorm goes, in the order in which a forward pass completes them.

    example: one batch; only its shape matters.  It and the other arguments are as for `insert_batchnorm`.
    Raises GraphError when the model cannot be seen, or a `skip` pattern fits no layer.

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

    Layers come in the order in which a forward pass completes them, those never called last. Arguments as `find_sites`.
    """
    return layers_in(
        Trace.of(model, example), layers=layers, include_output=include_output, skip=skip, placement=placement
    )


def layers_in(
    trace: Trace,
    *,
    layers: Kind | Iterable[Kind] = ("conv", "dense"),
    include_output: bool = False,
    skip: Iterable[str] = (),
    placement: Placement = "before_activation",
) -> list[Layer]:
    """Return what `survey` returns, from a trace."""
    wishes = _Wishes.checked(layers, include_output, skip, placement)
    found = [_describe(trace, name, module, wishes) for name, module in trace.layers_in_order()]
    for pattern in wishes.skip:
        if not any(fnmatchcase(layer.name, pattern) for layer in found):
            raise GraphError(
                f"the skip pattern {pattern!r} fits no conv or dense layer; the layers are: "
                f"{', '.join(layer.name for layer in found)}"
            )
    return found


@dataclass(frozen=True)
class _Wishes:
    """What the caller of `survey` asked for."""

    kinds: tuple[str, ...]
    include_output: bool
    skip: tuple[str, ...]
    placement: str

    @classmethod
    def checked(cls, layers: Iterable[str], include_output: bool, skip: Iterable[str], placement: str) -> _Wishes:
        kinds, patterns = _as_tuple(layers), _as_tuple(skip)
        if not kinds or not set(kinds) <= set(get_args(Kind)):
            raise GraphError(f"layers takes one or both of {', '.join(get_args(Kind))}, not {kinds!r}")
        if placement not in get_args(Placement):
            raise GraphError(f"placement is one of {', '.join(get_args(Placement))}, not {placement!r}")
        return cls(kinds, include_output, patterns, placement)


def _as_tuple(values: Iterable[str]) -> tuple[str, ...]:
    return (values,) if isinstance(values, str) else tuple(values)


def _describe(trace: Trace, name: str, module: nn.Module, wishes: _Wishes) -> Layer:
    kind = layer_kind(module)
    if kind is None:
        raise TypeError(f"{name} is neither conv nor dense")
    calls = trace.calls_of(name)
    shape = tuple(calls[-1].meta["val"].shape) if calls else ()
    if isinstance(module, _ConvNd) and len(shape) == len(module.kernel_size) + 1:
        raise GraphError(
            f"the layer {name} was given one image without a batch axis: a batch has the shape N x C x H x W, and "
            "batches are an iterable of them, such as [images]"
        )
    parameters = sum(parameter.numel() for parameter in module.parameters())
    anchor, reason = _anchor(trace, name, kind, calls, wishes)
    site = None
    if anchor is not None:
        dims = 1 if kind == "dense" else len(shape) - 2
        site = Site(name, kind, anchor, shape[1], dims, len(calls), trace.runs_in_sequence(anchor))
    return Layer(name, kind, type(module).__name__, shape, parameters, site, reason)


def _anchor(trace: Trace, name: str, kind: Kind, calls: list[fx.Node], wishes: _Wishes) -> tuple[str | None, str]:
    """Return the module behind which the layer's BatchNorm goes, or None and the reason why there is none."""
    reason = _reason_against(trace, name, kind, calls, wishes)
    if reason or wishes.placement == "before_activation" or any(map(trace.reaches_output, calls)):
        return (None, reason) if reason else (name, "")  # an output layer has no activation to stand behind
    activations = {trace.activation_module(call) for call in calls}
    anchor = activations.pop() if len(activations) == 1 else None
    if anchor is None:
        return None, "no activation module of its own behind it"
    if len(trace.nodes_in(anchor)) != len(calls):
        return None, f"its activation {anchor} is shared with other layers"
    return anchor, ""


def _reason_against(  # noqa: PLR0911 - one return a reason reads best
    trace: Trace, name: str, kind: Kind, calls: list[fx.Node], wishes: _Wishes
) -> str:
    if not calls:
        return "never called in a forward pass"
    if norm := next(filter(None, map(trace.normalization_behind, calls)), None):
        return f"followed by a normalization already: {norm}"
    if kind not in wishes.kinds:
        return f"{kind} layers are not asked for"
    if any(fnmatchcase(name, pattern) for pattern in wishes.skip):
        return "skipped by pattern"
    if not wishes.include_output and any(map(trace.reaches_output, calls)):
        return "output layer"
    shape = tuple(calls[-1].meta["val"].shape)
    if len(shape) < 2 or (kind == "dense" and len(shape) != 2):
        return f"its output {shape} is not batch x channels: BatchNorm1d would take the wrong axis"
    return ""
