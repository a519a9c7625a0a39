import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet18

from bn_insert import CalibrationError, calibrate, find_sites, insert_at, insert_batchnorm, recalibrate
from support.networks import (
    AnyModule,
    CalledTwice,
    features,
    images,
    narrow_vgg,
    randomised,
    sequential,
    small_vgg,
)
from support.references import mean_and_var


def tuned_vgg(dropout: float = 0.5) -> nn.Module:
    """Return a VGG with BatchNorm behind every layer whose statistics, gamma and beta are none of its activations'."""
    return randomised(insert_batchnorm(small_vgg(dropout), [images(8, 16)]), seed=5)


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def given(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what each BatchNorm is given over all batches, by the model as it stands, in float64."""
    found: dict[str, list[Tensor]] = {name: [] for name in norms(model)}
    network = copy.deepcopy(model).double()
    for name, norm in norms(network).items():
        norm.register_forward_pre_hook(lambda _norm, inputs, name=name: found[name].append(inputs[0].clone()))
    with torch.no_grad():
        for batch in batches:
            network(batch.double())
    return {name: torch.cat(parts) for name, parts in found.items()}


def assert_statistics(model: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Check the mean relative to std and the variance relative to itself."""
    for name, norm in norms(model).items():
        mean, var = mean_and_var(expected[name])
        moving = var > 1e-12 * mean.square()
        assert moving.any()
        assert ((norm.running_mean - mean).abs() / var.sqrt())[moving].max() <= tolerance, name
        assert ((norm.running_var - var).abs() / var)[moving].max() <= tolerance, name


def everything_but_statistics(model: nn.Module) -> dict[str, bytes]:
    state = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    return {name: value for name, value in state.items() if "running_" not in name and "num_batches" not in name}


# The statistics


def test_with_running_statistics_the_new_ones_match_a_float64_reference_to_1e_5() -> None:
    model, x = tuned_vgg(), images(50, 16, seed=7)
    result = recalibrate(model, x.split(8), earlier="running")
    assert_statistics(result, given(model.eval(), x.split(8)))


def test_with_batch_statistics_the_new_ones_match_a_float64_reference_to_1e_5() -> None:
    model, batches = tuned_vgg(), images(50, 16, seed=7).split(8)
    result = recalibrate(model, batches)
    training = copy.deepcopy(model).train()
    for module in training.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert_statistics(result, given(training, batches))


@pytest.mark.parametrize("network", [lambda: narrow_vgg("vgg16_bn"), lambda: randomised(resnet18(num_classes=5))])
def test_deep_networks_match_a_float64_reference_too(network: Callable[[], nn.Module]) -> None:
    model, batches = network(), images(24, 32).split(8)
    result = recalibrate(model, batches, earlier="running")
    assert_statistics(result, given(model, batches), tolerance=1e-4)  # the forward itself is in float32


def test_an_unchanged_network_gets_the_figures_of_calibrate() -> None:
    model, batches = small_vgg(), images(50, 16).split(8)
    sites = find_sites(model, batches[0])
    moments = calibrate(model, sites, batches)
    result = recalibrate(insert_at(model, sites, moments), batches, earlier="running")
    assert len(norms(result)) == len(sites)
    for norm, site in zip(norms(result).values(), sites, strict=True):
        assert torch.equal(norm.running_mean, moments[site.name].mean.float())
        assert torch.equal(norm.running_var, moments[site.name].var.float())


def test_for_one_batch_the_statistics_are_those_of_pytorchs_own_update_bn() -> None:
    model, x = tuned_vgg(dropout=0), images(40, 16)
    result, expected = recalibrate(model, [x]), copy.deepcopy(model)
    update_bn([x], expected)
    for name, norm in norms(result).items():
        torch.testing.assert_close(norm.running_mean, norms(expected)[name].running_mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(norm.running_var, norms(expected)[name].running_var, rtol=1e-4, atol=1e-4)
        assert norm.num_batches_tracked == norms(expected)[name].num_batches_tracked


def test_with_running_statistics_it_does_not_matter_how_the_images_are_put_into_batches() -> None:
    model, x = tuned_vgg(), images(41, 16)
    whole, parts = (recalibrate(model, x.split(size), earlier="running") for size in (41, 1))
    for name, norm in norms(whole).items():
        torch.testing.assert_close(norms(parts)[name].running_mean, norm.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norms(parts)[name].running_var, norm.running_var, rtol=1e-5, atol=1e-6)


def test_a_batchnorm_called_twice_pools_both_calls() -> None:
    model = insert_batchnorm(randomised(CalledTwice()), [images(4, 9, channels=8)])
    x = images(12, 9, seed=4, channels=8)
    result = recalibrate(model, x.split(5), earlier="running")
    assert_statistics(result, given(model, x.split(5)))
    assert [int(norm.num_batches_tracked) for norm in norms(result).values()] == [6]


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), torch.randn(30, 4, 9)),
        (nn.Linear(4, 8), nn.BatchNorm1d(8), torch.randn(30, 4)),
        (nn.Conv2d(4, 8, 3), nn.SyncBatchNorm(8), torch.randn(30, 4, 5, 5)),
        (nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), torch.randn(30, 2, 5, 5, 5)),
        (nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False), torch.randn(30, 4, 5, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_batchnorm_is_recalibrated(layer: nn.Module, norm: nn.Module, x: Tensor) -> None:
    model = nn.Sequential(layer, norm)
    assert_statistics(recalibrate(model, x.split(8)), given(model, [x]))


def test_one_that_is_never_called_and_one_without_running_statistics_stay_as_they_are() -> None:
    model = sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    model.append(nn.BatchNorm1d(8, track_running_stats=False))
    model[1].unused = randomised(nn.BatchNorm1d(3))
    result = recalibrate(model, [features(30, 4)])
    assert torch.equal(result[1].unused.running_mean, model[1].unused.running_mean)
    assert result[1].unused.num_batches_tracked == 7
    assert result[3].running_mean is None
    assert not torch.equal(result[1].running_mean, model[1].running_mean)


def test_a_cumulative_average_goes_on_from_there_with_the_right_weight() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=None))
    batches = features(80, 4).split(20)
    result = recalibrate(model, batches[:3]).train()
    result(batches[3])
    assert result[0].num_batches_tracked == 4
    torch.testing.assert_close(result[0].running_mean, torch.cat(batches).mean(0))


