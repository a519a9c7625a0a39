"""`bn-insert compare-modes`: compares train mode, where BatchNorm uses batch statistics, with eval mode."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import shared_options as opt
from .console import print_json, print_result, print_table
from .inputs import open_calibration, open_checkpoint
from .named_checkpoints import check_checkpoint
from .option_values import ImageOptions, batch_sizes, open_device
from .tables import agreement_table
from .train_mode import measure_train_mode

if TYPE_CHECKING:
    from torch import nn

DEFAULT_SIZES = "4,8,16,32,64,128"


def compare_modes(  # noqa: PLR0917 - options are keyword-only on the command line
    checkpoint: opt.Checkpoint,
    images_from: opt.Pictures,
    sizes: Annotated[
        str | None,
        typer.Option(
            "--batch-sizes",
            metavar="N,N,...",
            help="Batch sizes to compare. [default: those of 4,8,16,32,64,128 that give at least two batches]",
            show_default=False,
        ),
    ] = None,
    images: opt.Images = 256,
    seed: opt.Seed = 0,
    batch_size: Annotated[
        int,
        typer.Option(
            "-b",
            "--batch-size",
            min=1,
            help="Images to decode, and to run in eval mode, at a time; does not affect the comparison.",
            rich_help_panel=opt.PIXELS,
        ),
    ] = 32,
    workers: opt.Workers = 2,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    strict: opt.Strict = False,
    device: opt.Device = None,
    model: opt.Model = None,
    key: opt.Key = None,
    ignore_unexpected: opt.IgnoreUnexpected = False,
    as_json: opt.Json = False,
) -> None:
    """Compare the outputs of a checkpoint in train mode and in eval mode, by batch size.

    In train mode, BatchNorm normalizes by the batch statistics, so the network that the optimizer trains differs from
    the one in eval mode. The difference is larger for small batches, and for images that differ from the calibration
    images. With Batch Renormalization (`finetune --batchnorm renorm`) both modes compute the same function; this is
    measured too, on the first 64 images, or on one batch of the largest size if that is larger. Dropout is off in both
    modes. The margin (±) of an agreement, at 95% confidence, shrinks with more --images.

    Example: `bn-insert compare-modes vgg16-bn.pth photographs/`
    """
    from bn_insert.images import check_source  # noqa: PLC0415 - keeps torch out of --help

    wanted = batch_sizes(sizes or DEFAULT_SIZES)
    image_options = ImageOptions(images, seed, batch_size, workers, resize, crop, mean, std, strict)
    check_checkpoint(checkpoint)
    check_source(images_from)
    target = open_device(device)
    network, transform, *_ = open_checkpoint(
        checkpoint, image_options, model, images=images_from, key=key, ignore_unexpected=ignore_unexpected
    )
    _check_batchnorm(network, checkpoint, images_from)
    batches = open_calibration(images_from, network, transform, image_options)
    found = measure_train_mode(network, batches, target, wanted, single=sizes is not None)
    if as_json:
        print_json(
            {
                "agreements": [agreement.to_dict() for agreement in found.agreements],
                "renorm": [agreement.to_dict() for agreement in found.renorm],
                "reading": found.reading,
            }
        )
        return
    print_table(agreement_table(found.agreements, found.renorm))
    print_result(found.reading)


def _check_batchnorm(network: nn.Module, checkpoint: str, images: Path) -> None:
    from torch.nn.modules.batchnorm import _BatchNorm  # noqa: PLC0415

    from bn_insert import GraphError  # noqa: PLC0415

    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        words = shlex.join(["bn-insert", "insert", checkpoint, str(images), "-o", f"{Path(checkpoint).stem}-bn.pth"])
        raise GraphError(f"{checkpoint} has no BatchNorm, so both modes are the same; insert BatchNorm first: {words}")
