"""`bn-insert evaluate`: accuracy of a checkpoint on labeled images, by class, and its confusion matrix."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from bn_insert.support.text import counted, listed

from . import shared_options as opt
from .console import image_progress, print_json, print_note, print_result, print_table
from .input_shapes import image_shape
from .inputs import check_one_input, note_unreadable, open_checkpoint
from .interruption import signals
from .named_checkpoints import check_checkpoint
from .option_values import ImageOptions, open_device
from .output_checks import CHECK_FAILED
from .preprocessing import side_of
from .tables import class_table

_NAMES_SHOWN = 20


def evaluate(  # noqa: PLR0917 - options are keyword-only on the command line
    checkpoint: opt.Checkpoint,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A folder with one subfolder per class (CLASS/IMAGE), or one whose val/ subfolder is laid out that "
            "way, as for finetune.",
            show_default=False,
        ),
    ],
    model: opt.Model = None,
    key: opt.Key = None,
    ignore_unexpected: opt.IgnoreUnexpected = False,
    confusion: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the confusion matrix as a picture (.png, .svg or .pdf).", show_default=False
        ),
    ] = None,
    force: opt.Force = False,
    images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of images, sampled at random (--seed). [default: all]",
            rich_help_panel=opt.PIXELS,
        ),
    ] = None,
    seed: opt.Seed = 0,
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
    """Measure the accuracy of a checkpoint on labeled images, overall and for each class.

    The folders of DATA are matched by name with the class names in the checkpoint, which `finetune` stores. If it
    stores none, the folders, sorted by name, are assumed to match its outputs in that order. The exit code is 1 if
    outputs are not finite.

    Example: `bn-insert evaluate run/best.pth flowers/ --confusion confusion.png`

    Other architectures: `bn-insert evaluate run/best.pth flowers/ --model torchvision.models:alexnet`
    """
    import bn_insert  # noqa: PLC0415 - imports torch, only when work begins
    from bn_insert.images import check_labelled_folder, open_labelled_batches  # noqa: PLC0415
    from bn_insert.report import check_confusion_matrix, write_confusion_matrix  # noqa: PLC0415

    picture = f"the confusion matrix {confusion}"
    signals.begin(*([picture] if confusion else []))
    if confusion:
        check_confusion_matrix(confusion, overwrite=force)
    image_options = ImageOptions(1, seed, batch_size, workers, resize, crop, mean, std, strict)
    check_checkpoint(checkpoint)
    check_labelled_folder(data)
    target = open_device(device)
    network, transform, classes, *_ = open_checkpoint(
        checkpoint, image_options, model, images=data, key=key, ignore_unexpected=ignore_unexpected
    )
    check_one_input(network, "class folders contain only images; use bn_insert.evaluate(model, batches) in Python")
    batches = open_labelled_batches(
        data,
        transform,
        classes=classes,
        images=images,
        seed=seed,
        batch_size=batch_size,
        channels=image_shape(network, side_of(transform))[0],
        workers=workers,
        strict=strict,
    )
    print_note(f"Images: {batches.images:,} from {batches.folder}.")
    if used := {"train": "train", "val": "select"}.get(batches.folder.resolve().name):
        print_note(f"If these images were used to {used} the checkpoint, expect lower accuracy on new images.")
    if not classes:
        print_note(
            f"The checkpoint stores no class names: the {len(batches.classes)} folders, sorted by name, are assumed to "
            "match its outputs in that order."
        )
    with image_progress("evaluating", batches.images) as progress:
        evaluation = bn_insert.evaluate(network.to(target), batches, classes=batches.classes, progress=progress)
    note_unreadable(batches.unreadable)
    if confusion:
        with signals.saving(picture):
            numbered = write_confusion_matrix(confusion, evaluation.classes, evaluation.confusion, overwrite=force)
        if numbered:
            names = listed([f"#{number} {name}" for number, name in numbered.items()], _NAMES_SHOWN)
            print_note(
                f"{confusion} shows some classes by number, because no installed font has all characters of their "
                f"names: {names}. --json has the names of all, in the order of the numbers."
            )
    finite = isfinite(evaluation.loss)
    if as_json:
        facts = {"device": str(target), "folder": str(batches.folder), "skipped": len(batches.unreadable)}
        print_json(facts | {"classes_stored": bool(classes)} | asdict(evaluation))
        raise typer.Exit(0 if finite else CHECK_FAILED)
    print_table(class_table(evaluation))
    found = f"Accuracy {evaluation.accuracy:.2%} on {counted(evaluation.images, 'image')}, loss {evaluation.loss:.4f}."
    if not finite:
        print_result(f"{found} Outputs are not finite, so neither figure is meaningful.", good=False)
        raise typer.Exit(CHECK_FAILED)
    print_result(found + (f" Wrote {confusion}." if confusion else ""))
