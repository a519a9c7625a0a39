"""The charts of a report, as SVG elements that take their colors from the page."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot, which would look for a window system
from matplotlib.rcsetup import cycler
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

# matplotlib and not a library of interactive charts: the script of plotly alone would make each page 4.5 MB larger.
# These charts are a few kB each, and can be printed.
_WIDTH = 4.4  # inches: a phone shows a chart at 4/5 of that, and text of 9 points stays readable
_ROW = 0.2
_LONGEST_NAME = 24

_SERIES = 8  # colors on the page; after them, they repeat with dashed lines
# Placeholders, replaced in the finished SVG by the page's custom properties: a chart is dark when the page is.
_INK, _RULE = "#010101", "#020202"
_SERIES_COLORS = [f"#0301{number:02x}" for number in range(_SERIES)]
_CUSTOM_PROPERTIES = {_INK: "var(--ink)", _RULE: "var(--rule)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(_SERIES_COLORS, 1)
}
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": _RULE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 9,
    "axes.prop_cycle": cycler(color=_SERIES_COLORS),  # "C0" to "C7"
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar sign in a layer's name starts no formula
    "xtick.color": _INK,
    "xtick.labelsize": 9,
    "ytick.color": _INK,
    "ytick.labelsize": 9,
}


class Chart(NamedTuple):
    """An SVG element with its title, a note, and the legend: numbers of the page's series colors, and labels."""

    name: str
    title: str
    note: str
    svg: Markup
    legend: tuple[tuple[int, str], ...] = ()


@mpl.rc_context(_STYLE)
def insertion_charts(data: Mapping[str, Any], *, errors: bool = True) -> list[Chart]:
    """Return the charts of the inserted layers' statistics, from the data of `insertion_report`.

    Args:
        data: The report.
        errors: Whether standard errors were estimated from enough batches to be shown.
    """
    norms = {layer["name"]: layer["batchnorm"] for layer in data["layers"] if "batchnorm" in layer}
    charts = [
        _boxes("mean", "Mean per channel", "Box: middle half of the channels; line: all.", norms, ["mean"]),
        _boxes("std", "Standard deviation per channel", "Constant channels are left out.", norms, ["std"], log=True),
    ]
    # Without equalization, gamma is the standard deviation once more.
    if any("gamma_before_equalization" in norm for norm in norms.values()):
        metrics, labels = ["gamma_before_equalization", "gamma"], ["before", "after"]
        charts.append(
            _boxes("gamma", "Gamma before and after equalization", "", norms, metrics, labels=labels, log=True)
        )
    if any(norm["constant_channels"] or norm["near_constant_channels"] for norm in norms.values()):
        charts.append(_constant(norms))
    if errors and any(norm["standard_error"] for norm in norms.values()):
        title = "Standard error of mean and std, relative to std"
        note = "0.03 or less is good (the table shows three standard errors). More images reduce it."
        charts.append(_boxes("error", title, note, norms, ["standard_error"], log=True))
    return charts


@mpl.rc_context(_STYLE)
def adaptation_charts(data: Mapping[str, Any]) -> list[Chart]:
    """Return the charts of how far the statistics of each layer moved, from the data of `adaptation_report`."""
    shifts = {shift["layer"]: shift for shift in data["shifts"]}
    box = "Box: middle half of the channels; line: all."
    charts = [_boxes("shift", "Means: target - source, in standard deviations of the source", box, shifts, ["mean"])]
    if any(shift["std"] for shift in shifts.values()):
        title = "Standard deviations: target / source"
        charts.append(_boxes("ratio", title, "1: as on the source.", shifts, ["std"], log=True))
    return charts


