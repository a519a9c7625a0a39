import copy
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from bn_insert import (
    CheckpointError,
    GraphError,
    adapt_statistics,
    compare_outputs,
    fold_batchnorm,
    insert,
    insert_batchnorm,
    inserted_batchnorms,
    load_checkpoint,
    recalibrate,
    save_checkpoint,
)
from bn_insert.demo import images_path, network_path
from bn_insert.demo.training import demo_network
from bn_insert.errors import messages_name_options
from bn_insert.surgery.fold import fold
from bn_insert.surgery.fold_weights import Affine, batchnorm_affine, fold_inputs, fold_outputs
from support.networks import (
    AWKWARD,
    AnyModule,
    CalledFromTwoSequentials,
    CalledTwice,
    features,
    images,
    narrow_vgg,
    randomised,
    sequential,
    small_vgg,
    torchvision_vgg,
)


def fine_tuned(model: AnyModule, seed: int = 3) -> AnyModule:
    """Give every BatchNorm statistics, gamma and beta far from an identity; gammas of 0 and below among them."""
    generator = torch.Generator().manual_seed(seed)
    for norm in norms(model):
        if norm.running_mean is not None:
            norm.running_mean.normal_(0, 2, generator=generator)
            norm.running_var.uniform_(0.1, 5, generator=generator)
        if norm.weight is not None:
            with torch.no_grad():
                norm.weight.normal_(1, 0.7, generator=generator)
                norm.weight[0], norm.weight[1] = 0, -1.5
                norm.bias.normal_(0, 2, generator=generator)
    return model.eval()


def positive(model: AnyModule) -> AnyModule:
    """Make every gamma positive."""
    for norm in norms(model):
        if norm.weight is not None:
            norm.weight.data.abs_().add_(0.1)
    return model


def norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def bits(model: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Return the state dict with every tensor as its bytes, so that +0 and -0 differ."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().numpy().tobytes())
        for name, tensor in model.state_dict().items()
    }


def assert_same_function(model: nn.Module, folded: nn.Module, x: Tensor, rtol: float = 1e-5) -> None:
    comparison = compare_outputs(model, folded, [x])
    assert comparison.within(rtol=rtol), comparison
    assert comparison.top1_agreement == 1 or comparison.top1_agreement != comparison.top1_agreement  # nan: one output


def assert_folds(model: nn.Module, x: Tensor) -> None:
    """Check that no BatchNorm is left and the outputs are the same."""
    assert norms(model)
    folded = fold_batchnorm(model, x)
    assert not norms(folded)
    assert_same_function(model, folded, x)


def digits() -> tuple[Tensor, Tensor]:
    """Return the demo network's images and their labels."""
    paths = sorted(images_path().glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, torch.tensor(
        [int(path.parent.name) for path in paths]
    )


def random_affine(channels: int, *, shifts: bool = True) -> Affine:
    shift = torch.randn(channels, dtype=torch.float64)
    return Affine(torch.randn(channels, dtype=torch.float64), shift if shifts else torch.zeros_like(shift))


def mapped(affine: Affine, values: Tensor) -> Tensor:
    shape = (1, -1) + (1,) * (values.ndim - 2)
    return values * affine.scale.view(shape) + affine.shift.view(shape)


# The algebra, on plain tensors

CONVS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], bool, int]] = {
    "conv1d": (F.conv1d, (6, 4, 3), False, 1),
    "conv2d": (F.conv2d, (6, 4, 3, 3), False, 1),
    "conv3d": (F.conv3d, (6, 4, 3, 1, 2), False, 1),
    "grouped": (F.conv2d, (6, 2, 3, 3), False, 2),
    "depthwise": (F.conv2d, (8, 1, 3, 3), False, 4),
    "transposed": (F.conv_transpose2d, (4, 6, 3, 3), True, 1),
    "grouped transposed": (F.conv_transpose2d, (4, 3, 3, 3), True, 2),
}


@pytest.mark.parametrize("kind", CONVS)
def test_a_conv_with_folded_outputs_is_the_conv_and_then_the_affine_map(kind: str) -> None:
    conv, shape, transposed, groups = CONVS[kind]
    weight, outputs = torch.randn(shape).double(), shape[1] * groups if transposed else shape[0]
    bias, x, affine = torch.randn(outputs).double(), torch.randn(2, 4, *(5 for _ in shape[2:])).double(), None
    affine = random_affine(outputs)
    folded = fold_outputs(weight, bias, affine, transposed=transposed, groups=groups)
    torch.testing.assert_close(conv(x, *folded, groups=groups), mapped(affine, conv(x, weight, bias, groups=groups)))


@pytest.mark.parametrize("kind", CONVS)
def test_a_conv_with_folded_inputs_is_the_affine_map_and_then_the_conv(kind: str) -> None:
    conv, shape, transposed, groups = CONVS[kind]
    weight, outputs = torch.randn(shape).double(), shape[1] * groups if transposed else shape[0]
    bias, x = torch.randn(outputs).double(), torch.randn(2, 4, *(5 for _ in shape[2:])).double()
    affine = random_affine(4, shifts=not transposed)
    folded = fold_inputs(weight, bias, affine, transposed=transposed, groups=groups)
    torch.testing.assert_close(conv(x, *folded, groups=groups), conv(mapped(affine, x), weight, bias, groups=groups))


def test_a_dense_layer_takes_up_an_affine_map_on_either_side() -> None:
    weight, bias, x = torch.randn(6, 4).double(), torch.randn(6).double(), torch.randn(3, 4).double()
    of_outputs, of_inputs = random_affine(6), random_affine(4)
    torch.testing.assert_close(
        F.linear(x, *fold_outputs(weight, bias, of_outputs)), mapped(of_outputs, F.linear(x, weight, bias))
    )
    torch.testing.assert_close(
        F.linear(x, *fold_inputs(weight, bias, of_inputs)), F.linear(mapped(of_inputs, x), weight, bias)
    )


