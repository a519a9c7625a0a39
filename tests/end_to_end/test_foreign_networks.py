"""Networks with a structure that a tool for networks meets seldom, and mistakes in what it is given."""

from __future__ import annotations

import copy
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from bn_insert import (
    BatchRenorm2d,
    BNInsertError,
    CalibrationError,
    Edge,
    GraphError,
    RenormScheduler,
    adapt_statistics,
    build_network,
    calibrate,
    compare_outputs,
    compare_predictions,
    equalize,
    evaluate,
    find_edges,
    find_sites,
    finetune,
    fit_output,
    fold,
    fold_batchnorm,
    identity_batchnorm,
    insert,
    insert_at,
    insert_batchnorm,
    inserted_batchnorms,
    load_checkpoint,
    parameter_groups,
    predict,
    read_checkpoint,
    recalibrate,
    replace_head,
    replace_output,
    save_checkpoint,
    set_batchnorm_mode,
    survey,
    torchvision_checkpoint,
    train_mode_agreement,
)
from bn_insert.batchnorm.renorm_limits import set_renorm_limits
from bn_insert.demo import network_path
from bn_insert.graph.closures import _Translation
from bn_insert.graph.copies import check_module, deep_copy
from bn_insert.graph.trace import Trace
from bn_insert.images import open_class_folders, tensor_batches
from bn_insert.statistics.moments import moments_of
from support.idioms import (
    CollectsByHooks,
    DecidesByValues,
    FusedYolo,
    InContext,
    OwnCall,
    ReadsAttributes,
    ReadsByNumber,
    extracted,
    traced_by_fx,
)
from support.networks import images, randomised, sequential, small_vgg

Unchecked = Callable[[Callable[..., Any]], Callable[..., Any]]


def names(model: nn.Module, x: Tensor) -> list[str]:
    return [site.name for site in find_sites(model, x)]


def test_every_batch_counts_for_a_class_with_its_own_call() -> None:
    model, batches = randomised(OwnCall()), [images(4, 16, seed=seed) for seed in range(4)]
    moments = insert(model, batches).moments
    with torch.no_grad():
        expected = F.relu(model.first(torch.cat(batches)))
        second = model.second(expected).double()
    assert {name: found.count for name, found in moments.items()} == {"first": 16 * 14 * 14, "second": 16 * 12 * 12}
    torch.testing.assert_close(moments["second"].mean, second.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_a_layer_that_some_batches_do_not_call_is_an_error() -> None:
    class BySize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.conv = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 8, 3)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.conv(self.large(x) if x.shape[-1] > 10 else x)))

    model = randomised(BySize())
    sites = find_sites(model, images(2, 12))
    with pytest.raises(CalibrationError, match="the layer large was called for 1 of 2 batches"):
        calibrate(model, sites, [images(2, 12), images(2, 8)])


def test_attributes_of_a_layer_are_those_of_the_pair_that_replaces_it(tmp_path: Path) -> None:
    model, x = randomised(ReadsAttributes()), images(4, 16)
    result = insert_batchnorm(model, [x])
    assert compare_outputs(model, result, [x]).bit_identical
    assert result.conv2.kernel_size == (3, 3) and result.conv2.weight is result.conv2[0].weight
    assert not hasattr(result.conv2, "in_features")
    assert [key for key in result.state_dict() if key.startswith("conv1.")][:3] == [
        "conv1.0.weight",
        "conv1.0.bias",
        "conv1.1.weight",
    ]
    save_checkpoint(result, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth", model=ReadsAttributes)
    assert compare_outputs(model, loaded, [x]).bit_identical
    torch.save(result, tmp_path / "whole.pt")
    assert compare_outputs(model, torch.load(tmp_path / "whole.pt", weights_only=False), [x]).bit_identical


def test_children_that_a_forward_reads_by_number_keep_their_numbers(tmp_path: Path) -> None:
    model, x = randomised(ReadsByNumber()), images(4, 16)
    insertion = insert(model, [x])
    assert compare_outputs(model, insertion.model, [x]).bit_identical
    assert [type(child).__name__ for child in insertion.model.features] == [
        *("NormalizedLayer", "ReLU", "NormalizedLayer", "ReLU", "Conv2d")
    ]
    assert not any(site.in_sequence for site in insertion.sites)
    save_checkpoint(insertion.model, tmp_path / "a.pth")
    assert compare_outputs(model, load_checkpoint(tmp_path / "a.pth", model=ReadsByNumber), [x]).bit_identical


def test_a_result_that_cannot_run_is_an_error_and_not_a_result() -> None:
    class ChecksClass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(self.conv, nn.Conv2d):
                raise TypeError("conv must be a Conv2d")
            return self.head(F.relu(self.conv(x)))

    with pytest.raises(GraphError, match="ChecksClass with BatchNorm inserted cannot run: conv must be a Conv2d"):
        insert_batchnorm(randomised(ChecksClass()), [images(4, 8)])


@pytest.mark.parametrize(
    "context", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["no_grad", "autocast"]
)
def test_layers_in_a_context_are_seen_and_folded(context: Callable[[], Any]) -> None:
    model, x = randomised(InContext(context)), images(4, 16)
    assert names(model, x) == ["features.0", "features.2"]
    assert find_edges(model, x, find_sites(model, x))[0].consumers[0].name == "features.2"
    result = insert_batchnorm(model, [x])
    assert compare_outputs(model, result, [x]).bit_identical
    assert fold(result, x).folded == ("features.1", "features.4")


def test_layers_of_blocks_whose_forward_is_an_attribute_are_seen_and_folded() -> None:
    model, x = randomised(FusedYolo()), images(4, 16)
    assert names(model, x) == ["stem.conv", "model.0.conv", "model.1.conv"]
    result = fold(insert_batchnorm(model, [x]), x)
    assert not result.left
    assert result.model.state_dict().keys() == model.state_dict().keys()


def test_a_weight_that_a_function_uses_is_not_taken_for_a_call_of_its_layer() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(F.conv2d(x, self.conv.weight, self.conv.bias)))

    model = randomised(Functional())
    head, conv = survey(model, images(2, 8))
    assert (head.name, head.reason) == ("head", "output layer")
    assert conv.name == "conv" and conv.reason.startswith("the weight is used, but not by a module call: ")
    with pytest.warns(UserWarning, match=r"conv or dense operations in the model \(Functional\) that are"):
        insert_batchnorm(model, [images(2, 8)])


