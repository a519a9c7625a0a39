from dataclasses import replace
from math import exp, inf, log, sqrt

import pytest
import torch
from torch import Tensor

from bn_insert.statistics.moments import moments_by_image, moments_of
from bn_insert.statistics.shrinkage import Prior

CHANNELS = 400
SOURCE_IMAGES = 10_000


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prior() -> Prior:
    """Return the statistics of channels whose values differ between images alone."""
    mean, var = random(CHANNELS, seed=1), random(CHANNELS, seed=2).exp()
    return Prior.of(mean, var, standard_error=torch.full_like(mean, 0.01), images=SOURCE_IMAGES)


def test_images_like_those_of_the_prior_leave_it_as_it_is_or_almost() -> None:
    known = prior()
    x = known.mean + known.var.sqrt() * random(16, CHANNELS)
    mean, var = known.shrunk(x.mean(0), x.var(0), 16)
    raw_error = ((x.mean(0) - known.mean) / known.var.sqrt()).square().mean()
    assert ((mean - known.mean) / known.var.sqrt()).square().mean() < 0.35 * raw_error
    assert (var.log() - known.var.log()).square().mean() < 0.5 * (x.var(0).log() - known.var.log()).square().mean()


@pytest.mark.parametrize(("times_threshold", "share"), [(0.5, 0.0), (0.999, 0.0), (2.0, 0.9375), (10.0, 0.9999)])
def test_nothing_of_a_shift_below_the_threshold_is_taken_and_nearly_all_far_above(
    times_threshold: float, share: float
) -> None:
    known, images = prior(), 16
    shift = sqrt(times_threshold * ((1.75 + 16 / images) / images + 1 / SOURCE_IMAGES))
    mean, var = known.shrunk(known.mean + shift * known.var.sqrt(), known.var * exp(2 * shift), images)
    torch.testing.assert_close((mean - known.mean) / known.var.sqrt(), torch.full_like(mean, share * shift))
    torch.testing.assert_close((var / known.var).log() / 2, torch.full_like(var, share * shift))


def test_it_is_the_formula_in_float64_channel_by_channel() -> None:
    error = random(CHANNELS, seed=3).exp() / 100
    known = Prior.of(prior().mean, prior().var, standard_error=error, images=1000)
    mean, var = known.mean + random(CHANNELS, seed=4) / 5.3, known.var * (random(CHANNELS, seed=5) / 2).exp()
    channels = list(zip(known.mean.tolist(), known.var.tolist(), mean.tolist(), var.tolist(), strict=True))
    threshold = ((1.75 + 16 / 32) * 1000 / 32 + 1) * sum(each**2 for each in error.tolist())
    of_mean = 1 - (threshold / sum((m - k) ** 2 / v for k, v, m, _ in channels)) ** 4
    of_std = 1 - (threshold / sum((log(w / v) / 2) ** 2 for _, v, _, w in channels)) ** 4
    assert min(of_mean, of_std) > 0.1
    assert max(of_mean, of_std) < 0.95
    found = known.shrunk(mean, var, 32)
    torch.testing.assert_close(found[0].tolist(), [k + of_mean * (m - k) for k, _, m, _ in channels])
    torch.testing.assert_close(found[1].tolist(), [exp(log(v) + of_std * log(w / v)) for _, v, _, w in channels])


def test_many_images_do_not_take_what_the_few_of_the_prior_may_differ_by_chance() -> None:
    # By a little less than the standard error of 64 images.
    few, x = replace(prior(), images=64), random(5000, CHANNELS, seed=9)
    known = replace(
        few, mean=few.mean + 0.1 * few.var.sqrt() * random(CHANNELS, seed=10)
    )  # by less than a standard error
    values = few.mean + few.var.sqrt() * x
    mean, var = known.shrunk(values.mean(0), values.var(0), len(x))
    assert torch.equal(mean, known.mean)
    torch.testing.assert_close(var, known.var)
    exact = replace(known, images=inf).shrunk(values.mean(0), values.var(0), len(x))
    torch.testing.assert_close(exact[0], values.mean(0), rtol=0, atol=0.01)


def test_a_shift_far_beyond_chance_is_taken_whole() -> None:
    known = prior()
    mean, var = known.shrunk(known.mean + 5 * known.var.sqrt(), known.var / 1000, 32)
    assert ((mean - known.mean) / known.var.sqrt() - 5).abs().max() < 0.02
    assert (var / known.var * 1000).max() < 1.1


def test_the_more_images_the_closer_to_what_was_measured() -> None:
    known = prior()
    shifted = known.mean + 0.3 * known.var.sqrt()
    found = [float((known.shrunk(shifted, known.var, n)[0] - shifted).abs().sum()) for n in (1, 4, 16, 64, 100_000)]
    assert found[0] == float((known.mean - shifted).abs().sum())
    assert found == sorted(found, reverse=True)
    assert found[-1] < 1e-3 * found[0]


