"""What a state dict does not store: eps, momentum, dropout, preprocessing, classes, shape of inputs and history.

A checkpoint carries them as JSON text: a .pth in the metadata of its state dict (`_metadata[""]`), which PyTorch
saves and loads with it; a .safetensors file in its header. `save.py` writes the text, `read_file.py` reads it.

A document has the lowest version that can describe it, so older versions of bn-insert read whatever they know, and
refuse the rest by its version. Version 2 added class names, version 3 that a network can be rebuilt from keys, version
4 the shape of an input.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Annotated, Any

import msgspec
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..errors import CheckpointError
from ..support.schema import Extent, Finite, Fraction, NotNegative, SchemaError, checked
from ..support.text import listed
from ..surgery.history import History

FORMAT = "bn-insert"
METADATA_KEY = "bn_insert"  # in `_metadata[""]` of a state dict
HEADER_KEY = "bn-insert"  # in the header of a safetensors file
_MAX_CHARACTERS = 1 << 24  # the settings of thousands of layers are shorter
_NAMES_SHOWN = 3
_MAX_VALUES = 1 << 30  # of values in one input: color images of 16384 x 16384 have fewer


def stored_metadata(state_dict: dict[Any, Any]) -> dict[Any, Any]:
    """Return the metadata of the root module that a state dict of PyTorch carries, unchecked; empty if it has none."""
    metadata: object = vars(state_dict).get("_metadata") if isinstance(state_dict, OrderedDict) else None
    root = dict.get(metadata, "") if isinstance(metadata, dict) else None
    return dict(dict.items(root)) if isinstance(root, dict) else {}


class BatchNormSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one BatchNorm layer; momentum None means a cumulative average, as in PyTorch."""

    eps: NotNegative = 1e-5
    momentum: Finite | None = 0.1


# A folder name has at most 255 characters, and ImageNet 21,841 classes.
_ClassName = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
_ClassNames = Annotated[tuple[_ClassName, ...], msgspec.Meta(max_length=100_000)]


class _Version1(msgspec.Struct, forbid_unknown_fields=True):
    """A document; fields that name layers are converted layer by layer, so that errors name the layer."""

    format: str
    version: int
    batchnorm: dict[str, Any] = {}
    dropout: dict[str, Any] = {}
    transform: dict[str, Any] | None = None
    architecture: dict[str, Any] = {}


class _Version2(_Version1):
    classes: _ClassNames = ()


class _Version3(_Version2):
    rebuilt_from_keys: bool = False


class _Version4(_Version3):
    input_shape: Annotated[tuple[Extent, ...], msgspec.Meta(max_length=16)] = ()


_VERSIONS = {1: _Version1, 2: _Version2, 3: _Version3, 4: _Version4}


