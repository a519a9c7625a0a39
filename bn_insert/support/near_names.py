"""Files and folders that a mistyped path may mean."""

from __future__ import annotations

from contextlib import suppress
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from .text import printable

_CLOSE = 0.75  # of difflib's ratio: two letters in the wrong order in a name of five
_MOST_NAMES = 2
_MOST_ENTRIES = 10_000  # of a folder, which may have millions


def missing_folder(folder: Path) -> str:
    """Return in words that there is no such folder, and what may be meant."""
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
    entries = (entry for entry in islice(missing.parent.iterdir(), _MOST_ENTRIES) if entry.exists())
    by_key = {entry.name.lower(): entry.name for entry in entries}
    name = missing.name.lower()
    found = [key for key in by_key if sorted(key) == sorted(name)]  # "fwe" for "few": too short for difflib
    found += [key for key in get_close_matches(name, by_key, _MOST_NAMES, _CLOSE) if key not in found]
    found += sorted(key for key in by_key if Path(key).stem == missing.stem.lower() and key not in found)
    return [by_key[key] for key in found[:_MOST_NAMES]]
