"""What an insertion did and found, as plain data for machines."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from .atomic import check_writable, real_path
from .equalization import Edge
from .equivalence import Comparison
from .errors import CheckpointError
from .moments import Moments
from .sidecar import sha256, sidecar_path
from .sites import Layer


def insertion_report(
    layers: Sequence[Layer],
    moments: Mapping[str, Moments],
    edges: Sequence[Edge],
    comparisons: Mapping[str, Comparison],
) -> dict[str, Any]:
    """Return layers, statistics per site and comparisons as JSON-ready data.

    Per layer: its name, kind, output shape, parameters, and either `batchnorm` (where it went, and count of values,
    mean and std per channel) or `reason` (why there is none). edges: what was equalized,
    or why not; empty without `equalize`.
    """
    return {
        "format": "bn-insert report",
        "version": 1,
        "layers": [_layer(layer, moments) for layer in layers],
        "edges": [asdict(edge) for edge in edges],
        "comparisons": {place: asdict(comparison) for place, comparison in comparisons.items()},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what the figures depend on."""
    packages = {name: version(name) for name in ("bn-insert", "torch", "torchvision")}
    return packages | {"python": platform.python_version(), "platform": platform.platform()}


def file_facts(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint's path, and size in bytes and SHA-256 where it is a file."""
    path = Path(path)
    return {"path": str(path)} | ({"bytes": path.stat().st_size, "sha256": sha256(path)} if path.is_file() else {})


def check_report(report: Path, checkpoint: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if a report cannot be written there, or would take the place of checkpoint or settings."""
    if real_path(report) in (real_path(checkpoint), sidecar_path(real_path(checkpoint))):
        raise CheckpointError(f"cannot write the report to {report}: the settings of {checkpoint} go there; rename it")
    check_writable(report, overwrite=overwrite)


def _layer(layer: Layer, moments: Mapping[str, Moments]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "name": layer.name,
        "kind": layer.kind,
        "type": layer.type_name,
        "output_shape": list(layer.shape),
        "parameters": layer.parameters,
    }
    if layer.site is None:
        return result | {"reason": layer.reason}
    found = moments[layer.name]
    return result | {
        "batchnorm": {
            "behind": layer.site.anchor,
            "channels": found.channels,
            "constant_channels": found.constant_channels,
            "count": found.count,
            "mean": _numbers(found.mean),
            "std": _numbers(found.std),
        }
    }


def _numbers(values: Tensor) -> list[float]:
    return [float(value) for value in values]
