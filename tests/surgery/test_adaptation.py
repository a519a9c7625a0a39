"""Adapting a network to new images: what moves, what stays, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_insert import (
    CalibrationError,
    GraphError,
    adapt,
    adapt_statistics,
    compare_outputs,
    insert_batchnorm,
    load_checkpoint,
    recalibrate,
    save_checkpoint,
)
from bn_insert.demo import images_path, network_path
from bn_insert.surgery.history import History
from support.digits import images_of
from support.networks import images, randomised, sequential, small_vgg


def source() -> Tensor:
    return images(96, 16, seed=3)


def shifted(x: Tensor) -> Tensor:
    """Return images of less contrast, and darker."""
    return 0.2 * x - 0.5


def labels() -> Tensor:
    """Return the class of each of the demo's images, in the order of their files."""
    files = sorted(images_path().rglob("*.png"))
    return torch.tensor([int(file.parent.name) for file in files])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.inference_mode():
        return float((model(x).argmax(1) == y).double().mean())


def digits_of_low_contrast() -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """Return the demo's network, its images, their classes, the images at low contrast, and a random order."""
    x, y = images_of(images_path())[::3], labels()[::3]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return load_checkpoint(network_path()).eval(), x, y, 0.25 + 0.15 * x, order


# What adapting does


def test_a_network_works_on_images_of_low_contrast_again_also_with_few_of_them() -> None:
    model, x, y, dark, order = digits_of_low_contrast()
    assert accuracy(model, dark, y) < 0.7
    for count, least in ((len(x), 0.94), (32, 0.88), (8, 0.78)):
        adapted = adapt_statistics(model, x[order].split(32), dark[order[:count]].split(32))
        assert accuracy(adapted, dark, y) > least, count
    with pytest.warns(UserWarning, match="nothing was adapted: with 8 target .* knows, there is nothing to gain;"):
        unchanged = adapt_statistics(model, x[order].split(32), x[order[:8]].split(8))
    assert accuracy(unchanged, x, y) > accuracy(model, x, y) - 0.01


@pytest.mark.parametrize("batch", [32, 120])
def test_a_source_in_the_order_of_its_classes_or_in_one_batch_is_as_good_as_a_shuffled_one(batch: int) -> None:
    model, x, y, dark, order = digits_of_low_contrast()
    shuffled, sorted_ = (adapt(model, source.split(batch), dark[order[:8]].split(8)) for source in (x[order], x))
    assert accuracy(shuffled.model, dark, y) > 0.78
    assert accuracy(sorted_.model, dark, y) == accuracy(shuffled.model, dark, y)
    errors = [adaptation.insertion.moments["features.0"].standard_error for adaptation in (shuffled, sorted_)]
    torch.testing.assert_close(errors[0], errors[1])


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_small_batches_adapt_as_well_as_large_ones(batch: int) -> None:
    model, x, y, dark, order = digits_of_low_contrast()
    adapted = adapt_statistics(model, x[order].split(32), dark[order].split(batch))
    assert accuracy(adapted, dark, y) > 0.94


def test_the_result_has_the_modules_and_keys_of_the_original_and_other_weights() -> None:
    model = small_vgg()
    result = adapt_statistics(model, source().split(16), shifted(source()).split(16))
    assert type(result) is type(model)
    assert [name for name, _ in result.named_modules()] == [name for name, _ in model.named_modules()]
    fresh = small_vgg()
    fresh.load_state_dict(result.state_dict(), strict=True)
    assert compare_outputs(fresh, result, [source()]).bit_identical
    assert not compare_outputs(model, result, [source()]).within(rtol=1e-3)


def test_folded_it_equals_the_network_with_batchnorm_up_to_rounding() -> None:
    found = adapt(small_vgg(), source().split(16), shifted(source()).split(16))
    assert compare_outputs(found.with_batchnorm, found.model, [shifted(source())]).within(rtol=1e-4)


def test_without_shrinkage_it_is_an_insertion_that_is_recalibrated() -> None:
    model, target = small_vgg(), shifted(source()).split(32)
    result = adapt_statistics(model, source().split(16), target, shrink=False, keep_batchnorm=True)
    expected = recalibrate(insert_batchnorm(model, source().split(16)), target)
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in result.state_dict().items())


