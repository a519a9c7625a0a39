from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bn_insert import CalibrationError, Moments, calibrate, find_sites
from bn_insert.graph.operator_rules import PER_IMAGE_MODULES
from bn_insert.statistics.calibrate import run_in_micro_batches
from bn_insert.statistics.moments import moments_of
from support.networks import images, randomised, small_vgg
from support.references import activations, assert_moments

ONE_IMAGE = 8 * 16 * 16 * 4  # bytes that small_vgg's first conv returns for an image of 16 x 16


@pytest.fixture(autouse=True)
def _room_for_three_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bn_insert.statistics.calibrate._MICRO_BATCH_BYTES", 3 * ONE_IMAGE)


def prepared(network: nn.Module) -> tuple[nn.Module, dict[str, list[Tensor]]]:
    """Return the network in micro-batches, and the output of every call of each module without children."""
    seen: dict[str, list[Tensor]] = {}
    own = {
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.setdefault(name, []).append(output.clone())
        ).id
        for name, module in network.named_modules()
        if not list(module.children())
    }
    run_in_micro_batches(network, own)
    return network, seen


def sizes(outputs: list[Tensor]) -> list[int]:
    return [len(output) for output in outputs]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_split_network_gives_the_same_outputs(memory_format: torch.memory_format) -> None:
    whole = images(10, 16).contiguous(memory_format=memory_format)
    expected = small_vgg()(whole)
    network, seen = prepared(small_vgg())
    torch.testing.assert_close(network(whole), expected, rtol=1e-5, atol=1e-5)
    assert len(seen["features.0"]) == 4
    assert max(output.nbytes for outputs in seen.values() for output in outputs) <= 3 * ONE_IMAGE


def test_parts_are_of_even_size_and_grow_where_activations_shrink() -> None:
    network, seen = prepared(small_vgg())
    network(images(10, 16))
    assert sizes(seen["features.0"]) == [3, 3, 2, 2]
    assert sizes(seen["features.3"]) == [5, 5]
    assert sizes(seen["classifier.0"]) == [10]


def test_images_of_several_sizes_are_split_each_by_its_own_size() -> None:
    network, seen = prepared(small_vgg())
    for size in (16, 32, 16):
        network(images(10, size))
    assert sizes(seen["features.0"]) == [3, 3, 2, 2, *[1] * 10, 3, 3, 2, 2]


def test_calibration_sees_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(values: Tensor) -> Moments:
        seen.append(len(values))
        return moments_of(values)

    monkeypatch.setattr("bn_insert.statistics.recorder.moments_of", counted)
    model, whole = small_vgg(), images(10, 16)
    calibrate(model, find_sites(model, whole, layers="conv", skip=["features.3"]), [whole])
    assert seen == [3, 3, 2, 2]


@pytest.mark.parametrize("layers", ["conv", ("conv", "dense")])
@pytest.mark.parametrize("placement", ["before_activation", "after_activation"])
def test_moments_of_split_batches_equal_the_float64_reference(placement: Any, layers: Any) -> None:
    model, whole = small_vgg(), images(23, 16)
    sites = find_sites(model, whole, placement=placement, layers=layers)
    found = calibrate(model, sites, whole.split(10))
    expected = activations(model, [site.anchor for site in sites], [whole])
    assert {site.name for site in sites} == found.keys()
    for site in sites:
        assert_moments(found[site.name], expected[site.anchor])


def test_an_error_about_a_value_that_is_not_finite_has_its_place_in_the_whole_batch() -> None:
    model, whole = small_vgg(), images(10, 16)
    whole[7, 0, 3, 3] = torch.inf
    with pytest.raises(CalibrationError, match=r"features\.0 are not finite.* image 7 of batch 0"):
        calibrate(model, find_sites(model, whole), [whole])


def test_a_conv_run_twice_in_a_sequence_has_the_moments_of_both_runs() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), shared, nn.ReLU(), shared))
    whole = images(10, 16)
    sites = find_sites(model, whole, include_output=True)
    found = calibrate(model, sites, [whole])
    expected = activations(model, [site.name for site in sites], [whole])
    for site in sites:
        assert_moments(found[site.name], expected[site.name])


def test_an_error_about_images_that_do_not_fit_has_the_message_of_the_layer_itself() -> None:
    model = small_vgg()
    with pytest.raises(CalibrationError, match=r"batch 1 of shape \(8, 1, 16, 16\): .*to have 3 channels, but got 1"):
        calibrate(model, find_sites(model, images(2, 16)), [images(8, 16), images(8, 16, channels=1)])


class DependsOnTheBatch(nn.Module):
    """Subtracts the mean over all images of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def _norm_by_batch() -> nn.Module:
    return nn.BatchNorm2d(8, track_running_stats=False)


def _watched() -> nn.Module:
    activation = nn.ReLU()
    activation.register_forward_hook(lambda _module, _inputs, output: output - output.mean(0))
    return activation


def _replaced() -> nn.Module:
    activation = nn.ReLU()
    activation.forward = lambda x: x - x.mean(0)  # type: ignore[method-assign]
    return activation


def _flat() -> nn.Module:
    return nn.Flatten(0, 1)


class TwoSequences(nn.Module):
    """Two sequences of convs; under autocast the second receives bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.PReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.PReLU(), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sequences_after_each_other_run_in_every_dtype(dtype: torch.dtype) -> None:
    model, whole = randomised(TwoSequences()).to(dtype), images(10, 16)
    sites = find_sites(model, whole, include_output=True)
    found = calibrate(model, sites, [whole])
    expected = activations(model, [site.name for site in sites], [whole.to(dtype)])
    for site in sites:
        assert_moments(found[site.name], expected[site.name], 1e-5 if dtype != torch.bfloat16 else 1e-2)


