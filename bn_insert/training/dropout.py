"""The dropout of a run: off before a BatchNorm, unless the settings ask for it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..batchnorm.dropout_before_batchnorm import dropouts_before_batchnorm
from ..batchnorm.modes import uses_batch_statistics
from ..errors import GraphError, TrainingError, as_passed
from ..graph.copies import unwrapped


@dataclass(frozen=True)
class Dropout:
    """The dropout layers of a network in training.

    Args:
        active: Probability of each layer that drops values, by its name.
        switched_off: Former probability of each layer that was switched off before a BatchNorm, by its name.
    """

    active: Mapping[str, float] = field(default_factory=dict)
    switched_off: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return what drops values and what does not, in words."""
        text = _listed(self.active) or "none"
        return f"{text}; switched off before BatchNorm: {_listed(self.switched_off)}" if self.switched_off else text


def set_dropout(network: nn.Module, probability: float | None, example: Tensor | None) -> Dropout:
    """Set the dropout layers of a network for training, in place.

    Args:
        network: The network.
        probability: Of every layer; None keeps each one's, and switches off those before a BatchNorm.
        example: Images that the network takes; None if none can be read.

    Returns:
        What drops values now.

    Raises:
        TrainingError: If there is a probability and no layer to have it.
    """
    modules = unwrapped(network).named_modules()
    layers = {name: module for name, module in modules if isinstance(module, _DropoutNd)}
    if probability is not None and not layers:
        raise TrainingError(
            f"{type(network).__name__} has no dropout layer to set to {probability}; leave out {as_passed('dropout')}"
        )
    before_batchnorm = _before_batchnorm(network, example) if probability is None and _any_active(layers) else ()
    switched_off = {name: layers[name].p for name in before_batchnorm}
    for name, layer in layers.items():
        layer.p = 0.0 if name in switched_off else layer.p if probability is None else probability
    return Dropout({name: layer.p for name, layer in layers.items() if layer.p > 0}, switched_off)


def _before_batchnorm(network: nn.Module, example: Tensor | None) -> list[str]:
    if example is None or not any(map(uses_batch_statistics, network.modules())):
        return []
    try:
        return dropouts_before_batchnorm(network, example)
    except GraphError as error:
        warnings.warn(
            f"dropout stays on, because it is unknown which dropout layers a BatchNorm follows: {error}. If one does, "
            f"switch dropout off with {as_passed('dropout', 0)}",
            stacklevel=2,
        )
        return []


def _any_active(layers: Mapping[str, _DropoutNd]) -> bool:
    return any(layer.p > 0 for layer in layers.values())


def _listed(layers: Mapping[str, float]) -> str:
    return ", ".join(f"{probability:g} ({name})" for name, probability in layers.items())
