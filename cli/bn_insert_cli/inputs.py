"""From what stands on the command line to a network and its images."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bn_insert.graph.layers import Kind
    from bn_insert.images.batches import Batches
    from bn_insert.images.transform import Transform

TORCHVISION_NAMES = ("vgg11", "vgg13", "vgg16", "vgg19")


@dataclass(frozen=True)
class ImageOptions:
    """What the user said about images; None stands for the checkpoint's own setting, else ImageNet's."""

    images: int
    seed: int
    batch_size: int
    workers: int
    resize: int | None
    crop: int | None
    mean: str | None
    std: str | None
    strict: bool


def open_model(checkpoint: str, function: str | None = None, *, mmap: bool = False) -> nn.Module:
    """Return the network of a checkpoint file or of a torchvision name.

    function: "package.module:function" that makes the architecture, from --model; this imports and calls it.
    mmap: leave its values in the file, for a look at its layers.
    """
    from bn_insert.checkpoints.checkpoint import load_checkpoint  # noqa: PLC0415 - torch only when work begins
    from bn_insert.checkpoints.torchvision_weights import torchvision_checkpoint  # noqa: PLC0415

    if is_torchvision_name(checkpoint):
        if function is not None:
            raise typer.BadParameter(
                f"{checkpoint} is torchvision's network, whose architecture is known; --model is for checkpoint files",
                param_hint="--model",
            )
        return torchvision_checkpoint(checkpoint)
    if function is not None and (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)  # as for python -m; the function may import more when it is called
    return load_checkpoint(checkpoint, model=function, mmap=mmap)


def is_torchvision_name(checkpoint: str) -> bool:
    """Say whether it is no file, and the name of a network that torchvision has weights for."""
    return checkpoint in TORCHVISION_NAMES and not Path(checkpoint).exists()


def open_transform(checkpoint: str, options: ImageOptions) -> Transform:
    """Return the preprocessing: what the user said, else what is stored beside the checkpoint, else ImageNet's."""
    from bn_insert.checkpoints.checkpoint import read_settings  # noqa: PLC0415
    from bn_insert.images.transform import Transform  # noqa: PLC0415

    settings = read_settings(checkpoint) if Path(checkpoint).exists() else None
    stored = Transform.from_dict(settings.transform) if settings and settings.transform else Transform()
    return Transform(
        resize=stored.resize if options.resize is None else options.resize or None,
        crop=stored.crop if options.crop is None else options.crop or None,
        mean=stored.mean if options.mean is None else numbers(options.mean, "--mean"),
        std=stored.std if options.std is None else numbers(options.std, "--std"),
    )


def open_calibration(source: Path, model: nn.Module, transform: Transform, options: ImageOptions) -> Batches:
    """Return the batches of a folder of images or a tensor file, with the channels that the model takes."""
    from bn_insert.images.image_batches import open_batches  # noqa: PLC0415

    return open_batches(
        source,
        transform,
        images=options.images,
        seed=options.seed,
        batch_size=options.batch_size,
        workers=options.workers,
        channels=input_channels(model),
        strict=options.strict,
    )


def input_channels(model: nn.Module) -> int:
    """Return the number of channels of the images that a network takes: those of its first conv layer."""
    from torch.nn.modules.conv import _ConvNd  # noqa: PLC0415

    return next((module.in_channels for module in model.modules() if isinstance(module, _ConvNd)), 3)


def open_device(name: str | None) -> torch.device:
    """Return the device of that name, by default cuda where there is one."""
    import torch  # noqa: PLC0415

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"the device {name!r} cannot be used: {reason}", param_hint="--device") from None
    return device


def layer_kinds(text: str) -> tuple[Kind, ...]:
    """Return "conv,dense" as kinds of layers."""
    kinds = tuple(kind.strip() for kind in text.split(","))
    if not set(kinds) <= {"conv", "dense"}:
        raise typer.BadParameter(f"{text!r} is not one of: conv, dense, or conv,dense", param_hint="--layers")
    return cast("tuple[Kind, ...]", kinds)


def batch_sizes(text: str) -> tuple[int, ...]:
    """Return "4,8" as batch sizes."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not one whole number or several with commas between", param_hint="--batch-sizes"
        ) from None


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Return "0.5" or "0.5,0.4,0.3" as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not one number or several with commas between", param_hint=option
        ) from None