def test_a_dense_layer_after_a_flatten_takes_up_one_map_for_all_positions_of_a_channel() -> None:
    weight, x, affine = torch.randn(6, 4 * 9).double(), torch.randn(2, 4, 3, 3).double(), random_affine(4)
    expected = F.linear(mapped(affine, x).flatten(1), weight)
    torch.testing.assert_close(F.linear(x.flatten(1), *fold_inputs(weight, None, affine)), expected)


def test_folded_float32_weights_are_the_float64_ones_rounded_once() -> None:
    weight, bias, affine = torch.randn(64, 8, 3, 3), torch.randn(64), random_affine(64)
    folded, shifted = fold_outputs(weight, bias, affine)
    assert torch.equal(folded, (weight.double() * affine.scale[:, None, None, None]).float())
    assert torch.equal(shifted, (bias.double() * affine.scale + affine.shift).float())


def test_a_layer_without_bias_gets_one_only_if_some_channel_is_shifted() -> None:
    weight = torch.randn(6, 4)
    assert fold_outputs(weight, None, random_affine(6, shifts=False))[1] is None
    assert fold_inputs(weight, None, random_affine(4, shifts=False))[1] is None
    assert fold_outputs(weight, None, random_affine(6))[1] is not None
    assert fold_inputs(weight, None, random_affine(4))[1] is not None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_folded_weights_keep_dtype_and_memory_format(memory_format: torch.memory_format) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        weight = torch.randn(6, 4, 3, 3).to(dtype=dtype, memory_format=memory_format)
        for folded, bias in (fold_outputs(weight, None, random_affine(6)), fold_inputs(weight, None, random_affine(4))):
            assert folded.dtype == bias.dtype == dtype
            assert folded.stride() == weight.stride()


def test_an_unchanged_channel_keeps_its_weights_and_bias_bit_for_bit_be_they_minus_zero_or_nan() -> None:
    weight = torch.tensor([[-0.0, float("nan")], [1.0, 1e-42]])
    bias = torch.tensor([-0.0, 3.0])
    folded = fold_outputs(weight, bias, Affine(torch.ones(2).double(), torch.zeros(2).double()))
    for before, after in zip((weight, bias), folded, strict=True):
        assert torch.equal(before.view(torch.int32), after.view(torch.int32))


def test_the_affine_map_of_a_batchnorm_is_its_eval_forward() -> None:
    norm, x = fine_tuned(nn.Sequential(nn.BatchNorm2d(8)).double()), torch.randn(3, 8, 4, 4).double()
    for affine in (True, False):
        norm[0].affine = affine
        gamma, beta = (norm[0].weight, norm[0].bias) if affine else (None, None)
        found = batchnorm_affine(norm[0].running_mean, norm[0].running_var, gamma, beta, norm[0].eps)
        expected = F.batch_norm(x, norm[0].running_mean, norm[0].running_var, gamma, beta, eps=norm[0].eps)
        torch.testing.assert_close(mapped(found, x), expected)


# The way back from an insertion


@pytest.mark.parametrize(("depth", "include_output"), [("vgg11", False), ("vgg16", True)])
def test_folding_gives_the_state_dict_from_before_the_insertion_bit_for_bit(depth: str, include_output: bool) -> None:
    model, x = torchvision_vgg(depth), images(4)
    inserted = insert_batchnorm(model, [x], include_output=include_output)
    assert norms(inserted)
    folded = fold_batchnorm(inserted, x)
    assert type(folded) is type(model)
    assert list(folded.state_dict()) == list(model.state_dict())
    assert bits(folded) == bits(model)
    assert str(folded) == str(model)
    model.load_state_dict(folded.state_dict(), strict=True)


@pytest.mark.parametrize("network", [*AWKWARD, CalledTwice, CalledFromTwoSequentials])
@pytest.mark.parametrize("placement", ["before_activation", "after_activation"])
def test_folding_undoes_an_insertion_into_awkward_networks(network: Callable[[], nn.Module], placement: str) -> None:
    model = randomised(network())
    x = images(4, 12, channels=8 if network in (CalledTwice, CalledFromTwoSequentials) else 3)
    inserted = insert(model, [x], placement=placement).model  # without a warning where there is nothing to insert
    folded = fold_batchnorm(inserted, x)
    assert not norms(folded)
    assert str(folded) == str(model)
    assert bits(folded) == bits(model)


def test_folding_undoes_an_insertion_into_named_children_and_layers_without_bias() -> None:
    children = {"conv": nn.Conv2d(3, 8, 3, bias=False), "relu": nn.ReLU(), "last": nn.Conv2d(8, 4, 1, bias=False)}
    model = sequential(nn.Sequential(), nn.ReLU())
    for name, child in children.items():
        model[0].add_module(name, child)
    model, x = randomised(model), images(4, 12)
    inserted = insert_batchnorm(model, [x])
    assert "0.conv_bn.weight" in inserted.state_dict()
    assert bits(fold_batchnorm(inserted, x)) == bits(model)


def test_folding_undoes_an_insertion_after_a_model_that_is_a_layer_itself() -> None:
    model, x = randomised(nn.Conv2d(3, 8, 3)), images(4, 12)
    folded = fold_batchnorm(insert_batchnorm(model, [x], include_output=True), x)
    assert type(folded) is nn.Conv2d
    assert bits(folded) == bits(model)


