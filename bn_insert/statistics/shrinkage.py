"""Statistics of a few images, moved towards those of many others as far as they may differ by chance."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .moments import GroupMoments

# Of two variances of one channel: a channel that is constant on the few images need not be so on others.
_SMALLEST_RATIO = 1e-6
# Fewer do not show how much images differ.
_FEWEST_IMAGES = 8
# How steeply the part of a shift that is taken grows where the shift exceeds chance.
POWER = 4


@dataclass(frozen=True, eq=False)
class Prior:
    """Statistics that are known already, of the inputs of one BatchNorm.

    Attributes:
        mean: Mean of each channel.
        var: Variance of each channel.
        image_variance: Variance, between images, of the mean and the standard deviation of one image (the larger of the
            two), for each channel and relative to `var`.
        images: Number of images that mean and variance were measured on; infinite where they count as exact.
    """

    mean: Float[Tensor, " channels"]
    var: Float[Tensor, " channels"]
    image_variance: Float64[Tensor, " channels"]
    images: int | float

    @classmethod
    def of(
        cls,
        mean: Float[Tensor, " channels"],
        var: Float[Tensor, " channels"],
        *,
        standard_error: Float64[Tensor, " channels"] | None = None,
        images: int | float = inf,
    ) -> Prior:
        """Return a prior whose variance between images follows from the standard error of its statistics.

        Args:
            mean: Mean of each channel.
            var: Variance of each channel.
            standard_error: As in `Moments`. Where it is None, or of fewer than 8 images, the variance between images is
                taken as 1, which that of the images' means cannot exceed.
            images: As in the attributes.
        """
        if standard_error is None or images < _FEWEST_IMAGES:
            return cls(mean, var, torch.ones(len(mean), dtype=torch.float64), images)
        return cls(mean, var, standard_error.square() * images, images)

    def shrunk(
        self,
        mean: Float64[Tensor, " channels"],
        var: Float64[Tensor, " channels"],
        images: int,
        by_image: GroupMoments | None = None,
    ) -> tuple[Float64[Tensor, " channels"], Float64[Tensor, " channels"]]:
        """Return mean and variance moved towards the prior, by as much as they may differ from it by chance.

        Means and logarithms of standard deviations are each moved by one factor for the whole layer. Let D be the sum,
        over the channels, of the squared differences from the prior (those of the means in units of its standard
        deviations), and E the value expected of D for images like those of the prior. The difference is multiplied by
        1 - ((c E + S) / D)^POWER, but at least by 0; c is that of `caution`, and S the value expected of D for the
        sampling error of the prior.

        D is the smallest that is left when any one of the images is left out: a single outlier, which can make it
        ten times its expectation, is not a shift.

        Args:
            mean: Mean of each channel, measured on a few images.
            var: Variance of each channel, measured on them.
            images: Number of these images, at least 1.
            by_image: Moments of each image. Where they are None, or not those of as many images, D is that of all
                images together.

        Sources: with POWER 1, the positive-part James-Stein estimator; Efron and Morris, "Stein's Estimation Rule and
        Its Competitors - An Empirical Bayes Approach", 1973; with a threshold for blocks of values, Cai, "Adaptive
        Wavelet Estimation: A Block Thresholding and Oracle Inequality Approach", 1999. A higher power has the same
        threshold and takes more of what exceeds it.
        """
        known_mean, known_var = (tensor.to(mean) for tensor in (self.mean, self.var))
        varying = known_var > 0  # where the prior is constant, nothing differs by chance
        means, variances = mean[None], var[None]
        # Rows need not be images: a layer that is called several times has more of them.
        others = None
        if by_image is not None and 1 < images == len(by_image.means):
            others = by_image.without_each()
        spread = float(self.image_variance.to(mean)[varying].sum())
        by_chance = spread * (caution(images, leave_one_out=others is not None) / images + 1 / self.images)
        if others is not None:
            means = torch.cat([means, others.means])
            # One or two values, after a dense layer, do not show any difference of variances.
            shown = others.counts_of_each[:, None] > 2
            variances = torch.cat([variances, torch.where(shown, others.variances, known_var)])
        of_mean = _factor(((means - known_mean) / known_var.sqrt())[:, varying], by_chance)
        ratios = (variances / known_var)[:, varying].clamp(min=_SMALLEST_RATIO)
        of_std = _factor(ratios.log() / 2, by_chance)
        new_var = var.clone()
        new_var[varying] = known_var[varying] * ratios[0] ** of_std
        return torch.where(varying, known_mean + of_mean * (mean - known_mean), mean), new_var


def caution(images: int, *, leave_one_out: bool) -> float:
    """Return by how much a difference has to exceed what is expected by chance before any of it is taken.

    The channels of a layer depend on each other, so that chance often exceeds its expectation: for images like those of
    the prior, D / E is above 1 in one of ten draws in most layers, and above 1.5 in some, whatever the number of
    images. Applying what is due to chance costs accuracy in each layer. A real shift soon exceeds it many times, as E
    falls with the number of images and D does not. Chosen by measurement (benchmarks/adaptation/choosing.py).

    Args:
        images: Number of images.
        leave_one_out: Whether D is the smallest that is left when any one image is left out. Where that is not known,
            as with a single image, an unusual image calls for more caution.
    """
    return 1.75 + (10 if leave_one_out else 16) / images


def _factor(differences: Float64[Tensor, "samples channels"], by_chance: float) -> float:
    """Return the part of the differences in the first row that is taken; the others are without one image each."""
    observed = float(differences.square().sum(1).min())
    return max(0.0, 1 - (by_chance / observed) ** POWER) if observed > 0 else 0.0
