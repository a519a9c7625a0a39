import copy
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VGG

from bn_insert import (
    CalibrationError,
    GraphError,
    calibrate,
    compare_outputs,
    dropouts_before_batchnorm,
    find_edges,
    find_sites,
    fold_batchnorm,
    insert,
    insert_at,
    insert_batchnorm,
    survey,
)
from bn_insert.demo import network_path
from bn_insert.demo.training import demo_network
from bn_insert.graph.inputs import Inputs
from bn_insert.statistics.calibrate import calibrate_sites
from bn_insert.statistics.pass_options import PassOptions
from bn_insert.surgery.verification import fault_of
from support.idioms import DecidesByValues
from support.networks import (
    AWKWARD,
    DEPTHS,
    HeldAsAttributes,
    RegisteredBackwards,
    images,
    narrow_vgg,
    randomised,
    sequential,
    small_vgg,
    torchvision_vgg,
)
from support.references import activations, mean_and_var

LAYOUTS = (torch.contiguous_format, torch.channels_last)

WISHES: dict[str, dict[str, Any]] = {
    "conv and dense": {},
    "conv": {"layers": ("conv",)},
    "dense": {"layers": ("dense",)},
    "with the output layer": {"include_output": True},
}


def batchnorms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def dropouts(model: nn.Module) -> dict[str, nn.Dropout]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Dropout)}


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)


def assert_same_outputs(model: nn.Module, result: nn.Module, x: Tensor) -> None:
    for layout in LAYOUTS:
        laid_out = x.contiguous(memory_format=layout)
        assert torch.equal(outputs(result, laid_out), outputs(model, laid_out)), layout


# Outputs


@cache
def deep(name: str) -> VGG:
    """Return torchvision's network, of which `narrow` has an eighth of the channels."""
    depth, _, narrow = name.partition(" ")
    return narrow_vgg(depth) if narrow else torchvision_vgg(depth)


@cache
def expected_outputs(name: str, layout: torch.memory_format) -> Tensor:
    return outputs(deep(name), images(3, seed=2).contiguous(memory_format=layout))


@pytest.mark.parametrize(
    ("name", "placement", "wishes"),
    [
        *(
            ("vgg11 narrow", placement, wishes)
            for placement in ("before_activation", "after_activation")
            for wishes in WISHES
        ),
        ("vgg16", "before_activation", "with the output layer"),
    ],
)
def test_logits_are_bit_identical_after_inserting(name: str, placement: str, wishes: str) -> None:
    result = insert_batchnorm(deep(name), [images(6)], placement=placement, **WISHES[wishes])
    convs, dense = int(name[3:5]) - 3, 2
    kinds = WISHES[wishes].get("layers", ("conv", "dense"))
    expected = convs * ("conv" in kinds) + dense * ("dense" in kinds) + WISHES[wishes].get("include_output", 0)
    assert len(batchnorms(result)) == expected
    for layout in LAYOUTS:
        x = images(3, seed=2).contiguous(memory_format=layout)
        assert torch.equal(outputs(result, x), expected_outputs(name, layout)), layout


@pytest.mark.parametrize("placement", ["before_activation", "after_activation"])
def test_the_demo_networks_logits_are_bit_identical_after_inserting(placement: str) -> None:
    model = demo_network()
    model.load_state_dict(torch.load(network_path(), weights_only=True))
    result = insert_batchnorm(model.eval(), [torch.rand(8, 3, 48, 48)], placement=placement, include_output=True)
    assert_same_outputs(model, result, torch.rand(5, 3, 48, 48))


@pytest.mark.parametrize("name", DEPTHS)
def test_with_conv_layers_the_state_dict_is_that_of_torchvisions_own_batchnorm_network(name: str) -> None:
    result = insert_batchnorm(deep(name), [images(6)], layers=("conv",))
    with torch.device("meta"):
        theirs = torchvision.models.get_model(f"{name}_bn", weights=None, init_weights=False)
        theirs.classifier = copy.deepcopy(deep(name).classifier).to("meta")
    theirs.load_state_dict(result.state_dict(), strict=True, assign=True)
    for layout in LAYOUTS:
        x = images(3, seed=2).contiguous(memory_format=layout)
        assert torch.equal(outputs(theirs.eval(), x), expected_outputs(name, layout)), layout


