"""Run sample inputs through a model once, and give every site the moments of its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CalibrationError
from .graph import working_copy
from .moments import Moments, merge, moments_of
from .sites import Site

Progress = Callable[[int], None]


def calibrate(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Moments]:
    """Return the moments of each site's activations over the whole calibration set, by the site's name.

    One pass of the unmodified network in eval mode, ended behind the last site: a BatchNorm that changes nothing
    changes no statistics downstream either. Moments are pooled over all batches in float64 (not an average of
    averages).

    batches: tensors, or tuples, lists or dicts whose first value is the input, of any batch size.
    device: where to run; default: where the model is. autocast: a dtype for the forward; statistics stay float32 or
    better. progress: called after each batch with the number of images so far. The model is left as it is, and so is
    PyTorch's random state. Raises CalibrationError for no data, for values that are not finite (naming layer and
    parameter), and when the model cannot run on a batch.
    """
    if not sites:
        return {}
    network = working_copy(model, device)
    target = next(network.parameters())
    recorder = _Recorder(network, sites)
    context = torch.autocast(target.device.type, autocast) if autocast else nullcontext()
    images = 0
    with preserved_random_state(), torch.inference_mode(), recorder, context:
        for number, batch in enumerate(batches):
            inputs = as_input(batch, number, target)
            try:
                network(_channels_last(inputs))
            except _LastSiteReached:
                pass
            except _NotFiniteError as error:
                raise CalibrationError(f"{error}{_cause(model, batch, error)}") from None
            except Exception as error:  # the user's forward may raise anything; here it gains its context
                raise CalibrationError(
                    f"the model failed on calibration batch {number} of shape {tuple(inputs.shape)}: {error}"
                ) from error
            images += len(inputs)
            if progress:
                progress(images)
    if images == 0:
        raise CalibrationError("the calibration set is empty: no batch arrived")
    return recorder.moments()


def as_input(batch: Any, number: int, target: Tensor) -> Tensor:
    """Return the input tensor of a batch, with the device and dtype of `target`.

    Raises CalibrationError, naming the batch by `number`, when its first value is not a floating tensor.
    """
    value = batch
    while not isinstance(value, Tensor):
        if isinstance(value, Mapping) and value:
            value = next(iter(value.values()))
        elif isinstance(value, (tuple, list)) and value:
            value = value[0]
        else:
            raise CalibrationError(
                f"calibration batch {number} is {_described(batch)}; a batch is a tensor, or a tuple, list or dict "
                "whose first value is the input tensor"
            )
    if not value.is_floating_point():
        raise CalibrationError(
            f"calibration batch {number} holds {value.dtype}; scale and convert images to float first, as for training"
        )
    return value.to(target.device, target.dtype, non_blocking=True)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put PyTorch's random state back afterwards: even `iter(DataLoader)` draws from it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


class _LastSiteReached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass whose remaining layers nobody asks about."""


class _Recorder:
    """Hooks that take the moments at each site while a model runs, for as long as the context lasts."""

    def __init__(self, network: nn.Module, sites: Sequence[Site]) -> None:
        self._network = network
        self._sites = {site.name: site for site in sites}
        self._parts: dict[str, list[Moments]] = {site.name: [] for site in sites}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._calls_per_pass = sum(site.calls for site in sites)
        self._calls = 0

    def __enter__(self) -> None:
        for site in self._sites.values():
            anchor = self._network.get_submodule(site.anchor)
            self._handles.append(anchor.register_forward_hook(self._hook(site)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, site: Site) -> Callable[[nn.Module, Any, Tensor], None]:
        def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            # Before returning: an in-place activation behind the layer overwrites this tensor.
            moments = moments_of(output)
            if not (moments.mean.isfinite().all() and moments.m2.isfinite().all()):
                raise _NotFiniteError(site.name, _first_bad_row(output), output.dtype)
            parts = self._parts[site.name]
            parts.append(moments)
            if len(parts) >= 64:  # keep memory flat over any number of batches
                parts[:] = [merge(parts)]
            self._calls += 1
            if self._calls % self._calls_per_pass == 0:
                raise _LastSiteReached

        return record

    def moments(self) -> dict[str, Moments]:
        silent = [name for name, parts in self._parts.items() if not parts]
        if silent:
            raise CalibrationError(f"the layer {silent[0]} was never called on the calibration set")
        return {name: merge(parts).cpu() for name, parts in self._parts.items()}


class _NotFiniteError(CalibrationError):
    """Activations that are NaN or Inf; `row` is the first image of the batch that has any."""

    def __init__(self, layer: str, row: int, dtype: torch.dtype) -> None:
        super().__init__(f"the activations of {layer} are not finite in {dtype}")
        self.layer = layer
        self.row = row


def _first_bad_row(output: Tensor) -> int:
    return int(output.flatten(1).isfinite().all(1).int().argmin())


def _cause(model: nn.Module, batch: Any, error: _NotFiniteError) -> str:
    """Say which parameter, or which image, makes the activations of a layer not finite."""
    up_to_layer = list(model.named_parameters())
    own = [number for number, (name, _) in enumerate(up_to_layer) if name.startswith(f"{error.layer}.")]
    for name, parameter in up_to_layer[: own[-1] + 1 if own else None]:
        if not parameter.isfinite().all():
            return f": the parameter {name} holds NaN or Inf; mend the checkpoint, or leave the layers behind it out"
    paths = getattr(batch, "paths", ())
    place = str(paths[error.row]) if error.row < len(paths) else f"image {error.row} of its batch"
    return f", first for {place}; run in float32, or look at that input"


def _channels_last(inputs: Tensor) -> Tensor:
    # On a CPU this alone takes VGG16's forward to 0.78 of its time, and lets moments_of read activations where they
    # lie.
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs


def _described(value: Any) -> str:
    return f"an empty {type(value).__name__}" if hasattr(value, "__len__") and not len(value) else type(value).__name__
