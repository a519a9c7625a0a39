import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bn_insert import CalibrationError, Comparison, compare_outputs, insert_batchnorm
from bn_insert.compare.outputs import finite_part
from support.networks import SeveralOutputs, features, images, randomised, sequential, small_vgg


class PutsOut(nn.Module):
    """Puts out what it is given, in the shape asked for."""

    def __init__(self, shaped: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.anchor, self.shaped = nn.Parameter(torch.zeros(1)), shaped

    def forward(self, x: Tensor) -> Any:
        return self.shaped(x)


def replaying(outputs: Iterable[Tensor]) -> nn.Module:
    """Return a model whose outputs are these, call by call."""
    remaining = iter(outputs)
    return passing(lambda _: next(remaining))


def passing(change: Callable[[Tensor], Any] = lambda x: x) -> nn.Module:
    return PutsOut(change).eval()


@pytest.mark.parametrize("empty", [(0, 4), (4, 0), (0,)])
def test_an_output_without_values_is_equal_to_another(empty: tuple[int, ...]) -> None:
    model = passing(lambda x: (torch.zeros(empty), x))
    assert compare_outputs(model, model, [torch.rand(4, 3)]).bit_identical
    assert not compare_outputs(model, passing(lambda x: (torch.zeros(empty), x + 1)), [torch.rand(4, 3)]).bit_identical


def test_masked_classes_are_equal_where_both_networks_mask_them() -> None:
    mask = torch.tensor([True, False, False])
    masked = passing(lambda x: x.masked_fill(mask, -torch.inf))
    other = passing(lambda x: (x * 1.5).masked_fill(mask, -torch.inf))
    x = torch.tensor([[1.0, 2.0, 4.0]])
    assert compare_outputs(masked, masked, [x]).bit_identical
    found = compare_outputs(masked, other, [x])
    assert (found.max_abs, found.max_rel, found.bit_identical) == (2.0, 0.5, False)
    assert compare_outputs(masked, passing(), [x]).max_abs == math.inf


def test_complex_outputs_are_compared_by_absolute_value() -> None:
    model, other = passing(lambda x: torch.complex(x, x)), passing(lambda x: torch.complex(x + 3, x + 4))
    x = torch.zeros(4, 3)
    assert compare_outputs(model, model, [x + 1]).bit_identical
    found = compare_outputs(model, other, [x])
    assert (found.max_abs, found.max_rel, found.bit_identical) == (5.0, math.inf, False)
    assert math.isnan(found.top1_agreement)


def test_a_model_equals_itself() -> None:
    model = small_vgg()
    assert compare_outputs(model, model, [images(4, 16), images(3, 16)]) == Comparison(7, 0.0, 0.0, 1.0, True)


def test_a_model_equals_its_insertion() -> None:
    model = small_vgg()
    result = insert_batchnorm(model, [images(6, 16)])
    assert compare_outputs(model, result, [images(4, 16, seed=2)]) == Comparison(4, 0.0, 0.0, 1.0, True)


def test_a_model_that_samples_gets_the_random_numbers_of_the_reference_and_is_said_to_sample() -> None:
    model = passing(lambda x: x + torch.randn_like(x))
    state = torch.get_rng_state()
    batches = DataLoader(TensorDataset(features(20, 5)), batch_size=4, shuffle=True)
    assert compare_outputs(model, model, batches) == Comparison(20, 0.0, 0.0, 1.0, True, random=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        compare_outputs(passing(), model, batches).random and not compare_outputs(passing(), passing(), batches).random
    )
    assert not compare_outputs(model, passing(lambda x: x + torch.rand_like(x)), batches).bit_identical


def test_a_model_that_works_on_its_input_in_place_equals_itself_and_leaves_the_batch_alone() -> None:
    model, x = passing(lambda x: x.sub_(1)), features(4, 5)
    before = x.clone()
    assert compare_outputs(model, model, [x]).bit_identical
    assert torch.equal(x, before)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_differences_equal_those_of_a_plain_float64_computation(batch_size: int) -> None:
    x = features(8, 5) * torch.logspace(-2, 2, 8)[:, None]
    difference = torch.randn(8, 5, generator=torch.Generator().manual_seed(3)) * 0.1
    found = compare_outputs(passing(), replaying((x + difference).split(batch_size)), x.split(batch_size))

    expected, actual = x.double().tolist(), (x + difference).double().tolist()
    absolute = [[abs(a - e) for a, e in zip(*rows, strict=True)] for rows in zip(actual, expected, strict=True)]
    relative = [max(row) / max(map(abs, e)) for row, e in zip(absolute, expected, strict=True)]
    agreeing = [e.index(max(e)) == a.index(max(a)) for e, a in zip(expected, actual, strict=True)]
    assert found.images == 8
    assert found.max_abs == max(map(max, absolute))
    assert found.max_rel == max(relative)
    assert found.top1_agreement == sum(agreeing) / 8
    assert not found.bit_identical


def test_one_differing_bit_is_not_bit_identical() -> None:
    x = features(4, 5)
    changed = x.clone()
    changed[2, 3] = torch.nextafter(changed[2, 3], torch.tensor(torch.inf))
    found = compare_outputs(passing(), passing(lambda _: changed), [x])
    assert not found.bit_identical
    assert 0 < found.max_abs < 1e-6
    assert found.top1_agreement == 1


def test_zeros_of_both_signs_are_equal() -> None:
    found = compare_outputs(passing(), passing(torch.neg), [torch.zeros(4, 5)])
    assert (found.bit_identical, found.max_abs, found.max_rel) == (True, 0.0, 0.0)


def test_a_difference_from_an_output_of_zero_is_infinitely_large_in_relation() -> None:
    found = compare_outputs(passing(), passing(lambda x: x + 0.5), [torch.zeros(4, 5)])
    assert (found.max_abs, found.max_rel) == (0.5, math.inf)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("image", [0, 5])
def test_a_candidate_that_is_not_finite_is_within_no_bound(value: float, image: int) -> None:
    x = features(6, 5)
    changed = x.clone()
    changed[image, 2] = value
    found = compare_outputs(passing(), replaying(changed.split(3)), x.split(3))
    assert not found.bit_identical
    assert not found.within(atol=1e30)
    assert not found.within(rtol=1e30)


def test_a_reference_that_is_not_finite_is_refused() -> None:
    poisoned = passing(lambda x: x / (x != 3))
    with pytest.raises(CalibrationError) as caught:
        compare_outputs(poisoned, passing(), [torch.ones(4, 5), torch.full((4, 5), 3.0)])
    assert str(caught.value) == (
        "the reference's outputs are not finite on batch 1; compare a submodule that ends before the layer that "
        "produces them"
    )


def test_every_one_of_several_outputs_is_compared_and_top1_is_taken_from_the_first() -> None:
    reference, candidate = randomised(SeveralOutputs()), randomised(SeveralOutputs())
    with torch.no_grad():
        candidate.auxiliary.bias += 0.25
    found = compare_outputs(reference, candidate, [images(4, 8)])
    assert not found.bit_identical
    assert found.max_abs == pytest.approx(0.25, rel=1e-5)
    assert found.top1_agreement == 1


def test_top1_of_dense_prediction_is_counted_by_position() -> None:
    x = images(2, 4)
    changed = x.clone()
    changed[0, :, 0, 0] = changed[0, :, 0, 0].roll(1)
    found = compare_outputs(passing(), passing(lambda _: changed), [x])
    assert found.top1_agreement == 31 / 32


@pytest.mark.parametrize("shaped", [lambda x: x[:, :1], lambda x: x[:, 0]], ids=["one column", "one axis"])
def test_outputs_of_fewer_than_two_classes_have_no_top1(shaped: Callable[[Tensor], Tensor]) -> None:
    found = compare_outputs(passing(shaped), passing(lambda x: shaped(x) + 1), [torch.ones(4, 5)])
    assert math.isnan(found.top1_agreement)
    assert found.max_abs == 1


def test_each_model_runs_in_its_own_dtype() -> None:
    model = sequential(nn.Linear(6, 5))
    found = compare_outputs(model, sequential(nn.Linear(6, 5)).double(), [features(4, 6)])
    assert 0 < found.max_abs < 1e-4


@pytest.mark.parametrize(
    ("shaped", "shapes"),
    [
        (lambda x: x[:, :, None], r"\[\(4, 5\)\] and \[\(4, 5, 1\)\]"),
        (lambda x: (x, x), r"\[\(4, 5\)\] and \[\(4, 5\), \(4, 5\)\]"),
        (lambda _: None, r"\[\(4, 5\)\] and \[\]"),
    ],
    ids=["shape", "number", "none"],
)
def test_outputs_of_different_shapes_cannot_be_compared(shaped: Callable[[Tensor], Any], shapes: str) -> None:
    with pytest.raises(CalibrationError, match=f"^the two models' outputs cannot be compared: shapes {shapes}$"):
        compare_outputs(passing(), passing(shaped), [features(4, 5)])


def test_different_numbers_of_classes_are_told_when_outputs_cannot_be_compared() -> None:
    message = "cannot be compared: reference returns 5 outputs for each image, candidate 3$"
    with pytest.raises(CalibrationError, match=message):
        compare_outputs(passing(), passing(lambda x: x[:, :3]), [features(4, 5)])


def test_models_without_outputs_cannot_be_compared() -> None:
    silent = passing(lambda _: None)
    with pytest.raises(CalibrationError, match=r"cannot be compared: shapes \[\] and \[\]$"):
        compare_outputs(silent, silent, [features(4, 5)])


@pytest.mark.parametrize("batches", [(), (images(0, 16),)], ids=["no batch", "an empty batch"])
def test_comparing_on_nothing_is_refused(batches: Iterable[Tensor]) -> None:
    with pytest.raises(
        CalibrationError, match=r"^there are no images to compare the outputs on: the iterable yielded no batches$"
    ):
        compare_outputs(small_vgg(), small_vgg(), batches)


def test_an_empty_batch_among_others_counts_for_nothing() -> None:
    model = small_vgg()
    assert compare_outputs(model, model, [images(4, 16), images(0, 16)]) == Comparison(4, 0.0, 0.0, 1.0, True)


def test_a_model_that_fails_is_named_with_the_batch_and_its_shape() -> None:
    with pytest.raises(CalibrationError) as caught:
        compare_outputs(small_vgg(), small_vgg(), [images(4, 16), images(2, 16, channels=5)])
    assert str(caught.value).startswith("the reference (VGG) failed on batch 1 of shape (2, 5, 16, 16): ")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_models_without_parameters_can_be_compared() -> None:
    assert compare_outputs(nn.ReLU(), nn.ReLU(), [features(4, 5)]).bit_identical


def test_batches_may_be_tuples_dicts_or_a_data_loader() -> None:
    model, x = small_vgg(), images(6, 16)
    loader = DataLoader(TensorDataset(x, torch.arange(6)), batch_size=4)
    assert compare_outputs(model, model, [(x, 1), {"image": x}]).images == 12
    assert compare_outputs(model, model, loader).images == 6


def test_progress_is_told_the_number_of_images_so_far() -> None:
    told: list[int] = []
    compare_outputs(small_vgg(), small_vgg(), images(12, 16).split(5), progress=told.append)
    assert told == [5, 10, 12]


@pytest.mark.parametrize("batches", [[images(4, 16)], [images(4, 16), images(4, 16, channels=5)]], ids=["", "failing"])
def test_both_models_run_in_eval_mode_and_get_every_training_flag_back(batches: list[Tensor]) -> None:
    model, other = small_vgg(dropout=0.9).train(), small_vgg(dropout=0.9)
    model.classifier[3].eval()
    before = [module.training for module in model.modules()]
    if len(batches) == 1:
        assert compare_outputs(model, other, batches).bit_identical
    else:
        with pytest.raises(CalibrationError):
            compare_outputs(model, other, batches)
    assert [module.training for module in model.modules()] == before
    assert not any(module.training for module in other.modules())


def test_the_random_state_is_untouched_by_a_shuffling_data_loader() -> None:
    before = torch.get_rng_state()
    model = small_vgg()
    compare_outputs(model, model, DataLoader(TensorDataset(images(6, 16)), batch_size=4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("atol", "rtol", "expected"),
    [
        (None, None, True),
        (0.5, None, True),
        (0.4, None, False),
        (None, 0.1, True),
        (None, 0.09, False),
        (0.5, 0.1, True),
        (0.5, 0.09, False),
        (0.4, 0.1, False),
    ],
)
def test_within_asks_for_every_bound_that_is_given(atol: float | None, rtol: float | None, expected: bool) -> None:
    assert Comparison(4, 0.5, 0.1, 1.0, False).within(atol, rtol) is expected


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_vgg_with_a_classifier_that_is_not_finite_is_compared_in_front_of_it(kind: str, value: float) -> None:
    model = small_vgg()
    with torch.no_grad():
        getattr(model.classifier[3], kind)[0] = value
    part, remark = finite_part(model)
    assert remark == "The classifier contains NaN or Inf, so outputs are compared before it."
    x = images(4, 16)
    assert torch.equal(part(x), model.avgpool(model.features(x)))
    result = insert_batchnorm(model, [x], layers=("conv",))
    assert compare_outputs(part, finite_part(result)[0], [x]).bit_identical


@pytest.mark.parametrize("model", [small_vgg(), sequential(nn.Linear(6, 5))], ids=["VGG", "Sequential"])
def test_a_model_that_is_finite_is_compared_whole(model: nn.Module) -> None:
    part, remark = finite_part(model)
    assert part is model
    assert remark == ""


def test_a_vgg_whose_features_are_not_finite_is_compared_whole() -> None:
    model = small_vgg()
    with torch.no_grad():
        model.features[0].weight[0] = torch.nan
    assert finite_part(model) == (model, "")
