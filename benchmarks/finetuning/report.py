"""Results of the fine-tuning benchmark -> a Markdown table and a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median, median_low

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .runs import BATCH, CALIBRATION_IMAGES, METHODS, MOMENTUM, Result

GOOD = 0.9
SEEDS = 3
ADVISED = (0.003, 0.01)
COLOURS = {
    "none": "#777777",
    "head": "#b0a080",
    "fresh": "#4c78a8",
    "identity": "#e0a030",
    "equalized": "#2a9d5c",
}
_COMPARISON = (
    "Each method uses re-estimated statistics and one learning rate for both input ranges: the one with the best\n"
    "worst-case accuracy. Training without BatchNorm uses the best learning rate for each input range."
)


@dataclass(frozen=True)
class Curve:
    """A method at one data set and input range, its statistics re-estimated before validation or not."""

    method: str
    recalibrated: bool
    results: tuple[Result, ...]

    @property
    def label(self) -> str:
        """The method in words."""
        suffix = ", re-estimated" if self.recalibrated else ""
        return METHODS[self.method] + suffix

    @property
    def final(self) -> bool:
        """Whether these figures are what the method is judged by: re-estimated where there is something to."""
        return self.recalibrated or self.method == "none"

    @cached_property
    def learning_rates(self) -> list[float]:
        """The learning rates that were run."""
        return sorted({result.setting.learning_rate for result in self.results})

    @property
    def steps(self) -> list[int]:
        """The steps after which accuracy was measured."""
        return sorted({measurement.step for result in self.results for measurement in result.measurements})

    def seeds(self, learning_rate: float) -> list[Result]:
        """The runs at a learning rate."""
        return [result for result in self.results if result.setting.learning_rate == learning_rate]

    def accuracy(self, learning_rate: float, step: int | None = None) -> float | None:
        """The median over seeds after a step (default: the last), None if most runs' losses were not finite."""
        accuracies = [self._accuracy(result, step) for result in self.seeds(learning_rate)]
        finite = [accuracy for accuracy in accuracies if accuracy is not None]
        failed = [0.0] * (len(accuracies) - len(finite))
        if len(failed) >= len(finite):
            return None
        return median_low(finite + failed) if failed else median(finite)

    def finite(self, learning_rate: float) -> bool:
        """Whether most runs' losses stayed finite."""
        return self.accuracy(learning_rate) is not None

    def best(self) -> tuple[float, float]:
        """The best accuracy after the last step, and its learning rate."""
        return max((self.accuracy(rate) or 0.0, rate) for rate in self.learning_rates)

    def steps_to(self, accuracy: float, learning_rates: Iterable[float] | None = None) -> tuple[int, float] | None:
        """The first measured step whose median reaches the accuracy, and the learning rate that does it."""
        rates = self.learning_rates if learning_rates is None else learning_rates
        reached = [
            (step, rate) for rate in rates for step in self.steps if (self.accuracy(rate, step) or 0.0) >= accuracy
        ]
        return min(reached, default=None)

    def largest_that_trains(self) -> float | None:
        """The largest learning rate with a good accuracy after the last step."""
        return max((rate for rate in self.learning_rates if (self.accuracy(rate) or 0.0) >= GOOD), default=None)

    def largest_that_survives(self) -> float | None:
        """The largest learning rate whose losses stay finite."""
        return max((rate for rate in self.learning_rates if self.finite(rate)), default=None)

    def _accuracy(self, result: Result, step: int | None) -> float | None:
        if result.failed_at is not None and (step is None or step >= result.failed_at):
            return None
        measured = result.measurements[-1] if step is None else next(m for m in result.measurements if m.step == step)
        return measured.recalibrated_accuracy if self.recalibrated else measured.accuracy


def write_table(results: Sequence[Result], path: Path) -> None:
    """Write the Markdown report."""
    results = _with_most_steps(results)
    sections = [_heading(results)]
    for dataset, input_range in _panels(results):
        curves = _curves(results, dataset, input_range)
        sections += [f"## {dataset}, pixels {input_range}", _accuracies(curves), _by_steps(curves), _summary(curves)]
    sections += ["## Comparison with training without BatchNorm", _COMPARISON, _comparison(results)]
    path.write_text("\n\n".join(sections) + "\n")


