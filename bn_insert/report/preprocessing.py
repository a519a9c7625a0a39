"""The preprocessing of images, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..support.text import figures


def preprocessing_text(transform: Mapping[str, Any]) -> str:
    """Return the steps of a transform as a phrase.

    Args:
        transform: `resize`, `crop`, `mean` and `std`, as in `Transform.to_dict`.
    """
    steps = [
        f"resize {transform['resize']}" if transform["resize"] else "no resizing",
        f"crop {transform['crop']}" if transform["crop"] else "no crop",
        f"mean {figures(transform['mean'])}",
        f"std {figures(transform['std'])}",
    ]
    return "; ".join(steps)
