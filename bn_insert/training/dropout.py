"""The dropout of a run: off in a network with BatchNorm, unless the settings ask for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from ..batchnorm.modes import uses_batch_statistics
from ..errors import TrainingError, as_passed
from ..graph.copies import unchanged_attributes, unwrapped, working_copy
from ..graph.inputs import Inputs
from ..statistics.passes import preserved_random_state

_FUNCTIONS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


@dataclass(frozen=True)
class Dropout:
    """The dropout layers of a network in training.

    Args:
        active: Probability of each layer that drops values, by its name.
        switched_off: Former probability of each layer that was switched off, by its name.
        called: Probabilities of dropouts that a forward calls as functions, and that no setting changes, by function.
    """

    active: Mapping[str, float] = field(default_factory=dict)
    switched_off: Mapping[str, float] = field(default_factory=dict)
    called: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return what drops values and what does not, in words."""
        text = _listed({**self.active, **self.called}) or "none"
        return f"{text} (switched off: {_listed(self.switched_off)})" if self.switched_off else text


def set_dropout(network: nn.Module, probability: float | None, example: Tensor | None = None) -> Dropout:
    """Set the dropout layers of a network for training, in place.

    Before a BatchNorm, dropout spoils its statistics, see `dropouts_before_batchnorm`. After the last one, it cost
    several points of accuracy in one case, and gained nothing on average in the others (benchmarks/finetuning).

    Args:
        network: The network.
        probability: Of every layer; None keeps each one's, but switches all off if a BatchNorm normalizes by the batch.
        example: Images that the network takes, to find the dropouts that are functions; None does not look for them.

    Returns:
        What drops values now.

    Warns:
        UserWarning: Dropout was to be switched off, and the forward calls it as a function.

    Raises:
        TrainingError: If there is a probability above 0 and no layer to have it.
    """
    modules = unwrapped(network).named_modules()
    layers = {name: module for name, module in modules if isinstance(module, _DropoutNd)}
    if probability and not layers:
        raise TrainingError(
            f"{type(network).__name__} as it is trained has no dropout layer to set to {probability} (a new head has "
            f"none); leave out {as_passed('dropout')}"
        )
    by_batch = any(map(uses_batch_statistics, network.modules()))
    switched_off = {name: layer.p for name, layer in layers.items() if by_batch and probability is None and layer.p > 0}
    for name, layer in layers.items():
        layer.p = 0.0 if name in switched_off else layer.p if probability is None else probability
    called = {} if example is None else _called(network, example)
    if called and by_batch and not probability:
        warnings.warn(
            f"the forward of {type(network).__name__} calls dropout as a function, with p = {_listed(called)}: it "
            "stays on, although dropout is to be off, and spoils the statistics of BatchNorm layers after it, if there "
            "are any. Use nn.Dropout modules instead",
            stacklevel=3,
        )
    return Dropout({name: layer.p for name, layer in layers.items() if layer.p > 0}, switched_off, called)


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


def _called(network: nn.Module, example: Tensor) -> dict[str, float]:
    """Return the highest probability with which a forward calls each dropout function in train mode."""
    copy = working_copy(network).train()
    for module in copy.modules():
        if isinstance(module, _DropoutNd | _NormBase):
            module.eval()
    calls = _Calls()
    # A forward that fails does so again in the first step, with its context.
    with preserved_random_state(), torch.inference_mode(), unchanged_attributes(network), suppress(Exception), calls:
        Inputs.of(example, 0, copy).run(copy)
    return calls.found


def _listed(layers: Mapping[str, float]) -> str:
    return ", ".join(f"{probability:g} ({name})" for name, probability in layers.items())
