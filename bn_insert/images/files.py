"""The image files of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import ImageError
from ..support.near_names import missing_folder
from .decoding import SUFFIXES

IMAGE_SUFFIXES = tuple(sorted(suffix for suffixes in SUFFIXES.values() for suffix in suffixes))


def find_images(folder: str | Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted; subfolders may be classes or anything else.

    Files are recognized by their suffix, in upper or lower case; hidden files and folders are ignored. Links are
    followed, and a folder that can be reached in several ways is searched once.

    Raises:
        ImageError: When there is no such folder, when it or a subfolder cannot be read, and when it contains no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{missing_folder(folder)}; pass a folder of images ({', '.join(IMAGE_SUFFIXES)})")
    files = list(_visible_files(folder))
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        found = f"none of the {len(files)} files in it, subfolders included, ends" if files else "no file in it ends"
        raise ImageError(f"{folder} contains no image: {found} in {', '.join(IMAGE_SUFFIXES)}")
    return sorted(images, key=lambda path: path.parts)


def check_has_images(folder: str | Path) -> None:
    """Raise ImageError as `find_images` does, without listing the folder beyond its first image."""
    folder = Path(folder)
    if not folder.is_dir() or all(path.suffix.lower() not in IMAGE_SUFFIXES for path in _visible_files(folder)):
        find_images(folder)


def _visible_files(folder: Path) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            status = current.stat()
            with os.scandir(current) as listing:
                entries = sorted((entry for entry in listing if entry.name[0] != "."), key=lambda entry: entry.name)
        except OSError as error:
            raise ImageError(
                f"cannot read the folder {current}: {error.strerror}; fix its permissions or remove it"
            ) from error
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in reversed(entries):
            path = Path(entry.path)
            if _is_folder(entry):
                waiting.append(path)
            # A dangling link is listed, so that it is reported; a pipe is not, because reading it would block.
            elif path.is_file() or not path.exists():
                yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