def test_folding_undoes_an_insertion_into_timms_vgg() -> None:
    model = randomised(timm.models.vgg.VGG([8, "M", 12, "M"], num_classes=4, mlp_ratio=0.01))
    x = images(2, 32)
    folded = fold_batchnorm(insert_batchnorm(model, [x]), x)
    assert bits(folded) == bits(model)


# After fine-tuning


def test_after_fine_tuning_outputs_agree_to_1e_5_and_every_image_has_the_same_class() -> None:
    model = demo_network()
    model.load_state_dict(torch.load(network_path(), weights_only=True))
    x, labels = digits()
    tuned = insert_batchnorm(model, [x]).train()
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.03, momentum=0.9)
    for rows in torch.randperm(len(x)).split(32):
        F.cross_entropy(tuned(x[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned = recalibrate(tuned.eval(), [x])
    assert not compare_outputs(tuned, model, [x]).within(rtol=0.1)
    folded = fold_batchnorm(tuned, x)
    assert_same_function(tuned, folded, x)
    model.load_state_dict(folded.state_dict(), strict=True)
    assert_same_function(tuned, model, x)


def test_a_deep_network_folds_exactly_in_float64() -> None:
    model, x = narrow_vgg("vgg16"), images(8)
    tuned = fine_tuned(insert_batchnorm(model, [x])).double()
    folded = fold_batchnorm(tuned, x.double())
    assert str(folded) == str(model)
    assert_same_function(tuned, folded, x, rtol=1e-12)


def test_in_float32_a_deep_folded_network_is_as_near_to_float64_as_the_unfolded_one() -> None:
    x = images(8)
    tuned = fine_tuned(insert_batchnorm(torchvision_vgg("vgg11"), [x]))
    exact = copy.deepcopy(tuned).double()
    error = compare_outputs(exact, fold_batchnorm(tuned, x), [x]).max_rel
    assert error <= 4 * compare_outputs(exact, tuned, [x]).max_rel


def test_a_residual_network_folds_and_keeps_its_attributes_and_its_own_sequentials() -> None:
    model, x = fine_tuned(randomised(torchvision.models.resnet18(num_classes=5))), images(8)
    folded = fold_batchnorm(model, x)
    assert not norms(folded)
    assert type(folded.bn1) is type(folded.layer1[0].bn2) is nn.Identity
    assert [type(module) for module in folded.layer2[0].downsample] == [nn.Conv2d]
    assert_same_function(model, folded, x)
    kept = [name for name in model.state_dict() if model.get_submodule(name.rpartition(".")[0]) not in norms(model)]
    assert set(kept) <= set(folded.state_dict())


def test_torchvisions_own_batchnorm_vgg_becomes_its_plain_vgg() -> None:
    model, x = fine_tuned(torchvision_vgg("vgg11_bn")), images(8)
    plain = torchvision_vgg("vgg11")
    plain.load_state_dict(fold_batchnorm(model, x).state_dict(), strict=True)
    assert_same_function(model, plain, x)


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), torch.randn(3, 4, 9)),
        (nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), torch.randn(3, 2, 5, 5, 5)),
        (nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8), torch.randn(3, 4, 9, 9)),
        (nn.ConvTranspose2d(4, 8, 3, groups=2, stride=2), nn.BatchNorm2d(8), torch.randn(3, 4, 5, 5)),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), torch.randn(3, 4, 5, 5)),
        (nn.Linear(4, 8), nn.BatchNorm1d(8), torch.randn(3, 4)),
        (nn.Conv2d(4, 8, 3), nn.SyncBatchNorm(8), torch.randn(3, 4, 5, 5)),
        (nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False, eps=0.1), torch.randn(3, 4, 5, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_layer_and_batchnorm_folds(layer: nn.Module, norm: nn.Module, x: Tensor) -> None:
    assert_folds(fine_tuned(nn.Sequential(randomised(layer), norm, nn.ReLU())), x)


def test_a_pair_called_twice_folds_once() -> None:
    conv, norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    assert_folds(fine_tuned(sequential(conv, norm, nn.ReLU(), conv, norm)), images(4, 12, channels=4))


def test_one_batchnorm_after_two_layers_folds_into_both() -> None:
    norm = nn.BatchNorm2d(4)
    model = sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), norm)
    assert_folds(fine_tuned(model), images(4, 12))


def test_pooling_and_dropout_may_be_between_the_layer_and_its_batchnorm() -> None:
    model = sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Dropout(), nn.BatchNorm2d(8), nn.ReLU())
    assert_folds(positive(fine_tuned(model)), images(4, 12))


# Forward, into the next layer


@pytest.mark.parametrize(
    "downstream",
    [
        [nn.Flatten(), nn.Linear(8 * 100, 5)],
        [nn.Dropout2d(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(8 * 25, 5)],
        [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * 4, 5, bias=False)],
        [nn.Conv2d(8, 6, 3, groups=2)],
        [nn.Conv2d(8, 6, 1, padding="same", bias=False)],
        [nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")],
        [nn.AvgPool2d(3, padding=1, count_include_pad=False), nn.ReflectionPad2d(1), nn.Conv2d(8, 6, 3)],
        [nn.Flatten(2), nn.Conv1d(8, 6, 3)],
        [nn.Flatten(2), nn.Unflatten(2, (20, 5)), nn.Conv2d(8, 6, 3)],
        [nn.Flatten(), nn.Unflatten(1, (800, 1)), nn.Conv1d(800, 6, 1)],
    ],
    ids=lambda modules: "-".join(type(module).__name__ for module in modules),
)
def test_after_an_activation_a_batchnorm_folds_into_the_next_layer(downstream: list[nn.Module]) -> None:
    model = fine_tuned(sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), *downstream))
    assert_folds(model, images(6, 12))


