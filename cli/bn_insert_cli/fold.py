"""`bn-insert fold`: merge every BatchNorm into the layer before it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bn_insert.support.text import counted

from . import shared_options as opt
from .console import print_note, print_result, print_table, print_warning
from .input_shapes import input_shape
from .inputs import check_one_input, open_calibration, open_checkpoint, shape_to_store
from .interruption import signals
from .option_values import ImageOptions
from .output_checks import (
    CHECK_IMAGES,
    CHECK_VOLUMES,
    check_files,
    exit_if_different,
    warn_of_untied,
    write_checkpoint,
)
from .preprocessing import side_of, transform_to_store
from .tables import comparison_table

if TYPE_CHECKING:
    from torch import nn


def fold(  # noqa: PLR0917 - options are keyword-only on the command line
    checkpoint: opt.Checkpoint,
    output: opt.Output,
    images_from: Annotated[
        Path | None,
        typer.Argument(
            metavar="IMAGES",
            help="Images to check the result on, at most 8 of them; random inputs by default.",
            show_default=False,
        ),
    ] = None,
    inserted_only: Annotated[
        bool,
        typer.Option(
            "--inserted-only",
            help="Fold only the BatchNorm layers that bn-insert inserted, and leave the original ones in place.",
        ),
    ] = False,
    model: opt.Model = None,
    key: opt.Key = None,
    ignore_unexpected: opt.IgnoreUnexpected = False,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Seed for the random inputs, or for the sample of IMAGES.", rich_help_panel=opt.PIXELS
        ),
    ] = 0,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    strict: opt.Strict = False,
    atol: opt.AbsoluteTolerance = None,
    rtol: opt.RelativeTolerance = 1e-4,
    force: opt.Force = False,
) -> None:
    """Fold every BatchNorm into its conv or dense layer; the outputs stay the same.

    The inverse of `insert`, before or after fine-tuning. Before anything is written, the result is checked
    against the original; if the outputs differ by more than --atol or --rtol allows, nothing is written and the exit
    code is 1.

    Example: `bn-insert fold vgg16-bn.pth -o vgg16-folded.pth`

    If the network already had BatchNorm: `bn-insert fold net-bn.pth -o net-folded.pth --inserted-only`

    Other architectures: `bn-insert fold alexnet-bn.pth -o alexnet.pth --model torchvision.models:alexnet`
    """
    import torch  # noqa: PLC0415 - only when work begins, so that --help is quick

    from bn_insert import GraphError, compare_outputs  # noqa: PLC0415
    from bn_insert import fold as fold_network  # noqa: PLC0415

    signals.begin(str(output))
    image_options = ImageOptions(CHECK_IMAGES, seed, CHECK_IMAGES, 0, resize, crop, mean, std, strict)
    check_files(output, checkpoint, [images_from] if images_from else [], None, overwrite=force)
    network, transform, classes, origin, settings = open_checkpoint(
        checkpoint, image_options, model, images=images_from, key=key, ignore_unexpected=ignore_unexpected
    )
    stored = transform_to_store(transform, origin, images_from)
    inputs: list[Any]
    if images_from is None:
        check_one_input(network, "pass a file with a dict of named tensors as IMAGES")
        stored_shape = settings.input_shape if settings else ()
        shape = input_shape(network, image_side=side_of(transform) if stored else None, stored=stored_shape)
        count = CHECK_IMAGES if len(shape) < 4 else CHECK_VOLUMES
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(count, *shape, generator=generator)]
    else:
        batches = open_calibration(images_from, network, transform, image_options)
        inputs, stored_shape = [batch[0] for batch in batches], shape_to_store(batches)
    result = fold_network(network, inputs[0], names=_inserted(network, checkpoint) if inserted_only else None)
    if not result.folded and not result.left:
        why = f"its BatchNorms are not modules of torch.nn: {result.others}" if result.others else "it has no BatchNorm"
        raise GraphError(f"nothing to fold in {checkpoint}: {why}; nothing was written")
    if images_from is None:
        shown = " x ".join(map(str, inputs[0].shape[1:]))
        print_note(f"No images given: the result is checked on {len(inputs[0])} random inputs of {shown}.")
    comparison = compare_outputs(network, result.model, inputs)
    print_table(comparison_table({"cpu": comparison}))
    exit_if_different([comparison], network, checkpoint, inputs[:1], atol=atol, rtol=rtol)
    write_checkpoint(
        result.model,
        output,
        transform,
        origin,
        images_from,
        classes=classes,
        input_shape=stored_shape,
        overwrite=force,
    )
    warn_of_untied(result.untied, output)
    if result.others:
        print_warning(f"BatchNorms that are not modules of torch.nn were not folded: {result.others}.")
    kept = f", {len(result.left)} left in place" if result.left else ""
    print_result(f"Wrote {output}: {counted(len(result.folded), 'BatchNorm layer')} folded{kept}.")


def _inserted(network: nn.Module, checkpoint: str) -> list[str]:
    """Return the names of the inserted BatchNorms; raise GraphError if all are the original's."""
    from torch.nn.modules.batchnorm import _BatchNorm  # noqa: PLC0415

    from bn_insert import GraphError, inserted_batchnorms  # noqa: PLC0415

    names = inserted_batchnorms(network)
    if names or not any(isinstance(module, _BatchNorm) for module in network.modules()):  # without any, `fold` says so
        return names
    raise GraphError(
        f"according to its history, {checkpoint} contains no BatchNorm inserted by bn-insert (see bn-insert inspect); "
        "without --inserted-only, all are folded; nothing was written"
    )
