"""ImageNet weights of the VGGs in torchvision."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from .read import Checkpoint

NAMES = ("vgg11", "vgg13", "vgg16", "vgg19")


def torchvision_checkpoint(name: str, *, progress: bool = False) -> Checkpoint:
    """Return the ImageNet weights of a VGG in torchvision; torch.hub downloads them once and caches them.

    Args:
        name: One of NAMES.
        progress: Show a progress bar on stderr during the download.

    Raises:
        CheckpointError: Another name, or the weights are not available.
    """
    import torchvision  # noqa: PLC0415 - takes a second, and only this function needs it

    if name not in NAMES:
        raise CheckpointError(f"{name!r:.60} is not a network of torchvision known here; use {', '.join(NAMES)}")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        state_dict = weights.get_state_dict(progress=progress, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, a damaged download, a full disk
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise CheckpointError(
            f"could not get the weights of {name} from torchvision ({weights.url}): {reason}; check the network, or "
            "pass a checkpoint file"
        ) from error
    return Checkpoint(Path(name), "torch", state_dict)
