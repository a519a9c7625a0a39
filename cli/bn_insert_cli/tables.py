"""The tables that commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .console import table

if TYPE_CHECKING:
    from rich.table import Table

    from bn_insert import Comparison, Edge, Layer, Moments, Site, TrainModeAgreement


def site_table(sites: Sequence[Site], moments: Mapping[str, Moments]) -> Table:
    """Return one row a site: channels, range of mean and std over them, and how many are constant."""
    result = table(
        "Statistics of the calibration set, per layer",
        *("layer", "kind", "channels", "mean, min .. max", "std, min .. max", "error", "constant"),
        right=("channels", "mean, min .. max", "std, min .. max", "error", "constant"),
    )
    for site in sites:
        of_site = moments[site.name]
        result.add_row(
            site.name,
            site.kind,
            str(site.channels),
            _span(of_site.mean.tolist()),
            _span(of_site.std.tolist()),
            "-" if of_site.standard_error is None else f"{of_site.error_of(0.99):.2g}",
            str(of_site.constant_channels or "-"),
        )
    result.caption = "error: estimated, of mean and std, relative to std, for 99 % of the channels"
    if any(moments[site.name].standard_error is None for site in sites):
        result.caption += "; -: one batch tells none"
    result.caption_justify = "left"
    return result


def comparison_table(comparisons: Mapping[str, Comparison], title: str = "Original against result") -> Table:
    """Return one row a comparison."""
    result = table(
        title,
        *("on", "images", "bit-identical", "max abs", "max relative", "top-1 agreement"),
        right=("images", "max abs", "max relative", "top-1 agreement"),
    )
    for place, comparison in comparisons.items():
        result.add_row(
            place,
            f"{comparison.images:,}",
            "[bold green]yes[/]" if comparison.bit_identical else "[bold yellow]no[/]",
            f"{comparison.max_abs:.3g}",
            f"{comparison.max_rel:.3g}",
            f"{comparison.top1_agreement:.2%}",
        )
    return result


def agreement_table(agreements: Sequence[TrainModeAgreement]) -> Table:
    """Return one row a batch size: how far train mode is from eval mode."""
    columns = ("batch size", "images", "top-1 agreement", "KL divergence", "relative logit error")
    result = table("Train mode against eval mode", *columns, right=columns)
    for each in agreements:
        result.add_row(
            f"{each.batch_size:,}",
            f"{each.images:,}",
            f"{each.top1_agreement:.2%}",
            f"{each.kl_divergence:.3g}",
            f"{each.relative_logit_error:.3g}",
        )
    return result


def edge_table(edges: Sequence[Edge]) -> Table:
    """Return one row an edge: what reads the layer, or why it keeps its scale."""
    done = sum(not edge.reason for edge in edges)
    result = table(f"Equalized: {done} of {len(edges)} layers", "layer", "read by, or why it keeps its scale")
    for edge in edges:
        result.add_row(edge.site, edge.reason or ", ".join(consumer.name for consumer in edge.consumers))
    return result


def layer_table(layers: Sequence[Layer], weights: Mapping[str, Sequence[int]]) -> Table:
    """Return one row a conv or dense layer, and whether a BatchNorm is there or would go there."""
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
            f"[green]goes behind {layer.site.anchor}[/]" if layer.site else layer.reason,
        )
    return result


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.3g} .. {max(values):.3g}"


def _dimensions(shape: Sequence[int]) -> str:
    return " x ".join(str(extent) for extent in shape)