@pytest.mark.parametrize("model", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_outputs_are_bit_identical_behind_convs_of_every_dimension(model: Callable[..., nn.Module]) -> None:
    network = sequential(model(3, 8, 3), nn.LeakyReLU(), model(8, 4, 3))
    sizes = (9,) * (network[0].weight.ndim - 2)
    result = insert_batchnorm(network, [torch.randn(6, 3, *sizes)], include_output=True)
    x = torch.randn(3, 3, *sizes)
    assert len(batchnorms(result)) == 2
    assert torch.equal(outputs(result, x), outputs(network, x))


def test_outputs_of_a_branching_network_of_the_field_are_bit_identical() -> None:
    model = randomised(torchvision.models.squeezenet1_1())
    result = insert_batchnorm(model, [images(4, 64)])
    assert len(batchnorms(result)) == 26
    assert_same_outputs(model, result, images(2, 64, seed=2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_outputs_are_bit_identical_in_other_dtypes(dtype: torch.dtype) -> None:
    model = small_vgg()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-1, 1)  # float16 ends at 65504
    model = model.to(dtype)
    result = insert_batchnorm(model, [images(6, 16)])
    assert_same_outputs(model, result, images(3, 16, seed=2).to(dtype))


def test_outputs_are_bit_identical_under_autocast() -> None:
    model = small_vgg()
    result = insert_batchnorm(model, [images(6, 16)], autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_outputs(model, result, images(3, 16, seed=2))


@pytest.mark.parametrize("eps", [0.0, -1.0, 1e-40, float("inf"), float("nan")])
def test_an_eps_that_no_kernel_can_add_is_refused(eps: float) -> None:
    with pytest.raises(CalibrationError, match="eps must be a finite number"):
        insert_batchnorm(small_vgg(), [images(6, 16)], eps=eps)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3, 0.5])
def test_outputs_are_bit_identical_for_any_eps(eps: float) -> None:
    model = small_vgg()
    result = insert_batchnorm(model, [images(6, 16)], eps=eps)
    assert {norm.eps for norm in batchnorms(result)} == {eps}
    assert_same_outputs(model, result, images(3, 16, seed=2))


@pytest.mark.parametrize(
    "normed",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        pytest.param(
            torch.nn.utils.weight_norm,
            marks=[
                pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
                pytest.mark.filterwarnings("ignore:The tensor attribute .* was assigned during export:UserWarning"),
            ],
            id="weight_norm of old",
        ),
    ],
)
def test_outputs_are_bit_identical_behind_reparametrised_layers(normed: Callable[[nn.Module], nn.Module]) -> None:
    model = sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))  # too narrow for dead channels, of no norm
    normed(model[0])
    model.eval()
    result = insert_batchnorm(model, [images(6, 8)])
    assert len(batchnorms(result)) == 1
    assert_same_outputs(model, result, images(3, 8, seed=2))


def test_tied_weights_stay_tied() -> None:
    model = sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    model[2].weight = model[0].weight
    result = insert_batchnorm(model, [images(6, 8, channels=8)])
    assert result[3].weight is result[0].weight
    assert_same_outputs(model, result, images(3, 8, seed=2, channels=8))


# Statistics


@pytest.mark.parametrize("batch_size", [1, 7, 40])
@pytest.mark.parametrize("placement", ["before_activation", "after_activation"])
def test_running_statistics_equal_a_float64_reference_over_the_whole_set(placement: str, batch_size: int) -> None:
    model, whole = small_vgg(), images(40, 16)
    result = insert_batchnorm(model, whole.split(batch_size), placement=placement, include_output=True)
    offset = 0 if placement == "before_activation" else 1
    anchors = [f"features.{0 + offset}", f"features.{3 + offset}"]
    anchors += [f"classifier.{0 + offset}", f"classifier.{3 + offset}", "classifier.6"]
    reference = activations(model, anchors, [whole])
    for anchor, norm in zip(anchors, batchnorms(result), strict=True):
        mean, var = mean_and_var(reference[anchor])
        assert ((norm.running_mean - mean).abs() <= 1e-5 * var.sqrt() + 1e-7 * mean.abs()).all(), anchor
        assert ((norm.running_var - var).abs() <= 1e-5 * var + 1e-6 * norm.eps).all(), anchor


