"""The history of a network: the function that built it, and the changes that bn-insert made to its modules since.

A state dict does not store the architecture. The history is kept with the network, as an attribute of its root, and
saved in its checkpoint. On load the changes are replayed on a freshly built network, which then takes the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeGuard, cast, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..batchnorm.identity import BATCHNORMS
from ..errors import CheckpointError
from ..graph.copies import unwrapped
from ..graph.layers import Kind, layer_kind, outputs_of
from ..graph.sites import Site
from ..support.text import counted
from .inserted import marked, marked_modules
from .splice import splice_after, splice_out, splice_over

FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
"""Pattern of a name such as "package.module:function"."""

_ATTRIBUTE = "_bn_insert_history"
_MAX_CHANGES = 1000  # each one walks the whole network, and a hostile file could list millions
_MAX_EXTENT = 2**31
_MOST_CHILDREN = 512  # of a VGG's features: VGG19 with BatchNorm after every conv has 53
WIDEST_HEAD = 1 << 16
"""Maximum number of hidden channels of a new head."""


@dataclass(frozen=True)
class InsertedBatchNorms:
    """BatchNorm layers were inserted at these sites."""

    sites: tuple[Site, ...]

    @property
    def description(self) -> str:
        """What was done, in a few words."""
        return f"{counted(len(self.sites), 'BatchNorm layer')} inserted"

    def replay(self, network: nn.Module) -> nn.Module:
        """Make the change in place and return the network; new tensors are on the meta device."""
        norms: dict[Site, nn.Module] = {}
        for site in self.sites:
            layer = _submodule(network, site.name)
            _submodule(network, site.anchor)
            weight = next(layer.parameters(), None)
            if weight is None or layer_kind(layer) is None:
                raise CheckpointError(f"{site.name} is a {type(layer).__name__}, not a conv or dense layer")
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            norms[site] = marked(BATCHNORMS[site.dims](site.channels, device="meta", dtype=dtype))
        return splice_after(network, norms)

    def outline(self, network: nn.Module) -> None:
        """Make the change, in place, to a network whose layers are placeholders."""
        splice_after(network, {site: marked(nn.Identity()) for site in self.sites})

    def to_document(self) -> dict[str, Any]:
        """Return the change as JSON-ready data."""
        return {"insert": [asdict(site) for site in self.sites]}


@dataclass(frozen=True)
class FoldedBatchNorms:
    """BatchNorm layers were folded into the layers before them, and layers without a bias got one.

    Attributes:
        norms: For each removed BatchNorm, by qualified name, whether it was a child of an nn.Sequential.
        biases: Names of the layers that got a bias.
    """

    norms: Mapping[str, bool]
    biases: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """What was done, in a few words."""
        return f"{counted(len(self.norms), 'BatchNorm layer')} folded"

    def replay(self, network: nn.Module) -> nn.Module:
        """Make the change in place and return the network."""
        for name in self.biases:
            layer = _submodule(network, name)
            if layer_kind(layer) is None:
                raise CheckpointError(f"{name} is a {type(layer).__name__}, not a conv or dense layer")
            weight = next(layer.parameters())
            channels = outputs_of(cast(nn.Linear, layer))
            layer.bias = nn.Parameter(torch.zeros(channels, dtype=weight.dtype, device=weight.device))
        for name in self.norms:
            if not isinstance(norm := _submodule(network, name), _BatchNorm):
                raise CheckpointError(f"{name} is a {type(norm).__name__}, not a BatchNorm")
        return splice_out(network, self.norms)

    def outline(self, network: nn.Module) -> None:
        """Make the change, in place, to a network whose layers are placeholders."""
        splice_out(network, self.norms)

    def to_document(self) -> dict[str, Any]:
        """Return the change as JSON-ready data."""
        return {"fold": dict(self.norms), "new_biases": list(self.biases)}


@dataclass(frozen=True)
class ReplacedOutput:
    """The output layer was replaced by a new one.

    Attributes:
        layer: Qualified name of the output layer.
        classes: Number of outputs of the new layer.
    """

    layer: str
    classes: int

    @property
    def description(self) -> str:
        """What was done, in a few words."""
        return f"output layer {self.layer} replaced, {self.classes} classes"

    def replay(self, network: nn.Module) -> nn.Module:
        """Make the change in place and return the network; new tensors are on the meta device."""
        old = _submodule(network, self.layer)
        if not isinstance(old, nn.Linear | nn.Conv2d) or not self.layer:
            raise CheckpointError(f"{self.layer} is a {type(old).__name__}, not a dense layer or a Conv2d")
        parent, _, child = self.layer.rpartition(".")
        setattr(network.get_submodule(parent), child, new_output(old, self.classes, device="meta"))
        return network

    def outline(self, network: nn.Module) -> None:
        """Make the change, in place, to a network whose layers are placeholders: nothing moves."""

    def to_document(self) -> dict[str, Any]:
        """Return the change as JSON-ready data."""
        return {"new_output": self.layer, "classes": self.classes}


@dataclass(frozen=True)
class ReplacedHead:
    """The dense layers of the head were replaced by new ones with a BatchNorm between them.

    Attributes:
        first: Qualified name of the first module that was replaced.
        last: Qualified name of the last one, the output layer; in the same nn.Sequential as the first.
        width: Number of hidden channels of the new head.
        classes: Number of its outputs.
    """

    first: str
    last: str
    width: int
    classes: int

    @property
    def description(self) -> str:
        """What was done, in a few words."""
        return f"new head in place of {self.first} to {self.last}: {self.width} channels, {self.classes} classes"

    def replay(self, network: nn.Module) -> nn.Module:
        """Make the change in place and return the network; new tensors are on the meta device."""
        old = _submodule(network, self.first)
        if (
            not isinstance(old, nn.Linear)
            or not self.first
            or not isinstance(_submodule(network, self.last), nn.Linear)
        ):
            raise CheckpointError(f"{self.first} and {self.last} are not both dense layers")
        head = new_head(old, self.width, self.classes, device="meta")
        splice_over(network, self.first, self.last, head)
        return network

    def outline(self, network: nn.Module) -> None:
        """Make the change, in place, to a network whose layers are placeholders."""
        head = [nn.Identity(), marked(nn.Identity()), nn.Identity(), nn.Identity()]
        splice_over(network, self.first, self.last, head)

    def to_document(self) -> dict[str, Any]:
        """Return the change as JSON-ready data."""
        return {"new_head": [self.first, self.last], "width": self.width, "classes": self.classes}


Change = InsertedBatchNorms | FoldedBatchNorms | ReplacedOutput | ReplacedHead


def new_output(old: nn.Linear | nn.Conv2d, classes: int, device: torch.device | str | None = None) -> nn.Module:
    """Return a layer like an output layer, with its dtype, for another number of classes.

    Args:
        old: The output layer.
        classes: Number of outputs.
        device: Device of the parameters; by default that of the output layer.
    """
    place: dict[str, Any] = {"device": device or old.weight.device, "dtype": old.weight.dtype}
    bias = old.bias is not None
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, classes, bias=bias, **place)
    return nn.Conv2d(
        old.in_channels,
        classes,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=bias,
        padding_mode=old.padding_mode,
        **place,
    )


def new_head(first: nn.Linear, width: int, classes: int, device: torch.device | str | None = None) -> list[nn.Module]:
    """Return the modules of a new head that takes the inputs of a dense layer, with its dtype.

    Args:
        first: The dense layer whose place the first module takes.
        width: Number of hidden channels.
        classes: Number of outputs.
        device: Device of the parameters; by default that of the dense layer.
    """
    place: dict[str, Any] = {"device": device or first.weight.device, "dtype": first.weight.dtype}
    hidden = nn.Linear(first.in_features, width, **place)
    return [hidden, marked(nn.BatchNorm1d(width, **place)), nn.ReLU(inplace=True), nn.Linear(width, classes, **place)]


@dataclass(frozen=True)
class History:
    """What it takes to rebuild the modules of a network, without their values.

    Attributes:
        function: "package.module:function" that builds the original network, or None if the caller named none.
        changes: Changes to its modules since, in order.
    """

    function: str | None = None
    changes: tuple[Change, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> History:
        """Return the history kept with a model; empty if bn-insert neither loaded nor changed it."""
        kept = vars(unwrapped(model)).get(_ATTRIBUTE)
        return kept if isinstance(kept, cls) else cls()

    def keep_with(self, model: nn.Module) -> None:
        """Keep this history with a model, in place of its previous one."""
        vars(model)[_ATTRIBUTE] = self

    def with_change(self, change: Change) -> History:
        """Return the history with one more change."""
        return History(self.function, (*self.changes, change))

    def mark_inserted(self, network: nn.Module) -> None:
        """Mark the BatchNorms that these changes inserted in a network that was rebuilt with them, not by replaying.

        The changes are made to placeholders for the children of each nn.Sequential of the network, as in a VGG. Where
        they do not fit, nothing is marked.
        """
        if not self.changes:
            return
        outline = nn.Module()
        for name, child in network.named_children():
            if isinstance(child, nn.Sequential):
                # More than there were at any time: placeholders behind the last layer change no names before them.
                outline.add_module(name, nn.Sequential(*(nn.Identity() for _ in range(_MOST_CHILDREN))))
        with suppress(AttributeError, ValueError):  # names of layers that are not there
            for change in self.changes:
                change.outline(outline)
            for name in marked_modules(outline):
                if isinstance(norm := network.get_submodule(name), _BatchNorm):
                    marked(norm)

    def replay(self, network: nn.Module) -> nn.Module:
        """Make the changes to an original network, in place.

        Args:
            network: The network as its function builds it.

        Returns:
            The network; a new root if the root is a layer that got a BatchNorm. New modules are on the meta device,
            without memory: the caller knows whether their shapes are right before memory is allocated.

        Raises:
            CheckpointError: The changes do not fit this network; the message names the layer.
        """
        for change in self.changes:
            network = change.replay(network)
        return network

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> History:
        """Return the history that `to_document` wrote; raises CheckpointError naming the wrong field."""
        _check_fields(document, {"function", "changes"}, "architecture")
        function = document.get("function")
        if function is not None and not (isinstance(function, str) and FUNCTION.fullmatch(function)):
            raise CheckpointError(f"architecture.function is {function!r:.60}, not package.module:function")
        changes = document.get("changes", [])
        if not isinstance(changes, list) or len(changes) > _MAX_CHANGES:
            raise CheckpointError(f"architecture.changes is not a list of at most {_MAX_CHANGES} changes")
        return cls(function, tuple(_change(each, f"architecture.changes[{n}]") for n, each in enumerate(changes)))

    def to_document(self) -> dict[str, Any]:
        """Return the history as JSON-ready data."""
        return {"function": self.function, "changes": [change.to_document() for change in self.changes]}


def _submodule(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"there is no layer {name!r:.80}") from None


def _change(document: object, place: str) -> Change:
    if isinstance(document, dict) and "insert" in document:
        _check_fields(document, {"insert"}, place)
        sites = tuple(_site(each, f"{place}.insert[{n}]") for n, each in enumerate(_list(document["insert"], place)))
        if len({site.anchor for site in sites}) < len(sites):
            raise CheckpointError(f"{place} inserts two BatchNorms at one place")
        return InsertedBatchNorms(sites)
    if isinstance(document, dict) and "fold" in document:
        _check_fields(document, {"fold", "new_biases"}, place)
        norms, biases = document["fold"], _list(document.get("new_biases", []), f"{place}.new_biases")
        if not isinstance(norms, dict) or not all(isinstance(flag, bool) for flag in norms.values()):
            raise CheckpointError(f"{place}.fold is not an object with true or false for each name")
        if not all(isinstance(name, str) for name in biases):
            raise CheckpointError(f"{place}.new_biases is not a list of names")
        return FoldedBatchNorms(norms, tuple(biases))
    if isinstance(document, dict) and "new_output" in document:
        _check_fields(document, {"new_output", "classes"}, place)
        layer, classes = document["new_output"], document.get("classes")
        if not isinstance(layer, str) or not _is_extent(classes):
            raise CheckpointError(f"{place} needs a layer name and a number of classes")
        return ReplacedOutput(layer, classes)
    if isinstance(document, dict) and "new_head" in document:
        _check_fields(document, {"new_head", "width", "classes"}, place)
        names, sizes = document["new_head"], (document.get("width"), document.get("classes"))
        if not isinstance(names, list) or len(names) != 2 or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{place}.new_head is not a list of two names")
        if names[0].rpartition(".")[0] != names[1].rpartition(".")[0]:
            raise CheckpointError(f"{place}.new_head names layers of two modules")
        width, classes = sizes
        if not _is_extent(width) or not _is_extent(classes) or width > WIDEST_HEAD:
            raise CheckpointError(f"{place} needs a width of at most {WIDEST_HEAD} and a number of classes")
        return ReplacedHead(names[0], names[1], width, classes)
    raise CheckpointError(f"{place} is not a change that this version of bn-insert knows: {document!r:.60}")


def _site(document: object, place: str) -> Site:
    kinds = {"int": int, "bool": bool}  # all other fields are strings
    wanted = {field.name: kinds.get(str(field.type), str) for field in fields(Site)}
    if not isinstance(document, dict) or document.keys() != wanted.keys():
        raise CheckpointError(f"{place} needs exactly the fields {', '.join(wanted)}")
    for name, kind in wanted.items():
        if type(document[name]) is not kind:
            raise CheckpointError(f"{place}.{name} is {document[name]!r:.40}, not of type {kind.__name__}")
    if (
        document["dims"] not in BATCHNORMS
        or document["kind"] not in get_args(Kind)
        or not _is_extent(document["channels"])
    ):
        raise CheckpointError(f"{place} is not a place where a BatchNorm can go: {document!r:.200}")
    return Site(**document)


def _check_fields(document: Mapping[str, Any], known: set[str], place: str) -> None:
    if unknown := sorted(document.keys() - known):
        raise CheckpointError(f"unknown field {place}.{unknown[0]:.40}")


def _list(value: object, place: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise CheckpointError(f"{place} is {value!r:.40}, not a list")
    return value


def _is_extent(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < _MAX_EXTENT
