"""The history of a network: the function that built it, and the changes that bn-insert made to its modules since.

A state dict does not store the architecture. The history is kept with the network, as an attribute of its root, and
saved in its checkpoint. On load the changes are replayed on a freshly built network, which then takes the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Annotated, Any, cast

import msgspec
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..batchnorm.identity_parameters import BATCHNORMS, batchnorm_dtype
from ..errors import CheckpointError
from ..graph.copies import unwrapped
from ..graph.layers import layer_kind, outputs_of
from ..graph.sites import Site
from ..support.schema import Count, Extent, SchemaError, checked
from ..support.text import counted, with_article
from .splice import marked, marked_modules, splice_after, splice_out, splice_over

FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
"""Pattern of a name such as "package.module:function"."""

_ATTRIBUTE = "_bn_insert_history"
_MAX_CHANGES = 1000  # each one walks the whole network, and a hostile file could list millions
_MOST_CHILDREN = 512  # in a VGG's features: VGG19 with BatchNorm after every conv has 53
WIDEST_HEAD = 1 << 16
"""Maximum number of hidden channels of a new head."""


class _Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A change to a network, mostly to its modules, and the schema of the JSON object that describes it."""


class InsertedBatchNorms(_Change, frozen=True, rename={"sites": "insert"}):
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
            if layer_kind(layer) is None:
                raise CheckpointError(f"{site.name} is {with_article(layer)}, not a conv or dense layer")
            norms[site] = BATCHNORMS[site.dims](site.channels, device="meta", dtype=batchnorm_dtype(layer))
        return splice_after(network, norms)

    def outline(self, network: nn.Module) -> None:
        """Make the change, in place, to a network whose layers are placeholders."""
        splice_after(network, {site: nn.Identity() for site in self.sites})


class FoldedBatchNorms(_Change, frozen=True, omit_defaults=True, rename={"norms": "fold", "biases": "new_biases"}):
    """BatchNorm layers were folded into the layers before them, and layers without a bias got one.

    Attributes:
        norms: For each removed BatchNorm, by qualified name, whether it was a child of an nn.Sequential.
        biases: Names of the layers that got a bias.
        untied: Names of the layers that shared a parameter with others, and got their own.
    """

    norms: dict[str, bool]
    biases: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """What was done, in a few words."""
        return f"{counted(len(self.norms), 'BatchNorm layer')} folded"

    def replay(self, network: nn.Module) -> nn.Module:
        """Make the change in place and return the network."""
        for name in self.biases:
            layer = _submodule(network, name)
            if layer_kind(layer) is None:
                raise CheckpointError(f"{name} is {with_article(layer)}, not a conv or dense layer")
            weight = next(layer.parameters())
            channels = outputs_of(cast(nn.Linear, layer))
            layer.bias = nn.Parameter(torch.zeros(channels, dtype=weight.dtype, device=weight.device))
        for name in self.untied:
            layer = _submodule(network, name)
            for kind, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, kind, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        for name in self.norms:
            if not isinstance(norm := _submodule(network, name), _BatchNorm):
                raise CheckpointError(f"{name} is {with_article(norm)}, not a BatchNorm")
        return splice_out(network, self.norms)

    def outline(self, network: nn.Module) -> None:
        """Make the change, in place, to a network whose layers are placeholders."""
        splice_out(network, self.norms)


class RemovedBatchNorms(_Change, frozen=True, rename={"norms": "remove"}):
    """BatchNorm layers were removed together with the output layer before them.

    Attributes:
        norms: Names of the BatchNorms, children of an nn.Sequential.
    """

    norms: tuple[str, ...]

    @property
    def description(self) -> str:
        """What was done, in a few words."""
        return f"{counted(len(self.norms), 'BatchNorm layer')} after the output layer removed"

    def replay(self, network: nn.Module) -> nn.Module:
        """Make the change in place and return the network."""
        for name in self.norms:
            if not isinstance(norm := _submodule(network, name), _BatchNorm):
                raise CheckpointError(f"{name} is {with_article(norm)}, not a BatchNorm")
        return splice_out(network, dict.fromkeys(self.norms, True))

    def outline(self, network: nn.Module) -> None:
        """Make the change, in place, to a network whose layers are placeholders."""
        splice_out(network, dict.fromkeys(self.norms, True))


class ReplacedOutput(_Change, frozen=True, rename={"layer": "new_output"}):
    """The output layer was replaced by a new one.

    Attributes:
        layer: Qualified name of the output layer.
        classes: Number of outputs of the new layer.
    """

    layer: str
    classes: Extent

    @property
    def description(self) -> str:
        """What was done, in a few words."""
        return f"output layer {self.layer} replaced, {self.classes} classes"

    def replay(self, network: nn.Module) -> nn.Module:
        """Make the change in place and return the network; new tensors are on the meta device."""
        old = _submodule(network, self.layer)
        if not isinstance(old, nn.Linear | nn.Conv2d) or not self.layer:
            raise CheckpointError(f"{self.layer} is {with_article(old)}, not a dense layer or a Conv2d")
        parent, _, child = self.layer.rpartition(".")
        setattr(network.get_submodule(parent), child, new_output(old, self.classes, device="meta"))
        return network

    def outline(self, network: nn.Module) -> None:
        """Make the change, in place, to a network whose layers are placeholders: nothing moves."""


