"""What an insertion or a training run did and found: as plain data, written as JSON or as a page."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..checkpoints.sidecar import sha256, sidecar_path
from ..compare.outputs import Comparison
from ..compare.train_mode import TrainModeAgreement, agreement_reading
from ..errors import CheckpointError
from ..graph.sites import Layer
from ..statistics.moments import Moments
from ..support.files import check_writable, real_path, write_atomically
from ..surgery.edges import Edge
from .page import INSERTION, RUNS, page

SUFFIXES = (".html", ".json")
# A channel whose std is below this fraction of its layer's median tells images apart hardly more than a constant one.
NEAR_CONSTANT = 0.01


def insertion_report(
    layers: Sequence[Layer],
    moments: Mapping[str, Moments],
    norms: Mapping[str, nn.Module],
    edges: Sequence[Edge],
    comparisons: Mapping[str, Comparison],
    *,
    agreements: Sequence[TrainModeAgreement] | str,
) -> dict[str, Any]:
    """Return layers, statistics per site and comparisons as JSON-ready data.

    Per layer: its name, kind, output shape, parameters, and either `batchnorm` (where it went, and count of values,
    mean, std, gamma and standard error per channel) or `reason` (why there is none). norms: the BatchNorms that went
    in, by layer. edges: what was equalized, or why not; empty without `equalize`, and with it `batchnorm` also has the
    gamma that would be there without. agreements: of train mode with eval mode, or why there are none.
    """
    return {
        "format": INSERTION,
        "version": 1,
        "layers": [_layer(layer, moments, norms, equalized=bool(edges)) for layer in layers],
        "edges": [asdict(edge) for edge in edges],
        "comparisons": {place: asdict(comparison) for place, comparison in comparisons.items()},
        "train_mode": _train_mode(agreements),
        "versions": versions(),
    }


def run_report(
    name: str, settings: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a training run's settings and epochs as JSON-ready data, with `facts` as they are."""
    best = max(epochs, key=lambda epoch: epoch["val_accuracy"], default=None)
    run = {"name": name, "settings": dict(settings), "best_epoch": best and best["epoch"]}
    return runs_report([run | dict(facts) | {"versions": versions(), "epochs": [dict(epoch) for epoch in epochs]}])


def runs_report(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return several runs as one report, which holds them against each other."""
    return {"format": RUNS, "version": 1, "runs": [dict(run) for run in runs]}


def read_run(path: Path) -> dict[str, Any]:
    """Return the run that a report.json of `finetune` tells of. Raises CheckpointError for any other file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; give the output folder of a run") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}; run finetune again, or with --resume") from error
    if not isinstance(data, dict) or data.get("format") != RUNS or len(data.get("runs", ())) != 1:
        raise CheckpointError(f"{path} is not the report of one training run; give the output folder of a run")
    return cast("dict[str, Any]", data["runs"][0])


def write_report(path: Path, data: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write a report whole or not at all: as JSON or as a page that needs nothing else, by the file's suffix.

    Raises CheckpointError.
    """
    check_suffix(path)

    def write(staged: Path) -> None:
        text = page(data) if path.suffix.lower() == ".html" else json.dumps(data, indent=2) + "\n"
        staged.write_text(text, encoding="utf-8")

    write_atomically(path, write, overwrite=overwrite)


def check_suffix(report: Path) -> None:
    """Raise CheckpointError for a file name that does not say which kind of report is meant."""
    if report.suffix.lower() not in SUFFIXES:
        raise CheckpointError(f"cannot write the report to {report}: give a name that ends in {' or '.join(SUFFIXES)}")


def check_report(report: Path, checkpoint: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if a report cannot be written there, or would take the place of checkpoint or settings."""
    check_suffix(report)
    taken = [real_path(checkpoint)]
    if checkpoint.suffix.lower() != ".safetensors":  # whose settings are in its header
        taken.append(sidecar_path(taken[0]))
    if real_path(report) in taken:
        raise CheckpointError(f"cannot write the report to {report}: the settings of {checkpoint} go there; rename it")
    check_writable(report, overwrite=overwrite)


def versions() -> dict[str, str]:
    """Return the versions of what the figures depend on."""
    packages = {name: version(name) for name in ("bn-insert", "torch", "torchvision")}
    return packages | {"python": platform.python_version(), "platform": platform.platform()}


def file_facts(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint's path, and size in bytes and SHA-256 where it is a file."""
    path = Path(path)
    return {"path": str(path)} | ({"bytes": path.stat().st_size, "sha256": sha256(path)} if path.is_file() else {})


def _layer(
    layer: Layer, moments: Mapping[str, Moments], norms: Mapping[str, nn.Module], *, equalized: bool
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "name": layer.name,
        "kind": layer.kind,
        "type": layer.type_name,
        "output_shape": list(layer.shape),
        "parameters": layer.parameters,
    }
    if layer.site is None:
        return result | {"reason": layer.reason}
    found, norm = moments[layer.name], norms[layer.name]
    eps = cast(float, norm.eps)
    near_constant = (found.std > 0) & (found.std < NEAR_CONSTANT * found.std.median())
    return result | {
        "batchnorm": {
            "behind": layer.site.anchor,
            "channels": found.channels,
            "constant_channels": found.constant_channels,
            "near_constant_channels": int(near_constant.sum()),
            "count": found.count,
            "mean": _numbers(found.mean),
            "std": _numbers(found.std),
            "standard_error": None if found.standard_error is None else _numbers(found.standard_error),
            "gamma": _numbers(cast(Tensor, norm.weight)),
        }
        | ({"gamma_before_equalization": _numbers((found.var + eps).sqrt())} if equalized else {})
    }


def _train_mode(agreements: Sequence[TrainModeAgreement] | str) -> dict[str, Any]:
    if isinstance(agreements, str):
        return {"agreements": [], "reading": f"It could not be measured: {agreements}"}
    return {"agreements": [asdict(each) for each in agreements], "reading": agreement_reading(agreements)}


def _numbers(values: Tensor) -> list[float]:
    return [float(value) for value in values.detach()]
