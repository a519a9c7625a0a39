"""Passes over batches: the loop that calibration and comparisons share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..graph.inputs import InputReader, Inputs

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Batch:
    """One batch of a pass.

    Attributes:
        number: Its position in the iterable of batches, from 0.
        value: The batch as the caller passed it.
        inputs: What the model's forward takes of it.
    """

    number: int
    value: Any
    inputs: Inputs

    def __str__(self) -> str:
        """Return the batch's name for messages."""
        return f"batch {self.number} of shape {self.inputs.shapes}"


def for_each_batch(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Batch], object],
    *,
    progress: Progress | None = None,
    enough: Callable[[], bool] = lambda: False,
    finish: Callable[[], object] = lambda: None,
) -> int:
    """Call `run` with every batch that is not empty, in inference mode, and return the number of images.

    PyTorch's random state is restored afterwards.

    Args:
        model: Determines the device and dtype of the inputs.
        batches: As for `insert_batchnorm`; iterated once.
        run: Whatever it raises, other than a CalibrationError, is reported as a failure of the model.
        progress: Called after each batch with the number of images so far.
        enough: Asked after each batch; the loop ends once it returns True.
        finish: Called after the last batch.

    Raises:
        CalibrationError: If the batches are not an iterable of model inputs, or `run` fails. The message names the
            batch.
    """
    images = 0
    reader = InputReader(model)
    with preserved_random_state(), torch.inference_mode():
        for number, value in enumerate(checked(batches)):
            batch = Batch(number, value, reader.inputs(value, number))
            if len(batch.inputs) == 0:
                continue
            with failures_named("the model", batch):
                run(batch)
            images += len(batch.inputs)
            if progress:
                progress(images)
            if enough():
                break
        finish()
    return images


@contextmanager
def failures_named(model: str, batch: object) -> Iterator[None]:
    """Turn whatever a model's forward raises into a CalibrationError that names the model and the batch."""
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:  # the user's forward may raise anything; here it gains its context
        raise CalibrationError(f"{model} failed on {batch}: {error}") from error


class ForwardDone(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook to end a forward pass whose remaining layers are not needed."""


class NotFiniteError(CalibrationError):
    """Activations or their statistics are NaN or Inf.

    Attributes:
        row: The first image of the batch with such an activation.
    """

    def __init__(self, message: str, row: int = 0) -> None:
        """Take the message, and the row if it is known."""
        super().__init__(message)
        self.row = row


def no_batches() -> CalibrationError:
    """Return the error for a calibration set without images."""
    return CalibrationError("the calibration set is empty: no batch arrived")


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore PyTorch's random state afterwards: even `iter(DataLoader)` draws from it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


def checked(batches: Iterable[Any]) -> Iterable[Any]:
    """Return the batches if they are an iterable other than a tensor, which would be iterated image by image.

    Raises:
        CalibrationError: If they are not.
    """
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise CalibrationError(
            f"batches is a {type(batches).__name__}, not an iterable of batches; pass a DataLoader, or a list such as "
            "[images]"
        )
    if isinstance(batches, Tensor):
        raise CalibrationError(
            f"batches is one tensor of shape {tuple(batches.shape)}, which would be iterated image by image; "
            "pass an iterable of batches, such as [images] or images.split(32)"
        )
    return batches
