"""What commands that write a changed network have in common: notes on its images, and the check of its outputs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING

from bn_insert.support.text import counted

from .console import print_note
from .tables import FEWEST_BATCHES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bn_insert import Comparison, Moments
    from bn_insert.images import Batches

CHECK_FAILED = 1
CHECK_IMAGES = 8  # two networks run on them: few enough to cost little compared with calibration


def note_calibration(moments: Mapping[str, Moments], images: int, tolerance: float | None, batches: int) -> None:
    """Print the number of images, and with a tolerance whether it was reached."""
    if not moments:
        return  # nothing was inserted: a network may be adapted by the BatchNorms that it has
    errors = [each.error_of(0.99) for each in moments.values()]
    error = nan if any(map(isnan, errors)) else max(errors)
    reached = f", with an error of {error:.3g} standard deviations" if tolerance is not None and error >= 0 else ""
    print_note(f"Calibrated on {counted(images, 'image')}{reached}.")
    if tolerance is not None and isnan(error):
        print_note("One batch is too few to estimate the error: use more images, or smaller batches (-b).")
    elif tolerance is not None and batches < FEWEST_BATCHES:
        print_note(
            f"An error estimated from {batches} batches is not reliable. For {FEWEST_BATCHES} or more batches, use "
            "more images (--images), or smaller batches (-b)."
        )
    elif tolerance is not None and error > tolerance:
        print_note(f"The tolerance {tolerance:g} was not reached: use more images (--images), or accept this error.")


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
    """Add what is written already to the message of what fails after it."""
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
