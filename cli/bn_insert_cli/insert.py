"""`bn-insert insert`: insert BatchNorm into a checkpoint without changing its outputs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bn_insert.support.text import counted

from . import shared_options as opt
from .console import image_progress, print_note, print_table, print_warning
from .inputs import has_more_images, note_unreadable, open_calibration, open_checkpoint, shape_to_store, share_of
from .interruption import signals
from .named_checkpoints import print_assumptions
from .option_values import ImageOptions, layer_kinds, open_device
from .output_checks import (
    CHECK_IMAGES,
    check_files,
    compare_on_devices,
    exit_if_different,
    note_calibration,
    note_recording,
    report_facts,
    saying_what_is_written,
    warn_of_other_layers,
    write_checkpoint,
)
from .preprocessing import is_tensor_file, print_preprocessing
from .tables import comparison_table, edge_table, site_table
from .train_mode import LEAST_BATCHES, REPORT_SECONDS, REPORT_SIZES, TRAIN_MODE_IMAGES, TrainMode, measure_train_mode

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bn_insert import Comparison, Insertion
    from bn_insert.images import Batches


def insert(  # noqa: PLR0917 - options are keyword-only on the command line
    checkpoint: opt.Checkpoint,
    calibration: opt.Calibration,
    output: opt.Output,
    model: opt.Model = None,
    key: opt.Key = None,
    ignore_unexpected: opt.IgnoreUnexpected = False,
    layers: opt.Layers = "conv,dense",
    include_output: opt.IncludeOutput = False,
    skip: opt.Skip = None,
    placement: opt.Placement = "before-activation",
    equalize: Annotated[
        bool,
        typer.Option(
            "--equalize",
            help="Rescale channels by powers of two first, so that gamma is between 0.7 and 1.42.",
            rich_help_panel=opt.BATCHNORM,
        ),
    ] = False,
    eps: opt.Eps = 1e-5,
    momentum: opt.Momentum = 0.1,
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
    amp: opt.Amp = False,
    tolerance: opt.Tolerance = None,
    atol: opt.AbsoluteTolerance = None,
    rtol: opt.RelativeTolerance = 1e-4,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write a report: a page (.html), or its data (.json). It also compares train mode with eval mode, on "
            "up to 64 images: as many as can be processed in a minute, but at least 16.",
            metavar="FILE",
        ),
    ] = None,
    force: opt.Force = False,
) -> str:
    """Insert BatchNorm after conv and dense layers without changing the outputs (bit-identical on a CPU).

    The statistics of each layer are measured on the CALIBRATION images in one pass. Before anything is written, the
    result is checked against the original; if the outputs differ by more than --atol or --rtol allows, nothing is
    written and the exit code is 1.

    Example: `bn-insert insert vgg16.pth photographs/ -o vgg16-bn.pth`

    Other architectures: `bn-insert insert alexnet.pth photographs/ -o alexnet-bn.pth --model
    torchvision.models:alexnet`
    """
    started = time.monotonic()
    import torch  # noqa: PLC0415 - only when work begins, so that --help is quick

    from bn_insert import Ranks, insert, process_group  # noqa: PLC0415

    signals.begin(str(output), *([f"the report {report}"] if report else []))
    image_options = ImageOptions(images, seed, batch_size, workers, resize, crop, mean, std, strict)
    check_files(output, checkpoint, [calibration], report, overwrite=force)
    kinds, place = layer_kinds(layers), open_device(device)
    network, transform, classes, origin, settings = open_checkpoint(
        checkpoint, image_options, model, key=key, ignore_unexpected=ignore_unexpected
    )
    batches = open_calibration(calibration, network, transform, image_options)
    with process_group(place) as target:
        ranks = Ranks.current()
        if ranks.first:
            print_preprocessing(transform, origin, calibration)
            print_assumptions(network, settings, checkpoint, model)
        share = share_of(batches, ranks, target)
        with image_progress("calibrating", share.images, shown=ranks.first) as progress:
            insertion = insert(
                network,
                share,
                layers=kinds,
                include_output=include_output,
                skip=skip or (),
                placement=opt.placement(placement),
                equalize=equalize,
                eps=eps,
                momentum=momentum,
                device=target,
                autocast=torch.bfloat16 if amp else None,
                tolerance=tolerance,
                progress=progress,
            )
        unreadable = [file for files in ranks.gathered(share.unreadable) for file in files]
    if not ranks.first:
        return ""  # one process checks and writes
    _check_inserted(insertion, checkpoint)
    note_unreadable(unreadable)

    number_of_batches = -(-insertion.images // batch_size)
    print_table(site_table(insertion.sites, insertion.moments, batches=number_of_batches))
    if equalize:
        print_table(edge_table(insertion.edges))

    note_calibration(
        insertion.moments,
        insertion.images,
        tolerance,
        number_of_batches,
        limited=lambda: has_more_images(calibration, network, transform, image_options),
    )
    _note_dropouts(insertion, checkpoint)
    warn_of_other_layers(insertion)
    note_recording(insertion.sites)
    if insertion.one_image:
        print_warning(f"{insertion.one_image}.")
    comparisons = compare_on_devices(network, insertion.model, batches.head(CHECK_IMAGES), target)
    print_table(comparison_table(comparisons))
    accepted = all(comparison.within(atol, rtol) for comparison in comparisons.values())
    if accepted:
        write_checkpoint(
            insertion.model,
            output,
            transform,
            origin,
            calibration,
            classes=classes,
            input_shape=shape_to_store(batches),
            overwrite=force,
        )
    if report:
        # After the checkpoint: nothing that goes wrong here loses it.
        facts: dict[str, object] = {
            "calibration": {"source": str(calibration), "images": insertion.images, "skipped": len(unreadable)}
            | {"batches": number_of_batches},
            "preprocessing": {"origin": origin, "tensors": is_tensor_file(calibration)} | transform.to_dict(),
            "options": {"model": model, "layers": kinds, "include_output": include_output, "skip": skip or []}
            | {
                "placement": opt.placement(placement),
                "equalize": equalize,
                "eps": eps,
                "momentum": momentum,
                "seed": seed,
                "batch_size": batch_size,
            }
            | {"amp": amp, "device": str(target), "transform": transform.to_dict()},
        }
        with saying_what_is_written(output if accepted else None):
            facts |= report_facts(checkpoint, output if accepted else None)
            train_images = batches.head(TRAIN_MODE_IMAGES)
            _write_report(
                report, facts, insertion, comparisons, train_images, device=target, started=started, force=force
            )
    exit_if_different(comparisons.values(), network, checkpoint, batches.head(CHECK_IMAGES), atol=atol, rtol=rtol)
    # Printed by the caller: not by the demo, which deletes this file.
    return f"Wrote {output}: {counted(len(insertion.sites), 'BatchNorm layer')} inserted."


def _check_inserted(insertion: Insertion[nn.Module], checkpoint: str) -> None:
    """Raise GraphError with the layers' reasons if there was nothing to insert."""
    from bn_insert import GraphError  # noqa: PLC0415

    if insertion.sites:
        return
    raise GraphError(f"nothing to insert in {checkpoint}, and nothing was written: {insertion.nothing}")