def test_with_positive_gammas_it_folds_through_max_pooling() -> None:
    tail = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 25, 5)
    model = fine_tuned(sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), *tail))
    with pytest.raises(GraphError, match=r"BatchNorm 2 after layer 0 .*max_pool2d 3 is in between"):
        fold_batchnorm(model, images(1, 12))
    assert_folds(positive(model), images(6, 12))


def test_fine_tuned_dense_layers_with_batchnorm_after_the_activation_fold_to_the_plain_vgg() -> None:
    model, x = small_vgg(), images(16, 16)
    tuned = fine_tuned(insert_batchnorm(model, [x], layers=["dense"], placement="after_activation"))
    folded = fold_batchnorm(tuned, x)
    assert str(folded) == str(model)
    assert_same_function(tuned, folded, x)


def test_without_a_shift_it_folds_into_a_padded_and_a_transposed_conv() -> None:
    for layer in (nn.Conv2d(8, 4, 3, padding=1), nn.ConvTranspose2d(8, 4, 3)):
        model = fine_tuned(sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), layer))
        model[2].running_mean.zero_()
        model[2].bias.data.zero_()
        assert_folds(model, images(4, 12))


def test_an_affine_map_of_all_that_two_branches_read_folds_into_both() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8))
            self.left, self.right = nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.left(x).sigmoid() + self.right(x)

    assert_folds(fine_tuned(randomised(Branches())), images(4, 12))


def test_a_batchnorm_of_the_input_folds_forward() -> None:
    assert_folds(fine_tuned(sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.ReLU())), images(4, 12))


# Whatever the network

PIECES: tuple[Callable[[], nn.Module], ...] = (
    *(lambda: nn.Conv2d(4, 4, 3), lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False)),
    lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=2),
    *(lambda: nn.ConvTranspose2d(4, 4, 2, groups=2), lambda: nn.Conv2d(4, 4, 1)),
    *(lambda: nn.BatchNorm2d(4), lambda: nn.BatchNorm2d(4), lambda: nn.BatchNorm2d(4, affine=False)),
    *(nn.ReLU, lambda: nn.ReLU(inplace=True), nn.Sigmoid, nn.Dropout, nn.AlphaDropout),
    *(lambda: nn.MaxPool2d(2, 1), lambda: nn.AvgPool2d(2, 1, ceil_mode=True), lambda: nn.AvgPool2d(3, 1, 1)),
    *(lambda: nn.AdaptiveAvgPool2d(9), lambda: nn.ReplicationPad2d(1), lambda: nn.ConstantPad2d(1, 0.5)),
)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(pieces=st.lists(st.sampled_from(PIECES), min_size=2, max_size=7), seed=st.integers(0, 99), flip=st.booleans())
def test_whatever_is_folded_the_function_stays_the_same(
    pieces: list[Callable[[], nn.Module]], seed: int, flip: bool
) -> None:
    stack = nn.Sequential(*(piece() for piece in pieces), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    for parameter in stack.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    model = fine_tuned(stack, seed).double()
    if not flip:
        positive(model)
    x = images(3, 16, seed, channels=4).double()
    try:
        folded = fold_batchnorm(model, x)
    except GraphError as error:
        assert "cannot be folded exactly" in str(error)
    else:
        assert compare_outputs(model, folded, [x]).within(rtol=1e-9)


# What must not be folded


def refusal(model: nn.Module, x: Tensor) -> str:
    """Return the message with which folding is refused."""
    with pytest.raises(GraphError) as caught:
        fold_batchnorm(model, x)
    return str(caught.value)


def test_a_shift_before_a_conv_that_pads_with_zeros_is_refused_with_place_and_way_out() -> None:
    next_conv = nn.Conv2d(8, 4, 3, padding=1)
    model = fine_tuned(sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), next_conv))
    message = refusal(model, images(1, 12))
    assert message.startswith("BatchNorm 2 after layer 0 cannot be folded exactly")
    assert "relu 1 is in between" in message
    assert "conv 3 pads with zeros" in message
    assert "placement='before_activation'" in message


@pytest.mark.parametrize(
    ("downstream", "obstacle"),
    [
        ([nn.ConvTranspose2d(8, 4, 3)], "conv 3 is transposed"),
        ([nn.AvgPool2d(2, padding=1), nn.Conv2d(8, 4, 3)], "avg_pool2d 3 is in between"),
        ([nn.ZeroPad2d(1), nn.Conv2d(8, 4, 3)], "pad 3 is in between"),
        ([nn.ReLU(), nn.Conv2d(8, 4, 3)], "relu 3 is in between"),
        ([nn.Conv2d(8, 4, 3, padding="same")], "conv 3 pads with zeros"),
        ([nn.Flatten(), nn.Unflatten(1, (80, 10)), nn.Conv1d(80, 4, 3)], "unflatten 4 is in between"),
        ([nn.Dropout()], "its values reach the model's output"),
        ([nn.Linear(10, 4)], "dense 3 has its channels on another axis"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_commute_with_a_shift_is_named(downstream: list[nn.Module], obstacle: str) -> None:
    model = fine_tuned(sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), *downstream))
    assert obstacle in refusal(model, images(1, 12))


def test_a_batchnorm_without_running_statistics_is_refused() -> None:
    model = sequential(nn.Conv2d(3, 8, 3))
    model.append(nn.BatchNorm2d(8, track_running_stats=False))
    assert "BatchNorm 1 after layer 0 cannot be folded exactly: it has no running statistics" in refusal(
        model, images(2, 12)
    )


def test_a_layer_whose_calls_lead_to_different_batchnorms_is_refused() -> None:
    conv = nn.Conv2d(4, 4, 3)
    model = fine_tuned(sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), conv, nn.BatchNorm2d(4)))
    assert "conv 0 is also called elsewhere" in refusal(model, images(1, 12, channels=4))


