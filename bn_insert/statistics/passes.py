"""Passes over batches: the loop that calibration and comparisons share, and small batches that run as one.

What a forward pass costs besides arithmetic is the same for batches of any size: with batches of 4, LeNet-5 spends more
time between operations than in them, and so do the statistics. The activations of a large batch, on the other hand, are
written to memory and read again by the next layer. `JoinedBatches` therefore runs several small batches as one, and a
large one in parts, where the network allows it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from ..errors import CalibrationError, as_passed, gradients_advice, out_of_memory, too_small
from ..graph.inputs import InputReader, Inputs, reference_tensor
from ..support.arguments import check_dtype, check_progress
from ..support.text import with_article
from .moments import Moments, merge
from .pass_options import ProgressCallback

SINGLE_IMAGE = (
    "squeeze() in the forward may remove the batch dimension of a single image: use batches of at least two images, "
    "including the last one, or replace squeeze() with flatten(1)"
)
"""What to do about a network that mistakes a batch of one image for no batch, for messages."""
_MISSING_AXIS = re.compile(r"\(got \dD input\)")  # in the messages of PyTorch's BatchNorm

# Input of a pass, and its largest activations: these stay in a CPU's last-level cache. In a network with more
# parameters, which each pass reads from memory, activations may be as large as all of them.
_BYTES_AT_A_TIME = 8 << 20
# Whether images depend on each other is tested on this many and one more, after this many others. Together these are an
# odd number, which a network that compares images in pairs cannot take.
_IMAGES_TESTED = 2
_IMAGES_BEFORE_TEST = 128
# The sampling error is estimated from the spread between passes, of which there must be several: a pass has at most an
# eighth of the batches before it.
_EARLIER_PASSES = 8
# Largest change of the statistics of a deep network, relative to std, that rounding may cause where batches have other
# sizes.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class NumberedBatch:
    """One batch of a pass.

    Attributes:
        number: Its position in the iterable of batches, from 0.
        value: The batch as the caller passed it.
        inputs: What the model's forward takes from it.
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
    run: Callable[[NumberedBatch], object],
    *,
    progress: ProgressCallback | None = None,
    enough: Callable[[], bool] = lambda: False,
    finish: Callable[[], object] = lambda: None,
) -> int:
    """Call `run` with every batch that is not empty, without gradients, and return the number of images.

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
    check_progress(progress)
    images = 0
    reader = InputReader(model)
    with preserved_random_state(), torch.no_grad():
        for number, value in enumerate(checked_batches(batches)):
            batch = NumberedBatch(number, value, reader.inputs(value, number))
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


class JoinedBatches:
    """Collects batches, and runs them together once there are enough; large ones of a small network run in parts.

    The images of a batch must not depend on each other in the network, as they do in a BatchNorm without running
    statistics. This is tested once, on very different images. Where they do, and wherever a gathered batch fails,
    batches run one by one.
    """

    def __init__(
        self,
        run: Callable[[NumberedBatch], None],
        run_whole: Callable[[Inputs, int], None],
        rehearse: Callable[[Inputs], Mapping[str, Moments]],
        split: Callable[[int], None],
        parameter_bytes: int,
    ) -> None:
        """Start without any batches.

        Args:
            run: Runs one batch; its errors name the batch.
            run_whole: Runs the images of several batches, of which the number is given; if it raises an exception, it
                has no other effect.
            rehearse: Runs images without recording anything, and returns the moments of each place.
            split: Called once if `run` is to run batches in parts, with the number of bytes for the input of a part.
            parameter_bytes: Size of all parameters.
        """
        self._run = run
        self._run_whole = run_whole
        self._rehearse = rehearse
        self._split = split
        self._parameter_bytes = parameter_bytes
        self._largest_input: int | None = None  # bytes of a pass; 0: batches run one by one; None: not tested yet
        self._batches_run = 0
        self._images_run = 0
        self._waiting: list[NumberedBatch] = []
        self._images = torch.empty(0)  # of the batches that wait
        self._filled = 0

    def add(self, batch: NumberedBatch) -> None:
        """Run a batch, at once or later together with others."""
        images = _images_of(batch)
        if images is None or not self._has_room_for(images):
            self.finish()
        if images is None or not (self._waiting or self._begin(images)):
            self._run(batch)
            self._batches_run += 1
            self._images_run += len(batch.inputs)
            return
        # A copy: the caller may use the memory of this batch for the next one.
        self._images[self._filled : self._filled + len(images)] = images
        self._filled += len(images)
        self._waiting.append(batch)
        if not self._has_room_for(images):
            self.finish()

    def finish(self) -> None:
        """Run the batches that wait."""
        batches, self._waiting = self._waiting, []
        images, self._filled = self._images[: self._filled], 0
        self._batches_run += len(batches)
        if len(batches) > 1:
            try:
                self._run_whole(Inputs((images,)), len(batches))
            except Exception:  # noqa: BLE001 - one by one, a batch fails with its own name, or none does
                self._largest_input = 0
            else:
                return
        parts = images.split([len(batch.inputs) for batch in batches])
        for batch, part in zip(batches, parts, strict=True):
            with failures_named("the model", batch):
                self._run(replace(batch, inputs=Inputs((part,))))

    def _has_room_for(self, images: Tensor) -> bool:
        """Return whether images fit in with those that wait, or none do."""
        if not self._waiting:
            return True
        room = self._images
        same_kind = (images.shape[1:], images.dtype, images.device) == (room.shape[1:], room.dtype, room.device)
        return same_kind and self._filled + len(images) <= len(room)

    def _begin(self, images: Tensor) -> bool:
        """Make room for several batches of this size; return whether they are to run together."""
        size = images.numel() * images.element_size()
        if self._largest_input is None and self._images_run >= _IMAGES_BEFORE_TEST and self._may_gain(size):
            self._largest_input = self._tested(images)
        fitting = (self._largest_input or 0) // size
        batches = min(fitting, self._batches_run // _EARLIER_PASSES)
        if batches < 2:
            return False
        self._images = images.new_empty(batches * len(images), *images.shape[1:])
        return True

    def _may_gain(self, batch_bytes: int) -> bool:
        return 2 * batch_bytes <= _BYTES_AT_A_TIME or self._parameter_bytes <= _BYTES_AT_A_TIME

    def _tested(self, images: Tensor) -> int:
        """Return how many bytes the input of a pass may have, 0 if images depend on each other."""
        images = images[:_IMAGES_TESTED]
        try:
            others = _very_different(torch.cat([images, images[:1]]))
            first, second, together = (
                self._rehearse(Inputs((each,))) for each in (images, others, torch.cat([images, others]))
            )
            independent = all(_agree(merge([first[name], second[name]]), together[name]) for name in together)
        except Exception:  # noqa: BLE001 - the network may raise anything for such images
            return 0
        if not independent:
            return 0
        growth = max((each.count * each.channels for each in first.values()), default=0) / images.numel()
        largest = int(max(_BYTES_AT_A_TIME, self._parameter_bytes) / max(growth, 1e-9))
        if self._parameter_bytes <= _BYTES_AT_A_TIME and images.device.type == "cpu":
            self._split(max(1, min(largest, _BYTES_AT_A_TIME)))
        return min(largest, _BYTES_AT_A_TIME)


def _very_different(images: Tensor) -> Tensor:
    """Return negatives of images, in half of their range: of another mean, minimum and maximum."""
    lowest, highest = (each.double() for each in images.aminmax())
    return (lowest + 0.6 * (highest - lowest) - 0.5 * (images - lowest)).to(images.dtype)


def _images_of(batch: NumberedBatch) -> Tensor | None:
    """Return the images of a batch that has nothing else, or None."""
    images = batch.inputs.only_tensor
    return images if images is not None and images.numel() and images.layout is torch.strided else None


def _agree(first: Moments, second: Moments) -> bool:
    """Return whether two sets of moments are equal up to the rounding of activations."""
    largest = torch.maximum(first.m2, second.m2)
    rounding = 1e-12 * first.count * first.mean.square()  # of constant channels
    in_mean = (first.mean - second.mean).square() * first.count <= _ROUNDING**2 * largest + rounding
    in_spread = (first.m2 - second.m2).abs() <= _ROUNDING * largest + rounding
    return first.count == second.count and bool((in_mean & in_spread).all())


@contextmanager
def failures_named(model: str, batch: object) -> Iterator[None]:
    """Convert any exception of a model's forward into a CalibrationError that names the model and the batch."""
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:  # the user's forward may raise anything; here it gains its context
        one_image = isinstance(batch, NumberedBatch) and len(batch.inputs) == 1
        advice = f". {SINGLE_IMAGE}" if one_image and _MISSING_AXIS.search(str(error)) else ""
        if isinstance(batch, NumberedBatch) and batch.inputs.conversion:
            advice = f". {batch.inputs.conversion}"
        if gradients := gradients_advice(error):
            advice = f". {gradients}"
        if too_small(error):
            advice = as_passed(". Use larger inputs", option=". Use larger inputs (for image files: --resize, --crop)")
        if out_of_memory(error):
            advice = as_passed(
                ". Use smaller batches or inputs", option=". Use smaller batches (--batch-size) or inputs"
            )
        said = str(error).rstrip(".") if advice else error
        raise CalibrationError(f"{model} failed on {batch}: {said}{advice}") from error