def test_on_the_images_of_the_source_nothing_changes() -> None:
    model = small_vgg()
    with pytest.warns(UserWarning, match="nothing was adapted"):
        result = adapt_statistics(model, source().split(16), [source()])
    assert compare_outputs(model, result, [source()]).within(rtol=1e-3)


def test_the_shift_is_that_of_the_first_layers_activations() -> None:
    model = sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    x = images(64, 8)
    found = adapt(model, x.split(16), shifted(x).split(16))
    (shift,) = found.shifts
    before, after = (model[0](each).transpose(0, 1).flatten(1).double() for each in (x, shifted(x)))
    varying = before.var(1) > 0
    torch.testing.assert_close(shift.std, (after.std(1) / before.std(1))[varying].detach(), rtol=1e-4, atol=1e-6)
    expected = ((after.mean(1) - before.mean(1)) / before.std(1))[varying].detach()
    torch.testing.assert_close(shift.mean, expected, rtol=1e-4, atol=1e-4)
    assert shift.layer == "0"
    assert shift.to_dict().keys() == {"layer", "mean", "mean_size", "std", "std_median", "sampling_error"}
    assert shift.std_median == pytest.approx(float(shift.std.quantile(0.5)))
    assert (found.source_images, found.target_images) == (64, 64)


def test_with_many_images_shrinkage_does_not_change_what_is_measured_but_with_few_it_does() -> None:
    model, target = small_vgg(), shifted(source())
    for count, same in ((96, True), (8, False)):
        shrunk, raw = (
            adapt(model, source().split(16), target[:count].split(32), shrink=flag) for flag in (True, False)
        )
        last = [found.shifts[-1].mean for found in (shrunk, raw)]
        assert torch.equal(*last) is same, count


def test_one_target_image_is_enough() -> None:
    model = small_vgg()
    found = adapt(model, source().split(16), [shifted(source())[:1]], keep_batchnorm=True)
    assert found.target_images == 1
    assert all(value.isfinite().all() for value in found.model.state_dict().values())
    dense = insert_batchnorm(model, source().split(16)).classifier[1].running_var
    assert torch.equal(found.model.classifier[1].running_var, dense), "a single value has no variance"


@pytest.mark.parametrize("batch", [32, 8])
def test_one_unusual_image_among_a_few_changes_nothing(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = source()[:32].clone()
    target[5] *= 20
    assert not adapt(small_vgg(), source().split(16), target.split(batch)).changed
    monkeypatch.setattr("bn_insert.statistics.recorder.moments_by_image", lambda _values: None)
    assert adapt(small_vgg(), source().split(16), target.split(batch)).changed, "where no image is left out"


def test_keep_batchnorm_leaves_the_layers_in_to_train_on() -> None:
    found = adapt(small_vgg(), source().split(16), shifted(source()).split(16), keep_batchnorm=True)
    assert found.folded == ()
    assert sum(isinstance(module, _BatchNorm) for module in found.model.modules()) == len(found.shifts)


def test_a_network_with_batchnorm_needs_no_source_and_keeps_its_layers() -> None:
    model = randomised(insert_batchnorm(small_vgg(), [source()]), seed=5)
    found = adapt(model, None, shifted(source()).split(32))
    assert found.model.state_dict().keys() == model.state_dict().keys()
    assert found.folded == ()
    assert not compare_outputs(model, found.model, [source()]).within(rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"layers": "conv"}, "layers"),
        ({"skip": ["features.*"], "include_output": True}, "include_output and skip"),
        ({"placement": "after_activation"}, "placement"),
        ({"eps": 0.1, "momentum": None}, "eps and momentum"),
    ],
)
def test_layers_cannot_be_chosen_where_none_gets_a_batchnorm(options: dict[str, Any], names: str) -> None:
    model = insert_batchnorm(small_vgg(), [source()])
    with pytest.raises(GraphError, match=f"^leave out {names}: without a source, no BatchNorm is inserted"):
        adapt_statistics(model, None, shifted(source()).split(32), **options)
    with pytest.raises(CalibrationError, match=r"^VGG has no BatchNorm: pass images"):
        adapt_statistics(small_vgg(), None, shifted(source()).split(32), **options)


