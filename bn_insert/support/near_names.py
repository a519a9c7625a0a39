"""Suggestions for a mistyped name or path."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from .text import printable

_CLOSE = 0.75  # of difflib's ratio: two letters in the wrong order in a name of five
_MOST_NAMES = 2
_MOST_ENTRIES = 10_000  # of a folder, which may have millions


def near_names(name: str, names: Iterable[str]) -> list[str]:
    """Return which names a mistyped name may mean: those with the same letters, or else similar ones; at most two.

    Case is ignored.

    Examples:
        >>> near_names("VGG61", ["vgg11", "vgg16"])
        ['vgg16']
    """
    by_key = {each.lower(): each for each in names}
    key = name.lower()
    swapped = [each for each in by_key if sorted(each) == sorted(key)]  # "fwe" for "few": too short for difflib
    return [by_key[each] for each in (swapped or get_close_matches(key, by_key, _MOST_NAMES, _CLOSE))[:_MOST_NAMES]]


def missing_folder(folder: Path) -> str:
    """Return the message that a folder does not exist, with a suggestion."""
    return f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist{did_you_mean(folder)}"


def did_you_mean(path: Path) -> str:
    """Return what a path that does not exist may mean, as " (did you mean model.pth?)", or "" if nothing is close.

    The first part of the path that does not exist is compared with its neighbors. A name with another suffix, or
    without one, is close too.
    """
    with suppress(OSError, ValueError):
        missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), None)
        if missing is not None and (names := _near(missing)):
            meant = [missing.with_name(name) / path.relative_to(missing) for name in names]
            if found := [printable(each) for each in meant if each.exists()]:
                return f" (did you mean {' or '.join(found)}?)"
    return ""


def _near(missing: Path) -> list[str]:
    names = [entry.name for entry in islice(missing.parent.iterdir(), _MOST_ENTRIES) if entry.exists()]
    found = near_names(missing.name, names)
    same_stem = sorted(name for name in names if Path(name).stem.lower() == missing.stem.lower())
    return [*found, *(name for name in same_stem if name not in found)][:_MOST_NAMES]