class StandardizedConv(nn.Conv2d):
    """Standardizes its weight in each call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


def conv_with_buffer() -> nn.Conv2d:
    conv = nn.Conv2d(3, 8, 3)
    weight = conv.weight.detach()
    del conv.weight
    conv.register_buffer("weight", weight)
    return conv


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
            "computed by the parametrization WeightNorm; remove it first, with "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
        ),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Conv2d(3, 8, 3)), "computed by the parametrization Orthog"),
        (
            lambda: nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)),
            "computed by spectral_norm; remove it first, with torch.nn.utils.remove_spectral_norm(layer)",
        ),
        (
            lambda: nn.utils.weight_norm(nn.Conv2d(3, 8, 3)),
            "computed by weight_norm; remove it first, with torch.nn.utils.remove_weight_norm(layer)",
        ),
        (
            lambda: nn.utils.prune.l1_unstructured(nn.Conv2d(3, 8, 3), "weight", 0.5),
            "computed by pruning; remove that first, with torch.nn.utils.prune.remove(layer, 'weight')",
        ),
        (lambda: StandardizedConv(3, 8, 3), "computed by StandardizedConv; replace it with a plain layer"),
        (conv_with_buffer, "a buffer; make it an nn.Parameter first"),
    ],
    ids=["weight_norm", "orthogonal", "old spectral_norm", "old weight_norm", "pruning", "own class", "buffer"],
)
def test_for_a_weight_that_is_no_parameter_the_refusal_says_what_it_is_and_how_to_make_it_one(
    make: Callable[[], nn.Module], words: str
) -> None:
    message = refusal(fine_tuned(nn.Sequential(make(), nn.BatchNorm2d(8))), images(1, 12))
    assert f"the weight of conv 0 is {words}" in message
    assert "placement" not in message, "it is before any activation"


def test_a_hook_that_changes_the_outputs_of_a_layer_prevents_folding_whatever_the_placement() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    model[0].register_forward_hook(lambda _module, _inputs, output: output.clamp(-1, 1))
    message = refusal(fine_tuned(insert_batchnorm(model, [images(4, 12)])), images(1, 12))
    assert "clamp 0 is in between" in message
    assert "placement" not in message


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_or_bias_that_a_forward_also_uses_by_itself_is_refused(name: str) -> None:
    class OwnUse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.conv(x))) + getattr(self.conv, name).mean()

    inserted = insert_batchnorm(randomised(OwnUse()), [images(4, 12)])
    assert not norms(fold_batchnorm(inserted, images(1, 12))), "it changes no weight or bias so far"
    message = refusal(fine_tuned(inserted), images(1, 12))
    assert f"the {name} of conv conv.0 is also used elsewhere" in message


class ScaledBias(nn.Conv2d):
    """Adds twice its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None if self.bias is None else self.bias * 2)


def test_a_bias_that_a_layer_changes_in_each_call_is_refused() -> None:
    model = fine_tuned(nn.Sequential(ScaledBias(3, 8, 3), nn.BatchNorm2d(8)))
    assert "the bias of conv 0 is computed by ScaledBias" in refusal(model, images(1, 12))


def test_a_weight_that_another_layer_takes_as_its_input_is_refused() -> None:
    class WeightAsInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.first(x))) + self.second(self.first.weight).mean()

    model = fine_tuned(randomised(WeightAsInput()))
    assert "the weight of dense first is also used elsewhere" in refusal(model, features(4, 6))


@pytest.mark.filterwarnings("ignore:0, 3 no longer share a parameter")
def test_layers_that_share_a_bias_are_folded_each_for_itself() -> None:
    model = sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6))
    model[3].bias = model[0].bias
    model, x = fine_tuned(model), features(4, 6)
    folded = fold_batchnorm(model, x)
    assert torch.equal(folded[2].bias, model[3].bias)
    assert_same_function(model, folded, x)


# The result is run before it is returned


class ReadsModules(nn.Module):
    """Reads something of its modules, besides calling them."""

    def __init__(self, read: Callable[[nn.Sequential], float]) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) * self.read(self.features)


