import copy
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.prune import l1_unstructured

from bn_insert import GraphError, fold, insert_batchnorm, inserted_batchnorms, load_checkpoint, save_checkpoint
from bn_insert.graph.inputs import Inputs
from bn_insert.graph.layers import NormalizedLayer
from bn_insert.surgery.verification import fault_of
from support.networks import (
    AWKWARD,
    CalledFromTwoSequentials,
    CalledTwice,
    HeldAsAttributes,
    SlicedInForward,
    SlicesAsAttributes,
    TokenMixer,
    TwoNames,
    images,
    randomised,
    sequential,
    small_vgg,
)


def types(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.children()]


def assert_same_outputs(model: nn.Module, result: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected, actual = model.eval()(x), result.eval()(x)
    if isinstance(expected, dict):
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    else:
        assert torch.equal(expected, actual)


def test_children_of_a_sequential_numbered_from_zero_are_renumbered() -> None:
    result = insert_batchnorm(small_vgg(), [images(4, 16)])
    assert types(result.features) == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"] * 2
    assert [name for name, _ in result.features.named_children()] == [str(number) for number in range(8)]
    assert types(result.classifier) == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2 + ["Linear"]


def test_after_activation_the_batchnorm_is_the_next_child_behind_the_activation() -> None:
    result = insert_batchnorm(small_vgg(), [images(4, 16)], placement="after_activation")
    assert types(result.features) == ["Conv2d", "ReLU", "BatchNorm2d", "MaxPool2d"] * 2
    assert types(result.classifier) == ["Linear", "ReLU", "BatchNorm1d", "Dropout"] * 2 + ["Linear"]


def test_named_children_of_a_sequential_keep_their_names_and_the_new_one_is_called_after_its_layer() -> None:
    layers = OrderedDict(conv1=nn.Conv2d(3, 8, 3), relu1=nn.ReLU(), conv2=nn.Conv2d(8, 8, 3), relu2=nn.ReLU())
    model = randomised(nn.Sequential(layers))
    result = insert_batchnorm(model, [images(4, 8)])
    assert list(dict(result.named_children())) == ["conv1", "conv1_bn", "relu1", "conv2", "conv2_bn", "relu2"]
    assert_same_outputs(model, result, images(2, 8, seed=2))


def test_a_name_that_is_taken_is_not_given_again() -> None:
    model = randomised(nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3), conv_bn=nn.Identity(), relu=nn.ReLU())))
    result = insert_batchnorm(model, [images(4, 8)])
    assert list(dict(result.named_children())) == ["conv", "conv_bn_", "conv_bn", "relu"]
    assert types(result) == ["Conv2d", "BatchNorm2d", "Identity", "ReLU"]


def test_numbers_with_a_gap_are_names() -> None:
    model = sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU())
    part = model[2:]
    result = insert_batchnorm(part, [images(4, 8, channels=8)])
    assert list(dict(result.named_children())) == ["2", "2_bn", "3"]


def test_nested_sequentials_are_each_renumbered() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model = sequential(inner, nn.ReLU(), nn.Conv2d(8, 4, 1))
    result = insert_batchnorm(model, [images(4, 8)])
    assert types(result) == ["Sequential", "ReLU", "Conv2d"]
    assert types(result[0]) == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d"]
    assert_same_outputs(model, result, images(2, 8, seed=2))


def test_a_layer_held_as_an_attribute_becomes_a_sequential_of_layer_and_batchnorm() -> None:
    result = insert_batchnorm(randomised(HeldAsAttributes()), [images(4, 9)])
    assert types(result.stem) == ["Conv2d", "BatchNorm2d"]


def test_members_of_module_lists_and_dicts_become_sequentials_in_their_places() -> None:
    result = insert_batchnorm(randomised(HeldAsAttributes()), [images(4, 9)])
    assert isinstance(result.blocks, nn.ModuleList) and isinstance(result.heads, nn.ModuleDict)
    assert [types(block) for block in result.blocks] == [["Conv2d", "BatchNorm2d"]] * 2
    assert types(result.heads["hidden"]) == ["Linear", "BatchNorm1d"]
    assert list(result.heads) == ["hidden", "logits"]
    assert isinstance(result.heads["logits"], nn.Linear)


def test_children_of_a_sequential_that_is_sliced_or_looped_over_keep_their_numbers() -> None:
    result = insert_batchnorm(randomised(SlicedInForward()), [images(4, 9)])
    assert types(result.features) == ["NormalizedLayer", "ReLU", "NormalizedLayer", "ReLU", "Conv2d"]