def test_gamma_and_beta_are_the_root_of_running_var_plus_eps_and_running_mean() -> None:
    result = insert_batchnorm(small_vgg(), [images(40, 16)], include_output=True)
    for norm in batchnorms(result):
        expected = (norm.running_var.double() + norm.eps).sqrt()
        assert ((norm.weight - expected).abs() <= 1e-6 * expected).all()
        assert torch.equal(norm.bias, norm.running_mean)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_where_the_mean_is_a_thousand_stds_running_mean_is_the_nearest_float32(batch_size: int) -> None:
    model = sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
    with torch.no_grad():  # activations are the inputs, so that their own rounding is out of the question
        model[0].weight.copy_(torch.eye(8)[:, :, None, None])
        model[0].bias.zero_()
    whole = images(40, 8, channels=8)
    whole = whole - whole.mean((0, 2, 3), keepdim=True) + 1000 * whole.std((0, 2, 3), keepdim=True)
    norm = insert_batchnorm(model, whole.split(batch_size))[1]
    mean, var = mean_and_var(whole)
    assert torch.equal(norm.running_mean, mean.float())
    assert ((norm.running_var - var).abs() <= 1e-5 * var).all()


def test_dropout_is_inactive_during_calibration_of_a_model_that_trains() -> None:
    model = small_vgg(dropout=0.9)
    expected = insert_batchnorm(model, [images(12, 16)]).state_dict()
    actual = insert_batchnorm(model.train(), [images(12, 16)]).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"classifier.3": "classifier.2"}),
        ({"layers": "conv"}, {}),
        ({"include_output": True}, {"classifier.3": "classifier.2", "classifier.7": "classifier.5"}),
    ],
)
def test_dropouts_before_a_batchnorm_are_named_as_in_the_result_and_in_the_original_and_kept(
    options: dict[str, Any], expected: dict[str, str]
) -> None:
    insertion = insert(small_vgg(), [images(6, 16)], **options)
    assert insertion.dropouts_before_batchnorm == expected
    assert dropouts_before_batchnorm(insertion.model, images(1, 16)) == list(expected)
    assert {dropout.p for dropout in dropouts(insertion.model).values()} == {0.5}


class CallsDropout(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        features = F.dropout2d(self[0](x).relu(), 0.25, training=self.training).mean((2, 3))
        hidden = F.dropout(self[1](features).relu(), training=self.training)
        last = F.dropout(self[2](hidden).relu(), 0.75, training=self.training)  # no BatchNorm comes after this one
        return self[3](last)


def test_dropouts_before_a_batchnorm_that_are_functions_are_told_with_their_largest_probability() -> None:
    model = CallsDropout(nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2))
    for outer, name in (
        (model, "CallsDropout"),
        (nn.Sequential(nn.ReLU(), model), r"CallsDropout (1 in the original)"),
    ):
        insertion = insert(outer, [images(6, 16)])
        assert (
            f"called as a function in the forward of {name} with p = 0.5, and stays on" in insertion.dropout_functions
        )
        assert insertion.dropouts_before_batchnorm == {}
    assert insert(model, [images(6, 16)], layers="conv").dropout_functions == ""


def test_a_dropout_function_that_is_always_off_is_not_told() -> None:
    model = NeverDrops(nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(6, 2))
    assert insert(model, [images(6, 16)]).dropout_functions == ""


class NeverDrops(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        features = F.dropout(self[0](x).relu().mean((2, 3)), training=False)
        return self[2](self[1](features).relu())


def test_dropouts_before_a_batchnorm_are_switched_off_in_the_copy_when_asked() -> None:
    model = small_vgg()
    result = insert_batchnorm(model, [images(6, 16)], dropout_before_batchnorm=False)
    assert {name: each.p for name, each in dropouts(result).items()} == {"classifier.3": 0, "classifier.7": 0.5}
    assert {each.p for each in dropouts(model).values()} == {0.5}
    assert dropouts_before_batchnorm(result, images(1, 16)) == []


def test_dropout_functions_that_cannot_be_switched_off_are_warned_of_when_that_was_asked() -> None:
    model = CallsDropout(nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2))
    with pytest.warns(
        UserWarning, match=r"called as a function in the forward of CallsDropout with p = 0\.5"
    ) as caught:
        insert_batchnorm(model, [images(6, 16)], dropout_before_batchnorm=False)
    assert [warning.filename for warning in caught] == [__file__]
    insert_batchnorm(model, [images(6, 16)])  # silent: warnings are errors here
    insert_batchnorm(model, [images(6, 16)], layers="conv", dropout_before_batchnorm=False)


@pytest.mark.parametrize(("momentum", "expected"), [(0.1, 0.1), (0.01, 0.01), (None, None)])
def test_momentum_is_the_one_asked_for(momentum: float | None, expected: float | None) -> None:
    result = insert_batchnorm(small_vgg(), [images(6, 16)], momentum=momentum)
    assert {norm.momentum for norm in batchnorms(result)} == {expected}