class ReplacedHead(_Change, frozen=True, rename={"layers": "new_head"}):
    """The dense layers of the head were replaced by new ones with a BatchNorm between them.

    Attributes:
        layers: Qualified names of the first module that was replaced and of the last one, the output layer; both are
            in one nn.Sequential.
        width: Number of hidden channels of the new head.
        classes: Number of its outputs.
    """

    layers: tuple[str, str]
    width: Annotated[int, msgspec.Meta(ge=1, le=WIDEST_HEAD)]
    classes: Extent

    @property
    def description(self) -> str:
        """What was done, in a few words."""
        first, last = self.layers
        return f"new head in place of {first} to {last}: {self.width} channels, {self.classes} classes"

    def replay(self, network: nn.Module) -> nn.Module:
        """Make the change in place and return the network; new tensors are on the meta device."""
        first, last = self.layers
        old = _submodule(network, first)
        if not isinstance(old, nn.Linear) or not first or not isinstance(_submodule(network, last), nn.Linear):
            raise CheckpointError(f"{first} and {last} are not both dense layers")
        head = new_head(old, self.width, self.classes, device="meta")
        splice_over(network, first, last, head)
        return network

    def outline(self, network: nn.Module) -> None:
        """Make the change, in place, to a network whose layers are placeholders."""
        head = [nn.Identity(), marked(nn.Identity()), nn.Identity(), nn.Identity()]
        splice_over(network, *self.layers, head)


class AdaptedStatistics(_Change, frozen=True, rename={"images": "adapt"}):
    """The statistics of the BatchNorm layers were re-estimated on images of another kind.

    Attributes:
        images: Number of these images.
    """

    images: Count

    @property
    def description(self) -> str:
        """What was done, in a few words."""
        return f"adapted to {counted(self.images, 'image')}"

    def replay(self, network: nn.Module) -> nn.Module:
        """Return the network: only values were changed."""
        return network

    def outline(self, network: nn.Module) -> None:
        """Leave a network whose layers are placeholders as it is: nothing moves."""


Change = InsertedBatchNorms | FoldedBatchNorms | RemovedBatchNorms | ReplacedOutput | ReplacedHead | AdaptedStatistics

_KINDS: dict[str, type[Change]] = {
    "insert": InsertedBatchNorms,
    "fold": FoldedBatchNorms,
    "remove": RemovedBatchNorms,
    "new_output": ReplacedOutput,
    "new_head": ReplacedHead,
    "adapt": AdaptedStatistics,
}


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON object that describes a history."""

    function: str | None = None
    changes: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=_MAX_CHANGES)] = []


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
        changes: Changes since, in order.
    """

    function: str | None = None
    changes: tuple[Change, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> History:
        """Return the history kept with a model; empty if bn-insert neither loaded nor changed it."""
        inner: nn.Module = unwrapped(model)
        attributes = vars(inner).get("meta", {}) if isinstance(inner, fx.GraphModule) else vars(inner)
        kept = attributes.get(_ATTRIBUTE)
        return kept if isinstance(kept, cls) else cls()

    def keep_with(self, model: nn.Module) -> None:
        """Keep this history with a model, in place of its previous one."""
        attributes = vars(model)
        if isinstance(model, fx.GraphModule):  # copying it builds a new module, which keeps only this attribute
            attributes = attributes.setdefault("meta", {})
        attributes[_ATTRIBUTE] = self

    @property
    def unties(self) -> bool:
        """Whether a change gave layers that shared a parameter their own."""
        return any(isinstance(change, FoldedBatchNorms) and change.untied for change in self.changes)

    @property
    def adaptations(self) -> tuple[AdaptedStatistics, ...]:
        """The changes that only values show: keys and shapes of a network are the same with and without them."""
        return tuple(change for change in self.changes if isinstance(change, AdaptedStatistics))

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
                # More than there were at any time: placeholders after the last layer change no names before them.
                outline.add_module(name, nn.Sequential(*(nn.Identity() for _ in range(_MOST_CHILDREN))))
        with suppress(AttributeError, KeyError, ValueError):  # names of layers that are not there, or are containers
            for change in self.changes:
                change.outline(outline)
            norms = [network.get_submodule(name) for name in marked_modules(outline)]
            if all(isinstance(norm, _BatchNorm) for norm in norms):
                for norm in norms:
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
        """Return the history that `to_document` wrote; raises SchemaError naming the wrong field."""
        content: _Document = checked(document, _Document, "architecture")
        if content.function is not None and not FUNCTION.fullmatch(content.function):
            raise SchemaError(f"architecture.function is {content.function!r:.60}, not package.module:function")
        return cls(
            content.function,
            tuple(_change(each, f"architecture.changes[{n}]") for n, each in enumerate(content.changes)),
        )

    def to_document(self) -> dict[str, Any]:
        """Return the history as JSON-ready data."""
        return {"function": self.function, "changes": [msgspec.to_builtins(change) for change in self.changes]}


def _submodule(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"there is no layer {name!r:.80}") from None


def _change(document: dict[str, Any], place: str) -> Change:
    kind = next((kind for name, kind in _KINDS.items() if name in document), None)
    if kind is None:
        raise SchemaError(f"{place} is not a change that this version of bn-insert knows: {document!r:.60}")
    change: Change = checked(document, kind, place)
    if isinstance(change, InsertedBatchNorms):
        for number, site in enumerate(change.sites):
            if unknown := document["insert"][number].keys() - asdict(site).keys():  # msgspec drops those of dataclasses
                raise SchemaError(f"unknown field {place}.insert[{number}].{min(unknown):.60}")
        if len({site.anchor for site in change.sites}) < len(change.sites):
            raise SchemaError(f"{place} inserts two BatchNorms at one place")
    if isinstance(change, ReplacedHead) and len({name.rpartition(".")[0] for name in change.layers}) > 1:
        raise SchemaError(f"{place}.new_head names layers of two modules")
    return change
