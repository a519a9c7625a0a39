"""What the tests compare against: float64, the whole set at once, written in the plainest way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bn_insert import Moments


def by_channel(values: Tensor) -> Tensor:
    """Return one float64 row per position and image, one column per channel (dimension 1)."""
    return values.double().movedim(1, -1).reshape(-1, values.shape[1])


def mean_and_var(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance of each channel over all images and positions."""
    rows = by_channel(values)
    mean = rows.sum(0) / len(rows)
    return mean, ((rows - mean) ** 2).sum(0) / (len(rows) - 1)


def assert_moments(moments: Moments, values: Tensor, tolerance: float = 1e-5) -> None:
    """Check the mean relative to std and the variance relative to itself; a constant channel leaves no room at all."""
    mean, var = mean_and_var(values)
    constant = (by_channel(values) == by_channel(values)[0]).all(0)
    assert moments.count == len(by_channel(values))
    assert moments.mean.dtype == moments.m2.dtype == torch.float64
    assert torch.equal(moments.mean[constant], by_channel(values)[0][constant])
    assert torch.equal(moments.m2[constant], torch.zeros_like(moments.m2[constant]))
    mean_error = ((moments.mean - mean).abs() / var.sqrt())[~constant]
    var_error = ((moments.var - var).abs() / var)[~constant]
    assert (mean_error <= tolerance).all(), float(mean_error.max())
    assert (var_error <= tolerance).all(), float(var_error.max())


def activations(model: nn.Module, names: Sequence[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what the named modules put out over all batches and calls, cloned before anything overwrites it."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: found[name].append(output.detach().clone())
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}