@pytest.mark.parametrize("momentum", [None, 0.01])
def test_a_momentum_is_refused_unless_the_batchnorms_that_get_it_are_kept(momentum: float | None) -> None:
    batches = source().split(32), shifted(source()).split(32)
    with pytest.raises(GraphError, match=r"^leave out momentum, .*, unless they are kept \(keep_batchnorm=True\)$"):
        adapt_statistics(small_vgg(), *batches, momentum=momentum)
    kept = adapt_statistics(small_vgg(), *batches, momentum=momentum, keep_batchnorm=True)
    assert {norm.momentum for norm in kept.modules() if isinstance(norm, _BatchNorm)} == {momentum}


def test_batchnorms_that_were_there_stay_and_those_inserted_are_folded() -> None:
    model = randomised(insert_batchnorm(small_vgg(), [source()], layers="conv"), seed=5)
    found = adapt(model, source().split(16), shifted(source()).split(16))
    assert found.model.state_dict().keys() == model.state_dict().keys()
    assert len(found.folded) == len(found.shifts) - sum(isinstance(module, _BatchNorm) for module in model.modules())
    assert compare_outputs(found.with_batchnorm, found.model, [source()]).within(rtol=1e-4)


def test_only_the_layers_asked_for_change() -> None:
    model = small_vgg()
    result = adapt_statistics(model, source().split(16), shifted(source()).split(16), layers="conv")
    assert torch.equal(result.classifier[0].weight, model.classifier[0].weight)
    assert not torch.equal(result.features[0].weight, model.features[0].weight)


def test_the_given_model_is_left_alone() -> None:
    model = small_vgg().train()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    result = adapt_statistics(model, source().split(16), shifted(source()).split(16))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert result.training


def test_images_of_another_size_work_where_the_network_takes_them() -> None:
    found = adapt(small_vgg(), source().split(16), [shifted(images(16, 24))])
    assert found.target_images == 16


def test_progress_counts_the_images_of_both_passes() -> None:
    seen: list[int] = []
    adapt_statistics(small_vgg(), source().split(48), shifted(source()).split(48), progress=seen.append)
    assert seen == [48, 96, 144, 192]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, [torch.rand(4, 3, 16, 16)]), CalibrationError, "VGG has no BatchNorm: pass images of the kind that"),
        (
            ([torch.rand(4, 3, 16, 16)], []),
            CalibrationError,
            "^target: the calibration set is empty: the iterable",
        ),
        (
            ([], [torch.rand(4, 3, 16, 16)]),
            CalibrationError,
            "^source: the calibration set is empty: the iterable",
        ),
        (([torch.rand(4, 3, 16, 16)], [torch.rand(4, 5, 16, 16)]), (GraphError, CalibrationError), "5"),
        (([torch.rand(4, 3, 16, 16)], [torch.full((4, 3, 16, 16), torch.nan)]), CalibrationError, "not finite"),
    ],
)
def test_an_error_names_the_fact(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        adapt_statistics(small_vgg(), *arguments)


def test_a_network_without_a_place_for_batchnorm_is_refused() -> None:
    message = r"^nothing to adapt: no BatchNorm can be inserted into Sequential: 1 \(output layer\)$"
    with pytest.raises(GraphError, match=message):
        adapt_statistics(sequential(nn.Flatten(), nn.Linear(12, 3)), [torch.rand(4, 3, 2, 2)], [torch.rand(4, 3, 2, 2)])


class CountsItsModules(nn.Module):
    """Returns other values once there are more modules."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) * len(list(self.modules()))


def test_a_network_whose_outputs_an_insertion_would_change_is_not_adapted() -> None:
    batches = torch.rand(16, 3, 8, 8).split(8)
    with pytest.raises(GraphError, match="returns different outputs than without"):
        adapt_statistics(CountsItsModules().eval(), batches, batches)


class DependsOnValues(nn.Module):
    """What it calls depends on the values of its input, so that nothing can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dense = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        return self.dense(x if x.sum() > -1 else -x)


def test_a_forward_that_depends_on_values_is_refused_before_the_first_pass_unless_batchnorm_is_kept() -> None:
    x = images(16, 8)
    seen: list[int] = []
    with pytest.raises(GraphError, match="keep the BatchNorms"):
        adapt(DependsOnValues(), iter(x.split(8)), x.split(8), progress=seen.append)
    assert seen == []
    adapt(DependsOnValues(), iter(x.split(8)), x.split(8), keep_batchnorm=True, progress=seen.append)
    assert seen == [8, 16, 24, 32]


def test_a_layer_that_cannot_be_folded_into_is_refused_with_the_way_to_keep_its_batchnorm() -> None:
    model = sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU())
    with pytest.raises(GraphError, match=r"the parametrization WeightNorm.* Or keep .*\(keep_batchnorm=True\)"):
        adapt(model, [source()], [shifted(source())], include_output=True)


