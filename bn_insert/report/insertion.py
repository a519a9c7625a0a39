"""The data of an insertion's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .provenance import versions

FORMAT = "bn-insert report"


def insertion_report(
    layers: Sequence[Mapping[str, Any]],
    edges: Sequence[Mapping[str, Any]],
    comparisons: Mapping[str, Mapping[str, Any]],
    agreements: Sequence[Mapping[str, Any]],
    *,
    renorm: Sequence[Mapping[str, Any]] = (),
    reading: str,
) -> dict[str, Any]:
    """Return the findings of an insertion as one JSON-ready dictionary.

    The page also shows what the caller adds to it: `checkpoint` and `output` (see `file_facts`; `output` is None if
    no checkpoint was written), `calibration` (`source`, `images`, `batches`, `skipped`), `preprocessing` (the values of
    the transform, its `origin`, and `tensors`: whether the images came from a tensor file, which is used unchanged),
    `options`, `command`, `date`, `seconds`, and `report_seconds`, the part of them that the report took.

    Args:
        layers: One entry per layer: its name, kind, type, output shape and number of parameters, with either
            `batchnorm` (statistics per channel of the inserted layer) or `reason` (why none was inserted).
        edges: The fields of an `Edge` for each equalized or blocked layer. Empty without equalization.
        comparisons: The fields of a `Comparison` of original and result, by device.
        agreements: For each batch size what `TrainModeAgreement.to_dict` returns. Empty if it could not be measured.
        renorm: The same with Batch Renormalization. Empty if it could not be measured.
        reading: One or two sentences that say what the agreements mean, or why there are none.
    """
    return {
        "format": FORMAT,
        "version": 1,
        "layers": list(layers),
        "edges": list(edges),
        "comparisons": dict(comparisons),
        "train_mode": {"agreements": list(agreements), "renorm": list(renorm), "reading": reading},
        "versions": versions(),
    }
