"""`bn-insert insert`: a checkpoint and images in, a checkpoint with BatchNorm and the same outputs out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as opt
from .console import image_progress, print_error, print_note, print_result, print_table
from .inputs import ImageOptions, layer_kinds, open_calibration, open_checkpoint, open_device
from .tables import comparison_table, edge_table, site_table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bn_insert import Comparison, Layer, Moments, Site, TrainModeAgreement
    from bn_insert.images.batches import Batches, Unreadable

CHECK_FAILED = 1
INTERRUPTED = 130
# For the report's train-mode figures: six forward passes over each, little beside calibration with many images.
TRAIN_MODE_IMAGES = 64
CHECK_IMAGES = 2  # two networks run on them: enough to see any slip, few enough to cost little beside calibration


def insert(  # noqa: PLR0917 - options are keyword-only on the command line
    checkpoint: opt.Checkpoint,
    calibration: opt.Calibration,
    output: opt.Output,
    model: opt.Model = None,
    layers: opt.Layers = "conv,dense",
    include_output: opt.IncludeOutput = False,
    skip: opt.Skip = None,
    placement: opt.Placement = "before_activation",
    equalize: Annotated[
        bool, typer.Option("--equalize", help="First scale channels by powers of two: gamma becomes 0.7 to 1.42.")
    ] = False,
    eps: Annotated[float, typer.Option(min=0, help="Added to the variance in each BatchNorm.")] = 1e-5,
    momentum: Annotated[float, typer.Option(min=0, max=1, help="Of the running statistics, for later training.")] = 0.1,
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
    amp: Annotated[
        bool, typer.Option("--amp", help="Calibrate under bfloat16 autocast; statistics stay float32.")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Stop when mean and std are known this exactly, relative to std; 0.1, say. [all images]"),
    ] = None,
    atol: opt.AbsoluteTolerance = None,
    rtol: opt.RelativeTolerance = 1e-4,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write what was done and found, and how far train mode is from eval mode: a page, or JSON by name.",
            metavar="FILE.html|FILE.json",
        ),
    ] = None,
    force: opt.Force = False,
) -> None:
    """Insert BatchNorm behind conv and dense layers so that the outputs stay the same, bit for bit on a CPU.

    Each layer's mean and variance are taken from the CALIBRATION images in one pass. The result is checked against the
    original before anything is written; beyond tolerance nothing is written and the exit code is 1.

    Example: `bn-insert insert vgg16.pth photographs/ -o vgg16-bn.pth`

    No VGG: `bn-insert insert alexnet.pth photographs/ -o alexnet-bn.pth --model torchvision.models:alexnet`
    """
    started = time.monotonic()
    import torch  # noqa: PLC0415 - only when work begins, so that --help is quick

    from bn_insert import find_edges, survey  # noqa: PLC0415
    from bn_insert.checkpoints.save import check_output, save_checkpoint  # noqa: PLC0415
    from bn_insert.report.report import check_report, file_facts, insertion_report, write_report  # noqa: PLC0415
    from bn_insert.support.processes import Ranks, process_group  # noqa: PLC0415
    from bn_insert.surgery.insert import insert_with_norms  # noqa: PLC0415

    check_output(output, overwrite=force)
    if report:
        check_report(report, output, overwrite=force)
    image_options = ImageOptions(images, seed, batch_size, workers, resize, crop, mean, std, strict)
    network, transform = open_checkpoint(checkpoint, image_options, model)
    batches = open_calibration(calibration, network, transform, image_options)

    example = next(iter(batches.head(1))).images
    kinds = layer_kinds(layers)
    found = survey(network, example, layers=kinds, include_output=include_output, skip=skip or (), placement=placement)
    sites = _sites(found, checkpoint)
    with process_group(open_device(device)) as target:
        ranks = Ranks.current()
        autocast = torch.bfloat16 if amp else None
        moments, calibrated, unreadable = _calibrate(
            network, sites, batches, device=target, autocast=autocast, tolerance=tolerance
        )
    if not ranks.first:
        return  # one process checks and writes
    _note_unreadable(unreadable)
    edges = find_edges(network, example, sites) if equalize else []
    result, norms = insert_with_norms(network, sites, moments, edges=edges, eps=eps, momentum=momentum, shared=True)

    print_table(site_table(sites, moments))
    if edges:
        print_table(edge_table(edges))
    _note_calibration(calibrated, moments, tolerance)
    comparisons = _check(network, result, batches.head(CHECK_IMAGES), target)
    print_table(comparison_table(comparisons))
    accepted = all(comparison.within(atol, rtol) for comparison in comparisons.values())
    if accepted:
        save_checkpoint(result, output, transform=transform.to_dict(), overwrite=force)
    if report:
        # Behind the checkpoint: nothing that goes wrong here loses it.
        facts = {
            "checkpoint": file_facts(checkpoint),
            "calibration": {"source": str(calibration), "images": batches.images, "skipped": len(unreadable)},
            "output": file_facts(output) if accepted else None,
            "options": {"model": model, "layers": kinds, "include_output": include_output, "skip": skip or []}
            | {
                "placement": placement,
                "equalize": equalize,
                "eps": eps,
                "momentum": momentum,
                "seed": seed,
                "batch_size": batch_size,
            }
            | {"amp": amp, "device": str(target), "transform": transform.to_dict()},
            "seconds": time.monotonic() - started,
        }
        with _without_losing(output if accepted else None, report):
            agreements = _train_mode(result, batches.head(TRAIN_MODE_IMAGES), target)
            findings = insertion_report(found, moments, norms, edges, comparisons, agreements=agreements)
            write_report(report, facts | findings, overwrite=force)
    if not accepted:
        print_result("The outputs differ by more than the tolerance: nothing was written.", good=False)
        raise typer.Exit(CHECK_FAILED)
    print_result(f"Wrote {output}: {len(sites)} BatchNorm layers inserted.")


def _calibrate(
    network: nn.Module,
    sites: Sequence[Site],
    batches: Batches,
    *,
    device: torch.device,
    autocast: torch.dtype | None,
    tolerance: float | None,
) -> tuple[dict[str, Moments], int, list[Unreadable]]:
    """Return the moments of all processes' images together, the number of images, and the files skipped."""
    from bn_insert import calibrate  # noqa: PLC0415
    from bn_insert.support.processes import Ranks  # noqa: PLC0415

    ranks = Ranks.current()
    share = batches.part(ranks.rank, ranks.count)
    if device.type == "cuda":
        share = share.with_pinned_memory()
    images = 0
    with image_progress("calibrating", share.images, shown=ranks.first) as progress:

        def show(count: int) -> None:
            nonlocal images
            images = count
            progress(count)

        moments = calibrate(network, sites, share, device=device, autocast=autocast, tolerance=tolerance, progress=show)
    unreadable = [file for files in ranks.gathered(share.unreadable) for file in files]
    return moments, sum(ranks.gathered(images)), unreadable


