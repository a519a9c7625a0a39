import copy
import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchvision.models.vgg import VGG, make_layers

import bn_insert.checkpoints.read_file
from bn_insert import RenormScheduler, insert_batchnorm, set_batchnorm_mode
from bn_insert.checkpoints.load_network import build_network, load_checkpoint
from bn_insert.checkpoints.read_file import read_checkpoint
from bn_insert.checkpoints.save import check_output, save_checkpoint
from bn_insert.checkpoints.settings import Settings
from bn_insert.checkpoints.vgg_assumptions import vgg_assumptions
from bn_insert.errors import CheckpointError, UnneededKeyError, messages_name_options
from bn_insert.images import Transform
from bn_insert.support.files import write_atomically
from support.commands import run_forked
from support.full_disk import file_size_limit
from support.networks import small_vgg
from support.vgg_specs import Conv, Dense, Spec, images_for, vgg_of

SPEC = Spec((Conv(norm="before"), Conv(5, pool=True), Conv(6, norm="after")), (Dense(norm="before"),))
BOTH_FORMATS = pytest.mark.parametrize("name", ["network.pth", "network.pt", "network.safetensors"])

StateDict = dict[str, Tensor]


def plain_state() -> StateDict:
    return dict(vgg_of(SPEC).state_dict())


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    assert repr(actual) == repr(expected)
    actual_state, expected_state = actual.state_dict(), expected.state_dict()
    assert list(actual_state) == list(expected_state)
    assert all(torch.equal(actual_state[key], expected_state[key]) for key in expected_state)
    assert torch.equal(actual(images_for(SPEC)), expected(images_for(SPEC)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal_of(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as refusal:
        action()
    return str(refusal.value)


# Round trips


@BOTH_FORMATS
def test_a_network_comes_back_bit_for_bit_with_eps_momentum_and_dropout(name: str, tmp_path: Path) -> None:
    vgg = vgg_of(SPEC)
    vgg.features[1].momentum = None
    vgg.classifier[3].p = 0.0
    vgg.features[1].eps = 0.0
    save_checkpoint(vgg, tmp_path / name)
    result = load_checkpoint(tmp_path / name)
    assert_same(result, vgg)
    assert not result.training


@BOTH_FORMATS
def test_the_transform_comes_back_as_json(name: str, tmp_path: Path) -> None:
    save_checkpoint(vgg_of(SPEC), tmp_path / name, transform={"resize": 256, "mean": (0.5, 0.4, 0.3), "crop": None})
    settings = read_checkpoint(tmp_path / name).settings
    assert settings is not None
    assert settings.transform == {"resize": 256, "mean": [0.5, 0.4, 0.3], "crop": None}


@BOTH_FORMATS
def test_class_names_come_back_in_their_order(name: str, tmp_path: Path) -> None:
    save_checkpoint(vgg_of(SPEC), tmp_path / name, classes=("zebra", "Über $1$", "ant"))
    settings = read_checkpoint(tmp_path / name).settings
    assert settings is not None
    assert settings.classes == ("zebra", "Über $1$", "ant")


def test_only_a_file_with_class_names_needs_a_version_of_bn_insert_that_knows_them() -> None:
    plain, named = Settings(), Settings(classes=("ant",))
    assert (plain.to_document()["version"], named.to_document()["version"]) == (1, 2)
    assert Settings.from_json(named.to_json()) == named


@BOTH_FORMATS
def test_the_shape_of_an_input_comes_back(name: str, tmp_path: Path) -> None:
    save_checkpoint(vgg_of(SPEC), tmp_path / name, input_shape=torch.rand(3, 40, 48).shape)
    settings = read_checkpoint(tmp_path / name).settings
    assert settings is not None
    assert settings.input_shape == (3, 40, 48)
    assert settings.to_document()["version"] == 4


@pytest.mark.parametrize(
    "shape", [3, "3", {3, 8}, (3, 0, 4), (3, 4.5), ("3", "4"), [1] * 17, (2**31,), (3, 2**15, 2**15)]
)
def test_what_is_no_shape_of_an_input_is_refused(shape: Any, tmp_path: Path) -> None:
    message = refusal_of(lambda: save_checkpoint(vgg_of(SPEC), tmp_path / "vgg.pth", input_shape=shape))
    assert message.startswith(f"cannot write {tmp_path / 'vgg.pth'}: ")
    assert "input_shape" in message
    assert not contents(tmp_path)


@BOTH_FORMATS
def test_nothing_is_assumed_of_a_vgg_that_was_saved_as_what_its_keys_say(name: str, tmp_path: Path) -> None:
    save_checkpoint(vgg_of(SPEC), tmp_path / name)
    settings = read_checkpoint(tmp_path / name).settings
    assert settings is not None
    assert settings.to_document()["version"] == 3
    assert vgg_assumptions(load_checkpoint(tmp_path / name), settings) == ""


def test_a_vgg_that_a_renorm_scheduler_observes_is_saved_as_what_its_keys_say(tmp_path: Path) -> None:
    network = insert_batchnorm(vgg_of(SPEC).eval(), [torch.rand(4, 3, 32, 32)])
    set_batchnorm_mode(network, "renorm")
    with RenormScheduler(network):
        save_checkpoint(network, tmp_path / "vgg.pth")
    settings = read_checkpoint(tmp_path / "vgg.pth").settings
    assert settings is not None
    assert settings.rebuilt_from_keys


class Conv2d(nn.Conv2d):
    """A layer of another class with the same name and settings."""


ALTERED: dict[str, Callable[[Any], object]] = {
    "activation": lambda vgg: setattr(vgg.features, "2", nn.LeakyReLU()),
    "pooling": lambda vgg: setattr(vgg.features, "5", nn.AvgPool2d(2, 2)),
    "dilation": lambda vgg: setattr(vgg.features[0], "dilation", (2, 2)),
    "class": lambda vgg: setattr(vgg.features[0], "__class__", Conv2d),
    "forward": lambda vgg: setattr(vgg, "forward", lambda x: x),
    "hook": lambda vgg: vgg.features[0].register_forward_hook(lambda _layer, _inputs, output: 2 * output),
    "pre-hook": lambda vgg: vgg.features[0].register_forward_pre_hook(lambda _layer, inputs: inputs),
}


@pytest.mark.parametrize("change", ALTERED)
def test_a_vgg_that_its_keys_do_not_describe_is_assumed_to_be_an_ordinary_one(tmp_path: Path, change: str) -> None:
    saved = vgg_of(SPEC)
    ALTERED[change](saved)
    save_checkpoint(saved, tmp_path / "vgg.pth")
    settings = read_checkpoint(tmp_path / "vgg.pth").settings
    assert settings is not None
    assert settings.to_document()["version"] == 1
    assert "Assumed" in vgg_assumptions(load_checkpoint(tmp_path / "vgg.pth"), settings)


def test_more_or_fewer_class_names_than_outputs_are_warned_of(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match="2 class names for the 3 outputs of 1: the network cannot be evaluated"):
        save_checkpoint(model, tmp_path / "network.pth", classes=["ant", "bee"])
    assert read_checkpoint(tmp_path / "network.pth").settings.classes == ("ant", "bee")


def test_a_transform_that_is_not_a_dict_is_refused_with_the_way_out(tmp_path: Path) -> None:
    transform: Any = Transform()
    message = refusal_of(lambda: save_checkpoint(vgg_of(SPEC), tmp_path / "vgg.pth", transform=transform))
    assert "transform is a Transform, not a dict; pass bn_insert.images.Transform(...).to_dict()" in message
    assert not contents(tmp_path)


def test_class_names_that_could_not_be_read_again_are_not_saved(tmp_path: Path) -> None:
    message = refusal_of(lambda: save_checkpoint(vgg_of(SPEC), tmp_path / "vgg.pth", classes=["ant", "ant"]))
    assert "vgg.pth: the field classes names 'ant' twice" in message
    assert not contents(tmp_path)


@BOTH_FORMATS
def test_the_same_network_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        save_checkpoint(vgg_of(SPEC), folder / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", ["vgg-bn.pth", "vgg-bn.pt"])
def test_a_pth_is_one_file_with_a_state_dict_that_carries_its_settings(name: str, mmap: bool, tmp_path: Path) -> None:
    vgg = vgg_of(SPEC)
    save_checkpoint(vgg, tmp_path / name)
    assert sorted(contents(tmp_path)) == [name]
    state = torch.load(tmp_path / name, weights_only=True, mmap=mmap)
    assert type(state) is OrderedDict
    assert {type(value) for value in state.values()} == {Tensor}
    vgg_of(SPEC, seed=1).load_state_dict(state, strict=True)
    metadata = state._metadata  # type: ignore[attr-defined]
    document = json.loads(metadata[""].pop("bn_insert"))
    assert metadata == vgg.state_dict()._metadata  # versions of modules, such as BatchNorm's
    assert document["format"] == "bn-insert"
    assert document["version"] == 3
    norm = vgg.features[1]
    assert document["batchnorm"]["features.1"] == {"eps": norm.eps, "momentum": norm.momentum}
    assert document["dropout"] == {"classifier.3": vgg.classifier[3].p}


def test_torchvisions_own_network_loads_the_file_strictly_and_computes_the_same(tmp_path: Path) -> None:
    with torch.device("meta"):
        vgg = VGG(nn.Identity(), num_classes=1, init_weights=False)
    vgg.features = make_layers([4, "M", 6, "M"], batch_norm=True)
    vgg.avgpool, vgg.classifier = nn.AdaptiveAvgPool2d(2), nn.Sequential(nn.Linear(24, 3))
    save_checkpoint(vgg.eval(), tmp_path / "vgg_bn.pth")
    other = copy.deepcopy(vgg)
    nn.init.zeros_(other.classifier[0].weight)
    result = other.load_state_dict(torch.load(tmp_path / "vgg_bn.pth"), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other(images_for(SPEC)), vgg(images_for(SPEC)))


def test_the_versions_of_modules_are_kept_so_that_a_missing_counter_is_told_by_pytorch_as_ever(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    save_checkpoint(model, tmp_path / "norm.pth")
    state = torch.load(tmp_path / "norm.pth")
    del state["0.num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        model.load_state_dict(state, strict=True)


def test_metadata_of_a_module_that_could_not_be_read_again_is_left_out(tmp_path: Path) -> None:
    class Strange(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination._metadata[prefix[:-1]]["made by"] = Strange

    save_checkpoint(nn.Sequential(Strange(2, 2)), tmp_path / "dense.pth")
    assert torch.load(tmp_path / "dense.pth")._metadata["0"] == {"version": 1}


def test_a_safetensors_file_holds_all_by_itself(tmp_path: Path) -> None:
    save_checkpoint(vgg_of(SPEC), tmp_path / "vgg.safetensors")
    assert sorted(contents(tmp_path)) == ["vgg.safetensors"]
    with safe_open(tmp_path / "vgg.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["bn-insert"]
    assert sorted(json.loads(metadata["bn-insert"])) == [
        "batchnorm",
        "dropout",
        "format",
        "rebuilt_from_keys",
        "version",
    ]


@BOTH_FORMATS
def test_views_shared_tensors_and_other_memory_formats_are_stored_as_plain_tensors(name: str, tmp_path: Path) -> None:
    vgg = vgg_of(Spec((Conv(), Conv(), Conv()))).to(memory_format=torch.channels_last)
    vgg.features[4].weight = vgg.features[2].weight
    vgg.features[2].bias = nn.Parameter(torch.arange(1000.0)[::250])
    save_checkpoint(vgg, tmp_path / name)
    assert (tmp_path / name).stat().st_size < 20_000
    result = load_checkpoint(tmp_path / name)
    assert torch.equal(result(images_for()), vgg(images_for()))
    assert result.features[4].weight.data_ptr() != result.features[2].weight.data_ptr()
    assert all(value.is_contiguous() for value in result.state_dict().values())


class Compiled(nn.Module):
    """What torch.compile returns, as far as names go."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._orig_mod = network


@pytest.mark.parametrize("wrap", [nn.DataParallel, Compiled, lambda vgg: nn.DataParallel(Compiled(vgg))])
def test_what_pytorch_puts_around_a_model_is_not_stored(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    vgg = vgg_of(SPEC)
    save_checkpoint(wrap(vgg), tmp_path / "vgg.pth")
    assert list(torch.load(tmp_path / "vgg.pth", weights_only=True)) == list(vgg.state_dict())
    assert_same(load_checkpoint(tmp_path / "vgg.pth"), vgg)


def test_a_vgg_inside_another_module_is_found_with_its_settings(tmp_path: Path) -> None:
    holder = nn.Module()
    holder.model = vgg_of(SPEC)
    save_checkpoint(holder, tmp_path / "vgg.pth")
    assert_same(load_checkpoint(tmp_path / "vgg.pth"), holder.model)


# Reading what others have written


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "model_ema"])
def test_a_state_dict_is_found_in_its_wrapper(wrapper: str, tmp_path: Path) -> None:
    state = OrderedDict(plain_state())
    torch.save({"epoch": 3, "optimizer": {"param_groups": []}, wrapper: state}, tmp_path / "vgg.pth")
    result = load_checkpoint(tmp_path / "vgg.pth")
    assert torch.equal(result.classifier[0].weight, state["classifier.0.weight"])


def test_of_two_state_dicts_the_first_is_read_and_the_other_is_named(tmp_path: Path) -> None:
    raw, averaged = plain_state(), {key: torch.zeros_like(value) for key, value in plain_state().items()}
    torch.save({"model_ema": averaged, "model": raw, "optimizer": {}}, tmp_path / "vgg.pth")
    with pytest.warns(
        UserWarning, match=r"reading 'model' of .*vgg.pth, which also has 'model_ema'; .* key='model_ema'"
    ):
        result = load_checkpoint(tmp_path / "vgg.pth")
    assert torch.equal(result.classifier[0].weight, raw["classifier.0.weight"])
    assert not load_checkpoint(tmp_path / "vgg.pth", key="model_ema").classifier[0].weight.any()


@BOTH_FORMATS
@pytest.mark.parametrize("key", ["nonsense", "features", "classifier.0"])
def test_a_key_is_refused_for_a_file_that_is_a_state_dict_itself(name: str, key: str, tmp_path: Path) -> None:
    save_checkpoint(vgg_of(SPEC), tmp_path / name)
    message = refusal_of(lambda: load_checkpoint(tmp_path / name, key=key))
    assert message == f"{tmp_path / name} is a state dict itself; leave out key"


@pytest.mark.parametrize("more", [{}, {"n_averaged": torch.ones(())}])
def test_a_prefix_that_all_keys_have_is_no_key(more: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(more | {f"model.{key}": value for key, value in plain_state().items()}, tmp_path / "vgg.pth")
    with pytest.raises(UnneededKeyError, match="is a state dict itself; leave out key"):
        load_checkpoint(tmp_path / "vgg.pth", key="model")


def test_a_configuration_under_the_name_of_a_wrapper_is_passed_over(tmp_path: Path) -> None:
    torch.save({"model": {"depth": 16}, "model_state_dict": {"state_dict": plain_state()}}, tmp_path / "vgg.pth")
    load_checkpoint(tmp_path / "vgg.pth")


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model."])
def test_prefixes_are_stripped_when_all_keys_have_them(prefix: str, tmp_path: Path) -> None:
    torch.save({prefix + key: value for key, value in plain_state().items()}, tmp_path / "vgg.pth")
    assert list(load_checkpoint(tmp_path / "vgg.pth").state_dict()) == list(plain_state())


def test_a_key_without_the_prefix_of_all_others_is_named(tmp_path: Path) -> None:
    state = {"module." + key: value for key, value in plain_state().items()}
    torch.save({"n_averaged": torch.ones(())} | state | {"other": torch.ones(1)}, tmp_path / "vgg.pth")
    message = refusal_of(lambda: load_checkpoint(tmp_path / "vgg.pth"))
    assert "the key 'other' does not begin with 'module.', as those of its VGG do" in message
    assert message.endswith("or ignore tensors that do not belong to the network (ignore_unexpected=True)")


def test_a_tensor_beside_the_prefixed_ones_of_an_architecture_is_the_only_mismatch(tmp_path: Path) -> None:
    state = {f"net.{key}": value for key, value in SmallResidual().state_dict().items()}
    torch.save(state | {"loss.weight": torch.ones(1)}, tmp_path / "small.pth")
    message = refusal_of(lambda: load_checkpoint(tmp_path / "small.pth", model=SmallResidual))
    assert "does not fit SmallResidual: loss.weight is not in the model; pass" in message


def test_a_key_that_a_prefix_would_hide_is_no_part_of_the_network(tmp_path: Path) -> None:
    state = {f"net.{key}": value for key, value in SmallResidual().state_dict().items()}
    torch.save(state | {"model.bn.bias": torch.ones(4)}, tmp_path / "small.pth")
    message = refusal_of(lambda: load_checkpoint(tmp_path / "small.pth", model=SmallResidual))
    assert "does not fit SmallResidual: net.model.bn.bias is not in the model" in message


def test_the_features_of_one_module_and_the_classifier_of_another_are_no_vgg(tmp_path: Path) -> None:
    state = {("model." if "features" in key else "") + key: value for key, value in plain_state().items()}
    torch.save(state, tmp_path / "parts.pth")
    message = refusal_of(lambda: load_checkpoint(tmp_path / "parts.pth"))
    assert "the key 'classifier.0.weight' does not begin with 'model.'" in message


def test_the_averaged_model_of_torchs_own_training_scripts_is_read(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(vgg_of(SPEC))
    torch.save({"model_ema": averaged.state_dict()}, tmp_path / "vgg.pth")
    assert list(load_checkpoint(tmp_path / "vgg.pth").state_dict()) == list(plain_state())


@pytest.mark.parametrize("options", [{"_use_new_zipfile_serialization": False}, {}])
@pytest.mark.parametrize("name", ["vgg.pth", "vgg.bin", "vgg.safetensors", "vgg"])
def test_the_format_is_told_by_the_content_and_nothing_is_warned_of(
    options: dict[str, Any], name: str, tmp_path: Path
) -> None:
    torch.save(plain_state(), tmp_path / name, **options)
    load_checkpoint(tmp_path / name)


def test_safetensors_under_another_name_and_without_our_header_is_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(plain_state(), tmp_path / "vgg.pth")
    assert read_checkpoint(tmp_path / "vgg.pth").settings is None
    assert load_checkpoint(str(tmp_path / "vgg.pth")).features[1].eps == 1e-5


def test_safetensors_is_told_whatever_the_length_of_its_header_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "vgg.safetensors"
    first_bytes = set()
    for size in range(0, 256, 8):  # headers are padded to a multiple of eight
        safetensors.torch.save_file(plain_state(), path, metadata={"note": "x" * size})
        first_bytes.add(path.read_bytes()[0])
        load_checkpoint(path)
    assert len(first_bytes) == 32


def test_only_weights_are_ever_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"a": Payload(tmp_path / "made-by-the-payload")}, tmp_path / "evil.pth")
    refusal_of(lambda: load_checkpoint(tmp_path / "evil.pth"))
    assert not (tmp_path / "made-by-the-payload").exists()


# Other architectures


class SmallResidual(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"conv": nn.Conv2d(3, width, 3), "bn": nn.BatchNorm2d(width)})
        self.model["tied"] = self.model["conv"]


@pytest.mark.parametrize("prefix", ["", "module."])
@BOTH_FORMATS
def test_another_architecture_is_filled_and_the_given_module_stays(prefix: str, name: str, tmp_path: Path) -> None:
    original = SmallResidual()
    original.model["bn"].eps = 1e-3
    save_checkpoint(original, tmp_path / name)
    if prefix and name.endswith("pth"):
        state = torch.load(tmp_path / name)
        prefixed = OrderedDict((prefix + key, value) for key, value in state.items())
        prefixed._metadata = state._metadata  # type: ignore[attr-defined]
        torch.save(prefixed, tmp_path / name)
    given = SmallResidual().train()
    before = {key: value.clone() for key, value in given.state_dict().items()}
    for architecture in (given, SmallResidual):
        result = load_checkpoint(tmp_path / name, model=architecture)
        assert type(result) is SmallResidual
        assert result is not given
        assert not result.training
        assert torch.equal(result.model["conv"].weight, original.model["conv"].weight)
        assert result.model["bn"].eps == 1e-3
        assert result.model["tied"] is result.model["conv"]
    assert given.training
    assert given.model["bn"].eps == 1e-5
    assert all(torch.equal(given.state_dict()[key], before[key]) for key in before)


def test_an_architecture_may_have_a_method_parameters_of_its_own(tmp_path: Path) -> None:
    class TrainsSome(SmallResidual):
        def parameters(self) -> list[nn.Parameter]:  # type: ignore[override]
            return [parameter for parameter in super().parameters() if parameter.requires_grad]

    original = TrainsSome()
    save_checkpoint(original, tmp_path / "some.pth")
    result = load_checkpoint(tmp_path / "some.pth", model=TrainsSome)
    assert torch.equal(result.model["conv"].weight, original.model["conv"].weight)


def test_mismatches_with_an_architecture_are_listed_up_to_eight(tmp_path: Path) -> None:
    torch.save({f"layer{number}.weight": torch.ones(1) for number in range(7)}, tmp_path / "other.pth")
    message = refusal_of(lambda: load_checkpoint(tmp_path / "other.pth", model=nn.BatchNorm1d(2)))
    assert "the checkpoint does not fit BatchNorm1d: weight is not in the file" in message
    assert "layer3.weight is not in the model; and 3 more; pass the architecture" in message
    assert "layer4" not in message


@pytest.mark.parametrize("ignoring", [False, True])
def test_a_network_without_parameters_is_refused_and_no_tensor_is_advised_to_be_ignored(
    ignoring: bool, tmp_path: Path
) -> None:
    class KeepsLayersInAList(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(2, 2)]

    save_checkpoint(nn.Sequential(nn.Linear(2, 2)), tmp_path / "a.pth")
    path, options = tmp_path / "a.pth", {"model": KeepsLayersInAList, "ignore_unexpected": ignoring}
    message = refusal_of(lambda: load_checkpoint(path, **options))
    assert "KeepsLayersInAList has no parameters or buffers to load; pass the architecture that" in message
    assert message.endswith("in an nn.ModuleList: those in a plain list are not part of a module")


def test_another_width_is_told_with_both_shapes(tmp_path: Path) -> None:
    save_checkpoint(SmallResidual(), tmp_path / "other.pth")
    message = refusal_of(lambda: load_checkpoint(tmp_path / "other.pth", model=SmallResidual(5)))
    assert "model.conv.weight is (4, 3, 3, 3) in the file and (5, 3, 3, 3) in the model" in message


@BOTH_FORMATS
def test_a_model_that_a_vgg_does_not_need_can_be_left_out(name: str, tmp_path: Path) -> None:
    with_batchnorm = insert_batchnorm(small_vgg(), [torch.rand(4, 3, 16, 16)])
    save_checkpoint(with_batchnorm, tmp_path / name)
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    message = refusal_of(lambda: load_checkpoint(tmp_path / name, model=wrong))
    assert message.endswith(
        "pass the architecture that they were made to; without model, the architecture is read from the checkpoint"
    )
    save_checkpoint(small_vgg(), tmp_path / name, overwrite=True)
    message = refusal_of(lambda: load_checkpoint(tmp_path / name, model=SmallResidual))
    assert "that it was saved from; without model, the architecture is read from the checkpoint" in message
    with messages_name_options():
        assert "; without --model, " in refusal_of(lambda: load_checkpoint(tmp_path / name, model=SmallResidual))
    save_checkpoint(SmallResidual(), tmp_path / name, overwrite=True)
    assert "without" not in refusal_of(lambda: load_checkpoint(tmp_path / name, model=small_vgg))


def test_an_architecture_that_is_none_or_has_no_memory_is_refused(tmp_path: Path) -> None:
    save_checkpoint(nn.Linear(2, 2), tmp_path / "dense.pth")
    assert "returned an int" in refusal_of(lambda: load_checkpoint(tmp_path / "dense.pth", model=lambda: 3))
    meta = nn.Linear(2, 2, device="meta")
    assert "build it on the CPU" in refusal_of(lambda: load_checkpoint(tmp_path / "dense.pth", model=meta))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_an_architecture_with_lazy_layers_is_refused(tmp_path: Path) -> None:
    save_checkpoint(nn.Linear(2, 2), tmp_path / "dense.pth")
    message = refusal_of(lambda: load_checkpoint(tmp_path / "dense.pth", model=nn.LazyLinear(2)))
    assert message == "the model passed has lazy layers, whose shapes are not known; call it once on an input"


# Settings


def stored(path: Path) -> dict[str, Any]:
    """Return the settings in a .pth as JSON data."""
    document: dict[str, Any] = json.loads(torch.load(path)._metadata[""]["bn_insert"])
    return document


def store(path: Path, value: object) -> None:
    """Put a value in the place of the settings of a .pth."""
    state = torch.load(path)
    state._metadata[""]["bn_insert"] = value
    torch.save(state, path)


def pth_with_settings(folder: Path, **changes: object) -> Path:
    path = folder / "vgg.pth"
    save_checkpoint(vgg_of(SPEC), path)
    store(path, json.dumps(stored(path) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"version": 5}, 'the field "version" is 5, and this version of bn-insert reads versions 1 to 4'),
        ({"batchnorm": []}, "the field batchnorm is wrong: expected object, got array"),
        ({"batchnorm": {"features.1": 3}}, "the field batchnorm.features.1 is wrong: expected object, got int"),
        (
            {"batchnorm": {"features.1": {"eps": -1e-5}}},
            "the field batchnorm.features.1.eps is wrong: expected float >= 0.0, got -1e-05",
        ),
        (
            {"batchnorm": {"features.1": {"eps": float("nan")}}},
            "features.1.eps is wrong: expected float >= 0.0, got nan",
        ),
        ({"batchnorm": {"features.1": {"eps": 10**400}}}, "batchnorm.features.1.eps is wrong: number out of range"),
        ({"batchnorm": {"features.1": {"eps": "1e-5"}}}, "batchnorm.features.1.eps is wrong: expected float, got str"),
        ({"batchnorm": {"features.1": {"eps": True}}}, "batchnorm.features.1.eps is wrong: expected float, got bool"),
        ({"batchnorm": {"features.1": {"eps": None}}}, "batchnorm.features.1.eps is wrong: expected float, got null"),
        (
            {"batchnorm": {"features.1": {"momentum": float("inf")}}},
            "features.1.momentum is wrong: expected float <= 1e+300, got inf",
        ),
        ({"batchnorm": {"features.1": {"epsilon": 1e-5}}}, "unknown field batchnorm.features.1.epsilon"),
        ({"dropout": {"classifier.3": 1.5}}, "dropout.classifier.3 is wrong: expected float <= 1.0, got 1.5"),
        ({"dropout": 0.5}, "the field dropout is wrong: expected object, got float"),
        ({"transform": [1]}, "the field transform is wrong: expected object | null, got array"),
        ({"batch_norm": {}}, "unknown field batch_norm"),
        ({"replaces": {}}, "unknown field replaces"),
        ({"version": 2}, "unknown field rebuilt_from_keys"),  # versions 1 and 2 had none
        ({"version": 3, "rebuilt_from_keys": 1}, "the field rebuilt_from_keys is wrong: expected bool, got int"),
        ({"\ud800": 1}, "has a name that is not valid Unicode: '\\ud800'"),
        ({"batchnorm": {"features.1": {"\ud800": 1}}}, "batchnorm.features.1 has a name that is not valid Unicode"),
        ({"version": 3, "classes": "cat"}, "the field classes is wrong: expected array, got str"),
        ({"version": 3, "classes": ["cat", 3]}, "the field classes[1] is wrong: expected str, got int"),
        ({"version": 3, "classes": ["cat", "dog", "cat"]}, "classes names 'cat' twice"),
        ({"version": 3, "classes": ["cat", ""]}, "the field classes[1] is wrong: expected str of length >= 1, got ''"),
        ({"version": 3, "classes": ["cat\ndog"]}, "classes[0], 'cat\\ndog', contains a line break"),
        ({"version": 3, "classes": ["\ud800"]}, "classes[0], '\\ud800', is not valid Unicode"),
        ({"version": 3, "classes": ["x" * 1001]}, "classes[0] is wrong: expected str of length <= 1000, got 'xxx"),
        ({"version": 3, "input_shape": [3]}, "unknown field input_shape"),
        ({"version": 4, "input_shape": [3, -1]}, "the field input_shape[1] is wrong: expected int >= 1, got -1"),
        ({"version": 4, "input_shape": [2**30, 2]}, "input_shape is for more than the limit of 1,073,741,824 values"),
        (
            {"version": 3, "classes": [str(number) for number in range(100_001)]},
            "the field classes is wrong: expected array of length <= 100000",
        ),
    ],
)
def test_damaged_settings_are_told_with_file_and_field(changes: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    path = pth_with_settings(tmp_path, **changes)
    message = refusal_of(lambda: load_checkpoint(path))
    assert message.startswith(f"{path}: the settings in the file's metadata are damaged: ")
    assert fragment in message
    assert "; save it again, or drop the settings: torch.save(dict(torch.load(path)), other_path)" in message
    assert refusal_of(lambda: read_checkpoint(path).settings) == message


@pytest.mark.parametrize(
    "text", ['{"format": "bn-insert",', "\ud800", "[" * 100_000, "", "9" * 5000, "\x1b[2J", " " * 2**24]
)
def test_settings_that_are_no_json_are_told(text: str, tmp_path: Path) -> None:
    path = pth_with_settings(tmp_path)
    store(path, text + " ")
    message = refusal_of(lambda: load_checkpoint(path))
    wanted = "16,777,217 characters of settings are more than the limit" if len(text) > 2**20 else "invalid JSON"
    assert f"the settings in the file's metadata are damaged: {wanted}" in message
    assert len(message) < 500
    assert message.isprintable()


@pytest.mark.parametrize("value", [3, None, b"{}", ["{}"], {"format": "bn-insert"}, torch.ones(2), OrderedDict(a=1)])
def test_settings_that_are_no_text_are_told(value: object, tmp_path: Path) -> None:
    path = pth_with_settings(tmp_path)
    store(path, value)
    if value is None:
        assert read_checkpoint(path).settings is None
        return
    message = refusal_of(lambda: load_checkpoint(path))
    assert (
        f"the settings in the file's metadata are damaged: they are of type {type(value).__name__}, not str" in message
    )


class StateWith:
    """Pickles as an OrderedDict with these attributes, some of which hide its methods."""

    def __init__(self, **attributes: object) -> None:
        self.attributes = attributes

    def __reduce__(self) -> tuple[object, ...]:
        return OrderedDict, (), self.attributes, None, iter(plain_state().items())


@pytest.mark.parametrize(
    "attributes",
    [
        {"_metadata": 3},
        {"_metadata": []},
        {"_metadata": {}},
        {"_metadata": {"": 3}},
        {"_metadata": {"": []}},
        {"_metadata": {"features.1": {"bn_insert": "{}"}}},
        {"_metadata": OrderedDict({"": {"version": 1}})},
        {"items": 3, "get": 3, "keys": torch.Size, "values": OrderedDict, "__iter__": 3},
        {"_metadata": StateWith(get=3, items=3)},
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_attributes_that_a_stranger_gave_a_state_dict_change_nothing(
    attributes: dict[str, Any], wrapped: bool, tmp_path: Path
) -> None:
    state = StateWith(**attributes)
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "vgg.pth")
    assert read_checkpoint(tmp_path / "vgg.pth").settings is None
    assert list(load_checkpoint(tmp_path / "vgg.pth").state_dict()) == list(plain_state())


def test_a_state_dict_in_a_wrapper_keeps_its_settings(tmp_path: Path) -> None:
    vgg = vgg_of(SPEC)
    save_checkpoint(vgg, tmp_path / "vgg.pth")
    torch.save({"epoch": 3, "model": torch.load(tmp_path / "vgg.pth")}, tmp_path / "run.pth")
    assert_same(load_checkpoint(tmp_path / "run.pth"), vgg)


def test_a_plain_dict_that_a_program_saves_over_the_file_has_no_settings(tmp_path: Path) -> None:
    save_checkpoint(vgg_of(SPEC), tmp_path / "vgg.pth")
    torch.save(dict(torch.load(tmp_path / "vgg.pth")), tmp_path / "vgg.pth")
    assert read_checkpoint(tmp_path / "vgg.pth").settings is None
    assert load_checkpoint(tmp_path / "vgg.pth").features[1].eps == 1e-5


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"batchnorm": {"features.9": {}}}, "the settings name features.9, but the network has no BatchNorm there"),
        ({"batchnorm": {"features.1": {}}}, "do not name the BatchNorm layers classifier.1, features.8"),
        ({"dropout": {"classifier.9": 0.5}}, "the settings name classifier.9, but the network has no Dropout there"),
        (
            {"batchnorm": {f"features.{number}": {} for number in range(20, 26)}},
            "the settings name features.20, features.21, features.22 and 3 more",
        ),
    ],
)
def test_settings_of_another_checkpoint_are_told(changes: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    path = pth_with_settings(tmp_path, **changes)
    message = refusal_of(lambda: load_checkpoint(path))
    assert f"{path}: the settings in the file's metadata belong to another checkpoint" in message
    assert fragment in message
    assert "remove them, or save the network again with save_checkpoint" in message


@BOTH_FORMATS
def test_a_dropout_layer_that_the_class_of_a_network_gained_keeps_its_probability(name: str, tmp_path: Path) -> None:
    layers = {"first": nn.Dropout(0.25), "fc": nn.Linear(2, 3), "norm": nn.BatchNorm1d(3)}
    saved = nn.Sequential(OrderedDict(layers))
    save_checkpoint(saved, tmp_path / name)
    changed = nn.Sequential(OrderedDict(layers | {"first": nn.Dropout(), "second": nn.Dropout(0.75)}))
    loaded = load_checkpoint(tmp_path / name, model=changed)
    assert (loaded.first.p, loaded.second.p) == (0.25, 0.75)
    x = torch.rand(4, 2)
    assert torch.equal(loaded(x), saved.eval()(x))


def test_damaged_settings_in_a_header_are_told(tmp_path: Path) -> None:
    path = tmp_path / "vgg.safetensors"
    safetensors.torch.save_file(plain_state(), path, metadata={"bn-insert": '{"format": "bn-insert", "version": 9}'})
    assert f"{path}: the settings in the file's header are damaged" in refusal_of(lambda: load_checkpoint(path))
    safetensors.torch.save_file(plain_state(), path, metadata={"bn-insert": "{}"})
    assert 'the field "format" is None' in refusal_of(lambda: load_checkpoint(path))
    text = '{"format": "bn-insert", "version": 1, "dropout": {"\\u001b[2J": 0.5}}'
    safetensors.torch.save_file(plain_state(), path, metadata={"bn-insert": text})
    message = refusal_of(lambda: load_checkpoint(path))
    assert "the settings in the file's header belong to another checkpoint" in message
    assert "\x1b" not in message


@BOTH_FORMATS
@pytest.mark.parametrize("text", ['{"format": "other"}', '{"format": "bn-insert", "version": 1}', "{}{}", ""])
def test_a_json_file_beside_a_checkpoint_is_never_written_or_removed(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "network.json").write_text(text)
    for seed in (0, 1):
        save_checkpoint(vgg_of(SPEC, seed=seed), tmp_path / name, overwrite=bool(seed))
        assert_same(load_checkpoint(tmp_path / name), vgg_of(SPEC, seed=seed))
        assert contents(tmp_path).keys() == {name, "network.json"}
        assert (tmp_path / "network.json").read_text() == text


def test_pt_and_pth_of_one_name_have_each_its_own_settings(tmp_path: Path) -> None:
    for eps, name in enumerate(("vgg.pth", "vgg.pt", "vgg.safetensors"), start=1):
        save_checkpoint(nn.Sequential(nn.BatchNorm1d(2, eps=eps)), tmp_path / name)
    found = [read_checkpoint(tmp_path / name).settings for name in ("vgg.pth", "vgg.pt", "vgg.safetensors")]
    assert [settings.batchnorm["0"].eps for settings in found if settings] == [1, 2, 3]


# Reading once


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", ["network.pth", "network.pt", "network.safetensors", "old.pth"])
def test_one_reading_has_all_that_a_network_is_built_from(name: str, mmap: bool, tmp_path: Path) -> None:
    vgg, path = vgg_of(SPEC), tmp_path / name
    save_checkpoint(vgg, path, transform={"resize": 32})
    if name == "old.pth":
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    checkpoint = read_checkpoint(path, mmap=mmap)
    assert checkpoint.path == path
    assert checkpoint.kind == ("safetensors" if name.endswith("safetensors") else "torch")
    assert checkpoint.settings is not None
    assert checkpoint.settings.transform == {"resize": 32}
    assert checkpoint.settings_place == f"the file's {'header' if name.endswith('safetensors') else 'metadata'}"
    if not mmap and checkpoint.kind == "torch":
        path.unlink()
    assert_same(build_network(checkpoint), vgg)
    with pytest.raises(AttributeError):
        checkpoint.settings = None  # type: ignore[misc]


@pytest.mark.parametrize("name", ["vgg.pth", "vgg.safetensors"])
def test_a_file_that_is_replaced_while_it_is_mapped_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    save_checkpoint(vgg_of(SPEC), path)
    save_checkpoint(vgg_of(SPEC, seed=1), tmp_path / f"other-{name}")

    def replaced(action: Callable[..., Any]) -> Callable[..., Any]:
        def replace_first(*arguments: Any, **options: Any) -> Any:
            (tmp_path / f"other-{name}").replace(path)
            return action(*arguments, **options)

        return replace_first

    monkeypatch.setattr(torch, "load", replaced(torch.load))
    monkeypatch.setattr(bn_insert.checkpoints.read_file, "safe_open", replaced(safe_open))
    message = refusal_of(lambda: load_checkpoint(path, mmap=True))
    assert f"{path} was refused: it was replaced while it was being read" in message


def test_a_file_that_is_replaced_while_it_is_read_gives_the_file_that_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, load = tmp_path / "vgg.pth", torch.load
    save_checkpoint(vgg_of(SPEC), path)

    def replace_first(*arguments: Any, **options: Any) -> Any:
        path.unlink()
        path.write_bytes(b"theirs")
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", replace_first)
    assert_same(load_checkpoint(path), vgg_of(SPEC))


# Writing


@BOTH_FORMATS
def test_an_existing_file_is_replaced_only_when_asked(name: str, tmp_path: Path) -> None:
    old, new = vgg_of(SPEC, seed=0), vgg_of(SPEC, seed=1)
    save_checkpoint(old, tmp_path / name)
    before = contents(tmp_path)
    message = refusal_of(lambda: save_checkpoint(new, tmp_path / name))
    assert "already exists: choose another name, or replace it with overwrite=True" in message
    assert contents(tmp_path) == before
    save_checkpoint(new, tmp_path / name, overwrite=True)
    assert_same(load_checkpoint(tmp_path / name), new)
    assert contents(tmp_path).keys() == before.keys()


@BOTH_FORMATS
def test_a_file_without_settings_is_replaced_too(name: str, tmp_path: Path) -> None:
    torch.save(plain_state(), tmp_path / name)
    save_checkpoint(vgg_of(SPEC, seed=1), tmp_path / name, overwrite=True)
    assert_same(load_checkpoint(tmp_path / name), vgg_of(SPEC, seed=1))


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("network.onnx", "the file name must end in .pth, .pt or .safetensors"),
        ("network", "the file name must end in .pth, .pt or .safetensors"),
        ("missing/network.pth", "missing does not exist; create it first"),
        ("folder.pth", "folder.pth: it is a folder; name a file inside it"),
        ("file/network.pth", "Not a directory"),
        ("pipe.pth", "pipe.pth: it is not a regular file"),
        ("x" * 300 + ".pth", "File name too long"),
        ("nul\0.pth", "is not a usable path"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_told_before_the_work(name: str, fragment: str, tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.pth")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert fragment in refusal_of(lambda: check_output(tmp_path / name, overwrite=True))
    assert fragment in refusal_of(lambda: save_checkpoint(vgg_of(), tmp_path / name, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_read_only_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    message = refusal_of(lambda: save_checkpoint(vgg_of(), tmp_path / "vgg.pth"))
    assert message == f"cannot write {tmp_path / 'vgg.pth'}: Read-only file system"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "no permission to write" in refusal_of(lambda: check_output(tmp_path / "vgg.pth"))


@pytest.mark.parametrize("size", [0, 100, 3000])
@BOTH_FORMATS
def test_a_full_disk_leaves_the_old_file_whole_and_nothing_behind(name: str, size: int, tmp_path: Path) -> None:
    save_checkpoint(vgg_of(SPEC), tmp_path / name)
    before = contents(tmp_path)
    with file_size_limit(size):
        message = refusal_of(lambda: save_checkpoint(vgg_of(SPEC, seed=1), tmp_path / name, overwrite=True))
        assert message.startswith(f"cannot write {tmp_path / name}: ")
        assert "File too large" in message
        refusal_of(lambda: save_checkpoint(vgg_of(SPEC), tmp_path / f"new-{name}"))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("overwrite", [True, False])
@BOTH_FORMATS
def test_an_interruption_leaves_the_old_file_whole_and_nothing_behind(
    name: str, overwrite: bool, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        save_checkpoint(vgg_of(SPEC), tmp_path / name)
    before = contents(tmp_path)

    def interrupted(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError):
        save_checkpoint(vgg_of(SPEC, seed=1), tmp_path / name, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_checkpoint_that_appears_meanwhile_is_left_alone_and_nothing_else_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_slowly(tensors: StateDict, file: Any) -> None:
        file.write(pickle.dumps(len(tensors)))
        (tmp_path / "vgg.pth").write_bytes(b"theirs")

    monkeypatch.setattr(torch, "save", save_slowly)
    assert "vgg.pth already exists" in refusal_of(lambda: save_checkpoint(vgg_of(), tmp_path / "vgg.pth"))
    assert contents(tmp_path) == {"vgg.pth": b"theirs"}


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_while_another_is_written_is_left_alone(
    hard_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not hard_links:
        monkeypatch.setattr(Path, "hardlink_to", unsupported)
    target = tmp_path / "report.json"

    def write(staged: Path) -> None:
        staged.write_text("mine")
        target.write_text("theirs")

    assert f"{target} already exists" in refusal_of(lambda: write_atomically(target, write))
    assert contents(tmp_path) == {"report.json": b"theirs"}
    target.unlink()
    write_atomically(target, lambda staged: staged.write_text("mine"))
    assert contents(tmp_path) == {"report.json": b"mine"}


@pytest.mark.parametrize("name", ["vgg.pth", "vgg.safetensors"])
def test_new_files_have_the_mode_of_the_umask_and_replaced_ones_keep_theirs(name: str, tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        save_checkpoint(vgg_of(SPEC), tmp_path / name)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
    (tmp_path / name).chmod(0o600)
    save_checkpoint(vgg_of(SPEC), tmp_path / name, overwrite=True)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_symbolic_link_stays_a_link_and_its_target_is_written(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    link, target = tmp_path / f"latest{suffix}", tmp_path / "runs" / f"first{suffix}"
    link.symlink_to(target)
    save_checkpoint(vgg_of(SPEC, seed=1), link)
    assert "already exists" in refusal_of(lambda: save_checkpoint(vgg_of(SPEC), link))
    save_checkpoint(vgg_of(SPEC), link, overwrite=True)
    assert link.is_symlink()
    for path in (link, target):
        assert_same(load_checkpoint(path), vgg_of(SPEC))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (
            lambda vgg: setattr(vgg.features[1], "eps", -1.0),
            "the field batchnorm.features.1.eps is wrong: expected float >= 0.0, got -1.0",
        ),
        (
            lambda vgg: setattr(vgg, "classifier", nn.Linear(2, 2, device="meta")),
            "classifier.weight is not an ordinary dense",
        ),
        (lambda vgg: vgg.register_buffer("sparse", torch.eye(3).to_sparse()), "sparse is not an ordinary dense tensor"),
        (lambda vgg: setattr(vgg, "classifier", nn.LazyLinear(2)), "classifier.weight is not an ordinary dense tensor"),
    ],
)
@BOTH_FORMATS
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_could_not_be_read_again_is_not_written(
    change: Callable[[nn.Module], object], fragment: str, name: str, tmp_path: Path
) -> None:
    vgg = vgg_of(SPEC)
    change(vgg)
    message = refusal_of(lambda: save_checkpoint(vgg, tmp_path / name))
    assert message.startswith(f"cannot write {tmp_path / name}: {fragment}")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("transform", [{"mean": torch.ones(3)}, {"resize": float("nan")}])
def test_a_transform_that_json_cannot_hold_is_told(transform: dict[str, Any], tmp_path: Path) -> None:
    message = refusal_of(lambda: save_checkpoint(vgg_of(), tmp_path / "vgg.pth", transform=transform))
    assert "the settings or the transform cannot be stored as JSON" in message
    assert contents(tmp_path) == {}


# Killed at any moment. A process is killed in front of each of its file operations in turn, which covers every state
# that the files can be left in.

KILLED = """
import itertools, json, os, shutil, signal, sys
from pathlib import Path
from torch import nn
from bn_insert.checkpoints.load_network import build_network, load_checkpoint
from bn_insert.checkpoints.save import save_checkpoint

CHANGES = {"os.rename", "os.link", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "os.utime"}
os.fsync = lambda file: None  # what was written outlives the process anyway: fsync is for power cuts

def network(number):
    model = nn.Sequential(nn.BatchNorm1d(2, eps=number))
    nn.init.constant_(model[0].weight, number)
    return model

def save_killed(path, overwrite, in_front_of):
    child = os.fork()
    if child == 0:
        new = network(2.0)
        passed = itertools.count()

        def kill(event, arguments):
            writes = event == "open" and "w" in (arguments[1] or "")
            if (writes or event in CHANGES) and next(passed) == in_front_of:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        save_checkpoint(new, path, overwrite=overwrite)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL

def found(path):
    if not path.exists():
        return "nothing"
    model = load_checkpoint(path, model=network(0.0))
    return f"{model[0].weight[0].item()} with eps {model[0].eps}"

states = {}
for name, overwrite in itertools.product(["network.pth", "network.safetensors"], [True, False]):
    path = Path(sys.argv[1], "run", name)
    states[f"{name} {overwrite}"] = []
    for operation in itertools.count():
        path.parent.mkdir()
        if overwrite:
            save_checkpoint(network(1.0), path)
        killed = save_killed(path, overwrite, operation)
        states[f"{name} {overwrite}"].append(found(path))
        if killed and overwrite:  # the next one finds its way from there
            save_checkpoint(network(3.0), path, overwrite=True)
            assert found(path) == "3.0 with eps 3.0"
        shutil.rmtree(path.parent)
        if not killed:
            break
print(json.dumps(states))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_any_moment_the_checkpoint_is_the_old_or_the_new_one_with_its_own_settings(tmp_path: Path) -> None:
    run = run_forked("-c", KILLED, tmp_path, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    old, new, nothing = "1.0 with eps 1.0", "2.0 with eps 2.0", "nothing"
    for case, states in json.loads(run.stdout).items():
        assert len(states) >= 5, case
        assert list(dict.fromkeys(states)) == [old if case.endswith("True") else nothing, new], case


# Hostile and damaged files


class Payload:
    """What a pickle runs when it is read without care: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_named_and_never_run(zipped: bool, tmp_path: Path) -> None:
    made = tmp_path / "made-by-the-payload"
    path = tmp_path / "evil.pth"
    torch.save({"a": Payload(made)}, path, _use_new_zipfile_serialization=zipped)
    message = refusal_of(lambda: load_checkpoint(path))
    assert "evil.pth contains code or objects other than tensors (posix.mkdir)" in message
    assert "torch.save(model.state_dict(), path)" in message
    path.write_bytes(pickle.dumps({"a": Payload(made)}, protocol=2))
    assert "evil.pth" in refusal_of(lambda: load_checkpoint(path))
    assert not made.exists()


def test_a_whole_model_is_refused_with_what_to_write_instead(tmp_path: Path) -> None:
    torch.save(vgg_of(), tmp_path / "whole.pth")
    message = refusal_of(lambda: load_checkpoint(tmp_path / "whole.pth"))
    assert "code or objects other than tensors (torchvision.models.vgg.VGG)" in message
    assert "save only the weights: torch.save(model.state_dict(), path)" in message


def lfs_pointer() -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "is not a checkpoint: it is empty"),
        (b"hello, world\n", "is not a checkpoint: it is a text file"),
        ("größer\n".encode(), "is not a checkpoint: it is a text file"),
        (b'[       {"error": "not found"}]', "is not a checkpoint: it is a text file"),
        (b"\xff" * 300, "neither torch.save nor safetensors wrote it"),
        (bytes(1000), "it begins with zeros, as after an interrupted download"),
        (b"\n<HTML><body>", "is not a checkpoint: it is a web page"),
        ("\ufeff<!doctype html>".encode(), "is not a checkpoint: it is a web page"),
        ("<!doctype html>".encode("utf-16"), "is not a checkpoint: it is a web page"),
        (("<!DOCTYPE html>" + "ä" * 300).encode(), "is not a checkpoint: it is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "is not a checkpoint: it is a web page"),
        (lfs_pointer(), "fetch the file itself with git lfs pull"),
        (b"\x00\x01\x02\x03" * 20, "neither torch.save nor safetensors wrote it"),
        (b"PK\x03\x04", "is incomplete: it ends before its zip directory"),
        (b"PK\x03\x04" + b"\x00" * 1000, "is incomplete: it ends before its zip directory"),
        (b"\x80\x02.", "is damaged, or was not written by torch.save or safetensors"),
        (pickle.dumps({"a": 1}, protocol=4), "is a pickle that torch.save did not write"),
        (struct.pack("<Q", 1 << 62) + b"{" + b" " * 1000, "header too large"),
        (struct.pack("<Q", 90_000_000) + b"{" + b" " * 1000, "is damaged"),
        (struct.pack("<Q", 2) + b"{}", "contains no tensors"),
        (struct.pack("<Q", 64) + b"{" + b"[" * 63, "is damaged"),
    ],
)
@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_a_file_that_is_no_checkpoint_is_told(content: bytes, fragment: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal_of(lambda: load_checkpoint(tmp_path / name))
    assert message.startswith(str(tmp_path / name))
    assert fragment in message


@pytest.mark.parametrize("name", ["modle.pth", "model", "Model.PTH", "model.safetensors", "lemod.pth"])
def test_a_mistyped_path_is_told_with_what_it_may_mean(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.pth").touch()
    (tmp_path / "best.pth").touch()
    message = refusal_of(lambda: load_checkpoint(tmp_path / name))
    assert message == f"there is no file {tmp_path / name} (did you mean {tmp_path / 'model.pth'}?)"


def test_a_path_without_a_readable_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is a folder, not a checkpoint file" in refusal_of(lambda: load_checkpoint(tmp_path))
    for name in ("state.pth", "last.pth", "best.pth"):  # of a run of finetune
        (tmp_path / name).touch()
    assert f"name the file in it: {tmp_path / 'best.pth'}" in refusal_of(lambda: load_checkpoint(tmp_path))
    assert refusal_of(lambda: load_checkpoint(tmp_path / "none.pth")) == f"there is no file {tmp_path / 'none.pth'}"
    assert "cannot be read" in refusal_of(lambda: load_checkpoint("nul\0.pth"))
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is not a regular file" in refusal_of(lambda: load_checkpoint(tmp_path / "pipe.pth"))
    torch.save(plain_state(), tmp_path / "vgg.pth")

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)
    assert "vgg.pth cannot be read: Permission denied" in refusal_of(lambda: load_checkpoint(tmp_path / "vgg.pth"))


def recursive_dict() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["state_dict"] = content
    return content


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ([torch.ones(2)], "contains a list, not a state dict; save one with torch.save(model.state_dict(), path)"),
        (torch.ones(2), "contains a Tensor, not a state dict"),
        ({}, "contains no tensors"),
        ({"state_dict": {}, "epoch": 3}, "has a dict under 'state_dict'"),
        ({"epoch": 3, "other": {"a": torch.ones(1)}}, "has an int under 'epoch', where a state dict has a tensor"),
        ({3: torch.ones(1)}, "has a key that is not a string, 3"),
        ({"state_dict": {("a", 1): torch.ones(1)}}, "has a key that is not a string, ('a', 1)"),
        (recursive_dict(), "has a dict under 'state_dict'"),
        ({"a": torch.eye(3).to_sparse()}, "has a tensor under 'a' that is not an ordinary dense tensor"),
        ({"a": torch.ones(3, device="meta")}, "has a tensor under 'a' that is not an ordinary dense tensor"),
        (
            {"features.0.weight": torch.ones(()).expand(10**6, 10**6)},
            "claims to contain 4,000,000,000,000 bytes of tensors",
        ),
        (
            {str(number): torch.ones(4000).expand(100, 4000) for number in range(100)},
            "claims to contain 160,000,000 bytes",
        ),
        ({"\x1b[2J": torch.ones(1)}, "this is not a VGG"),
    ],
)
def test_content_that_is_no_plain_state_dict_is_told(content: object, fragment: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    message = refusal_of(lambda: load_checkpoint(tmp_path / "odd.pth"))
    assert fragment in message
    assert "\x1b" not in message


def test_a_torchscript_program_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "program.pth", "w") as archive:
        for name in ("program/constants.pkl", "program/data.pkl", "program/version"):
            archive.writestr(name, b"3\n")
    assert "is a TorchScript program" in refusal_of(lambda: load_checkpoint(tmp_path / "program.pth"))


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(100, 10, 3, 3)}, tmp_path / "vgg.pth")
    with zipfile.ZipFile(tmp_path / "vgg.pth") as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    message = refusal_of(lambda: load_checkpoint(tmp_path / "bomb.pth"))
    assert "was refused: it claims to contain" in message
    assert "made to exhaust memory" in message


@pytest.mark.parametrize("name", ["tiny.pth", "tiny.safetensors", "old.pth"])
def test_a_damaged_file_loads_or_is_refused_and_nothing_else(name: str, tmp_path: Path) -> None:
    tiny = vgg_of(Spec((Conv(2, norm="before"),), (), pooled=1))
    for written in ("tiny.pth", "tiny.safetensors"):
        save_checkpoint(tiny, tmp_path / written)
    torch.save(torch.load(tmp_path / "tiny.pth"), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / name).read_bytes()
    generator = random.Random(name)
    outcomes = {"loads": 0, "refused": 0}
    for _ in range(60):
        damaged = bytearray(whole)
        if generator.random() < 0.3:
            del damaged[generator.randrange(len(damaged)) :]
        else:
            for _ in range(generator.choice([1, 1, 10])):
                damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        (tmp_path / name).write_bytes(damaged)
        try:
            load_checkpoint(tmp_path / name)
            outcomes["loads"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 10


def test_complex_weights_for_a_real_architecture_are_refused_and_not_cut(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2, 2, dtype=torch.complex64), "bias": torch.ones(2)}, tmp_path / "x.pth")
    message = refusal_of(lambda: load_checkpoint(tmp_path / "x.pth", model=nn.Linear(2, 2)))
    assert "weight is torch.complex64 in the file and torch.float32 in the model" in message


@pytest.mark.parametrize("name", ["network.pth", "network.safetensors"])
def test_a_loaded_network_holds_its_tensors_alone_and_the_file_may_change(name: str, tmp_path: Path) -> None:
    vgg = vgg_of(Spec((Conv(), Conv(), Conv())))
    save_checkpoint(vgg, tmp_path / name)
    loaded = load_checkpoint(tmp_path / name)
    with (tmp_path / name).open("r+b") as file:
        file.write(bytes((tmp_path / name).stat().st_size))
    state = loaded.state_dict()
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)
    assert all(value.is_contiguous() and torch.equal(value, vgg.state_dict()[key]) for key, value in state.items())


def test_a_mapped_network_reads_its_values_from_the_file_when_they_are_used_and_never_writes_there(
    tmp_path: Path,
) -> None:
    vgg = vgg_of(Spec((Conv(), Conv(), Conv())))
    save_checkpoint(vgg, tmp_path / "network.pth")
    loaded = load_checkpoint(tmp_path / "network.pth", mmap=True)
    assert all(torch.equal(value, vgg.state_dict()[key]) for key, value in loaded.state_dict().items())
    before = (tmp_path / "network.pth").read_bytes()
    with torch.no_grad():
        loaded.features[0].weight.zero_()
    assert (tmp_path / "network.pth").read_bytes() == before
    late = load_checkpoint(tmp_path / "network.pth", mmap=True)
    with (tmp_path / "network.pth").open("r+b") as file:
        file.write(bytes(len(before)))
    assert not any(parameter.any() for parameter in late.parameters())


def test_tensors_that_share_memory_in_the_file_do_not_in_the_network(tmp_path: Path) -> None:
    state = vgg_of(Spec((Conv(), Conv(), Conv()))).state_dict()
    shared = torch.rand(1000)
    for key, value in state.items():
        if key.endswith("bias"):
            state[key] = shared[: len(value)]
    torch.save(state, tmp_path / "network.pth")
    loaded = load_checkpoint(tmp_path / "network.pth").state_dict()
    assert len({value.untyped_storage().data_ptr() for value in loaded.values()}) == len(state)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in loaded.values())


def test_a_module_with_an_old_weight_norm_is_an_architecture_too(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()).eval()
    torch.save(model.state_dict(), tmp_path / "net.pth")
    x = torch.rand(2, 3, 8, 8)
    expected = model(x)  # the weight is now a tensor that was computed
    assert torch.equal(load_checkpoint(tmp_path / "net.pth", model=model)(x), expected)
