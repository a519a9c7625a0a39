"""Run batches through a working copy of a model, whatever they and the model's forward are like."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..graph.inputs import Inputs, reference_tensor

Progress = Callable[[int], None]


class ForwardDone(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook to end a forward pass whose remaining layers nobody asks about."""


class NotFiniteError(CalibrationError):
    """Activations that are NaN or Inf; `row` is the first image of the batch that has any."""

    def __init__(self, layer: str, row: int, dtype: torch.dtype) -> None:
        """Name the layer and the dtype it computed in."""
        super().__init__(f"the activations of {layer} are not finite in {dtype}")
        self.row = row


@runtime_checkable
class Record(Protocol):
    """What hooks take down during a pass: kept when it ends well, thrown away when it has to be run again."""

    def commit(self) -> None:
        """Keep what has been taken down since the last commit."""

    def discard(self) -> None:
        """Throw it away."""


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

    network: a working copy in eval mode. enough: asked after each batch whether to end early.
    Images run in channels_last where the forward allows it, and in smaller batches where memory ends.
    PyTorch's random state is put back. Raises CalibrationError, saying which batch, layer, parameter or image.
    """
    passes = _Passes(network, record)
    context = torch.autocast(reference_tensor(network).device.type, autocast) if autocast else nullcontext()
    images = 0
    with preserved_random_state(), torch.inference_mode(), context:
        for number, batch in enumerate(checked(batches)):
            inputs = Inputs.of(batch, number, network)
            if len(inputs) == 0:
                continue
            try:
                passes.run(inputs)
            except NotFiniteError as error:
                raise CalibrationError(f"{error}{_cause(network, inputs, batch, error)}") from None
            except CalibrationError:
                raise
            except Exception as error:  # the user's forward may raise anything; here it gains its context
                raise CalibrationError(
                    f"the model failed on calibration batch {number} of shape {inputs.shapes}: {error}"
                ) from error
            images += len(inputs)
            if progress:
                progress(images)
            if enough():
                break
    return images


class _Passes:
    """Forward passes that learn: which memory format the model takes, and how large a batch fits into memory."""

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
                    f"a batch of {len(part)} does not fit into memory: going on with {self._largest}", stacklevel=2
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
        # activations where they lie.
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
    """Put PyTorch's random state back afterwards: even `iter(DataLoader)` draws from it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


def _in_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def checked(batches: Iterable[Any]) -> Iterable[Any]:
    """Return the batches; raises CalibrationError for what is no iterable, and for a single tensor.

    A tensor can be iterated too, but would be taken image by image.
    """
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise CalibrationError(
            f"batches is a {type(batches).__name__}, not an iterable of batches; give a DataLoader, or a list such as "
            "[images]"
        )
    if isinstance(batches, Tensor):
        raise CalibrationError(
            f"batches is one tensor of shape {tuple(batches.shape)}, and would be taken image by image; "
            "give an iterable of batches, such as [images] or images.split(32)"
        )
    return batches


def _cause(network: nn.Module, inputs: Inputs, batch: Any, error: NotFiniteError) -> str:
    """Say which parameter, or which image, makes the activations of a layer not finite."""
    for name in _modules_called(network, inputs):
        for parameter_name, parameter in network.get_submodule(name).named_parameters(name, recurse=False):
            if not parameter.isfinite().all():
                return (
                    f": the parameter {parameter_name} holds NaN or Inf; mend the checkpoint, or leave the layers "
                    "behind it out"
                )
    paths = getattr(batch, "paths", ())
    place = str(paths[error.row]) if error.row < len(paths) else f"image {error.row} of its batch"
    return f", first for {place}; run in float32, or look at that input"


def _modules_called(network: nn.Module, inputs: Inputs) -> list[str]:
    """Return the names of the modules that a pass calls up to where it fails, in order."""
    called: list[str] = []
    with ExitStack() as hooks:
        for name, module in network.named_modules():
            note = lambda *_, name=name: called.append(name)  # noqa: E731
            hooks.callback(module.register_forward_pre_hook(note).remove)
        try:
            inputs.run(network)
        except Exception:  # noqa: BLE001 - the failure that we are looking into
            return called
    return called
