from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import images, randomised, small_vgg
from references import activations, assert_moments
from torch import Tensor, nn

from bn_insert import CalibrationError, calibrate, find_sites, micro_batches

ONE_IMAGE = 8 * 16 * 16 * 4  # bytes of what small_vgg's first conv gives for an image of 16 x 16


@pytest.fixture(autouse=True)
def _room_for_three_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batches, "_BYTES_AT_A_TIME", 3 * ONE_IMAGE)


def prepared(network: nn.Module) -> tuple[nn.Module, dict[str, list[Tensor]]]:
    """Return the network split, and what each of its modules without children gives, call by call."""
    micro_batches.run_in_micro_batches(network, Counter())
    seen: dict[str, list[Tensor]] = {}
    for name, module in network.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: seen.setdefault(name, []).append(output.clone())
            )
    return network, seen


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
    sizes = {name: [len(output) for output in outputs] for name, outputs in seen.items()}
    assert sizes["features.0"] == [3, 3, 2, 2]
    assert len(sizes["features.3"]) < 4
    assert sizes["classifier.0"] == [10]


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


def test_images_of_several_sizes_are_split_each_by_its_own_size() -> None:
    model = small_vgg().features
    batches = [images(10, 16), images(10, 32), images(10, 16, seed=2)]
    sites = find_sites(model, batches[0])
    found = calibrate(model, sites, batches)
    for site in sites:
        outputs = [activations(model, [site.name], [batch])[site.name] for batch in batches]
        assert_moments(found[site.name], torch.cat([output.movedim(1, 0).flatten(1) for output in outputs], 1).t())


def test_a_value_that_is_not_finite_is_told_by_its_place_in_the_whole_batch() -> None:
    model, whole = small_vgg(), images(10, 16)
    whole[7, 0, 3, 3] = torch.inf
    with pytest.raises(CalibrationError, match=r"features\.0 are not finite.* image 7 of its batch"):
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


class LooksAtTheBatch(nn.Module):
    """Subtracts the mean over all images that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def _norm_by_batch() -> nn.Module:
    return nn.BatchNorm2d(8, track_running_stats=False)


def _watched() -> nn.Module:
    activation = nn.ReLU()
    activation.register_forward_hook(lambda _module, _inputs, output: output - output.mean(0))
    return activation


def _flat() -> nn.Module:
    return nn.Flatten(0, 1)


@pytest.mark.parametrize("module", [LooksAtTheBatch, _norm_by_batch, _watched, _flat])
def test_what_may_look_at_the_whole_batch_is_given_the_whole_batch(module: Callable[[], nn.Module]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), module(), nn.ReLU()).eval()
    whole = images(10, 16)
    expected = network(whole)
    split, seen = prepared(network)
    assert torch.equal(split(whole), expected)
    assert [len(output) for output in seen["0"]] == [10]


class Skips(nn.Sequential):
    """A Sequential with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = x + module(x)
        return x


def test_a_sequential_with_a_forward_of_its_own_keeps_it() -> None:
    network = randomised(Skips(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()))
    whole = images(40, 16)
    expected = network(whole)
    assert torch.equal(prepared(network)[0](whole), expected)


def test_the_given_model_is_not_split() -> None:
    model, whole = small_vgg(), images(10, 16)
    calibrate(model, find_sites(model, whole), [whole])
    assert all("forward" not in vars(module) for module in model.modules())
    sizes: list[int] = []
    model.features[0].register_forward_hook(lambda _module, _inputs, output: sizes.append(len(output)))
    model(whole)
    assert sizes == [10]
