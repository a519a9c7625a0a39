"""Small batches run as one where that changes nothing but the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bn_insert import CalibrationError, Moments, calibrate, find_sites

BATCHES, SIZE, SHAPE = 100, 2, (3, 8, 8)


def network_of(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
    return nn.Sequential(first, nn.ReLU(), *layers, last, nn.ReLU(), nn.Flatten(), nn.Linear(80, 2)).double().eval()


def images_of(count: int = BATCHES * SIZE) -> Tensor:
    return torch.rand(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Calibrated:
    """The moments of a network's sites, and the sizes of the batches that its forward ran on."""

    def __init__(self, network: nn.Module, batches: object, *, one_by_one: bool = False) -> None:
        self.sizes: list[int] = []
        handle = network.register_forward_pre_hook(lambda _, args: self.sizes.append(len(args[0])))
        sites = find_sites(network, images_of(SIZE))
        self.sizes.clear()
        tolerance = 1e-9 if one_by_one else None  # it is asked after each batch whether the error is small enough
        self.moments: dict[str, Moments] = calibrate(network, sites, batches, tolerance=tolerance)  # type: ignore[arg-type]
        handle.remove()


def assert_same(first: Calibrated, second: Calibrated) -> None:
    assert first.moments.keys() == second.moments.keys()
    for name, moments in first.moments.items():
        assert moments.count == second.moments[name].count
        torch.testing.assert_close(moments.mean, second.moments[name].mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moments.m2, second.moments[name].m2, rtol=1e-12, atol=1e-12)


def test_small_batches_run_together_and_have_the_statistics_of_one_by_one() -> None:
    network = network_of()
    together = Calibrated(network, images_of().split(SIZE))
    one_by_one = Calibrated(network, images_of().split(SIZE), one_by_one=True)
    assert one_by_one.sizes == [SIZE] * BATCHES
    assert max(together.sizes) > 2 * SIZE
    assert_same(together, one_by_one)


def test_large_batches_of_a_small_network_run_in_parts_and_have_the_statistics_of_one_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, batches = network_of(), images_of(320).split(80)
    whole = Calibrated(network, batches, one_by_one=True)
    monkeypatch.setattr("bn_insert.statistics.passes._BYTES_AT_A_TIME", 32 * 3 * 64 * 8)
    in_parts = Calibrated(network, batches)
    assert whole.sizes == [80] * 4
    assert in_parts.sizes == [80, 80, 2, 3, 5, *[27, 27, 26] * 2]
    assert_same(in_parts, whole)
    for name, moments in in_parts.moments.items():  # the spread between the batches of the caller
        torch.testing.assert_close(moments.standard_error, whole.moments[name].standard_error)


def test_an_image_that_is_not_finite_is_named_in_a_batch_that_runs_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bn_insert.statistics.passes._BYTES_AT_A_TIME", 32 * 3 * 64 * 8)
    images = images_of(240)
    images[160 + 50] = torch.nan
    with pytest.raises(CalibrationError, match="first in image 50 of batch 2"):
        Calibrated(network_of(), images.split(80))


def test_a_caller_may_fill_the_same_memory_with_each_batch() -> None:
    def batches() -> Iterator[Tensor]:
        memory = torch.empty(SIZE, *SHAPE, dtype=torch.float64)
        for images in images_of().split(SIZE):
            yield memory.copy_(images)

    assert_same(Calibrated(network_of(), batches()), Calibrated(network_of(), images_of().split(SIZE)))


def test_batches_of_other_sizes_and_shapes_in_between_are_counted_once() -> None:
    parts = [*images_of(80).split(2), *images_of(9).split(3), torch.rand(2, 3, 8, 8), *images_of(31).split(2)]
    together, one_by_one = (Calibrated(network_of(), parts, one_by_one=each) for each in (False, True))
    assert_same(together, one_by_one)


def test_images_that_depend_on_each_other_run_in_the_batches_that_they_came_in() -> None:
    by_batch = network_of(nn.BatchNorm2d(4, track_running_stats=False))
    together = Calibrated(by_batch, images_of().split(SIZE))
    assert_same(together, Calibrated(by_batch, images_of().split(SIZE), one_by_one=True))
    assert [size for size in together.sizes if size != SIZE] == [3, 5]  # with 2 images, those of the test
    assert together.sizes.count(SIZE) == BATCHES + 1


class FixedBatch(nn.Module):
    """A forward that takes batches of two images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.output = nn.Linear(4 * 36, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.conv(images).relu().view(2, 144))  # type: ignore[no-any-return]


def test_a_forward_that_takes_one_batch_size_alone_works() -> None:
    torch.manual_seed(0)
    network = FixedBatch().double().eval()
    assert set(Calibrated(network, images_of().split(2), one_by_one=True).moments) == {"conv"}
    assert_same(Calibrated(network, images_of().split(2)), Calibrated(network, images_of().split(2), one_by_one=True))


def test_an_image_that_is_not_finite_is_named_by_its_own_batch() -> None:
    images = images_of()
    images[171] = torch.nan
    with pytest.raises(CalibrationError, match="first in image 1 of batch 85"):
        Calibrated(network_of(), images.split(SIZE))


class SqueezedToConv1d(nn.Module):
    """A conv that takes the channels of a single image for a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.squeeze()).relu()  # type: ignore[no-any-return]


@pytest.mark.parametrize("last", [1, 4])
def test_outputs_whose_axes_are_not_those_of_a_batch_are_refused(last: int) -> None:
    network, images = SqueezedToConv1d().eval(), torch.rand(4, 4, 8, 1)
    sites = find_sites(network, images)
    with pytest.raises(CalibrationError, match=r"outputs of layer conv have the shape .*, not a batch of 4 channels"):
        calibrate(network, sites, [images[:last], images[:1]])


class PassesBy(nn.Module):
    """A forward that leaves one layer out for a single image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return x if len(x) == 1 else self.second(x).relu()


def test_a_layer_that_some_batches_pass_by_is_reported_with_the_number_of_batches() -> None:
    network = PassesBy().double().eval()
    with pytest.raises(CalibrationError, match=f"layer second was called for {BATCHES} of {BATCHES + 1} batches"):
        calibrate(network, find_sites(network, images_of(SIZE)), [images_of(1), *images_of().split(SIZE)])


def test_a_batch_that_fails_is_named_though_others_wait() -> None:
    batches: list[Tensor] = [*images_of().split(SIZE), torch.rand(2, 5, 8, 8)]
    with pytest.raises(CalibrationError, match=rf"failed on batch {BATCHES} of shape \(2, 5, 8, 8\)"):
        Calibrated(network_of(), batches)


def test_the_estimated_error_is_that_of_batches_one_by_one() -> None:
    generator = torch.Generator().manual_seed(2)
    # Each image has a brightness of its own, so that its pixels depend on each other.
    brightness = torch.randn(1024, 1, 1, 1, dtype=torch.float64, generator=generator)
    images = brightness + torch.randn(1024, *SHAPE, dtype=torch.float64, generator=generator)
    together, one_by_one = (
        Calibrated(network_of(), images.split(SIZE), one_by_one=each).moments["0"].standard_error
        for each in (False, True)
    )
    assert together is not None and one_by_one is not None
    ratio = together / one_by_one
    assert ratio.min() > 0.7 and ratio.max() < 1.4
