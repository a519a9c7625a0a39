"""Dropouts that are not modules but functions that a forward calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from ..graph.copies import unchanged_attributes, working_copy
from ..graph.inputs import Inputs
from ..statistics.passes import preserved_random_state

_FUNCTIONS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


def dropout_calls(network: nn.Module, example: Any) -> dict[str, float]:
    """Return the highest probability with which a forward calls each dropout function in train mode.

    Args:
        network: The network; it is not changed.
        example: One batch, as for `insert_batchnorm`.

    Returns:
        Probabilities by the name of the function, such as F.dropout; none where the forward fails.
    """
    copy = working_copy(network, training=True)
    for module in copy.modules():
        if isinstance(module, _DropoutNd | _NormBase):
            module.eval()
    calls = _Calls()
    # A failing forward fails again in the first training step, with its context.
    with preserved_random_state(), torch.no_grad(), unchanged_attributes(network), suppress(Exception), calls:
        Inputs.of(example, 0, copy).run(copy)
    return calls.found


class _Calls(TorchFunctionMode):
    """Notes the probabilities of dropouts that are called as functions and are on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, float] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if (name := getattr(func, "__name__", "")) in _FUNCTIONS:
            given = dict(zip(("input", "p", "training"), args, strict=False)) | dict(kwargs)
            if given.get("p") and given.get("training"):
                self.found[f"F.{name}"] = max(given["p"], self.found.get(f"F.{name}", 0.0))
        return func(*args, **kwargs)
