"""Schemas of data that comes from files: types, ranges and required fields, checked before anything is used.

The schemas are msgspec's, which converts nothing on the way: it is as light as a JSON parser, passes tensors through as
values of type Any, and names the field of an error. (pydantic takes longer to import than all of the command line.)
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
"""A number that is neither NaN nor infinite."""

NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e300)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e300)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]

Extent = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
"""A number of channels or pixels."""

MAX_DEPTH = 20
_LONGEST_VALUE = 60  # characters of a wrong value or an unknown name in a message


class SchemaError(ValueError):
    """A value that its schema does not allow; the message names the field."""


def checked(value: object, schema: Any, field: str = "") -> Any:
    """Return a value as the type `schema`, which may have bounds.

    Args:
        value: Any value.
        schema: The type.
        field: Name of the field that has the value, for messages.

    Raises:
        SchemaError: The value has another type, is out of range, or has other fields.

    Examples:
        >>> checked([1, 2], list[int])
        [1, 2]
        >>> checked(float("nan"), Fraction)
        Traceback (most recent call last):
        ...
        bn_insert.support.schema.SchemaError: expected float >= 0.0, got nan
    """
    try:
        return msgspec.convert(value, schema)
    except (AttributeError, TypeError) as error:  # a tensor where a mapping may be
        raise SchemaError(f"{field or 'a field'} has a value of a wrong type: {error}") from error
    except UnicodeEncodeError as error:
        raise SchemaError(
            f"{field or 'an object'} has a name that is not valid Unicode: {error.object!a:.60}"
        ) from error
    except (msgspec.ValidationError, RecursionError) as error:
        raise SchemaError(_described(str(error), value, field)) from error


def check_depth(value: object, depth: int = MAX_DEPTH) -> None:
    """Raise SchemaError for lists and objects nested so deep that reading them could exhaust the stack."""
    if depth == 0:
        raise SchemaError(f"values are nested more than {MAX_DEPTH} deep")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        check_depth(inner, depth - 1)


def _described(text: str, value: object, field: str) -> str:
    """Return an error of msgspec in words: it writes "Expected `int`, got `float` - at `$.epoch`"."""
    reason, _, place = text.replace("`", "").partition(" - at ")
    reason = reason[:1].lower() + reason[1:]
    wrong_key = place.startswith("key in ")
    place = place.removeprefix("key in ").removeprefix("$")
    if reason.startswith("expected ") and ", got " not in reason and not wrong_key:
        reason += _found(value, place)
    place = field + place.removeprefix("" if field else ".")
    if named := re.fullmatch(r"object (missing required|contains unknown) field (.*)", reason):
        name = ".".join(filter(None, (place, named[2][:_LONGEST_VALUE])))
        return f"the field {name} is missing" if named[1] == "missing required" else f"unknown field {name}"
    if wrong_key:
        return f"the field {place} has a wrong key: {reason}"
    return f"the field {place} is wrong: {reason}" if place else reason


def _found(value: Any, place: str) -> str:
    """Return the scalar at a place such as ".epochs[3].lr", for a message; msgspec names only wrong types."""
    if "[...]" in place:  # any value of a dict
        return ""
    for name, number in re.findall(r"\.(\w+)|\[(\d+)\]", place):
        value = value[name] if name else value[int(number)]
    return f", got {value!r:.{_LONGEST_VALUE}}" if isinstance(value, int | float | str) else ""
