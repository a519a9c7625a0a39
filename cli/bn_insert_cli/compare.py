"""`bn-insert compare`: compares the outputs of two checkpoints."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from typing import Annotated

import typer

from bn_insert.errors import CheckpointError, UnneededKeyError

from . import shared_options as opt
from .console import image_progress, print_json, print_result, print_table
from .inputs import Opened, open_calibration, open_checkpoint
from .named_checkpoints import check_checkpoint, is_torchvision_name, print_assumptions, read_named_checkpoint
from .option_values import ImageOptions, open_device
from .output_checks import CHECK_FAILED, CHECK_IMAGES, allowed, warn_of_random_outputs
from .preprocessing import print_preprocessing
from .tables import comparison_table


def compare(  # noqa: PLR0917 - options are keyword-only on the command line
    a: Annotated[str, typer.Argument(metavar="A", help="The reference checkpoint.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The checkpoint to compare with A.", show_default=False)],
    images_from: opt.Pictures,
    model: opt.Model = None,
    model_b: Annotated[
        str | None,
        typer.Option(
            "--model-b",
            metavar="MODULE:FUNCTION",
            help="Like --model, for B only, if its architecture differs from that of A.",
            show_default=False,
            rich_help_panel=opt.CHECKPOINT,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="NAME",
            help="Key of the state dict in A and B, or in one of them if the other is a state dict itself.",
            show_default=False,
            rich_help_panel=opt.CHECKPOINT,
        ),
    ] = None,
    ignore_unexpected: Annotated[
        bool,
        typer.Option(
            "--ignore-unexpected",
            help="Ignore tensors in A and B that the networks do not have.",
            rich_help_panel=opt.CHECKPOINT,
        ),
    ] = False,
    images: opt.Images = opt.DEFAULT_IMAGES,
    seed: opt.Seed = 0,
    batch_size: opt.BatchSize = 32,
    workers: opt.Workers = 2,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    strict: opt.Strict = False,
    device: opt.Device = None,
    atol: opt.AbsoluteTolerance = None,
    rtol: opt.RelativeTolerance = 1e-4,
    as_json: opt.Json = False,
) -> None:
    """Compare the outputs of two checkpoints: bit-identity, largest differences, top-1 agreement.

    The exit code is 1 if a difference exceeds --atol or --rtol. The preprocessing defaults to that stored in B,
    or else in A.

    Example: `bn-insert compare vgg16.pth vgg16-bn.pth photographs/`

    Other architectures: `bn-insert compare alexnet.pth alexnet-bn.pth photographs/ --model torchvision.models:alexnet`
    """
    from bn_insert import compare_outputs  # noqa: PLC0415 - keeps torch out of --help
    from bn_insert.images import check_source  # noqa: PLC0415

    image_options = ImageOptions(images, seed, batch_size, workers, resize, crop, mean, std, strict)
    check_checkpoint(a)
    check_checkpoint(b)
    check_source(images_from)
    target = open_device(device)
    # --model applies to both, unless one of them is a torchvision name, whose architecture is known.
    model_a = None if is_torchvision_name(a) and not is_torchvision_name(b) else model
    if model_b is None and (is_torchvision_name(a) or not is_torchvision_name(b)):
        model_b = model
    opened_a, has_key = _open(a, image_options, model_a, key, optional=True, ignore_unexpected=ignore_unexpected)
    opened_b, _ = _open(b, image_options, model_b, key, optional=has_key, ignore_unexpected=ignore_unexpected)
    name, chosen = (a, opened_a) if _knows_none(b, opened_b) and not _knows_none(a, opened_a) else (b, opened_b)
    transform, origin = chosen.transform, chosen.origin
    if not _knows_none(name, chosen):
        origin = origin.replace("the checkpoint", name)  # which of the two
    print_preprocessing(transform, origin, images_from)
    print_assumptions(opened_b.network, opened_b.settings, b, model_b)
    reference, candidate = opened_a.network.to(target), opened_b.network.to(target)
    batches = open_calibration(images_from, reference, transform, image_options)
    with image_progress("comparing", batches.images) as progress:
        comparison = compare_outputs(reference, candidate, batches, progress=progress)
    within = comparison.within(atol, rtol)
    warn_of_random_outputs([comparison], reference, a, batches.head(CHECK_IMAGES), atol=atol, rtol=rtol)
    if as_json:
        print_json({"device": str(target), "within_tolerance": within} | asdict(comparison))
        raise typer.Exit(0 if within else CHECK_FAILED)
    print_table(comparison_table({str(target): comparison}, title=f"{a} and {b}"))
    if not within:
        print_result(f"The outputs differ by more than {allowed(atol, rtol)} allows.", good=False)
        raise typer.Exit(CHECK_FAILED)
    equal = "bit for bit" if comparison.bit_identical else f"within {allowed(atol, rtol)}"
    print_result(f"The outputs are equal {equal}.")


def _open(
    checkpoint: str,
    options: ImageOptions,
    function: str | None,
    key: str | None,
    *,
    optional: bool,
    ignore_unexpected: bool,
) -> tuple[Opened, bool]:
    """Return a checkpoint, and whether its state dict is under the key; if `optional`, it need not be."""
    try:
        opened = open_checkpoint(checkpoint, options, function, key=key, ignore_unexpected=ignore_unexpected)
    except UnneededKeyError:
        if not optional:
            raise
        return open_checkpoint(checkpoint, options, function, ignore_unexpected=ignore_unexpected), False
    except CheckpointError:
        # In a state dict, the key may be an attribute of the network rather than one of several networks.
        with suppress(CheckpointError):
            if optional and not read_named_checkpoint(checkpoint, function).key:
                return open_checkpoint(checkpoint, options, function, ignore_unexpected=ignore_unexpected), False
        raise
    return opened, key is not None


def _knows_none(checkpoint: str, opened: Opened) -> bool:
    """Return whether a checkpoint does not tell the preprocessing of its images."""
    return not is_torchvision_name(checkpoint) and not (opened.settings and opened.settings.transform)
