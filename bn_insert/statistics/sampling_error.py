"""How exactly a sample of batches tells the statistics of all images: standard errors, estimated between batches."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from .moments import Moments


def batch_spread(moments: Moments) -> Moments:
    """Return one batch's share in the spread of batches, from the moments of its values.

    Merged over batches these are moments over batches (count: their number) of three numbers a channel: mean m, mean
    square e, and m + e. The values within a batch, pixels of one image above all, are not independent, so how far
    batches are apart is the only honest measure. The third number is there for the covariance of the first two:
    2 cov(m, e) = var(m + e) - var(m) - var(e).
    """
    square = moments.m2 / moments.count + moments.mean.square()
    numbers = torch.cat([moments.mean, square, moments.mean + square])
    return Moments(1, numbers, torch.zeros_like(numbers))


def relative_standard_error(moments: Moments, spread: Moments) -> Float64[Tensor, " channels"] | None:
    """Return the standard error of each channel's mean and std (the larger of both), relative to its std.

    None for fewer than two batches; 0 for constant channels. With K batches, m_k and v_k the mean and the mean squared
    deviation (from the pooled mean) of batch k: se(mean)^2 = var(m_k) / K, se(var)^2 = var(v_k) / K, and
    se(std) = se(var) / (2 std): the standard error of a mean of clusters, and the delta method (Cochran, "Sampling
    Techniques", 1977, chapter 9).
    """
    batches = spread.count
    if batches < 2:
        return None
    var_mean, var_square, var_sum = (spread.m2 / (batches - 1)).reshape(3, -1)
    covariance = (var_sum - var_mean - var_square) / 2
    # v_k = e_k - 2 mean m_k + mean^2; rounding can take a variance that is zero below it.
    var_of_var = (var_square + 4 * moments.mean.square() * var_mean - 4 * moments.mean * covariance).clamp_min(0)
    variance = moments.m2 / moments.count
    of_mean = (var_mean / batches / variance).sqrt()
    of_std = (var_of_var / batches).sqrt() / (2 * variance)
    return torch.where(variance > 0, torch.maximum(of_mean, of_std), 0.0)
