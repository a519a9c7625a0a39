"""Ending calibration early: how exact the statistics are by then, and whether the estimate of that is honest."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import Result

from bn_insert import CalibrationError, Moments, calibrate, find_sites, insert_batchnorm
from bn_insert.demo import images_path, network_path
from support.commands import AS_STORED, run
from support.networks import features, randomised, small_vgg
from support.networks import images as pictures


def dense(width: int = 8) -> nn.Sequential:
    """Return a network whose activations are its inputs."""
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(width))
        model[0].bias.zero_()
    return model.eval()


def measured(batches: Iterator[Tensor] | tuple[Tensor, ...], tolerance: float | None = None) -> tuple[Moments, int]:
    """Return the moments of the batches as they are, and how many images were taken."""
    model, seen = dense(), [0]
    found = calibrate(model, find_sites(model, features(2, 8)), batches, tolerance=tolerance, progress=seen.append)
    return found["0"], seen[-1]


def test_the_standard_error_is_that_of_a_mean_of_batches_in_float64() -> None:
    whole = features(60, 8) + torch.arange(60)[:, None] / 20  # images in a row are alike
    found, _ = measured(whole.split(6))
    assert found.standard_error is not None
    for channel in range(8):
        parts = [part[:, channel].double() for part in whole.split(6)]
        mean = float(whole[:, channel].double().mean())
        var = float(((whole[:, channel].double() - mean) ** 2).mean())
        of_means = [float(part.mean()) for part in parts]
        of_vars = [float(((part - mean) ** 2).mean()) for part in parts]
        squares = [sum((value - sum(values) / 10) ** 2 for value in values) / 9 / 10 for values in (of_means, of_vars)]
        expected = max(math.sqrt(squares[0] / var), math.sqrt(squares[1]) / (2 * var))
        assert float(found.standard_error[channel]) == pytest.approx(expected, rel=1e-6)


def test_one_batch_tells_no_error() -> None:
    found, _ = measured((features(40, 8),))
    assert found.standard_error is None
    assert math.isnan(found.error_of(0.99))


def test_calibration_ends_once_the_tolerance_is_reached_and_says_how_exact_it_is() -> None:
    coarse, few = measured(iter(features(20_000, 8).split(16)), tolerance=0.3)
    fine, more = measured(iter(features(20_000, 8).split(16)), tolerance=0.15)
    assert few < more < 20_000
    assert 0 < coarse.error_of(0.99) <= 0.3
    assert 0 < fine.error_of(0.99) <= 0.15
    assert coarse.count == few


def test_without_a_tolerance_all_images_count() -> None:
    assert measured(features(2_000, 8).split(16))[1] == 2_000


def test_fewer_than_eight_batches_end_nothing() -> None:
    _, taken = measured(features(20_000, 8).split(2_000), tolerance=0.3)
    assert taken == 16_000


def test_constant_channels_hold_nothing_up() -> None:
    whole = features(20_000, 8)
    whole[:, :4] = 3
    found, taken = measured(whole.split(16), tolerance=0.3)
    assert taken < 20_000
    assert found.standard_error is not None
    assert torch.equal(found.standard_error[:4], torch.zeros(4, dtype=torch.float64))


def test_batches_of_images_that_are_alike_are_no_more_than_one_image() -> None:
    rows = features(20_000, 8)
    _, alone = measured(rows.split(1), tolerance=0.3)
    _, repeated = measured((row.expand(50, -1) for row in rows.split(1)), tolerance=0.3)
    assert repeated == 50 * alone


def test_the_true_error_is_below_the_tolerance_in_95_percent_of_runs_that_ended_early() -> None:
    model, pool = small_vgg(), pictures(200, 16)
    sites = find_sites(model, pool[:1])
    truth = calibrate(model, sites, [pool])
    honest = 0
    for seed in range(40):
        order = torch.randint(len(pool), (4_000,), generator=torch.Generator().manual_seed(seed))
        found = calibrate(model, sites, (pool[rows] for rows in order.split(5)), tolerance=0.5)
        assert found["classifier.0"].count < 1_000
        errors = []
        for site in sites:
            expected, moving = truth[site.name], truth[site.name].std > 0
            of_mean = (found[site.name].mean - expected.mean).abs()
            of_std = (found[site.name].std - expected.std).abs()
            errors.append((torch.maximum(of_mean, of_std) / expected.std)[moving].quantile(0.99))
        honest += int(max(errors) < 0.5)
    assert honest >= 38


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.nan, math.inf])
def test_a_tolerance_that_is_not_above_zero_is_refused(tolerance: float) -> None:
    with pytest.raises(CalibrationError, match="tolerance must be a finite number above 0, such as"):
        insert_batchnorm(randomised(dense()), [features(4, 8)], tolerance=tolerance)


def insert(folder: Path, *options: object) -> Result:
    command = ("insert", network_path(), images_path(), "-o", folder / "out.pth", *AS_STORED, "--device", "cpu")
    result = run(*command, *options)
    assert result.exit_code == 0, result.output
    return result


def test_the_command_ends_early_and_prints_the_error_that_was_reached(tmp_path: Path) -> None:
    result = insert(tmp_path, "--tolerance", 0.5, "-b", 8)
    found = re.search(r"Calibrated on (\d+) images, with an error of ([\d.]+) standard deviations\.", result.stderr)
    assert found, result.stderr
    assert int(found[1]) < 360
    assert 0 < float(found[2]) <= 0.5
    assert "not reached" not in result.stderr


def test_the_command_says_when_the_images_do_not_suffice(tmp_path: Path) -> None:
    result = insert(tmp_path, "--tolerance", 0.001, "-b", 32)
    assert "Calibrated on 360 images, with an error of 0." in result.stderr
    assert "The tolerance 0.001 was not reached: use more images (--images)" in result.stderr


def test_the_command_says_when_batches_are_too_few_to_tell(tmp_path: Path) -> None:
    result = insert(tmp_path, "--tolerance", 0.5, "-b", 32, "--images", 20)
    assert "One batch is too few to estimate the error: use more images, or smaller batches (-b)." in result.stderr