def test_without_a_standard_error_or_with_a_few_images_they_may_differ_by_a_whole_standard_deviation() -> None:
    assert Prior.of(torch.zeros(3), torch.ones(3)).image_variance.tolist() == [1.0, 1.0, 1.0]
    few = Prior.of(torch.zeros(3), torch.ones(3), standard_error=torch.zeros(3).double(), images=7)
    assert few.image_variance.tolist() == [1.0, 1.0, 1.0]


def test_a_channel_that_the_prior_has_as_constant_takes_what_was_measured() -> None:
    known = Prior.of(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
    mean, var = known.shrunk(torch.tensor([1.5, 2.0]).double(), torch.tensor([0.25, 1.0]).double(), 4)
    assert (float(mean[0]), float(var[0])) == (1.5, 0.25)
    assert (float(mean[1]), float(var[1])) == (2.0, 1.0)


def test_a_variance_that_is_millions_of_times_larger_is_taken_as_it_is() -> None:
    known = prior()
    _, var = known.shrunk(known.mean, known.var * 65535.0**2, 128)
    torch.testing.assert_close(var, known.var * 65535.0**2, rtol=1e-6, atol=0)


def test_channels_that_are_constant_on_the_target_keep_a_variance_above_zero() -> None:
    mean, var = prior().shrunk(torch.zeros(CHANNELS).double(), torch.zeros(CHANNELS).double(), 1000)
    assert mean.isfinite().all()
    assert (var > 0).all()


@pytest.mark.parametrize("images", [2, 8, 32])
def test_what_is_due_to_a_single_unusual_image_is_not_taken(images: int) -> None:
    known, x = prior(), random(images, CHANNELS, 10, seed=6)
    x[0] = 40 * (x[0] + 1)
    values = x * known.var.sqrt()[:, None] + known.mean[:, None]
    everything = moments_of(values)
    alone = known.shrunk(everything.mean, everything.var, images)
    assert (alone[0] - known.mean).abs().max() > 1
    assert (alone[1] / known.var).log().abs().min() > 1
    mean, var = known.shrunk(everything.mean, everything.var, images, moments_by_image(values))
    assert torch.equal(mean, known.mean)
    torch.testing.assert_close(var, known.var)


@pytest.mark.parametrize("images", [2, 3, 8])
def test_what_is_due_to_a_single_unusual_image_is_not_taken_after_a_dense_layer(images: int) -> None:
    known, x = prior(), random(images, CHANNELS, seed=6)
    x[0] = 10 * (x[0] + 1)
    values = x * known.var.sqrt() + known.mean
    everything = moments_of(values)
    mean, var = known.shrunk(everything.mean, everything.var, images, moments_by_image(values))
    assert torch.equal(mean, known.mean)
    torch.testing.assert_close(var, known.var)


@pytest.mark.parametrize(("rows", "images"), [(3, 1), (24, 8)])
def test_rows_that_are_not_images_are_not_left_out(rows: int, images: int) -> None:
    known = prior()
    values = known.mean + known.var.sqrt() * (random(rows, CHANNELS, seed=8) + 1.5)
    everything = moments_of(values)
    found, without = (
        known.shrunk(everything.mean, everything.var, images, each) for each in (moments_by_image(values), None)
    )
    assert torch.equal(found[0], without[0])
    assert torch.equal(found[1], without[1])


def test_a_shift_of_all_images_is_taken_as_without_knowing_each() -> None:
    known, x = prior(), random(32, CHANNELS, 10, seed=7)
    values = (x + 2) * known.var.sqrt()[:, None] + known.mean[:, None]
    everything = moments_of(values)
    mean, var = known.shrunk(everything.mean, everything.var, 32, moments_by_image(values))
    expected = known.shrunk(everything.mean, everything.var, 32)
    torch.testing.assert_close(mean, expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(var, expected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("times_threshold", "share"), [(0.99, 0.0), (1.01, 1 - 1.01**-4)])
def test_where_single_images_are_known_the_threshold_is_lower(times_threshold: float, share: float) -> None:
    known, images = prior(), 16
    shift = sqrt(times_threshold * ((1.75 + 10 / images) / images + 1 / SOURCE_IMAGES))
    values = (known.mean + shift * known.var.sqrt()).expand(images, CHANNELS)[..., None] + 0 * random(1, 1, 10)
    mean, _ = known.shrunk(values[0, :, 0], known.var, images, moments_by_image(values))
    torch.testing.assert_close((mean - known.mean) / known.var.sqrt(), torch.full_like(mean, share * shift))
