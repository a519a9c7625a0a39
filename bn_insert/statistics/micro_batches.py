"""Run the conv stages of a network on a few images at a time, so that activations stay in the processor's cache.

What one conv layer of a VGG gives for 32 images of 224 x 224 has 411 MB: written to memory, read again by the ReLU
behind it, and asked from the operating system page by page.  One image's 13 MB are still in the cache when the
statistics, the ReLU and the next layer read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from itertools import groupby, pairwise
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..graph.copies import working_copy
from .passes import ForwardDone, NotFiniteError

# What goes into or comes out of a module, for the images that it is given at a time: half of a usual last-level cache,
# and small enough for the memory allocator to use again, where it gives larger blocks back to the system.
_BYTES_AT_A_TIME = 16 << 20

# In eval mode these treat each image by itself.
_PER_IMAGE = {
    *(nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Hardtanh, nn.Sigmoid, nn.Tanh),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.LocalResponseNorm, nn.ZeroPad2d),
}


def run_in_micro_batches(network: nn.Module, calls: Counter[str], own_hooks: Set[int]) -> None:
    """Make a working copy run its sequences of conv layers on a few images at a time; outputs are equal to rounding.

    Changes the network: hooks of the modules in such a sequence are then called once for each part of a batch.
    calls: what hooks count during a pass of the network. Each part of a batch finds the same counts, as if it came
    alone, and ForwardDone takes effect when all parts have raised it.
    own_hooks: ids of the hooks that take parts. While there are others, which may look at whole batches, a sequence
    runs whole; always so one that holds anything else than convs, pools, activations and their like.
    """
    for module in network.modules():
        if isinstance(module, nn.Sequential) and _is_per_image(module):
            module.forward = _InMicroBatches(module, calls, own_hooks)  # type: ignore[method-assign]


def _is_per_image(sequence: nn.Sequential) -> bool:
    """Say whether a sequence has convs, and runs each image by itself."""
    children = list(sequence.children())
    return (
        type(sequence).forward is nn.Sequential.forward
        and any(isinstance(child, nn.Conv2d) for child in children)
        and all(type(child) in _PER_IMAGE for child in children)
        and all(child.running_mean is not None for child in children if isinstance(child, _BatchNorm))
        and all(child.start_dim > 0 for child in children if isinstance(child, nn.Flatten))
        and not any(getattr(child, "return_indices", False) for child in children)
        and not any("forward" in vars(module) for module in (sequence, *children))  # somebody else's in its place
    )


class _InMicroBatches:
    """The forward of an nn.Sequential: as many images at a time as each stretch of its modules has room for."""

    def __init__(self, sequence: nn.Sequential, calls: Counter[str], own_hooks: Set[int]) -> None:
        self._modules = list(sequence)
        self._calls = calls
        self._own_hooks = own_hooks
        self._values_per_image: dict[torch.Size, list[int]] = {}

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Sequential gives it
        if input.ndim != 4 or self._is_watched() or not (sizes := self._bytes_per_image(input)):
            return _run(self._modules, input)
        for modules, parts in _stretches(self._modules, sizes, len(input)):
            input = self._in_parts(modules, input, parts)  # noqa: A001
        return input

    def _is_watched(self) -> bool:
        """Say whether there are hooks of others; a forward may set them while it runs, to tap activations."""
        hooks = (hooks for module in self._modules for hooks in (module._forward_hooks, module._forward_pre_hooks))
        return bool(
            _global_forward_hooks
            or _global_forward_pre_hooks
            or any(not ids.keys() <= self._own_hooks for ids in hooks)
        )

    def _bytes_per_image(self, images: Tensor) -> list[int]:
        """Return what one image takes in front of each module or behind it; nothing for images that do not fit."""
        shape = images.shape[1:]
        if shape not in self._values_per_image:
            try:
                self._values_per_image[shape] = _values_per_image(self._modules, shape)
            except Exception:  # noqa: BLE001 - run on the images themselves, the modules say better what is wrong
                return []
        return [values * images.element_size() for values in self._values_per_image[shape]]

    def _in_parts(self, modules: Sequence[nn.Module], images: Tensor, parts: int) -> Tensor:
        before = dict(self._calls)
        outputs: list[Tensor] = []
        start, done = 0, False
        for part in images.tensor_split(parts):
            self._calls.clear()
            self._calls.update(before)
            try:
                outputs.append(_run(modules, part))
            except ForwardDone:
                done = True
            except NotFiniteError as error:
                error.row += start
                raise
            start += len(part)
        if done:
            raise ForwardDone
        return torch.cat(outputs) if parts > 1 else outputs[0]


def _stretches(
    modules: Sequence[nn.Module], bytes_per_image: Sequence[int], images: int
) -> Iterator[tuple[list[nn.Module], int]]:
    """Yield modules that follow each other and want so many images in the same number of parts."""
    parts = [ceil(images / max(1, _BYTES_AT_A_TIME // size)) or 1 for size in bytes_per_image]
    for number, members in groupby(zip(parts, modules, strict=True), key=lambda pair: pair[0]):
        yield [module for _, module in members], number


def _values_per_image(modules: Sequence[nn.Module], shape: torch.Size) -> list[int]:
    """Return, for each module, the larger number of values in front of it and behind it for one image of this shape."""
    on_meta = working_copy(nn.Sequential(*modules), "meta").float()  # has shapes, and neither memory nor work
    values = [torch.empty(1, *shape, device="meta")]
    for module in on_meta:
        values.append(module.forward(values[-1]))  # without hooks
    return [max(given.numel(), made.numel(), 1) for given, made in pairwise(values)]


def _run(modules: Sequence[nn.Module], images: Tensor) -> Tensor:
    for module in modules:
        images = module(images)
    return images
