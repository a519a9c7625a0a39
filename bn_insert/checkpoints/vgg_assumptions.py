"""What is assumed about a VGG that is rebuilt from its state dict, which does not store modules without tensors."""

from __future__ import annotations

from torch import nn

from ..errors import as_passed
from .settings import Settings


def vgg_assumptions(network: nn.Module, settings: Settings | None = None) -> str:
    """Return in words what `load_checkpoint` assumed about a VGG because its state dict does not store it.

    Args:
        network: A VGG that was built from its state dict, without its architecture.
        settings: The settings of its checkpoint. What they store need not be assumed.

    Returns:
        A sentence or two with the names of the modules; empty for a network with no `features` in sequence, and if the
        settings say that the network was rebuilt like this before it was saved.

    Examples:
        >>> from bn_insert import load_checkpoint
        >>> from bn_insert.demo import network_path
        >>> vgg_assumptions(load_checkpoint(network_path()))[:47]
        'Assumed, because a state dict does not store it'
    """
    features = getattr(network, "features", None)
    if not isinstance(features, nn.Sequential) or (settings and settings.rebuilt_from_keys):
        return ""
    pools = [f"features.{name}" for name, module in features.named_children() if isinstance(module, nn.MaxPool2d)]
    stored = settings.dropout if settings else {}
    modules = network.named_modules()
    dropouts = [name for name, module in modules if isinstance(module, nn.Dropout) and name not in stored]
    dropout = f", dropout with p 0.5 at {', '.join(dropouts)}" if dropouts else ""
    return (
        "Assumed, because a state dict does not store it: stride 1 and ReLU for every conv, 2 x 2 max pooling at "
        f"{', '.join(pools)}{dropout}. For anything else, such as LeakyReLU, average pooling or dropout between convs, "
        f"pass {as_passed('model')}."
    )
