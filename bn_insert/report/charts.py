"""The charts of a report, as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib, which draws curves.png already, and not a library of interactive charts: plotly's script alone would make
# each page 4.5 MB large; these are a few kB each, and print.
_WIDTH = 4.4  # inches: a phone shows them at 4/5 of that, and text of 9 points stays readable
_ROW = 0.2
_LONGEST_NAME = 24

SERIES = 8  # colours that the page has; then they begin again with dashes
# Colours that stand for the page's own, so that a chart is dark where the page is.
_INK, _RULE = "#010101", "#020202"
_COLORS = {_INK: "var(--ink)", _RULE: "var(--rule)"}
_COLORS |= {f"#0301{number:02x}": f"var(--series-{number + 1})" for number in range(SERIES)}
_SERIES_COLORS = list(_COLORS)[2:]


class Chart(NamedTuple):
    """An SVG with a title, a remark, and which of the page's colours (from 1) stands for what."""

    name: str
    title: str
    note: str
    svg: Markup
    legend: tuple[tuple[int, str], ...] = ()


def insertion_charts(data: Mapping[str, Any]) -> list[Chart]:
    """Return the charts of what `insertion_report` gives."""
    norms = {layer["name"]: layer["batchnorm"] for layer in data["layers"] if "batchnorm" in layer}
    charts = [
        _boxes(
            "mean", "Mean per channel", "Box: middle half of the channels; line: all.", norms, ["mean"], scale="symlog"
        ),
        _boxes("std", "Standard deviation per channel", "Constant channels are left out.", norms, ["std"], scale="log"),
        _gamma(norms),
    ]
    if any(norm["constant_channels"] or norm["near_constant_channels"] for norm in norms.values()):
        charts.append(_constant(norms))
    if any(norm["standard_error"] for norm in norms.values()):
        note = "Estimated from how far batches are apart. More images make it smaller."
        title = "Standard error of mean and std, relative to std"
        charts.append(_boxes("error", title, note, norms, ["standard_error"], scale="log"))
    return charts


def agreement_chart(agreements: Sequence[Mapping[str, Any]]) -> Chart:
    """Return top-1 agreement and KL divergence of train mode with eval mode by batch size."""
    figure = _figure(4.0)
    upper, lower = figure.subplots(2, 1, sharex=True)
    sizes = [str(each["batch_size"]) for each in agreements]
    upper.axhline(95, color=_INK, linewidth=0.8, linestyle="--")
    upper.plot(sizes, [100 * each["top1_agreement"] for each in agreements], marker="o", color=_SERIES_COLORS[0])
    upper.set_ylabel("top-1 agreement, %")
    upper.set_ylim(top=102)
    lower.plot(sizes, [each["kl_divergence"] for each in agreements], marker="o", color=_SERIES_COLORS[1])
    lower.set_ylabel("KL divergence, nats")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("batch size")
    return Chart(
        "agreement", "Train mode against eval mode", "Dashed: 95 %.", _svg(figure, "agreement", "agreement by size")
    )


