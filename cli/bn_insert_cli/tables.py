"""The tables that commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .console import plain, table

if TYPE_CHECKING:
    from rich.table import Table

    from bn_insert import Comparison, Edge, Layer, Moments, Site, TrainModeAgreement


def site_table(sites: Sequence[Site], moments: Mapping[str, Moments]) -> Table:
    """Return one row per site: its channels, the ranges of their means and stds, and how many are constant."""
    result = table(
        "Activation statistics per layer",
        *("layer", "kind", "channels", "mean (min .. max)", "std (min .. max)", "error", "constant"),
        right=("channels", "mean (min .. max)", "std (min .. max)", "error", "constant"),
    )
    for site in sites:
        found = moments[site.name]
        result.add_row(
            site.name,
            site.kind,
            str(site.channels),
            _range(found.mean.tolist()),
            _range(found.std.tolist()),
            "-" if found.standard_error is None else f"{found.error_of(0.99):.2g}",
            str(found.constant_channels or "-"),
        )
    result.caption = "error: estimated error of mean and std, in stds, 99th percentile of the channels"
    if any(moments[site.name].standard_error is None for site in sites):
        result.caption += "; -: needs two or more batches"
    result.caption_justify = "left"
    return result


def comparison_table(comparisons: Mapping[str, Comparison], title: str = "Original and result compared") -> Table:
    """Return one row per comparison, by device."""
    result = table(
        title,
        *("device", "images", "bit-identical", "max abs diff", "max rel diff", "top-1 agreement"),
        right=("images", "max abs diff", "max rel diff", "top-1 agreement"),
    )
    for device, comparison in comparisons.items():
        result.add_row(
            device,
            f"{comparison.images:,}",
            plain("yes", style="bold green") if comparison.bit_identical else plain("no", style="bold yellow"),
            f"{comparison.max_abs:.3g}",
            f"{comparison.max_rel:.3g}",
            f"{comparison.top1_agreement:.2%}",
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
            f"{agreement.top1_agreement:.2%}",
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
    for edge in edges:
        result.add_row(edge.site, edge.reason or ", ".join(consumer.name for consumer in edge.consumers))
    return result


def layer_table(layers: Sequence[Layer], weights: Mapping[str, Sequence[int]]) -> Table:
    """Return one row per conv or dense layer, and whether a BatchNorm can be inserted after it."""
    result = table(
        "Conv and dense layers",
        *("layer", "type", "weight", "output", "parameters", "BatchNorm"),
        right=("parameters",),
    )
    for layer in layers:
        result.add_row(
            layer.name,
            layer.type_name,
            _dimensions(weights[layer.name]),
            _dimensions(layer.shape[1:]) or "-",
            f"{layer.parameters:,}",
            plain(f"can be inserted after {layer.site.anchor}", style="green") if layer.site else layer.reason,
        )
    return result


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3g} .. {max(values):.3g}"


def _dimensions(shape: Sequence[int]) -> str:
    return " x ".join(str(extent) for extent in shape)
