"""`bn-insert finetune`: train a checkpoint on class folders, with or without BatchNorm."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bn_insert.support.text import listed

from . import shared_options as opt
from .console import print_error, print_note, print_warning
from .finetune_display import FinetuneDisplay, warn_of_classes_not_validated
from .input_shapes import image_shape
from .inputs import check_one_input, in_order_of_outputs, note_unreadable, open_checkpoint, warn_of_other_normalization
from .interruption import StopRequest, signals, stop_on_signals
from .named_checkpoints import check_checkpoint
from .option_values import ImageOptions, open_device
from .preprocessing import side_of

if TYPE_CHECKING:
    from bn_insert.images import ClassFolders, Unreadable

DIVERGED = 1
INTERRUPTED = 130

_RATE = "Learning rate"
_OPTIMIZER = "Optimizer and regularization"
_NETWORK = "Network"
_CLASSES_SHOWN = 5
_VALIDATION = "Validation"


def _output_dir(text: str) -> Path:
    if not text:  # as Path, it would be the current folder
        raise typer.BadParameter("the path is empty; pass a folder, or . for the current one")
    return Path(text)


def finetune(  # noqa: PLR0917 - options are keyword-only on the command line
    checkpoint: opt.Checkpoint,
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="A folder with train/CLASS/IMAGE and val/CLASS/IMAGE.", show_default=False),
    ],
    output_dir: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output-dir",
            metavar="DIR",
            help="Output directory; created if missing.",
            show_default=False,
            parser=_output_dir,
        ),
    ],
    model: opt.Model = None,
    key: opt.Key = None,
    ignore_unexpected: opt.IgnoreUnexpected = False,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Passes over the training images; can be changed when resuming. [default: 10, or that of the "
            "resumed run]",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            metavar="EPOCHS",
            min=1,
            help="Stop after this many epochs without an improvement in validation accuracy. "
            "[default: train for all epochs]",
            rich_help_panel=_VALIDATION,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("-b", "--batch-size", min=1, help="Images per step (and per process, with torchrun).")
    ] = 32,
    accumulate: Annotated[
        int,
        typer.Option(
            min=1,
            help="Batches whose gradients are accumulated for each step. BatchNorm still normalizes each batch on "
            "its own: for small batches, see --batchnorm renorm.",
        ),
    ] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in DIR, or start one if DIR is empty.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the results in DIR.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed for image order, augmentation and dropout.")] = 0,
    device: opt.Device = None,
    amp: Annotated[bool, typer.Option("--amp", help="Train under bfloat16 autocast.")] = False,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Also write DIR/tensorboard (needs pip install 'bn-insert[tensorboard]')."),
    ] = False,
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="X [x>0]",
            help="Peak learning rate. [default: chosen in short trials, starting at 0.0003 (0.003 for SGD)]",
            rich_help_panel=_RATE,
        ),
    ] = None,
    lr_warmup_epochs: Annotated[
        float, typer.Option(min=0, help="Epochs of linear warm-up; may be fractional.", rich_help_panel=_RATE)
    ] = 0.5,
    lr_scheduler: Annotated[
        Literal["constant", "cosine", "step"], typer.Option(help="Schedule after warm-up.", rich_help_panel=_RATE)
    ] = "cosine",
    lr_step_size: Annotated[
        int, typer.Option(min=1, help="Epochs between steps of the step schedule.", rich_help_panel=_RATE)
    ] = 30,
    lr_gamma: Annotated[
        float,
        typer.Option(
            min=0,
            help="Factor by which the step schedule multiplies the learning rate at each step.",
            rich_help_panel=_RATE,
        ),
    ] = 0.1,
    optimizer: Annotated[
        Literal["sgd", "adamw"], typer.Option("--opt", help="Optimizer.", rich_help_panel=_OPTIMIZER)
    ] = "adamw",
    momentum: Annotated[
        float, typer.Option(metavar="X [0<=x<1]", help="SGD momentum.", rich_help_panel=_OPTIMIZER)
    ] = 0.9,
    weight_decay: Annotated[
        float,
        typer.Option(
            "--wd", "--weight-decay", min=0, help="Weight decay of conv and dense weights.", rich_help_panel=_OPTIMIZER
        ),
    ] = 1e-4,
    norm_weight_decay: Annotated[
        float,
        typer.Option(
            min=0,
            help="Weight decay of BatchNorm's gamma and beta, which carry the pretrained scale.",
            rich_help_panel=_OPTIMIZER,
        ),
    ] = 0.0,
    label_smoothing: Annotated[
        float,
        typer.Option(metavar="X [0<=x<1]", help="Label smoothing; 0 turns it off.", rich_help_panel=_OPTIMIZER),
    ] = 0.0,
    hflip: Annotated[
        float,
        typer.Option(min=0, max=1, help="Probability of mirroring a training image.", rich_help_panel=_OPTIMIZER),
    ] = 0.0,
    crop_scale: Annotated[
        float,
        typer.Option(
            metavar="X [0<x<=1]",
            help="Smallest fraction of the area that a random resized crop of a training image keeps, such as 0.35; "
            "1 turns it off.",
            rich_help_panel=_OPTIMIZER,
        ),
    ] = 1.0,
    train: Annotated[
        Literal["all", "batchnorm", "head"],
        typer.Option(
            metavar="WHAT",
            help="Parameters to train. all: every parameter; batchnorm: gamma and beta of BatchNorm, and the head; "
            "head: only the head.",
            rich_help_panel=_NETWORK,
        ),
    ] = "all",
    head: Annotated[
        str,
        typer.Option(
            metavar="keep|WIDTH",
            help="Keep the checkpoint's dense layers, or replace them with a new head of this width with BatchNorm.",
            rich_help_panel=_NETWORK,
        ),
    ] = "keep",
    fit_output: Annotated[
        bool,
        typer.Option(
            help="Fit a new output layer, or one that is little better than guessing, before training; the output "
            "layer of a new head is not fitted.",
            rich_help_panel=_NETWORK,
        ),
    ] = True,
    batchnorm: Annotated[
        Literal["train", "renorm", "freeze-statistics", "freeze"] | None,
        typer.Option(
            metavar="MODE",
            help="How BatchNorm layers behave in training. train: normalize by the batch; renorm: Batch "
            "Renormalization, for small batches; freeze-statistics: keep running statistics fixed, train gamma and "
            "beta; freeze: keep all of these fixed. [default: renorm with batches of fewer than 8 images, otherwise "
            "train]",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    renorm_r_max: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="With renorm: largest correction factor of the standard deviation; the smallest is its inverse; "
            "inf for no limit. [default: none, unless the running statistics lag behind the weights]",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    renorm_d_max: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="With renorm: largest correction of the mean, up or down, in running standard deviations; inf for "
            "no limit. [default: as for --renorm-r-max]",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    recalibrate: Annotated[
        bool,
        typer.Option(
            help="Re-estimate running statistics on training images before each validation.",
            rich_help_panel=_VALIDATION,
        ),
    ] = True,
    freeze_features: Annotated[
        bool,
        typer.Option(
            "--freeze-features",
            help="Train only the module classifier: all dense layers of a VGG. --train head trains only the output "
            "layer.",
            rich_help_panel=_NETWORK,
        ),
    ] = False,
    dropout: Annotated[
        float | None,
        typer.Option(
            metavar="X [0<=x<1]",
            help="Probability of every dropout layer. [default: 0 if a BatchNorm normalizes by the batch, otherwise "
            "the checkpoint's]",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    sync_bn: Annotated[
        bool,
        typer.Option(
            "--sync-bn",
            help="Synchronize batch statistics across processes (torchrun): GPUs only, except with renorm.",
            rich_help_panel=_NETWORK,
        ),
    ] = False,
    workers: opt.Workers = 2,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    strict: opt.Strict = False,
) -> None:
    """Train a checkpoint on labeled images; its output layer is replaced if the number of classes differs.

    The output directory contains the best and the last checkpoint (best.pth, last.pth), metrics.csv, curves.png,
    classes.txt, report.html (with its data, report.json), and state.pth, from which --resume continues. `bn-insert
    report` compares several runs. Ctrl-C finishes the current step and saves; press it again to stop immediately.
    With several processes: `torchrun --nproc-per-node 2 -m bn_insert finetune CHECKPOINT DATA --output-dir DIR`.

    Example: `bn-insert finetune vgg16-bn.pth flowers/ --output-dir run/`

    Other architectures: `bn-insert finetune alexnet-bn.pth flowers/ --output-dir run/ --model
    torchvision.models:alexnet`
    """
    started = time.monotonic()
    import bn_insert  # noqa: PLC0415 - imports torch, only when work begins
    from bn_insert.images import check_class_folders, open_class_folders  # noqa: PLC0415
    from bn_insert.report import file_facts  # noqa: PLC0415

    planned = epochs or bn_insert.TrainingSettings().epochs
    if epochs is None and resume and (output_dir / "state.pth").exists():
        planned = max(planned, math.ceil(lr_warmup_epochs))  # until the resumed run says how many it has
    settings = bn_insert.TrainingSettings(
        epochs=planned,
        batch_size=batch_size,
        lr=lr,
        lr_warmup_epochs=lr_warmup_epochs,
        lr_scheduler=lr_scheduler,
        lr_step_size=lr_step_size,
        lr_gamma=lr_gamma,
        opt=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        norm_weight_decay=norm_weight_decay,
        label_smoothing=label_smoothing,
        amp=amp,
        sync_bn=sync_bn,
        batchnorm=batchnorm,
        renorm_r_max=renorm_r_max,
        renorm_d_max=renorm_d_max,
        train=train,
        head=_head_width(head),
        fit_output=fit_output,
        freeze_features=freeze_features,
        dropout=dropout,
        recalibrate=recalibrate,
        hflip=hflip,
        crop_scale=crop_scale,
        seed=seed,
        accumulate=accumulate,
        patience=patience,
    )
    check_checkpoint(checkpoint)
    bn_insert.check_output_dir(output_dir, resume=resume, overwrite=force, inputs=[checkpoint])
    check_class_folders(data)
    chosen = open_device(device)
    image_options = ImageOptions(1, seed, batch_size, workers, resize, crop, mean, std, strict)
    opened = open_checkpoint(
        checkpoint, image_options, model, images=data, key=key, ignore_unexpected=ignore_unexpected
    )
    network, transform, *_ = opened
    check_one_input(network, "class folders contain only images; train this network in your own loop")
    if not resume:  # its weights come from state.pth
        warn_of_other_normalization(opened, checkpoint)
    channels = image_shape(network, side_of(transform))[0]
    folders = open_class_folders(data, transform, strict=strict, channels=channels, workers=workers)
    images = in_order_of_outputs(folders, opened.classes)
    signals.keep(lambda: _kept(output_dir))
    missing = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    with bn_insert.process_group(chosen) as target:
        ranks = bn_insert.Ranks.current()
        first = ranks.first
        display = FinetuneDisplay(len(images.train), batch_size * accumulate * ranks.count)
        with (
            stop_on_signals(display.stopping if first else None) as stop,
            signals.cleaning(partial(_remove_unfinished, output_dir, missing)) if first else nullcontext(),
            display,
        ):
            try:
                result = bn_insert.finetune(
                    network,
                    images,
                    output_dir,
                    settings,
                    resume=resume,
                    resume_epochs=epochs is None,
                    overwrite=force,
                    device=target,
                    on_start=display.start if first else None,
                    on_fit=display.fit if first else None,
                    on_trial=display.trial if first else None,
                    on_step=display.step if first else None,
                    on_epoch=display.epoch if first else None,
                    stop=stop,
                    facts={"checkpoint": file_facts(checkpoint)} if first else {},
                    tensorboard=tensorboard,
                )
            except bn_insert.DivergenceError as error:
                display.close()
                if first:
                    print_error(str(error))
                raise typer.Exit(DIVERGED) from None
        unreadable = list(dict.fromkeys(file for files in ranks.gathered(images.unreadable) for file in files))
        if first:
            _note_skipped(images, unreadable)
            display.conclude(result, output_dir, time.monotonic() - started, model=model, resume=resume, force=force)
    if result.interrupted or stop():
        raise typer.Exit(_exit_code(stop))


def _head_width(text: str) -> int | None:
    if text == "keep":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither keep nor a width, such as 512", param_hint="--head") from None


def _kept(output_dir: Path) -> str:
    saved = (output_dir / "state.pth").exists()
    return f"{output_dir} keeps what was saved last; continue with --resume" if saved else "nothing was written"


def _note_skipped(images: ClassFolders, unreadable: Sequence[Unreadable]) -> None:
    """Warn of files that could not be read and of classes without others; correct the numbers of images."""
    note_unreadable(unreadable)
    if skipped := {file.path for file in unreadable}:
        left = [[image for image in part if image.path not in skipped] for part in (images.train, images.val)]
        train, val = ({image.label for image in part} for part in left)
        unknown = [name for label, name in enumerate(images.classes) if label not in train]
        if unknown:
            print_warning(
                f"No training image of {listed(unknown, _CLASSES_SHOWN)} can be read, so the network was not trained "
                f"on {'these classes' if len(unknown) > 1 else 'this class'}."
            )
        untested = [images.classes[label] for label in sorted({image.label for image in images.val} - val)]
        if untested:
            text = f"No validation image of {listed(untested, _CLASSES_SHOWN)} can be read"
            warn_of_classes_not_validated(text, len(untested))
        print_note(f"Images without them: {len(left[0]):,} for training and {len(left[1]):,} for validation.")


def _remove_unfinished(output_dir: Path, created: Sequence[Path]) -> None:
    """Remove what a signal has cut off: files that are not complete, and folders of this run without any other."""
    for staging in output_dir.glob(".bn-insert-*.tmp"):
        shutil.rmtree(staging, ignore_errors=True)
    for folder in created:
        with suppress(OSError):  # it has files
            folder.rmdir()


def _exit_code(stop: StopRequest) -> int:
    # Several processes stop together, also those that got no signal.
    return INTERRUPTED if stop.signal_number is None else 128 + stop.signal_number