# A single value a channel


def test_a_last_batch_of_one_image_is_normalized_with_all_that_was_seen_and_counts() -> None:
    model, x = sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 6), nn.BatchNorm1d(6)), features(41, 4)
    result = recalibrate(model, x.split(20))
    assert_statistics(result[:2], given(model[:2], [x]))
    assert result[3].running_var.isfinite().all()
    assert result[1].num_batches_tracked == 3


def test_a_first_batch_of_one_image_is_refused_with_the_place_and_the_way_out() -> None:
    model, x = sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), features(41, 4)
    with pytest.raises(CalibrationError, match=r"at least two values per channel and BatchNorm 1 received 1; use"):
        recalibrate(model, x.split([1, 40]))
    with pytest.raises(CalibrationError, match="BatchNorm 1 received 1"):
        recalibrate(model, [x[:1]], earlier="running")
    recalibrate(model, x.split([1, 40]), earlier="running")


def test_a_conv_network_takes_batches_of_one_image() -> None:
    model, x = sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), images(5, 9)
    assert_statistics(recalibrate(model, x.split(1)), given(model, [x]))


# What stays as it was


@pytest.mark.parametrize("earlier", ["batch", "running"])
def test_the_given_model_and_the_random_state_are_left_alone(earlier: Any) -> None:
    model = tuned_vgg().train()
    model.features[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags, random_state = [module.training for module in model.modules()], torch.get_rng_state()
    recalibrate(model, torch.utils.data.DataLoader(images(8, 16), batch_size=4, shuffle=True), earlier=earlier)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_in_the_copy_only_statistics_and_batch_counts_differ() -> None:
    model = tuned_vgg().train()
    model.features[0].eval()
    model.features[0].weight.requires_grad_(False)
    norms(model)["features.1"].momentum = None
    result = recalibrate(model, images(20, 16).split(8))
    assert type(result) is type(model)
    assert str(result) == str(model)
    assert everything_but_statistics(result) == everything_but_statistics(model)
    assert [module.training for module in result.modules()] == [module.training for module in model.modules()]
    assert [p.requires_grad for p in result.parameters()] == [p.requires_grad for p in model.parameters()]
    assert {int(norm.num_batches_tracked) for norm in norms(result).values()} == {3}
    assert not any(module._forward_pre_hooks for module in result.modules())
    with torch.no_grad():
        result(images(4, 16))  # the statistics are ordinary tensors that training can update


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_statistics_keep_their_dtype(dtype: torch.dtype) -> None:
    result = recalibrate(tuned_vgg().to(dtype), [images(20, 16)])
    assert {tensor.dtype for norm in norms(result).values() for tensor in (norm.running_mean, norm.running_var)} == {
        dtype
    }


def test_under_autocast_statistics_stay_float32_and_near() -> None:
    model, x = sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), images(16, 12)
    result = recalibrate(model, [x], autocast=torch.bfloat16)
    assert result[1].running_var.dtype == torch.float32
    assert_statistics(result, given(model, [x]), tolerance=0.02)