def test_a_function_with_the_weight_of_a_module_is_named_where_other_layers_get_a_batchnorm() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
            self.register_buffer("blur", torch.full((8, 1, 3, 3), 1 / 9))

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(F.relu(self.first(x)), self.blur, groups=8)
            return self.head(F.relu(F.conv2d(x, self.second.weight, self.second.bias)))

    with pytest.warns(UserWarning, match=r"^no BatchNorm was inserted after .* torch.nn: the model \(Functional\)$"):
        result = insert_batchnorm(randomised(Functional()), [images(2, 9)])
    assert inserted_batchnorms(result) == ["first.1"]


def test_batchnorms_of_a_graph_module_are_folded() -> None:
    model, x = traced_by_fx().eval(), images(4, 16)
    result = fold(insert_batchnorm(model, [x]), x)
    assert result.folded and not result.left
    assert result.model.state_dict().keys() == model.state_dict().keys()


def test_a_network_of_create_feature_extractor_keeps_its_mode() -> None:
    model, x = randomised(extracted()), images(4, 16)
    result = insert_batchnorm(model, [x])
    before = {key: value.clone() for key, value in result.state_dict().items()}
    assert not any(module.training for module in result.modules())
    result(x)
    assert all(torch.equal(value, before[key]) for key, value in result.state_dict().items())


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        (
            lambda: insert_batchnorm(small_vgg(), [images(4, 16)]),
            r"features.0, features.4, classifier.0, classifier.4 \(already followed by a normalization\); "
            r"classifier.8 \(output layer\)",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 4)).eval(), r"1 \(output layer\)"),
        (nn.ReLU, "there is no conv or dense layer"),
    ],
    ids=["inserted before", "one layer", "no layer"],
)
def test_nothing_to_insert_is_a_warning_with_the_reasons(model: Callable[[], nn.Module], reasons: str) -> None:
    with pytest.warns(UserWarning, match=f"^no BatchNorm was inserted: {reasons}$"):
        insert_batchnorm(model(), [images(4, 16)])


def test_a_network_that_decides_by_values_is_inserted_into_but_neither_equalized_nor_folded() -> None:
    model, x = randomised(DecidesByValues()), images(4, 16)
    insertion = insert(model, [x, images(4, 16, seed=3)], equalize=True)
    assert [site.name for site in insertion.sites] == ["conv1", "conv2"]
    assert all(moments.count == 8 * size**2 for moments, size in zip(insertion.moments.values(), (14, 12), strict=True))
    assert all("cannot trace the forward" in edge.reason for edge in insertion.edges)
    assert compare_outputs(model, insertion.model, [x]).bit_identical
    with pytest.raises(GraphError, match="cannot trace DecidesByValues"):
        fold(insertion.model, x)


def test_a_trace_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    find_sites(randomised(DecidesByValues()), images(2, 16))
    assert capfd.readouterr() == ("", "")


def test_what_other_threads_print_during_a_trace_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    class PrintsElsewhere(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            sys.stderr.write("here\n")
            other = Thread(target=sys.stderr.write, args=["elsewhere\n"])
            other.start()
            other.join()
            return super().forward(x)

    Trace.of(PrintsElsewhere(nn.Conv2d(3, 8, 3), nn.ReLU()), images(2, 8))
    printed = capfd.readouterr().err.splitlines()
    assert "elsewhere" in printed and "here" not in printed


def test_hooks_that_refer_to_the_model_leave_no_fake_tensor_in_it() -> None:
    class Taps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
            self.last, self.all = None, []
            self.conv.register_forward_hook(lambda _module, _inputs, output: self.keep(output))

        def keep(self, output: Any) -> None:
            self.last = output
            self.all.append(output)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.conv(x)))

    model = randomised(Taps())
    find_sites(model, images(2, 8))
    assert model.last is None and model.all == []
    insert_batchnorm(model, [images(2, 8)])
    assert not any(isinstance(each, FakeTensor) for each in (model.last, *model.all))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_a_network_with_a_scripted_module_in_it_is_inserted_into_and_folded() -> None:
    model, x = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))), images(4, 8)
    model[1] = torch.jit.script(model[1])
    result = insert_batchnorm(model, [x])
    assert compare_outputs(model, result, [x]).bit_identical
    assert fold(result, x).folded == ("1",)


