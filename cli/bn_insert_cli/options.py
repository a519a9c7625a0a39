"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

DEFAULT_IMAGES = 1024

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A .pth, .pt or .safetensors file, or vgg11, vgg13, vgg16, vgg19 for torchvision's ImageNet weights.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="For checkpoints that are no VGG: a function without arguments that returns the network; it is imported, "
        "also from the current folder.",
        show_default=False,
    ),
]
Calibration = Annotated[
    Path,
    typer.Argument(
        metavar="CALIBRATION",
        help="A folder of images, searched recursively, or a tensor file (.pt, .npy, .safetensors), N x C x H x W.",
        show_default=False,
    ),
]
Output = Annotated[
    Path, typer.Option("-o", "--output", help="Where to write: .pth, .pt or .safetensors.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]

Layers = Annotated[str, typer.Option(help="Where to insert: conv, dense, or conv,dense.")]
IncludeOutput = Annotated[bool, typer.Option("--include-output", help="Also behind the output layer.")]
Skip = Annotated[
    list[str] | None, typer.Option(help="Glob pattern of layers to leave alone, such as 'features.0'; repeatable.")
]
Placement = Annotated[
    Literal["before_activation", "after_activation"], typer.Option(help="In front of the activation or behind it.")
]

_PIXELS = "Images"
Images = Annotated[
    int,
    typer.Option(min=1, help="At most so many: a seeded random sample of all that are there.", rich_help_panel=_PIXELS),
]
Seed = Annotated[int, typer.Option(help="Seed of that sample.", rich_help_panel=_PIXELS)]
BatchSize = Annotated[int, typer.Option("-b", "--batch-size", min=1, help="Images per batch.", rich_help_panel=_PIXELS)]
Workers = Annotated[
    int, typer.Option("-j", "--workers", min=0, help="Processes that decode images.", rich_help_panel=_PIXELS)
]
Resize = Annotated[
    int | None,
    typer.Option(
        min=0, help="Shorter side, pixels; 0: as it is. [the checkpoint's, else 256]", rich_help_panel=_PIXELS
    ),
]
Crop = Annotated[
    int | None,
    typer.Option(min=0, help="Centre crop, pixels; 0: none. [the checkpoint's, else 224]", rich_help_panel=_PIXELS),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Taken from pixels in 0..1: one number, or one a channel (0.5,0.4,0.3). [checkpoint's, else ImageNet's]",
        rich_help_panel=_PIXELS,
    ),
]
Std = Annotated[str | None, typer.Option(help="Pixels are then divided by it; as --mean.", rich_help_panel=_PIXELS)]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="An unreadable image is an error, not skipped and counted.", rich_help_panel=_PIXELS),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, mps ... [cuda where there is one]", show_default=False),
]
AbsoluteTolerance = Annotated[
    float | None, typer.Option("--atol", min=0, help="Largest absolute difference allowed. [no bound]")
]
RelativeTolerance = Annotated[
    float, typer.Option("--rtol", min=0, help="Largest difference allowed, relative to an image's largest output.")
]
