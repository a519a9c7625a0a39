"""Scaling by powers of two between neighbouring layers: nothing changes, and gamma is near 1."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bn_insert import (
    Moments,
    calibrate,
    compare_outputs,
    equalize,
    find_edges,
    find_sites,
    fold_batchnorm,
    insert,
    insert_batchnorm,
    load_checkpoint,
)
from bn_insert.demo import network_path
from bn_insert.graph.sites import Placement
from bn_insert.graph.trace import Trace
from bn_insert.surgery.equalize import Consumer, Edge, edges_in, power_of_two_scales
from support.networks import images, narrow_vgg, randomised, sequential, torchvision_vgg

PLACEMENTS: tuple[Placement, ...] = ("before_activation", "after_activation")


def spread(model: nn.Module, decades: float = 3.0) -> nn.Module:
    """Give the channels of every layer scales between 10**-decades and 10**decades."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                scale = 10 ** (decades * (2 * torch.rand(len(module.weight), generator=generator) - 1))
                module.weight.mul_(scale.view(-1, *(1 for _ in module.weight.shape[1:])))
                if module.bias is not None:
                    module.bias.mul_(scale)
    return model


def gammas(model: nn.Module) -> dict[str, Tensor]:
    norms = nn.modules.batchnorm._BatchNorm
    return {name: norm.weight.detach() for name, norm in model.named_modules() if isinstance(norm, norms)}


def reasons(model: nn.Module, size: int = 16) -> dict[str, str]:
    example = images(2, size)
    return {edge.site: edge.reason for edge in find_edges(model, example, find_sites(model, example))}


def assert_unchanged(model: nn.Module, result: nn.Module, size: int) -> None:
    x = images(4, size, seed=9)
    for inputs in (x, x.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(result.eval()(inputs), model.eval()(inputs))


@pytest.mark.parametrize(
    ("network", "placement"), [(torchvision_vgg, PLACEMENTS[0]), (narrow_vgg, PLACEMENTS[1])], ids=["wide", "narrow"]
)
def test_logits_are_bit_identical_and_folding_keeps_them(
    network: Callable[[str], nn.Module], placement: Placement
) -> None:
    model = spread(network("vgg11" if network is torchvision_vgg else "vgg16"), 0.5)
    result = insert_batchnorm(model, [images(8)], equalize=True, placement=placement)
    assert_unchanged(model, result, 32)
    assert_unchanged(model, fold_batchnorm(result, images(1)), 32)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gamma_is_near_1_in_every_channel_that_is_not_constant(placement: Placement) -> None:
    model, x = spread(narrow_vgg("vgg11"), 0.5), images(8)
    insertion = insert(model, [x], equalize=True, placement=placement)
    assert not any(edge.reason for edge in insertion.edges)
    for site, gamma in zip(insertion.sites, gammas(insertion.model).values(), strict=True):
        alive = insertion.moments[site.name].m2 > 0
        assert alive.any()
        assert ((gamma[alive] >= 0.70) & (gamma[alive] <= 1.42)).all(), site.name


def test_one_trace_has_the_edges_that_are_found_in_the_model() -> None:
    model, x = narrow_vgg("vgg11"), images(2)
    sites = find_sites(model, x)
    assert edges_in(Trace.of(model, x), sites) == find_edges(model, x, sites)


def test_without_equalization_gamma_is_far_from_1() -> None:
    result = insert_batchnorm(spread(narrow_vgg("vgg11"), 0.5), [images(8)])
    assert max(float(gamma.max()) for gamma in gammas(result).values()) > 10


def test_the_demo_network_is_equalized_everywhere_and_unchanged() -> None:
    model = load_checkpoint(network_path())
    insertion = insert(model, [images(16)], equalize=True)
    assert [edge.reason for edge in insertion.edges] == [""] * 8
    assert_unchanged(model, insertion.model, 32)


def test_the_given_model_is_left_alone() -> None:
    model = spread(narrow_vgg("vgg11"))
    before = copy.deepcopy(model.state_dict())
    insert_batchnorm(model, [images(8)], equalize=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_scaled_moments_are_those_of_the_equalized_network() -> None:
    model, x = spread(narrow_vgg("vgg11"), 0.5), images(8)
    sites = find_sites(model, x)
    result = copy.deepcopy(model)
    predicted = equalize(result, find_edges(model, x, sites), calibrate(model, sites, [x]))
    for name, measured in calibrate(result, sites, [x]).items():
        assert torch.equal(predicted[name].mean, measured.mean)
        assert torch.equal(predicted[name].m2, measured.m2)


def moments_with(std: Tensor) -> Moments:
    return Moments(101, torch.zeros_like(std), std.square() * 100)


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=20))
def test_scales_are_the_powers_of_two_nearest_by_ratio(std: list[float]) -> None:
    scales = power_of_two_scales(moments_with(torch.tensor(std, dtype=torch.float64)))
    for value, scale in zip(std, scales.tolist(), strict=True):
        assert math.frexp(scale)[0] == 0.5
        assert 0.7071 <= value / scale <= 1.41422


