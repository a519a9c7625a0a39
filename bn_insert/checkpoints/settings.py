"""Network settings that a state dict does not store: eps, momentum, dropout, preprocessing, classes and history.

A document has the lowest version that describes it, so that older versions of bn-insert read whatever they know, and
refuse the rest by its version. Version 2 added the names of classes.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..errors import CheckpointError
from ..support.text import listed
from ..surgery.history import History

FORMAT = "bn-insert"
VERSION = 2
_FIELDS = {"format", "version", "batchnorm", "dropout", "transform", "architecture"}
_FIELDS_OF_2 = {"classes"}
_MAX_CHARACTERS = 1 << 24  # the settings of thousands of layers are shorter
_MAX_FLOAT = sys.float_info.max
_NAMES_SHOWN = 3
_MAX_CLASSES = 100_000  # of ImageNet there are 21,841
_MAX_CLASS_NAME = 1000  # characters; the name of a folder has at most 255


@dataclass(frozen=True)
class BatchNormSettings:
    """Settings of one BatchNorm layer; momentum None means a cumulative average, as in PyTorch."""

    eps: float = 1e-5
    momentum: float | None = 0.1


@dataclass(frozen=True)
class Settings:
    """What a checkpoint stores besides its tensors.

    Attributes:
        batchnorm: Settings of each BatchNorm layer, by qualified name.
        dropout: Probability p of each dropout layer, by qualified name.
        transform: Preprocessing of images, as a JSON object.
        history: How the modules of the network can be rebuilt.
        classes: Names of the classes, in the order of the network's outputs; empty if they are not known.
    """

    batchnorm: Mapping[str, BatchNormSettings] = field(default_factory=dict)
    dropout: Mapping[str, float] = field(default_factory=dict)
    transform: Mapping[str, Any] | None = None
    history: History = field(default_factory=History)
    classes: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, transform: Mapping[str, Any] | None = None, classes: Sequence[str] = ()) -> Settings:
        """Return the settings of a model; raises CheckpointError if they could not be read back."""
        batchnorm = {
            name: BatchNormSettings(float(norm.eps), None if norm.momentum is None else float(norm.momentum))
            for name, norm in _batchnorms(model).items()
        }
        dropout = {name: float(module.p) for name, module in _dropouts(model).items()}
        return cls.from_json(cls(batchnorm, dropout, transform, History.of(model), tuple(classes)).to_json())

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Return the settings in a JSON text; raises CheckpointError naming the wrong field."""
        if len(text) > _MAX_CHARACTERS:
            raise CheckpointError(
                f"{len(text):,} characters of settings are more than the limit of {_MAX_CHARACTERS:,}"
            )
        document = parse_document(text)
        return cls.from_document(_object(document, "the text"))

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Settings:
        """Return the settings in a JSON object; raises CheckpointError naming the wrong field."""
        if document.get("format") != FORMAT:
            raise CheckpointError(f'the field "format" is {document.get("format")!r:.40}, not "{FORMAT}"')
        if (version := document.get("version")) not in (1, VERSION) or isinstance(version, bool):
            raise CheckpointError(
                f'the field "version" is {version!r:.40}, and this version of bn-insert reads versions 1 and {VERSION}'
            )
        if unknown := sorted(document.keys() - _FIELDS - (_FIELDS_OF_2 if version == VERSION else set())):
            raise CheckpointError(f"unknown field {unknown[0]!r:.40}")
        batchnorm = {
            name: _batchnorm_settings(values, f"batchnorm.{name}")
            for name, values in _object(document.get("batchnorm", {}), "batchnorm").items()
        }
        dropout = {
            name: _number(value, f"dropout.{name}", 0.0, 1.0)
            for name, value in _object(document.get("dropout", {}), "dropout").items()
        }
        transform = document.get("transform")
        history = _object(document.get("architecture", {}), "architecture")
        return cls(
            batchnorm,
            dropout,
            None if transform is None else _object(transform, "transform"),
            History.from_document(history),
            _class_names(document.get("classes", [])),
        )

    def to_document(self) -> dict[str, Any]:
        """Return the settings as the JSON object that `from_document` reads."""
        document: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION if self.classes else 1,
            "batchnorm": {name: {"eps": norm.eps, "momentum": norm.momentum} for name, norm in self.batchnorm.items()},
            "dropout": dict(self.dropout),
        }
        if self.transform is not None:
            document["transform"] = dict(self.transform)
        if self.history != History():
            document["architecture"] = self.history.to_document()
        if self.classes:
            document["classes"] = list(self.classes)
        return document

    def to_json(self) -> str:
        """Return the settings as JSON text."""
        return format_document(self.to_document())

    def without_prefix(self, prefix: str) -> Settings:
        """Return the settings with a prefix removed from the names of layers, as from the keys of a state dict."""
        batchnorm = {name.removeprefix(prefix): norm for name, norm in self.batchnorm.items()}
        dropout = {name.removeprefix(prefix): p for name, p in self.dropout.items()}
        return replace(self, batchnorm=batchnorm, dropout=dropout)

    def apply_to(self, model: nn.Module) -> None:
        """Set eps, momentum and p of the layers of a model, in place.

        Settings that name any BatchNorm layer must name all of them, and so for dropout. Otherwise they belong to
        another checkpoint, and applying some of them would change outputs silently.

        Raises:
            CheckpointError: The settings name other layers than the model has.
        """
        batchnorms, dropouts = _batchnorms(model), _dropouts(model)
        _check_names("BatchNorm", self.batchnorm, batchnorms)
        _check_names("Dropout", self.dropout, dropouts)
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


