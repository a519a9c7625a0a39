"""The data of training runs' reports."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec

from ..errors import CheckpointError, as_passed
from ..support.files import StrPath
from ..support.near_names import did_you_mean
from ..support.schema import Count, Finite, Fraction, SchemaError, check_depth, checked
from ..support.text import counted, printable
from .provenance import versions
from .run_verdicts import run_health

FORMAT = "bn-insert runs"
_ADVICE = "pass the output directory of a training run"
_MAX_BYTES = 1 << 26  # thousands of epochs are smaller


def run_report(
    name: str, settings: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the report of one training run as a JSON-ready dictionary.

    Args:
        name: The run's name in tables and legends.
        settings: The training settings.
        epochs: The metrics of each completed epoch, with the fields of `EpochMetrics`.
        facts: Further values, which the page lists as they are. `batchnorms`, the number of BatchNorm layers, is
            required; the verdicts on the run need `data` and `output_fit`, as for `run_health`, and `lr_trials`, a list
            of dictionaries with `lr` and `loss`, None if it diverged; `overview` is a dictionary of texts that the page
            of a single run shows first.
    """
    best = max(epochs, key=lambda epoch: epoch["val_accuracy"], default=None)
    trials = {trial["lr"]: math.inf if trial["loss"] is None else trial["loss"] for trial in facts.get("lr_trials", ())}
    found = run_health(epochs, settings, facts.get("data", {}), output_fit=facts.get("output_fit"), trials=trials)
    health = [verdict._asdict() for verdict in found]
    run = {"name": name, "settings": dict(settings), "best_epoch": best and best["epoch"], "health": health}
    return runs_report([run | dict(facts) | {"versions": versions(), "epochs": list(epochs)}])


def runs_report(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return several runs as one report, which compares them.

    Args:
        runs: The single run of each `run_report`, as `read_run` returns it.
    """
    return {"format": FORMAT, "version": 1, "runs": [dict(run) for run in runs]}


class _Epoch(msgspec.Struct):
    epoch: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
    step: Count
    lr: Finite
    train_loss: Finite
    train_accuracy: Fraction
    val_loss: Finite
    val_accuracy: Fraction
    seconds: Finite


class _Verdict(msgspec.Struct):
    state: Literal["good", "check", "bad"]
    subject: str
    text: str


class _Run(msgspec.Struct):
    """What pages need of a run; they show whatever else it has."""

    name: str
    settings: dict[str, Any]
    epochs: list[_Epoch]
    batchnorms: Count
    best_epoch: Count | None
    health: list[_Verdict] = []
    overview: dict[str, str] = {}


def read_run(path: StrPath) -> dict[str, Any]:
    """Return the run in a `report.json` written by `finetune`.

    Raises:
        CheckpointError: The file cannot be read or is not the report of exactly one training run; the message names
            the file and the wrong field.
    """
    path = Path(path)
    try:
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} has more than {_MAX_BYTES:,} bytes; {_ADVICE}")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        folder = path.parent
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; {_ADVICE}") from error
        if not folder.exists():
            raise CheckpointError(f"{folder} does not exist{did_you_mean(folder)}; {_ADVICE}") from error
        if found := len(list(folder.glob("*/report.json"))):
            raise CheckpointError(
                f"{folder} contains {counted(found, 'run')}; pass {printable(folder / '*')} to compare them"
            ) from error
        advice = _rewriting() if (folder / "state.pth").exists() else _ADVICE
        raise CheckpointError(f"{path} cannot be read: {error.strerror}{did_you_mean(path)}; {advice}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; {_rewriting()}") from error
    runs = data.get("runs") if isinstance(data, dict) and data.get("format") == FORMAT else None
    if not isinstance(runs, list) or len(runs) != 1:
        raise CheckpointError(f"{path} is not the report of one training run; {_ADVICE}")
    try:
        checked(runs[0], _Run)
        check_depth(runs[0])
    except SchemaError as error:
        raise CheckpointError(f"{path} is damaged: {printable(error)}; {_rewriting()}") from error
    return cast("dict[str, Any]", runs[0])


def _rewriting() -> str:
    return f"run finetune again, with {as_passed('resume', True)} to rewrite the reports"
