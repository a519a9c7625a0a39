"""Which modules are conv or dense layers."""

from __future__ import annotations

from typing import Literal

from torch import nn

Kind = Literal["conv", "dense"]


def layer_kind(module: nn.Module) -> Kind | None:
    """Return "conv" for a convolution of any kind, "dense" for nn.Linear, and None for any other module."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    return "dense" if isinstance(module, nn.Linear) else None
