"""Run several small batches as one, and a large one in parts, where the network allows it.

What a forward pass costs besides arithmetic is the same for batches of any size: with batches of 4, LeNet-5 spends more
time between operations than in them, and so do the statistics. The activations of a large batch, on the other hand, are
written to memory and read again by the next layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..graph.inputs import Inputs
from .moments import Moments, merge
from .passes import Batch, failures_named

# Input of a pass, and its largest activations: these stay in a CPU's last-level cache. In a network with more
# parameters, which each pass reads from memory, activations may be as large as all of them.
_BYTES_AT_A_TIME = 8 << 20
# Images are tested for depending on each other: this many, after this many others.
_IMAGES_TESTED = 2
_IMAGES_BEFORE_TEST = 64
# The sampling error is estimated from the spread between passes, so that there has to be a number of them: a pass is
# limited to an eighth of the batches before it.
_EARLIER_PASSES = 8
# Largest change of the statistics of a deep network, relative to std, that rounding may cause where batches have other
# sizes.
_ROUNDING = 1e-3


class JoinedBatches:
    """Collects batches, and runs them together once they are enough; large ones of a small network run in parts.

    The images of a batch must not depend on each other in the network, as they do in a BatchNorm without running
    statistics. This is tested once, on very different images. Where they do, and wherever a gathered batch fails,
    batches run one by one.
    """

    def __init__(
        self,
        run: Callable[[Batch], None],
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
        self._waiting: list[Batch] = []
        self._images = torch.empty(0)  # of the batches that wait
        self._filled = 0

    def add(self, batch: Batch) -> None:
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
        others = images.amax() + images.amin() - images  # the negatives, in the same range of values
        try:
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


def _images_of(batch: Batch) -> Tensor | None:
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