def under_autocast(network: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return the context for the forward passes of a network: autocast to a dtype, or none.

    Raises:
        CalibrationError: It is not a floating-point dtype.
    """
    if not dtype:
        return nullcontext()
    check_dtype("autocast", dtype)
    return torch.autocast(reference_tensor(network).device.type, dtype)


class NotFiniteError(CalibrationError):
    """Activations or their statistics are NaN or Inf.

    Attributes:
        row: The first image of the batch with such an activation.
        dtype: Dtype of the activations.
    """

    def __init__(self, message: str, row: int = 0, dtype: torch.dtype | None = None) -> None:
        """Take the message, and the row and the dtype if they are known."""
        super().__init__(message)
        self.row, self.dtype = row, dtype


def no_batches() -> CalibrationError:
    """Return the error for a calibration set without images."""
    return CalibrationError("the calibration set is empty: the iterable yielded no batches")


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore PyTorch's random state afterwards: even `iter(DataLoader)` draws from it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


def checked_batches(batches: Iterable[Any]) -> Iterable[Any]:
    """Return the batches if they are an iterable of batches, not a path, a dataset or one batch.

    Raises:
        CalibrationError: If they are not.
    """
    if isinstance(batches, str | os.PathLike):
        raise CalibrationError(
            f"batches is a path, {str(batches)!r}; pass a DataLoader, or read the images with "
            "bn_insert.images.open_batches(path, transform), or use a command such as bn-insert insert"
        )
    if isinstance(batches, type):
        raise CalibrationError(
            f"batches is the class {batches.__name__}; pass a loader, such as DataLoader(dataset, batch_size=32)"
        )
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise CalibrationError(
            f"batches is {with_article(batches)}, not an iterable of batches; pass a DataLoader, or a list such as "
            "[images]"
        )
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise CalibrationError(
            f"batches is a dataset, {type(batches).__name__}, whose items are single images; pass a DataLoader: "
            "DataLoader(dataset, batch_size=32, shuffle=True)"
        )
    if isinstance(batches, Tensor):
        raise CalibrationError(
            f"batches is one tensor of shape {tuple(batches.shape)}, which would be iterated image by image; "
            "pass an iterable of batches, such as [images] or images.split(32)"
        )
    if isinstance(batches, Mapping) or _is_one_batch(batches):
        contents = "" if isinstance(batches, Mapping) else " of inputs and labels"
        raise CalibrationError(
            f"batches is {with_article(batches)}{contents}, perhaps one batch; pass an iterable of batches, such as a "
            "DataLoader or [batch]"
        )
    return batches


def _is_one_batch(batches: Iterable[Any]) -> bool:
    """Return whether these are images and their labels, as a loader returns them, instead of several batches."""
    if not isinstance(batches, tuple | list) or not all(isinstance(each, Tensor) for each in batches):
        return False
    axes = [each.ndim for each in batches]
    return len(axes) > 1 and axes[0] > 1 and min(axes[1:]) < 2
