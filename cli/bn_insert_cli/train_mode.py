"""Train mode compared with eval mode, without and with Batch Renormalization."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from .console import image_progress, print_note
from .inputs import check_one_input

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bn_insert import TrainModeAgreement
    from bn_insert.images import Batches

# Each image runs through the network once in eval mode and once per batch size.
TRAIN_MODE_IMAGES = 64
REPORT_SIZES = (8, 16, 32)  # around the 32 images that `finetune` uses by default
REPORT_SECONDS = 60.0  # for both measurements of a report
LEAST_BATCHES = 2  # fewer are not conclusive


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
        seconds: Take no more images than fit into this time, for both measurements, but two batches of the smallest
            size; None measures with all.

    Raises:
        CalibrationError: As for `train_mode_agreement`.
        GraphError: The network takes several inputs.
    """
    check_one_input(network, "train mode and eval mode can only be compared for a forward that takes one")
    from bn_insert import TrainingError, agreement_reading, train_mode_agreement  # noqa: PLC0415 - imports torch

    end = inf if seconds is None else time.monotonic() + seconds
    half = end if seconds is None else end - seconds / 2
    images = _Limited(batches, min(sizes), half)
    with image_progress("train mode", batches.images) as progress:
        agreements = train_mode_agreement(network, images, sizes, device=device, progress=progress)
    if not single:
        agreements = _in_several_batches(agreements, sizes, batches.images, out_of_time=images.out_of_time)
    measured = [each.batch_size for each in agreements]
    first = batches.head(max(TRAIN_MODE_IMAGES, *measured))
    try:
        with image_progress("with Batch Renormalization", first.images) as progress:
            renorm = train_mode_agreement(
                network,
                _Limited(first, min(measured), end),
                measured,
                renorm=True,
                device=device,
                progress=progress,
            )
    except TrainingError as error:
        print_note(f"Not measured with Batch Renormalization: {error}.")
        renorm = []
    return TrainMode(agreements, renorm, agreement_reading(agreements, renorm=renorm))


def _in_several_batches(
    agreements: list[TrainModeAgreement], sizes: Sequence[int], images: int, *, out_of_time: bool
) -> list[TrainModeAgreement]:
    """Return the agreements from two batches or more, and print which sizes are left out and why."""
    from bn_insert import CalibrationError  # noqa: PLC0415

    found = [each for each in agreements if each.images >= LEAST_BATCHES * each.batch_size]
    if not found:
        smallest = agreements[0].batch_size
        raise CalibrationError(
            f"{agreements[0].images} images are a single batch of {smallest}, which says little: use at least "
            f"{LEAST_BATCHES * smallest} images, or --batch-sizes"
        )
    measured = {each.batch_size for each in found}
    enough = {size for size in sizes if images >= LEAST_BATCHES * size}
    for reason, left_out in (
        (
            "the time limit was reached",
            [size for size in sizes if size not in measured and size in enough and out_of_time],
        ),
        (
            f"{images} images are fewer than {LEAST_BATCHES} batches",
            [size for size in sizes if size not in measured and size not in enough],
        ),
    ):
        if left_out:
            print_note(f"Batch sizes left out of train mode: {', '.join(map(str, left_out))} ({reason}).")
    return found


class _Limited:
    """Images in small batches, until a time limit.

    At least two batches of the smallest size are taken.

    Attributes:
        out_of_time: Whether images were left.
    """

    def __init__(self, batches: Batches, smallest: int, end: float) -> None:
        self.out_of_time = False
        self._batches, self._smallest, self._end = batches, smallest, end

    def __iter__(self) -> Iterator[torch.Tensor]:
        taken, longest, before = 0, 0.0, time.monotonic()
        for batch in self._batches:
            for images in batch.images.split(self._smallest):
                now = time.monotonic()
                longest = max(longest, now - before)
                if taken >= LEAST_BATCHES * self._smallest and now + longest > self._end:
                    self.out_of_time = True
                    return
                before = now
                yield images
                taken += len(images)
