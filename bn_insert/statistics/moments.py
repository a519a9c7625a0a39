"""Count, mean and second central moment per channel, in float64; two sets of moments merge exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Values per call of the kernel, which reads them twice: on a CPU they stay in the second-level cache meanwhile.
_VALUES_PER_CALL = 1 << 18
# The CPU kernel adds up float32 values one by one, each with a rounding error of 6e-8: so many stay below 1e-5.
_LONGEST_SUM = 128

# Where |mean| exceeds this many standard deviations, a float32 mean (6e-8 relative) is too coarse a ruler for the std.
# Those of the whole channel, not of one group: in a patch of blue sky a group's are next to nothing, and the errors of
# groups' means, relative to their sizes, add up to no more than sqrt(mean^2 + var).
_COARSE_RATIO = 6.0
# Below it, float32 squares are subnormal and lose bits.
_SMALLEST_VARIANCE = 1e-30


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and second central moment (sum of squared deviations) of each channel.

    count: number of values per channel. mean, m2: float64, one entry a channel. standard_error: where `calibrate` could
    estimate it, that of mean and std (the larger), relative to std.
    """

    count: int
    mean: Float64[Tensor, " channels"]
    m2: Float64[Tensor, " channels"]
    standard_error: Float64[Tensor, " channels"] | None = None

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
        return Moments(self.count, self.mean * scale, self.m2 * scale.square(), self.standard_error)

    def error_of(self, fraction: float) -> float:
        """Return what this fraction of the channels stay below in error, relative to std: three standard errors.

        nan where no standard error could be estimated.
        """
        if self.standard_error is None:
            return float("nan")
        return 3 * float(self.standard_error.quantile(fraction))

    def cpu(self) -> Moments:
        """Return the same moments in host memory."""
        error = None if self.standard_error is None else self.standard_error.cpu()
        return Moments(self.count, self.mean.cpu(), self.m2.cpu(), error)


def merge(parts: Iterable[Moments]) -> Moments:
    """Return the moments of all values together.

    Exact but for float64 rounding, whatever the sizes of the parts: Chan, Golub, LeVeque, "Updating Formulae and a
    Pairwise Algorithm for Computing Sample Variances", 1979. Raises ValueError when there is no part.
    """
    present = list(parts)
    if not present:
        raise ValueError("merge needs at least one set of moments")
    counts = torch.tensor([part.count for part in present], dtype=torch.float64)
    return _pool(
        counts, torch.stack([part.mean for part in present]), torch.stack([part.m2 for part in present]).sum(0)
    )


def moments_of(values: Float[Tensor, "batch channels *positions"]) -> Moments:
    """Return the moments of each channel (dimension 1) of a tensor, pooled over all other dimensions.

    values: any floating dtype.  A channels_last tensor (or a 2-D one) is read where it lies, others are copied a few
    images at a time.  The error against float64 stays below 1e-5 (variance: relative; mean: relative to
    std), also where |mean| >> std.
    """
    channels = values.shape[1]
    if values.numel() == 0:
        empty = torch.zeros(channels, dtype=torch.float64)
        return Moments(0, empty, empty.clone())
    parts = list(_parts(values))
    if values.dtype == torch.float64:
        return _pooled(parts, *_stacked(parts, _double_moments, channels))
    means, variances = _stacked(parts, _kernel_moments, channels)
    pooled = _pooled(parts, means, variances)
    tiny = (pooled.m2 > 0) & (pooled.m2 < _SMALLEST_VARIANCE * pooled.count)
    coarse = ~((pooled.mean.square() * pooled.count <= _COARSE_RATIO**2 * pooled.m2) & pooled.m2.isfinite()) | tiny
    if coarse.any():
        columns = coarse.nonzero().squeeze(1)
        there = columns.to(values.device)
        rows = [part.reshape(-1, channels)[:, there] for part in parts]
        exact = _pooled(rows, *_stacked(rows, _double_moments, len(columns)))
        pooled.mean[columns], pooled.m2[columns] = exact.mean, exact.m2
    return pooled


def _parts(values: Tensor) -> Iterator[Float[Tensor, "rows columns"]]:
    """Yield all values as parts whose columns are the channels, maybe several times over.

    On a CPU, rows are laid side by side until a column has no more than _LONGEST_SUM of them.
    """
    channels = values.shape[1]
    last = values.movedim(1, -1)
    values_per_image = last[0].numel()
    # What lies in memory that way is only looked at; else images are copied, a few at a time.
    pieces = [last] if last.is_contiguous() else last.split(max(1, _VALUES_PER_CALL // values_per_image))
    rows_per_call = max(1, _VALUES_PER_CALL // (channels * _LONGEST_SUM)) * _LONGEST_SUM
    for piece in pieces:
        rows = piece.reshape(-1, channels)
        if values.device.type != "cpu":  # other kernels add pairwise, and want large launches
            yield rows
            continue
        whole = len(rows) // _LONGEST_SUM * _LONGEST_SUM
        for start in range(0, whole, rows_per_call):
            yield rows[start : min(start + rows_per_call, whole)].reshape(_LONGEST_SUM, -1)
        if whole < len(rows):
            yield rows[whole:]


def _stacked(
    parts: Sequence[Tensor], moments: Callable[[Tensor], tuple[Tensor, Tensor]], channels: int
) -> tuple[Float[Tensor, "groups channels"], Float[Tensor, "groups channels"]]:
    """Return means and biased variances of groups of values, one row a group; a part is one group or several."""
    means, variances = zip(*(moments(rows) for rows in parts), strict=True)
    return torch.cat(means).reshape(-1, channels), torch.cat(variances).reshape(-1, channels)


def _pooled(parts: Sequence[Tensor], means: Tensor, variances: Tensor) -> Moments:
    channels = means.shape[1]
    device = means.device if means.device.type in ("cpu", "cuda") else torch.device("cpu")  # others lack float64
    counts = torch.tensor([len(rows) for rows in parts], dtype=torch.float64, device=device)
    groups = torch.tensor([rows.shape[1] // channels for rows in parts], device=device)
    weights = counts.repeat_interleave(groups)
    within = variances.to(device, torch.float64).mul_(weights[:, None]).sum(0)
    return _pool(weights, means.to(device, torch.float64), within)


def _pool(counts: Tensor, means: Tensor, within: Tensor) -> Moments:
    """Return the moments of groups of values together; within: the sum of the groups' second central moments."""
    weights = counts.to(means.device)[:, None]
    total = weights.sum()
    origin = means[0]  # relative to it equal means give exactly that mean
    deviations = means - origin
    shift = (weights * deviations).sum(0) / total
    m2 = within + deviations.sub_(shift).square_().mul_(weights).sum(0)
    return Moments(int(total), origin + shift, m2)


def _kernel_moments(rows: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each column, float32.

    By the kernel of BatchNorm's own training forward, the fastest that PyTorch has.
    """
    return torch.batch_norm_update_stats(rows.float(), None, None, 0.1)


def _double_moments(rows: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each column, float64, relative to the first row: constants come out exact."""
    exact = rows.to("cpu" if rows.device.type not in ("cpu", "cuda") else rows.device, torch.float64)
    var, mean = torch.var_mean(exact - exact[0], 0, correction=0)
    return exact[0] + mean, var
