"""Train mode against eval mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bn_insert import (
    CalibrationError,
    TrainingError,
    TrainModeAgreement,
    agreement_reading,
    freeze_batchnorm,
    insert_batchnorm,
    set_batchnorm_mode,
    smallest_agreeing,
    train_mode_agreement,
)
from bn_insert.graph.copies import deep_copy
from support.networks import images, randomised, small_vgg


def with_batchnorm(calibration: Tensor | None = None) -> nn.Module:
    model = randomised(small_vgg())
    with torch.no_grad():
        logits = model(images(8))
        for parameter in model.classifier[-1].parameters():
            parameter.mul_(2 / logits.std())  # probabilities of which none is 0
    return insert_batchnorm(model, [images(24) if calibration is None else calibration], equalize=True)


def frozen() -> nn.Module:
    model = with_batchnorm()
    freeze_batchnorm(model, "freeze")
    return model


class Squeezing(nn.Module):
    """Loses the batch axis of a single image behind its BatchNorm, or before it."""

    def __init__(self, *, dense: bool) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)
        self.norm = nn.BatchNorm1d(4) if dense else nn.BatchNorm2d(4)
        self.output = nn.Linear(4, 3)
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.norm(self.pool(x).flatten(1)) if self.dense else self.pool(self.norm(x)).squeeze()
        return self.output(x)


def test_a_last_batch_of_one_image_may_lose_its_batch_axis_in_eval_mode() -> None:
    model, x = Squeezing(dense=False).eval(), images(9)
    assert train_mode_agreement(model, [x[:8], x[8:]], (3,)) == train_mode_agreement(model, [x[:7], x[7:]], (3,))


@pytest.mark.parametrize(
    ("dense", "reason"), [(False, "the model's output is the shape"), (True, "a BatchNorm gets a single value")]
)
def test_a_batch_size_of_one_that_the_network_cannot_be_trained_with_is_refused(*, dense: bool, reason: str) -> None:
    wording = rf"^train mode cannot run on one image: {reason}.*; use batch sizes of 2 or more \(batch_sizes\)$"
    with pytest.raises(CalibrationError, match=wording):
        train_mode_agreement(Squeezing(dense=dense).eval(), [images(4)], (1,))


def logits_in_train_mode(model: nn.Module, x: Tensor) -> Tensor:
    """By PyTorch's own train mode, in float64, on a copy whose dropout layers are gone."""
    network = copy.deepcopy(model).double().train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        return network(x.double())


def reference(model: nn.Module, x: Tensor, size: int) -> tuple[float, float, float]:
    """Return agreement, KL divergence and relative logit error, image by image, in the plainest way."""
    with torch.no_grad():
        expected = copy.deepcopy(model).double().eval()(x.double())
    whole = len(x) // size * size
    actual = torch.cat([logits_in_train_mode(model, x[start : start + size]) for start in range(0, whole, size)])
    agreeing, divergence, error, norm = 0, 0.0, 0.0, 0.0
    for e, a in zip(expected[:whole], actual, strict=True):
        p, q = e.exp() / e.exp().sum(), a.exp() / a.exp().sum()
        agreeing += int(e.argmax() == a.argmax())
        divergence += float((p * (p / q).log()).sum())
        error += float(((a - e) ** 2).sum())
        norm += float((e**2).sum())
    return agreeing / whole, divergence / whole, (error / norm) ** 0.5


@pytest.mark.parametrize("given", [50, 7, 32])
def test_the_figures_are_those_of_float64_however_the_images_come(given: int) -> None:
    model, x = with_batchnorm(), images(50, seed=5)
    found = train_mode_agreement(model, x.split(given), (4, 16, 7))
    assert [(each.batch_size, each.images) for each in found] == [(4, 48), (16, 48), (7, 49)]
    for each in found:
        agreement, divergence, error = reference(model, x, each.batch_size)
        assert each.top1_agreement == agreement
        assert each.kl_divergence == pytest.approx(divergence, rel=1e-3)
        assert each.relative_logit_error == pytest.approx(error, rel=1e-3)
        assert error > 0.01  # or there would be nothing to compare
        assert divergence > 1e-4