class Annotated(Tensor):
    """Images with a class of their own, such as MONAI's MetaTensor."""

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()


def test_images_of_another_class_of_tensors_leave_it_in_no_batchnorm() -> None:
    model, x = randomised(DecidesByValues()), images(4, 16)
    result = insert_batchnorm(model, [x.as_subclass(Annotated)])
    assert {type(buffer) for buffer in result.buffers()} == {Tensor}
    assert compare_outputs(insert_batchnorm(model, [x]), result, [x]).bit_identical


@cache
def ramp(size: int) -> Tensor:
    return torch.linspace(0, 1, size)


class CachesOutsideItsModules(nn.Module):
    """Computes a tensor once for each size of images, and keeps it in the class and in a function."""

    ramps: ClassVar[dict[int, Tensor]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.output = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        if size not in self.ramps:
            self.ramps[size] = torch.linspace(0, 1, size)
        return self.output(self.conv(x).relu() * self.ramps[size] + ramp(size))


def test_what_a_forward_caches_outside_of_its_modules_has_values_after_a_trace() -> None:
    ramp.cache_clear()
    model, x = randomised(CachesOutsideItsModules()), images(4, 12)
    result = insert_batchnorm(model, [x])
    assert compare_outputs(model, result, [x]).bit_identical
    assert not any(isinstance(each, FakeTensor) for each in (*model.ramps.values(), ramp(12)))
    result.train()(x).sum().backward()  # nor do they belong to inference mode


@pytest.mark.parametrize("batch", [1, 4])
def test_what_a_forward_caches_for_each_shape_of_a_batch_has_values_after_a_trace(batch: int) -> None:
    masks: dict[str, Tensor] = {}

    class CachesByShape(CachesOutsideItsModules):
        def forward(self, x: Tensor) -> Tensor:
            mask = masks.setdefault(str(x.shape), torch.ones(x.shape))
            return self.output(self.conv(x * mask).relu())  # type: ignore[no-any-return]

    model, x = randomised(CachesByShape()), images(batch, 12)
    assert [site.name for site in find_sites(model, x)] == ["conv"]
    assert type(model(x)) is Tensor
    assert compare_outputs(model, insert_batchnorm(model, [x]), [x]).bit_identical


def test_what_a_hook_stores_in_another_object_has_values_after_a_trace() -> None:
    model, x, store = small_vgg(), images(4, 16), SimpleNamespace()
    model.features[0].register_forward_hook(lambda _module, _inputs, output: setattr(store, "output", output))
    model.store = store
    result = insert_batchnorm(model, [x])
    assert type(store.output) is Tensor
    fold_batchnorm(result, x)
    assert type(store.output) is Tensor


def test_outputs_that_a_module_collects_by_its_hooks_do_not_hinder_a_trace() -> None:
    model, x = randomised(CollectsByHooks()), images(4, 16)
    result = insert_batchnorm(model, [x])
    assert compare_outputs(model, result, [x]).bit_identical
    assert any(isinstance(module, _BatchNorm) for module in result.modules())


# Mistakes


TINY, TINY_IMAGES = sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)), images(4, 8)
LABELED = [(TINY_IMAGES, torch.tensor([0, 1, 2, 3]))]
(SITE,) = find_sites(TINY, TINY_IMAGES)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vgg16.pth", r"the model is a path, 'vgg16.pth'; load the network first: load_checkpoint\(path\)"),
        (Path("vgg16.pth"), "the model is a path"),
        ({"0.weight": torch.zeros(1)}, "the model is a dict, perhaps a state dict, which has weights and no forward"),
        (nn.ReLU, r"the model is ReLU, which is not a torch.nn.Module; if it builds one, call it: ReLU\(\)"),
        (5, "the model is a int, not a torch.nn.Module"),
        (None, "the model is None: functions that work in place, such as replace_output and fit_output, do not return"),
        (True, "the model is True: functions that work in place"),
    ],
    ids=["name", "path", "state dict", "class", "number", "None", "bool"],
)
def test_what_is_no_model_is_refused_with_the_way_out(model: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        check_module(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: finetune(small_vgg(), "data", "run"), "images is 'data', not class folders; open them with"),
        (lambda: finetune(None, "data", "run"), "the model is None"),
        (lambda: load_checkpoint(small_vgg()), "the path is of the type VGG; pass that of a file"),
        (lambda: load_checkpoint({}), "the path is of the type dict; pass that of a file"),
        (lambda: read_checkpoint(None), "the path is None; pass that of a file"),
        (lambda: read_checkpoint(network_path(), key=5), "key is 5, not a str"),
        (lambda: open_class_folders(None, None), "the folder is None; pass the path of one with train/ and val/"),
        (lambda: build_network("network.pth"), r"checkpoint is a str; pass what read_checkpoint\(path\) returns"),
        (lambda: torchvision_checkpoint(16), "16 is not one of the networks .* pass a name"),
        (lambda: load_checkpoint(network_path(), model={}), "model is a dict; pass a module with the architecture"),
        (lambda: save_checkpoint("a.pth", small_vgg()), "the model is a path, 'a.pth'"),
        (lambda: save_checkpoint(small_vgg(), None), "the path is None; pass the name of a file that ends in .pth"),
        (lambda: save_checkpoint(small_vgg(), "a.pth", classes=3), "cannot write a.pth: classes is 3; pass a list"),
        (lambda: save_checkpoint(small_vgg(), "a.pth", classes="abc"), "classes is 'abc'; pass a list with the name"),
        (lambda: save_checkpoint(TINY, "a.pth", classes={"a", "b"}), "cannot write a.pth: classes is {"),
        (lambda: tensor_batches("a.pt", dims=5), "dims is 5; pass the number of dimensions of an image after"),
        (lambda: tensor_batches("a.pt", batch_size="4"), "batch_size is '4'; use a whole number, 1 or more"),
        (lambda: equalize(TINY, [Edge("0")], {}), "moments has none for the layer 0; pass the dict that calibrate"),
        (lambda: open_class_folders("data", None), "transform is None; pass a bn_insert.images.Transform"),
        (lambda: calibrate(TINY, SITE, LABELED), r"sites is one Site, of the layer 0; pass a list of sites"),
        (lambda: calibrate(small_vgg(), [SITE], LABELED), "VGG has no conv layer 0, for which there is a site; pass"),
        (lambda: calibrate(TINY, [replace(SITE, channels=5)], LABELED), "layer 0 have 8 channels, but its site 5;"),
        (lambda: insert_at(small_vgg(), [SITE], {"0": None}), "VGG has no conv layer 0, for which there is a site"),
        (lambda: set_batchnorm_mode("a.pth", "renorm"), "the model is a path, 'a.pth'"),
    ],
)
def test_arguments_of_another_kind_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(BNInsertError, match=message):
        call()


