"""Text for messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_LAYERS_SHOWN = 5


def printable(text: object) -> str:
    """Return text with control characters replaced by "?": those from an untrusted file could control the terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an s unless the number is one."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def listed(names: Sequence[str], most: int) -> str:
    """Return the first names, at most `most`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def untied_layers(layers: Sequence[str], reading: str) -> str:
    """Return the warning that layers no longer share a parameter.

    Args:
        layers: Their names.
        reading: How the checkpoint is read, as a clause.
    """
    return (
        f"{listed(layers, _LAYERS_SHOWN)} no longer share a parameter: {reading}, but load_state_dict of the original "
        "class would give all of them the same values"
    )


def with_article(value: object) -> str:
    """Return the name of a value's class with an article; "None" for None.

    Examples:
        >>> with_article(1), with_article(""), with_article(None)
        ('an int', 'a str', 'None')
    """
    if value is None:
        return "None"
    name = type(value).__name__
    if name[:2].isupper():  # letters that are spelled, as in "an LSTM" and "a UNet"
        vowel = name[0] in "AEFHILMNORSX"
    else:  # without "a Unet"
        vowel = name == "ndarray" or bool(re.match("(?!u[^aeiou][aeiou])[aeiou]", name, re.IGNORECASE))
    return f"{'an' if vowel else 'a'} {name}"


def figures(values: Iterable[float]) -> str:
    """Return numbers with up to four digits, separated by commas."""
    return ", ".join(f"{value:.4g}" for value in values)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def usable_devices() -> str:
    """Return names of devices that this machine has, as alternatives: cpu, cuda, the last of several GPUs, mps."""
    import torch  # noqa: PLC0415 - the command line imports this module for its help pages

    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ["cpu"] + ["cuda"] * (cuda > 0) + [f"cuda:{cuda - 1}"] * (cuda > 1)
    names += ["mps"] * torch.backends.mps.is_available()
    return " or ".join(map(repr, names))
