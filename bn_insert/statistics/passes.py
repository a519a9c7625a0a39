"""Passes over batches: the loop that calibration and comparisons share, and forward passes that record activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..graph.inputs import Inputs, reference_tensor

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
) -> int:
    """Call `run` with every batch that is not empty, in inference mode, and return the number of images.

    PyTorch's random state is restored afterwards.

    Args:
        model: Determines the device and dtype of the inputs.
        batches: As for `insert_batchnorm`; iterated once.
        run: Whatever it raises, other than a CalibrationError, is reported as a failure of the model.
        progress: Called after each batch with the number of images so far.
        enough: Asked after each batch; the loop ends once it returns True.

    Raises:
        CalibrationError: If the batches are not an iterable of model inputs, or `run` fails. The message names the
            batch.
    """
    images = 0
    with preserved_random_state(), torch.inference_mode():
        for number, value in enumerate(checked(batches)):
            batch = Batch(number, value, Inputs.of(value, number, model))
            if len(batch.inputs) == 0:
                continue
            with failures_named("the model", batch):
                run(batch)
            images += len(batch.inputs)
            if progress:
                progress(images)
            if enough():
                break
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
    """Activations that are NaN or Inf.

    Attributes:
        row: The first image of the batch with such an activation.
    """

    def __init__(self, layer: str, row: int, dtype: torch.dtype) -> None:
        """Name the layer and the dtype in which it computed."""
        super().__init__(f"the activations of {layer} are not finite in {dtype}")
        self.row = row


def no_batches() -> CalibrationError:
    """Return the error for a calibration set without images."""
    return CalibrationError("the calibration set is empty: no batch arrived")


@runtime_checkable
class Record(Protocol):
    """What hooks record during a forward pass: kept if it succeeds, discarded if it has to be run again."""

    def commit(self) -> None:
        """Keep what was recorded since the last commit."""

    def discard(self) -> None:
        """Discard what was recorded since the last commit."""


def run_through(
    network: nn.Module,
    batches: Iterable[Any],
    record: Record,
    *,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
    enough: Callable[[], bool] = lambda: False,
) -> int:
    """Run batches through a network whose hooks fill `record`, and return the number of images.

    Images run in channels_last where the forward allows it, and in smaller batches where memory runs out.
    PyTorch's random state is restored afterwards.

    Args:
        network: A working copy in eval mode.
        batches: As for `insert_batchnorm`.
        record: Filled by the network's hooks.
        autocast: Dtype for the forward pass; None runs it in the network's own dtype.
        progress: Called after each batch with the number of images so far.
        enough: Asked after each batch; the loop ends once it returns True.

    Raises:
        CalibrationError: If the network cannot run on a batch, or its activations are not finite. The message names
            the batch, or the layer and the parameter or image that is the cause.
    """
    passes = _Passes(network, record)

    def run(batch: Batch) -> None:
        try:
            passes.run(batch.inputs)
        except NotFiniteError as error:
            raise CalibrationError(f"{error}{_cause(network, batch, error)}") from None

    with torch.autocast(reference_tensor(network).device.type, autocast) if autocast else nullcontext():
        return for_each_batch(network, batches, run, progress=progress, enough=enough)


class _Passes:
    """Forward passes that remember which memory format the model takes, and how large a batch fits into memory."""

    def __init__(self, network: nn.Module, record: Record) -> None:
        self._network = network
        self._record = record
        self._channels_last = True
        self._largest: int | None = None

    def run(self, inputs: Inputs) -> None:
        done = 0
        while done < len(inputs):
            part = inputs.rows(done, done + (self._largest or len(inputs)))
            try:
                fits = self._fits(part)
            except NotFiniteError as error:
                error.row += done
                raise
            if fits:
                done += len(part)
            else:  # outside of the except clause, whose traceback would keep the activations in memory
                self._largest = len(part) // 2
                warnings.warn(
                    f"a batch of {len(part)} does not fit into memory: continuing with batches of {self._largest}",
                    stacklevel=2,
                )

    def _fits(self, inputs: Inputs) -> bool:
        try:
            self._attempt(inputs)
        except torch.OutOfMemoryError:
            if len(inputs) == 1:
                raise
            return False
        return True

    def _attempt(self, inputs: Inputs) -> None:
        # channels_last: on a CPU it alone takes VGG16's forward to 0.78 of its time, and lets moments_of read
        # activations in place.
        attempted = self._channels_last and any(tensor.ndim == 4 for tensor in inputs.tensors)
        try:
            self._pass(inputs.mapped(_in_channels_last) if attempted else inputs)
        except (CalibrationError, torch.OutOfMemoryError):
            raise
        except Exception:  # a forward may use x.view(...), which takes contiguous activations only
            if not attempted:
                raise
            self._pass(inputs)
            self._channels_last = False

    def _pass(self, inputs: Inputs) -> None:
        self._record.discard()
        with suppress(ForwardDone):
            inputs.run(self._network)
        self._record.commit()


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore PyTorch's random state afterwards: even `iter(DataLoader)` draws from it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


def _in_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


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


def _cause(network: nn.Module, batch: Batch, error: NotFiniteError) -> str:
    """Describe the parameter or image because of which the activations of a layer are not finite."""
    for name in _modules_called(network, batch.inputs):
        for parameter_name, parameter in network.get_submodule(name).named_parameters(name, recurse=False):
            if not parameter.isfinite().all():
                return (
                    f": the parameter {parameter_name} contains NaN or Inf; repair the checkpoint, or skip the layers "
                    "downstream of it"
                )
    paths = getattr(batch.value, "paths", ())
    place = str(paths[error.row]) if error.row < len(paths) else f"image {error.row} of batch {batch.number}"
    return f", first for {place}; run in float32, or check that input"


def _modules_called(network: nn.Module, inputs: Inputs) -> list[str]:
    """Return the names of the modules that a pass calls until it fails, in order."""
    called: list[str] = []
    with ExitStack() as hooks:
        for name, module in network.named_modules():
            note = lambda *_, name=name: called.append(name)  # noqa: E731
            hooks.callback(module.register_forward_pre_hook(note).remove)
        try:
            inputs.run(network)
        except Exception:  # noqa: BLE001 - the failure to be explained
            return called
    return called
