"""Build a network with the user's own function, named as "package.module:function"."""

from __future__ import annotations

import importlib
import inspect
from operator import attrgetter
from typing import Any

from torch import nn

from ..errors import CheckpointError
from ..support.text import with_article
from ..surgery.history import FUNCTION


def make_network(name: str) -> nn.Module:
    """Import a function by name, call it without arguments, and return the network that it builds.

    This runs the user's code: the name must come from the user, never from a file.

    Args:
        name: "package.module:function". If the name leads to a module object, such as a network that is built when its
            file is imported, that object is returned.

    Raises:
        CheckpointError: The name is wrong, or the code raised an error; the message quotes it.

    Examples:
        >>> type(make_network("torch.nn:ReLU")).__name__
        'ReLU'
    """
    if not FUNCTION.fullmatch(name):
        raise CheckpointError(
            f"{name!r:.80} does not name a function; write package.module:function, such as torchvision.models:alexnet"
        )
    module, _, function = name.partition(":")
    found = _imported(name, module, function)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise CheckpointError(f"{name} is {with_article(found)}, not a function that returns a network")
    _check_needs_no_arguments(name, found)
    try:
        network = found()
    except (Exception, SystemExit) as error:
        raise CheckpointError(f"{name} raised {_described(error)}") from error
    if not isinstance(network, nn.Module):
        raise CheckpointError(f"{name} returned {with_article(network)}, not a torch.nn.Module")
    return network


def _imported(name: str, module: str, function: str) -> Any:
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise CheckpointError(f"importing {module} for {name} raised {_described(error)}") from error
        advice = f"write {module[:-3]}:{function}" if module.endswith(".py") else "run in the folder that contains it"
        raise CheckpointError(f"{name}: there is no module {module} to import; {advice}, or install it") from error
    except (Exception, SystemExit) as error:  # importing runs the user's code, which may raise anything
        raise CheckpointError(f"importing {module} for {name} raised {_described(error)}") from error
    try:
        return attrgetter(function)(imported)
    except AttributeError:
        raise CheckpointError(f"the module {module} has no {function}; check the spelling of {name}") from None


def _check_needs_no_arguments(name: str, function: Any) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some callables written in C have no signature
    try:
        signature.bind()
    except TypeError as error:
        raise CheckpointError(
            f"{name}{signature} cannot be called without arguments ({error}); name a function that takes none and "
            "calls this one with the arguments it needs"
        ) from None


def _described(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
