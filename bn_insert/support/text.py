"""Text for messages."""

from __future__ import annotations


def printable(text: object) -> str:
    """Return text that may go to a terminal: control characters from a stranger's file could steer it."""
    return "".join(character if character.isprintable() else "?" for character in str(text))
