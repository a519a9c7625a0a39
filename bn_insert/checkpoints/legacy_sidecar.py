"""Settings that older versions of bn-insert wrote into a file beside a .pth: `vgg16.json` for `vgg16.pth`.

These versions replaced the two files in three steps: sidecar, checkpoint, sidecar. The sidecar of the first step
contains the new settings and, under "replaces", the old ones with the SHA-256 of the old checkpoint. If the process was
killed after that step, the digest shows which of the two belong to the existing checkpoint.

Sidecars are only read. A checkpoint that contains its settings never uses one, and none is written or removed.
"""

from __future__ import annotations

import hashlib
from io import BufferedReader
from pathlib import Path
from typing import Any

import msgspec

from ..errors import CheckpointError
from ..support.files import real_path
from ..support.schema import SchemaError, checked
from ..support.text import printable
from .settings import FORMAT, Settings, parse_document

_MAX_BYTES = 1 << 24  # the settings of thousands of layers are smaller; a larger file contains something else


class _Replaced(msgspec.Struct):
    sha256: str = ""
    settings: dict[str, Any] | None = None


def sidecar_path(checkpoint: Path) -> Path:
    """Return the path of the sidecar of a checkpoint."""
    path = checkpoint.with_suffix(".json")
    return path if path != checkpoint else checkpoint.with_name(checkpoint.name + ".json")


def read_sidecar(checkpoint: BufferedReader) -> Settings | None:
    """Return the settings in the sidecar of an open checkpoint file, or None if it has none.

    A JSON file that bn-insert did not write is ignored.

    Raises:
        CheckpointError: The sidecar is damaged; the message names the file and the wrong field.
    """
    path = sidecar_path(real_path(checkpoint.name))
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        document = parse_document(path.read_bytes())
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            return None
        replaced: _Replaced = checked(document.pop("replaces", {}), _Replaced, "replaces")
        if replaced.sha256 and replaced.sha256 == _sha256(checkpoint):
            document = replaced.settings
        return None if document is None else Settings.from_document(document)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    except (CheckpointError, SchemaError) as error:
        raise CheckpointError(
            f"{path}: {printable(error)}; correct the file, or delete it to read {Path(checkpoint.name).name} with "
            "PyTorch's defaults"
        ) from error


def _sha256(file: BufferedReader) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()