@cache
def tiny_with_batchnorm() -> nn.Module:
    return insert_batchnorm(TINY, LABELED)


PASSES = {
    "insert": lambda **options: insert_batchnorm(TINY, LABELED, **options),
    "adapt": lambda **options: adapt_statistics(TINY, LABELED, LABELED, **options),
    "calibrate": lambda **options: calibrate(TINY, find_sites(TINY, TINY_IMAGES), LABELED, **options),
    "recalibrate": lambda **options: recalibrate(tiny_with_batchnorm(), LABELED, **options),
    "evaluate": lambda **options: evaluate(TINY, LABELED, **options),
    "predict": lambda **options: predict(TINY, LABELED, **options),
    "train mode": lambda **options: train_mode_agreement(tiny_with_batchnorm(), LABELED, (4,), **options),
    "fit": lambda **options: fit_output(copy.deepcopy(TINY), LABELED, LABELED, **options),
    "compare": lambda **options: compare_outputs(TINY, TINY, LABELED, **options),
    "predictions": lambda **options: compare_predictions(TINY, TINY, LABELED, **options),
}


@pytest.mark.parametrize("function", [name for name in PASSES if name not in ("fit", "compare", "predictions")])
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device is 'gpu', which is not a device; use 'cpu'"),
        (3.5, "device is 3.5, which is not a device"),
        ("cuda:63", "device is 'cuda:63', which cannot be used on this machine"),
        ("meta", "device is 'meta', which cannot be used on this machine"),
    ],
)
def test_a_device_that_is_none_or_not_there_is_named(function: str, device: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        PASSES[function](device=device)


@pytest.mark.parametrize("function", ["insert", "adapt", "calibrate", "recalibrate", "evaluate", "predict", "fit"])
@pytest.mark.parametrize("dtype", ["bf16", True, torch.int8])
def test_autocast_takes_a_floating_point_dtype_alone(function: str, dtype: Any) -> None:
    with pytest.raises(CalibrationError, match=f"autocast is {dtype!r}; pass a floating-point dtype, such as torch"):
        PASSES[function](autocast=dtype)


@pytest.mark.parametrize("function", PASSES)
def test_progress_takes_a_function_alone(function: str) -> None:
    with pytest.raises(CalibrationError, match="progress is 5; pass a function of the number of images so far"):
        PASSES[function](progress=5)


@pytest.mark.parametrize("function", ["insert", "adapt"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": "1e-5"}, "eps must be a finite number of at least .*, such as 1e-5, not '1e-5'"),
        ({"eps": None}, "eps must be a finite number .* not None"),
        ({"momentum": 2}, "momentum must be a number from 0 to 1, or None for a cumulative average, not 2"),
        ({"momentum": -1}, "momentum must be a number from 0 to 1"),
        ({"momentum": "0.1"}, "momentum must be a number from 0 to 1, .* not '0.1'"),
        ({"momentum": float("nan")}, "momentum must be a number from 0 to 1"),
        ({"skip": None}, "skip has the pattern None; pass names of layers or glob patterns"),
        ({"skip": 5}, "skip has the pattern 5"),
        ({"skip": ["0", 3]}, "skip has the pattern 3"),
        ({"layers": None}, r"layers must be one or both of conv, dense, not \(None,\)"),
        ({"layers": [["conv"]]}, "layers must be one or both of conv, dense"),
        ({"tolerance": "0.1"}, "tolerance must be a finite number above 0, such as 0.1, not '0.1'"),
    ],
    ids=str,
)
def test_options_of_an_insertion_of_another_kind_are_named(
    function: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BNInsertError, match=message):
        PASSES[function](**options)


@pytest.mark.parametrize("function", [insert_batchnorm, evaluate, recalibrate])
@pytest.mark.parametrize("kind", [DataLoader, TensorDataset])
def test_a_class_in_place_of_batches_is_refused_with_the_way_out(function: Callable[..., Any], kind: type) -> None:
    with pytest.raises(CalibrationError, match=rf"batches is the class {kind.__name__}; .* DataLoader\(dataset, "):
        function(tiny_with_batchnorm(), kind)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predict(TINY, LABELED, top="1"), "top is '1'; use a whole number, 1 or more"),
        (lambda: predict(TINY, LABELED, top=1.5), "top is 1.5; use a whole number"),
        (lambda: evaluate(TINY, LABELED, classes=4), "classes is 4; pass a list with the name of each class"),
        (lambda: evaluate(TINY, LABELED, classes="abcd"), "classes is 'abcd'; pass a list"),
        (lambda: train_mode_agreement(tiny_with_batchnorm(), LABELED, [4.5]), r"batch_sizes is \[4.5\]; pass one or"),
        (lambda: replace_head(small_vgg(), "8", 5), r"the width of the head is '8', not a whole number \(int\)"),
        (lambda: replace_head(small_vgg(), np.int64(8), 5), "the width of the head is .*8.*, not a whole number"),
        (lambda: replace_output(small_vgg(), 5.0), "the number of classes is 5.0, not a whole number"),
        (lambda: parameter_groups(small_vgg(), "0.1"), "weight_decay is '0.1'; use a number, 0 or more"),
        (lambda: RenormScheduler(None), "the model is None"),
        (lambda: RenormScheduler(small_vgg(), threshold="2"), "threshold is '2'; use a lag above 0"),
        (lambda: set_renorm_limits(None, 3, 5), "the model is None"),
        (lambda: set_renorm_limits(small_vgg(), "3", 5), "r_max must be at least 1 .* got '3'"),
        (lambda: BatchRenorm2d(3, d_max=None), "d_max must be at least 0 .* got None"),
        (lambda: fold_batchnorm(tiny_with_batchnorm(), None), "the example is None, not a batch; pass the first"),
        (lambda: find_sites(TINY, DataLoader(LABELED)), r"the example is a DataLoader, .* next\(iter\(loader\)\)"),
        (lambda: calibrate(TINY, ["0"], LABELED), "sites has '0'; pass the sites that find_sites"),
        (lambda: calibrate(TINY, None, LABELED), "sites has None; pass the sites that find_sites"),
        (lambda: find_edges(TINY, TINY_IMAGES, survey(TINY, TINY_IMAGES)), r"sites has Layer\(name='0'"),
        (lambda: insert_at(TINY, find_sites(TINY, TINY_IMAGES), {}), "moments has none for the layer 0; pass the dict"),
        (lambda: insert_at(TINY, find_sites(TINY, TINY_IMAGES), None), "moments has none for the layer 0"),
        (lambda: insert_at(TINY, ["0"], {}), "sites has '0'; pass the sites that find_sites"),
        (lambda: insert_at(TINY, [], {}, momentum=2), "^momentum must be a number from 0 to 1"),
        (lambda: insert_batchnorm(TINY, LABELED, momentum=2), "^momentum must be a number from 0 to 1"),
        (lambda: identity_batchnorm({}, 2), "moments is a dict, not Moments; pass those of one layer"),
        (lambda: identity_batchnorm(moments_of(TINY_IMAGES), "2"), "dims must be 1, 2 or 3, .* not '2'"),
        (lambda: identity_batchnorm(moments_of(TINY_IMAGES), [2]), r"dims must be 1, 2 or 3, .* not \[2\]"),
        (
            lambda: identity_batchnorm(moments_of(TINY_IMAGES), 2, dtype="float32"),
            "dtype is 'float32'; pass a ",
        ),
        (lambda: finetune(TINY, None, None), "output_dir is None; pass the path of a folder"),
        (lambda: finetune(TINY, None, ""), "output_dir is ''; pass the path of a folder"),
        (lambda: finetune(TINY, None, "run", device="gpu"), "device is 'gpu', which is not a device"),
        (lambda: finetune(TINY, None, "run", device="cuda:63"), "device is 'cuda:63', which cannot be used"),
    ],
)
def test_values_of_another_kind_are_named_with_what_to_pass(call: Callable[[], object], message: str) -> None:
    with pytest.raises(BNInsertError, match=message):
        call()


