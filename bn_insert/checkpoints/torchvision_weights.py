"""The VGGs that torchvision offers with ImageNet weights."""

from __future__ import annotations

import torchvision
from torch import nn

from ..errors import CheckpointError
from .vgg import vgg_from_state_dict

NAMES = ("vgg11", "vgg13", "vgg16", "vgg19")


def torchvision_checkpoint(name: str, *, progress: bool = False) -> nn.Module:
    """Return a VGG with torchvision's ImageNet weights, in eval mode; they are downloaded once and kept by torch.hub.

    name: one of NAMES.  progress: let torch.hub draw a progress bar on stderr.
    Raises CheckpointError for another name, and when the weights cannot be had.
    """
    if name not in NAMES:
        raise CheckpointError(
            f"torchvision's networks are known here by the names {', '.join(NAMES)}, not {name!r:.60}"
        )
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        state_dict = weights.get_state_dict(progress=progress, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, a damaged download, a full disk: one fact to us
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise CheckpointError(
            f"could not get the weights of {name} from torchvision ({weights.url}): {reason}; check the network, or "
            "pass a checkpoint file"
        ) from error
    return vgg_from_state_dict(state_dict)
