"""A confusion matrix as a picture: PNG, SVG or PDF."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..support.files import StrPath, check_writable, write_atomically

_SUFFIXES = (".png", ".svg", ".pdf")
_MOST_NUMBERS = 25  # classes up to which each cell has its number
_MOST_NAMES = 80  # classes up to which each row has its name
_LONGEST_NAME = 24
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
) -> None:
    """Write a confusion matrix as a picture, atomically; its suffix determines the format.

    A row is colored by the fraction of its images, so that classes with few images can be compared with large ones.

    Args:
        path: The output file, `.png`, `.svg` or `.pdf`.
        classes: Names of the classes.
        confusion: Number of images by class (rows) and predicted class (columns).
        overwrite: Replace an existing file.

    Raises:
        CheckpointError: The suffix is none of these, the file exists and `overwrite` is false, or writing failed. An
            existing file is left unchanged.
    """
    check_confusion_matrix(path, overwrite=overwrite)

    def write(staged: Path) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as an empty box
            _figure(classes, confusion).savefig(staged, format=Path(path).suffix.lower()[1:], dpi=120)

    write_atomically(path, write, overwrite=overwrite)


def _figure(classes: Sequence[str], confusion: Sequence[Sequence[int]]) -> Any:
    import numpy as np  # noqa: PLC0415 - with matplotlib, half a second that only this function needs
    from matplotlib.figure import Figure  # noqa: PLC0415 - without pyplot, which would look for a display

    counts = np.array(confusion)
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(max(_CELL * len(classes), _SMALLEST), _LARGEST)
    figure = Figure(figsize=(size + 2.5, size + 1.8), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="fraction of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(classes) <= _MOST_NAMES:
        # A dollar sign in the name of a class starts no formula.
        names = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..." for name in classes]
        fontsize = min(9.0, 50 * size / len(classes))  # points: 72 to an inch
        axes.set_xticks(range(len(classes)), names, rotation=90, parse_math=False, fontsize=fontsize)
        axes.set_yticks(range(len(classes)), names, parse_math=False, fontsize=fontsize)
    if len(classes) <= _MOST_NUMBERS:
        for row, column in zip(*counts.nonzero(), strict=True):
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=color, fontsize=8)
    return figure