def _note_dropouts(insertion: Insertion[nn.Module], checkpoint: str) -> None:
    if dropouts := insertion.dropouts_before_batchnorm:
        renumbered = any(new != old for new, old in dropouts.items())
        old = f" ({', '.join(dropouts.values())} in {Path(checkpoint).name})" if renumbered else ""
        print_note(
            f"Dropout before BatchNorm: {', '.join(dropouts)}{old}. In training it makes the "
            "variance larger than in evaluation, which distorts the statistics of the BatchNorm. finetune switches "
            "dropout off; in your own training loop, set p of these layers to 0."
        )
    if insertion.dropout_functions:
        print_warning(f"{insertion.dropout_functions}.")


def _write_report(
    path: Path,
    facts: dict[str, object],
    insertion: Insertion[nn.Module],
    comparisons: Mapping[str, Comparison],
    batches: Batches,
    *,
    device: torch.device,
    started: float,
    force: bool,
) -> None:
    """Measure train mode and write the report; `started` is the time at which the command started."""
    from bn_insert.report import insertion_report, write_report  # noqa: PLC0415

    report_started = time.monotonic()
    print_note(
        f"Measuring train mode for the report, on up to {min(TRAIN_MODE_IMAGES, batches.images)} images, for at most "
        f"{REPORT_SECONDS:.0f} s (but at least {LEAST_BATCHES} batches of {REPORT_SIZES[0]})."
    )
    train_mode = _train_mode(insertion.model, batches, device)
    findings = insertion_report(
        insertion.layer_statistics(),
        [asdict(edge) for edge in insertion.edges],
        {place: asdict(comparison) for place, comparison in comparisons.items()},
        [agreement.to_dict() for agreement in train_mode.agreements],
        renorm=[agreement.to_dict() for agreement in train_mode.renorm],
        reading=train_mode.reading,
    )
    now = time.monotonic()
    facts |= {"seconds": now - started, "report_seconds": now - report_started}
    with signals.saving(f"the report {path}"):
        write_report(path, facts | findings, overwrite=force)
    print_note(f"Wrote {path}: the report took {time.monotonic() - report_started:.0f} s.")


def _train_mode(result: nn.Module, batches: Batches, device: torch.device) -> TrainMode:
    """Return the agreement of train mode with eval mode, and in words what it means or why it cannot be measured."""
    from bn_insert import CalibrationError, GraphError  # noqa: PLC0415

    try:
        found = measure_train_mode(result, batches, device, REPORT_SIZES, seconds=REPORT_SECONDS)
    except (CalibrationError, GraphError) as error:  # NaN, too few images, several inputs: the checkpoint is good
        print_note(f"Train mode could not be measured for the report: {error}")
        return TrainMode([], [], f"Train mode could not be measured: {error}")
    print_note(found.reading)
    return found