@mpl.rc_context(_STYLE)
def agreement_chart(agreements: Sequence[Mapping[str, Any]], renorm: Sequence[Mapping[str, Any]] = ()) -> Chart:
    """Return top-1 agreement and KL divergence between train mode and eval mode by batch size.

    Args:
        agreements: In the network's own mode.
        renorm: With Batch Renormalization.
    """
    figure = Figure(figsize=(_WIDTH, 4.0))
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.axhline(95, color=_INK, linewidth=0.8, linestyle="--")
    for color, series in (("C0", agreements), ("C1", renorm)):
        sizes = [str(agreement["batch_size"]) for agreement in series]
        upper.plot(sizes, [100 * agreement["top1_agreement"] for agreement in series], marker="o", color=color)
        lower.plot(sizes, [agreement["kl_divergence"] for agreement in series], marker="o", color=color)
    upper.set_ylabel("top-1 agreement, %")
    _limit_percent(upper)
    lower.set_ylabel("KL divergence, nats")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("batch size")
    title = "Train mode compared with eval mode"
    labels = ((1, "BatchNorm"), (2, "Batch Renormalization")) if renorm else ()
    return Chart("agreement", title, "Dashed: 95%.", _svg(figure, "agreement", title), labels)


@mpl.rc_context(_STYLE)
def run_charts(runs: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return curves over the epochs: training and validation of a single run, or one color for each of several."""
    present = [(number, run["name"], run["epochs"]) for number, run in enumerate(runs) if run["epochs"]]
    if not present:
        return []
    if len(runs) == 1:
        ((_, _, epochs),) = present
        parts = (("train", "training"), ("val", "validation"))
        return [
            *(
                _curves(
                    metric,
                    metric.capitalize(),
                    [(number, label, epochs, f"{part}_{metric}") for number, (part, label) in enumerate(parts)],
                )
                for metric in ("accuracy", "loss")
            ),
            _curves("lr", "Learning rate", [(0, "", epochs, "lr")]),
        ]
    return [
        _curves(metric, title, [(number, name, epochs, metric) for number, name, epochs in present])
        for metric, title in (
            ("val_accuracy", "Validation accuracy"),
            ("val_loss", "Validation loss"),
            ("train_accuracy", "Training accuracy"),
            ("train_loss", "Training loss"),
            ("lr", "Learning rate"),
        )
    ]


def _curves(name: str, title: str, lines: Sequence[tuple[int, str, Sequence[Mapping[str, Any]], str]]) -> Chart:
    """Return one line for each series number, label, list of epochs and metric."""
    figure = Figure(figsize=(_WIDTH, 2.8))
    axes = figure.subplots()
    percent = "accuracy" in name
    curves = [
        (
            [epoch["epoch"] for epoch in epochs],
            [epoch[metric] * (100 if percent else 1) for epoch in epochs],
        )
        for _, _, epochs, metric in lines
    ]
    for position, ((number, *_), points) in enumerate(zip(lines, curves, strict=True)):
        below = curves[:position].count(points)
        widest = below == 0 and curves.count(points) > 1
        # Of identical curves, the first is wide and the others are dashed, so that all of them can be seen.
        axes.plot(
            *points,
            marker=".",
            color=f"C{number}",
            linewidth=5 if widest else 1.5,
            linestyle=(0, (3 * below, 3 * below)) if below else "-" if number < _SERIES else "--",
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("%" if percent else "")
    if percent:
        _limit_percent(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend = tuple((number % _SERIES + 1, label) for number, label, _, _ in lines if label)
    return Chart(name, title, "", _svg(figure, name, title), legend)


def _limit_percent(axes: Axes) -> None:
    """End the axis at 0% and 100%, where the margin would go beyond; markers there stay whole."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 100))
    for line in axes.lines:
        line.set_clip_on(False)


def _boxes(
    name: str,
    title: str,
    note: str,
    norms: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[str],
    *,
    labels: Sequence[str] = (),
    log: bool = False,
) -> Chart:
    """Return one box plot per layer and metric: quartiles, median, and whiskers from the smallest to the largest."""
    figure, axes = _layer_rows(norms, _ROW * (1 + 0.4 * (len(metrics) - 1)))
    limits: list[float] = []
    height = 0.6 / len(metrics)
    for number, metric in enumerate(metrics):
        offset = (number - (len(metrics) - 1) / 2) * (height + 0.06)
        boxes, positions = [], []
        for row, norm in enumerate(norms.values()):
            values = np.asarray(norm[metric] or [], dtype=float)
            values = values[np.isfinite(values) & ((values > 0) | (not log))]
            if len(values):
                keys = ("whislo", "q1", "med", "q3", "whishi")
                quantiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
                boxes.append(dict(zip(keys, quantiles, strict=True)))
                positions.append(row + offset)
                limits += [quantiles[0], quantiles[-1]]
        axes.bxp(
            boxes,
            positions=positions,
            widths=height,
            orientation="horizontal",
            patch_artist=True,
            showcaps=False,
            showfliers=False,
            manage_ticks=False,
            boxprops={"facecolor": f"C{number}", "edgecolor": f"C{number}", "linewidth": 0.8},
            whiskerprops={"color": f"C{number}", "linewidth": 1},
            medianprops={"color": _INK, "linewidth": 1.2},
        )
    if log:
        _logarithmic(axes, limits)
    else:
        _symmetric_logarithmic(axes, limits)
    return Chart(name, title, note, _svg(figure, name, title), tuple(enumerate(labels, 1)))


def _constant(norms: Mapping[str, Mapping[str, Any]]) -> Chart:
    title = "Constant and near-constant channels"
    figure, axes = _layer_rows(norms, _ROW)
    left = np.zeros(len(norms))
    for number, key in enumerate(("constant_channels", "near_constant_channels")):
        share = np.asarray([100 * norm[key] / norm["channels"] for norm in norms.values()])
        axes.barh(range(len(norms)), share, left=left, height=0.6, color=f"C{number}")
        left += share
    axes.set_xlabel("% of the layer's channels")
    axes.set_xlim(0, 1.05 * float(left.max()))
    note = "Near-constant: a standard deviation below 1% of the layer's median."
    return Chart("constant", title, note, _svg(figure, "constant", title), ((1, "constant"), (2, "near-constant")))


def _layer_rows(names: Iterable[str], height: float) -> tuple[Figure, Axes]:
    """Return axes with one row per layer, the first at the top."""
    labels = [_shortened(name) for name in names]
    figure = Figure(figsize=(_WIDTH, 0.6 + height * max(len(labels), 2)))
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[:9]}…{name[-_LONGEST_NAME + 10 :]}"