def test_constant_channels_get_scale_1() -> None:
    scales = power_of_two_scales(moments_with(torch.tensor([0.0, 4.0], dtype=torch.float64)))
    assert scales.tolist() == [1.0, 4.0]


Build = Callable[[], nn.Module]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.head(F.relu(x + self.b(x)).mean((2, 3)))


class TwoConsumers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        both = torch.cat([F.relu(self.b(x)), F.relu(self.c(x))], 1)
        return self.head(F.adaptive_avg_pool2d(both, 1).flatten(1))


def grouped() -> nn.Module:
    return sequential(
        *(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1), nn.Conv2d(8, 8, 3, groups=8), nn.PReLU(8)),
        *(nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(6, 4, 3, groups=2)),
        *(nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(16, 5)),
    )


@pytest.mark.parametrize("build", [grouped, TwoConsumers], ids=["grouped, depthwise, transposed", "two consumers"])
def test_every_kind_of_conv_and_any_number_of_consumers_are_equalized_exactly(build: Build) -> None:
    model = spread(randomised(build()), 1.0)
    insertion = insert(model, [images(8, 16)], equalize=True)
    assert not any(edge.reason for edge in insertion.edges)
    assert_unchanged(model, insertion.model, 16)
    assert_unchanged(model, fold_batchnorm(insertion.model, images(1, 16)), 16)


def test_branches_that_are_concatenated_are_equalized() -> None:
    # That its outputs stay the same is tested in end_to_end/test_architectures.py.
    model = randomised(torchvision.models.squeezenet1_1(num_classes=5))
    assert sum(not reason for reason in reasons(model, 64).values()) == 25


def between(*modules: nn.Module) -> nn.Module:
    return sequential(nn.Conv2d(3, 8, 3), *modules, nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 5))


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.again(F.relu(self.again(F.relu(self.first(x)))))))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        shallow = F.relu(self.a(x))
        return [shallow, F.relu(self.b(shallow))]


def tied() -> nn.Module:
    model = sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()
    )
    model[4].weight = model[2].weight
    return model


def weight_normalized() -> nn.Module:
    model = between(nn.ReLU())
    nn.utils.parametrizations.weight_norm(model[2])
    return model


@pytest.mark.parametrize(
    ("build", "site", "reason"),
    [
        (lambda: between(nn.Sigmoid()), "0", r"^sigmoid \(1\) does not preserve its scale$"),
        (lambda: between(nn.GELU()), "0", "gelu"),
        (lambda: between(nn.ReLU6()), "0", "relu6|hardtanh"),
        (Residual, "a", "^add combines it with other values$"),
        (Residual, "b", "^add combines it with other values$"),
        (CalledTwice, "again", "called 2 times"),
        (Encoder, "a", "an output of the model"),
        (tied, "0", r"the weight of 2 is shared with another layer"),
        (weight_normalized, "0", r"the weight of 2 is computed in each forward pass"),
    ],
    ids=["sigmoid", "gelu", "relu6", "add", "branch", "called twice", "outputs", "tied", "weight norm"],
)
def test_an_edge_that_cannot_be_equalized_says_why_and_nothing_changes(build: Build, site: str, reason: str) -> None:
    model = randomised(build())
    insertion = insert(model, [images(8, 16)], equalize=True)
    found = {edge.site: edge.reason for edge in insertion.edges}
    assert re.search(reason, found[site]), found
    assert compare_outputs(model, insertion.model, [images(4, 16, seed=9)]).bit_identical