@dataclass(frozen=True)
class Step:
    layer: nn.Module


class ReachedElsewhere(nn.Module):
    """Calls its layers by what holds them besides its children."""

    def __init__(self, *, among_features: bool, hold: Callable[[list[nn.Module]], Any]) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU()]
        if among_features:
            self.features = nn.Sequential(*layers)
        else:
            self.first, self.second = layers[0], layers[2]
        self.output = nn.Conv2d(5, 2, 1)
        self.held = hold(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.held.values() if isinstance(self.held, Mapping) else self.held:
            x = (layer() if isinstance(layer, weakref.ref) else getattr(layer, "layer", layer))(x)
        return self.output(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("among_features", [False, True], ids=["attributes", "in a Sequential"])
@pytest.mark.parametrize(
    "hold",
    [
        list,
        tuple,
        lambda layers: dict(enumerate(layers)),
        lambda layers: [nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])],
        lambda layers: [partial(layer) for layer in layers],
        lambda layers: deque(layers, 4),
        lambda layers: [Step(layer) for layer in layers],
        lambda layers: [SimpleNamespace(layer=layer) for layer in layers],
        lambda layers: [*map(weakref.ref, layers[::2])],
        lambda layers: weakref.WeakValueDictionary(enumerate(layers[::2])),
    ],
    ids=["list", "tuple", "dict", "slices", "partial", "deque", "dataclass", "namespace", "references", "weak dict"],
)
def test_layers_that_a_forward_reaches_in_a_plain_container_are_followed_by_their_batchnorm(
    among_features: bool, hold: Callable[[list[nn.Module]], Any], tmp_path: Path
) -> None:
    def build() -> ReachedElsewhere:
        return ReachedElsewhere(among_features=among_features, hold=hold)

    model, x = randomised(build()), images(6, 9)
    result = insert_batchnorm(model, [x])
    assert_same_outputs(model, result, x)
    result.train()(x)
    norms = {name: result.get_submodule(name) for name in inserted_batchnorms(result)}
    assert [int(norm.num_batches_tracked) for norm in norms.values()] == [1, 1]
    for norm in norms.values():
        nn.init.uniform_(norm.weight, 0.5, 2)
    result.eval()
    save_checkpoint(result, tmp_path / "bn.pth")
    assert_same_outputs(result, load_checkpoint(tmp_path / "bn.pth", model=build), x)
    folded = fold(result, x)
    assert set(folded.folded) == set(norms)
    assert list(folded.model.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(folded.model(x), result(x), rtol=1e-4, atol=1e-5)


def test_a_batchnorm_that_a_forward_passes_by_is_found() -> None:
    model, x = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), images(4, 9)
    result = insert_batchnorm(model, [x], include_output=True)
    batch = Inputs.of(x, 0, model)
    assert fault_of(model, result, batch, {"0": result[1]}) is None
    result.forward = lambda x: result[2](result[0](x))
    fault = fault_of(model, result, batch, {"0": result[1]})
    assert fault == ("does not call 1 whenever it calls the layer", True)


class Upsampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, 2), nn.ConvTranspose2d(4, 3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x).relu(), output_size=x.shape[2:]).relu()  # type: ignore[no-any-return]


def test_a_transposed_conv_may_be_called_with_an_output_size() -> None:
    model, x = randomised(Upsampling()), images(4, 10)
    result = insert_batchnorm(model, [x], include_output=True)
    assert inserted_batchnorms(result) == ["down.1", "up.1"]
    assert_same_outputs(model, result, x)
    assert set(fold(result, x).folded) == {"down.1", "up.1"}


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor, scale: float = 0.5) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias) * scale


