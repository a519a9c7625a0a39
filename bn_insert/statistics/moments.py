"""Count, mean and second central moment of each channel, in float64; sets of moments merge exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

# Values are read several times: in between, slices of this many stay in a CPU's second-level cache.
_VALUES_PER_SLICE = 1 << 18
# The CPU kernel adds float32 values one by one, each time with a rounding error of 6e-8: over this many rows the errors
# add up to less than 1e-5.
_ROWS_PER_GROUP = 128
# A contiguous tensor has the values of a channel of an image side by side. If they are at least this many, reading them
# there is faster than copying them, as each group costs some float64 arithmetic.
_SMALLEST_GROUP_IN_PLACE = 64
# vector_norm reads a row once, where squares would be written and read again. It adds values one by one (in each lane
# of a vector register): for rows of this many, with an error of less than 4e-7 of the sum.
_LONGEST_ROW_FOR_NORM = 4096

# Where |mean| exceeds this many standard deviations, a float32 mean (relative error 6e-8) is too imprecise to take
# deviations from. Mean and std are those of the whole channel, not of one group: in a patch of blue sky, a group's std
# is close to zero, and the errors of the groups' means, relative to their sizes, add up to at most sqrt(mean^2 + var).
_LARGEST_MEAN_IN_STDS = 4.0
# Below this variance, float32 squares are subnormal and lose bits.
_SMALLEST_VARIANCE = 1e-30

# With more images than this, the moments of each are not kept: one image hardly changes those of all.
MOST_BY_IMAGE = 128
# To tell images apart, about so many positions of each are enough; reading all would take as long as the moments.
_POSITIONS_BY_IMAGE = 1024

WITH_FLOAT64 = ("cpu", "cuda")  # device types


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and second central moment of each channel.

    Attributes:
        count: Number of values per channel.
        mean: Mean of each channel.
        m2: Sum of squared deviations from the mean, for each channel.
        standard_error: Standard error of mean and std (the larger of the two), relative to std, for each channel; None
            where `calibrate` could not estimate it.
        by_image: Moments of each image's values, as `adapt_statistics` needs them of a few images; None elsewhere.
    """

    count: int
    mean: Float64[Tensor, " channels"]
    m2: Float64[Tensor, " channels"]
    standard_error: Float64[Tensor, " channels"] | None = None
    by_image: GroupMoments | None = None

    def __repr__(self) -> str:
        """Return the numbers of channels and values: all means and deviations would fill many screens."""
        return f"Moments(channels={self.channels}, count={self.count})"

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)

    @property
    def var(self) -> Float64[Tensor, " channels"]:
        """Unbiased variance (divided by count - 1), as in PyTorch's `running_var`; NaN for a count below 2."""
        return self.m2 / (self.count - 1) if self.count > 1 else torch.full_like(self.m2, torch.nan)

    @property
    def std(self) -> Float64[Tensor, " channels"]:
        """Square root of `var`."""
        return self.var.sqrt()

    @property
    def constant_channels(self) -> int:
        """Number of channels that have the same value throughout, such as dead ones."""
        return int((self.m2 == 0).sum())

    def scaled(self, scale: Float64[Tensor, " channels"]) -> Moments:
        """Return the moments of the same values with each channel multiplied by its `scale`."""
        return Moments(self.count, self.mean * scale, self.m2 * scale.square(), self.standard_error)

    def error_of(self, fraction: float) -> float:
        """Return a bound on the error, relative to std, that is valid for this fraction of the channels.

        The error of a channel is taken as three standard errors.

        Args:
            fraction: Between 0 and 1.

        Returns:
            The bound; NaN where the standard error could not be estimated.
        """
        if self.standard_error is None:
            return float("nan")
        return 3 * float(self.standard_error.quantile(fraction))

    def cpu(self) -> Moments:
        """Return the same moments in host memory."""
        error = None if self.standard_error is None else self.standard_error.cpu()
        by_image = None if self.by_image is None else self.by_image.cpu()
        return Moments(self.count, self.mean.cpu(), self.m2.cpu(), error, by_image)


