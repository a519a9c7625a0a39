"""Text for messages."""

from __future__ import annotations


def printable(text: object) -> str:
    """Return text that may go to a terminal: control characters from a stranger's file could steer it."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