def test_one_name_is_a_pattern_to_skip_and_a_kind_of_layer() -> None:
    assert [layer.reason for layer in survey(TINY, TINY_IMAGES, layers="conv", skip="0")] == [
        "skipped by pattern",
        "dense layers are not selected",
    ]


def test_numbers_of_numpy_are_numbers() -> None:
    result = insert_batchnorm(TINY, LABELED, eps=np.float32(1e-3), momentum=np.int64(1), tolerance=np.float64(2))
    assert result.get_submodule("1").momentum == 1


def test_a_torchscript_program_is_refused_with_the_way_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.trace(sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), images(1, 8))
    with pytest.raises(GraphError, match="the model is a TorchScript program, whose modules cannot be changed"):
        insert_batchnorm(program, [images(2, 8)])


class OnlyTrains(nn.Module):
    """What a Lightning module without a forward looks like."""

    def __init__(self) -> None:
        super().__init__()
        self.net = sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.loss = nn.CrossEntropyLoss()


def test_a_module_that_only_trains_a_network_is_refused_with_the_name_of_that_network() -> None:
    with pytest.raises(
        GraphError, match=r"OnlyTrains has no forward .*pass the wrapped network: model.net \(Sequential\)"
    ):
        insert_batchnorm(OnlyTrains(), [images(2, 8)])


