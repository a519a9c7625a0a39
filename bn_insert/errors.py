"""Exceptions raised by bn-insert; each message says what is wrong, where, and what to do."""

import errno
import re
from importlib import import_module

_OUT_OF_MEMORY = re.compile(
    r".*(allocate memory|out of memory|bad_alloc|failed to map segment|unable to mmap|can't start new thread).*",
    re.IGNORECASE,
)


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


def out_of_memory(error: Exception) -> str:
    """Return the reason if an error of Python, PyTorch or the dynamic linker says that memory or address space ran out.

    For any other error the result is empty.
    """
    if isinstance(error, RuntimeError | ImportError | OSError) and (found := _OUT_OF_MEMORY.search(str(error))):
        return found[0]
    is_lost = isinstance(error, SystemError) and "without" in str(error) and _address_space_is_limited()
    if is_lost or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return next(iter(str(error).splitlines()), "") or type(error).__name__
    return ""


def _address_space_is_limited() -> bool:
    """Return whether a limit is set, under which code in C may fail without saying why ("error without exception")."""
    try:
        resource = import_module("resource")  # POSIX alone has it
    except ImportError:
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
