"""The data of training runs' reports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..errors import CheckpointError
from .provenance import versions

FORMAT = "bn-insert runs"


def run_report(
    name: str, settings: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the report of one training run as a JSON-ready dictionary.

    Args:
        name: The run's name in tables and legends.
        settings: The training settings.
        epochs: The metrics of each completed epoch, with the fields of `EpochMetrics`.
        facts: Further values, which the page lists as they are. `batchnorms`, the number of BatchNorm layers, is
            required.
    """
    best = max(epochs, key=lambda epoch: epoch["val_accuracy"], default=None)
    run = {"name": name, "settings": dict(settings), "best_epoch": best and best["epoch"]}
    return runs_report([run | dict(facts) | {"versions": versions(), "epochs": list(epochs)}])


def runs_report(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return several runs as one report, which compares them.

    Args:
        runs: The single run of each `run_report`, as `read_run` returns it.
    """
    return {"format": FORMAT, "version": 1, "runs": [dict(run) for run in runs]}


def read_run(path: Path) -> dict[str, Any]:
    """Return the run in a `report.json` written by `finetune`.

    Raises:
        CheckpointError: The file cannot be read or is not the report of exactly one training run.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; pass the output directory of a training run"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {error}; run finetune again, with --resume to rewrite the reports"
        ) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or len(data.get("runs", ())) != 1:
        raise CheckpointError(
            f"{path} is not the report of one training run; pass the output directory of a training run"
        )
    return cast("dict[str, Any]", data["runs"][0])
