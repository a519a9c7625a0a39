"""Arguments and options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

DEFAULT_IMAGES = 1024

# Panels of a help page. Each has columns of its own, so that one long name does not narrow the texts of all options.
CHECKPOINT = "Checkpoint"
BATCHNORM = "BatchNorm"
PIXELS = "Images"

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A .pth, .pt or .safetensors file, or vgg11, vgg13, vgg16 or vgg19 for torchvision's ImageNet weights.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FUNCTION",
        help="For architectures other than VGG: a zero-argument function that builds the network; the current folder "
        "is searched too.",
        show_default=False,
        rich_help_panel=CHECKPOINT,
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="NAME",
        help="Key of the state dict in CHECKPOINT (a.b if it is nested); of several networks in it, the prefix of one.",
        show_default=False,
        rich_help_panel=CHECKPOINT,
    ),
]
IgnoreUnexpected = Annotated[
    bool,
    typer.Option(
        "--ignore-unexpected",
        help="Ignore tensors in CHECKPOINT that the network does not have.",
        rich_help_panel=CHECKPOINT,
    ),
]
_IMAGES_HELP = (
    "A folder of images, searched recursively, or a tensor file (.pt, .pth, .npy, .safetensors) of the shape that the "
    "network takes, such as N x C x H x W; for a network with several inputs, a file with a dict of tensors, keyed "
    "by the names of the forward's parameters."
)
Calibration = Annotated[
    Path,
    typer.Argument(
        metavar="CALIBRATION",
        help=_IMAGES_HELP,
        show_default=False,
    ),
]
Pictures = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGES",
        help=_IMAGES_HELP,
        show_default=False,
    ),
]
Output = Annotated[
    Path, typer.Option("-o", "--output", help="Output file (.pth, .pt or .safetensors).", show_default=False)
]
Report = Annotated[
    Path | None, typer.Option(help="Write a report: a page (.html), or its data (.json).", metavar="FILE")
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output.")]

Layers = Annotated[
    str,
    typer.Option(
        help="Kinds of layers to insert BatchNorm after: conv, dense, or conv,dense.", rich_help_panel=BATCHNORM
    ),
]
IncludeOutput = Annotated[
    bool,
    typer.Option("--include-output", help="Insert BatchNorm after the output layer too.", rich_help_panel=BATCHNORM),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(help="Glob pattern of layers to skip, such as 'features.0'; repeatable.", rich_help_panel=BATCHNORM),
]
# Values are written with hyphens, like options; with underscores, as in the Python API, they are accepted too.
Placement = Annotated[
    Literal["before-activation", "after-activation"],
    typer.Option(help="Insert before-activation or after-activation.", metavar="WHERE", rich_help_panel=BATCHNORM),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, instead of tables.")]

Images = Annotated[
    int,
    typer.Option(min=1, help="Maximum number of images, sampled at random (--seed).", rich_help_panel=PIXELS),
]
Seed = Annotated[int, typer.Option(min=0, help="Random seed.", rich_help_panel=PIXELS)]
BatchSize = Annotated[int, typer.Option("-b", "--batch-size", min=1, help="Images per batch.", rich_help_panel=PIXELS)]
Workers = Annotated[
    int, typer.Option("-j", "--workers", min=0, help="Number of processes that decode images.", rich_help_panel=PIXELS)
]
Resize = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Length of the shorter side in pixels; 0 to keep the size. [default: the checkpoint's, or 256]",
        rich_help_panel=PIXELS,
    ),
]
Crop = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Side of the center crop in pixels; 0 for no crop. [default: the checkpoint's, or 224]",
        rich_help_panel=PIXELS,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Mean to subtract from pixels in 0..1: one number, or one per channel (0.5,0.4,0.3). "
        "[default: the checkpoint's, or ImageNet's]",
        rich_help_panel=PIXELS,
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        help="Standard deviation to divide by, in the same format as --mean. "
        "[default: the checkpoint's, or ImageNet's]",
        rich_help_panel=PIXELS,
    ),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Fail on unreadable images instead of skipping them.", rich_help_panel=PIXELS),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda, cuda:1, mps, ... [default: cuda if available, else cpu]", show_default=False
    ),
]
Amp = Annotated[bool, typer.Option("--amp", help="Calibrate under bfloat16 autocast; statistics stay float32.")]
Tolerance = Annotated[
    float | None,
    typer.Option(
        metavar="X [x>0]",
        help="Stop calibrating once mean and std are known to within this fraction of std, such as 0.1. "
        "[default: use all images]",
    ),
]
Eps = Annotated[
    float,
    typer.Option(metavar="X [x>0]", help="Added to the variance in each BatchNorm.", rich_help_panel=BATCHNORM),
]
Momentum = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Momentum of the running statistics, for later training.", rich_help_panel=BATCHNORM
    ),
]
AbsoluteTolerance = Annotated[
    float | None,
    typer.Option("--atol", min=0, help="Largest absolute difference allowed between outputs. [default: no limit]"),
]
RelativeTolerance = Annotated[
    float,
    typer.Option(
        "--rtol",
        min=0,
        help="Largest difference allowed between outputs, relative to the largest output for the image.",
    ),
]


def placement(value: str) -> Literal["before_activation", "after_activation"]:
    """Return the value of --placement as the Python API has it."""
    return "after_activation" if value == "after-activation" else "before_activation"
