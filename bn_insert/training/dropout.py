"""The dropout of a run: off in a network with BatchNorm, unless the settings ask for it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..batchnorm.dropout_calls import dropout_calls
from ..batchnorm.modes import uses_batch_statistics
from ..errors import TrainingError, as_passed
from ..graph.copies import unwrapped


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

    Before a BatchNorm, dropout distorts its statistics, see `dropouts_before_batchnorm`. After the last one, it cost
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
    called = {} if example is None else dropout_calls(network, example)
    if called and by_batch and not probability:
        warnings.warn(
            f"the forward of {type(network).__name__} calls dropout as a function (p = {_listed(called)}), which stays "
            "on although dropout is to be off, and distorts the statistics of any BatchNorm after it. Use nn.Dropout "
            "modules instead",
            stacklevel=3,
        )
    return Dropout({name: layer.p for name, layer in layers.items() if layer.p > 0}, switched_off, called)


def _listed(layers: Mapping[str, float]) -> str:
    return ", ".join(f"{probability:g} ({name})" for name, probability in layers.items())
