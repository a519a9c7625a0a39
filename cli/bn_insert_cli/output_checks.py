"""What commands that write a changed network have in common: notes on its images, and the check of its outputs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from math import ceil, isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from bn_insert.support.text import counted, listed, untied_layers

from .console import print_note, print_result, print_warning
from .interruption import signals
from .named_checkpoints import check_checkpoint
from .preprocessing import is_tensor_file, transform_to_store
from .tables import FEWEST_BATCHES, GOOD_ERROR, as_shown

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bn_insert import Comparison, Insertion, Moments, Site
    from bn_insert.images import Batches, Transform

CHECK_FAILED = 1
CHECK_IMAGES = 8  # two networks run on them: few enough to cost little compared with calibration
CHECK_VOLUMES = 2  # inputs with 3 dimensions, of which each costs as much as a batch of images
_NAMES_SHOWN = 3
_FEW_IMAGES = 128


def check_files(
    output: Path, checkpoint: str, sources: Sequence[Path], report: Path | None, *, overwrite: bool
) -> None:
    """Check before a download, or the reading of large files, that outputs can be written and images can be read.

    Args:
        output: The checkpoint that will be written.
        checkpoint: The one that is read, which is never replaced.
        sources: Folders of images, or tensor files.
        report: The report that will be written.
        overwrite: --force.
    """
    from bn_insert import check_output  # noqa: PLC0415 - imports torch
    from bn_insert.images import check_source  # noqa: PLC0415
    from bn_insert.report import check_report  # noqa: PLC0415

    check_checkpoint(checkpoint)
    check_output(output, overwrite=overwrite, inputs=(checkpoint, *sources))
    if report:
        check_report(report, output, overwrite=overwrite, inputs=(checkpoint, *sources))
    for source in sources:
        check_source(source)


def note_calibration(
    moments: Mapping[str, Moments],
    images: int,
    tolerance: float | None,
    batches: int,
    *,
    of: Literal["", "source", "target"] = "",
    limited: Callable[[], bool] = lambda: False,
) -> None:
    """Print the number of images, and what to do if the statistics are not as exact as they should be.

    Args:
        moments: By the name of the layer.
        images: How many images they were measured on.
        tolerance: The sampling error that was asked for; None means that all images were used.
        batches: How many batches the images came in.
        of: Which images they are where there are two kinds; "" where the result is made for `finetune`, which
            re-estimates the statistics.
        limited: Returns whether `--images` left images out.
    """
    if not moments:
        return  # nothing was inserted: a network may be adapted by the BatchNorms that it has
    errors = {name: each.error_of(0.99) for name, each in moments.items()}
    error = nan if any(map(isnan, errors.values())) else max(errors.values())
    reached = f", with an error of {error:.3g} standard deviations" if tolerance is not None and error >= 0 else ""
    kind = f"{of} image" if of else "image"
    print_note(f"Calibrated on {counted(images, kind)}{reached}.")
    on_them = f" on {kind}s" if of else ""
    if tolerance is not None and isnan(error):
        print_note(f"One batch is too few to estimate the error{on_them}: use more images, or smaller batches (-b).")
    elif tolerance is not None and batches < FEWEST_BATCHES:
        print_note(
            f"An error{on_them} estimated from {batches} batches is not reliable. For {FEWEST_BATCHES} or more "
            "batches, use more images (--images), or smaller batches (-b)."
        )
    elif tolerance is not None and error > tolerance:
        print_note(
            f"The tolerance {tolerance:g} was not reached{on_them}: use more images (--images), or accept this error."
        )
    elif tolerance is None and batches < FEWEST_BATCHES and images < _FEW_IMAGES:
        hint = " (see --images)" if limited() else ""
        print_note(
            f"With so few {kind}s, the statistics may be far from those of other images: use at least "
            f"{_FEW_IMAGES}{hint}. Their sampling error is estimated from {FEWEST_BATCHES} or more batches (-b sets "
            "the batch size)."
        )
    elif tolerance is None and batches >= FEWEST_BATCHES and as_shown(error) > GOOD_ERROR:
        inexact = [name for name, each in errors.items() if as_shown(each) > GOOD_ERROR]
        needed = _rounded_up(images * (error / GOOD_ERROR) ** 2)
        hint = " (see --images)" if limited() else ""
        harmless = (
            " This does not change the outputs, and finetune re-estimates the running statistics anyway."
            if not of
            else " Adapting usually works anyway."
        )
        print_note(
            f"Sampling error{on_them} above {GOOD_ERROR:g} in {listed(inexact, _NAMES_SHOWN)}.{harmless} More images "
            f"would reduce the error: about {needed:,} instead of {images:,} for an error of {GOOD_ERROR:g}{hint}."
        )


def warn_of_other_layers(insertion: Insertion[nn.Module]) -> None:
    """Warn about layers that an insertion left out because their classes are not from torch.nn."""
    if insertion.others:
        print_warning(f"no BatchNorm was inserted after layers that are not modules of torch.nn: {insertion.others}.")


def note_recording(sites: Iterable[Site]) -> None:
    """Say what cannot be done to a network whose operations were recorded in one run."""
    if not all(site.calls for site in sites):
        print_note(
            "torch.export cannot trace this network: only the layers called in a single run are known. BatchNorm can "
            "be inserted, but the network cannot be equalized, and its BatchNorm cannot be folded."
        )


def warn_of_untied(layers: Sequence[str], output: Path) -> None:
    """Warn about layers that no longer share a parameter: only bn-insert can tell that from the file."""
    if layers:
        print_warning(f"{untied_layers(layers, f'bn-insert reads {output}')}.")


def allowed(atol: float | None, rtol: float | None) -> str:
    """Return the tolerances that outputs are compared with, as options."""
    return " and ".join(f"--{name} {value:g}" for name, value in (("atol", atol), ("rtol", rtol)) if value is not None)


def warn_of_random_outputs(
    comparisons: Iterable[Comparison],
    original: nn.Module,
    name: str,
    inputs: Iterable[Any],
    *,
    atol: float | None,
    rtol: float | None,
) -> None:
    """Warn if a network is random in eval mode: by PyTorch's random numbers, which both networks draw, or others.

    Args:
        comparisons: The comparisons with it. If all are within what is allowed, nothing more is run.
        original: The network that the other was compared with.
        name: Its checkpoint.
        inputs: A few batches for two runs.
        atol: --atol.
        rtol: --rtol.
    """
    from bn_insert import compare_outputs, finite_part  # noqa: PLC0415

    comparisons = list(comparisons)
    if any(comparison.random for comparison in comparisons):
        print_warning(
            f"the forward of {name} draws random numbers in eval mode; for the comparison, both networks drew the "
            "same. If it is not meant to sample, check that F.dropout gets training=self.training."
        )
    elif not all(comparison.within(atol, rtol) for comparison in comparisons):
        reference, _ = finite_part(original)
        if not compare_outputs(reference, reference, inputs).within(atol, rtol):
            print_warning(
                f"the outputs of {name} itself differ between two runs on the same inputs, and not by PyTorch's random "
                "numbers, which were the same; check what else its forward depends on in eval mode."
            )


def exit_if_different(
    comparisons: Iterable[Comparison],
    original: nn.Module,
    name: str,
    inputs: Iterable[Any],
    *,
    atol: float | None,
    rtol: float | None,
) -> None:
    """End a command that has written nothing if outputs differ by more than is allowed.

    Args:
        comparisons: As for `warn_of_random_outputs`, which is called first.
        original: As for `warn_of_random_outputs`.
        name: As for `warn_of_random_outputs`.
        inputs: As for `warn_of_random_outputs`.
        atol: --atol.
        rtol: --rtol.
    """
    comparisons = list(comparisons)
    warn_of_random_outputs(comparisons, original, name, inputs, atol=atol, rtol=rtol)
    if not all(comparison.within(atol, rtol) for comparison in comparisons):
        print_result(f"The outputs differ by more than {allowed(atol, rtol)} allows: nothing was written.", good=False)
        raise typer.Exit(CHECK_FAILED)


def write_checkpoint(
    network: nn.Module,
    output: Path,
    transform: Transform,
    origin: str,
    images: Path | None,
    *,
    classes: Sequence[str],
    input_shape: tuple[int, ...],
    overwrite: bool,
) -> None:
    """Write a checkpoint, and say that preprocessing from options is only stored, where no images were read with it.

    Args:
        network: The network.
        output: The file.
        transform: The preprocessing.
        origin: Where it comes from, in words.
        images: What the command has read; None without images.
        classes: The names of the classes.
        input_shape: That of the inputs in a tensor file; empty for images.
        overwrite: --force.
    """
    from bn_insert import save_checkpoint  # noqa: PLC0415
    from bn_insert.report import preprocessing_text  # noqa: PLC0415

    stored = transform_to_store(transform, origin, images)
    with signals.saving(str(output)):
        save_checkpoint(
            network, output, transform=stored, classes=classes, input_shape=input_shape, overwrite=overwrite
        )
    if stored and "the options" in origin and (images is None or is_tensor_file(images)):
        print_note(
            f"Stored in {output} for later commands (no image files were read here): {preprocessing_text(stored)}."
        )


def _rounded_up(number: float) -> int:
    """Return a number rounded up to two digits: 1,440 is about 1,500."""
    step = 10 ** max(0, len(str(int(number))) - 2)
    return ceil(number / step) * step


def report_facts(checkpoint: str, output: Path | None) -> dict[str, object]:
    """Return what every report on a changed network begins with: files, command and date."""
    from bn_insert.report import file_facts  # noqa: PLC0415

    return {
        "checkpoint": file_facts(checkpoint),
        "output": file_facts(output) if output else None,
        "command": shlex.join(["bn-insert", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


@contextmanager
def saying_what_is_written(output: Path | None) -> Iterator[None]:
    """Add what has already been written to the message of a later failure."""
    from bn_insert import BNInsertError, CheckpointError  # noqa: PLC0415

    try:
        yield
    except BNInsertError as error:
        written = f"{output} is written and complete" if output else "nothing was written"
        raise CheckpointError(f"{error}; {written}") from error


def compare_on_devices(
    model: nn.Module, result: nn.Module, batches: Batches, device: torch.device
) -> dict[str, Comparison]:
    """Compare original and result on the CPU, whose kernel the promise is about, and on the device in use."""
    import torch  # noqa: PLC0415

    from bn_insert import compare_outputs, finite_part  # noqa: PLC0415

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