# The given model


def bits(tensor: Tensor) -> tuple[bytes, torch.dtype, tuple[int, ...], tuple[int, ...], int, bool]:
    values = tensor.detach().cpu().contiguous().view(torch.uint8) if tensor.ndim else tensor.detach()[None]
    return (
        values.contiguous().numpy().tobytes(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.data_ptr(),
        tensor.requires_grad,
    )


def everything_of(model: nn.Module) -> dict[str, Any]:
    """Return all that a caller could find changed: tensors bit by bit, flags, hooks, attributes, random state."""
    state: dict[str, Any] = {"random state": torch.get_rng_state().tolist()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[name] = (id(tensor), *bits(tensor))
    for name, module in model.named_modules():
        state[f"{name}: training"] = module.training
        state[f"{name}: children"] = [(child, id(value)) for child, value in module.named_children()]
        state[f"{name}: attributes"] = sorted(vars(module))
        for attribute, value in vars(module).items():
            if "hooks" in attribute and isinstance(value, dict):
                state[f"{name}: {attribute}"] = list(value.items())
    return state


def lived_in(layout: torch.memory_format = torch.contiguous_format) -> VGG:
    """Return a VGG with mixed training flags, frozen layers, a gradient, and hooks of its owner."""
    model = small_vgg().train().to(memory_format=layout)
    model.features[0].eval()
    model.classifier[3].eval()
    model.features.requires_grad_(False)
    model.classifier[0].bias.grad = torch.ones(24)
    model.features[3].register_forward_hook(lambda _module, _inputs, output: output)
    model.classifier.register_forward_pre_hook(lambda _module, inputs: inputs)
    return model


class WorthRaisingError(Exception):
    pass


def failing_iterator() -> Iterator[Tensor]:
    yield images(4, 16)
    raise WorthRaisingError


def failing_progress(images_so_far: int) -> None:
    if images_so_far > 4:
        raise WorthRaisingError


def whole_batches() -> list[Tensor]:
    return [images(4, 16), images(4, 16, seed=2)]


WAYS_OUT: dict[str, tuple[type[Exception] | None, Callable[[], Iterable[Any]], dict[str, Any]]] = {
    "a result": (None, whole_batches, {}),
    "a result on an explicit device": (None, whole_batches, {"device": "cpu"}),
    "a result under autocast": (None, whole_batches, {"autocast": torch.bfloat16}),
    "a result after activation": (None, whole_batches, {"placement": "after_activation", "include_output": True}),
    "batches that raise": (WorthRaisingError, failing_iterator, {}),
    "a progress that raises": (WorthRaisingError, whole_batches, {"progress": failing_progress}),
    "a model that raises": (CalibrationError, lambda: [images(4, 16), images(4, 16, channels=5)], {}),
    "an input that is not finite": (CalibrationError, lambda: [images(4, 16), images(4, 16) * torch.nan], {}),
    "a batch that is none": (CalibrationError, lambda: [images(4, 16), "images"], {}),
    "no batch": (CalibrationError, list, {}),
    "too few images": (CalibrationError, lambda: [images(1, 16)], {}),
    "no layer for a pattern": (GraphError, whole_batches, {"skip": ("backbone.*",)}),
    "inputs of the wrong shape": (GraphError, lambda: [images(4, 16, channels=5)], {}),
}


@pytest.mark.parametrize(
    ("way_out", "layout"),
    [
        *((way_out, torch.contiguous_format) for way_out in WAYS_OUT),
        # Two ways run the whole model; the others stop before that, or differ in what is not of the layout.
        *((way_out, torch.channels_last) for way_out in ("a result", "a progress that raises")),
    ],
    ids=str,
)
def test_the_given_model_and_the_random_state_are_untouched_after(way_out: str, layout: torch.memory_format) -> None:
    error, batches, arguments = WAYS_OUT[way_out]
    model = lived_in(layout)
    before = everything_of(model)
    if error is None:
        insert_batchnorm(model, batches(), **arguments)
    else:
        with pytest.raises(error):
            insert_batchnorm(model, batches(), **arguments)
    assert everything_of(model) == before


def test_the_random_state_is_untouched_by_a_shuffling_data_loader() -> None:
    model = lived_in()
    before = everything_of(model)
    loader = DataLoader(TensorDataset(images(12, 16)), batch_size=5, shuffle=True)
    insert_batchnorm(model, loader)
    assert everything_of(model) == before


def test_the_random_state_is_untouched_when_progress_raises_over_a_shuffling_data_loader() -> None:
    model = lived_in()
    before = everything_of(model)
    loader = DataLoader(TensorDataset(images(12, 16)), batch_size=4, shuffle=True)
    with pytest.raises(WorthRaisingError):
        insert_batchnorm(model, loader, progress=failing_progress)
    assert everything_of(model) == before


@pytest.mark.parametrize("network", [*AWKWARD, small_vgg], ids=lambda network: network.__name__)
def test_a_model_of_any_shape_is_untouched(network: Callable[[], nn.Module]) -> None:
    model = randomised(network()).train()
    before = everything_of(model)
    insert_batchnorm(model, [images(4, 16)])
    assert everything_of(model) == before


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_given_inputs_are_untouched_by_a_model_that_works_on_them_in_place(layout: torch.memory_format) -> None:
    model = sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    given = images(4, 8).contiguous(memory_format=layout)
    before = given.clone()
    insert_batchnorm(model, [given])
    assert torch.equal(given, before)


# The result


def test_the_result_shares_no_memory_with_the_given_model() -> None:
    model = lived_in()
    result = insert_batchnorm(model, whole_batches())
    given = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert given.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in result.state_dict().values())


def test_weights_and_biases_of_the_result_are_those_given() -> None:
    model = lived_in(torch.channels_last)
    result = insert_batchnorm(model, whole_batches())
    layers = [module for module in result.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    given = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for layer, original in zip(layers, given, strict=True):
        assert torch.equal(layer.weight, original.weight)
        assert torch.equal(layer.bias, original.bias)
        assert layer.weight.stride() == original.weight.stride()


def test_training_flags_are_carried_and_a_batchnorm_takes_that_of_its_layer() -> None:
    result = insert_batchnorm(lived_in(), whole_batches())
    assert [module.training for module in result.features] == [False, False, *[True] * 6]
    assert [module.training for module in result.classifier] == [*[True] * 4, False, False, *[True] * 3]
    assert result.training


def test_training_flags_are_carried_also_where_layers_are_wrapped() -> None:
    model = randomised(HeldAsAttributes()).train()
    model.stem.eval()
    result = insert_batchnorm(model, [images(4, 9)])
    assert [module.training for module in result.stem.modules()] == [False] * 3
    assert [module.training for module in result.blocks[0].modules()] == [True] * 3


def test_requires_grad_is_carried_and_that_of_new_parameters_is_true() -> None:
    result = insert_batchnorm(lived_in(), whole_batches())
    assert not result.features[0].weight.requires_grad
    assert result.classifier[0].weight.requires_grad
    assert all(parameter.requires_grad for norm in batchnorms(result) for parameter in norm.parameters())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_new_parameters_are_float32_or_float64_for_float64_models(dtype: torch.dtype, expected: torch.dtype) -> None:
    model = sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(dtype)
    norm = insert_batchnorm(model, [images(4, 8)])[1]
    assert {norm.weight.dtype, norm.bias.dtype, norm.running_mean.dtype, norm.running_var.dtype} == {expected}
    assert {parameter.device for parameter in norm.parameters()} == {torch.device("cpu")}


def test_the_owners_hooks_are_there_and_none_is_left_of_calibration() -> None:
    result = insert_batchnorm(lived_in(), whole_batches())
    hooks = [len(module._forward_hooks) for module in result.modules()]
    assert sum(hooks) == 1
    assert len(result.features[4]._forward_hooks) == 1
    assert len(result.classifier._forward_pre_hooks) == 1


def test_the_result_can_be_made_where_gradients_are_off() -> None:
    with torch.no_grad():
        result = insert_batchnorm(small_vgg(), [images(6, 16)])
    result.train()(images(6, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in result.parameters())


# Training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_train_mode_batch_statistics_are_used_and_running_statistics_move(dtype: torch.dtype) -> None:
    result = insert_batchnorm(small_vgg().to(dtype), [images(12, 16)], momentum=0.25).train()
    norms = batchnorms(result)
    before = copy.deepcopy(norms)
    seen: list[tuple[Tensor, Tensor]] = []
    for norm in norms:
        norm.register_forward_hook(lambda _norm, inputs, output: seen.append((inputs[0].clone(), output.clone())))
    result(images(8, 16, seed=3).to(dtype))
    for norm, old, (inputs, output) in zip(norms, before, seen, strict=True):
        mean, var = mean_and_var(inputs.detach())
        count = inputs[:, 0].numel()
        normalised = (inputs.detach().double().movedim(1, -1) - mean) / (var * (count - 1) / count + old.eps).sqrt()
        expected = (normalised * old.weight + old.bias).movedim(-1, 1)
        scale = old.weight.abs() + old.bias.abs()
        error = ((output.double() - expected).movedim(1, -1) / scale).abs()
        close = {"rtol": 1e-5, "atol": 1e-5}
        assert error.max() <= 1e-4
        assert not torch.equal(norm.running_mean, old.running_mean)
        torch.testing.assert_close(norm.running_mean.double(), 0.75 * old.running_mean.double() + 0.25 * mean, **close)
        torch.testing.assert_close(norm.running_var.double(), 0.75 * old.running_var.double() + 0.25 * var, **close)
        assert norm.num_batches_tracked == 1


def test_in_train_mode_gradients_reach_gamma_beta_and_the_weights_of_every_layer() -> None:
    result = insert_batchnorm(small_vgg(), [images(12, 16)]).train()
    result(images(8, 16, seed=3)).square().sum().backward()
    for name, parameter in result.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.endswith("bias") or name == "classifier.8.bias" or ".1." in name:
            assert parameter.grad.abs().sum() > 0, name


def test_a_step_of_training_lowers_the_loss() -> None:
    result = insert_batchnorm(small_vgg(dropout=0.0), [images(12, 16)]).train()
    x, labels = images(12, 16), torch.arange(12) % 10
    optimizer = torch.optim.SGD(result.parameters(), lr=1e-4)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(result(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


# What is asked for


@pytest.mark.parametrize("layers", ["conv", "dense"])
def test_layers_may_be_one_word(layers: Any) -> None:
    result = insert_batchnorm(small_vgg(), [images(6, 16)], layers=layers)
    assert len(batchnorms(result)) == 2


def test_skipped_layers_are_left_alone() -> None:
    result = insert_batchnorm(small_vgg(), [images(6, 16)], skip=("features.0", "classifier.*"))
    assert [type(module).__name__ for module in result.features[:3]] == ["Conv2d", "ReLU", "MaxPool2d"]
    assert len(batchnorms(result)) == 1


def test_what_cannot_be_done_after_activation_is_left_alone() -> None:
    left = r"stem, blocks\.0, blocks\.1, heads\.hidden \(not directly followed by an activation module\)"
    with pytest.warns(UserWarning, match=left):
        result = insert_batchnorm(randomised(HeldAsAttributes()), [images(6, 9)], placement="after_activation")
    assert batchnorms(result) == []


@pytest.mark.parametrize(
    "batches",
    [
        lambda x: iter(x.split(5)),
        lambda x: (part for part in x.split(5)),
        lambda x: [(part, torch.zeros(len(part))) for part in x.split(5)],
        lambda x: [{"image": part} for part in x.split(5)],
        lambda x: DataLoader(TensorDataset(x), batch_size=5),
    ],
    ids=["iterator", "generator", "tuples", "dicts", "DataLoader"],
)
def test_the_calibration_set_is_any_iterable_and_is_iterated_once(
    batches: Callable[[Tensor], Iterable[Any]],
) -> None:
    model, whole = small_vgg(), images(12, 16)
    expected = insert_batchnorm(model, whole.split(5)).state_dict()
    actual = insert_batchnorm(model, batches(whole)).state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_progress_is_told_the_number_of_images_so_far() -> None:
    told: list[int] = []
    insert_batchnorm(small_vgg(), images(12, 16).split(5), progress=told.append)
    assert told == [5, 10, 12]


def test_an_empty_calibration_set_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"^the calibration set is empty: the iterable yielded no batches$"):
        insert_batchnorm(small_vgg(), [])


def test_a_single_tensor_of_images_is_not_taken_for_batches() -> None:
    with pytest.raises(CalibrationError) as caught:
        insert_batchnorm(small_vgg(), images(12, 16))
    assert str(caught.value) == (
        "batches is one tensor of shape (12, 3, 16, 16), which would be iterated image by image; "
        "pass an iterable of batches, such as [images] or images.split(32)"
    )


@pytest.mark.parametrize(
    ("batch", "described"),
    [
        ([images(4, 16), torch.zeros(4)], "a list of inputs and labels"),
        ((images(4, 16), torch.zeros(4), torch.arange(4)), "a tuple of inputs and labels"),
        ({"image": images(4, 16)}, "a dict"),
    ],
)
def test_a_single_batch_with_its_labels_is_not_taken_for_batches(batch: Any, described: str) -> None:
    message = rf"^batches is {described}, perhaps one batch; pass an iterable of batches, such as a DataLoader or \["
    with pytest.raises(CalibrationError, match=message):
        insert_batchnorm(small_vgg(), batch)


def test_a_first_batch_that_is_none_is_described() -> None:
    with pytest.raises(CalibrationError, match=r"^batch 0 is a str; a batch is a tensor, or a tuple, "):
        insert_batchnorm(small_vgg(), ["images"])


class ConvOfItsOwn(nn.Module):
    """A conv that is no module of torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4, 3, 3) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class Blur(nn.Module):
    """A constant kernel, as in networks that antialias before they subsample."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.full((4, 1, 3, 3), 1 / 9))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, groups=4)  # type: ignore[arg-type]


def test_layers_of_other_classes_that_get_no_batchnorm_are_named_next_to_those_that_do() -> None:
    def network(module: nn.Module) -> nn.Sequential:
        return sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), module, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

    with pytest.warns(UserWarning, match=r"after layers that are not modules of torch.nn: 2 \(ConvOfItsOwn\)$"):
        insert_batchnorm(network(ConvOfItsOwn()), [torch.rand(4, 3, 8, 8)])
    # Without a warning: a kernel that is no weight, layers that are skipped, not chosen or normalized already.
    insert_batchnorm(network(Blur()), [torch.rand(4, 3, 8, 8)])
    insert_batchnorm(network(ConvOfItsOwn()), [torch.rand(4, 3, 8, 8)], skip=(name for name in ("2",)))
    normalized = network(nn.Sequential(ConvOfItsOwn(), nn.BatchNorm2d(4)).eval())
    insert_batchnorm(normalized, [torch.rand(4, 3, 8, 8)])
    insert_batchnorm(sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), ConvOfItsOwn()), [torch.rand(4, 3, 8, 8)])
    attention = sequential(nn.Conv1d(4, 8, 1), nn.ReLU(), nn.TransformerEncoderLayer(8, 2, 8, batch_first=True))
    insert_batchnorm(attention, [torch.rand(4, 4, 8)])


@pytest.mark.filterwarnings("ignore:.*is deprecated")  # TorchScript
@pytest.mark.parametrize("convert", [torch.jit.script, lambda module: torch.jit.trace(module, torch.rand(1, 4, 6, 6))])
@pytest.mark.parametrize("in_sequence", [False, True])
def test_torchscript_layers_that_get_no_batchnorm_are_named_next_to_those_that_do(
    convert: Callable[[nn.Module], nn.Module], in_sequence: bool
) -> None:
    part = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()) if in_sequence else nn.Conv2d(4, 4, 3)
    model = sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), convert(part), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    name = "2.0" if in_sequence else "2"
    with pytest.warns(UserWarning, match=rf"that are not modules of torch.nn: {name} \(TorchScript Conv2d\)$"):
        result = insert_batchnorm(model, [torch.rand(4, 3, 8, 8)])
    assert [type(module).__name__ for module in result][:3] == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert not insert(model, [torch.rand(4, 3, 8, 8)], skip="2*").others