def test_one_batch_of_the_whole_calibration_set_agrees_and_smaller_ones_less_and_less() -> None:
    x = images(64)
    found = train_mode_agreement(with_batchnorm(x), [x], (4, 16, 64))
    errors = [each.relative_logit_error for each in found]
    assert all(larger < smaller for smaller, larger in pairwise(errors)), errors
    # What is left: running_var is the unbiased variance, the batch's is not.
    assert errors[-1] < 0.01
    assert found[-1].top1_agreement == 1


def test_sizes_above_the_number_of_images_are_left_out() -> None:
    assert [each.batch_size for each in train_mode_agreement(with_batchnorm(), [images(20)])] == [4, 8, 16]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_state_are_not_touched(training: bool) -> None:
    model = with_batchnorm().train(training)
    before, random = deep_copy(model), torch.get_rng_state()
    train_mode_agreement(model, [images(8)], (4,))
    assert torch.equal(torch.get_rng_state(), random)
    assert model.state_dict().keys() == before.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]


def test_dropout_is_off() -> None:
    model, x = with_batchnorm(), images(8)
    first, second = (train_mode_agreement(model.train(), [x], (8,)) for _ in range(2))
    assert first == second


def test_a_frozen_batchnorm_goes_on_with_its_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 5), nn.BatchNorm1d(5))
    randomised(model)
    freeze_batchnorm(model[1:2], "freeze-statistics")
    x = images(8)
    (found,) = train_mode_agreement(model, [x], (8,))
    agreement, divergence, error = reference(model, x, 8)  # the hook of the frozen one holds in the copy too
    assert (found.top1_agreement, found.kl_divergence) == (agreement, pytest.approx(divergence, rel=1e-3))
    assert found.relative_logit_error == pytest.approx(error, rel=1e-3)


def test_with_renorm_every_class_agrees_at_every_size_and_the_mode_of_the_model_does_not_matter() -> None:
    model, x = with_batchnorm(), images(16)
    expected = train_mode_agreement(model, [x], (1, 2, 4, 16), renorm=True)
    assert [each.batch_size for each in expected] == [1, 2, 4, 16]
    for each in expected:
        assert (each.images, each.top1_agreement) == (16, 1)
        # The kernels of convs and dense layers round in other ways for other batch sizes.
        assert each.relative_logit_error < 1e-5
    freeze_batchnorm(model, "freeze")
    assert train_mode_agreement(model, [x], (1, 2, 4, 16), renorm=True) == expected


def test_a_model_that_renormalizes_is_measured_within_its_limits_and_not_changed() -> None:
    model, x = with_batchnorm(), images(16)
    (plain,) = train_mode_agreement(model, [x], (4,))
    set_batchnorm_mode(model, "renorm", r_max=1.0, d_max=0.0, synchronize=True)
    before = copy.deepcopy(model.state_dict())
    (tightest,) = train_mode_agreement(model, [x], (4,))
    assert tightest.relative_logit_error == pytest.approx(plain.relative_logit_error, rel=1e-4)
    set_batchnorm_mode(model, "renorm", r_max=1.5, d_max=0.5)
    (limited,) = train_mode_agreement(model, [x], (4,))
    assert 0 < limited.relative_logit_error < plain.relative_logit_error
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_renorm_is_not_measured_where_a_batchnorm_cannot_renormalize() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 6, 1))
    with pytest.raises(TrainingError, match="BatchNorm 1 keeps no running statistics"):
        train_mode_agreement(model, [images(8)], (4,), renorm=True)


def test_the_margin_covers_the_agreement_of_all_images_for_19_of_20_samples() -> None:
    for true in (0.6, 0.8, 0.95, 0.99):
        counts = torch.distributions.Binomial(64, torch.tensor(true)).sample((2000,)).tolist()
        samples = [TrainModeAgreement(8, 64, count / 64, 0.1, 0.1) for count in counts]
        covered = sum(abs(each.top1_agreement - true) <= each.top1_margin for each in samples)
        assert covered > 0.93 * len(samples)