def test_a_single_image_is_refused_with_the_name_of_the_users_layer_and_of_source_or_target() -> None:
    one = [shifted(source())[:1]]
    ways = r"; or adapt only conv layers \(layers='conv'\), or leave out shrink=False$"
    message = r"^target: a variance needs at least two values .* the BatchNorm after classifier\.0 received 1; .*"
    with pytest.raises(CalibrationError, match=message + ways):
        adapt_statistics(small_vgg(), source().split(16), one, shrink=False)
    with pytest.raises(CalibrationError, match=r"^source: dense layer classifier\.0: a variance needs at least two"):
        adapt_statistics(small_vgg(), one, source().split(16))
    adapt_statistics(small_vgg(), source().split(16), one, shrink=False, layers="conv")


def test_arguments_that_are_wrong_for_any_batches_are_not_said_to_be_those_of_the_source() -> None:
    with pytest.raises(CalibrationError, match=r"^tolerance must be"):
        adapt_statistics(small_vgg(), [source()], [source()], tolerance=-1.0)


# What is recorded, and what is warned of


@pytest.mark.parametrize("keep", [True, False])
def test_a_file_records_that_it_was_adapted_also_where_its_keys_are_those_of_the_original(
    keep: bool, tmp_path: Path
) -> None:
    adapted = adapt_statistics(
        small_vgg(), source().split(16), shifted(source()).split(16), keep_batchnorm=keep, layers="conv"
    )
    save_checkpoint(adapted, tmp_path / "adapted.pth")
    for model in (None, small_vgg):
        loaded = load_checkpoint(tmp_path / "adapted.pth", model=model)
        assert [change.description for change in History.of(loaded).adaptations] == ["adapted to 96 images"]


def test_a_source_for_a_network_that_was_adapted_before_is_warned_of_until_the_original_is_adapted() -> None:
    x, dark, darker = source().split(16), shifted(source()).split(16), shifted(shifted(source())).split(16)
    adapted = adapt_statistics(small_vgg(), x, dark)
    message = r"^this network was already adapted to 96 images: source must be images of the kind that it was adapted"
    with pytest.warns(UserWarning, match=message):
        twice = adapt_statistics(adapted, dark, darker)
    assert len(History.of(twice).adaptations) == 2
    assert History.of(small_vgg()).adaptations == ()
    kept = adapt_statistics(small_vgg(), x, dark, keep_batchnorm=True)
    adapt_statistics(kept, None, darker)  # its own statistics are those of what it was adapted to


def test_a_network_that_was_not_changed_is_not_recorded_as_adapted() -> None:
    found = adapt(small_vgg(), source().split(16), [source()])
    assert not found.changed
    assert History.of(found.model).adaptations == ()


def test_layers_whose_activations_hardly_vary_on_the_target_are_warned_of() -> None:
    gray = [torch.full((32, 3, 16, 16), 0.1)]
    message = r"^the activations of classifier\.0.* hardly vary on the target images .*\(skip=\['classifier\.0'"
    with pytest.warns(UserWarning, match=message):
        adapt_statistics(small_vgg(), source().split(16), gray)
    assert adapt(small_vgg(), source().split(16), shifted(source()).split(16)).constant == ""


def test_only_layers_that_a_batchnorm_was_inserted_after_are_named_as_ones_to_skip() -> None:
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 196, 8), nn.ReLU())
    model = nn.Sequential(*layers, nn.Linear(8, 4)).eval()
    found = adapt(model, source().split(16), [torch.full((32, 3, 16, 16), 0.1)], keep_batchnorm=True).constant
    assert found.startswith("the activations of 1, 4 hardly vary")
    assert "(skip=['4'])" in found
