"""Text for messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def printable(text: object) -> str:
    """Return text with control characters replaced by "?": those from an untrusted file could control the terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an s unless the number is one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str], most: int) -> str:
    """Return the first names, at most `most`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def figures(values: Iterable[float]) -> str:
    """Return numbers with up to four digits, separated by commas."""
    return ", ".join(f"{value:.4g}" for value in values)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
