"""A report as a self-contained HTML page: it needs no network and no other file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from math import isnan
from pathlib import PurePath
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from . import adaptation, insertion
from .charts import adaptation_charts, agreement_chart, insertion_charts, run_charts
from .insertion_verdicts import next_command, verdicts
from .run_verdicts import best_epoch, identical_runs, on_different_images, ranked, run_health, runs_verdict, worst
from .verdict import Verdict

_FEWEST_BATCHES = 8  # an error estimated from the spread between fewer is not reliable
_GOOD_ERROR = 0.1  # of mean and std, relative to std
# With the value of an option if that is a number.
_COMMAND = re.compile(r"bn-insert [a-z]+(?:-[a-z]+)*|(?<![\w-])--?[a-z][a-z-]*(?: \d+(?:\.\d+)?(?:e-?\d+)?)?(?![\w-])")
_BATCH = 32  # images, for the error of the statistics of one training batch
# Settings that have an effect only if another one has a certain value.
_DEPENDENT: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("lr_scheduler", "step", ("lr_step_size", "lr_gamma")),
    ("opt", "sgd", ("momentum",)),
    ("batchnorm", "renorm", ("renorm_r_max", "renorm_d_max")),
    ("recalibrate", True, ("recalibration_images",)),
)


def page(data: Mapping[str, Any]) -> str:
    """Return the HTML page of a report on an insertion, an adaptation or training runs."""
    if data["format"] == insertion.FORMAT:
        return _render("insertion.html", _insertion(data))
    if data["format"] == adaptation.FORMAT:
        return _render("adaptation.html", _adaptation(data))
    return _render("runs.html", _runs(data["runs"]))


def _insertion(data: Mapping[str, Any]) -> dict[str, Any]:
    train_mode = data["train_mode"]
    agreements, renorm = train_mode["agreements"], train_mode["renorm"]
    inserted = [layer for layer in data["layers"] if "batchnorm" in layer]
    reliable = data["calibration"]["batches"] >= _FEWEST_BATCHES
    standard_errors = {layer["name"]: layer["batchnorm"]["standard_error"] for layer in inserted} if reliable else {}
    errors = {name: 3 * float(np.quantile(each, 0.99)) for name, each in standard_errors.items() if each}
    return {
        "data": data,
        "verdicts": verdicts(data),
        "next": next_command(data),
        "top1": not any(isnan(comparison["top1_agreement"]) for comparison in data["comparisons"].values()),
        "reliable": reliable,
        "errors": errors,
        "inexact": sum(error > _GOOD_ERROR for error in errors.values()),
        "batch_error": _batch_error(inserted, data["calibration"]["images"]) if reliable else None,
        "name": PurePath(data["checkpoint"]["path"]).name,
        "inserted": inserted,
        "after_activation": any(layer["batchnorm"]["behind"] != layer["name"] for layer in inserted),
        "constant": any(
            layer["batchnorm"][key] for layer in inserted for key in ("constant_channels", "near_constant_channels")
        ),
        "others": [layer for layer in data["layers"] if "batchnorm" not in layer],
        "charts": insertion_charts(data, errors=reliable),
        "agreement_chart": agreement_chart(agreements, renorm) if agreements else None,
        "renorm": {agreement["batch_size"]: agreement for agreement in renorm},
    }


def _adaptation(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "data": data,
        "name": PurePath(data["checkpoint"]["path"]).name,
        "target": PurePath(data["target"]["source"]).name,
        "total": adaptation.total(data["predictions"]["per_class"]),
        "charts": adaptation_charts(data),
    }


def _batch_error(inserted: Sequence[Mapping[str, Any]], images: int) -> float | None:
    """Return the error of the statistics of one training batch that follows from the measured standard errors."""
    errors = [layer["batchnorm"]["standard_error"] for layer in inserted]
    if not errors or not all(errors):
        return None
    return float(3 * np.median(np.concatenate(errors)) * np.sqrt(images / _BATCH))


def _runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    runs = ranked(runs)
    health = [_health(run) for run in runs]
    warnings = [
        verdict._replace(subject=run["name"])
        for run, found in zip(runs, health, strict=True)
        for verdict in found
        if verdict.state != "good"
    ]
    comparable = not on_different_images(runs)
    facts = [_flat(_effective(run)) | _flat(_facts(run)) for run in runs]
    names = dict.fromkeys(name for run in facts for name in run)
    rows = {name: [run.get(name, "") for run in facts] for name in names}
    different = {name: values for name, values in rows.items() if len(set(values)) > 1}
    return {
        "runs": runs,
        "best": [best_epoch(run) for run in runs],
        "health": health,
        "states": [worst(verdicts) for verdicts in health],
        "warnings": warnings if len(runs) > 1 else [],
        "charts": run_charts(runs),
        "comparable": comparable,
        "verdict": runs_verdict(runs) if comparable else "",
        "identical": identical_runs(runs),
        "different": different,
        "same": {name: values[0] for name, values in rows.items() if values[0] and name not in different},
    }


def _health(run: Mapping[str, Any]) -> list[Verdict]:
    """Return the verdicts on a run, even on one whose report predates them."""
    if "health" in run:
        return [Verdict(**verdict) for verdict in run["health"]]
    return run_health(run["epochs"], run["settings"], {})


def _effective(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that have an effect, with words for those whose None does not mean that there is none."""
    settings = run.get("settings", {})
    words = {"dropout": "as in the checkpoint", "head": "kept", "lr": "not chosen yet"}
    effective = {name: words.get(name) if value is None else value for name, value in settings.items()}
    for name, value, dependent in _DEPENDENT:
        if name in settings and settings[name] != value:
            for each in dependent:
                effective.pop(each, None)
    return effective


def _facts(run: Mapping[str, Any]) -> dict[str, Any]:
    shown_elsewhere = ("name", "settings", "epochs", "best_epoch", "health", "overview", "lr_trials")
    facts = {name: value for name, value in run.items() if name not in shown_elsewhere}
    if isinstance(data := facts.get("data"), Mapping):
        hidden = ("epochs_for_trials", "validation_digest")
        facts["data"] = {name: value for name, value in data.items() if name not in hidden}
    return facts


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values as one table of names and texts."""
    result: dict[str, str] = {}
    for name, value in values.items():
        title = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            result |= _flat(value, f"{title}: ")
        else:
            share = isinstance(value, float) and (name.endswith("accuracy") or name == "largest_class")
            result[title] = _percent(value) if share else _text(value)
    return result


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def _time(text: str) -> str:
    """Return a time in ISO format as people read it, in UTC; another text unchanged."""
    try:
        time = datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        return text
    return f"{time.day} {time:%b %Y, %H:%M} UTC"


def _prose(text: str) -> Markup:
    """Return text in which commands and options do not break at their hyphens."""
    return Markup(_COMMAND.sub(r'<code class="nowrap">\g<0></code>', str(escape(text))))


def _render(template: str, context: Mapping[str, Any]) -> str:
    return _environment().get_template(template).render(context)


@cache  # a training run writes a page an epoch, and compiling a template takes longer than filling it in
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bn_insert.report", "templates"),
        autoescape=True,  # names of files and layers may contain anything
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": lambda value: f"{value:.3g}",
        "loss": lambda value: f"{value:.4f}",
        "percent": _percent,
        "prose": _prose,
        "time": _time,
        "thousands": lambda value: f"{value:,}",
        "flat": _flat,
    }
    return environment
