"""ImageNet weights of the VGGs in torchvision."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

from ..errors import CheckpointError, as_passed
from ..support.near_names import near_names
from .read_file import Checkpoint

NAMES = ("vgg11", "vgg13", "vgg16", "vgg19")


def torchvision_checkpoint(name: str, *, progress: bool = False) -> Checkpoint:
    """Return the ImageNet weights of a VGG in torchvision; torch.hub downloads them once and caches them.

    Args:
        name: One of NAMES.
        progress: Show a progress bar on stderr during the download.

    Raises:
        CheckpointError: The name is not one of NAMES, or the weights are not available.
    """
    if name not in NAMES:
        raise CheckpointError(
            f"{name!r:.60} is not one of the networks whose weights can be downloaded ({', '.join(NAMES)}); "
            + _advice(name)
        )
    import torchvision  # noqa: PLC0415 - takes a second, and only this function needs it

    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        with redirect_stdout(sys.stderr):  # torch.hub prints there that it downloads
            state_dict = weights.get_state_dict(
                progress=progress, check_hash=True, map_location="cpu", weights_only=True
            )
    except Exception as error:  # no network, a damaged download, a full disk
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise CheckpointError(
            f"could not get the weights of {name} from torchvision ({weights.url}): {reason}; check the network, or "
            "pass a checkpoint file"
        ) from error
    return Checkpoint(Path(name), "torch", state_dict)


def _advice(name: str) -> str:
    """Return in words what to use in place of a name that is not in NAMES."""
    if not isinstance(name, str):
        return "pass a name"
    plain = name.lower().removesuffix("_bn")
    if plain in NAMES and plain != name.lower():
        return f"torchvision's {plain}_bn already has BatchNorm; to insert BatchNorm, use {plain}"
    if close := near_names(name, NAMES):
        return f"did you mean {' or '.join(close)}?"
    option = as_passed("model", option="--model, such as --model torchvision.models:alexnet")
    return f"for another architecture, save its weights to a file, and pass the file with {option}"
