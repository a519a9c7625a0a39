"""`bn-insert predict`: the most probable classes of images."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from bn_insert.support.text import counted

from . import shared_options as opt
from .console import image_progress, print_error, print_json, print_line, print_note
from .inputs import note_unreadable, open_calibration, open_checkpoint
from .named_checkpoints import check_checkpoint
from .option_values import ImageOptions, open_device
from .output_checks import CHECK_FAILED


def predict(  # noqa: PLR0917 - options are keyword-only on the command line
    checkpoint: opt.Checkpoint,
    images_from: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGES",
            help="An image, a folder of images, searched recursively, or a tensor file (.pt, .pth, .npy, .safetensors) "
            "of the shape that the network takes, such as N x C x H x W.",
            show_default=False,
        ),
    ],
    model: opt.Model = None,
    key: opt.Key = None,
    ignore_unexpected: opt.IgnoreUnexpected = False,
    top: Annotated[int, typer.Option(min=1, help="Number of classes to print for each image.")] = 1,
    batch_size: opt.BatchSize = 32,
    workers: opt.Workers = 2,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    strict: opt.Strict = False,
    device: opt.Device = None,
    as_json: opt.Json = False,
) -> None:
    """Print the most probable class of each image, with its probability, one line per image, sorted by path.

    Classes are shown by the names that `finetune` stored in the checkpoint, or else by number, counted from 0. The
    exit code is 1 if outputs are not finite.

    Example: `bn-insert predict run/best.pth photographs/ --top 3`

    Other architectures: `bn-insert predict run/best.pth photographs/ --model torchvision.models:alexnet`
    """
    import bn_insert  # noqa: PLC0415 - imports torch, only when work begins
    from bn_insert.images import check_source  # noqa: PLC0415

    image_options = ImageOptions(None, 0, batch_size, workers, resize, crop, mean, std, strict)
    check_checkpoint(checkpoint)
    check_source(images_from)
    target = open_device(device)
    network, transform, classes, *_ = open_checkpoint(
        checkpoint, image_options, model, images=images_from, key=key, ignore_unexpected=ignore_unexpected
    )
    batches = open_calibration(images_from, network, transform, image_options, shuffle=False)
    if not classes:
        print_note("The checkpoint stores no class names: the classes are numbered from 0.")
    with image_progress("predicting", batches.images) as progress:
        predictions = bn_insert.predict(network.to(target), batches, top=top, classes=classes, progress=progress)
    note_unreadable(batches.unreadable)
    if as_json:
        rows = [
            {
                "path": str(each.path),
                "classes": [
                    {"class": name, "label": label, "probability": probability}
                    for name, label, probability in zip(each.classes, each.labels, each.probabilities, strict=True)
                ],
            }
            for each in predictions
        ]
        skipped = [{"path": str(path), "reason": reason} for path, reason in batches.unreadable]
        print_json({"device": str(target), "predictions": rows, "skipped": skipped})
    else:
        for each in predictions:
            ranked = zip(each.classes, each.probabilities, strict=True)
            print_line(f"{each.path}: {', '.join(f'{name} {probability:.2%}' for name, probability in ranked)}")
    if wrong := [each.path for each in predictions if not isfinite(each.probabilities[0])]:
        images = counted(len(wrong), "image")
        print_error(f"the outputs for {images} are not finite, which makes the classes meaningless: {wrong[0]}")
        raise typer.Exit(CHECK_FAILED)