class SetUpByFabric(nn.Module):
    """What Lightning Fabric's setup returns: the module around which a strategy is wrapped, and that module itself."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module = nn.Sequential(module)
        self._original_module = module

    def forward(self, x: Tensor) -> Any:
        return self._forward_module(x)


def test_the_module_that_lightning_fabric_set_up_is_unwrapped() -> None:
    network = sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    result = insert_batchnorm(SetUpByFabric(network), [images(4, 8)])
    assert list(result.state_dict())[:2] == ["0.weight", "0.bias"]


def test_a_number_of_classes_that_is_no_number_is_refused(unchecked: Unchecked) -> None:
    from bn_insert import TrainingError  # noqa: PLC0415

    with pytest.raises(TrainingError, match="the number of classes is '5', not a whole number"):
        unchecked(replace_output)(small_vgg(), "5")
    with pytest.raises(TrainingError, match="the number of classes is a list; pass its length, 2"):
        unchecked(replace_output)(small_vgg(), ["ant", "bee"])


def test_replacing_an_output_and_grouping_parameters_refuse_what_is_no_model(unchecked: Unchecked) -> None:
    for function in (replace_output, parameter_groups):
        with pytest.raises(GraphError, match=r"the model is a path, 'vgg16\.pth'"):
            unchecked(function)("vgg16.pth", 5)


def test_a_dataset_in_place_of_a_loader_is_refused_with_the_way_out() -> None:
    model, dataset = small_vgg(), torch.utils.data.TensorDataset(images(4, 32), torch.zeros(4))
    for function in (insert_batchnorm, evaluate):
        with pytest.raises(CalibrationError, match=r"batches is a dataset, TensorDataset, .* DataLoader\(dataset, "):
            function(model, dataset)


def test_images_without_a_batch_axis_are_refused_with_the_way_out() -> None:
    dataset = list(torch.utils.data.TensorDataset(images(4, 8), torch.zeros(4)))
    with pytest.raises(GraphError, match=r"one image without a batch axis; .* DataLoader\(dataset, batch_size=32\)"):
        insert_batchnorm(sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), dataset)


# What 300 further networks showed


class Plain(nn.Module):
    """Two convs and an output layer."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