def test_a_model_without_parameters_is_returned_as_a_copy() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Flatten())
    with pytest.warns(UserWarning, match="^no BatchNorm was inserted: there is no conv or dense layer$"):
        result = insert_batchnorm(model, [images(4, 8)])
    assert result is not model
    assert torch.equal(result(images(2, 8)), model(images(2, 8)))


def test_layers_registered_in_another_order_than_called_get_their_own_statistics() -> None:
    model, whole = randomised(RegisteredBackwards()), images(12, 9)
    result = insert_batchnorm(model, [whole])
    for name in ("conv", "hidden"):
        mean, _ = mean_and_var(activations(model, [name], [whole])[name])
        torch.testing.assert_close(result.get_submodule(name)[1].running_mean, mean.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equalized", [False, True])
def test_no_parameter_shares_memory_with_the_original(equalized: bool) -> None:
    model, x = small_vgg(), images(8, 16)
    result = insert_batchnorm(model, [x], equalize=equalized)
    storages = {parameter.data_ptr() for parameter in model.parameters()}
    assert storages.isdisjoint(parameter.data_ptr() for parameter in result.parameters())


@pytest.mark.parametrize("equalized", [False, True])
def test_the_model_is_traced_once_for_an_insertion(equalized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: calls.append(args) or export(*args, **kwargs))
    insert_batchnorm(small_vgg(), [images(8, 16)], equalize=equalized)
    assert len(calls) == 1


@pytest.mark.parametrize("equalized", [False, True])
def test_an_insertion_has_the_model_and_all_that_was_measured_on_the_way(equalized: bool) -> None:
    model, batches = small_vgg(), images(10, 16).split(4)
    insertion = insert(model, batches, equalize=equalized)
    sites = find_sites(model, batches[0])
    assert insertion.images == 10
    assert insertion.sites == sites
    assert list(insertion.layers) == survey(model, batches[0])
    assert list(insertion.edges) == (find_edges(model, batches[0], sites) if equalized else [])
    for name, moments in calibrate(model, sites, batches).items():
        assert torch.equal(insertion.moments[name].mean, moments.mean)
        assert torch.equal(insertion.moments[name].m2, moments.m2)
    modules = set(insertion.model.modules())
    assert list(insertion.norms) == [site.name for site in sites]
    assert all(norm in modules for norm in insertion.norms.values())
    assert_same_outputs(insertion.model, insert_batchnorm(model, batches, equalize=equalized), batches[0])
    again = insert_at(model, insertion.sites, insertion.moments, edges=insertion.edges).state_dict()
    assert again.keys() == insertion.model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in insertion.model.state_dict().items())


