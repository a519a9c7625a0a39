"""Docstrings as they are in the code -> Markdown: one list item a parameter, one code block an example.

The docstrings say `name: what it is.` in running text, which reads well in an editor and in `help()`. In a browser each
name wants a line of its own. Only names that the object really has begin one, so that other colons stay as they are.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# What begins a sentence on the whole function, behind the last parameter.
_BEHIND_ITEMS = re.compile(r" (?=(?:Raises|Source|Inside|In a torch|Every|Each|The model is)\b)")


class DocstringsAsMarkdown(griffe.Extension):
    """Rewrites each docstring when griffe, which mkdocstrings reads the code with, has collected its object."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Give each parameter its line."""
        _rewrite(func, [parameter.name for parameter in func.parameters if parameter.name != "self"])

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give each field its line."""
        _rewrite(cls, [name for name in cls.members if not name.startswith("_")])


def _rewrite(documented: griffe.Object, names: list[str]) -> None:
    if documented.docstring:
        documented.docstring.value = as_markdown(documented.docstring.value, names)


def as_markdown(docstring: str, names: list[str]) -> str:
    """Return a docstring with a list item for each `name: ...` or `name, name: ...` and a block for each example.

    >>> print(as_markdown("Add. left: one number. right: another. Raises nothing: ever.", ["left", "right"]))
    Add.
    <BLANKLINE>
    - **left**: one number.
    - **right**: another.
    <BLANKLINE>
    Raises nothing: ever.
    """
    paragraphs = re.split(r"\n\s*\n", docstring.strip())
    return "\n\n".join(_example(text) if text.startswith(">>>") else _items(text, names) for text in paragraphs)


def _example(text: str) -> str:
    return f"```pycon\n{text}\n```"


def _items(text: str, names: list[str]) -> str:
    """Begin a list item at each of the names that a colon follows, and a paragraph at what follows the last item."""
    if not names:
        return text
    name = "|".join(map(re.escape, names))
    flowing = " ".join(text.split())
    first, *rest = re.split(rf"(?:^|(?<=[.;)]) +)((?:{name})(?:, (?:{name}))*): ", flowing)
    if not rest:
        return text
    items = [f"- **{names}**: {text.strip()}" for names, text in zip(rest[::2], rest[1::2], strict=True)]
    last, *after = _BEHIND_ITEMS.split(items.pop(), maxsplit=1)
    return "\n\n".join(filter(None, [first.strip(), "\n".join([*items, last]), *after]))
