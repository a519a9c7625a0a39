"""Measure the moments of each site's activations in one pass over sample inputs.

On a CPU, the conv stages of a network run on a few images at a time (micro-batches), so that activations stay in the
cache. One conv layer of a VGG returns 411 MB for 32 images of 224 x 224: written to memory, read again by the ReLU
after it, and requested from the operating system page by page. The 13 MB of one image are still in the cache when the
statistics, the ReLU and the next layer read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..errors import CalibrationError, as_passed
from ..graph.copies import shared_copy, working_copy
from ..graph.inputs import reference_tensor
from ..graph.operator_rules import PER_IMAGE_MODULES
from ..graph.sites import Site, checked_sites
from ..support.text import with_article
from .moments import Moments
from .pass_options import PassOptions, ProgressCallback
from .passes import SINGLE_IMAGE, NotFiniteError
from .pooled_statistics import Statistics, pooled_over_ranks
from .recorder import Recorder

# Size of the input or output of a module for one micro-batch: half of a usual last-level cache, and small enough for
# the memory allocator to reuse, which returns larger blocks to the system.
_MICRO_BATCH_BYTES = 16 << 20


def calibrate(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    tolerance: float | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Moments]:
    """Return the moments of each site's activations over the whole calibration set, by the site's name.

    The unmodified network runs once in eval mode: a BatchNorm that changes nothing does not change any statistics
    downstream either. Moments are pooled over all batches in float64; they are not an average of averages. The model
    is not changed, and PyTorch's random state is restored.

    Inside an initialized torch.distributed process group, every rank calls this with its own part of the batches, which
    may be empty, and gets the moments of all parts together.

    Args:
        model: The network that the sites were found in.
        sites: From `find_sites`.
        batches: Tensors, or tuples, lists or dicts whose first value is the input, of any batch size.
        device: Where to run; by default the model's device.
        autocast: Dtype for the forward pass; statistics are computed in float32 or better in any case.
        tolerance: Stop early, once the error of mean and std is below this for 99% of the channels of every site.
            The error is three standard errors, estimated from the spread between batches and relative to std.
        progress: Called after each batch with the number of images so far.

    Raises:
        CalibrationError: If there are no data, if activations are not finite (the message names the layer, and the
            parameter or image), or if the model cannot run on a batch.
        GraphError: If `sites` are not sites of the model, or the model is not a module.
    """
    options = PassOptions(device, autocast, tolerance, progress, join_batches=True)
    return calibrate_sites(model, checked_sites(model, sites), batches, options)[1]


def calibrate_sites(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Any], options: PassOptions
) -> tuple[int, dict[str, Moments]]:
    """Return the number of images, over all processes, and what `calibrate` returns for sites of the model."""
    if not sites:
        return 0, {}
    options.check_tolerance()
    if not all(site.calls for site in sites):  # the path through the network depends on the values of a batch
        options = replace(options, join_batches=False)
    recorder = _PassRecorder(sites, spread_by_image=options.spread_by_image)

    def measure() -> tuple[int, Statistics]:
        network = working_copy(model, options.device)
        with _recording_outputs(sites, network, recorder):
            images = recorder.run(network, batches, options)
        recorder.check_complete()
        return images, recorder.statistics()

    images, statistics = pooled_over_ranks("calibrate", measure)
    moments = statistics.moments()
    not_called = [site.name for site in sites if site.name not in moments]
    if not_called:
        raise CalibrationError(f"the layer {not_called[0]} was never called on the calibration set")
    return images, moments


class _PassRecorder(Recorder):
    """A recorder that counts the batches for which each site was called."""

    def __init__(self, sites: Sequence[Site], *, spread_by_image: bool) -> None:
        super().__init__(spread_by_image=spread_by_image)
        self._batches_of = Counter({site.name: 0 for site in sites if site.calls})

    def commit(self, batches: int, images: int) -> None:
        """Keep what was recorded during a forward pass, and count for which sites something was."""
        called = set(self._uncommitted)
        super().commit(batches, images)
        self._batches_of.update({name: batches for name in self._batches_of if name in called})

    def check_complete(self) -> None:
        """Raise CalibrationError if a site that every pass should call has values of only some batches."""
        for name, batches in self._batches_of.items():
            if 0 < batches < self.batches:
                raise CalibrationError(
                    f"the layer {name} was called for {batches} of {self.batches} batches, so its statistics would not "
                    "cover all images; pass batches that take the same path through the network, or skip it"
                )


def _check_output(output: Any, site: Site) -> None:
    """Raise CalibrationError if a site's output is not a tensor with the axes of a batch."""
    if not isinstance(output, Tensor):
        raise CalibrationError(
            f"the layer {site.name} returns {with_article(output)} instead of a tensor, so no BatchNorm can follow it; "
            f"leave it out ({as_passed('skip', [site.name], f'--skip {site.name}')})"
        )
    axes = 2 if site.kind == "dense" else 2 + site.dims
    if output.ndim == axes and output.shape[1] != site.channels:
        raise CalibrationError(
            f"the outputs of layer {site.name} have {output.shape[1]} channels, but its site {site.channels}; pass the "
            "sites that find_sites returns for this model"
        )
    if output.ndim != axes:
        raise CalibrationError(
            f"the outputs of layer {site.name} have the shape {tuple(output.shape)}, not a batch of {site.channels} "
            f"channels: {SINGLE_IMAGE}"
        )