@pytest.mark.parametrize(
    "read",
    [len, lambda features: features[3].out_channels, lambda features: 1 + isinstance(features[2], nn.ReLU)],
    ids=["length", "attribute", "class"],
)
def test_where_a_forward_refers_to_children_by_number_they_keep_their_numbers(
    read: Callable[[nn.Sequential], float], tmp_path: Path
) -> None:
    model, x = fine_tuned(randomised(ReadsModules(read))), images(4, 12)
    result = fold(model, x)
    assert result.folded == ("features.1",)
    assert isinstance(result.model.features[1], nn.Identity)
    assert_same_function(model, result.model, x)
    save_checkpoint(result.model, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth", model=lambda: ReadsModules(read))
    assert torch.equal(loaded(x), result.model(x))


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda features: features[1].num_features, "cannot run: 'Identity' object has no attribute 'num_features'"),
        (lambda features: 1 + isinstance(features[1], nn.BatchNorm2d), "returns different outputs than with them"),
    ],
    ids=["attribute", "class"],
)
def test_a_forward_that_depends_on_a_folded_batchnorm_is_refused_with_the_way_out(
    read: Callable[[nn.Sequential], float], words: str
) -> None:
    model, x = fine_tuned(randomised(ReadsModules(read))), images(4, 12)
    message = refusal(model, x)
    assert message.startswith(
        f"ReadsModules without the folded BatchNorms {words}. Its forward accesses BatchNorms or layers"
    )
    assert message.endswith("change it to only call them, or leave in place the BatchNorms that it refers to (names)")
    inserted = insert_batchnorm(model, [x], include_output=True)
    with messages_name_options():
        assert refusal(inserted, x).endswith("that it refers to (--inserted-only)")
    assert fold(inserted, x, names=inserted_batchnorms(inserted)).left == ("features.1",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_alone_is_no_reason_to_refuse(dtype: torch.dtype) -> None:
    model, x = fine_tuned(sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), images(4, 12)
    # In 16 bits, numbers near 32768 are far from each other: before the normalization, the differences are lost.
    model[0].bias.data.fill_(32768)
    model[1].running_mean.fill_(32768)
    model.to(dtype)
    folded = fold_batchnorm(model, x.to(dtype))
    assert not compare_outputs(model, folded, [x]).within(rtol=0.2)
    assert_same_function(copy.deepcopy(model).double(), fold_batchnorm(copy.deepcopy(model).double(), x.double()), x)


class MixedPrecision(nn.Module):
    """Some convs with BatchNorm under autocast, and a dense layer in the dtype of its weights."""

    def __init__(self, read: Callable[[nn.Sequential], float]) -> None:
        super().__init__()
        blocks = ((nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for channels in (3, 16, 16))
        self.features, self.fc, self.read = nn.Sequential(*chain(*blocks)), nn.Linear(16, 5), read

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.features(x)
        return self.fc(x.float().mean((2, 3))) * self.read(self.features)


def mixed_precision(read: Callable[[nn.Sequential], float] = lambda _: 1) -> MixedPrecision:
    return positive(fine_tuned(randomised(MixedPrecision(read))))


def test_rounding_under_autocast_is_no_reason_to_refuse() -> None:
    model, x = mixed_precision(), images(4, 12)
    folded = fold_batchnorm(model, x)
    assert not norms(folded)
    assert_same_function(model, folded, x, rtol=0.1)


def test_where_float64_cannot_show_it_a_clear_difference_is_still_refused_or_avoided() -> None:
    model, x = mixed_precision(len), images(4, 12)
    folded = fold_batchnorm(model, x)
    assert len(folded.features) == len(model.features)
    model = mixed_precision(lambda features: 1 + isinstance(features[1], nn.BatchNorm2d))
    assert "returns different outputs than with them" in refusal(model, x)


def test_on_a_device_without_float64_outputs_are_compared_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks_float64(_: nn.Module) -> nn.Module:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    monkeypatch.setattr(nn.Module, "double", lacks_float64)
    folded = fold_batchnorm(fine_tuned(randomised(ReadsModules(len))), images(4, 12))
    assert isinstance(folded.features[1], nn.Identity)


GENERATOR = torch.Generator()


@pytest.mark.parametrize(
    "noise",
    [
        lambda: torch.from_numpy(np.random.default_rng().normal(size=1)).float(),
        lambda: torch.rand(1, generator=GENERATOR),
        lambda: torch.tensor(perf_counter() * 100 % 1),
    ],
    ids=["NumPy", "own generator", "time"],
)
def test_a_network_whose_outputs_vary_by_themselves_is_folded(noise: Callable[[], Tensor]) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.body(x), noise()

    model, x = fine_tuned(randomised(Noisy())), images(4, 12)
    result = fold(model, x)
    assert result.folded == ("body.1",)
    assert_same_function(model.body, result.model.body, x)


def test_running_the_result_leaves_the_example_the_model_and_the_random_state_alone() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.calls = sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.body(x.add_(1)) + torch.rand(())

    model, x, before = fine_tuned(randomised(Draws())), images(4, 12), images(4, 12)
    state = torch.get_rng_state()
    fold_batchnorm(model, x)
    assert torch.equal(x, before)
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batchnorm_that_activates_too_is_refused() -> None:
    model = fine_tuned(nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8)))
    assert "BatchNormAct2d does more than normalize (relu)" in refusal(model, images(1, 12))


def test_a_dense_layer_on_tokens_does_not_take_up_a_batchnorm_of_the_tokens() -> None:
    model = fine_tuned(sequential(nn.Linear(6, 8), nn.BatchNorm1d(5)))
    assert "dense 0 has its channels on another axis" in refusal(model, torch.randn(2, 5, 6))


def test_weights_that_would_leave_the_range_of_their_dtype_are_refused() -> None:
    model = sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).half()
    model[1].weight.data.fill_(60000)
    model[1].running_var.fill_(1e-4)
    assert "out of the range of torch.float16" in refusal(model, images(1, 12).half())


def test_a_result_has_the_names_of_what_was_folded_and_what_was_left() -> None:
    model, x = fine_tuned(randomised(PreActivation())), images(4, 12)
    model.stem = nn.Sequential(model.stem, nn.BatchNorm2d(8)).eval()
    result = fold(model, x)
    assert (result.folded, result.left) == (("stem.1",), ("norm",))
    assert bits(result.model) == bits(fold_batchnorm(model, x))
    assert (fold(result.model, x).folded, fold(small_vgg(), x).left) == ((), ())


def test_what_was_inserted_is_folded_alone_and_what_was_there_before_stays() -> None:
    model, x = (
        randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))).eval(),
        images(4, 12),
    )
    inserted = fine_tuned(insert_batchnorm(model, [x], include_output=True))
    assert inserted_batchnorms(model) == []
    assert inserted_batchnorms(inserted) == ["4"]
    result = fold(inserted, x, names=inserted_batchnorms(inserted))
    assert (result.folded, result.left) == (("4",), ("1",))
    assert result.model.state_dict().keys() == model.state_dict().keys()
    assert inserted_batchnorms(result.model) == []


