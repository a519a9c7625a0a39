"""What a result was produced with: software versions and input files."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def versions() -> dict[str, str]:
    """Return the versions of the software that measurements depend on, and the platform."""
    packages = {name: version(name) for name in ("bn-insert", "torch", "torchvision")}
    return packages | {"python": platform.python_version(), "platform": platform.platform()}


def file_facts(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint's path, and its size in bytes and SHA-256 if it is a file.

    Args:
        path: A file, or the name of one of torchvision's pretrained models.
    """
    path = Path(path)
    if not path.is_file():
        return {"path": str(path)}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": digest}
