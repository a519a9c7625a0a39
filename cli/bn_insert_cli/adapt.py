"""`bn-insert adapt`: move a network to new images without labels and without training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import chain
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bn_insert.support.text import counted, listed

from . import shared_options as opt
from .console import image_progress, print_note, print_result, print_table, print_warning
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
    report_facts,
    saying_what_is_written,
    warn_of_other_layers,
    warn_of_untied,
    write_checkpoint,
)
from .preprocessing import is_tensor_file, print_preprocessing
from .tables import accuracy_table, comparison_table, shift_table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bn_insert import Adaptation, Comparison, PredictionComparison
    from bn_insert.images import Batches, Transform

# Two networks run on them: enough for an entropy and an agreement. Labeled images are all used.
UNLABELLED_IMAGES = 256
_NAMES_SHOWN = 5


def adapt(  # noqa: PLR0917 - options are keyword-only on the command line
    checkpoint: opt.Checkpoint,
    images_from: Annotated[
        list[Path],
        typer.Argument(
            metavar="[SOURCE] TARGET",
            help="SOURCE: images of the kind that the network was trained on; left out for a checkpoint with "
            "BatchNorm. TARGET: the images to adapt to. Each is a folder, searched recursively, or a tensor file (.pt, "
            ".npy, .safetensors). Class folders in TARGET are used to measure the accuracy, not to adapt; they are "
            "matched by name with the class names in the checkpoint, if it stores any.",
            show_default=False,
        ),
    ],
    output: opt.Output,
    keep_batchnorm: Annotated[
        bool, typer.Option("--keep-batchnorm", help="Keep the inserted BatchNorm layers, to fine-tune the result.")
    ] = False,
    shrink: Annotated[
        bool,
        typer.Option(
            help="Move statistics only as far as the difference exceeds sampling error; this matters with few images."
        ),
    ] = True,
    model: opt.Model = None,
    key: opt.Key = None,
    ignore_unexpected: opt.IgnoreUnexpected = False,
    layers: opt.Layers = "conv,dense",
    include_output: opt.IncludeOutput = False,
    skip: opt.Skip = None,
    placement: opt.Placement = "before-activation",
    eps: opt.Eps = 1e-5,
    momentum: opt.Momentum = 0.1,
    images: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum number of images of SOURCE, and of TARGET, each sampled at random (--seed).",
            rich_help_panel=opt.PIXELS,
        ),
    ] = opt.DEFAULT_IMAGES,
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
    report: opt.Report = None,
    force: opt.Force = False,
) -> None:
    """Adapt a network to new images, without labels and without training.

    BatchNorm is inserted with the statistics of SOURCE, its statistics are re-estimated on TARGET, and the BatchNorm is
    folded. The result has the original architecture, with different weights and biases.

    Folding (with --keep-batchnorm, inserting) must not change the outputs: the networks before and after it are
    compared, and if they differ by more than --atol or --rtol allows, nothing is written and the exit code is 1.

    Example: `bn-insert adapt vgg16.pth photographs/ night/ -o vgg16-night.pth`

    A checkpoint with BatchNorm: `bn-insert adapt vgg16_bn.pth night/ -o vgg16_bn-night.pth`
    """
    started = time.monotonic()
    import torch  # noqa: PLC0415 - only when work begins, so that --help is quick

    from bn_insert import Ranks, process_group  # noqa: PLC0415
    from bn_insert import adapt as adapt_network  # noqa: PLC0415

    signals.begin(str(output), *([f"the report {report}"] if report else []))
    source_folder, target_folder, pictures = _source_and_target(images_from)
    image_options = ImageOptions(images, seed, batch_size, workers, resize, crop, mean, std, strict)
    check_files(output, checkpoint, images_from, report, overwrite=force)
    kinds, chosen = layer_kinds(layers), open_device(device)
    network, transform, classes, origin, settings = open_checkpoint(
        checkpoint, image_options, model, key=key, ignore_unexpected=ignore_unexpected
    )
    source = open_calibration(source_folder, network, transform, image_options) if source_folder else None
    target = open_calibration(target_folder, network, transform, image_options)
    with process_group(chosen) as place:
        ranks = Ranks.current()
        if ranks.first:
            _print_preprocessing(transform, origin, images_from, pictures)
            print_assumptions(network, settings, checkpoint, model)
        shares = [each and share_of(each, ranks, place) for each in (source, target)]
        total = sum(share.images for share in shares if share)
        with image_progress("adapting", total, shown=ranks.first) as progress:
            adaptation = adapt_network(
                network,
                shares[0],
                shares[1] or (),
                layers=kinds,
                include_output=include_output,
                skip=skip or (),
                placement=opt.placement(placement),
                keep_batchnorm=keep_batchnorm,
                shrink=shrink,
                eps=eps,
                momentum=momentum,
                device=place,
                autocast=torch.bfloat16 if amp else None,
                tolerance=tolerance,
                progress=progress,
            )
        skipped = [
            [file for files in ranks.gathered(share.unreadable) for file in files] if share else [] for share in shares
        ]
    if not ranks.first:
        return  # one process checks and writes
    note_unreadable([file for files in skipped for file in files])
    more = partial(has_more_images, model=network, transform=transform, options=image_options)
    _note_source(adaptation, batch_size, tolerance, limited=lambda: source_folder is not None and more(source_folder))
    _note_target(adaptation, batch_size, tolerance, limited=lambda: more(target_folder))
    comparisons = _check(network, adaptation, target.head(CHECK_IMAGES), place)
    accepted = all(comparison.within(atol, rtol) for comparison in comparisons.values())
    if accepted:
        write_checkpoint(
            adaptation.model,
            output,
            transform,
            origin,
            pictures,
            classes=classes,
            input_shape=shape_to_store(target),
            overwrite=force,
        )
    # After the checkpoint: nothing that goes wrong from here on loses it.
    with saying_what_is_written(output if accepted else None):
        predictions = _predictions(network, adaptation.model, target, target_folder, place, stored=classes)
        entropy = _entropy(network, source, place, predictions[0])
        findings = _findings(adaptation, comparisons, *predictions, entropy, stored=bool(classes), shrunk=shrink)
    if report:
        counts = ((source_folder, adaptation.source_images), (target_folder, adaptation.target_images))
        facts: dict[str, Any] = {
            name: folder and {"source": str(folder), "images": count, "skipped": len(files)}
            for name, (folder, count), files in zip(("source", "target"), counts, skipped, strict=True)
        }
        facts |= {
            "preprocessing": {"origin": origin, "tensors": is_tensor_file(pictures)} | transform.to_dict(),
            "options": {"model": model, "layers": kinds, "include_output": include_output, "skip": skip or []}
            | {"placement": opt.placement(placement), "keep_batchnorm": keep_batchnorm, "shrink": shrink}
            | {"tolerance": tolerance, "images": images}
            | {"eps": eps, "momentum": momentum, "seed": seed, "batch_size": batch_size}
            | {"amp": amp, "device": str(place), "transform": transform.to_dict()},
            "seconds": time.monotonic() - started,
        }
        with saying_what_is_written(output if accepted else None):
            _write_report(report, facts | findings, checkpoint, output if accepted else None, force=force)
    exit_if_different(comparisons.values(), network, checkpoint, target.head(CHECK_IMAGES), atol=atol, rtol=rtol)
    _warn_of_other_architecture(adaptation, output)
    kept = f", with {counted(len(adaptation.shifts), 'BatchNorm layer')}" if not adaptation.folded else ""
    done = f"adapted to {counted(adaptation.target_images, 'image')}" if adaptation.changed else "nothing was adapted"
    print_result(f"Wrote {output}: {done}{kept}.")


def _warn_of_other_architecture(adaptation: Adaptation[Any], output: Path) -> None:
    """Warn if the original's class cannot take the state dict that was written."""
    if adaptation.left:
        print_warning(
            f"{counted(len(adaptation.left), 'inserted BatchNorm layer')} could not be folded ({adaptation.left[0]}), "
            f"so {output} has keys that the original does not have."
        )
    warn_of_untied(adaptation.untied, output)