def test_if_a_batchnorm_from_before_an_insertion_cannot_be_folded_the_error_says_how_to_leave_it() -> None:
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten()
    model, x = fine_tuned(sequential(*layers)), images(4, 12)
    inserted = fine_tuned(insert_batchnorm(model, [x], include_output=True))
    message = refusal(inserted, x)
    way_out = "Or fold only the BatchNorms that bn-insert inserted ({}): 2 is not one of them, and stays"
    assert message.endswith(f". {way_out.format('names=inserted_batchnorms(model)')}")
    assert "placement" not in message
    with messages_name_options():
        assert refusal(inserted, x).endswith(way_out.format("--inserted-only"))
    assert "bn-insert" not in refusal(model, x), "nothing was inserted"
    assert fold(inserted, x, names=inserted_batchnorms(inserted)).left == ("2",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["stem.2", "stem.1"], r"names has 'stem.2', which is not a BatchNorm of PreActivation; did you mean stem.1\?"),
        (["conv"], "names has 'conv', .*; its BatchNorms are: stem.1, norm"),
        ("stem", "names has 'stem', which is not a BatchNorm"),
        (5, "names has 5, which is not a BatchNorm"),
    ],
)
def test_a_name_to_fold_that_no_batchnorm_has_is_refused(names: Any, message: str) -> None:
    model = randomised(PreActivation())
    model.stem = nn.Sequential(model.stem, nn.BatchNorm2d(8)).eval()
    with pytest.raises(GraphError, match=message):
        fold(model, images(4, 12), names=names)
    assert fold(model, images(4, 12), names="stem.1").folded == ("stem.1",)


def test_a_name_to_fold_is_refused_in_a_network_without_batchnorm() -> None:
    with pytest.raises(GraphError, match=r"names has 'features\.1', .*; its BatchNorms are: none"):
        fold(small_vgg(), images(4, 32), names=["features.1"])


class PreActivation(nn.Module):
    """A residual block whose first BatchNorm reads what the shortcut reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm, self.relu, self.conv = nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.conv(self.relu(self.norm(x)))


class Functional(nn.Module):
    """Normalizes by a function, with what a BatchNorm holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias)


def plain() -> nn.Module:
    return sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda _: Functional().eval(), r"batch_norm in the model \(Functional\)"),
        (lambda x: torch.export.export(plain(), (x,)).module(), r"batch_norm in 1 \(\w+\)"),
        (make_fx(plain()), r"native_batch_norm in the model \("),
        (lambda _: sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8)), r"1 \(FrozenBatchNorm2d\)"),
    ],
    ids=["function", "exported", "make_fx", "frozen"],
)
def test_batchnorms_that_are_not_modules_of_torch_are_a_warning(
    make: Callable[[Tensor], nn.Module], found: str
) -> None:
    x = images(4, 12)
    model = make(x)
    with pytest.warns(UserWarning, match=f"^nothing was folded: these are not modules of torch.nn: {found}") as caught:
        folded = fold_batchnorm(model, x)
    assert [Path(each.filename) for each in caught] == [Path(__file__)]
    assert torch.equal(folded(x), model(x))


def test_some_batchnorms_that_are_not_modules_of_torch_are_a_warning_too() -> None:
    model = fine_tuned(sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), FrozenBatchNorm2d(8)))
    with pytest.warns(UserWarning, match=r"^some BatchNorms were not folded: .*: 2 \(FrozenBatchNorm2d\)"):
        assert not norms(fold_batchnorm(model, images(1, 12)))


def test_a_batchnorm_that_belongs_to_no_layer_stays() -> None:
    model, x = fine_tuned(randomised(PreActivation())), images(4, 12)
    folded = fold_batchnorm(model, x)
    assert bits(folded) == bits(model)
    assert compare_outputs(model, folded, [x]).bit_identical


def test_an_identity_stays_where_an_in_place_activation_would_overwrite_what_others_read() -> None:
    model, x = randomised(PreActivation()), images(4, 12)
    model.norm = nn.BatchNorm2d(8, eps=0, affine=False).eval()
    assert len(norms(fold_batchnorm(model, x))) == 1
    model.relu.inplace = False
    folded = fold_batchnorm(model, x)
    assert not norms(folded)
    assert compare_outputs(model, folded, [x]).bit_identical


# What stays as it was


def test_the_given_model_is_never_changed() -> None:
    model, x = fine_tuned(insert_batchnorm(small_vgg(), [images(8, 16)])).train(), images(8, 16)
    before, kept, printed = bits(model), dict(model.named_parameters()), str(model)
    fold_batchnorm(model, x)
    assert bits(model) == before
    assert str(model) == printed
    assert all(parameter is kept[name] for name, parameter in model.named_parameters())
    assert all(module.training for module in model.modules())


def test_the_copy_keeps_training_flags_requires_grad_and_memory_format_of_each_layer() -> None:
    model = fine_tuned(sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False)))
    model.append(nn.BatchNorm2d(4))
    model.to(memory_format=torch.channels_last).train()
    model[0].eval()
    model[0].requires_grad_(False)
    folded = fold_batchnorm(fine_tuned_in_place(model), images(1, 12))
    assert [module.training for module in folded] == [False, True, True]
    assert {name: parameter.requires_grad for name, parameter in folded.named_parameters()} == {
        **{"0.weight": False, "0.bias": False},
        **{"2.weight": True, "2.bias": True},
    }
    assert folded[2].weight.is_contiguous(memory_format=torch.channels_last)


def fine_tuned_in_place(model: AnyModule) -> AnyModule:
    """Give the BatchNorms other values, and leave training flags alone."""
    flags = [module.training for module in model.modules()]
    fine_tuned(model)
    for module, flag in zip(model.modules(), flags, strict=True):
        module.training = flag
    return model


