"""What counts as a conv or a dense layer."""

from __future__ import annotations

from typing import Literal

from torch import nn

Kind = Literal["conv", "dense"]


def layer_kind(module: nn.Module) -> Kind | None:
    """Return "conv", "dense", or None for any other module."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    return "dense" if isinstance(module, nn.Linear) else None