def _note_source(
    adaptation: Adaptation[Any], batch_size: int, tolerance: float | None, *, limited: Callable[[], bool]
) -> None:
    """Print what SOURCE was used for, and how exact its statistics are."""
    if not adaptation.insertion:
        return
    if nothing := adaptation.insertion.nothing:
        print_note(f"No BatchNorm was inserted, so SOURCE is used only to judge the result: {nothing}.")
    warn_of_other_layers(adaptation.insertion)
    batches = -(-adaptation.source_images // batch_size)
    note_calibration(
        adaptation.insertion.moments, adaptation.source_images, tolerance, batches, of="source", limited=limited
    )


def _note_target(
    adaptation: Adaptation[Any], batch_size: int, tolerance: float | None, *, limited: Callable[[], bool]
) -> None:
    """Print whether the statistics of TARGET are as exact as was asked for; warn if activations hardly vary on it."""
    if tolerance is not None:
        count = adaptation.target_images
        note_calibration(
            adaptation.target_moments, count, tolerance, -(-count // batch_size), of="target", limited=limited
        )
    if adaptation.constant:
        print_warning(f"{adaptation.constant}.")


def _findings(
    adaptation: Adaptation[Any],
    comparisons: dict[str, Comparison],
    predictions: PredictionComparison,
    classes: Sequence[str],
    source_entropy: float | None,
    *,
    stored: bool,
    shrunk: bool,
) -> dict[str, Any]:
    """Print what adapting changed, and return the data of the report."""
    from bn_insert.report import adaptation_report  # noqa: PLC0415

    print_table(shift_table(adaptation.shifts, shrunk=shrunk))
    if predictions.per_class:
        print_table(accuracy_table(predictions, classes, stored=stored))
    findings = adaptation_report(
        [shift.to_dict() for shift in adaptation.shifts],
        asdict(predictions),
        {place: asdict(comparison) for place, comparison in comparisons.items()},
        classes=classes,
        source_entropy=source_entropy,
        target_images=adaptation.target_images,
        changed=adaptation.changed,
        adapted_before=adaptation.adapted_before,
    )
    for verdict in findings["verdicts"]:
        print_verdict = print_note if verdict["state"] in {"good", "open"} else print_warning
        print_verdict(f"{verdict['subject']}: {verdict['text']}")
    return findings


def _write_report(path: Path, data: dict[str, Any], checkpoint: str, output: Path | None, *, force: bool) -> None:
    from bn_insert.report import write_report  # noqa: PLC0415

    data |= report_facts(checkpoint, output)
    with signals.saving(f"the report {path}"):
        write_report(path, data, overwrite=force)
    print_note(f"Wrote {path}.")


def _print_preprocessing(transform: Transform, origin: str, images_from: Sequence[Path], pictures: Path) -> None:
    """Print how images are preprocessed, and which of SOURCE and TARGET is a tensor file if only one of them is."""
    print_preprocessing(transform, origin, pictures)
    if not is_tensor_file(pictures) and (tensors := [each for each in images_from if is_tensor_file(each)]):
        print_note(f"The values of the tensor file {tensors[0]} are used unchanged.")


def _source_and_target(folders: list[Path]) -> tuple[Path | None, Path, Path]:
    """Return SOURCE, TARGET, and the one of them with images that are preprocessed; TARGET if none is."""
    if len(folders) > 2:
        raise typer.BadParameter(
            f"{len(folders)} folders were given; pass SOURCE and TARGET, or only TARGET for a checkpoint with "
            "BatchNorm",
            param_hint="[SOURCE] TARGET",
        )
    with suppress(OSError):  # what does not exist is reported where it is opened
        if len(folders) == 2 and folders[0].samefile(folders[1]):
            raise typer.BadParameter(
                f"{folders[0]} and {folders[1]} are the same {'file' if folders[0].is_file() else 'folder'}; pass "
                "images of the kind that the network was trained on as SOURCE, and those to adapt to as TARGET",
                param_hint="[SOURCE] TARGET",
            )
    pictures = next((each for each in folders if not is_tensor_file(each)), folders[-1])
    return (folders[0] if len(folders) == 2 else None), folders[-1], pictures


def _predictions(
    network: nn.Module,
    adapted: nn.Module,
    target: Batches,
    folder: Path,
    device: torch.device,
    *,
    stored: Sequence[str],
) -> tuple[PredictionComparison, Sequence[str]]:
    """Compare the predictions on the target: on all images if their class folders are the network's classes.

    Returns the comparison, and the class names if the accuracy was measured.
    """
    from bn_insert import PredictionComparison, compare_predictions, finite_part  # noqa: PLC0415
    from bn_insert.images import with_labels  # noqa: PLC0415

    if finite_part(network)[1]:
        print_note("The classifier contains NaN or Inf, so predictions are not compared.")
        return PredictionComparison(0, 0, nan, nan, nan), []
    networks = network.to(device), adapted.to(device)
    head = target.head(UNLABELLED_IMAGES)
    try:
        outputs = compare_predictions(*networks, head.head(2))
        names = _target_classes(folder, stored, outputs.classes)
        labelled = with_labels(target, folder, names) if names else iter(())
        if first := next(labelled, None):  # none if the class folders have no images
            with image_progress("measuring the accuracy", target.images) as progress:
                return compare_predictions(*networks, chain([first], labelled), progress=progress), names
        with image_progress("comparing predictions", head.images) as progress:
            return compare_predictions(*networks, head, progress=progress), []
    finally:
        for each in networks:
            each.cpu()


def _entropy(
    network: nn.Module, source: Batches | None, device: torch.device, predictions: PredictionComparison
) -> float | None:
    """Return the mean entropy of the network's predictions on source images; None without any."""
    from bn_insert import compare_predictions, finite_part  # noqa: PLC0415

    if source is None or not predictions.classes or finite_part(network)[1]:
        return None
    head = source.head(UNLABELLED_IMAGES)
    network.to(device)
    try:
        with image_progress("predicting source images", head.images) as progress:
            entropy = compare_predictions(network, network, head, progress=progress).entropy_before
    finally:
        network.cpu()
    return None if isnan(entropy) or entropy == 0 else entropy  # 0 where logits are not finite


def _target_classes(folder: Path, stored: Sequence[str], outputs: int) -> Sequence[str]:
    """Return the class names that the folders of TARGET are labels of; none if that is not certain.

    Args:
        folder: TARGET.
        stored: Class names in the checkpoint, with which the folders are matched. Without them, the folders,
            sorted by name, are the classes if there are as many.
        outputs: Number of classes of the network.
    """
    from bn_insert.images import folder_classes  # noqa: PLC0415

    # A single folder need not be a class, unless it has the name of one.
    folders = folder_classes(folder) or [name for name in stored if (folder / name).is_dir()]
    if not folders or not outputs:
        return ()
    classes = stored or folders
    unknown = [name for name in folders if name not in classes]
    reason = ""
    if "val" in folders and "val" not in stored and folder_classes(folder / "val"):
        reason = f"{folder} has its class folders in {' and '.join(folders)}; to measure it, pass {folder / 'val'}"
    elif len(classes) != outputs:
        source = "the checkpoint stores {} class names" if stored else f"{folder} has {{}} folders"
        reason = f"{source.format(len(classes))}, and the network has {outputs} classes"
    elif len(unknown) == len(folders):
        reason = (
            f"the folders of {folder} ({listed(folders, _NAMES_SHOWN)}) do not match the class names stored in the "
            f"checkpoint ({listed(classes, _NAMES_SHOWN)}){_other_case(unknown, classes)}"
        )
    if reason:
        print_note(f"The accuracy was not measured: {reason}.")
        return ()
    if unknown:
        print_warning(
            f"Folders of {folder} that are not classes of the checkpoint ({listed(classes, _NAMES_SHOWN)}) are not "
            f"counted in the accuracy: {listed(unknown, _NAMES_SHOWN)}{_other_case(unknown, classes)}."
        )
    return classes


def _other_case(folders: Sequence[str], classes: Sequence[str]) -> str:
    """Return the advice to rename folders that have the name of a class except for upper and lower case, or ""."""
    by_key = {name.casefold(): name for name in classes}
    pairs = [f"{name} to {by_key[name.casefold()]}" for name in folders if name.casefold() in by_key]
    return f"; upper and lower case matter: rename {listed(pairs, _NAMES_SHOWN)}" if pairs else ""


def _check(
    network: nn.Module, adaptation: Adaptation[Any], images: Batches, device: torch.device
) -> dict[str, Comparison]:
    """Compare what must be equal: before and after folding, or the insertion if there was no folding."""
    if adaptation.insertion is None or not adaptation.insertion.sites:
        return {}
    if adaptation.folded:
        pair, title = (adaptation.with_batchnorm, adaptation.model), "Before and after folding compared"
    else:
        pair, title = (network, adaptation.insertion.model), "Before and after the insertion compared"
    comparisons = compare_on_devices(*pair, images, device)
    print_table(comparison_table(comparisons, title))
    return comparisons