def run_charts(runs: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return curves over the epochs, with one colour a run where there are several."""
    present = [(number, run["name"], run["epochs"]) for number, run in enumerate(runs) if run["epochs"]]
    if not present:
        return []
    if len(runs) == 1:
        parts = (("train", "training"), ("val", "validation"))
        return [
            _curves(
                figure,
                figure.capitalize(),
                [(number, label, epochs, f"{part}_{figure}") for number, (part, label) in enumerate(parts)],
            )
            for _, _, epochs in present
            for figure in ("accuracy", "loss")
        ] + [_curves("lr", "Learning rate", [(0, "", present[0][2], "lr")])]
    return [
        _curves(key, title, [(number, name, epochs, key) for number, name, epochs in present])
        for key, title in (
            ("val_accuracy", "Validation accuracy"),
            ("val_loss", "Validation loss"),
            ("train_accuracy", "Training accuracy"),
            ("train_loss", "Training loss"),
            ("lr", "Learning rate"),
        )
    ]


def _curves(name: str, title: str, lines: Sequence[tuple[int, str, Sequence[Mapping[str, Any]], str]]) -> Chart:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure = _figure(2.8)
    axes = figure.subplots()
    percent = "accuracy" in name
    for number, _, epochs, key in lines:
        axes.plot(
            [epoch["epoch"] for epoch in epochs],
            [epoch[key] * (100 if percent else 1) for epoch in epochs],
            marker=".",
            color=_SERIES_COLORS[number % SERIES],
            linestyle="-" if number < SERIES else "--",
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("%" if percent else "")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend = tuple((number % SERIES + 1, label) for number, label, _, _ in lines if label)
    return Chart(name, title, "", _svg(figure, name, title), legend)


def _gamma(norms: Mapping[str, Mapping[str, Any]]) -> Chart:
    equalized = any("gamma_before_equalization" in norm for norm in norms.values())
    keys = ["gamma_before_equalization", "gamma"] if equalized else ["gamma"]
    title = "Gamma before and after equalization" if equalized else "Gamma"
    note = "" if equalized else "Without equalization gamma is the standard deviation of its channel."
    return _boxes("gamma", title, note, norms, keys, scale="log", labels=("before", "after") if equalized else ())


def _boxes(
    name: str,
    title: str,
    note: str,
    norms: Mapping[str, Mapping[str, Any]],
    keys: Sequence[str],
    *,
    scale: str,
    labels: Sequence[str] = (),
) -> Chart:
    """Return one row a layer: from the smallest channel to the largest, and a box with quartiles and median."""
    figure, axes = _rows(norms, _ROW * (1 + 0.4 * (len(keys) - 1)))
    drawn: list[float] = []
    height = 0.6 / len(keys)
    for row, norm in enumerate(norms.values()):
        for number, key in enumerate(keys):
            values = np.asarray(norm[key] or [], dtype=float)
            values = values[np.isfinite(values) & ((values > 0) | (scale != "log"))]
            if not len(values):
                continue
            low, first, median, third, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
            y = row + (number - (len(keys) - 1) / 2) * (height + 0.06)
            color = _SERIES_COLORS[number]
            axes.hlines(y, low, high, color=color, linewidth=1)
            axes.fill_betweenx([y - height / 2, y + height / 2], first, third, color=color, linewidth=0.8)
            axes.vlines(median, y - height / 2, y + height / 2, color=_INK, linewidth=1.2)
            drawn += [low, high]
    if scale == "log":
        _whole_decades(axes, drawn)
    else:
        _symmetric_logarithm(axes, drawn)
    legend = tuple((number + 1, label) for number, label in enumerate(labels))
    return Chart(name, title, note, _svg(figure, name, title), legend)


def _constant(norms: Mapping[str, Mapping[str, Any]]) -> Chart:
    title = "Constant and near-constant channels"
    figure, axes = _rows(norms, _ROW)
    done = np.zeros(len(norms))
    for number, key in enumerate(("constant_channels", "near_constant_channels")):
        share = np.asarray([100 * norm[key] / norm["channels"] for norm in norms.values()])
        axes.barh(range(len(norms)), share, left=done, height=0.6, color=_SERIES_COLORS[number])
        done += share
    axes.set_xlabel("% of the layer's channels")
    axes.set_xlim(0, 1.05 * float(done.max()))
    note = "Near-constant: a standard deviation below 1 % of the layer's median."
    return Chart("constant", title, note, _svg(figure, "constant", title), ((1, "constant"), (2, "near-constant")))


def _rows(names: Iterable[str], row: float) -> tuple[Figure, Axes]:
    """Return axes with one row a layer, the first on top."""
    labels = [_shortened(name) for name in names]
    figure = _figure(0.6 + row * max(len(labels), 2))
    axes = figure.subplots()
    for label in axes.set_yticks(range(len(labels)), labels):
        label.label1.set_parse_math(False)  # a dollar sign in a name begins no formula
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[:9]}…{name[-_LONGEST_NAME + 10 :]}"


def _short(value: float, _position: int | None = None) -> str:
    """Return a power of ten in few characters."""
    return (
        f"{value:g}"
        if value == 0 or 1e-3 <= abs(value) < 1e4
        else f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    )


def _whole_decades(axes: Axes, values: Sequence[float]) -> None:
    """Make the axis logarithmic, from one power of ten to another: two of them at least are labelled."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    low = math.floor(math.log10(min(values, default=1)))
    high = math.ceil(math.log10(max(values, default=1)))
    axes.set_xscale("log")
    axes.set_xlim(10.0**low, 10.0 ** max(high, low + 1))
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    # The formatter of logarithms writes formulas, which only matplotlib's own drawing of text understands.
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _symmetric_logarithm(axes: Axes, values: Sequence[float]) -> None:
    """Make the axis logarithmic on both sides of a linear middle of 1 % of the largest value."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator  # noqa: PLC0415

    largest = max(map(abs, values), default=0) or 1.0
    top = 10.0 ** math.ceil(math.log10(largest))
    axes.set_xscale("symlog", linthresh=top / 100)
    axes.set_xlim(-top if min(values, default=0) < 0 else 0, top if max(values, default=0) > 0 else 0)
    axes.set_xticks([-top, -top / 10, -top / 100, 0, top / 100, top / 10, top])
    axes.set_xlim(-top if min(values, default=0) < 0 else 0, top if max(values, default=0) > 0 else 0)
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _figure(height: float) -> Figure:
    # Without pyplot: no window system is asked for.
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second that only a page needs

    return Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="none")


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """Return the figure as an element of a page: ids of its own, the page's colours and font, text as text."""
    import matplotlib as mpl  # noqa: PLC0415

    for axes in figure.axes:
        _style(axes)
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name}
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    text = io.StringIO()
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the page's font has it, or the reader's system
        figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    # Several charts stand in one page: without this their ids would be the same.
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub("|".join(_COLORS), lambda color: _COLORS[color.group()], svg)
    return Markup(svg.replace("<svg ", Markup('<svg role="img" aria-label="{}" ').format(label), 1))


def _style(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.grid(color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_edgecolor(_RULE)
    axes.tick_params(colors=_INK, which="both", labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_INK)
        label.set_fontsize(9)
