"""Forward passes over batches, during which hooks record activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, GraphError
from ..graph.copies import parameter_bytes, protected_passes
from ..graph.inputs import Inputs, reference_tensor
from .joined_batches import JoinedBatches
from .moments import Moments
from .passes import Batch, ForwardDone, NotFiniteError, Progress, for_each_batch


class Record(Protocol):
    """What hooks record during a forward pass: kept if it succeeds, discarded if it has to be run again."""

    def commit(self, batches: int = 1) -> None:
        """Keep what was recorded since the last commit, during a pass over this many of the caller's batches."""

    def discard(self) -> None:
        """Discard what was recorded since the last commit."""

    def begin_part(self) -> None:
        """Go on with the next images of the same pass."""

    def uncommitted(self) -> Mapping[str, Moments]:
        """Return the moments of what was recorded since the last commit, by place."""


def run_through(
    network: nn.Module,
    batches: Iterable[Any],
    record: Record,
    *,
    gather: bool = False,
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
        gather: Run several small batches as one where that changes nothing but the time.
        autocast: Dtype for the forward pass; None runs it in the network's own dtype.
        progress: Called after each batch with the number of images so far.
        enough: Asked after each batch; the loop ends once it returns True.

    Raises:
        CalibrationError: If the network cannot run on a batch, or its activations are not finite. The message names
            the batch, or the layer and the parameter or image that is the cause.
    """
    with ExitStack() as stack:
        passes = _Passes(network, record, stack.enter_context(protected_passes(network)))
        if autocast:
            stack.enter_context(torch.autocast(reference_tensor(network).device.type, autocast))

        def run(batch: Batch) -> None:
            try:
                passes.run(batch.inputs)
            except NotFiniteError as error:
                raise NotFiniteError(f"{error}{_cause(network, batch, error)}") from None

        def rehearse(inputs: Inputs) -> Mapping[str, Moments]:
            passes.run_uncommitted(inputs)
            moments = record.uncommitted()
            record.discard()
            return moments

        joined = JoinedBatches(run, passes.run_whole, rehearse, passes.split, parameter_bytes(network))
        return for_each_batch(
            network,
            batches,
            joined.add if gather else run,
            progress=progress,
            enough=enough,
            finish=joined.finish,
        )


class _Passes:
    """Forward passes that remember which memory format the model takes, and how large a batch fits into memory."""

    def __init__(
        self, network: nn.Module, record: Record, protection: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._network = network
        self._record = record
        self._protection = protection
        # Convs and pools that follow each other are faster in channels_last. What follows a single conv may not be.
        self._channels_last = sum(isinstance(module, nn.Conv2d) for module in network.modules()) > 1
        self._largest: int | None = None
        self._bytes_at_a_time: int | None = None

    def split(self, bytes_at_a_time: int) -> None:
        """From now on, run each batch in parts whose inputs have this size; its statistics remain those of one pass."""
        self._bytes_at_a_time = bytes_at_a_time

    def run(self, inputs: Inputs) -> None:
        """Run a batch, in parts where memory runs out."""
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

    def run_whole(self, inputs: Inputs, batches: int = 1) -> None:
        """Run images that come from several of the caller's batches; if this fails, nothing is recorded."""
        self.run_uncommitted(inputs)
        self._record.commit(batches)

    def run_uncommitted(self, inputs: Inputs) -> None:
        """Run images without keeping what is recorded."""
        # channels_last: on a CPU it alone takes VGG16's forward to 0.78 of its time, and lets moments_of read
        # activations in place.
        attempted = self._channels_last and any(tensor.ndim == 4 for tensor in inputs.tensors)
        try:
            self._pass(inputs, _copy_in_channels_last if attempted else torch.clone)
        except (CalibrationError, GraphError, torch.OutOfMemoryError):
            raise
        except Exception:  # a forward may use x.view(...), which takes contiguous activations only
            if not attempted:
                raise
            self._pass(inputs, torch.clone)
            self._channels_last = False

    def _fits(self, inputs: Inputs) -> bool:
        try:
            self.run_whole(inputs)
        except torch.OutOfMemoryError:
            if len(inputs) == 1:
                raise
            return False
        return True

    def _pass(self, inputs: Inputs, copy: Callable[[Tensor], Tensor]) -> None:
        """Call the network on copies of the tensors, since it may change them in place."""
        self._record.discard()
        images = self._images_at_a_time(inputs)
        for start in range(0, len(inputs), images):
            self._record.begin_part()
            copies = (inputs if images >= len(inputs) else inputs.rows(start, start + images)).mapped(copy)
            try:
                with suppress(ForwardDone), self._protection():
                    self._network(*copies.args, **copies.kwargs)
            except NotFiniteError as error:
                error.row += start
                raise

    def _images_at_a_time(self, inputs: Inputs) -> int:
        # Whether images depend on each other was tested for inputs of one tensor.
        if self._bytes_at_a_time is None or inputs.only_tensor is None:
            return len(inputs)
        size = sum(tensor.numel() * tensor.element_size() for tensor in inputs.tensors)
        parts = min(-(-size // self._bytes_at_a_time), len(inputs))
        return -(-len(inputs) // parts)


def _copy_in_channels_last(tensor: Tensor) -> Tensor:
    if tensor.ndim != 4:
        return tensor.clone()
    # Not contiguous(), which copies nothing if there is one channel: convs take its strides for contiguous ones.
    return torch.empty_like(tensor, memory_format=torch.channels_last).copy_(tensor)


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
