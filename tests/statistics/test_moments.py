from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bn_insert import Moments
from bn_insert.statistics.moments import GroupMoments, merge, moments_by_image, moments_of
from support.references import assert_moments, by_channel, mean_and_var

SHAPES = {
    "dense": (64, 5),
    "dense-wide": (50, 300),
    "one-row": (1, 5),
    "sequence": (4, 6, 11),
    "volume": (2, 4, 3, 5, 6),
    "images": (7, 3, 9, 9),
    "one-image": (1, 8, 40, 40),
    "many-slices": (6, 64, 56, 56),
    "one-channel": (3, 1, 300, 300),
    "many-rows": (140_000, 2),
}


def values_of(shape: Sequence[int], mean_in_stds: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal values whose channels have stds from 0.1 to 100 and means of so many stds, of both signs."""
    generator = torch.Generator().manual_seed(3)
    stds = torch.logspace(-1, 2, shape[1], dtype=torch.float64)
    signs = torch.ones(shape[1], dtype=torch.float64)
    signs[1::2] = -1
    normal = torch.randn(*shape, generator=generator, dtype=torch.float64).movedim(1, -1)
    return ((normal + mean_in_stds * signs) * stds).movedim(-1, 1).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_taken_under_autocast_are_the_same(shape: str) -> None:
    values = values_of(SHAPES[shape], 3)
    found = moments_of(values)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = moments_of(values)
    assert torch.equal(under_autocast.mean, found.mean)
    assert torch.equal(under_autocast.m2, found.m2)


@pytest.mark.parametrize("mean_in_stds", [0, 3, 7.9, 30, 1000])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "one-row"])
def test_moments_equal_a_float64_reference_over_all_values(shape: str, mean_in_stds: float) -> None:
    values = values_of(SHAPES[shape], mean_in_stds)
    assert_moments(moments_of(values), values)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("threshold", [0, 0.6, 1.2, 1.8, 2.4, 3])
@pytest.mark.parametrize(
    "shape", [(4096, 64), (1023, 64), (2, 64, 40, 40), (4, 512, 14, 14), (3, 1, 300, 300), (140_000, 2)], ids=str
)
def test_moments_of_sparse_activations_equal_a_float64_reference(shape: tuple[int, ...], threshold: float) -> None:
    """Behind a ReLU most values are 0, and each adds the same square to a sum: its roundings have one direction."""
    generator = torch.Generator().manual_seed(4)
    values = torch.relu(torch.randn(shape, generator=generator) - threshold)
    assert_moments(moments_of(values), values)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_moments_of_images_with_flat_patches_equal_a_float64_reference(share: float) -> None:
    """A sky of one value: in its groups of neighbouring values |mean| is any number of times std."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(2, 64, 60, 60, generator=generator).contiguous(memory_format=torch.channels_last)
    values[:, :, : int(share * 60)] = 5 * torch.rand(64, generator=generator)[:, None, None]
    assert_moments(moments_of(values), values)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_flat_patches_do_not_cost_the_slow_exact_sums(
    monkeypatch: pytest.MonkeyPatch, memory_format: torch.memory_format
) -> None:
    values = torch.randn(2, 64, 60, 60).contiguous(memory_format=memory_format)
    values[:, :, :30] = 2.0
    monkeypatch.setattr("bn_insert.statistics.moments._float64_moments", None)
    assert_moments(moments_of(values), values)


@pytest.mark.parametrize("mean", [0, 50, -1e5])
def test_dense_outputs_far_from_zero_do_not_cost_the_slow_exact_sums(
    monkeypatch: pytest.MonkeyPatch, mean: float
) -> None:
    values = torch.randn(32, 200, generator=torch.Generator().manual_seed(6)) + mean
    monkeypatch.setattr("bn_insert.statistics.moments._float64_moments", None)
    assert_moments(moments_of(values), values)


def test_moments_of_heavy_tailed_values_equal_a_float64_reference() -> None:
    values = torch.randn(SHAPES["many-rows"], generator=torch.Generator().manual_seed(4)).mul(2).exp()
    assert_moments(moments_of(values), values)


@pytest.mark.parametrize("std", [1e-12, 1e-16, 1e-20, 1e-25])
def test_moments_of_tiny_values_equal_a_float64_reference(std: float) -> None:
    values = torch.randn(SHAPES["images"], generator=torch.Generator().manual_seed(6)) * std + std
    assert_moments(moments_of(values), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mean_in_stds", [0, 30])
def test_moments_of_every_floating_dtype_equal_a_float64_reference(dtype: torch.dtype, mean_in_stds: float) -> None:
    values = values_of(SHAPES["images"], mean_in_stds, dtype)
    assert_moments(moments_of(values), values, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("mean_in_stds", [0, 1000])
@pytest.mark.parametrize("shape", [(9, 5, 7, 9), (9, 5, 8, 8), (2, 5, 70, 90)], ids=str)
def test_moments_in_any_memory_format_equal_a_float64_reference(mean_in_stds: float, shape: tuple[int, ...]) -> None:
    """Contiguous values are read in place if the images have enough positions, and are copied otherwise."""
    values = values_of(shape, mean_in_stds)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert_moments(moments_of(values.contiguous(memory_format=memory_format)), values)


def test_moments_of_a_view_with_gaps_equal_a_float64_reference() -> None:
    values = values_of((8, 12, 20, 20))[::2, 1::3, 3:, ::2]
    assert_moments(moments_of(values), values)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
@pytest.mark.parametrize("mean_in_stds", [0, 1000])
@pytest.mark.parametrize("shape", [(40, 6), (40, 6, 5, 5)], ids=["dense", "conv"])
def test_merged_batches_equal_the_float64_reference_over_the_whole_set(
    shape: tuple[int, ...], mean_in_stds: float, batch_size: int
) -> None:
    values = values_of(shape, mean_in_stds)
    assert_moments(merge(moments_of(batch) for batch in values.split(batch_size)), values)


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 1),
    mean_in_stds=st.sampled_from([0, 1, 1e3, 1e6]),
    order=st.randoms(use_true_random=False),
)
def test_merging_parts_of_any_sizes_in_any_order_gives_the_moments_of_the_whole(
    sizes: list[int], mean_in_stds: float, order: Random
) -> None:
    values = values_of((sum(sizes), 4), mean_in_stds, torch.float64)
    parts = [moments_of(part) for part in values.split(sizes)]
    order.shuffle(parts)
    merged = merge(parts)
    mean, var = mean_and_var(values)
    assert merged.count == sum(sizes)
    assert ((merged.mean - mean).abs() <= 1e-13 * (mean.abs() + var.sqrt())).all()
    torch.testing.assert_close(merged.var, var, rtol=1e-8, atol=0)


def test_merging_merged_moments_equals_merging_all_at_once() -> None:
    parts = [moments_of(part) for part in values_of((60, 5), 10).split([3, 20, 17, 1, 19])]
    nested = merge([merge(parts[:2]), merge([merge(parts[2:4]), parts[4]])])
    torch.testing.assert_close(nested.mean, merge(parts).mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(nested.m2, merge(parts).m2, rtol=1e-12, atol=0)


def test_merging_nothing_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"^merge needs at least one set of moments$"):
        merge([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [[25], [7, 7, 7, 4], [1, 7, 3, 5, 9], [1] * 25], ids=len)
def test_a_constant_channel_has_exactly_its_value_as_mean_and_no_deviation(
    dtype: torch.dtype, sizes: list[int]
) -> None:
    values = values_of((25, 5), dtype=dtype)
    values[:, 0], values[:, 2], values[:, 4] = 0.1, 0, -1 / 3
    moments = merge(moments_of(batch) for batch in values.split(sizes))
    assert moments.constant_channels == 3
    assert_moments(moments, values)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (5, 3, 0, 4), (5, 0)])
