"""The values of options: images and how they are read, lists of numbers and of layers, a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import typer

from bn_insert.support.text import first_line, usable_devices

if TYPE_CHECKING:
    import torch

LayerKind = Literal["conv", "dense"]


@dataclass(frozen=True)
class ImageOptions:
    """Options about images; None means the setting in the checkpoint, or else ImageNet's; of `images`, all."""

    images: int | None
    seed: int
    batch_size: int
    workers: int
    resize: int | None
    crop: int | None
    mean: str | None
    std: str | None
    strict: bool

    def __post_init__(self) -> None:
        """Check what would otherwise be parsed only after large files have been read."""
        for option in ("mean", "std"):
            if (text := getattr(self, option)) is not None:
                numbers(text, f"--{option}")


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Parse numbers, such as "0.5" or "0.5,0.4,0.3"."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a number or several separated by commas", param_hint=option
        ) from None


def layer_kinds(text: str) -> tuple[LayerKind, ...]:
    """Parse kinds of layers, such as "conv,dense"."""
    kinds = tuple(kind.strip() for kind in text.split(","))
    if not set(kinds) <= {"conv", "dense"}:
        raise typer.BadParameter(f"{text!r} is not one of: conv, dense, or conv,dense", param_hint="--layers")
    return cast("tuple[LayerKind, ...]", kinds)


def batch_sizes(text: str) -> tuple[int, ...]:
    """Parse batch sizes, such as "4,8"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not an integer or several separated by commas", param_hint="--batch-sizes"
        ) from None


def open_device(name: str | None) -> torch.device:
    """Return a device by name; by default cuda if available, else cpu."""
    import torch  # noqa: PLC0415

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:  # its message lists all kinds of devices that PyTorch was ever built for
        raise typer.BadParameter(f"{name!r} is not a device; use {usable_devices()}", param_hint="--device") from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # For a kind of device that this build of PyTorch lacks, the message names an operator.
        said = "" if isinstance(error, NotImplementedError) else f" ({first_line(error).split('. ')[0]})"
        raise typer.BadParameter(
            f"the device {name!r} cannot be used on this machine{said}; use {usable_devices()}", param_hint="--device"
        ) from None
    return device
