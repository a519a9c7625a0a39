"""Count, mean and second central moment per channel, in float64; two sets of moments merge exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Values per slice. On a CPU a slice stays in the second-level cache between the kernel's two passes over it, and the
# float32 sums inside the kernel stay short enough to be accurate. A GPU's kernel adds pairwise and wants large
# launches.
_SLICE = {"cpu": 1 << 18}
_SLICE_ELSEWHERE = 1 << 28

# Where |mean| exceeds this many standard deviations, a float32 mean (6e-8 relative) is too coarse a ruler for the std.
_COARSE_RATIO = 8.0


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and second central moment (sum of squared deviations) of each channel.

    count: number of values per channel.  mean, m2: float64, one entry a channel.
    """

    count: int
    mean: Float64[Tensor, " channels"]
    m2: Float64[Tensor, " channels"]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)

    @property
    def var(self) -> Float64[Tensor, " channels"]:
        """Unbiased variance (divided by count - 1), as PyTorch keeps it in `running_var`; nan for a count below 2."""
        return self.m2 / (self.count - 1) if self.count > 1 else torch.full_like(self.m2, torch.nan)

    @property
    def std(self) -> Float64[Tensor, " channels"]:
        """Square root of `var`."""
        return self.var.sqrt()

    @property
    def constant_channels(self) -> int:
        """Number of channels that had one and the same value throughout (dead ones, for instance)."""
        return int((self.m2 == 0).sum())

    def scaled(self, scale: Float64[Tensor, " channels"]) -> Moments:
        """Return the moments of the same values multiplied by `scale`, channel by channel."""
        return Moments(self.count, self.mean * scale, self.m2 * scale.square())

    def cpu(self) -> Moments:
        """Return the same moments in host memory."""
        return Moments(self.count, self.mean.cpu(), self.m2.cpu())


def merge(parts: Iterable[Moments]) -> Moments:
    """Return the moments of all values together.

    Exact but for float64 rounding, whatever the sizes of the parts: Chan, Golub, LeVeque, "Updating Formulae and a
    Pairwise Algorithm for Computing Sample Variances", 1979. Raises ValueError when there is no part.
    """
    present = list(parts)
    if not present:
        raise ValueError("merge needs at least one set of moments")
    counts = torch.tensor([part.count for part in present], dtype=torch.float64)
    return _pool(counts, torch.stack([part.mean for part in present]), torch.stack([part.m2 for part in present]))


def moments_of(values: Float[Tensor, "batch channels *positions"]) -> Moments:
    """Return the moments of each channel (dimension 1) of a tensor, pooled over all other dimensions.

    values: any floating dtype.  A channels_last tensor (or a 2-D one) is read where it lies, others are copied slice by
    slice.  The relative error against float64 stays below 1e-5 (mean: relative to std), also where |mean| >> std.
    """
    channels = values.shape[1]
    rows_per_image = values[0, 0].numel() if len(values) else 0
    if rows_per_image == 0 or channels == 0:
        empty = torch.zeros(channels, dtype=torch.float64)
        return Moments(0, empty, empty.clone())
    slices = list(_slices(values, channels * rows_per_image))
    counts = torch.tensor([len(rows) for rows in slices], dtype=torch.float64)
    if values.dtype == torch.float64:
        return _pool(counts, *_stacked(_double_moments, slices))
    means, m2s = _stacked(_kernel_moments, slices)
    coarse = (means.square() * counts.to(means.device)[:, None] > _COARSE_RATIO**2 * m2s).any(0)
    if coarse.any():
        columns = coarse.nonzero().squeeze(1)
        found = _stacked(_double_moments, [rows[:, columns.to(rows.device)] for rows in slices])
        means[:, columns], m2s[:, columns] = found
    return _pool(counts, means, m2s)


def _slices(values: Tensor, values_per_image: int) -> Iterator[Float[Tensor, "rows channels"]]:
    channels = values.shape[1]
    size = _SLICE.get(values.device.type, _SLICE_ELSEWHERE)
    for images in values.split(max(1, size // values_per_image)):
        yield from images.movedim(1, -1).reshape(-1, channels).split(max(1, size // channels))


def _stacked(
    moments: Callable[[Tensor], tuple[Tensor, Tensor]], slices: Sequence[Tensor]
) -> tuple[Float64[Tensor, "slices channels"], Float64[Tensor, "slices channels"]]:
    """Return means and second central moments, one row a slice."""
    found = [moments(rows) for rows in slices]
    means, variances = (torch.stack(column) for column in zip(*found, strict=True))
    device = means.device if means.device.type in ("cpu", "cuda") else torch.device("cpu")  # others lack float64
    counts = torch.tensor([len(rows) for rows in slices], dtype=torch.float64, device=device)
    return means.to(device, torch.float64), variances.to(device, torch.float64) * counts[:, None]


def _pool(counts: Tensor, means: Tensor, m2s: Tensor) -> Moments:
    weights = counts.to(means.device)[:, None]
    total = weights.sum()
    mean = (weights * means).sum(0) / total
    m2 = m2s.sum(0) + (weights * (means - mean).square()).sum(0)
    return Moments(int(total), mean, m2)


def _kernel_moments(rows: Float[Tensor, "rows channels"]) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each column, float32.

    By the kernel of BatchNorm's own training forward, the fastest that PyTorch has.
    """
    return torch.batch_norm_update_stats(rows.float(), None, None, 0.1)


def _double_moments(rows: Float[Tensor, "rows channels"]) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each column, float64."""
    var, mean = torch.var_mean(rows.double(), 0, correction=0)
    return mean, var
