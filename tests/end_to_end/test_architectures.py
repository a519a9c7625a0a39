from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from bn_insert import (
    CalibrationError,
    GraphError,
    calibrate,
    compare_outputs,
    equalize,
    find_edges,
    find_sites,
    fold_batchnorm,
    insert,
    insert_at,
    insert_batchnorm,
    recalibrate,
)
from bn_insert.graph.copies import unwrapped
from support.architectures import ARCHITECTURES, made

# The benchmark has all. Here, torchvision's VGGs are tested in tests/surgery, and timm's with smaller dense convs there
# and in the recipe. The others have no operation, and no way to hold layers, that the tested ones lack.
LEFT_OUT = {name for name in ARCHITECTURES if name.startswith(("torchvision vgg", "timm vgg", "torchvision ssd"))}
LEFT_OUT.remove("timm vgg11, features only")
LEFT_OUT |= {
    "VGG for CIFAR, one dense layer",
    "VGG-Face style, functions",
    "LPIPS slices",
    "LeNet-5",
    "NatureCNN (DQN)",
    "causal Conv1d (TCN)",
    "convs over words (TextCNN)",
    "discriminator of DCGAN",
    "dense layers with skips (DeepSDF)",
    "encoder with outputs in a list",
    "feature pyramid (FPN)",
    "fully convolutional, dilated",
    "global residual (VDSR, DnCNN)",
    "hourglass",
    "local descriptors (TFeat)",
    "pre-activation residual blocks",
    "residual in residual dense block (ESRGAN)",
    "scores of two depths (FCN)",
    "two views in one batch",
    "volumes (C3D)",
}
assert ARCHITECTURES.keys() >= LEFT_OUT


def class_of(model: nn.Module) -> type[nn.Module]:
    return fx.GraphModule if isinstance(model, fx.GraphModule) else type(model)  # each of which has a class of its own


def batchnorms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def other(batch: Any) -> Any:
    """Return a batch of the same kind with other values."""
    return tree_map_only(Tensor, lambda tensor: tensor.flip(-1) * 0.7 + 0.1, batch)


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in LEFT_OUT])
def test_outputs_are_bit_identical_and_folding_leads_back(name: str) -> None:
    architecture, model = ARCHITECTURES[name], made(name)
    batch = architecture.batch()
    insertion = insert(model, [batch], equalize=True)
    equalized = insertion.model
    # What `insert_batchnorm` returns, without tracing the model again.
    inserted = insert_at(model, insertion.sites, insertion.moments)
    assert insertion.fault == ""
    assert class_of(inserted) is class_of(unwrapped(model))
    assert batchnorms(inserted) > batchnorms(model)
    assert compare_outputs(model, inserted, [batch, other(batch)]).bit_identical
    assert compare_outputs(model, equalized, [batch, other(batch)]).bit_identical
    if not architecture.folds:
        with pytest.raises(GraphError, match="cannot trace"):
            fold_batchnorm(inserted, batch)
        return
    # Equalization changes values alone: tests/surgery/test_equalization.py and test_properties.py fold what it gives.
    folded = fold_batchnorm(inserted, batch)
    assert batchnorms(folded) == 0
    assert same_tensors(folded, unwrapped(model)) == architecture.folds_exactly
    assert compare_outputs(model, folded, [batch, other(batch)]).max_rel <= (0 if architecture.folds_exactly else 1e-6)


def test_dense_layers_on_tokens_get_no_batchnorm() -> None:
    model = made("dense layers on 3-D inputs")
    sites = [site.name for site in find_sites(model, ARCHITECTURES["dense layers on 3-D inputs"].batch())]
    assert sites == ["embed", "hidden"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_every_step_handles_a_wrapped_model_as_the_module_in_it(wrap: Any) -> None:
    plain = made("VGG for CIFAR, one dense layer")
    batch = ARCHITECTURES["VGG for CIFAR, one dense layer"].batch()
    wrapped = wrap(plain)
    sites = find_sites(wrapped, batch)
    assert sites == find_sites(plain, batch)
    moments, expected = calibrate(wrapped, sites, [batch]), calibrate(plain, sites, [batch])
    assert all(torch.equal(moments[name].mean, expected[name].mean) for name in expected)
    inserted = insert_batchnorm(wrapped, [batch])
    assert same_tensors(inserted, insert_batchnorm(plain, [batch]))
    equalized, expected_equalized = wrap(made("VGG for CIFAR, one dense layer")), made("VGG for CIFAR, one dense layer")
    for model in (equalized, expected_equalized):
        equalize(model, find_edges(model, batch, sites), moments)
    assert same_tensors(unwrapped(equalized), expected_equalized)
    assert same_tensors(recalibrate(wrap(inserted), [batch]), recalibrate(inserted, [batch]))
    assert same_tensors(fold_batchnorm(wrap(inserted), batch), plain)


def test_a_network_in_distributed_data_parallel_is_handled_as_the_module_in_it(tmp_path: Path) -> None:
    plain = made("VGG for CIFAR, one dense layer")
    batch = ARCHITECTURES["VGG for CIFAR, one dense layer"].batch()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(plain)
        inserted = insert_batchnorm(wrapped, [batch])
        assert type(inserted) is type(plain)
        assert compare_outputs(wrapped, inserted, [batch, other(batch)]).bit_identical
        assert same_tensors(fold_batchnorm(nn.parallel.DistributedDataParallel(inserted), batch), plain)
    finally:
        dist.destroy_process_group()


class WritesItsWeight(nn.Conv2d):
    """A conv that sets its own weight in each pass, as constrained layers do."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data.clamp(-0.01, 0.01)
        return super().forward(x)


def test_a_forward_that_sets_its_own_weights_sets_those_of_a_copy() -> None:
    model = nn.Sequential(WritesItsWeight(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    before = model[0].weight.detach().clone()
    x = torch.randn(4, 3, 8, 8)
    result = insert_batchnorm(model, [x])
    assert isinstance(result[1], nn.BatchNorm2d)
    assert compare_outputs(model, result, [x]).bit_identical
    assert torch.equal(model[0].weight, before)
    with pytest.raises(GraphError, match="cannot trace Sequential"):
        fold_batchnorm(result, x)


class Remembers(nn.Conv2d):
    """A conv that keeps its last output."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


def test_comparing_leaves_nothing_in_the_models() -> None:
    model = nn.Sequential(Remembers(3, 8, 3))
    compare_outputs(model, model, [torch.randn(4, 3, 8, 8)])
    assert not hasattr(model[0], "last")
    assert model.training


# Batches


@pytest.mark.parametrize("batch", [lambda x: x, lambda x: (x, torch.zeros(4)), lambda x: {"input": x, "y": 0}])
def test_one_input_is_the_first_value_of_a_batch(batch: Any) -> None:
    model = made("VGG for CIFAR, one dense layer")
    x = ARCHITECTURES["VGG for CIFAR, one dense layer"].batch()
    assert same_tensors(insert_batchnorm(model, [batch(x)]), insert_batchnorm(model, [x]))


@pytest.mark.parametrize(
    "batch",
    [
        lambda image, mask: (image, mask),
        lambda image, mask: [image, mask, torch.zeros(4)],
        lambda image, mask: ((image, mask), torch.zeros(4)),
        lambda image, mask: {"labels": torch.zeros(4), "mask": mask, "image": image},
        lambda image, mask: ({"mask": mask, "image": image}, torch.zeros(4)),
    ],
    ids=["tuple", "list with labels", "pair with labels", "dict", "dict with labels"],
)
def test_several_inputs_are_read_by_position_or_by_name(batch: Any) -> None:
    model = made("forward takes two inputs")
    inputs = ARCHITECTURES["forward takes two inputs"].batch()
    assert same_tensors(insert_batchnorm(model, [batch(*inputs)]), insert_batchnorm(model, [inputs]))


class TwoDense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 3)