def statistics_of(layer: nn.Module, model: nn.Module, batches: list[Any]) -> tuple[Tensor, Tensor]:
    """Return mean and variance of a layer's outputs in float64."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *call: seen.append(call[2].double().transpose(0, 1).flatten(1)))
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    values = torch.cat(seen, 1)
    return values.mean(1), values.var(1)


def assert_true_statistics(model: Any, batches: list[Any]) -> None:
    inserted = insert_batchnorm(model, batches)
    mean, var = statistics_of(model.b, model, batches)
    torch.testing.assert_close(inserted.b[1].running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inserted.b[1].running_var.double(), var, rtol=1e-4, atol=1e-6)


class Padded(Plain):
    """Runs its convs by a loop that looks for their class, and returns something else than its logits."""

    def __init__(self, returned: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, x: Tensor) -> Any:
        for layer in (self.a, self.b):
            padded = F.pad(x, (1, 1, 1, 1), mode="reflect") if isinstance(layer, nn.Conv2d) else x
            x = F.relu(layer(padded))
        return self.returned(self.out(x.mean((2, 3))))


@pytest.mark.parametrize(
    "returned",
    [
        lambda logits: logits.masked_fill(torch.tensor([True, False, False, False, False]), -torch.inf),
        lambda logits: (logits * 1000).long(),
        torch.fft.fft,
        lambda logits: logits.to_sparse(),
    ],
)
def test_other_outputs_are_noticed_with_infinities_as_integers_as_complex_and_as_sparse_numbers(
    returned: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(GraphError, match="Padded with BatchNorm inserted returns different outputs than without"):
        insert_batchnorm(randomised(Padded(returned)), [images(4, 12)])


def test_networks_with_infinities_among_their_outputs_are_inserted_into() -> None:
    class Masked(Plain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).masked_fill(torch.tensor([True, False, False, False, False]), -torch.inf)

    assert len(inserted_batchnorms(insert_batchnorm(randomised(Masked()), [images(4, 12)]))) == 2


def by_its_largest_value(x: Tensor) -> Tensor:
    return x / x.max()


def by_its_smallest_value(x: Tensor) -> Tensor:
    return x - x.min()


def by_its_mean(x: Tensor) -> Tensor:
    return x - x.mean()


@pytest.mark.parametrize("scaled", [by_its_largest_value, by_its_smallest_value, by_its_mean])
def test_small_batches_run_by_themselves_where_a_forward_scales_them(scaled: Callable[[Tensor], Tensor]) -> None:
    class Scaled(Plain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(scaled(x))

    torch.manual_seed(0)
    assert_true_statistics(
        randomised(Scaled()), [torch.rand(8, 3, 12, 12) * (0.2 + number % 7) for number in range(60)]
    )


def test_batches_of_pairs_are_not_divided_into_odd_parts() -> None:
    class Pairs(Plain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x[0::2] - x[1::2])

    torch.manual_seed(0)
    assert_true_statistics(randomised(Pairs(64)), [torch.rand(200, 3, 32, 32) for _ in range(2)])


class ChannelsLastConv(nn.Conv1d):
    """Takes N x L x C."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class MovedConv(nn.Conv1d):
    """Takes N x L x C, too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(2, 1)).movedim(1, 2)


class Shuffled(nn.Conv2d):
    """Ends in a pixel shuffle."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(super().forward(x), 2)


class Cropped(nn.Conv1d):
    """Leaves out the last positions, as a causal conv does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :-2]


class ScaledInLast(nn.Conv2d):
    """Scales its channels on the last axis, and moves them back."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x).permute(0, 2, 3, 1) * 0.5).permute(0, 3, 1, 2)


class WithAttention(nn.Conv2d):
    """Adds what its positions see of each other."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        tokens = x.flatten(2).transpose(1, 2)
        seen = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return x + seen.transpose(1, 2).reshape(x.shape)


class TransposedTwice(nn.Linear):
    """Transposes its outputs there and back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).t().contiguous().t()


@pytest.mark.parametrize(
    ("layer", "shape", "fits"),
    [
        (ScaledInLast(3, 16, 3), (4, 3, 8, 8), True),
        (WithAttention(3, 16, 3), (4, 3, 8, 8), True),
        (TransposedTwice(8, 16), (4, 8), True),
        (ChannelsLastConv(16, 16, 3, padding=1), (4, 16, 16), False),
        (MovedConv(16, 16, 3, padding=1), (4, 16, 16), False),
        (Shuffled(3, 16, 3), (4, 3, 8, 8), False),
        (Cropped(16, 16, 3, padding=2), (4, 16, 9), True),
    ],
)
def test_layers_of_a_class_that_rearranges_their_outputs_get_no_batchnorm(
    layer: nn.Module, shape: tuple[int, ...], fits: bool
) -> None:
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).eval()
    model(torch.rand(shape))
    (first, _) = survey(model, torch.rand(shape))
    reason = "its class changes the shape, or the order of the axes, of what its operation returns"
    assert (first.site is not None, first.reason) == (fits, "" if fits else reason)


def test_a_dict_is_passed_by_name_to_a_forward_without_required_parameters() -> None:
    class Optional(Plain):
        def forward(self, low: Tensor | None = None, high: Tensor | None = None) -> Any:
            return super().forward(low / 10 if high is None else high)

    class AnyName(Plain):
        def forward(self, **batch: Tensor) -> Any:
            return super().forward(batch["pixels"])

    x = images(4, 12)
    assert_true_statistics(randomised(Optional()), [{"high": x}])
    assert_true_statistics(randomised(Optional()), [{"low": x}])
    assert_true_statistics(randomised(AnyName()), [{"pixels": x, "mask": x}])
    assert len(inserted_batchnorms(insert_batchnorm(randomised(Optional()), [{"image": x, "label": 0}]))) == 2