def test_sequences_after_each_other_run_under_autocast() -> None:
    model, whole = randomised(TwoSequences()), images(10, 16)
    sites = find_sites(model, whole, include_output=True)
    exact = calibrate(model, sites, [whole])
    found = calibrate(model, sites, [whole], autocast=torch.bfloat16)
    for name, moments in exact.items():
        assert found[name].count == moments.count
        moving = moments.std > 0
        assert ((found[name].mean - moments.mean).abs() / moments.std)[moving].max() < 0.05


class Taps(nn.Module):
    """Takes an activation out of its features by a hook that exists only during the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        tapped: list[Tensor] = []
        handle = self.features[1].register_forward_hook(lambda _module, _inputs, output: tapped.append(output))
        self.features(x)
        handle.remove()
        return self.head(tapped[0])


def test_a_forward_that_taps_activations_by_hooks_gets_those_of_the_whole_batch() -> None:
    model, whole = randomised(Taps()), images(10, 16)
    sites = find_sites(model, whole, include_output=True)
    expected = activations(model, [site.name for site in sites], [whole])
    found = calibrate(model, sites, [whole])
    assert "head" in found
    for site in sites:
        assert_moments(found[site.name], expected[site.name])


def test_a_hook_on_all_modules_sees_whole_batches() -> None:
    seen: list[int] = []
    model, whole = small_vgg(), images(10, 16)
    sites = find_sites(model, whole)
    handle = nn.modules.module.register_module_forward_hook(lambda _module, _inputs, output: seen.append(len(output)))
    try:
        calibrate(model, sites, [whole])
    finally:
        handle.remove()
    assert set(seen) == {10}


class Unpools(nn.Module):
    """Keeps the indices of a pool, as SegNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, return_indices=True))
        self.up = nn.MaxUnpool2d(2)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.up(*self.down(x)))


def test_a_pool_that_returns_indices_too_runs_whole() -> None:
    model, whole = randomised(Unpools()), images(10, 16)
    sites = find_sites(model, whole, include_output=True)
    found = calibrate(model, sites, [whole])
    expected = activations(model, [site.name for site in sites], [whole])
    for site in sites:
        assert_moments(found[site.name], expected[site.name])


MADE = {
    nn.Conv2d: lambda: nn.Conv2d(8, 8, 3),
    nn.Linear: lambda: nn.Linear(16, 4),
    nn.BatchNorm1d: lambda: nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(8)),
    nn.BatchNorm2d: lambda: nn.BatchNorm2d(8),
    nn.MaxPool2d: lambda: nn.MaxPool2d(2),
    nn.AvgPool2d: lambda: nn.AvgPool2d(2),
    nn.AdaptiveMaxPool2d: lambda: nn.AdaptiveMaxPool2d(3),
    nn.AdaptiveAvgPool2d: lambda: nn.AdaptiveAvgPool2d(3),
    nn.LocalResponseNorm: lambda: nn.LocalResponseNorm(3),
    nn.ZeroPad2d: lambda: nn.ZeroPad2d(1),
}


@pytest.mark.parametrize("kind", sorted(PER_IMAGE_MODULES, key=lambda kind: kind.__name__))
def test_every_module_returns_the_same_in_micro_batches(kind: type[nn.Module]) -> None:
    made = MADE.get(kind, kind)()
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(made if isinstance(made, nn.Sequential) else [made]))
    whole = images(10, 16)
    expected = randomised(network)(whole)
    split, seen = prepared(network)
    torch.testing.assert_close(split(whole), expected, rtol=1e-5, atol=1e-5)
    assert len(sizes(seen["0"])) > 1


@pytest.mark.parametrize("module", [DependsOnTheBatch, _norm_by_batch, _watched, _replaced, _flat])
def test_a_module_that_may_depend_on_the_whole_batch_receives_the_whole_batch(module: Callable[[], nn.Module]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), module(), nn.ReLU()).eval()
    whole = images(10, 16)
    expected = network(whole)
    split, seen = prepared(network)
    assert torch.equal(split(whole), expected)
    assert sizes(seen["0"]) == [10]


class Skips(nn.Sequential):
    """A Sequential that overrides the forward."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = x + module(x)
        return x


def test_a_sequential_that_overrides_the_forward_keeps_it() -> None:
    network = randomised(Skips(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()))
    whole = images(40, 16)
    expected = network(whole)
    assert torch.equal(prepared(network)[0](whole), expected)


def test_the_models_own_forward_stays() -> None:
    model, whole = small_vgg(), images(10, 16)
    calibrate(model, find_sites(model, whole), [whole])
    assert all("forward" not in vars(module) for module in model.modules())
    sizes: list[int] = []
    model.features[0].register_forward_hook(lambda _module, _inputs, output: sizes.append(len(output)))
    model(whole)
    assert sizes == [10]