@pytest.mark.parametrize("factor", [2.0**120, 2.0**-120], ids=["overflow", "underflow"])
def test_a_channel_whose_weights_would_lose_bits_keeps_its_scale(factor: float) -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1)))
    with torch.no_grad():
        model[0].weight[1] *= factor
        model[0].bias[1] = 0
        model[2].weight[:, 1] *= 2.0**20 if factor > 1 else 2.0**-20
    x = images(8, 8)
    sites = find_sites(model, x)
    result = copy.deepcopy(model)
    equalize(result, find_edges(model, x, sites), calibrate(model, sites, [x]))
    assert torch.equal(result[0].weight[1], model[0].weight[1])
    assert not torch.equal(result[0].weight[0], model[0].weight[0])
    assert torch.equal(result(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_bit_identical(dtype: torch.dtype) -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())).to(dtype)
    x = images(8, 8).to(dtype)
    assert torch.equal(insert_batchnorm(model, [x], equalize=True)(x), model(x))


@settings(max_examples=10, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    activations=st.lists(st.sampled_from(["relu", "leaky", "pool", "none"]), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_random_stacks_stay_bit_identical_and_fold_back(widths: list[int], activations: list[str], seed: int) -> None:
    modules_of = {"relu": nn.ReLU(), "leaky": nn.LeakyReLU(0.2), "pool": nn.MaxPool2d(2), "none": nn.Identity()}
    modules: list[nn.Module] = []
    channels = 3
    for width, activation in zip(widths, activations, strict=False):
        modules += [nn.Conv2d(channels, width, 3, padding=1), modules_of[activation]]
        channels = width
    model = spread(
        randomised(sequential(*modules, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(channels * 4, 3)), seed)
    )
    x = images(4, 16)
    result = insert_batchnorm(model, [x], equalize=True)
    assert torch.equal(result(x), model(x))
    assert torch.equal(fold_batchnorm(result, x)(x), model(x))


def balanced(model: nn.Sequential) -> nn.Sequential:
    """Give the channels between neighboring convs scales up to 10**3 apart, without blowing up their product."""
    generator = torch.Generator().manual_seed(3)
    convs = [module for module in model if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for layer, reader in pairwise(convs):
            assert layer.bias is not None
            scale = 10 ** (3.0 * (2 * torch.rand(layer.out_channels, generator=generator) - 1))
            layer.weight.mul_(scale[:, None, None, None])
            layer.bias.mul_(scale)
            reader.weight.div_(scale[None, :, None, None])
    return model


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_channels_six_decades_apart_stay_bit_identical_with_gamma_near_1(placement: Placement) -> None:
    model, x = narrow_vgg("vgg11"), images(8)
    balanced(model.features)
    insertion = insert(model, [x], equalize=True, placement=placement)
    assert_unchanged(model, insertion.model, 32)
    for site, gamma in zip(insertion.sites, gammas(insertion.model).values(), strict=True):
        alive = insertion.moments[site.name].m2 > 0
        assert ((gamma[alive] >= 0.70) & (gamma[alive] <= 1.42)).all(), site.name


class Between(nn.Module):
    """Two layers and whatever is done between them."""

    def __init__(self, first: nn.Module, last: nn.Module, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.way = first, last, way

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(F.relu(self.first(x))))


def changed_through_a_view(x: Tensor) -> Tensor:
    x.flatten(1).add_(1.0)
    return x


def changed_through_detach(x: Tensor) -> Tensor:
    x.detach().sigmoid_()
    return x


def gated_by_the_mean_of_everything(x: Tensor) -> Tensor:
    return x / (x.mean() + 1)


def shifted_by_the_sum_of_everything(x: Tensor) -> Tensor:
    return x + x.sum()


CONVS = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
ROWS = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
LINES = torch.randn(8, 3, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("layers", "way", "x", "reason"),
    [
        (CONVS, changed_through_a_view, images(8, 16), "^add combines"),
        (CONVS, changed_through_detach, images(8, 16), "^sigmoid does not"),
        (CONVS, gated_by_the_mean_of_everything, images(8, 16), "^(mean|div) "),
        (CONVS, shifted_by_the_sum_of_everything, images(8, 16), "^(sum|add) "),
        (CONVS, lambda x: F.hardtanh(x, 0, 4), images(8, 16), "^hardtanh does not"),
        (CONVS, lambda x: F.pad(x, (1, -1), value=1.0), images(8, 16), "^pad does not"),
        (
            (nn.Linear(6, 8), nn.Linear(10, 4)),
            lambda x: F.pad(x, (1, 1), mode="reflect"),
            ROWS,
            "^pad does not",
        ),
        ((nn.Conv1d(3, 8, 3), nn.Conv1d(8, 4, 1)), lambda x: F.avg_pool2d(x, 3, 1, 1), LINES, "^avg_pool2d does not"),
        ((nn.Conv1d(3, 8, 3), nn.Conv1d(4, 4, 1)), lambda x: F.max_pool2d(x, 2), LINES, "^max_pool2d does not"),
    ],
    ids=[
        *("in place on a view", "in place on detach", "mean", "sum", "hardtanh", "ones"),
        *("reflected channels", "avg pool", "max pool"),
    ],
)
def test_what_mixes_channels_or_writes_through_an_alias_blocks_the_edge(
    layers: tuple[nn.Module, nn.Module], way: Callable[[Tensor], Tensor], x: Tensor, reason: str
) -> None:
    model = randomised(Between(*map(copy.deepcopy, layers), way))
    insertion = insert(model, [x], equalize=True)
    (edge,) = insertion.edges
    assert re.search(reason, edge.reason), edge
    assert torch.equal(insertion.model(x), model(x))


@pytest.mark.parametrize(
    ("layers", "way"),
    [
        ((nn.Conv2d(3, 8, 3), nn.Linear(8, 4)), lambda x: x.mean((2, 3))),
        ((nn.Conv2d(3, 8, 3), nn.Linear(8, 4)), lambda x: x.amax((2, 3))),
        ((nn.Conv2d(3, 8, 3), nn.Linear(8, 4)), lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)),
        ((nn.Conv2d(3, 8, 3), nn.Linear(8, 4)), lambda x: F.adaptive_max_pool2d(x, 1).flatten(1)),
        ((nn.Conv2d(3, 8, 3), nn.Linear(72, 4)), lambda x: F.adaptive_avg_pool2d(x, 3).reshape(len(x), -1)),
        (CONVS, lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
        (CONVS, lambda x: F.pad(x, (1, 2, 1, 2))),
        (CONVS, lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
        (CONVS, lambda x: F.hardtanh(x, 0, math.inf)),
        (CONVS, lambda x: F.threshold(x, 0, 0)),
        (CONVS, lambda x: x.clip(min=0)),
        (CONVS, lambda x: x.flatten(2).unflatten(2, x.shape[2:])),
        (CONVS, lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact")),
        ((nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular")), lambda x: x),
        ((nn.Conv2d(3, 8, 3), nn.Conv2d(9, 4, 3)), lambda x: torch.cat([torch.ones(len(x), 1, 14, 14), x], 1)),
    ],
    ids=[
        *("mean", "amax", "squeeze", "adaptive max", "blocks", "reflect", "zeros", "upsample"),
        *("hardtanh", "threshold", "clip", "unflatten", "nearest exact", "circular"),
        "concatenated with a constant",
    ],
)
def test_ways_that_keep_the_scale_are_equalized_exactly(
    layers: tuple[nn.Module, nn.Module], way: Callable[[Tensor], Tensor]
) -> None:
    model, x = randomised(Between(*map(copy.deepcopy, layers), way)), images(8, 16)
    spread(model, 1.0)
    insertion = insert(model, [x], equalize=True)
    assert not insertion.edges[0].reason
    assert torch.equal(insertion.model(x), model(x))
    assert torch.equal(fold_batchnorm(insertion.model, x)(x), model(x))


@pytest.mark.parametrize("active", [False, True])
def test_an_alpha_dropout_blocks_the_edge_where_it_is_active_in_eval_mode_too(active: bool) -> None:
    model, x = Between(*map(copy.deepcopy, CONVS), lambda x: F.alpha_dropout(x, training=active)), images(2, 16)
    (edge,) = find_edges(model, x, find_sites(model, x))
    assert edge.reason == ("alpha_dropout does not preserve its scale" if active else "")


class Concatenated(nn.Module):
    """Two layers, concatenated by one of the names of the function, flattened, and read by a dense layer."""

    def __init__(self, concatenate: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 6, 3), nn.Linear(14 * 196, 5)
        self.concatenate = concatenate

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.concatenate([F.relu(self.a(x)), F.relu(self.b(x))], 1).flatten(1))


@pytest.mark.parametrize("concatenate", [torch.cat, torch.concat, torch.concatenate], ids=lambda f: f.__name__)
def test_the_reader_of_a_concatenation_scales_each_branchs_own_columns(concatenate: Callable[..., Tensor]) -> None:
    model, x = spread(randomised(Concatenated(concatenate)), 1.0), images(8, 16)
    insertion = insert(model, [x], equalize=True)
    assert insertion.edges == (
        Edge("a", (Consumer("head", 0, 196),)),
        Edge("b", (Consumer("head", 8 * 196, 196),)),
    )
    assert_unchanged(model, insertion.model, 16)


def test_dense_layers_written_as_convs_are_equalized_too() -> None:
    model = randomised(timm.models.vgg.VGG([8, "M", 12, "M"], num_classes=4, mlp_ratio=0.01))
    insertion = insert(model, [images(8)], equalize=True)
    assert {edge.reason for edge in insertion.edges} == {""}
    assert_unchanged(model, insertion.model, 32)


def test_a_shared_bias_is_named_as_such() -> None:
    model = sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
    model[4].bias = model[2].bias
    assert reasons(model)["0"] == "the bias of 2 is shared with another layer"


def test_one_edge_divides_rows_of_the_layer_and_multiplies_columns_of_its_reader() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)))
    edge, scale = Edge("0", (Consumer("3", 0, 4),)), torch.tensor([4.0, 0.5])
    result = copy.deepcopy(model)
    moments = equalize(result, [edge], {"0": moments_with(scale.double())})
    assert torch.equal(result[0].weight, model[0].weight / scale[:, None, None, None])
    assert torch.equal(result[0].bias, model[0].bias / scale)
    assert torch.equal(result[3].weight, model[3].weight * scale.repeat_interleave(4))
    assert torch.equal(result[3].bias, model[3].bias)
    assert moments["0"].std.tolist() == [1.0, 1.0]


def test_weights_larger_than_a_block_lose_no_bits_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bn_insert.surgery.scale_weights._WEIGHTS_AT_A_TIME", 10)
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)))
    with torch.no_grad():
        model[2].weight[5, 4, 2, 2] = 2.0**-140  # in the last block; 2**-149 is the smallest number
    edge, scale = Edge("0", (Consumer("2"),)), torch.full((8,), 2.0**-12)
    result = copy.deepcopy(model)
    equalize(result, [edge], {"0": moments_with(scale.double())})
    kept = [torch.equal(result[0].weight[channel], model[0].weight[channel]) for channel in (0, 1, 3, 4, 6, 7)]
    assert kept == [False, False, False, True, False, False]
    assert torch.equal(result[2].weight[:, 4], model[2].weight[:, 4])


def test_memory_format_and_requires_grad_of_the_weights_stay() -> None:
    model = between(nn.ReLU()).to(memory_format=torch.channels_last)
    model[0].requires_grad_(False)
    result = insert_batchnorm(model, [images(8, 16)], equalize=True)
    assert [result[0].weight.requires_grad, result[3].weight.requires_grad] == [False, True]
    assert not torch.equal(result[0].weight, model[0].weight)
    for layer, original in ((result[0], model[0]), (result[3], model[2])):
        assert layer.weight.stride() == original.weight.stride()