def test_a_forward_that_depends_on_values_is_calibrated_where_the_caller_says(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    def calibrate_on(model: nn.Module, sites: Any, batches: Any, options: PassOptions) -> Any:
        devices.append(options.device)
        return calibrate_sites(model, sites, batches, options)

    monkeypatch.setattr("bn_insert.surgery.insert.calibrate_sites", calibrate_on)
    insert(DecidesByValues(), [torch.rand(4, 3, 12, 12)])
    assert devices == [None]


class Scaled(nn.Module):
    def __init__(self, layer: nn.Module, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.factor


@pytest.mark.parametrize(
    ("dtype", "factor", "same"),
    [
        (torch.float32, 1 + 2**-11, True),
        (torch.float32, 1 + 2**-7, False),
        (torch.bfloat16, 1 + 2**-7, True),  # the next number in bfloat16, to which a GPU may round
        (torch.bfloat16, 1.25, False),
        (torch.float16, 1 + 2**-10, True),
        (torch.float16, 1 + 2**-5, False),
    ],
)
def test_outputs_may_differ_by_the_rounding_of_their_dtype(dtype: torch.dtype, factor: float, same: bool) -> None:
    layer = nn.Linear(4, 3).to(dtype)
    fault = fault_of(layer, Scaled(layer, factor), Inputs.of(torch.rand(2, 4), 0, layer))
    assert (fault is None) == same


class Squeezed(nn.Module):
    """A conv that takes a single image, without its batch axis, as an unbatched input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.squeeze()).relu()  # type: ignore[no-any-return]


def test_a_network_that_cannot_run_on_one_image_any_more_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="with BatchNorm inserted, Squeezed cannot run on a single image.*flatten"):
        insert_batchnorm(Squeezed().eval(), [torch.rand(4, 4, 8, 1)])


def test_lazy_layers_are_named_until_their_shapes_are_known() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).eval()
    with pytest.raises(GraphError, match="Sequential has lazy layers, whose shapes are not known; call it once"):
        insert_batchnorm(model, [images(2, 8)])
    model(images(2, 8))
    assert len(batchnorms(insert_batchnorm(model, [images(2, 8)]))) == 1


class TakesBytes(nn.Module):
    """A network that scales its images itself, as in reinforcement learning."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.conv(x.float() / 255)).relu().mean((2, 3)))


class TakesWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv, self.head = nn.Embedding(9, 6), nn.Conv1d(6, 4, 3), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.conv(self.embedding(ids).mT).relu().amax(2))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (TakesBytes(), torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)),
        (TakesWords(), torch.randint(9, (40, 12))),
    ],
    ids=["bytes", "words"],
)
def test_a_network_may_take_integers(model: nn.Module, x: Tensor) -> None:
    randomised(model)
    result = insert_batchnorm(model, x.split(4))
    assert compare_outputs(model, result, x.split(4)).bit_identical
    mean, var = mean_and_var(activations(model, ["conv"], x.split(4))["conv"])
    assert ((result.conv[1].running_mean - mean).abs() <= 1e-5 * var.sqrt()).all()
    assert ((result.conv[1].running_var - var).abs() <= 1e-5 * var).all()
    torch.testing.assert_close(fold_batchnorm(result.eval(), x)(x), model.eval()(x))