def test_the_margin_is_smaller_for_more_images_and_the_reading_has_the_largest() -> None:
    few, many = (TrainModeAgreement(8, images, 0.8, 0.1, 0.1) for images in (64, 256))
    assert few.top1_margin == pytest.approx(2 * many.top1_margin, rel=0.05)
    assert few.to_dict()["top1_margin"] == few.top1_margin
    message = "This was measured on 64 images; the margin is at most ± 10 points."
    assert message in agreement_reading([TrainModeAgreement(16, 64, 1.0, 0.1, 0.1), few])


@pytest.mark.parametrize(("top1", "expected"), [(1.0, "100%"), (0.98438, "98.44%")])
def test_the_reading_has_the_lowest_agreement_with_renorm(top1: float, expected: str) -> None:
    reading = agreement_reading(agreements(n4=0.5, n8=0.96), renorm=agreements(n4=1.0, n8=top1))
    assert reading.endswith(f" With Batch Renormalization it keeps {expected} at batch sizes of 4 and above.")
    assert "Renormalization it" not in agreement_reading(agreements(n4=0.5, n8=0.96))


def test_dense_prediction_counts_positions() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)))
    x = images(8, size=8)
    (found,) = train_mode_agreement(model, [x], (8,))
    with torch.no_grad():
        same = model.eval()(x).argmax(1) == logits_in_train_mode(model, x).argmax(1)
    assert found.top1_agreement == pytest.approx(float(same.double().mean()))
    assert 0 < found.top1_agreement < 1


@pytest.mark.parametrize(
    ("model", "batches", "sizes", "wording"),
    [
        (lambda: randomised(small_vgg()), [images(8)], (4,), "VGG has no BatchNorm, so both modes are the same"),
        (frozen, [images(8)], (4,), "has no BatchNorm that normalizes by the batch in train mode"),
        (with_batchnorm, [images(3)], (4, 8), "3 images do not fill one batch of the smallest size, 4"),
        (with_batchnorm, [images(1)], (4,), "1 image does not fill one batch of the smallest size, 4"),
        (with_batchnorm, [], (4,), "0 images do not fill"),
        (with_batchnorm, [images(4)], (), "pass one or more sizes"),
        (with_batchnorm, [images(4)], (4, 0), "pass one or more sizes of 1 or more"),
        (with_batchnorm, [images(2), images(2, size=40)], (4,), "(3, 32, 32) and (3, 40, 40) cannot be put into one"),
        (with_batchnorm, [images(2)], (1,), "train mode cannot run on one image: a BatchNorm gets"),
        (with_batchnorm, [images(2, channels=4)], (2,), "in eval mode failed on batch 0 of shape (2, 4, 32, 32)"),
        (with_batchnorm, [images(2) * torch.inf], (2,), "logits are not finite in eval mode"),
        (lambda: nn.Sequential(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1)), [images(2)], (2,), "two or more classes"),
        (lambda: nn.BatchNorm2d(3), images(2), (2,), "image by image"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    unchecked: Callable[..., Any],
    model: Callable[[], nn.Module],
    batches: list[Tensor],
    sizes: tuple[int, ...],
    wording: str,
) -> None:
    with pytest.raises(CalibrationError) as error:
        unchecked(train_mode_agreement)(model(), batches, sizes)
    assert wording in str(error.value)


def agreements(**top1: float) -> list[TrainModeAgreement]:
    return [TrainModeAgreement(int(size[1:]), 64, value, 0.1, 0.1) for size, value in top1.items()]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (agreements(n4=0.5, n8=0.95, n16=0.99), 8),
        (agreements(n16=0.99, n4=0.5, n8=0.95), 8),
        (agreements(n4=0.96, n8=0.94, n16=0.99), 16),  # lucky once
        (agreements(n4=0.96, n8=0.97, n16=0.94), None),
        ([], None),
    ],
)
def test_the_smallest_size_is_the_one_from_which_on_all_agree(
    found: list[TrainModeAgreement], expected: int | None
) -> None:
    assert smallest_agreeing(found) == expected
