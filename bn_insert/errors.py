"""Exceptions raised by bn-insert; each message says what is wrong, where, and what to do.

What to do is often to pass another argument, which users of the command line know by the name of an option.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module

_names_options = ContextVar("names_options", default=False)


@contextmanager
def messages_name_options(wanted: bool = True) -> Iterator[None]:
    """Make error messages name command-line options instead of Python arguments; with `wanted=False`, the reverse."""
    token = _names_options.set(wanted)
    try:
        yield
    finally:
        _names_options.reset(token)


def as_passed(argument: str, value: object = ..., option: str = "") -> str:
    """Format an argument for an error message: as a Python argument or, while a command runs, as a command-line option.

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


def values_as_passed(values: Iterable[object]) -> str:
    """Return several values for a message, as the user passes them: in Python or, in a command, separated by commas.

    Examples:
        >>> values_as_passed((0.0,))
        '(0.0,)'
        >>> with messages_name_options():
        ...     values_as_passed((0.0,)), values_as_passed([4, 8])
        ('0', '4,8')
    """
    if not _names_options.get():
        return f"{values!r:.60}"
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


_OUT_OF_MEMORY = re.compile(
    r".*(allocate memory|out of memory|bad_alloc|failed to map segment|unable to mmap|can't start new thread).*",
    re.IGNORECASE,
)
# In the messages of PyTorch's pooling and conv layers.
_TOO_SMALL = re.compile("output size is too small|kernel size can't be greater than actual input size", re.IGNORECASE)
_NO_GRADIENTS = "does not require grad"  # in the messages of torch.autograd.grad and backward()


class BNInsertError(Exception):
    """Base class of all errors that a user can cause."""


class CheckpointError(BNInsertError):
    """A checkpoint cannot be read or written, or does not contain a network that can be rebuilt."""


class UnneededKeyError(CheckpointError):
    """A key was passed for a checkpoint that is a state dict itself."""


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


def out_of_memory(error: Exception) -> str:
    """Return the message of an out-of-memory error of Python, PyTorch or the dynamic linker; "" for any other error."""
    if isinstance(error, RuntimeError | ImportError | OSError) and (found := _OUT_OF_MEMORY.search(str(error))):
        return found[0]
    is_lost = isinstance(error, SystemError) and "without" in str(error) and _address_space_is_limited()
    if is_lost or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return next(iter(str(error).splitlines()), "") or type(error).__name__
    return ""


def too_small(error: Exception) -> bool:
    """Return whether a PyTorch error means that the input is too small for the network."""
    return _TOO_SMALL.search(str(error)) is not None


def gradients_advice(error: Exception) -> str:
    """Return what to do if an error of PyTorch says that a forward computes gradients, for a message; else ""."""
    if _NO_GRADIENTS not in str(error):
        return ""
    return "Gradients are disabled here; if the forward needs them, compute them inside torch.enable_grad()"


def _address_space_is_limited() -> bool:
    """Return whether the address space is limited (ulimit -v): C code may then fail without setting an exception."""
    try:
        resource = import_module("resource")  # only on POSIX
    except ImportError:
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