@pytest.mark.parametrize("conv", [nn.Conv2d, Scaled])
def test_layers_with_their_batchnorm_can_be_scripted(conv: type[nn.Conv2d]) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = conv(3, 4, 3), nn.ConvTranspose2d(4, 3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.conv(x).relu()).relu()  # type: ignore[no-any-return]

    model, x = randomised(Decoder()), images(4, 9)
    result = insert_batchnorm(model, [x], include_output=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(result)
    assert_same_outputs(model, scripted, x)


class Standardized(nn.Conv2d):
    """Computes its weight in a hook that is a method of its own, as for weight standardization."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.used: Tensor | None = None
        self.register_forward_pre_hook(self._prepare)

    def _prepare(self, *_: Any) -> None:
        self.used = self.weight - self.weight.mean()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.conv2d(input, self.used, self.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("in_a_list", [False, True])
def test_hooks_that_are_methods_of_a_layer_still_act_on_the_layer(in_a_list: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.output = Standardized(3, 4, 3), nn.Conv2d(4, 2, 1)
            self.layers = [self.conv] if in_a_list else []

        def forward(self, x: Tensor) -> Tensor:
            first = self.layers[0] if self.layers else self.conv
            return self.output(first(x).relu())  # type: ignore[no-any-return]

    model, x = randomised(Net()), images(4, 9)
    result = insert_batchnorm(model, [x])
    assert inserted_batchnorms(result) == ["conv.1"]
    assert_same_outputs(model, result, x)
    result.train()(x).sum().backward()
    weight = result.conv[0].weight
    assert weight.grad is not None and weight.grad.abs().max() > 0
    before = result.eval()(x)
    with torch.no_grad():
        weight[:, 0].mul_(2)
    assert not torch.equal(result(x), before)


class WithSlots(nn.Conv2d):
    __slots__ = ("note",)


def test_a_layer_whose_class_has_slots_is_wrapped_and_in_a_list_refused() -> None:
    model, x = randomised(nn.Sequential(OrderedDict(conv=WithSlots(3, 4, 3), relu=nn.ReLU()))), images(4, 9)
    assert_same_outputs(model, insert_batchnorm(model, [x], include_output=True), x)
    held = randomised(ReachedElsewhere(among_features=False, hold=lambda layers: layers))
    held.first = held.held[0] = WithSlots(3, 4, 3)
    with pytest.raises(GraphError, match=r"does not call first\.1 whenever it calls the layer"):
        insert_batchnorm(held, [x])


@pytest.mark.parametrize("network", [*AWKWARD, small_vgg], ids=lambda network: network.__name__)
@pytest.mark.parametrize("include_output", [False, True])
def test_however_layers_are_held_outputs_and_class_stay_and_the_result_can_be_copied_loaded_and_trained(
    network: Callable[[], nn.Module], include_output: bool
) -> None:
    model = randomised(network())
    result = insert_batchnorm(model, [images(6, 9)], include_output=include_output)
    norms = [module for module in result.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert type(result) is type(model)
    assert_same_outputs(model, result, images(3, 9, seed=2))
    other = randomised(copy.deepcopy(result), seed=9)
    other.load_state_dict(result.state_dict(), strict=True)
    assert_same_outputs(result, other, images(2, 9, seed=2))
    result.train()(images(3, 9, seed=2))
    assert [int(norm.num_batches_tracked) for norm in norms] == [1] * len(norms)


@pytest.mark.parametrize("network", [CalledTwice, CalledFromTwoSequentials])
def test_a_layer_that_is_called_twice_gets_one_batchnorm_that_is_called_twice(network: type[nn.Module]) -> None:
    model = randomised(network())
    result = insert_batchnorm(model, [images(6, 9, channels=8)])
    (norm,) = [module for module in result.modules() if isinstance(module, nn.BatchNorm2d)]
    assert_same_outputs(model, result, images(3, 9, seed=2, channels=8))
    result.train()(images(3, 9, channels=8))
    assert norm.num_batches_tracked == 2


def test_a_layer_at_two_places_of_one_sequential_gets_its_batchnorm_at_both() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = sequential(conv, nn.ReLU(), conv, nn.ReLU(), nn.Conv2d(8, 4, 1))
    result = insert_batchnorm(model, [images(6, 8, channels=8)])
    assert types(result) == ["Conv2d", "BatchNorm2d", "ReLU", "ReLU", "Conv2d"]  # children() names each module once
    assert [type(module).__name__ for module in result][3:5] == ["Conv2d", "BatchNorm2d"]
    assert_same_outputs(model, result, images(2, 8, seed=2, channels=8))


def test_a_layer_under_two_names_keeps_both_and_they_stay_one() -> None:
    result = insert_batchnorm(randomised(TwoNames()), [images(4, 8)])
    assert types(result.first) == types(result.second) == ["Conv2d", "BatchNorm2d"]
    assert result.first[0] is result.second[0]
    assert result.first[1] is result.second[1]


def test_parts_held_besides_the_whole_stay_parts_of_it() -> None:
    result = insert_batchnorm(randomised(SlicesAsAttributes()), [images(4, 9)])
    whole = [id(module) for module in result.features.modules() if not list(module.children())]
    parts = [id(m) for part in (result.lower, result.upper) for m in part.modules() if not list(m.children())]
    assert whole == parts


@pytest.mark.parametrize("model", [nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3, bias=False)], ids=["bias", "no bias"])
def test_a_model_that_is_itself_a_layer_becomes_a_sequential(model: nn.Conv2d) -> None:
    model = randomised(model)
    result = insert_batchnorm(model, [images(4, 8)], include_output=True)
    assert types(result) == ["Conv2d", "BatchNorm2d"]
    assert_same_outputs(model, result, images(2, 8, seed=2))


def test_a_model_that_is_itself_an_output_layer_is_returned_as_a_copy() -> None:
    model = randomised(nn.Conv2d(3, 8, 3))
    with pytest.warns(UserWarning, match=r"^no BatchNorm was inserted: the model \(output layer\)$"):
        result = insert_batchnorm(model, [images(4, 8)])
    assert type(result) is nn.Conv2d
    assert result is not model


def test_without_a_site_the_result_is_a_copy_with_the_same_keys() -> None:
    model = randomised(TokenMixer())
    with pytest.warns(
        UserWarning, match=r"no BatchNorm was inserted: embed, mix \(the output, batch x .*, is not batch x channels\)"
    ):
        result = insert_batchnorm(model, [torch.rand(4, 5, 6)])
    assert result is not model
    assert result.state_dict().keys() == model.state_dict().keys()


def test_the_head_can_be_replaced_as_before() -> None:
    result = insert_batchnorm(small_vgg(), [images(4, 16)])
    result.classifier[-1] = nn.Linear(result.classifier[-1].in_features, 3)
    assert result(images(2, 16)).shape == (2, 3)


def test_the_keys_of_a_vgg_are_those_of_the_renumbered_layers_and_batchnorms() -> None:
    result = insert_batchnorm(small_vgg(), [images(4, 16)], layers=("conv",))
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert list(result.features.state_dict()) == [
        *("0.weight", "0.bias"),
        *(f"1.{name}" for name in norm),
        *("4.weight", "4.bias"),
        *(f"5.{name}" for name in norm),
    ]


def test_a_second_insertion_finds_nothing_left_to_do() -> None:
    once = insert_batchnorm(small_vgg(), [images(4, 16)])
    with pytest.warns(UserWarning, match=r"features.0, features.4, .* \(already followed by a normalization\)"):
        twice = insert_batchnorm(once, [images(4, 16)])
    assert types(twice.features) == types(once.features)
    assert types(twice.classifier) == types(once.classifier)


def test_conv_and_dense_can_be_inserted_one_after_the_other() -> None:
    model, batch = small_vgg(), images(6, 16)
    both = insert_batchnorm(model, [batch])
    stepwise = insert_batchnorm(insert_batchnorm(model, [batch], layers=("conv",)), [batch], layers=("dense",))
    assert both.state_dict().keys() == stepwise.state_dict().keys()
    for name, tensor in both.state_dict().items():
        assert torch.equal(tensor, stepwise.state_dict()[name]), name


def test_attributes_of_a_layer_can_be_set_through_the_pair_that_replaces_it() -> None:
    wrapped: Any = NormalizedLayer(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    weight = nn.Parameter(torch.zeros(8, 3, 3, 3))
    wrapped.weight, wrapped.bias, wrapped.stride, wrapped.note = weight, None, (2, 2), "of the pair"
    assert wrapped[0].weight is weight and wrapped[0].bias is None and wrapped[0].stride == (2, 2)
    assert wrapped.note == "of the pair" and "note" not in vars(wrapped[0])
    assert wrapped(torch.rand(1, 3, 9, 9)).shape == (1, 8, 4, 4)
    assert next(iter(wrapped.state_dict())) == "0.weight"
    wrapped.training = False
    assert wrapped[0].training
    wrapped[0] = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    wrapped[1] = norm = nn.BatchNorm2d(8)
    assert list(wrapped) == [wrapped[0], norm] and len(wrapped[0]) == 2


@pytest.mark.parametrize("change", [spectral_norm, partial(l1_unstructured, name="weight", amount=0.5)])
def test_the_layer_in_a_pair_can_be_pruned_and_parametrized(change: Callable[[nn.Module], object]) -> None:
    wrapped: Any = NormalizedLayer(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    original, x = wrapped.weight.clone(), torch.rand(1, 3, 9, 9)
    change(wrapped[0])
    wrapped.eval()  # in train mode, each look at a spectrally normalized weight changes it
    assert torch.equal(wrapped.weight, wrapped[0].weight) and not torch.equal(wrapped.weight, original)
    assert torch.equal(wrapped(x), wrapped[1](F.conv2d(x, wrapped.weight, wrapped.bias)))