def write_figure(results: Sequence[Result], path: Path) -> None:
    """Write the figure: accuracy over learning rate, a panel for each data set and input range."""
    results = _with_most_steps(results)
    panels = _panels(results)
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(11, 3.6 * rows + 1.2), layout="constrained")
    axes = figure.subplots(rows, 2, sharey=True, squeeze=False)
    for axis, (dataset, input_range) in zip(axes.flat, panels, strict=False):
        for curve in _curves(results, dataset, input_range):
            _draw(axis, curve)
        axis.set(xscale="log", xlabel="learning rate", title=f"{dataset}, pixels {input_range}", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    figure.supylabel(f"validation accuracy after {results[0].setting.steps} steps (median)", fontsize="medium")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=130)


def _draw(axis: Axes, curve: Curve) -> None:
    points = [(rate, curve.accuracy(rate)) for rate in curve.learning_rates]
    rates = [rate for rate, accuracy in points if accuracy is not None]
    accuracies = [accuracy for _, accuracy in points if accuracy is not None]
    style = "-" if curve.final else ":"
    axis.plot(rates, accuracies, style, marker="o", markersize=4, color=COLOURS[curve.method], label=curve.label)
    died = [rate for rate, accuracy in points if accuracy is None]
    axis.plot(died, [0.02] * len(died), "x", color=COLOURS[curve.method])


def _heading(results: Sequence[Result]) -> str:
    setting = results[0].setting
    precisions = sorted({result.setting.precision for result in results})
    environment = results[-1].environment
    return f"""# Fine-tuning after inserting BatchNorm

Produced by `python -m benchmarks.finetuning` from the runs in `finetuning.jsonl`; last run {environment["date"]} on
{environment["processor"]}, torch {environment["torch"]}, torchvision {environment["torchvision"]}, CPU.
Compute precision: {", ".join(map(_precision, precisions))}.

The network consists of VGG16's pretrained conv layers and a new head (dense 512-256, ReLU, dense 256-10) that is
attached after inserting; in every row but the first, the head has a fresh BatchNorm before the ReLU. Training: 48x48
images, SGD with momentum {MOMENTUM}, batch size {BATCH}, constant learning rate, {setting.steps} steps, all layers.
The figures are validation accuracies (200 images: one image is 0.005, one standard error at 0.97 is 0.012), medians
over {SEEDS} seeds; an asterisk marks fewer seeds. The seed determines the initial weights of the head and the order of
the batches. "Re-estimated": the statistics of all BatchNorm layers were re-estimated on {CALIBRATION_IMAGES} training
images before validation. "nan": the loss was not finite for most seeds. "-": not run. A learning rate trains if the
accuracy after the last step is at least {GOOD:g}. Learning rates are in parentheses.

The datasets: scikit-learn's digits, enlarged; and gray 48x48 crops of ten of scikit-image's pictures, to be classified
by picture (training crops from the left 60% of each picture, validation crops from the right 35%)."""


def _precision(name: str) -> str:
    return "float32" if name == "float32" else "bfloat16 by autocast, weights and statistics float32"


def _with_most_steps(results: Sequence[Result]) -> list[Result]:
    """The runs of one table: those with the most steps."""
    steps = max(result.setting.steps for result in results)
    return [result for result in results if result.setting.steps == steps]


def _panels(results: Sequence[Result]) -> list[tuple[str, str]]:
    panels = {(result.setting.dataset, result.setting.input_range) for result in results}
    return sorted(panels, key=lambda panel: (panel[0], panel[1] != "0..1"))


def _curves(results: Sequence[Result], dataset: str, input_range: str) -> list[Curve]:
    curves = []
    for method in METHODS:
        chosen = tuple(
            result
            for result in results
            if (result.setting.dataset, result.setting.input_range, result.setting.method)
            == (dataset, input_range, method)
        )
        if chosen:
            curves += [Curve(method, recalibrated, chosen) for recalibrated in (False, True)[: 1 + (method != "none")]]
    return curves


