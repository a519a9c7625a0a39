"""Run several small batches as one: what a forward pass costs besides arithmetic is the same for batches of any size.

With batches of 4, LeNet-5 spends more time between operations than in them, and so do the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..graph.inputs import Inputs
from .moments import Moments, merge
from .passes import Batch, failures_named

# Input of one gathered batch. Of larger ones, more activations than before would have to be read from memory.
_BYTES_AT_A_TIME = 4 << 20
# The sampling error is estimated from the spread between passes, so that there has to be a number of them: a pass is
# limited to an eighth of the batches before it.
_EARLIER_PASSES = 8
# Largest change of the statistics of a deep network, relative to std, that rounding may cause where batches have other
# sizes.
_ROUNDING = 1e-3


class Gathering:
    """Collects batches, and runs them together once they are enough.

    The images of a batch must not depend on each other in the network, as they do in a BatchNorm without running
    statistics. This is tested once, on two batches of very different images. Where they do, and wherever a gathered
    batch fails, batches run one by one.
    """

    def __init__(
        self,
        run: Callable[[Batch], None],
        run_whole: Callable[[Inputs, int], None],
        rehearse: Callable[[Inputs], Mapping[str, Moments]],
    ) -> None:
        """Start without any batches.

        Args:
            run: Runs one batch; its errors name the batch.
            run_whole: Runs the images of several batches, of which the number is given; if it raises an exception, it
                has no other effect.
            rehearse: Runs images without recording anything, and returns the moments of each place.
        """
        self._run = run
        self._run_whole = run_whole
        self._rehearse = rehearse
        self._independent: bool | None = None  # None: not tested yet
        self._batches_run = 0
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
                self._independent = False
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
        fitting = _BYTES_AT_A_TIME // (images.numel() * images.element_size())
        batches = min(fitting, self._batches_run // _EARLIER_PASSES)
        if batches < 2 or self._independent is False:
            return False
        if self._independent is None:
            self._independent = self._is_independent(images)
        if self._independent:
            self._images = images.new_empty(batches * len(images), *images.shape[1:])
        return self._independent

    def _is_independent(self, images: Tensor) -> bool:
        """Return whether images have the same activations next to others as by themselves."""
        others = images.amax() + images.amin() - images  # the negatives, in the same range of values
        try:
            first, second, together = (
                self._rehearse(Inputs((each,))) for each in (images, others, torch.cat([images, others]))
            )
            return all(_agree(merge([first[name], second[name]]), together[name]) for name in together)
        except Exception:  # noqa: BLE001 - the network may raise anything for such images
            return False


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
