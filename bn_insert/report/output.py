"""Reports as files: JSON, or an HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..support.files import StrPath, check_writable, real_path, write_atomically

_SUFFIXES = (".html", ".json")


def write_report(path: StrPath, data: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write a report atomically, as JSON or as a self-contained HTML page, depending on the file's suffix.

    Args:
        path: The output file, `.html` or `.json`.
        data: What `insertion_report`, `run_report` or `runs_report` returned.
        overwrite: Replace an existing file.

    Raises:
        CheckpointError: The suffix is neither of the two, the file exists and `overwrite` is false, or writing failed.
            An existing file is left unchanged.
    """
    text = _html if _suffix(path) == ".html" else _json

    def write(staged: Path) -> None:
        staged.write_text(text(data), encoding="utf-8")

    write_atomically(path, write, overwrite=overwrite)


def check_report(
    report: StrPath, checkpoint: StrPath | None = None, *, overwrite: bool, inputs: Iterable[StrPath] = ()
) -> None:
    """Check before the work that a report can be written.

    Args:
        report: The output file.
        checkpoint: The checkpoint that will be written by the same command, which the report must not replace.
        overwrite: Whether an existing file may be replaced.
        inputs: Files that the command reads, which the report must not replace either.

    Raises:
        CheckpointError: The suffix is neither .html nor .json, the report would replace the checkpoint or an input, or
            the file cannot be written.
    """
    _suffix(report)
    if checkpoint is not None and real_path(report) == real_path(checkpoint):
        raise CheckpointError(
            f"cannot write the report to {report}: the checkpoint is written there; choose another name for one of them"
        )
    check_writable(report, overwrite=overwrite, inputs=inputs)


def _suffix(report: StrPath) -> str:
    """Return the suffix of a report's name; raise CheckpointError for any but the two."""
    suffix = Path(report).suffix.lower()
    if suffix not in _SUFFIXES:
        raise CheckpointError(f"cannot write the report to {report}: use a name that ends in {' or '.join(_SUFFIXES)}")
    return suffix


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"


def _html(data: Mapping[str, Any]) -> str:
    from .page import page  # noqa: PLC0415 - matplotlib takes half a second to import

    return page(data)
