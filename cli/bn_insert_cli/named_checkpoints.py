"""The checkpoint that the command line names: a file, or a network of torchvision."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bn_insert.errors import CheckpointError, UnneededKeyError

from .console import print_note

if TYPE_CHECKING:
    from torch import nn

    from bn_insert import Checkpoint, Settings

TORCHVISION_NAMES = ("vgg11", "vgg13", "vgg16", "vgg19")
_CHECKPOINT_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".safetensors"}
_FILES_LOOKED_AT = 1000  # in a folder that was passed as a checkpoint: a listing of all may take long


def check_checkpoint(checkpoint: str) -> None:
    """Raise CheckpointError unless the argument is an existing path or the name of a torchvision network."""
    try:
        named = is_torchvision_name(checkpoint) or Path(checkpoint).exists()
    except OSError:  # no permission, or too long a name: reading the file reports it
        return
    if not named:
        _check_run_has_epoch(Path(checkpoint))
        read_named_checkpoint(checkpoint)  # whose error suggests similar names
    if checkpoint and _has_only_images(Path(checkpoint)):  # the empty path would be the current folder
        raise CheckpointError(
            f"{checkpoint} is a folder of images, not a checkpoint file; pass the checkpoint first, and the images "
            "after it"
        )


def _has_only_images(path: Path) -> bool:
    """Return whether a path is a folder of images, perhaps in subfolders, without a checkpoint file among them."""
    from bn_insert import ImageError  # noqa: PLC0415
    from bn_insert.images import check_source  # noqa: PLC0415

    with suppress(ImageError, OSError):
        if path.is_dir():
            check_source(path)
            names = islice(_visible_names(path), _FILES_LOOKED_AT)
            return not any(_CHECKPOINT_SUFFIXES.intersection(Path(name.lower()).suffixes) for name in names)
    return False


def _visible_names(folder: Path) -> Iterator[str]:
    """Yield the names of the files in a folder and its subfolders, except for hidden ones."""
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]  # os.walk enters those that are left
        yield from (name for name in names if name[0] != ".")


def _check_run_has_epoch(path: Path) -> None:
    """Raise CheckpointError if a path that does not exist is a checkpoint of a run without a complete epoch."""
    begun, trained = (path.with_name(name).exists() for name in ("state.pth", "metrics.csv"))
    if path.name in {"best.pth", "last.pth"} and begun and not trained:
        raise CheckpointError(
            f"{path} does not exist: the run in {path.parent} has no complete epoch yet; continue it with `bn-insert "
            "finetune ... --resume`"
        )


def read_named_checkpoint(
    checkpoint: str, function: str | None = None, *, mmap: bool = False, key: str | None = None
) -> Checkpoint:
    """Read a checkpoint file or the weights of a network in torchvision.

    Args:
        checkpoint: Path of the file, or a name in TORCHVISION_NAMES.
        function: --model; the current folder is added to the places from which it can be imported.
        mmap: Leave the values in the file until they are used.
        key: --key.
    """
    from bn_insert import read_checkpoint, torchvision_checkpoint  # noqa: PLC0415

    if is_torchvision_name(checkpoint):
        if key is not None:
            raise UnneededKeyError(f"{checkpoint} is a network of torchvision; leave out --key")
        if function is not None:
            raise typer.BadParameter(
                f"{checkpoint} is a network of torchvision, whose architecture is known; --model is for checkpoint "
                "files",
                param_hint="--model",
            )
        return torchvision_checkpoint(checkpoint)
    if function is not None and (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)  # as python -m does; the function may import more when it is called
    try:
        return read_checkpoint(checkpoint, mmap=mmap, key=key)
    except CheckpointError as error:
        if not _is_name(checkpoint):
            raise
        try:
            return torchvision_checkpoint(checkpoint)
        except CheckpointError as unknown:
            raise CheckpointError(f"{error}, and {unknown}") from error


def print_assumptions(network: nn.Module, settings: Settings | None, checkpoint: str, function: str | None) -> None:
    """Print what was assumed of a network that was built from the keys of its checkpoint file alone."""
    from bn_insert import vgg_assumptions  # noqa: PLC0415

    if function is None and not is_torchvision_name(checkpoint) and (assumed := vgg_assumptions(network, settings)):
        print_note(assumed)


def is_torchvision_name(checkpoint: str) -> bool:
    """Return whether an argument is the name of a network with weights in torchvision, and not a file."""
    return checkpoint in TORCHVISION_NAMES and not Path(checkpoint).exists()


def _is_name(checkpoint: str) -> bool:
    """Return whether an argument looks like the name of a network, and is not a file."""
    path = Path(checkpoint)
    return not path.suffix and len(path.parts) == 1 and not path.exists()