def test_no_values_have_a_count_of_zero(shape: tuple[int, ...]) -> None:
    moments = moments_of(torch.zeros(shape))
    assert (moments.count, moments.channels) == (0, shape[1])


def test_one_value_has_itself_as_mean_and_no_variance() -> None:
    values = values_of(SHAPES["one-row"])
    moments = moments_of(values)
    assert moments.count == 1
    assert torch.equal(moments.mean, values[0].double())
    assert moments.var.isnan().all()


def test_var_is_divided_by_one_less_than_the_count_and_std_is_its_root() -> None:
    moments = Moments(5, torch.zeros(2).double(), torch.tensor([4.0, 16.0]).double())
    assert moments.var.tolist() == [1, 4]
    assert moments.std.tolist() == [1, 2]


def test_scaled_moments_are_those_of_the_scaled_values() -> None:
    values, scale = values_of((40, 4), 2, torch.float64), torch.tensor([0.5, -3, 1e6, 0], dtype=torch.float64)
    scaled, expected = moments_of(values).scaled(scale), moments_of(values * scale)
    torch.testing.assert_close(scaled.mean, expected.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled.m2, expected.m2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mean_in_stds", [0, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_taking_moments_leaves_the_values_alone_and_keeps_no_hold_on_them(
    dtype: torch.dtype, mean_in_stds: float
) -> None:
    values = values_of((9, 4), mean_in_stds, dtype)
    before = values.clone()
    moments = moments_of(values)
    assert torch.equal(values, before)
    mean = moments.mean.clone()
    values.zero_()
    assert torch.equal(moments.mean, mean)


