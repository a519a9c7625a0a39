"""Sampling error of the statistics, estimated from the spread between batches or between images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .moments import GroupMoments, Moments, moments_by_image


def batch_spread(passes: Sequence[tuple[Moments, int]]) -> Moments:
    """Return what forward passes contribute to the spread between batches.

    For each channel of a batch there are three numbers: mean m, mean square e, and m + e. Values within a batch, above
    all the pixels of one image, are not independent, so that only the spread between batches measures the error. The
    third number yields the covariance of the other two: 2 cov(m, e) = var(m + e) - var(m) - var(e).

    Args:
        passes: For each pass, the moments of all its values, and the number of its batches. A mean over several batches
            counts as often as there are, and varies less accordingly.

    Returns:
        Moments of the three numbers over all batches, one after the other.
    """
    counts = torch.tensor([moments.count for moments, _ in passes], dtype=torch.float64)
    mean = torch.stack([moments.mean for moments, _ in passes])
    square = torch.stack([moments.m2 for moments, _ in passes]) / counts.to(mean.device)[:, None] + mean.square()
    return _spread(mean, square, torch.tensor([batches for _, batches in passes], dtype=torch.float64))


def image_spread(values: Float[Tensor, "batch channels *positions"]) -> Moments:
    """Return what `batch_spread` returns for batches of one image each, whose order then does not matter."""
    images = moments_by_image(values)
    return _spread(images.means, images.variances + images.means.square(), 1)


def _spread(
    mean: Float64[Tensor, "groups channels"],
    square: Float64[Tensor, "groups channels"],
    batches: int | Float64[Tensor, " groups"],
) -> Moments:
    numbers = torch.cat([mean, square, mean + square], 1)
    return GroupMoments(batches, numbers, torch.zeros_like(numbers)).pooled()


def relative_standard_error(moments: Moments, spread: Moments, passes: int) -> Float64[Tensor, " channels"] | None:
    """Return the standard error of each channel's mean and std (the larger of the two), relative to its std.

    For K batches of equal size, let m_k be the mean of batch k, and v_k its mean squared deviation from the pooled
    mean. Then se(mean)^2 = var(m_k) / K, se(var)^2 = var(v_k) / K, and se(std) = se(var) / (2 std): the standard error
    of a mean of clusters, and the delta method (Cochran, "Sampling Techniques", 1977, chapter 9).

    Args:
        moments: Of all values.
        spread: `batch_spread` of all passes, merged.
        passes: Their number. The mean over the batches of a pass varies less than that of one batch, and counts more:
            each pass but one is expected to contribute the variance of one batch to the sum of squares.

    Returns:
        The standard errors, 0 for constant channels; None for fewer than two passes.
    """
    batches = spread.count
    if passes < 2:
        return None
    var_mean, var_square, var_sum = (spread.m2 / (passes - 1)).reshape(3, -1)
    covariance = (var_sum - var_mean - var_square) / 2
    # v_k = e_k - 2 mean m_k + mean^2; rounding can make a variance of zero negative.
    var_of_var = (var_square + 4 * moments.mean.square() * var_mean - 4 * moments.mean * covariance).clamp_min(0)
    variance = moments.m2 / moments.count
    of_mean = (var_mean / batches / variance).sqrt()
    of_std = (var_of_var / batches).sqrt() / (2 * variance)
    return torch.where(variance > 0, torch.maximum(of_mean, of_std), 0.0)