class ByPosition(TwoDense):
    def forward(self, left: Tensor, right: Tensor, /) -> Tensor:
        return self.dense(left - right).relu()


class ByName(TwoDense):
    def forward(self, left: Tensor, *, right: Tensor) -> Tensor:
        return self.dense(left - right).relu()


class OneByName(TwoDense):
    def forward(self, *, left: Tensor) -> Tensor:
        return self.dense(left).relu()


@pytest.mark.parametrize("network", [ByPosition, ByName])
def test_inputs_that_are_taken_by_position_or_by_name_alone_are_passed_so(network: type[nn.Module]) -> None:
    model, inputs = network().eval(), (torch.rand(6, 4), torch.rand(6, 4))
    by_name = dict(zip(("right", "left"), reversed(inputs), strict=True))
    expected = (inputs[0] - inputs[1]).double() @ model.dense.weight.double().T + model.dense.bias.double()
    for batch in (inputs, (*inputs, torch.zeros(6)), by_name):
        norm = insert_batchnorm(model, [batch], include_output=True).dense[1]
        torch.testing.assert_close(norm.running_mean.double(), expected.mean(0), rtol=1e-5, atol=1e-6)


def test_the_only_input_may_be_keyword_only() -> None:
    model, x = OneByName().eval(), torch.rand(6, 4)
    for batch in (x, (x, torch.zeros(6)), {"left": x}):
        norm = insert_batchnorm(model, [batch], include_output=True).dense[1]
        torch.testing.assert_close(norm.running_mean, model.dense(x).mean(0), rtol=1e-5, atol=1e-6)


def test_a_forward_annotated_to_take_a_dict_gets_the_whole_dict() -> None:
    model, batch = made("forward takes a dict"), ARCHITECTURES["forward takes a dict"].batch()
    assert same_tensors(insert_batchnorm(model, [(batch, torch.zeros(4))]), insert_batchnorm(model, [batch]))


def test_statistics_of_several_inputs_do_not_depend_on_the_batch_size() -> None:
    model, inputs = made("forward takes two inputs"), ARCHITECTURES["forward takes two inputs"].batch()
    sites = find_sites(model, inputs)
    whole = calibrate(model, sites, [inputs])
    parts = calibrate(model, sites, list(zip(*(tensor.split(3) for tensor in inputs), strict=True)))
    for name, moments in whole.items():
        torch.testing.assert_close(parts[name].mean, moments.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts[name].m2, moments.m2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda image, mask: image, "takes image, mask; pass a tuple of these"),  # noqa: ARG005
        (lambda image, mask: (image,), "takes image, mask"),  # noqa: ARG005
        (lambda image, mask: {"image": image, "other": mask}, "a dict with these names"),
        (lambda image, mask: (image, mask[:2]), "the same number of images"),
    ],
    ids=["one tensor", "one of two", "a name is missing", "other lengths"],
)
def test_batches_that_do_not_hold_what_the_forward_takes_are_refused(batch: Any, message: str) -> None:
    model, inputs = made("forward takes two inputs"), ARCHITECTURES["forward takes two inputs"].batch()
    with pytest.raises(CalibrationError, match=message):
        insert_batchnorm(model, [batch(*inputs)])


def test_inputs_that_the_model_cannot_run_on_are_refused_with_one_message(capfd: pytest.CaptureFixture[str]) -> None:
    model = made("VGG-Face style, functions")
    with pytest.raises(GraphError, match=r"VGGFace cannot run on an input of shape \(4, 3, 2, 2\): .*Pass inputs"):
        find_sites(model, torch.zeros(4, 3, 2, 2))
    assert capfd.readouterr().err == ""
