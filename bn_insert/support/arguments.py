"""Checks for arguments whose wrong type would otherwise surface late, or not at all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from ..errors import BNInsertError, CalibrationError, as_passed
from .text import first_line, usable_devices


def is_number(value: object) -> bool:
    """Return whether a value is a real number, of Python or NumPy.

    Examples:
        >>> is_number(1), is_number(0.5), is_number("0.5"), is_number(True)
        (True, True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Return whether a value is an integer, of Python or NumPy; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_list(values: object) -> bool:
    """Return whether values have a length and an order, as those of lists, tuples and arrays; a string is one value.

    Examples:
        >>> is_list(["cat", "dog"]), is_list({"cat", "dog"}), is_list("cat")
        (True, False, False)
    """
    return isinstance(values, Collection) and not isinstance(values, str | set | frozenset)


def as_tuple(values: Iterable[Any] | Any) -> tuple[Any, ...]:
    """Return values as a tuple; a string or a non-iterable becomes a tuple of one."""
    single = isinstance(values, str) or not isinstance(values, Iterable)
    return (values,) if single else tuple(values)


def check_dtype(argument: str, dtype: object) -> None:
    """Raise CalibrationError, naming the argument, for what is not a floating-point dtype."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CalibrationError(f"{argument} is {dtype!r:.40}; pass a floating-point dtype, such as torch.bfloat16")


def check_progress(progress: object) -> None:
    """Raise CalibrationError for what cannot be called with the number of images so far."""
    if progress is not None and not callable(progress):
        raise CalibrationError(f"progress is {progress!r:.40}; pass a function of the number of images so far, or None")


def check_functions(error: type[BNInsertError], functions: Mapping[str, object]) -> None:
    """Raise an error, naming the argument, for what is neither a function nor None."""
    for argument, function in functions.items():
        if function is not None and not callable(function):
            raise error(f"{argument} is {function!r:.40}; pass a function, or None")


def check_flags(error: type[BNInsertError], **flags: object) -> None:
    """Raise an error, naming the argument, for what is neither True nor False: the string "no" would count as true."""
    for argument, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise error(f"{as_passed(argument)} is {value!r:.40}; pass True or False")


def usable_device(device: torch.device | str, error: type[BNInsertError] = CalibrationError) -> torch.device:
    """Return a device after checking that this machine has it.

    Args:
        device: The device, or its name.
        error: Exception class to raise if it is not a device, or not usable.
    """
    given = f"{as_passed('device')} is {device!r:.40}"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):  # its message lists all kinds of devices that PyTorch was ever built for
        raise error(f"{given}, which is not a device; use {usable_devices()}") from None
    try:
        torch.zeros(1, device=found).item()
    except (AssertionError, ImportError, RuntimeError) as reason:
        # For a kind of device that this build of PyTorch lacks, the message names an operator.
        said = "" if isinstance(reason, NotImplementedError) else f" ({first_line(reason).split('. ')[0]})"
        raise error(f"{given}, which cannot be used on this machine{said}; use {usable_devices()}") from None
    return found
