"""Measure the moments of each site's activations in one pass over sample inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..graph.copies import working_copy
from ..graph.inputs import reference_tensor
from ..graph.sites import Site
from .micro_batches import run_in_micro_batches
from .moments import Moments
from .passes import ForwardDone, Progress
from .pooling import Statistics, pooled_over_ranks
from .recorder import Recorder, check_tolerance


def calibrate(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Moments]:
    """Return the moments of each site's activations over the whole calibration set, by the site's name.

    The unmodified network runs once in eval mode, up to the last site: a BatchNorm that changes nothing does not
    change any statistics downstream either. Moments are pooled over all batches in float64; they are not an average
    of averages. The model is not changed, and PyTorch's random state is restored.

    Inside an initialized torch.distributed process group, every rank calls this with its own part of the batches, which
    may be empty, and gets the moments of all parts together.

    Args:
        model: The network that the sites were found in.
        sites: From `find_sites`.
        batches: Tensors, or tuples, lists or dicts whose first value is the input, of any batch size.
        device: Where to run; by default the model's device.
        autocast: Dtype for the forward pass; statistics are computed in float32 or better in any case.
        tolerance: Stop early, once the error of mean and std is below this for 99 % of the channels of every site.
            The error is three standard errors, estimated from the spread between batches and relative to std.
        progress: Called after each batch with the number of images so far.

    Raises:
        CalibrationError: If there are no data, if activations are not finite (the message names the layer, and the
            parameter or image), or if the model cannot run on a batch.
    """
    if not sites:
        return {}
    check_tolerance(tolerance)
    recorder = _PassRecorder(sites)

    def measure() -> tuple[int, Statistics]:
        network = working_copy(model, device)
        with _recording_outputs(sites, network, recorder):
            images = recorder.run(
                network,
                batches,
                gather=all(site.calls for site in sites),  # else the path of a batch depends on its values
                autocast=autocast,
                tolerance=tolerance,
                progress=progress,
            )
        recorder.check_complete()
        return images, recorder.statistics()

    moments = pooled_over_ranks("calibrate", measure)[1].moments()
    not_called = [site.name for site in sites if site.name not in moments]
    if not_called:
        raise CalibrationError(f"the layer {not_called[0]} was never called on the calibration set")
    return moments


class _PassRecorder(Recorder):
    """A recorder that counts the calls of each site during the current forward pass."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._batches_of = Counter({site.name: 0 for site in sites if site.calls})

    def begin_part(self) -> None:
        """Count the calls of one forward: hooks on the network would not see one that has its own `__call__`."""
        self.calls.clear()

    def commit(self, batches: int = 1) -> None:
        """Keep what was recorded during a forward pass, and count for which sites something was."""
        super().commit(batches)
        self._batches_of.update({name: batches for name in self._batches_of if self.calls[name]})

    def check_complete(self) -> None:
        """Raise CalibrationError if a site that every pass should call has the values of some batches alone."""
        for name, batches in self._batches_of.items():
            if 0 < batches < self.batches:
                raise CalibrationError(
                    f"the layer {name} was called for {batches} of {self.batches} batches, so its statistics would not "
                    "be those of all images; pass batches that take the same path through the network, or skip it"
                )


def _check_shape(output: Tensor, site: Site) -> None:
    """Raise CalibrationError if a site's output does not have the axes of a batch."""
    axes = 2 if site.kind == "dense" else 2 + site.dims
    if output.ndim != axes or output.shape[1] != site.channels:
        raise CalibrationError(
            f"the outputs of layer {site.name} have the shape {tuple(output.shape)}, not a batch of {site.channels} "
            "channels: squeeze() in the forward removes the batch axis of a single image. Use batches of two images or "
            "more, the last one included, or flatten(1) in place of squeeze()"
        )


@contextmanager
def _recording_outputs(sites: Sequence[Site], network: nn.Module, recorder: _PassRecorder) -> Iterator[None]:
    """Record the output of each site's anchor, and end each forward pass after the last one."""
    calls = recorder.calls
    expected_calls = Counter({site.name: site.calls for site in sites})
    countable = all(site.calls for site in sites)

    def hook(site: Site) -> Callable[[nn.Module, Any, Tensor], None]:
        def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            _check_shape(output, site)
            # Before the hook returns: an in-place activation after the layer overwrites this tensor.
            recorder.record(site.name, output)
            calls[site.name] += 1
            if countable and calls >= expected_calls:
                raise ForwardDone

        return record

    with ExitStack() as hooks:
        own_hooks: set[int] = set()
        for site in sites:
            handle = network.get_submodule(site.anchor).register_forward_hook(hook(site))
            hooks.callback(handle.remove)
            own_hooks.add(handle.id)
        if reference_tensor(network).device.type == "cpu":  # a GPU is fastest on whole batches
            run_in_micro_batches(network, calls, own_hooks)
        yield
