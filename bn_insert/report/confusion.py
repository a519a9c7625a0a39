"""A confusion matrix as a picture: PNG, SVG or PDF."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..support.files import StrPath, check_writable, write_atomically

_SUFFIXES = (".png", ".svg", ".pdf")
_MOST_NUMBERS = 25  # classes up to which each cell has its number
_MOST_NAMES = 80  # classes up to which each row has its name
_LONGEST_NAME = 24
_BOXES = re.compile("last ?resort|blank", re.IGNORECASE)  # fonts that have a box, or nothing, for every character
_CELL = 0.34  # inches
_SMALLEST, _LARGEST = 2.4, 14.0


def check_confusion_matrix(path: StrPath, *, overwrite: bool = False) -> None:
    """Check before the work that `write_confusion_matrix` can write a file; raises CheckpointError if not."""
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise CheckpointError(
            f"cannot write the confusion matrix to {path}: use a name that ends in {', '.join(_SUFFIXES[:-1])} or "
            f"{_SUFFIXES[-1]}"
        )
    check_writable(path, overwrite=overwrite)


def write_confusion_matrix(
    path: StrPath, classes: Sequence[str], confusion: Sequence[Sequence[int]], *, overwrite: bool = False
) -> dict[int, str]:
    """Write a confusion matrix as a picture, atomically; its suffix determines the format.

    A row is colored by the fraction of its images, so that classes with few images can be compared with large ones. A
    class whose name has a character that no installed font has is shown by its number, such as #3, counted from 0.

    Args:
        path: The output file, `.png`, `.svg` or `.pdf`.
        classes: Names of the classes.
        confusion: Number of images by class (rows) and predicted class (columns).
        overwrite: Replace an existing file.

    Returns:
        The names of the classes that are shown by their numbers, by number.

    Raises:
        CheckpointError: The suffix is none of these, the file exists and `overwrite` is false, or writing failed. An
            existing file is left unchanged.
    """
    check_confusion_matrix(path, overwrite=overwrite)

    labels, families = _labels(classes) if len(classes) <= _MOST_NAMES else ([], [])

    def write(staged: Path) -> None:
        figure = _figure(labels, families, confusion)
        figure.savefig(staged, format=Path(path).suffix.lower()[1:], dpi=120)

    write_atomically(path, write, overwrite=overwrite)
    return {number: classes[number] for number, label in enumerate(labels) if label == _numbered(number)}


def _labels(classes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what the picture shows of each class, and the families of fonts that have all of its characters."""
    labels = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..." for name in classes]
    families, missing = _families({*"".join(labels)})
    return [
        _numbered(number) if missing.intersection(label) else label for number, label in enumerate(labels)
    ], families


def _numbered(number: int) -> str:
    return f"#{number}"


def _families(characters: set[str]) -> tuple[list[str], set[str]]:
    """Return the families of installed fonts that have characters, the usual one first, and those that none has."""
    from matplotlib import font_manager, rcParams  # noqa: PLC0415 - with matplotlib, half a second

    families, missing = list(rcParams["font.family"]), set(characters)
    usual = {name: font_manager.findfont(font_manager.FontProperties(family=[name])) for name in families}
    # Not by findfont, which logs a warning for each family that has no regular face.
    installed = {font.name: font.fname for font in font_manager.fontManager.ttflist if not _BOXES.search(font.name)}
    for family, path in [*usual.items(), *sorted(installed.items())]:
        if not missing:
            break
        glyphs = font_manager.get_font(path).get_charmap()
        if found := {character for character in missing if ord(character) in glyphs}:
            families.append(family)
            missing -= found
    return list(dict.fromkeys(families)), missing


def _figure(labels: Sequence[str], families: Sequence[str], confusion: Sequence[Sequence[int]]) -> Any:
    import numpy as np  # noqa: PLC0415 - with matplotlib, half a second that only this function needs
    from matplotlib.figure import Figure  # noqa: PLC0415 - without pyplot, which would look for a display

    counts = np.array(confusion)
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(max(_CELL * len(counts), _SMALLEST), _LARGEST)
    figure = Figure(figsize=(size + 2.5, size + 1.8), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="fraction of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    if labels:
        # A dollar sign in the name of a class starts no formula. There are 72 points to an inch.
        style: dict[str, Any] = {
            "parse_math": False,
            "fontsize": min(9.0, 50 * size / len(labels)),
            "fontfamily": families,
        }
        axes.set_xticks(range(len(labels)), labels, rotation=90, **style)
        axes.set_yticks(range(len(labels)), labels, **style)
    if len(counts) <= _MOST_NUMBERS:
        for row, column in zip(*counts.nonzero(), strict=True):
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=color, fontsize=8)
    return figure
