"""Train mode compared with eval mode, without and with Batch Renormalization."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .console import image_progress, print_note

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bn_insert import TrainModeAgreement
    from bn_insert.images import Batches

# Each image runs through the network once in eval mode and once per batch size.
TRAIN_MODE_IMAGES = 64
REPORT_SIZES = (8, 16, 32)  # around the 32 images that `finetune` uses by default
REPORT_SECONDS = 30.0  # for each of the two measurements of a report
_LEAST_BATCHES = 2


class TrainMode(NamedTuple):
    """Agreement of train mode with eval mode by batch size.

    Attributes:
        agreements: In the network's own mode.
        renorm: With Batch Renormalization without limits; empty if a BatchNorm of the network cannot renormalize.
        reading: What they mean, in words.
    """

    agreements: list[TrainModeAgreement]
    renorm: list[TrainModeAgreement]
    reading: str


def measure_train_mode(
    network: nn.Module,
    batches: Batches,
    device: torch.device,
    sizes: Sequence[int],
    *,
    single: bool = False,
    seconds: float | None = None,
) -> TrainMode:
    """Measure with all images, and with Batch Renormalization with the first 64, or as many as the largest size.

    Args:
        network: With BatchNorm.
        batches: The images.
        device: Where to run.
        sizes: Batch sizes.
        single: Include sizes of which there is a single batch. It says little, and the batch of all images that the
            network was calibrated on agrees by construction.
        seconds: Start no more images after this time, for each of both measurements; None measures with all.

    Raises:
        CalibrationError: As for `train_mode_agreement`.
    """
    from bn_insert import TrainingError, agreement_reading, train_mode_agreement  # noqa: PLC0415 - imports torch

    title = "train mode" if seconds is None else f"train mode, at most {seconds:.0f} s"
    with image_progress(title, batches.images) as progress:
        agreements = train_mode_agreement(
            network, _limited(batches, min(sizes), seconds), sizes, device=device, progress=progress
        )
    if not single:
        agreements = _in_several_batches(agreements)
    measured = [each.batch_size for each in agreements]
    first = batches.head(max(TRAIN_MODE_IMAGES, *measured))
    try:
        with image_progress("with Batch Renormalization", first.images) as progress:
            renorm = train_mode_agreement(
                network,
                _limited(first, min(measured), seconds),
                measured,
                renorm=True,
                device=device,
                progress=progress,
            )
    except TrainingError as error:
        print_note(f"Not measured with Batch Renormalization: {error}.")
        renorm = []
    return TrainMode(agreements, renorm, agreement_reading(agreements, renorm=renorm))


def _in_several_batches(agreements: list[TrainModeAgreement]) -> list[TrainModeAgreement]:
    from bn_insert import CalibrationError  # noqa: PLC0415

    found = [each for each in agreements if each.images >= _LEAST_BATCHES * each.batch_size]
    left_out = [str(each.batch_size) for each in agreements if each not in found]
    if not found:
        smallest = agreements[0].batch_size
        raise CalibrationError(
            f"{agreements[0].images} images are a single batch of {smallest}, which says little: use at least "
            f"{_LEAST_BATCHES * smallest} images, or --batch-sizes"
        )
    if left_out:
        print_note(f"Left out, with a single batch each: batch sizes {', '.join(left_out)}.")
    return found


def _limited(batches: Batches, smallest: int, seconds: float | None) -> Iterator[torch.Tensor]:
    """Yield the images, a few at a time, until the time is over; at least two batches of the smallest size."""
    deadline = None if seconds is None else time.monotonic() + seconds
    done = 0
    for batch in batches:
        for images in batch.images.split(smallest):
            if deadline is not None and done >= _LEAST_BATCHES * smallest and time.monotonic() > deadline:
                return
            yield images
            done += len(images)
