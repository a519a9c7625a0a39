"""The preprocessing of images, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def preprocessing_text(transform: Mapping[str, Any]) -> str:
    """Return the steps of a transform as a phrase.

    Args:
        transform: `resize`, `crop`, `mean` and `std`, as of `Transform.to_dict`.
    """
    steps = [
        f"resize {transform['resize']}" if transform["resize"] else "no resizing",
        f"crop {transform['crop']}" if transform["crop"] else "no crop",
        f"mean {_listed(transform['mean'])}",
        f"std {_listed(transform['std'])}",
    ]
    return "; ".join(steps)


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