def test_moments_on_the_cpu_stay_as_they_are() -> None:
    moments = moments_of(values_of((9, 4)))
    assert moments.cpu().count == moments.count
    assert torch.equal(moments.cpu().mean, moments.mean)
    assert torch.equal(moments.cpu().m2, moments.m2)


def test_the_reference_itself_agrees_with_torch() -> None:
    values = values_of((9, 4, 3), dtype=torch.float64)
    mean, var = mean_and_var(values)
    torch.testing.assert_close(mean, values.mean((0, 2)))
    torch.testing.assert_close(var, by_channel(values).var(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 5), (7, 4, 30), (7, 3, 9, 9), (6, 2, 3, 5, 4)])
def test_moments_without_each_image_equal_a_float64_reference_over_the_others(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    values = values_of(shape, 3, dtype)
    images = GroupMoments.concatenated([moments_by_image(values[:4]), moments_by_image(values[4:])])
    others = images.without_each()
    for left_out in range(len(values)):
        mean, var = mean_and_var(values[[image for image in range(len(values)) if image != left_out]])
        torch.testing.assert_close(others.means[left_out], mean, rtol=1e-5, atol=1e-4)
        count = values[1:, 0].numel()
        torch.testing.assert_close(others.variances[left_out] * count / (count - 1), var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_moments_of_each_of_some_large_images_are_close_to_those_of_all_positions(
    memory_format: torch.memory_format,
) -> None:
    slope = torch.linspace(-1, 1, 512).expand(2, 3, 256, 512)  # columns differ
    values = (torch.randn(2, 3, 256, 512, generator=torch.Generator().manual_seed(0)) + slope).to(
        memory_format=memory_format
    )
    found = moments_by_image(values)
    for image in range(2):
        mean, var = mean_and_var(values[image : image + 1])
        torch.testing.assert_close(found.means[image], mean, rtol=0, atol=0.15)
        torch.testing.assert_close(found.variances[image], var, rtol=0.15, atol=0)


def test_merging_keeps_the_moments_of_each_image_while_there_are_few() -> None:
    first, second, third = (
        replace(moments_of(part), by_image=moments_by_image(part)) for part in values_of((180, 3)).split(60)
    )
    few = merge([first, moments_of(torch.empty(0, 3)), second])
    assert few.by_image is not None
    assert len(few.by_image.means) == 120
    assert merge([few, third]).by_image is None
    assert merge([first, replace(second, by_image=None)]).by_image is None
