"""The plain forward loop, our calibration, and how other tools take the statistics of a network's layers.

Each method takes a network in eval mode, the names of the layers to measure, and a list of batches on the network's
device, and gives mean and variance per layer (the loops give none).  What other tools do is written down from their
descriptions; see the README's list of them for what else they get wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from bn_insert import Site, calibrate, find_sites

Statistics = dict[str, tuple[Tensor, Tensor]]
Batches = list[Tensor]
Method = Callable[[nn.Module, list[str], Batches, "torch.dtype | None"], Statistics]


def _forward(network: nn.Module, batches: Iterable[Tensor], autocast: torch.dtype | None) -> None:
    device = next(network.parameters()).device.type
    with torch.inference_mode(), torch.autocast(device, autocast) if autocast else nullcontext():
        for images in batches:
            network(images)


def plain(network: nn.Module, _layers: list[str], batches: Batches, autocast: torch.dtype | None) -> Statistics:
    """Forward and nothing else, as a network comes from its checkpoint."""
    _forward(network, batches, autocast)
    return {}


def plain_channels_last(
    network: nn.Module, _layers: list[str], batches: Batches, autocast: torch.dtype | None
) -> Statistics:
    """Forward and nothing else, weights and images in channels_last."""
    network.to(memory_format=torch.channels_last)
    _forward(network, (images.contiguous(memory_format=torch.channels_last) for images in batches), autocast)
    return {}


def read_once(network: nn.Module, layers: list[str], batches: Batches, autocast: torch.dtype | None) -> Statistics:
    """Forward, with a hook behind each layer that adds up the values of each channel and keeps nothing."""

    def add_up(_name: str, values: Tensor) -> None:
        values.sum(_dims(values))

    with _hooks(network, layers, add_up):
        _forward(network, batches, autocast)
    return {}


def ours(network: nn.Module, layers: list[str], batches: Batches, autocast: torch.dtype | None) -> Statistics:
    """`calibrate`, as `insert_batchnorm` calls it."""
    sites = _sites(network, tuple(batches[0].shape[1:]))
    if [site.name for site in sites] != layers:
        raise ValueError(f"the sites are not the layers that the other methods measure: {sites}")
    moments = calibrate(network, sites, batches, autocast=autocast)
    return {name: (found.mean, found.var) for name, found in moments.items()}


@lru_cache(maxsize=1)
def _sites(network: nn.Module, shape: tuple[int, ...]) -> list[Site]:
    """Looked for once: that takes as long for one image as for thousands."""
    return find_sites(network, torch.zeros(1, *shape))


@contextmanager
def _hooks(network: nn.Module, layers: list[str], hook: Callable[[str, Tensor], None]) -> Iterator[None]:
    with ExitStack() as stack:
        for name in layers:
            module = network.get_submodule(name)
            stack.callback(
                module.register_forward_hook(lambda _module, _inputs, output, name=name: hook(name, output)).remove
            )
        yield


def _dims(values: Tensor) -> list[int]:
    return [dim for dim in range(values.ndim) if dim != 1]


def two_passes_over_the_images(
    network: nn.Module, layers: list[str], batches: Batches, autocast: torch.dtype | None
) -> Statistics:
    """First the mean of every layer, then, in a second pass of the network, its mean squared deviation."""
    counts: defaultdict[str, int] = defaultdict(int)
    means: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def take_sum(name: str, values: Tensor) -> None:
        counts[name] += values.numel() // values.shape[1]
        means[name] = means.get(name, 0) + values.float().sum(_dims(values))

    def take_squares(name: str, values: Tensor) -> None:
        shape = [1, -1] + [1] * (values.ndim - 2)
        squares[name] = squares.get(name, 0) + (values.float() - means[name].view(shape)).square().sum(_dims(values))

    with _hooks(network, layers, take_sum):
        _forward(network, batches, autocast)
    for name in layers:
        means[name] = means[name] / counts[name]
    with _hooks(network, layers, take_squares):
        _forward(network, batches, autocast)
    return {name: (means[name], squares[name] / (counts[name] - 1)) for name in layers}


def squared_deviations(
    network: nn.Module, layers: list[str], batches: Batches, autocast: torch.dtype | None
) -> Statistics:
    """In a hook, the batch's mean and then its mean squared deviation; batches averaged."""
    return _averaged(network, layers, batches, autocast, _mean_and_squared_deviation)


def var_mean(network: nn.Module, layers: list[str], batches: Batches, autocast: torch.dtype | None) -> Statistics:
    """`torch.var_mean` in a hook; batches averaged."""
    return _averaged(network, layers, batches, autocast, lambda values: torch.var_mean(values, _dims(values))[::-1])


