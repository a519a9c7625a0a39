"""The settings file beside a .pth: `vgg16.json` for `vgg16.pth`.

A checkpoint and its sidecar are two files, and no file system replaces two files at once. So a replacement goes
sidecar, checkpoint, sidecar: the first sidecar holds the new settings and under "replaces" the old ones together with
the SHA-256 of the old checkpoint. Killed before the checkpoint is renamed, the digest says that the old settings hold;
killed after it, that the new ones do. The last sidecar is without "replaces", so that in the end nothing is hashed in
reading, and a checkpoint that its owner trained on and saved over keeps its settings. A first checkpoint is written in
the same order, and a sidecar with "replaces" that stands alone is known to be left over from a kill.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..support.text import printable
from .settings import FORMAT, Settings, format_document, parse_document

# The settings of thousands of layers are smaller; a larger file is somebody's data and not worth parsing.
_LARGEST_SIDECAR = 1 << 24


def sidecar_path(checkpoint: Path) -> Path:
    """Return where the settings of a checkpoint stand."""
    path = checkpoint.with_suffix(".json")
    return path if path != checkpoint else checkpoint.with_name(checkpoint.name + ".json")


def read_sidecar(checkpoint: Path) -> Settings | None:
    """Return the settings that stand beside a checkpoint, or None if there are none.

    JSON without our format's mark is somebody else's file and is passed over.  Raises CheckpointError with the file
    and the field that is wrong.
    """
    path = sidecar_path(checkpoint)
    try:
        document = _own_document(path)
        if document is None:
            return None
        replaced = document.get("replaces", {})
        if not isinstance(replaced, dict) or not isinstance(replaced.get("settings"), dict | None):
            raise CheckpointError('the field "replaces" is not what bn-insert writes')
        if "sha256" in replaced and replaced["sha256"] == sha256(checkpoint):
            document = replaced.get("settings")
        return None if document is None else Settings.from_document(document)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: {printable(error)}; correct the file, or delete it and read {checkpoint.name} with "
            "PyTorch's defaults"
        ) from error


def is_left_over(checkpoint: Path) -> bool:
    """Say whether the settings stand there without checkpoint because the process that wrote both was killed."""
    try:
        document = None if checkpoint.exists() else _own_document(sidecar_path(checkpoint))
    except (OSError, CheckpointError):
        return False
    return document is not None and "replaces" in document


def is_foreign(sidecar: Path) -> bool:
    """Say whether a file stands there that bn-insert has not written, nor damaged in what it had."""
    try:
        return sidecar.is_file() and _own_document(sidecar) is None
    except (OSError, CheckpointError):
        return False


def transitional_json(settings: Settings, checkpoint: Path) -> str:
    """Return a sidecar's text that is right for the checkpoint that is there now, and for one that will replace it.

    settings: of the checkpoint to come.
    """
    if not checkpoint.exists():
        return format_document(settings.to_document() | {"replaces": {}})
    try:
        old = read_sidecar(checkpoint)
    except CheckpointError:
        old = None  # a sidecar that cannot be read says nothing that could be kept
    replaced = {"sha256": sha256(checkpoint), "settings": None if old is None else old.to_document()}
    return format_document(settings.to_document() | {"replaces": replaced})


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_document(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file() or path.stat().st_size > _LARGEST_SIDECAR:
        return None
    document = parse_document(path.read_bytes())
    return document if isinstance(document, dict) and document.get("format") == FORMAT else None