@dataclass(frozen=True)
class Settings:
    """What a checkpoint stores besides its tensors.

    Attributes:
        batchnorm: Settings of each BatchNorm layer, by qualified name.
        dropout: Probability p of each dropout layer, by qualified name.
        transform: Preprocessing of images, as a JSON object.
        history: How the modules of the network can be rebuilt.
        classes: Names of the classes, in the order of the network's outputs; empty if they are not known.
        rebuilt_from_keys: Whether the network was found to be the VGG that `load_checkpoint` rebuilds from its keys.
        input_shape: Shape of one input in the tensor file that the network was last calibrated on; empty if it was
            calibrated on images, whose size is that of the transform.
    """

    batchnorm: Mapping[str, BatchNormSettings] = field(default_factory=dict)
    dropout: Mapping[str, float] = field(default_factory=dict)
    transform: Mapping[str, Any] | None = None
    history: History = field(default_factory=History)
    classes: tuple[str, ...] = ()
    rebuilt_from_keys: bool = False
    input_shape: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        transform: Mapping[str, Any] | None = None,
        classes: Sequence[str] = (),
        input_shape: Sequence[int] = (),
    ) -> Settings:
        """Return the settings of a model; raises CheckpointError if they could not be read back."""
        batchnorm = {
            name: BatchNormSettings(float(norm.eps), None if norm.momentum is None else float(norm.momentum))
            for name, norm in _batchnorms(model).items()
        }
        dropout = {name: float(module.p) for name, module in _dropouts(model).items()}
        settings = cls(batchnorm, dropout, transform, History.of(model), tuple(classes), input_shape=tuple(input_shape))
        return cls.from_json(settings.to_json())

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Return the settings in a JSON text; raises CheckpointError naming the wrong field."""
        if len(text) > _MAX_CHARACTERS:
            raise CheckpointError(
                f"{len(text):,} characters of settings are more than the limit of {_MAX_CHARACTERS:,}"
            )
        document = parse_document(text)
        if not isinstance(document, dict):
            raise CheckpointError("the text is not a JSON object")
        return cls.from_document(document)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Settings:
        """Return the settings in a JSON object; raises CheckpointError naming the wrong field."""
        if document.get("format") != FORMAT:
            raise CheckpointError(f'the field "format" is {document.get("format")!r:.40}, not "{FORMAT}"')
        if type(version := document.get("version")) is not int or version not in _VERSIONS:
            raise CheckpointError(
                f'the field "version" is {version!r:.40}, and this version of bn-insert reads versions '
                f"{min(_VERSIONS)} to {max(_VERSIONS)}"
            )
        try:
            content = checked(document, _VERSIONS[version])
            return cls(
                _each(content.batchnorm, BatchNormSettings, "batchnorm"),
                _each(content.dropout, Fraction, "dropout"),
                content.transform,
                History.from_document(content.architecture),
                _class_names(content.classes) if version > 1 else (),
                content.rebuilt_from_keys if version > 2 else False,
                _input_shape(content.input_shape) if version > 3 else (),
            )
        except SchemaError as error:
            raise CheckpointError(f"{error!s:.300}") from error

    def to_document(self) -> dict[str, Any]:
        """Return the settings as the JSON object that `from_document` reads."""
        document: dict[str, Any] = {
            "format": FORMAT,
            "version": 4 if self.input_shape else 3 if self.rebuilt_from_keys else 2 if self.classes else 1,
            "batchnorm": {name: msgspec.to_builtins(norm) for name, norm in self.batchnorm.items()},
            "dropout": dict(self.dropout),
        }
        if self.transform is not None:
            document["transform"] = dict(self.transform)
        if self.history != History():
            document["architecture"] = self.history.to_document()
        if self.classes:
            document["classes"] = list(self.classes)
        if self.rebuilt_from_keys:
            document["rebuilt_from_keys"] = True
        if self.input_shape:
            document["input_shape"] = list(self.input_shape)
        return document

    def to_json(self) -> str:
        """Return the settings as JSON text."""
        return _format_document(self.to_document())

    def without_prefix(self, prefix: str) -> Settings:
        """Return the settings with a prefix removed from the names of layers, as from the keys of a state dict."""
        batchnorm = {name.removeprefix(prefix): norm for name, norm in self.batchnorm.items()}
        dropout = {name.removeprefix(prefix): p for name, p in self.dropout.items()}
        return replace(self, batchnorm=batchnorm, dropout=dropout)

    def of_part(self, prefix: str) -> Settings:
        """Return the settings of the layers whose names begin with a prefix, without it: of one of several networks."""
        batchnorm = {name: norm for name, norm in self.batchnorm.items() if name.startswith(prefix)}
        dropout = {name: p for name, p in self.dropout.items() if name.startswith(prefix)}
        part = replace(self, batchnorm=batchnorm, dropout=dropout, history=History(), rebuilt_from_keys=False)
        return part.without_prefix(prefix)

    def apply_to(self, model: nn.Module) -> None:
        """Set eps, momentum and p of the layers of a model, in place.

        Settings that name any BatchNorm layer must name all of them. Otherwise they belong to another checkpoint, and
        applying some of them would change outputs silently. A dropout layer that they do not name keeps its p: it
        may have replaced a call to `F.dropout` in the class of the network, and dropout does not change outputs.

        Raises:
            CheckpointError: The settings name a layer that the model does not have, or some of its BatchNorm layers
                but not all.
        """
        batchnorms, dropouts = _batchnorms(model), _dropouts(model)
        _check_present("BatchNorm", self.batchnorm, batchnorms)
        _check_present("Dropout", self.dropout, dropouts)
        if self.batchnorm and (unnamed := sorted(set(batchnorms) - set(self.batchnorm))):
            raise CheckpointError(
                f"the settings do not name the BatchNorm layers {listed(unnamed, _NAMES_SHOWN)} of the network"
            )
        for name, norm in self.batchnorm.items():
            batchnorms[name].eps = norm.eps
            batchnorms[name].momentum = norm.momentum
        for name, p in self.dropout.items():
            dropouts[name].p = p


def parse_document(text: str | bytes) -> Any:
    """Return the value of a JSON text; raises CheckpointError if it is not valid JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"invalid JSON: {error}") from error


def _format_document(document: Mapping[str, Any]) -> str:
    """Return a document as JSON text; raises CheckpointError for values that JSON cannot represent."""
    try:
        return json.dumps(document, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the settings or the transform cannot be stored as JSON: {error}") from error


def _batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    # A module registered twice has two names, and the state dict has both.
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, _BatchNorm)}


def _dropouts(model: nn.Module) -> dict[str, _DropoutNd]:
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, _DropoutNd)}


def _check_present(kind: str, stored: Iterable[str], present: Iterable[str]) -> None:
    if unknown := sorted(set(stored) - set(present)):
        raise CheckpointError(f"the settings name {listed(unknown, _NAMES_SHOWN)}, but the network has no {kind} there")


def _each(values: Mapping[str, Any], schema: Any, field: str) -> dict[str, Any]:
    return {name: checked(value, schema, f"{field}.{name}") for name, value in values.items()}


def _input_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an input, for which commands take memory; raises SchemaError for too large a one."""
    if prod(shape) > _MAX_VALUES:
        raise SchemaError(f"the field input_shape is for more than the limit of {_MAX_VALUES:,} values")
    return shape


def _class_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return class names, which are names of folders and lines of tables; raises SchemaError for any other."""
    for number, name in enumerate(names):
        if name.splitlines() != [name]:
            raise SchemaError(f"the field classes[{number}], {name!a:.40}, contains a line break")
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise SchemaError(f"the field classes[{number}], {name!a:.40}, is not valid Unicode")
    for name, count in Counter(names).items():
        if count > 1:
            raise SchemaError(f"the field classes names {name!a:.40} twice")
    return names