def merge(parts: Iterable[Moments]) -> Moments:
    """Return the moments of the values of all parts together.

    Exact up to float64 rounding, whatever the sizes of the parts: Chan, Golub, LeVeque, "Updating Formulae and a
    Pairwise Algorithm for Computing Sample Variances", 1979.

    Args:
        parts: Moments of the same channels.

    Raises:
        ValueError: If there are no parts.
    """
    present = list(parts)
    if not present:
        raise ValueError("merge needs at least one set of moments")
    if len(present) == 1:
        return present[0]
    pooled = GroupMoments(
        torch.tensor([part.count for part in present], dtype=torch.float64),
        torch.stack([part.mean for part in present]),
        torch.stack([part.m2 for part in present]),
    ).pooled()
    images = [part.by_image for part in present if part.count]
    known = [each for each in images if each is not None]
    few = 0 < len(known) == len(images) and sum(len(each.means) for each in known) <= MOST_BY_IMAGE
    return replace(pooled, by_image=GroupMoments.concatenated(known) if few else None)


def moments_by_image(values: Float[Tensor, "batch channels *positions"]) -> GroupMoments:
    """Return the moments of each image of a batch, of every k-th position: to tell images apart, not to pool them."""
    positions = values.reshape(*values.shape[:2], -1)
    # Odd, so that a width of 2^n does not leave a single column.
    positions = positions[:, :, :: positions.shape[2] // _POSITIONS_BY_IMAGE | 1]
    if values.dtype != torch.float64:
        positions = positions.float()
    variances, means = torch.var_mean(positions, 2, correction=0)
    return GroupMoments._of_parts([positions.shape[2]], [len(values)], means, variances)


def moments_of(values: Float[Tensor, "batch channels *positions"]) -> Moments:
    """Return the moments of each channel of a tensor, pooled over all other dimensions.

    Compared with float64, the error stays below 1e-5 (of the variance: relative; of the mean: relative to std), also
    where |mean| >> std.

    Args:
        values: Any floating dtype, with the channels in dimension 1. A 2-D or channels_last tensor is read in place,
            and so is a contiguous one with many positions; any other is copied, a few images at a time.
    """
    channels = values.shape[1]
    if values.numel() == 0:
        empty = torch.zeros(channels, dtype=torch.float64)
        return Moments(0, empty, empty.clone())
    if values.dtype == torch.float64:
        return GroupMoments.of(_slices(values), channels, _float64_moments).pooled()
    origin = None
    if values.ndim == 2 and values.is_cpu and len(values) <= _ROWS_PER_GROUP:  # a dense layer and a usual batch
        # Relative to one of the values, no mean is far from 0; for so few values, subtracting it costs little.
        origin = values[0].double()
        mean, variance = (each.double() for each in _kernel_moments(values.float() - values[0].float()))
        pooled = Moments(len(values), mean, variance.mul_(len(values)))
    elif _is_contiguous_by_channel(values):
        pooled = GroupMoments.of_contiguous(values).pooled()
    else:
        pooled = GroupMoments.of(_slices(values), channels, _kernel_moments).pooled()
    numbers = None if _are_precise(pooled) else _is_imprecise(pooled).nonzero().squeeze(1)
    if origin is not None:
        pooled.mean.add_(origin)
    if numbers is not None and len(numbers):
        rows = _rows_of(values, numbers.to(values.device))
        exact = GroupMoments.of(rows, len(numbers), _float64_moments).pooled()
        pooled.mean[numbers], pooled.m2[numbers] = exact.mean, exact.m2
    return pooled


def _are_precise(moments: Moments) -> bool:
    """Cheap test: True guarantees that `_is_imprecise` is False for every channel."""
    smallest = moments.mean.square().mul_(moments.count / _LARGEST_MEAN_IN_STDS**2)
    smallest.clamp_min_(_SMALLEST_VARIANCE * moments.count)
    least, most = (moments.m2 - smallest).aminmax()
    return float(least) >= 0 and float(most) < math.inf


def _is_imprecise(moments: Moments) -> Bool[Tensor, " channels"]:
    """Return for each channel whether float32 is too imprecise: a mean far from 0, tiny values, overflow."""
    near_zero = moments.mean.square() * (moments.count / _LARGEST_MEAN_IN_STDS**2) <= moments.m2
    large = (moments.m2 >= _SMALLEST_VARIANCE * moments.count) & (moments.m2 < math.inf)
    return ~(near_zero & (large | (moments.m2 == 0)))


def _is_contiguous_by_channel(values: Float[Tensor, "batch channels *positions"]) -> bool:
    """Return whether the CPU finds many values of each channel side by side."""
    positions = values[0, 0].numel()
    return values.is_cpu and positions >= _SMALLEST_GROUP_IN_PLACE and values.is_contiguous()


def _slices(values: Float[Tensor, "batch channels *positions"]) -> Iterator[Float[Tensor, "rows columns"]]:
    """Yield all values in slices for the kernel, which computes the moments of each column.

    A column has values of one channel, and channels repeat along a row: rows are laid side by side, as several groups
    of values, until no column has more than _ROWS_PER_GROUP. Devices other than the CPU get all rows at once: their
    kernels add pairwise, and are faster on large inputs.
    """
    channels = values.shape[1]
    channels_last = values.movedim(1, -1)
    # Without a copy where the memory is laid out that way; else a few images are copied at a time.
    if values.ndim == 2 or channels_last.is_contiguous():
        parts: Sequence[Tensor] = [channels_last]
    else:
        parts = channels_last.split(max(1, _VALUES_PER_SLICE // channels_last[0].numel()))
    for part in parts:
        rows = part.reshape(-1, channels)
        if values.device.type != "cpu" or len(rows) <= _ROWS_PER_GROUP:
            yield rows
            continue
        rows_per_group = _rows_per_group(len(rows))
        rows_per_slice = max(1, _VALUES_PER_SLICE // (channels * rows_per_group)) * rows_per_group
        in_full_groups = len(rows) // rows_per_group * rows_per_group
        for each in rows[:in_full_groups].split(rows_per_slice):
            yield each.reshape(rows_per_group, -1)
        if in_full_groups < len(rows):
            yield rows[in_full_groups:]


@lru_cache
def _rows_per_group(rows: int) -> int:
    """Return a number of rows that divides them into equal groups, which merge fastest, if there is a large one."""
    numbers = range(_ROWS_PER_GROUP, _ROWS_PER_GROUP // 2, -1)
    return next((number for number in numbers if rows % number == 0), _ROWS_PER_GROUP)


def _rows_of(
    values: Float[Tensor, "batch channels *positions"], numbers: Int64[Tensor, " selected"]
) -> Iterator[Float[Tensor, "rows selected"]]:
    """Yield the values of some channels in slices, as rows."""
    if _is_contiguous_by_channel(values):  # the other channels need not be copied
        images = max(1, _VALUES_PER_SLICE // (len(numbers) * values[0, 0].numel()))
        for part in values.split(images):
            yield from (each.reshape(-1, len(numbers)) for each in _slices(part.index_select(1, numbers)))
    else:
        yield from (each.reshape(-1, values.shape[1])[:, numbers] for each in _slices(values))


@dataclass(frozen=True, eq=False)
class GroupMoments:
    """Count, mean and second central moment of groups of values of the same channels.

    Attributes:
        counts: Number of values of a channel in each group; one number if all groups have as many.
        means: Mean of each channel in each group.
        m2: Sum of squared deviations from that mean.
    """

    counts: int | Float64[Tensor, " groups"]
    means: Float64[Tensor, "groups channels"]
    m2: Float64[Tensor, "groups channels"]

    @classmethod
    def of(
        cls, slices: Iterable[Tensor], channels: int, column_moments: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> GroupMoments:
        """Return the moments of all groups in the slices, by a function that returns mean and biased variance."""
        parts = [(len(each), *column_moments(each)) for each in slices]
        rows, means, variances = zip(*parts, strict=True)
        groups = [mean.numel() // channels for mean in means]
        return cls._of_parts(rows, groups, *(_joined(each).reshape(-1, channels) for each in (means, variances)))

    @classmethod
    def of_contiguous(cls, values: Float[Tensor, "batch channels *positions"]) -> GroupMoments:
        """Return the moments of each channel of each image of a contiguous tensor."""
        rows = values.flatten(0, 1).flatten(1)
        rows_per_slice = max(1, _VALUES_PER_SLICE // rows.shape[1])
        means, variances = zip(*(_row_moments(each) for each in rows.split(rows_per_slice)), strict=True)
        parts = (_joined(each).reshape(values.shape[:2]) for each in (means, variances))
        return cls._of_parts([rows.shape[1]], [len(values)], *parts)

    @classmethod
    def _of_parts(cls, counts: Sequence[int], groups: Sequence[int], means: Tensor, variances: Tensor) -> GroupMoments:
        """Return the moments of consecutive groups, of which `groups[i]` have `counts[i]` values each."""
        device = means.device if means.device.type in WITH_FLOAT64 else torch.device("cpu")
        mean, variance = (each.to(device, torch.float64) for each in (means, variances))
        if len(set(counts)) == 1:
            return cls(counts[0], mean, variance * counts[0])
        count = torch.tensor(counts, dtype=torch.float64).repeat_interleave(torch.tensor(groups))
        return cls(count, mean, variance * count.to(device)[:, None])

    def pooled(self) -> Moments:
        """Return the moments of all groups together."""
        if len(self.means) == 1:
            return Moments(int(self.counts), self.means[0], self.m2[0])
        origin = self.means[0]  # subtracted first, so that equal means pool to exactly that mean
        deviations = self.means - origin
        counts: int | Tensor
        if isinstance(self.counts, int):
            counts, total = self.counts, self.counts * len(self.means)
            shift = deviations.mean(0)
        else:
            counts, total = self.counts.to(self.means.device)[:, None], int(self.counts.sum())
            shift = (counts * deviations).sum(0) / total
        between_groups = deviations.sub_(shift).square_().mul_(counts).sum(0)
        return Moments(total, origin + shift, self.m2.sum(0) + between_groups)

    @classmethod
    def concatenated(cls, parts: Sequence[GroupMoments]) -> GroupMoments:
        """Return the groups of all parts, one after the other."""
        counts, means, m2 = zip(*((part.counts_of_each, part.means, part.m2) for part in parts), strict=True)
        return cls(torch.cat(counts), torch.cat(means), torch.cat(m2))

    def cpu(self) -> GroupMoments:
        """Return the same moments in host memory."""
        return GroupMoments(self.counts_of_each.cpu(), self.means.cpu(), self.m2.cpu())

    @property
    def variances(self) -> Float64[Tensor, "groups channels"]:
        """Mean squared deviation from the mean of each channel in each group."""
        return self.m2 / self.counts_of_each[:, None]

    def without_each(self) -> GroupMoments:
        """Return, for each of several groups, the moments of all others together: a merge, solved for one part."""
        total = self.pooled()
        counts = self.counts_of_each[:, None]
        others = total.count - counts
        deviations = self.means - total.mean
        m2 = total.m2 - self.m2 - deviations.square() * counts * total.count / others
        return GroupMoments(others.squeeze(1), total.mean - deviations * counts / others, m2.clamp_min(0))

    @property
    def counts_of_each(self) -> Float64[Tensor, " groups"]:
        """Number of values of a channel, for each group."""
        counts = torch.as_tensor(self.counts, dtype=torch.float64)
        return counts.to(self.means.device).expand(len(self.means))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _row_moments(rows: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each row, by sums in float32.

    The rows are read twice and deviations never written, which takes half the time. The rounding errors of the squares
    are relative to mean^2 + var, and add up to that over all groups as well.
    """
    values = rows.float()
    mean = values.mean(1).double()
    if rows.shape[1] <= _LONGEST_ROW_FOR_NORM:
        squares = torch.linalg.vector_norm(values, dim=1).double().square_()
    else:
        squares = values.square().sum(1).double()  # added pairwise
    return mean, squares.div_(rows.shape[1]).sub_(mean.square())


def _kernel_moments(rows: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each column in float32.

    Computed by the kernel of BatchNorm's training forward, the fastest in PyTorch.
    """
    return torch.batch_norm_update_stats(rows.float(), None, None, 0.1)


def _float64_moments(rows: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each column in float64.

    Computed relative to the first row, so that constant columns come out exact.
    """
    exact = rows.to(rows.device if rows.device.type in WITH_FLOAT64 else "cpu", torch.float64)
    deviations = exact - exact[0]
    mean = deviations.mean(0)
    variance = deviations.sub_(mean).square_().mean(0)  # var_mean takes ten times as long along this dimension
    return exact[0] + mean, variance
