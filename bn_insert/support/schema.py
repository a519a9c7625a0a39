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

Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]

MAX_DEPTH = 20


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
        bn_insert.support.schema.SchemaError: expected float >= 0.0
    """
    try:
        return msgspec.convert(value, schema)
    except (AttributeError, TypeError) as error:  # a tensor where a mapping may be
        raise SchemaError(f"{field or 'a field'} has a value of a wrong type: {error}") from error
    except (msgspec.ValidationError, RecursionError) as error:
        raise SchemaError(_described(str(error), field)) from error


def check_depth(value: object, depth: int = MAX_DEPTH) -> None:
    """Raise SchemaError for lists and objects nested so deep that reading them could exhaust the stack."""
    if depth == 0:
        raise SchemaError(f"values are nested more than {MAX_DEPTH} deep")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        check_depth(inner, depth - 1)


def _described(text: str, field: str) -> str:
    """Return an error of msgspec in words: it writes "Expected `int`, got `float` - at `$.epoch`"."""
    reason, _, place = text.replace("`", "").partition(" - at ")
    reason = reason[:1].lower() + reason[1:]
    wrong_key = place.startswith("key in ")
    place = field + place.removeprefix("key in ").removeprefix("$").removeprefix("" if field else ".")
    if missing := re.fullmatch(r"object missing required field (.*)", reason):
        return f"the field {'.'.join(filter(None, (place, missing[1])))} is missing"
    if wrong_key:
        return f"the field {place} has a wrong key: {reason}"
    return f"the field {place} is wrong: {reason}" if place else reason
