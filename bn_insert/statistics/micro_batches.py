"""Run the conv stages of a network on a few images at a time, so that activations stay in the processor's cache.

One conv layer of a VGG returns 411 MB for 32 images of 224 x 224: written to memory, read again by the ReLU after it,
and requested from the operating system page by page. The 13 MB of one image are still in the cache when the statistics,
the ReLU and the next layer read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..graph.copies import working_copy
from ..graph.operators import PER_IMAGE_MODULES
from .passes import ForwardDone, NotFiniteError

# Size of the input or output of a module for one micro-batch: half of a usual last-level cache, and small enough for
# the memory allocator to reuse, which returns larger blocks to the system.
_BYTES_AT_A_TIME = 16 << 20


def run_in_micro_batches(network: nn.Module, calls: Counter[str], own_hooks: Set[int]) -> None:
    """Make a network run its sequences of conv layers on a few images at a time; outputs are equal up to rounding.

    Hooks of the modules in such a sequence are then called once for each micro-batch. A sequence runs whole batches
    if it has modules other than convs, pools, activations and the like, or while hooks of others are registered on it,
    which may depend on the whole batch.

    Args:
        network: A working copy in eval mode; it is changed.
        calls: Counts that hooks keep during a pass of the network. Every micro-batch starts from the same counts, as if
            it were the only one; ForwardDone takes effect when all micro-batches have raised it.
        own_hooks: Ids of the hooks that accept micro-batches.
    """
    for module in network.modules():
        if isinstance(module, nn.Sequential) and _is_per_image(module):
            module.forward = _MicroBatchedForward(module, calls, own_hooks)  # type: ignore[method-assign]


def _is_per_image(sequence: nn.Sequential) -> bool:
    """Return whether a sequence has convs and treats each image by itself."""
    children = list(sequence.children())
    return (
        type(sequence).forward is nn.Sequential.forward
        and any(isinstance(child, nn.Conv2d) for child in children)
        and all(_eval_class(child) in PER_IMAGE_MODULES for child in children)
        and all(child.running_mean is not None for child in children if isinstance(child, _BatchNorm))
        and all(child.start_dim > 0 for child in children if isinstance(child, nn.Flatten))
        and not any(getattr(child, "return_indices", False) for child in children)
        and not any("forward" in vars(module) for module in (sequence, *children))  # replaced by someone else
    )


def _eval_class(module: nn.Module) -> type[nn.Module]:
    """Return the class whose forward a module has in eval mode: its own, or the one that its class declares."""
    declared: type[nn.Module] = vars(type(module)).get("eval_class", type(module))
    return declared


@dataclass(frozen=True)
class Stretch:
    """Modules of a sequence that follow each other and run on the same micro-batches.

    Attributes:
        modules: The modules, in order.
        micro_batches: The number of micro-batches that a batch is split into for them.
    """

    modules: tuple[nn.Module, ...]
    micro_batches: int


class _MicroBatchedForward:
    """The forward of an nn.Sequential that runs each stretch of its modules on as many images as fit into the cache."""

    def __init__(self, sequence: nn.Sequential, calls: Counter[str], own_hooks: Set[int]) -> None:
        self._modules = list(sequence)
        self._calls = calls
        self._own_hooks = own_hooks
        self._values_per_image: dict[torch.Size, list[int]] = {}

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Sequential gives it
        if input.ndim != 4 or self._is_watched() or not (sizes := self._bytes_per_image(input)):
            return _run(self._modules, input)
        images = input
        for stretch in _stretches(self._modules, sizes, len(images)):
            images = self._run_stretch(stretch, images)
        return images

    def _is_watched(self) -> bool:
        """Return whether others have hooks; checked in each call, as a forward may set them to tap activations."""
        hooks = (hooks for module in self._modules for hooks in (module._forward_hooks, module._forward_pre_hooks))
        return bool(
            _global_forward_hooks
            or _global_forward_pre_hooks
            or any(not ids.keys() <= self._own_hooks for ids in hooks)
        )

    def _bytes_per_image(self, images: Tensor) -> list[int]:
        """Return the size of one image before or after each module, or nothing if the modules cannot take the images.

        They then run on the images themselves, and their own error is the clearest.
        """
        shape = images.shape[1:]
        if shape not in self._values_per_image:
            try:
                self._values_per_image[shape] = _values_per_image(self._modules, shape)
            except Exception:  # noqa: BLE001 - any module may raise anything
                return []
        return [values * images.element_size() for values in self._values_per_image[shape]]

    def _run_stretch(self, stretch: Stretch, images: Tensor) -> Tensor:
        counts_before = dict(self._calls)
        outputs: list[Tensor] = []
        start, done = 0, False
        for micro_batch in images.tensor_split(stretch.micro_batches):
            self._calls.clear()
            self._calls.update(counts_before)
            try:
                outputs.append(_run(stretch.modules, micro_batch))
            except ForwardDone:
                done = True
            except NotFiniteError as error:
                error.row += start
                raise
            start += len(micro_batch)
        if done:
            raise ForwardDone
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _stretches(modules: Sequence[nn.Module], bytes_per_image: Sequence[int], images: int) -> Iterator[Stretch]:
    """Yield the stretches of a sequence for a batch of this many images."""
    counts = [ceil(images / max(1, _BYTES_AT_A_TIME // size)) or 1 for size in bytes_per_image]
    for micro_batches, members in groupby(zip(counts, modules, strict=True), key=lambda pair: pair[0]):
        yield Stretch(tuple(module for _, module in members), micro_batches)


def _values_per_image(modules: Sequence[nn.Module], shape: torch.Size) -> list[int]:
    """Return for each module the number of values of its input or output, the larger, for one image of this shape."""
    on_meta = working_copy(nn.Sequential(*modules), "meta").float()  # the meta device has shapes but no values
    values = [torch.empty(1, *shape, device="meta")]
    for module in on_meta:
        values.append(module.forward(values[-1]))  # without hooks
    return [max(before.numel(), after.numel(), 1) for before, after in pairwise(values)]


def _run(modules: Sequence[nn.Module], images: Tensor) -> Tensor:
    for module in modules:
        images = module(images)
    return images