def _sites(found: Sequence[Layer], checkpoint: str) -> list[Site]:
    from bn_insert.errors import GraphError  # noqa: PLC0415

    sites = [layer.site for layer in found if layer.site]
    if not sites:
        layers: dict[str, list[str]] = {}
        for layer in found:
            layers.setdefault(layer.reason.partition(":")[0], []).append(layer.name)
        reasons = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in layers.items())
        raise GraphError(f"nothing to insert in {checkpoint}, and nothing was written ({reasons})")
    return sites


def _note_calibration(images: int, moments: Mapping[str, Moments], tolerance: float | None) -> None:
    errors = [found.error_of(0.99) for found in moments.values()]
    error = nan if any(map(isnan, errors)) else max(errors)
    reached = f", to an error of {error:.3g} standard deviations" if tolerance is not None and error >= 0 else ""
    print_note(f"Calibrated on {images} images{reached}.")
    if tolerance is not None and isnan(error):
        print_note("The error cannot be told from one batch: give more images, or smaller batches (-b).")
    elif tolerance is not None and error > tolerance:
        print_note(f"The tolerance {tolerance:g} was not reached: give more images (--images), or be content.")


def _note_unreadable(unreadable: list[Unreadable]) -> None:
    if unreadable:
        first = unreadable[0]
        print_note(f"{len(unreadable)} unreadable files were skipped, the first: {first.path}: {first.reason}")


@contextmanager
def _without_losing(output: Path | None, report: Path) -> Iterator[None]:
    """Say what is written already where the report fails, or is not waited for."""
    from bn_insert.errors import CheckpointError  # noqa: PLC0415

    written = f"{output} is written and whole" if output else "nothing was written"
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {written}") from error
    except KeyboardInterrupt:
        print_error(f"interrupted; {written}, the report {report} is not")
        raise typer.Exit(INTERRUPTED) from None


def _train_mode(result: nn.Module, batches: Batches, device: torch.device) -> list[TrainModeAgreement] | str:
    """Return how far train mode is from eval mode, or why that cannot be measured."""
    from bn_insert import CalibrationError, train_mode_agreement  # noqa: PLC0415
    from bn_insert.compare.train_mode import agreement_reading  # noqa: PLC0415

    try:
        with image_progress("train mode", batches.images) as progress:
            agreements = train_mode_agreement(result, batches, device=device, progress=progress)
    except CalibrationError as error:  # a classifier of NaN, too few images: the checkpoint is good all the same
        print_note(f"Train mode could not be measured for the report: {error}")
        return str(error)
    print_note(agreement_reading(agreements))
    return agreements


def _check(model: nn.Module, result: nn.Module, batches: Batches, device: torch.device) -> dict[str, Comparison]:
    """Compare original and result on the CPU, whose kernel the promise is about, and on the device in use."""
    import torch  # noqa: PLC0415

    from bn_insert.compare.outputs import compare_outputs, finite_part  # noqa: PLC0415

    reference, note = finite_part(model)
    candidate, _ = finite_part(result)
    if note:
        print_note(note)
    comparisons = {}
    for place in dict.fromkeys((torch.device("cpu"), device)):
        comparisons[str(place)] = compare_outputs(reference.to(place), candidate.to(place), batches)
    model.cpu()
    result.cpu()
    return comparisons
