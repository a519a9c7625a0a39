"""Exceptions raised by bn-insert; each message says what is wrong, where, and what to do.

What to do is often to pass another argument, which users of the command line know by the name of an option.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_names_options = ContextVar("names_options", default=False)


@contextmanager
def messages_name_options() -> Iterator[None]:
    """Let messages name the options of the command line instead of the arguments of functions."""
    token = _names_options.set(True)
    try:
        yield
    finally:
        _names_options.reset(token)


def as_passed(argument: str, value: object = ..., option: str = "") -> str:
    """Return an argument for a message, as the user passes it: in Python or, in a command, on the command line.

    Args:
        argument: Its name in Python.
        value: Its value; left out by default.
        option: What is passed on the command line; by default the option of the same name, and the value.

    Examples:
        >>> as_passed("train", "head"), as_passed("overwrite", True, "--force")
        ("train='head'", 'overwrite=True')
        >>> with messages_name_options():
        ...     as_passed("train", "head"), as_passed("resume", True), as_passed("overwrite", True, "--force")
        ('--train head', '--resume', '--force')
    """
    if not _names_options.get():
        return argument if value is ... else f"{argument}={value!r}"
    shown = "" if value is ... or value is True else f" {value}"
    return option or f"--{argument.replace('_', '-')}{shown}"


class BNInsertError(Exception):
    """Base class of all errors that a user can cause."""


class CheckpointError(BNInsertError):
    """A checkpoint cannot be read or written, or does not contain a network that can be rebuilt."""


class GraphError(BNInsertError):
    """The model cannot be traced, or a change that was requested is not possible in its graph."""


class CalibrationError(BNInsertError):
    """Batches yield no usable statistics: no data, too few values, or values that are not finite."""


class ImageError(BNInsertError):
    """A folder of images or a tensor file cannot be used as input."""


class TrainingError(BNInsertError):
    """A fine-tuning run cannot be started, continued or resumed as requested."""


class DivergenceError(TrainingError):
    """The loss, or the input of a BatchNorm, is no longer finite."""