@pytest.mark.filterwarnings("ignore:0, 3 no longer share a parameter")
def test_layers_that_share_a_weight_are_folded_each_for_itself() -> None:
    model = sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6))
    model[3].weight = model[0].weight
    model, x = fine_tuned(model), features(4, 6)
    folded = fold_batchnorm(model, x)
    assert torch.equal(folded[2].weight, model[3].weight)
    assert_same_function(model, folded, x)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_other_dtypes_fold_to_their_own_precision(dtype: torch.dtype, rtol: float) -> None:
    model = fine_tuned(sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))).to(dtype)
    folded = fold_batchnorm(model, images(4, 12).to(dtype))
    assert {parameter.dtype for parameter in folded.parameters()} == {dtype}
    assert compare_outputs(model, folded, [images(4, 12)]).within(rtol=rtol)


def test_a_users_own_pair_in_a_sequential_stays_one_with_the_layer_as_child_0() -> None:
    model = fine_tuned(sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.ReLU()))
    assert list(fold_batchnorm(model, images(1, 12)).state_dict()) == ["0.0.weight", "0.0.bias"]


def test_a_wrapper_made_by_the_insertion_goes_again_after_copying_too() -> None:
    model, x = randomised(nn.ModuleDict({"a": nn.Conv2d(3, 8, 3)})["a"]), images(4, 12)
    inserted = copy.deepcopy(insert_batchnorm(model, [x], include_output=True))
    assert list(inserted.state_dict())[:2] == ["0.weight", "0.bias"]
    assert list(fold_batchnorm(fine_tuned(inserted), x).state_dict()) == ["weight", "bias"]


def test_a_model_without_batchnorm_is_copied() -> None:
    model = small_vgg()
    for example in (images(1, 16), None):
        folded = fold_batchnorm(model, example)
        assert folded is not model
        assert bits(folded) == bits(model)


class Tied(nn.Module):
    """Two convs with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).relu()  # type: ignore[no-any-return]


def test_layers_that_share_a_weight_no_more_are_loaded_as_they_were_folded(tmp_path: Path) -> None:
    x = images(4, 12)
    model = fine_tuned(insert_batchnorm(Tied().eval(), [x]))
    folded = fold(model, x)
    assert folded.untied == ("first.0", "second.0")
    save_checkpoint(folded.model, tmp_path / "folded.pth")
    assert torch.equal(load_checkpoint(tmp_path / "folded.pth", model=Tied)(x), folded.model(x))
    torch.save(folded.model.state_dict(), tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match=r"first.weight and second.weight are one parameter of Tied, and differ"):
        load_checkpoint(tmp_path / "state.pth", model=Tied)
    with pytest.warns(UserWarning, match=r"first\.0, second\.0 no longer share a parameter: load_c"):
        fold_batchnorm(model, x)
    with pytest.warns(UserWarning, match=r"first.*, second.* no longer share a parameter"):
        adapt_statistics(Tied().eval(), [x], [20 * x + 9])
    unchanged: Any = fold(insert_batchnorm(Tied().eval(), [x]), x)
    assert not unchanged.untied
    assert unchanged.model.first.weight is unchanged.model.second.weight  # trained further, they stay one


class TiedInMemory(nn.Module):
    """A parameter that is a view of another: not one parameter with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = nn.Linear(12, 4), nn.Linear(4, 12), nn.Linear(12, 3)
        self.decoder.weight = nn.Parameter(self.encoder.weight.t())

    def forward(self, x: Tensor) -> Any:
        return self.head(self.decoder(self.encoder(x).relu()).relu())


@pytest.mark.parametrize("change", ["fold", "adapt", "equalize"])
def test_weights_that_share_memory_in_the_class_are_loaded_as_they_were_saved(change: str, tmp_path: Path) -> None:
    model, x = TiedInMemory().eval(), features(64, 12)
    if change == "adapt":
        result = adapt_statistics(model, [x], [3 * x + 1])
    else:
        inserted = insert_batchnorm(model, [x], equalize=True)
        result = inserted if change == "equalize" else fold_batchnorm(fine_tuned(inserted), x)
    save_checkpoint(result, tmp_path / "result.pth")
    assert torch.equal(load_checkpoint(tmp_path / "result.pth", model=TiedInMemory)(x), result(x))
    save_checkpoint(model, tmp_path / "model.pth")
    loaded: Any = load_checkpoint(tmp_path / "model.pth", model=TiedInMemory)
    assert loaded.encoder.weight.data_ptr() == loaded.decoder.weight.data_ptr()  # equal: they still share it


class WithLowRank(nn.Linear):
    """A dense layer with an update of low rank: no single weight that a BatchNorm could be folded into."""

    def __init__(self) -> None:
        super().__init__(12, 8)
        self.down, self.up = nn.Parameter(torch.rand(2, 12)), nn.Parameter(torch.rand(8, 2))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in nn.Linear
        return super().forward(input) + input @ self.down.T @ self.up.T


def test_an_inserted_batchnorm_that_stays_is_a_warning() -> None:
    x = features(32, 12)
    model = fine_tuned(insert_batchnorm(sequential(WithLowRank(), nn.ReLU(), nn.Linear(8, 3)), [x]))
    with pytest.warns(UserWarning, match=r"^inserted BatchNorms that fold into no layer were left in place: 1$"):
        folded = fold_batchnorm(model, x)
    assert_same_function(model, folded, x)


def test_a_buffer_that_is_a_view_of_a_parameter_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    class WithView(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("transposed", self.layer.weight.detach().t())

        def forward(self, x: Tensor) -> Any:
            return self.layer(x).relu() @ self.transposed

    model, x = WithView().eval(), features(8, 6)
    model.transposed = torch.rand(6, 6)
    save_checkpoint(model, tmp_path / "model.pth")
    assert torch.equal(load_checkpoint(tmp_path / "model.pth", model=WithView)(x), model(x))
