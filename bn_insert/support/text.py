"""Text for messages."""

from __future__ import annotations


def printable(text: object) -> str:
    """Return text with control characters replaced by "?": those from an untrusted file could control the terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(text))