def _mean_and_squared_deviation(values: Tensor) -> tuple[Tensor, Tensor]:
    dims = _dims(values)
    mean = values.mean(dims, keepdim=True)
    return mean.flatten(), (values - mean).square().mean(dims)


def _averaged(
    network: nn.Module,
    layers: list[str],
    batches: Batches,
    autocast: torch.dtype | None,
    take: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Statistics:
    taken: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    with _hooks(network, layers, lambda name, values: taken[name].append(take(values.float()))):
        _forward(network, batches, autocast)
    return {
        name: (torch.stack([mean for mean, _ in of_layer]).mean(0), torch.stack([var for _, var in of_layer]).mean(0))
        for name, of_layer in taken.items()
    }


def batchnorm_beside(
    network: nn.Module,
    layers: list[str],
    batches: Batches,
    autocast: torch.dtype | None,
    *,
    momentum: float | None = 0.1,
) -> Statistics:
    """A BatchNorm in train mode that reads each layer's output; momentum 0.1, or None for the cumulative average."""
    norms: dict[str, nn.BatchNorm1d | nn.BatchNorm2d] = {}

    def read(name: str, values: Tensor) -> None:
        if name not in norms:
            kind = nn.BatchNorm1d if values.ndim == 2 else nn.BatchNorm2d
            norms[name] = kind(values.shape[1], momentum=momentum, device=values.device)
        norms[name](values.float())

    with _hooks(network, layers, read):
        _forward(network, batches, autocast)
    return {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}  # type: ignore[misc]


def kept_in_memory(network: nn.Module, layers: list[str], batches: Batches, autocast: torch.dtype | None) -> Statistics:
    """Every activation is kept, mean and variance are taken at the end."""
    kept: defaultdict[str, list[Tensor]] = defaultdict(list)
    with _hooks(network, layers, lambda name, values: kept[name].append(values.float().clone())):
        _forward(network, batches, autocast)
    return {name: _mean_and_variance(torch.cat(kept.pop(name))) for name in layers}


def _mean_and_variance(values: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(values, _dims(values))
    return mean, var


METHODS: dict[str, Method] = {
    "plain loop": plain,
    "plain loop, channels_last": plain_channels_last,
    "bn-insert": ours,
    "squared deviations in a hook": squared_deviations,
    "torch.var_mean in a hook": var_mean,
    "BatchNorm in train mode next to each layer": batchnorm_beside,
    "BatchNorm, cumulative average": partial(batchnorm_beside, momentum=None),
    "activations kept in memory": kept_in_memory,
    "two passes over the images": two_passes_over_the_images,
}
OTHER_TOOLS = tuple(METHODS)[3:]


def reference(
    network: nn.Module, layers: list[str], batches: Batches, memory_format: torch.memory_format
) -> Statistics:
    """Return mean and unbiased variance of all values together, the network's float32 activations summed in float64.

    memory_format: that of the forward, since convs of another round otherwise.
    """
    network = network.to(memory_format=memory_format)  # type: ignore[call-overload]
    kept: defaultdict[str, list[Tensor]] = defaultdict(list)
    sums: Statistics = {}

    def add(name: str, values: Tensor) -> None:
        exact = values.double().movedim(1, 0).flatten(1)
        kept[name].append(torch.stack([exact.mean(1), exact.var(1, correction=0)]))
        counts[name].append(exact.shape[1])

    counts: defaultdict[str, list[int]] = defaultdict(list)
    with _hooks(network, layers, add):
        _forward(network, [images.contiguous(memory_format=memory_format) for images in batches], None)
    for name in layers:
        weights = torch.tensor(counts[name], dtype=torch.float64, device=kept[name][0].device)[:, None]
        means, variances = torch.stack(kept[name]).unbind(1)
        mean = (weights * means).sum(0) / weights.sum()
        squares = (weights * (variances + (means - mean).square())).sum(0)
        sums[name] = (mean, squares / (weights.sum() - 1))
    return sums


def error(found: Statistics, truth: Statistics) -> float:
    """Return the largest error of a mean (relative to std) or a variance (relative), over channels and layers."""
    largest = 0.0
    for name, (mean, var) in truth.items():
        mean_error = ((found[name][0].double() - mean).abs() / var.sqrt()).max()
        var_error = ((found[name][1].double() - var).abs() / var).max()
        largest = max(largest, float(mean_error), float(var_error))
    return largest