def test_batches_may_carry_labels_and_progress_counts_images() -> None:
    seen: list[int] = []
    model, x = tuned_vgg(), images(20, 16)
    labelled = [(part, torch.zeros(len(part))) for part in x.split(8)]
    result = recalibrate(model, labelled, progress=seen.append)
    assert seen == [8, 16, 20]
    plain = recalibrate(model, [{"image": part} for part in x.split(8)])
    assert all(
        torch.equal(a, b) for a, b in zip(result.state_dict().values(), plain.state_dict().values(), strict=True)
    )


# Errors


def with_nan(model: AnyModule, name: str) -> AnyModule:
    model.get_parameter(name).data[0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (small_vgg, [images(4, 16)], "VGG has no BatchNorm with running statistics"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
            [images(4, 16)],
            "Sequential has no BatchNorm with running statistics",
        ),
        (tuned_vgg, [], "the calibration set is empty"),
        (tuned_vgg, [images(4, 16), "no tensor"], "batch 1 is a str"),
        (tuned_vgg, [images(4, 16), images(4, 16, channels=2)], "the model failed on batch 1"),
        (
            lambda: with_nan(tuned_vgg(), "features.4.weight"),
            [images(4, 16)],
            r"activations of features.5 are not finite .* the parameter features.4.weight contains NaN",
        ),
        (tuned_vgg, [images(4, 16) * torch.inf], "activations of features.1 are not finite"),
    ],
    ids=["no BatchNorm", "no statistics", "no data", "no tensor", "wrong shape", "NaN weight", "Inf input"],
)
def test_an_error_names_the_fact_and_the_place(
    model: Callable[[], nn.Module], batches: list[Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        recalibrate(model(), batches)


def test_old_statistics_that_are_not_finite_matter_only_where_they_are_used() -> None:
    model = tuned_vgg()
    norms(model)["features.1"].running_var[0] = torch.nan
    with pytest.raises(CalibrationError, match=r"features.1 contain NaN or Inf, .* use earlier='batch'"):
        recalibrate(model, [images(20, 16)], earlier="running")
    assert norms(recalibrate(model, [images(20, 16)]))["features.1"].running_var.isfinite().all()


def test_an_unknown_mode_is_refused(unchecked: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    with pytest.raises(CalibrationError, match="earlier must be one of batch, running, not 'train'"):
        unchecked(recalibrate)(tuned_vgg(), [images(4, 16)], earlier="train")


def test_statistics_out_of_the_range_of_their_dtype_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).half()
    model[0].weight.data.fill_(200)
    with pytest.raises(CalibrationError, match=r"input of BatchNorm 1 is not finite in torch.float16"):
        recalibrate(model, [torch.tensor([[0.0, 0.0], [100.0, 100.0]])], earlier="running")