def _accuracies(curves: Sequence[Curve]) -> str:
    rates = sorted({rate for curve in curves for rate in curve.learning_rates})
    rows = [["method", *(f"{rate:g}" for rate in rates)]]
    for curve in curves:
        cells = [_cell(curve, rate) for rate in rates]
        rows.append([curve.label, *cells])
    return _table(rows)


def _cell(curve: Curve, rate: float, step: int | None = None) -> str:
    if not curve.seeds(rate):
        return "-"
    accuracy = curve.accuracy(rate, step)
    mark = "*" if len(curve.seeds(rate)) < SEEDS else ""
    return ("nan" if accuracy is None else f"{accuracy:.3f}") + mark


def _by_steps(curves: Sequence[Curve]) -> str:
    """Accuracy after each measured step, as each way is judged, at its best rate and at the rates that are advised."""
    steps = sorted({step for curve in curves for step in curve.steps})
    rows = [["method", "rate", *(f"after {step} steps" for step in steps)]]
    for curve in curves:
        if curve.final:
            rates = sorted({curve.best()[1], *(ADVISED if curve.method != "none" else ())} & {*curve.learning_rates})
            rows += [[curve.label, f"{rate:g}", *(_cell(curve, rate, step) for step in steps)] for rate in rates]
    return _table(rows)


def _summary(curves: Sequence[Curve]) -> str:
    plain = next((curve for curve in curves if curve.method == "none"), None)
    target = plain.best()[0] if plain else GOOD
    header = ["method", "best", "steps to 0.9", f"steps to {target:.3f}", "largest that trains", "largest finite"]
    rows = [header]
    for curve in curves:
        accuracy, rate = curve.best()
        rows.append(
            [
                curve.label,
                f"{accuracy:.3f} ({rate:g})",
                _steps(curve.steps_to(GOOD)),
                _steps(curve.steps_to(target)),
                _rate(curve.largest_that_trains()),
                _rate(curve.largest_that_survives()),
            ]
        )
    return _table(rows)


def _comparison(results: Sequence[Result]) -> str:
    rows = [["data", "method", "seeds", "accuracy", "steps to plain's best", "trains up to", "finite up to"]]
    for dataset in dict.fromkeys(dataset for dataset, _ in _panels(results)):
        curves = {
            input_range: {curve.method: curve for curve in _curves(results, dataset, input_range) if curve.final}
            for name, input_range in _panels(results)
            if name == dataset
        }
        for method in METHODS:
            group = {name: by_method[method] for name, by_method in curves.items() if method in by_method}
            rate = _common_rate(list(group.values()))
            for input_range, curve in group.items():
                plain = curves[input_range].get("none")
                rows.append(_against(f"{dataset}, {input_range}", curve, plain, rate))
    return _table(rows)


def _against(data: str, curve: Curve, plain: Curve | None, common_rate: float | None) -> list[str]:
    rate = common_rate if curve is not plain and common_rate is not None else curve.best()[1]
    target = plain.best()[0] if plain else GOOD
    return [
        data,
        curve.label,
        str(len(curve.seeds(rate))),
        f"{_cell(curve, rate)} ({rate:g})",
        _steps(curve.steps_to(target, [rate])),
        _rate(curve.largest_that_trains()),
        _rate(curve.largest_that_survives()),
    ]


def _common_rate(curves: Sequence[Curve]) -> float | None:
    """The learning rate at which the worst of the curves is best; None if they have none in common."""
    if not curves:
        return None
    rates = set.intersection(*(set(curve.learning_rates) for curve in curves))
    return max(rates, key=lambda rate: min(curve.accuracy(rate) or 0.0 for curve in curves), default=None)


def _steps(found: tuple[int, float] | None) -> str:
    return "-" if found is None else f"{found[0]} ({found[1]:g})"


def _rate(rate: float | None) -> str:
    return "none" if rate is None else f"{rate:g}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