@contextmanager
def _recording_outputs(sites: Sequence[Site], network: nn.Module, recorder: _PassRecorder) -> Iterator[None]:
    """Record the output of each site's anchor.

    Each pass runs to its end. How often a layer is called may depend on the batch, in a forward that loops over images
    or frames, so that no number of calls says that all layers are done.
    """

    def hook(site: Site) -> Callable[[nn.Module, Any, Tensor], None]:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            _check_output(output, site)
            # Before the hook returns: an in-place activation after the layer overwrites this tensor.
            recorder.record(site.name, output)

        return record

    with ExitStack() as hooks:
        own_hooks: set[int] = set()
        for site in sites:
            handle = network.get_submodule(site.anchor).register_forward_hook(hook(site))
            hooks.callback(handle.remove)
            own_hooks.add(handle.id)
        if reference_tensor(network).device.type == "cpu":  # a GPU is fastest on whole batches
            run_in_micro_batches(network, own_hooks)
        yield


def run_in_micro_batches(network: nn.Module, own_hooks: Set[int]) -> None:
    """Make a network run its sequences of conv layers on a few images at a time; outputs are equal up to rounding.

    Hooks of the modules in such a sequence are then called once for each micro-batch. A sequence runs whole batches if
    it has modules other than convs, pools, activations and the like, or while other code's hooks, which may depend on
    the whole batch, are registered on it.

    Args:
        network: A working copy in eval mode; it is changed.
        own_hooks: Ids of the hooks that accept micro-batches.
    """
    for module in network.modules():
        if isinstance(module, nn.Sequential) and _is_per_image(module):
            module.forward = _MicroBatchedForward(module, own_hooks)  # type: ignore[method-assign]


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
class _Stretch:
    """Modules of a sequence that follow each other and run on the same micro-batches.

    Attributes:
        modules: The modules, in order.
        micro_batches: The number of micro-batches that a batch is split into for them.
    """

    modules: tuple[nn.Module, ...]
    micro_batches: int


class _MicroBatchedForward:
    """The forward of an nn.Sequential that runs each stretch of its modules on as many images as fit into the cache."""

    def __init__(self, sequence: nn.Sequential, own_hooks: Set[int]) -> None:
        self._modules = list(sequence)
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
        """Return whether other code has hooks; checked in each call, as a forward may set them to tap activations."""
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

    def _run_stretch(self, stretch: _Stretch, images: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        start = 0
        for micro_batch in images.tensor_split(stretch.micro_batches):
            try:
                outputs.append(_run(stretch.modules, micro_batch))
            except NotFiniteError as error:
                error.row += start
                raise
            start += len(micro_batch)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _stretches(modules: Sequence[nn.Module], bytes_per_image: Sequence[int], images: int) -> Iterator[_Stretch]:
    """Yield the stretches of a sequence for a batch of this many images."""
    counts = [ceil(images / max(1, _MICRO_BATCH_BYTES // size)) or 1 for size in bytes_per_image]
    for micro_batches, members in groupby(zip(counts, modules, strict=True), key=lambda pair: pair[0]):
        yield _Stretch(tuple(module for _, module in members), micro_batches)


def _values_per_image(modules: Sequence[nn.Module], shape: torch.Size) -> list[int]:
    """Return for each module the number of values of its input or output, the larger, for one image of this shape."""
    # The meta device has shapes but no values.
    on_meta = shared_copy(nn.Sequential(*modules), "meta").to("meta", torch.float32)
    values = [torch.empty(1, *shape, device="meta")]
    for module in on_meta:
        values.append(module.forward(values[-1]))  # without hooks
    return [max(before.numel(), after.numel(), 1) for before, after in pairwise(values)]


def _run(modules: Sequence[nn.Module], images: Tensor) -> Tensor:
    for module in modules:
        images = module(images)
    return images
