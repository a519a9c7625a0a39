"""The tables that commands print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from typing import TYPE_CHECKING

from .console import plain, stdout, table

if TYPE_CHECKING:
    from rich.table import Table

    from bn_insert import (
        Comparison,
        Edge,
        Evaluation,
        Moments,
        PredictionComparison,
        Site,
        StatisticsShift,
        TrainModeAgreement,
    )


# An error estimated from the spread between fewer batches is not reliable.
FEWEST_BATCHES = 8
GOOD_ERROR = 0.1  # of mean and std, in stds
NARROW = 100  # columns of a terminal; narrower tables have fewer columns
_MOST_CLASSES = 30  # rows; the report has all
_LONGEST_NAME = 30  # characters that are kept on one line


def site_table(sites: Sequence[Site], moments: Mapping[str, Moments], *, batches: int) -> Table:
    """Return one row per site: its channels, the ranges of their means and stds, and how many are constant.

    Args:
        sites: One for each row.
        moments: By the name of the layer.
        batches: How many batches the moments were measured on; with few of them, no error is shown.
    """
    reliable = batches >= FEWEST_BATCHES and all(moments[site.name].standard_error is not None for site in sites)
    constant = any(moments[site.name].constant_channels for site in sites)
    wide = stdout().width >= NARROW
    numbers = ("channels", "mean", "std", *["error"] * reliable, *["constant"] * constant)
    result = table("Activation statistics per layer", "layer", *["kind"] * wide, *numbers, right=numbers)
    keep_whole(result, (site.name for site in sites))
    for site in sites:
        found = moments[site.name]
        result.add_row(
            site.name,
            *[site.kind] * wide,
            str(site.channels),
            _range(found.mean.tolist()),
            _range(found.std.tolist()),
            *[f"{as_shown(found.error_of(0.99)):g}"] * reliable,
            *[str(found.constant_channels or "-")] * constant,
        )
    result.caption = "mean, std: smallest .. largest channel; "
    if reliable:
        result.caption += (
            "error: estimated sampling error of mean and std relative to std, not exceeded by 99% of the channels "
            f"({GOOD_ERROR:g} or less is good)"
        )
    else:
        result.caption += f"their error is not estimated from fewer than {FEWEST_BATCHES} batches (see --images and -b)"
    return result


def as_shown(error: float) -> float:
    """Return a sampling error as tables show it, so that what is said about it agrees with them."""
    return float(f"{error:.2g}")


def comparison_table(comparisons: Mapping[str, Comparison], title: str = "Original and result compared") -> Table:
    """Return one row per comparison, by device."""
    # Outputs that are not logits, such as features, have no top-1 class.
    classes = not any(isnan(comparison.top1_agreement) for comparison in comparisons.values())
    numbers = ("max abs diff", "max rel diff", *["top-1 agreement"] * classes)
    result = table(title, "device", "images", "bit-identical", *numbers, right=("images", *numbers))
    for device, comparison in comparisons.items():
        result.add_row(
            device,
            f"{comparison.images:,}",
            plain("yes", style="bold green") if comparison.bit_identical else plain("no", style="bold yellow"),
            f"{comparison.max_abs:.3g}",
            f"{comparison.max_rel:.3g}",
            *[f"{comparison.top1_agreement:.2%}"] * classes,
        )
    return result


def class_table(evaluation: Evaluation) -> Table:
    """Return one row per class: images, accuracy, and the classes that they are most often mistaken for.

    Classes without images are left out, and counted below the table.
    """
    numbers = ("images", "correct", "accuracy")
    result = table("Accuracy by class", "class", *numbers, "most often mistaken for", right=numbers)
    rows = zip(evaluation.classes, evaluation.class_accuracy, evaluation.confusion, strict=True)
    missing = 0
    for label, (name, accuracy, counts) in enumerate(rows):
        if not (images := sum(counts)):
            missing += 1
            continue
        others = [(-count, other) for other, count in enumerate(counts) if count and other != label]
        taken_for = ", ".join(f"{evaluation.classes[other]} ({-count:,})" for count, other in sorted(others)[:2])
        result.add_row(name, f"{images:,}", f"{counts[label]:,}", f"{accuracy:.2%}", taken_for or "-")
    if missing:
        result.caption = f"{missing:,} of {len(evaluation.classes):,} classes have no images here"
    return result


def shift_table(shifts: Sequence[StatisticsShift], *, shrunk: bool) -> Table:
    """Return one row per layer: how far its statistics on the target are from those on the source.

    Args:
        shifts: Those of the layers.
        shrunk: Whether the statistics moved by less than these differences.
    """
    numbers = ("channels", "means differ by", "std factor (range)")
    result = table("Statistics, from source to target", "layer", *numbers, right=numbers)
    keep_whole(result, (shift.layer for shift in shifts))
    for shift in shifts:
        ratios = shift.std[shift.std.isfinite()].tolist()
        factor = f"{shift.std_median:.2f} ({_range(ratios)})" if ratios else "-"
        result.add_row(shift.layer, str(len(shift.mean)), f"{shift.size:.2g}", factor)
    result.caption = (
        "means differ by: root mean square over the channels, in standard deviations on the source; std factor: std on "
        "the target / std on the source, of the median channel (smallest .. largest channel)"
    )
    if shrunk:
        result.caption += "; both as measured: with few images, only part of the difference is applied"
    return result


def accuracy_table(predictions: PredictionComparison, classes: Sequence[str], *, stored: bool) -> Table:
    """Return the accuracy before and after, for each class if there are not too many, and for all images.

    Args:
        predictions: With labels.
        classes: Class names.
        stored: Whether the names come from the checkpoint, and not from the folders.
    """
    numbers = ("images", "before", "after")
    result = table("Accuracy on the target", "class", *numbers, right=numbers)
    per_class = predictions.per_class if len(predictions.per_class) <= _MOST_CLASSES else ()
    for each in per_class:
        result.add_row(classes[each.label], f"{each.images:,}", f"{each.before:.1%}", f"{each.after:.1%}")
    before, after = predictions.accuracy_before, predictions.accuracy_after
    result.add_row("all", f"{predictions.labelled:,}", f"{before:.1%}", f"{after:.1%}")
    if not stored:
        result.caption = (
            "the checkpoint stores no class names: the folders of TARGET, sorted by name, are assumed to match its "
            "outputs in that order"
        )
    return result


def agreement_table(agreements: Sequence[TrainModeAgreement], renorm: Sequence[TrainModeAgreement]) -> Table:
    """Return one row per batch size: the agreement of train mode with eval mode, the last column with renorm."""
    columns = ("batch size", "images", "top-1 agreement", "KL divergence", "relative logit error", "top-1 with renorm")
    result = table("Train mode compared with eval mode", *columns, right=columns)
    renormalized = {agreement.batch_size: f"{agreement.top1_agreement:.2%}" for agreement in renorm}
    for agreement in agreements:
        result.add_row(
            f"{agreement.batch_size:,}",
            f"{agreement.images:,}",
            f"{agreement.top1_agreement:.1%} ± {agreement.top1_margin:.1%}",
            f"{agreement.kl_divergence:.3g}",
            f"{agreement.relative_logit_error:.3g}",
            renormalized.get(agreement.batch_size, "-"),
        )
    return result


def edge_table(edges: Sequence[Edge]) -> Table:
    """Return one row per edge: the layers that read the site's values, or why it was not equalized."""
    equalized = sum(not edge.reason for edge in edges)
    result = table(
        f"Equalized: {equalized} of {len(edges)} layers", "layer", "next layers, or why it was not equalized"
    )
    keep_whole(result, (edge.site for edge in edges))
    for edge in edges:
        result.add_row(edge.site, edge.reason or ", ".join(consumer.name for consumer in edge.consumers))
    return result


def keep_whole(result: Table, names: Iterable[str]) -> None:
    """Keep the names in the first column on one line, unless they are very long."""
    result.columns[0].min_width = min(max(map(len, names), default=0), _LONGEST_NAME)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3g} .. {max(values):.3g}"