def _power_of_ten(value: float, _position: float | int) -> str:
    """Return a tick label short enough not to overlap its neighbors: 1e5, not 1e+05."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:g}"
    return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """Make the axis logarithmic and let it span whole decades, so that at least two powers of ten are labeled."""
    low = math.floor(math.log10(min(values, default=1)))
    high = math.ceil(math.log10(max(values, default=1)))
    axes.set_xscale("log")
    axes.set_xlim(10.0**low, 10.0 ** max(high, low + 1))
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    # matplotlib's formatters for logarithmic axes write formulas, which need its own fonts.
    axes.xaxis.set_major_formatter(_power_of_ten)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _symmetric_logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """Make the axis logarithmic on both sides of zero, and linear within 1% of the largest value."""
    largest = max(map(abs, values), default=0) or 1.0
    top = 10.0 ** math.ceil(math.log10(largest))
    axes.set_xscale("symlog", linthresh=top / 100)
    axes.set_xticks([-top, -top / 10, -top / 100, 0, top / 100, top / 10, top])
    axes.set_xlim(-top if min(values, default=0) < 0 else 0, top if max(values, default=0) > 0 else 0)
    axes.xaxis.set_major_formatter(_power_of_ten)
    axes.xaxis.set_minor_locator(NullLocator())


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """Return the figure as an element of the page, with unique ids and the page's colors and font."""
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the page's font or the reader's system has it
        figure.savefig(text, format="svg", metadata=metadata)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    # matplotlib uses the same ids in every figure, and a page has several.
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub("|".join(_CUSTOM_PROPERTIES), lambda color: _CUSTOM_PROPERTIES[color.group()], svg)
    return Markup(svg.replace("<svg ", Markup('<svg role="img" aria-label="{}" ').format(label), 1))
