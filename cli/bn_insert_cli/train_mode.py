"""Train mode compared with eval mode, without and with Batch Renormalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .console import image_progress, print_note

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bn_insert import TrainModeAgreement
    from bn_insert.images import Batches

# Run through the network once per batch size: few enough to cost little compared with calibration.
TRAIN_MODE_IMAGES = 64


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
    network: nn.Module, batches: Batches, device: torch.device, sizes: Sequence[int] | None = None
) -> TrainMode:
    """Measure with all images, and with Batch Renormalization with the first 64, or as many as the largest size.

    Raises:
        CalibrationError: As for `train_mode_agreement`.
    """
    from bn_insert import TrainingError, agreement_reading, train_mode_agreement  # noqa: PLC0415 - imports torch

    chosen = () if sizes is None else (sizes,)
    with image_progress("comparing", batches.images) as progress:
        agreements = train_mode_agreement(network, batches, *chosen, device=device, progress=progress)
    measured = [each.batch_size for each in agreements]
    first = batches.head(max(TRAIN_MODE_IMAGES, *measured))
    try:
        with image_progress("with Batch Renormalization", first.images) as progress:
            renorm = train_mode_agreement(network, first, measured, renorm=True, device=device, progress=progress)
    except TrainingError as error:
        print_note(f"Not measured with Batch Renormalization: {error}.")
        renorm = []
    return TrainMode(agreements, renorm, agreement_reading(agreements, renorm=renorm))