def test_labels_in_a_dict_are_not_passed_to_a_forward_that_would_return_its_loss() -> None:
    class WithLoss(Plain):
        def forward(self, pixels: Tensor | None = None, mask: Tensor | None = None, labels: Any = None) -> Any:
            logits = super().forward(pixels if mask is None else pixels * mask)
            return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model, x = randomised(WithLoss()), images(4, 12)
    expected = evaluate(model, [(x, torch.arange(4))]).confusion
    assert evaluate(model, [{"pixels": x, "labels": torch.arange(4)}]).confusion == expected
    # The first value is the input, although a later one has the name of a parameter.
    assert evaluate(model, [{"image": x, "labels": torch.arange(4), "mask": x}]).confusion == expected


def test_a_network_that_takes_lengths_is_traced_with_those_of_the_first_batch() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lstm, self.out = nn.Conv1d(8, 12, 3, padding=1), nn.LSTM(12, 10), nn.Linear(10, 4)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            values = F.relu(self.conv(x)).permute(2, 0, 1)
            packed = nn.utils.rnn.pack_padded_sequence(values, lengths, enforce_sorted=False)
            return self.out(self.lstm(packed)[1][0][-1])

    batch = (torch.rand(4, 8, 16), torch.tensor([16, 9, 12, 3]))
    assert inserted_batchnorms(insert_batchnorm(Recurrent().eval(), [batch])) == ["conv.1"]


def test_an_attribute_of_a_layer_s_own_class_is_set_in_the_layer() -> None:
    class Tempered(nn.Conv2d):
        temperature = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / self.temperature

    class Outer(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.b = Tempered(8, 8, 3)

    model, x = randomised(Outer()), images(4, 12)
    inserted = insert_batchnorm(model, [x])
    for each in (model, inserted):
        each.b.temperature = 30.0
    assert torch.equal(model(x), inserted(x)) and inserted.b.temperature == 30.0
    inserted.b.note = "of the pair"
    assert not hasattr(inserted.b[0], "note")


def test_a_layer_whose_class_takes_further_arguments_gets_them() -> None:
    class Scaling(nn.Conv2d):
        def forward(self, x: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
            return super().forward(x if mask is None else x * mask) * scale

    class Passing(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.b = Scaling(8, 8, 3)

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.a(x))
            return self.out(F.relu(self.b(x, 0.5, mask=x > 1)).mean((2, 3)))

    model, x = randomised(Passing()), images(4, 12)
    inserted = insert_batchnorm(model, [x])
    assert compare_outputs(model, inserted, [x]).bit_identical
    assert inserted_batchnorms(inserted) == ["a.1", "b.1"]
    assert compare_outputs(inserted, fold_batchnorm(inserted, x), [x]).within(rtol=1e-5)
    assert type(fold_batchnorm(inserted, x).b) is Scaling

    class Folded(Passing):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) + self.b.weight.sum()  # reads a weight that a fold would change

    with pytest.warns(UserWarning, match="inserted BatchNorms that fold into no layer were left in place: b.1"):
        adapt_statistics(randomised(Folded()), [x, x + 1], [x / 4, x / 5], shrink=False)


def test_a_transposed_conv_whose_class_takes_further_arguments_gets_them() -> None:
    class Gained(nn.ConvTranspose2d):
        def forward(self, x: Tensor, output_size: Any = None, gain: float = 1.0) -> Tensor:
            return super().forward(x, output_size) * gain

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out = Gained(3, 8, 2, stride=2), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.up(x, gain=2.0)))

    model, x = randomised(Decoder()), images(4, 6)
    assert compare_outputs(model, insert_batchnorm(model, [x]), [x]).bit_identical


@dataclass
class Node:
    """A node of a tree whose nodes know their parent."""

    name: str
    parent: Any = None
    children: list[Any] = field(default_factory=list)


def test_a_tree_among_the_attributes_is_looked_at_once() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    model.tree = Node("root")
    model.tree.children = [Node(str(number), model.tree) for number in range(30)]
    vars(model[0])["owner"] = weakref.ref(model)
    visits: list[str] = []
    of = _Translation.of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Translation, "of", lambda self, value, depth=0: visits.append("") or of(self, value, depth))
        copied = deep_copy(model)
    assert copied[0].owner() is copied
    assert len(visits) < 1000


class Vectorized(nn.Module):
    """Layers that run on one image after the other, or on several views at once, as `torch.vmap` calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        views = torch.vmap(self.a)(torch.stack([x, x.flip(-1)])).mean(0)
        return self.head(F.relu(self.c(torch.vmap(self.b)(F.relu(views)))))


class FailsToExport(Vectorized):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * float(f"{x.mean():.3f}")


@pytest.mark.parametrize("network", [Vectorized, FailsToExport])
def test_layers_in_vmap_get_no_batchnorm_and_the_others_do(network: type[nn.Module]) -> None:
    model, x = randomised(network()), images(4, 12)
    insertion = insert(model, [x])
    reason = "called in torch.vmap, where the values of a batch cannot be measured"
    assert {layer.name: layer.reason for layer in insertion.layers} == {
        "a": reason,
        "b": reason,
        "c": "",
        "head": "output layer",
    }
    assert compare_outputs(model, insertion.model, [x]).bit_identical
