"""Forward passes whose hooks record moments: of each place in a model, and how they spread between batches."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, GraphError
from ..graph.compiled import uncompiled
from ..graph.copies import parameter_bytes, protected_passes
from ..graph.inputs import Inputs
from ..support.processes import Ranks
from .moments import MOST_BY_IMAGE, Moments, merge, moments_by_image, moments_of
from .pass_options import PassOptions
from .passes import JoinedBatches, NotFiniteError, NumberedBatch, for_each_batch, under_autocast
from .pooled_statistics import Statistics, merged_moments
from .sampling_error import batch_spread, image_spread

_FEWEST_BATCHES = 8  # fewer are not enough to estimate the spread between batches
_CHANNELS_WITHIN = 0.99
# Memory stays constant over any number of batches; merging fewer at a time takes longer.
_PASSES_TO_MERGE = 64


class Recorder:
    """Pools the moments of the values passed to it, under the name of their place in a model."""

    def __init__(self, *, spread_by_image: bool = False) -> None:
        """Start with nothing recorded.

        Args:
            spread_by_image: As in `PassOptions`.
        """
        self._spread_by_image = spread_by_image
        self._uncommitted_spreads: defaultdict[str, list[Moments]] = defaultdict(list)
        self._image_spreads: dict[str, Moments] = {}
        self._without_image_spread: set[str] = set()
        self._uncommitted: defaultdict[str, list[Moments]] = defaultdict(list)
        self._of_passes: defaultdict[str, list[tuple[Moments, int]]] = defaultdict(list)  # with their batches
        self._moments: dict[str, Moments] = {}  # of all earlier passes
        self._spreads: dict[str, Moments] = {}
        self._passes: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._elsewhere: dict[str, Moments] = {}
        self._images_elsewhere = 0
        self.batches = 0
        self.images = 0

    @property
    def images_everywhere(self) -> int:
        """Number of images so far, including those that `set_elsewhere` added."""
        return self.images + self._images_elsewhere

    def record(self, name: str, values: Tensor, *, by_image: bool = False, layer: str = "") -> Moments:
        """Record and return the moments of values at a place.

        Args:
            name: Name of the place.
            values: A batch of them.
            by_image: Record those of each image as well, unless there are too many by now.
            layer: Name of the layer whose output they are, for messages; by default the name of the place.

        Raises:
            NotFiniteError: If there are values that are not finite.
        """
        # Only in this thread, unlike `_disable_current_modes`: another thread may be exporting a model.
        with torch._C._DisableTorchDispatch():  # `protected_parameters` would intercept each operation
            plain = values.detach().as_subclass(Tensor)  # of another class, such as MONAI's MetaTensor
            moments = moments_of(plain)
            few = self.images + len(values) <= MOST_BY_IMAGE
            if by_image and few and moments.count:
                moments = replace(moments, by_image=moments_by_image(plain))
            finite = isfinite(float(moments.m2.sum()))  # then the mean is finite too
            if self._spread_by_image and finite and moments.count:
                self._uncommitted_spreads[name].append(image_spread(plain))
        if not finite:
            message = f"the activations of {layer or name} are not finite in {values.dtype}"
            raise NotFiniteError(message, _first_bad_row(values), values.dtype)
        self._uncommitted[name].append(moments)
        return moments

    def uncommitted(self) -> Mapping[str, Moments]:
        """Return the moments of what was recorded during a forward pass and not yet kept or discarded."""
        return merged_moments(self._uncommitted)

    def commit(self, batches: int, images: int) -> None:
        """Keep what was recorded during a forward pass over this many batches and images."""
        for name, of_pass in self.uncommitted().items():
            self._calls[name] += len(self._uncommitted[name])
            self._passes[name] += 1
            self._of_passes[name].append((of_pass, batches))
            if len(self._of_passes[name]) >= _PASSES_TO_MERGE:
                self._merge_passes(name)
        for name, spreads in self._uncommitted_spreads.items():
            spread = merge(spreads)
            if spread.count != images:  # the layer has several calls or rows for each image, which depend on each other
                self._without_image_spread.add(name)
            earlier = self._image_spreads.get(name)
            self._image_spreads[name] = merge([earlier, spread]) if earlier else spread
        self.batches += batches
        self.images += images
        self.discard()

    def discard(self) -> None:
        """Forget what was recorded during a forward pass that will be run again."""
        self._uncommitted.clear()
        self._uncommitted_spreads.clear()

    def pooled(self, name: str) -> Moments:
        """Return the moments of all values at a place so far: here, in the current pass, and elsewhere."""
        self._merge_passes(name)
        here = [self._moments[name]] if name in self._moments else []
        here += self._uncommitted[name]
        if name not in self._elsewhere:
            return merge(here)
        return merge([*(moments.cpu() for moments in here), self._elsewhere[name]])

    def recorded(self) -> dict[str, Moments]:
        """Return the moments of all values that were recorded here and kept, in host memory, by their places."""
        for name in list(self._of_passes):
            self._merge_passes(name)
        return {name: moments.cpu() for name, moments in self._moments.items()}

    def set_elsewhere(self, parts: Iterable[tuple[int, Mapping[str, Moments]]]) -> None:
        """Take what other ranks have recorded so far into account in `pooled`: numbers of images, and moments."""
        numbers, lists = 0, defaultdict[str, list[Moments]](list)
        for images, recorded in parts:
            numbers += images
            for name, moments in recorded.items():
                lists[name].append(moments)
        self._images_elsewhere, self._elsewhere = numbers, merged_moments(lists)

    def run(self, network: nn.Module, batches: Iterable[Any], options: PassOptions) -> int:
        """Run batches through a network whose hooks record here, and return the number of images.

        Images run in channels_last where the forward allows it, and in smaller batches where memory runs out.
        PyTorch's random state is restored afterwards.

        Args:
            network: A working copy in eval mode, on the device of the options.
            batches: As for `insert_batchnorm`.
            options: How to run them.

        Raises:
            CalibrationError: If the network cannot run on a batch, or its activations are not finite. The message names
                the batch, or the layer and the parameter or image that is the cause.
        """
        with ExitStack() as stack:
            passes = _Passes(network, self, stack.enter_context(protected_passes(network)))
            stack.enter_context(under_autocast(network, options.autocast))
            stack.enter_context(uncompiled())

            def run(batch: NumberedBatch) -> None:
                try:
                    passes.run(batch.inputs)
                except NotFiniteError as error:
                    raise NotFiniteError(f"{error}{_cause(network, batch, error)}") from None

            def rehearse(inputs: Inputs) -> Mapping[str, Moments]:
                passes.run_uncommitted(inputs)
                moments = self.uncommitted()
                self.discard()
                return moments

            joined = JoinedBatches(run, passes.run_whole, rehearse, passes.split, parameter_bytes(network))
            return for_each_batch(
                network,
                batches,
                joined.add if options.join_batches and options.tolerance is None else run,
                progress=options.progress,
                enough=lambda: self.precise_enough(options.tolerance),
                finish=joined.finish,
            )

    def statistics(self) -> Statistics:
        """Return what was recorded at all places, in host memory."""
        recorded = self.recorded()
        by_image = {
            name: spread for name, spread in self._image_spreads.items() if name not in self._without_image_spread
        }
        return Statistics(
            recorded,
            {name: spread.cpu() for name, spread in (self._spreads | by_image).items()},
            Counter(self._passes | {name: spread.count for name, spread in by_image.items()}),
            Counter(self._calls),
        )

    def _merge_passes(self, name: str) -> None:
        """Merge the moments of the passes since the last call into those of all earlier ones."""
        if passes := self._of_passes.pop(name, None):
            moments = merge(moments for moments, _ in passes)
            for kept, more in ((self._moments, moments), (self._spreads, batch_spread(passes))):
                kept[name] = merge([kept[name], more]) if name in kept else more

    def precise_enough(self, tolerance: float | None) -> bool:
        """Return whether enough channels of every place are known to within `tolerance`, relative to their std.

        None is a tolerance that is never reached. Every rank has a part of the batches, so its own error may be larger
        than that of all ranks together.
        """
        if tolerance is None or self.batches < _FEWEST_BATCHES:
            return False
        largest = tolerance * Ranks.current().count ** 0.5
        return all(moments.error_of(_CHANNELS_WITHIN) <= largest for moments in self.statistics().moments().values())


class _Passes:
    """Forward passes that remember which memory format the model takes, and how large a batch fits into memory."""

    def __init__(
        self, network: nn.Module, recorder: Recorder, protection: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._network = network
        self._recorder = recorder
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
        self._recorder.commit(batches, len(inputs))

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
        self._recorder.discard()
        images = self._images_at_a_time(inputs)
        for start in range(0, len(inputs), images):
            copies = (inputs if images >= len(inputs) else inputs.rows(start, start + images)).mapped(copy)
            try:
                with self._protection():
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


def _first_bad_row(values: Tensor) -> int:
    return int(values.flatten(1).isfinite().all(1).int().argmin())


def _copy_in_channels_last(tensor: Tensor) -> Tensor:
    if tensor.ndim != 4:
        return tensor.clone()
    # Not contiguous(), which copies nothing if there is one channel: convs take its strides for contiguous ones.
    return torch.empty_like(tensor, memory_format=torch.channels_last).copy_(tensor)


def _cause(network: nn.Module, batch: NumberedBatch, error: NotFiniteError) -> str:
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
    in_half = error.dtype in (torch.float16, torch.bfloat16)
    return f", first in {place}; {'run in float32, or ' if in_half else ''}check that input"


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
