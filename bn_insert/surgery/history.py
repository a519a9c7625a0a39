"""How a network came about: the function that made it, and what was done to its modules since.

A state dict tells no architecture, so this is kept with a network, as an attribute of its root, and stored with its
checkpoint: the same changes can then be made to the network that the function makes, before the tensors are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeGuard, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..batchnorm.identity import BATCHNORMS
from ..errors import CheckpointError
from ..graph.copies import unwrapped
from ..graph.layers import Kind, layer_kind
from ..graph.sites import Site
from .splice import splice_after, splice_out

FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
"""What a name such as "package.module:function" looks like."""

_ATTRIBUTE = "_bn_insert_architecture"
_MOST_CHANGES = 1000  # each walks through the whole network; a stranger's file could name millions
_LARGEST_EXTENT = 2**31


@dataclass(frozen=True)
class Insertion:
    """BatchNorms were put behind these sites."""

    sites: tuple[Site, ...]

    def make(self, network: nn.Module) -> nn.Module:
        """Make the change again, in place, and return the network; new tensors are on the meta device."""
        norms: dict[Site, nn.Module] = {}
        for site in self.sites:
            layer = _submodule(network, site.name)
            _submodule(network, site.anchor)
            weight = next(layer.parameters(), None)
            if weight is None or layer_kind(layer) is None:
                raise CheckpointError(f"{site.name} is a {type(layer).__name__}, and no conv or dense layer")
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            norms[site] = BATCHNORMS[site.dims](site.channels, device="meta", dtype=dtype)
        return splice_after(network, norms)

    def to_document(self) -> dict[str, Any]:
        """Return the change as JSON-ready data."""
        return {"insert": [asdict(site) for site in self.sites]}


@dataclass(frozen=True)
class Folding:
    """BatchNorms were taken out, and layers that had no bias got one.

    norms: by qualified name, whether an nn.Sequential ran it as its child.  biases: names of those layers.
    """

    norms: Mapping[str, bool]
    biases: tuple[str, ...] = ()

    def make(self, network: nn.Module) -> nn.Module:
        """Make the change again, in place, and return the network."""
        for name in self.biases:
            layer = _submodule(network, name)
            if layer_kind(layer) is None:
                raise CheckpointError(f"{name} is a {type(layer).__name__}, and no conv or dense layer")
            weight = next(layer.parameters())
            channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            layer.bias = nn.Parameter(torch.zeros(channels, dtype=weight.dtype, device=weight.device))  # type: ignore[arg-type]
        for name in self.norms:
            if not isinstance(norm := _submodule(network, name), _BatchNorm):
                raise CheckpointError(f"{name} is a {type(norm).__name__}, and no BatchNorm")
        return splice_out(network, self.norms)

    def to_document(self) -> dict[str, Any]:
        """Return the change as JSON-ready data."""
        return {"fold": dict(self.norms), "new_biases": list(self.biases)}


@dataclass(frozen=True)
class NewOutput:
    """The output layer was replaced by one for so many classes."""

    layer: str
    classes: int

    def make(self, network: nn.Module) -> nn.Module:
        """Make the change again, in place, and return the network; new tensors are on the meta device."""
        old = _submodule(network, self.layer)
        if not isinstance(old, nn.Linear) or not self.layer:
            raise CheckpointError(f"{self.layer} is a {type(old).__name__}, and no dense layer")
        bias, dtype = old.bias is not None, old.weight.dtype
        parent, _, child = self.layer.rpartition(".")
        new = nn.Linear(old.in_features, self.classes, bias=bias, device="meta", dtype=dtype)
        setattr(network.get_submodule(parent), child, new)
        return network

    def to_document(self) -> dict[str, Any]:
        """Return the change as JSON-ready data."""
        return {"new_output": self.layer, "classes": self.classes}


Change = Insertion | Folding | NewOutput


@dataclass(frozen=True)
class Architecture:
    """Enough to build a network's modules again, without their values.

    function: "package.module:function" that makes the network as it began, or None where nobody named one.  changes:
    what was done to its modules since, in order.
    """

    function: str | None = None
    changes: tuple[Change, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Architecture:
        """Return what is kept with a network; nothing where it was not made or changed by bn-insert."""
        kept = vars(unwrapped(model)).get(_ATTRIBUTE)
        return kept if isinstance(kept, cls) else cls()

    def keep_with(self, model: nn.Module) -> None:
        """Keep this with a network, in place of what was."""
        vars(model)[_ATTRIBUTE] = self

    def changed(self, change: Change) -> Architecture:
        """Return the architecture after one more change."""
        return Architecture(self.function, (*self.changes, change))

    def make_changes(self, network: nn.Module) -> nn.Module:
        """Make the changes to a network as it began, in place, and return it (a new root if the root is a layer).

        New modules are on the meta device, without memory: whoever fills them knows whether shapes are right.
        Raises CheckpointError naming the layer when the network is not one that they were made to.
        """
        for change in self.changes:
            network = change.make(network)
        return network

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Architecture:
        """Return what `to_document` gave; raises CheckpointError naming the field that is wrong."""
        _check_fields(document, {"function", "changes"}, "architecture")
        function = document.get("function")
        if function is not None and not (isinstance(function, str) and FUNCTION.fullmatch(function)):
            raise CheckpointError(f"architecture.function is {function!r:.60}, not package.module:function")
        changes = document.get("changes", [])
        if not isinstance(changes, list) or len(changes) > _MOST_CHANGES:
            raise CheckpointError(f"architecture.changes is no list of at most {_MOST_CHANGES} changes")
        return cls(function, tuple(_change(each, f"architecture.changes[{n}]") for n, each in enumerate(changes)))

    def to_document(self) -> dict[str, Any]:
        """Return the architecture as JSON-ready data."""
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
            raise CheckpointError(f"{place} puts two BatchNorms in one place")
        return Insertion(sites)
    if isinstance(document, dict) and "fold" in document:
        _check_fields(document, {"fold", "new_biases"}, place)
        norms, biases = document["fold"], _list(document.get("new_biases", []), f"{place}.new_biases")
        if not isinstance(norms, dict) or not all(isinstance(flag, bool) for flag in norms.values()):
            raise CheckpointError(f"{place}.fold is no object of true and false by name")
        if not all(isinstance(name, str) for name in biases):
            raise CheckpointError(f"{place}.new_biases is no list of names")
        return Folding(norms, tuple(biases))
    if isinstance(document, dict) and "new_output" in document:
        _check_fields(document, {"new_output", "classes"}, place)
        layer, classes = document["new_output"], document.get("classes")
        if not isinstance(layer, str) or not _is_extent(classes):
            raise CheckpointError(f"{place} has no layer name and number of classes")
        return NewOutput(layer, classes)
    raise CheckpointError(f"{place} is no change that this bn-insert knows: {document!r:.60}")


def _site(document: object, place: str) -> Site:
    kinds = {"int": int, "bool": bool}  # all other fields are strings
    wanted = {field.name: kinds.get(str(field.type), str) for field in fields(Site)}
    if not isinstance(document, dict) or document.keys() != wanted.keys():
        raise CheckpointError(f"{place} has not the fields {', '.join(wanted)}")
    for name, kind in wanted.items():
        if type(document[name]) is not kind:
            raise CheckpointError(f"{place}.{name} is {document[name]!r:.40}, not of type {kind.__name__}")
    if (
        document["dims"] not in BATCHNORMS
        or document["kind"] not in get_args(Kind)
        or not _is_extent(document["channels"])
    ):
        raise CheckpointError(f"{place} is no place where a BatchNorm can go: {document!r:.200}")
    return Site(**document)


def _check_fields(document: Mapping[str, Any], known: set[str], place: str) -> None:
    if unknown := sorted(document.keys() - known):
        raise CheckpointError(f"unknown field {place}.{unknown[0]:.40}")


def _list(value: object, place: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise CheckpointError(f"{place} is {value!r:.40}, not a list")
    return value


def _is_extent(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < _LARGEST_EXTENT