def format_document(document: Mapping[str, Any]) -> str:
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


def _check_names(kind: str, stored: Iterable[str], present: Iterable[str]) -> None:
    unknown, unnamed = sorted(set(stored) - set(present)), sorted(set(present) - set(stored))
    if unknown:
        raise CheckpointError(f"the settings name {listed(unknown, _NAMES_SHOWN)}, but the network has no {kind} there")
    if unnamed and stored:
        raise CheckpointError(
            f"the settings do not name the {kind} layers {listed(unnamed, _NAMES_SHOWN)} of the network"
        )


def _batchnorm_settings(values: object, place: str) -> BatchNormSettings:
    fields = _object(values, place)
    if unknown := sorted(set(fields) - {"eps", "momentum"}):
        raise CheckpointError(f"unknown field {place}.{unknown[0]:.40}")
    default = BatchNormSettings()
    eps = _number(fields.get("eps", default.eps), f"{place}.eps", 0.0, _MAX_FLOAT)
    momentum = fields.get("momentum", default.momentum)
    if momentum is not None:
        momentum = _number(momentum, f"{place}.momentum", -_MAX_FLOAT, _MAX_FLOAT)
    return BatchNormSettings(eps, momentum)


def _class_names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise CheckpointError(f"classes is {_kind(value)}, not a list")
    if len(value) > _MAX_CLASSES:
        raise CheckpointError(f"classes has {len(value):,} names, more than the limit of {_MAX_CLASSES:,}")
    for number, name in enumerate(value):
        if not isinstance(name, str):
            raise CheckpointError(f"classes.{number} is {_kind(name)}, not a string")
        if fault := _fault_of_class_name(name):
            raise CheckpointError(f"classes.{number}, {name!a:.40}, {fault}")
    if len(set(value)) < len(value):
        twice = next(name for name, count in Counter(value).items() if count > 1)
        raise CheckpointError(f"classes names {twice!a:.40} twice")
    return tuple(value)


def _fault_of_class_name(name: str) -> str:
    """Return what is wrong with the name of a class, which is the name of a folder and a line of a table."""
    if len(name) > _MAX_CLASS_NAME:
        return f"is longer than {_MAX_CLASS_NAME:,} characters"
    if name.splitlines() != [name]:
        return "contains a line break" if name else "is empty"
    return "is not valid Unicode" if any("\ud800" <= character <= "\udfff" for character in name) else ""


def _object(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{place} is {_kind(value)}, not an object")
    return value


def _number(value: object, place: str, low: float, high: float) -> float:
    # bool is an int to Python; the comparison is false for NaN.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{place} is {_kind(value)}, not a number")
    if not low <= value <= high:
        wanted = (
            "finite" if low < 0 else "finite and not negative" if high == _MAX_FLOAT else f"from {low:g} to {high:g}"
        )
        raise CheckpointError(f"{place} is {value!r:.40}, and must be {wanted}")
    return float(value)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
