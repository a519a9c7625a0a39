"""Tables and figure of the study, from the lines of its runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from .cases import CASES
from .methods import METHODS

Line = dict[str, Any]
COLOURS = {"plain": "#8a8a8a", "fresh": "#4c78a8", "other": "#e0a030"}
INTRODUCTION = """# What inserted BatchNorm gains in fine-tuning

`python -m benchmarks.finetuning` produces these tables from `study.jsonl`. Every method searches its own learning rate
on validation images (factor 3.16, seed 0); test images choose nothing. Warm-up over a tenth of the steps, cosine,
weight decay 1e-4 on weights, dropout off unless a row says otherwise, running statistics re-estimated on 512 training
images before each evaluation. "Test" is the mean over the seeds with its standard error over seeds; "after a quarter"
is the validation accuracy after a quarter of the steps, mean over seeds. A new output layer starts from zeros unless a
row says otherwise. The CIFAR network has a test accuracy of 83.6% (84.6% in the tables on contrast and on a fitted
output layer), the one whose own BatchNorm is folded 84.2% on the 3,000 images that it was validated with.
"""


@dataclass(frozen=True)
class Outcome:
    """What a method reached in a case, at the learning rate that validation images chose."""

    method: str
    rate: int
    runs: tuple[Line, ...]
    rates: tuple[int, ...]

    @property
    def test(self) -> float:
        """Mean test accuracy over the seeds."""
        return mean(run["test"] for run in self.runs)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over the seeds; NaN for one seed."""
        tests = [run["test"] for run in self.runs]
        return stdev(tests) / math.sqrt(len(tests)) if len(tests) > 1 else math.nan

    @property
    def early(self) -> float:
        """Mean validation accuracy after a quarter of the steps."""
        quarter = min(point["step"] for point in self.runs[0]["accuracies"] if point["step"])
        points = [point for run in self.runs for point in run["accuracies"] if point["step"] == quarter]
        return mean(point["validation"] for point in points)

    @property
    def before(self) -> float | None:
        """Test accuracy before training, where the network knows the classes."""
        before = [run["test_before"] for run in self.runs]
        return None if None in before else mean(before)


def outcomes(lines: Iterable[Line], case: str) -> list[Outcome]:
    """Return the outcome of each method in a case, in the order of the study."""
    runs = [line for line in lines if line["case"] == case]
    found = []
    for method in dict.fromkeys(line["method"] for line in runs):
        of_method = [line for line in runs if line["method"] == method]
        searched = [line for line in of_method if line["seed"] == 0]
        best = max(searched, key=_validation)["rate"]
        chosen = tuple(line for line in of_method if line["rate"] == best)
        found.append(Outcome(method, best, chosen, tuple(sorted(line["rate"] for line in searched))))
    return found


def _validation(line: Line) -> float:
    return float(line["accuracies"][-1]["validation"]) if line["finite"] else 0.0


def rate_of(index: int) -> str:
    """Return a learning rate as text: 0.001, 0.0003."""
    return f"{float(f'{10 ** (index / 2):.0e}'):g}"


def write_tables(lines: list[Line], path: Path) -> None:
    """Write one table per case."""
    machines = sorted({line["machine"] for line in lines})
    sections = [_table(lines, name) for name in CASES if any(line["case"] == name for line in lines)]
    path.write_text("\n\n".join([INTRODUCTION.rstrip(), *sections, *machines]) + "\n")


def _table(lines: list[Line], name: str) -> str:
    case = CASES[name]
    rows = [
        "| method | learning rate | searched | seeds | before | after a quarter | test |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes(lines, name):
        before = "" if outcome.before is None else f"{outcome.before:.3f}"
        searched = f"{rate_of(outcome.rates[0])} to {rate_of(outcome.rates[-1])}"
        error = "" if math.isnan(outcome.standard_error) else f" ± {outcome.standard_error:.3f}"
        method = METHODS[outcome.method]
        rows.append(
            f"| {method.title} | {rate_of(outcome.rate)} | {searched} | {len(outcome.runs)} | {before} "
            f"| {outcome.early:.3f} | {outcome.test:.3f}{error} |"
        )
    heading = f"## {case.title[0].upper()}{case.title[1:]}"
    steps = next(line["steps"] for line in lines if line["case"] == name)
    return "\n".join([heading, "", f"{steps} steps of {case.batch} images.", "", *rows])


def write_figure(lines: list[Line], path: Path) -> None:
    """Draw the test accuracy of every method, one row per case."""
    names = [name for name in CASES if any(line["case"] == name for line in lines)]
    figure = Figure(figsize=(8, 0.9 + 0.55 * len(names)), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        found = outcomes(lines, name)
        axes.axhline(row, color="#eeeeee", linewidth=6, zorder=0)
        for outcome in found:
            method = METHODS[outcome.method]
            kind = "plain" if not method.layers else "fresh" if method.fresh else "other"
            axes.scatter(outcome.test, row, color=COLOURS[kind], s=34, zorder=2, edgecolor="white", linewidth=0.6)
        best = max(found, key=lambda outcome: outcome.test)
        axes.annotate(
            best.method,
            (best.test, row),
            xytext=(0, 7),
            textcoords="offset points",
            fontsize=7,
            ha="center",
            color="#555555",
        )
    for label, colour in (("no BatchNorm", "plain"), ("fresh BatchNorm", "fresh"), ("bn-insert", "other")):
        axes.scatter([], [], color=COLOURS[colour], label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, each method at its best learning rate")
    axes.legend(loc="lower left", frameon=False, fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=150)
