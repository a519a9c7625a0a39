"""The forms in which people have their checkpoints are read, or named with a way out."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

from bn_insert import CheckpointError, insert_batchnorm, load_checkpoint, save_checkpoint
from bn_insert.checkpoints.state_dict import without_prefix
from bn_insert.errors import messages_name_options
from support.checkpoint_forms import FORMS, outcome, state
from support.networks import images, small_vgg

# What the message names, for each form that is not loaded.
REFUSED = {
    "state dict, pickle protocol 4": "has a newer pickle protocol than PyTorch reads without running code",
    "prefix student. and prefix teacher.": "it has 2 networks, whose keys begin with student., teacher.; choose one: "
    "key='student' or key='teacher'",
    "prefix student. and prefix teacher., with model": "choose one: key='student' or key='teacher'",
    "prefix student. and prefix teacher., ignored": "choose one: key='student' or key='teacher'",
    "prefix student. and prefix teacher., under state_dict": "choose one: key='state_dict.student' or "
    "key='state_dict.teacher'",
    "prefix backbone., and another layer": "the key 'head.weight' does not begin with 'backbone.', as those of its VGG "
    "do; for other architectures pass model, or ignore tensors that do not belong",
    "two unknown levels: best in trainer": "name its key, as in key='trainer.best'",
    "two unknown levels: best in trainer, with half a key": "name its key, as in key='trainer.best'",
    "under best_model": "name its key, as in key='best_model'; its keys are epoch (int), best_model (dict)",
    "under generator, with another key": "has no dict under the key 'g'; its keys are generator (dict)",
    "beside a function": "contains code or objects other than tensors (functools.partial)",
    "beside a module": "contains code or objects other than tensors (torch.nn.modules.activation.ReLU)",
    "whole module": "contains code or objects other than tensors (torchvision.models.vgg.VGG)",
    "TorchScript": "is a TorchScript program, not a state dict",
    "list of tensors": "contains a list, not a state dict",
    "one tensor": "contains a Tensor, not a state dict",
    "total_ops of a profiler": "the key 'total_ops' is not features.N or classifier.N with a tensor of a conv, dense "
    "or BatchNorm; for other architectures pass model, or ignore tensors that do not belong to the network "
    "(ignore_unexpected=True)",
    "weights of the loss, with model": "loss_fn.weight is not in the model; pass the architecture that it was saved "
    "from, or leave these tensors out (ignore_unexpected=True)",
    "another network": "this is not a VGG in torchvision's layout",
    "the model lacks a layer": "classifier.6.weight is not in the file",
    "part 1 of 2": "is part 1 of 2 of a checkpoint, by its name (if it is a whole one, rename it); merge the parts",
    "part 1 of 2, with index": "is one of 2 parts of a checkpoint, listed in model.safetensors.index.json; merge",
    "part 1 of 2, torch": "is part 1 of 2 of a checkpoint",
    "part 1 of 2, the other absent": "put the other part beside it, and merge the parts",
    "part 1 of 2, short numbers": "is part 1 of 2 of a checkpoint",
    "part 1 of 2, upper case": "is part 1 of 2 of a checkpoint",
    "part 1 of 2, precision in the name": "is part 1 of 2 of a checkpoint",
    "part 1 of 2, precision in the names, with index": "listed in model.safetensors.index.fp16.json",
    "part under another name, with index": "listed in model.safetensors.index.json",
    "part under another name, with index, the other absent": "put part2.safetensors beside it, and merge the parts",
    "index of parts": "is the index of a checkpoint in parts; merge the parts into one file",
    "index of parts, torch": "is the index of a checkpoint in parts; merge the parts into one file",
    "index of one file": "is the index of a checkpoint; name the file in it: model-00001-of-00001.safetensors",
    "NumPy arrays": "has a NumPy array under 'features.0.weight', where a state dict has a tensor; convert the arrays",
    "NumPy arrays under state_dict": "has a NumPy array under 'features.0.weight'",
    "NumPy scalar in the state dict": "has a NumPy scalar under 'accuracy', where a state dict has a tensor; leave it",
    "epoch in the state dict": "has an int under 'epoch', where a state dict has a tensor; leave it out",
    ".npz": "is an .npz file of NumPy arrays; convert it",
    "plain pickle of NumPy arrays": "is a pickle that torch.save did not write",
    "plain pickle of a whole module": "is a pickle of a whole torchvision.models.vgg.VGG that torch.save did not write",
    "plain pickle of numbers": "is a pickle that torch.save did not write",
    "float8": "classifier.0.weight is torch.float8_e4m3fn; weights must be float16, bfloat16, float32 or float64",
    "quantized dense layer": "the layer is quantized: save the network as it was before that",
    "ONNX": "it is perhaps an ONNX model; save the weights as a state dict",
    "torch.export program": "save its weights: torch.save(torch.export.load(path).state_dict, other_path)",
    "Keras model": "it is a Keras model; save the weights as a state dict",
    "zip archive of a checkpoint": "it is a zip archive with a checkpoint in it: unpack it first",
    "zip archive": "it is a zip archive without one in it; pass the file of a checkpoint",
    "tar archive of a checkpoint": "it is a tar archive: unpack it first",
    "compressed with gzip": "it is compressed with gzip: unpack it first",
    "folder of Hugging Face's libraries": "name the file in it: network/model.safetensors",
    "folder of a distributed checkpoint (FSDP)": "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE",
    "HDF5": "it is an HDF5 file, as Keras writes",
    "Git LFS pointer": "it is a Git LFS pointer",
    "web page": "it is a web page, which servers send instead of a file",
    "text": "it is a text file",
    "zeros": "it begins with zeros, as after an interrupted download",
    "empty": "it is empty",
    "folder": "is a folder, not a checkpoint file",
    "truncated": "is incomplete: it ends before its zip directory",
    "absent": "there is no file",
}


@pytest.mark.filterwarnings("ignore:reading '(model|state_dict)'")  # those with moving averages besides
@pytest.mark.filterwarnings("ignore:ignoring . tensors? of")
@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_loaded_or_named_with_a_way_out(name: str, tmp_path: Path) -> None:
    found = outcome(name, tmp_path)
    assert REFUSED[name] in found if name in REFUSED else found == "loaded"


# Of the messages that contain the way out as code, those by which a file is converted.
CONVERTED = (
    *("state dict, pickle protocol 4", "TorchScript", "NumPy arrays", "NumPy arrays under state_dict", ".npz"),
    *("NumPy scalar in the state dict", "epoch in the state dict", "plain pickle of NumPy arrays"),
    "plain pickle of a whole module",
)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore:.torch.jit.load. is deprecated")
@pytest.mark.parametrize("name", CONVERTED)
def test_the_code_in_a_message_makes_a_checkpoint_of_the_file(name: str, tmp_path: Path) -> None:
    message = outcome(name, tmp_path)
    code = re.findall(r"torch\.save\((?!model\.).*?, other_path\)", message)
    other = tmp_path / "other.pth"
    exec(
        code[0],
        {"torch": torch, "numpy": numpy, "pickle": pickle, "path": tmp_path / FORMS[name].name, "other_path": other},
    )
    x = images(2, 16)
    assert torch.equal(load_checkpoint(other)(x), small_vgg()(x))


PARTS = [name for name in FORMS if name.startswith("part") and name in REFUSED and "absent" not in name]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("name", PARTS)
def test_the_code_in_a_message_makes_one_file_of_parts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = outcome(name, tmp_path).partition(", in Python: ")[2]
    before = set(tmp_path.iterdir())
    exec(code, {})
    (merged,) = set(tmp_path.iterdir()) - before
    x = images(2, 16)
    assert torch.equal(load_checkpoint(merged)(x), small_vgg()(x))


@pytest.mark.parametrize("folder", ["[a]", "it's", "a b"])
def test_the_code_that_merges_parts_finds_them_in_any_folder_and_no_others(folder: str, tmp_path: Path) -> None:
    path = tmp_path / folder / "model[a]-part-1-of-2.safetensors"
    path.parent.mkdir()
    FORMS["part 1 of 2, short numbers"].write(path)
    for other in ("model[a]-part-1-of-3", "model[a]-old-part-1-of-2", "modela-part-1-of-2"):
        path.with_name(f"{other}.safetensors").write_text("not read")
    with pytest.raises(CheckpointError, match="is part 1 of 2 of a checkpoint") as refusal:
        load_checkpoint(path)
    exec(str(refusal.value).partition(", in Python: ")[2], {})
    assert load_checkpoint(path.with_name("model[a]-part-merged.safetensors")).state_dict().keys() == state().keys()


def test_the_code_that_merges_parts_refuses_whole_networks(tmp_path: Path) -> None:
    for number in (1, 2):
        torch.save(state(), tmp_path / f"shard-{number}-of-2.pth")
    with pytest.raises(CheckpointError, match="is part 1 of 2 of a checkpoint") as refusal:
        load_checkpoint(tmp_path / "shard-1-of-2.pth")
    with pytest.raises(AssertionError, match="the files have keys in common, so they are not parts"):
        exec(str(refusal.value).partition(", in Python: ")[2], {})
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "name",
    [
        *("model.00001-of-00002.ckpt", "00001-of-00002.bin", "PYTORCH_MODEL-00001-OF-00002", "a-00000-of-00002.pth"),
        *("part1of2.pt", "model_part_01_of_02.pth", "vgg16.Shard-1-of-2.bin", "Model Part 1 of 2.pth"),
    ],
)
def test_a_part_alone_is_never_taken_for_a_shorter_network(name: str, tmp_path: Path) -> None:
    torch.save(dict(list(state().items())[:4]), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"is part \d of 2 of a checkpoint, .*put the other part beside it"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "name",
    [
        *("epoch_3_of_10.pth", "vgg-fold1of5.pth", "run 2 of 3.pth", "best-of-5.pth", "model-7-of-5.pth"),
        *("v1-of-1.pth", "kfold-1-of-5.pth", "client_1_of_10.pth", "ckpt_30of90.pth", "iteration_500_of_1000.pth"),
        *("epochs_30_of_90.pth", "vgg16_of_20_classes.pth", "cifar10of100.pth", "vgg-1-of-2.pth", "10-of-10.pth"),
        *("department_1_of_3.pth", "part-1-of-1.pth", "step-000500-of-001000.pth", "model-00003-of-00002.pth"),
    ],
)
def test_a_whole_network_that_is_counted_among_others_is_read(name: str, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / name)
    load_checkpoint(tmp_path / name)


def _write_two(folder: Path, name: str, *contents: dict[str, Any]) -> None:
    for number, content in enumerate(contents, start=1):
        write = safetensors.torch.save_file if name.endswith(".safetensors") else torch.save
        write(content, folder / name.format(number))


@pytest.mark.parametrize("name", ["model-{}-of-2.pth", "vgg_{}_of_2.safetensors", "{}of2.bin"])
def test_a_part_under_any_number_is_known_by_another_with_other_keys(name: str, tmp_path: Path) -> None:
    tensors = list(state().items())
    parts = [dict(tensors[:4]), dict(tensors[4:])]
    _write_two(tmp_path, name, *parts)
    for number in (1, 2):
        refusal = rf"is part {number} of 2 .* by its name and {name.format(3 - number)} beside it, which has other keys"
        with pytest.raises(CheckpointError, match=refusal):
            load_checkpoint(tmp_path / name.format(number))


def test_the_code_that_merges_parts_merges_those_known_by_their_keys(tmp_path: Path) -> None:
    tensors = list(state().items())
    _write_two(tmp_path, "model-{}-of-2.pth", dict(tensors[:4]), dict(tensors[4:]))
    with pytest.raises(CheckpointError, match="is part 1 of 2 of a checkpoint") as refusal:
        load_checkpoint(tmp_path / "model-1-of-2.pth")
    exec(str(refusal.value).partition(", in Python: ")[2], {})
    assert load_checkpoint(tmp_path / "model-merged.pth").state_dict().keys() == state().keys()


@pytest.mark.parametrize(
    "other",
    [
        state(),
        {"model": state(), "model_ema": state()},
        {"optimizer": "none"},
        {f"module.{name}": tensor for name, tensor in state().items()},
    ],
)
def test_whole_networks_counted_side_by_side_are_read(other: dict[str, Any], tmp_path: Path) -> None:
    _write_two(tmp_path, "client_{}_of_2.pth", state(), other)
    load_checkpoint(tmp_path / "client_1_of_2.pth")


@pytest.mark.parametrize("name", ["part-1-of-2.pth", "vgg-00001-of-00002.safetensors"])
def test_what_bn_insert_saved_is_whole_under_any_name(name: str, tmp_path: Path) -> None:
    save_checkpoint(small_vgg(), tmp_path / name)
    load_checkpoint(tmp_path / name)


def test_only_an_index_that_has_the_name_of_the_file_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    monkeypatch.setattr("bn_insert.checkpoints.parts.json.loads", parsed.append)
    for name in ("vgg.pth", "größe.pth"):
        torch.save(state(), tmp_path / name)
    texts = [json.dumps({"weight_map": {"a": name}}) for name in ("other.pth", "größe.pth")]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.pth.index.json").write_text(text)
    for name in ("vgg.pth", "größe.pth"):
        load_checkpoint(tmp_path / name)
    assert parsed == [texts[1].encode()]


def test_an_index_that_is_too_large_is_passed_over(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "vgg.pth")
    text = json.dumps({"weight_map": {"a": "vgg.pth", "b": "other.pth"}})
    (tmp_path / "vgg.pth.index.json").write_text(text + " " * (1 << 22))
    load_checkpoint(tmp_path / "vgg.pth")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        "[" * 10**5,
        '{"weight_map": {"a": "\\u0000"}}',
    ],
)
def test_an_index_that_lists_nothing_is_passed_over(text: str, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "model.pth")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    load_checkpoint(tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"index\.json is"):
        load_checkpoint(tmp_path / "model.safetensors.index.json")


def test_a_part_that_does_not_exist_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        load_checkpoint(tmp_path / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        {"a": {"b": state()}},
        {"a": {"b": {"c": state()}}, "epoch": 3},
        {"model": {"epoch": 3, "b": state()}},
        {"best_accuracy": torch.tensor(0.7), "best.pth": {"net.0": state()}},
        {"config": {"model": {"depth": 16}}, "my net": state(), "optimizer": {"state": {"m": {"x": torch.ones(1)}}}},
        {"a": {"state_dict": {f"{name}.{key}": value for name in "bc" for key, value in state().items()}}},
    ],
)
@pytest.mark.parametrize("key", [None, "a", "b", "model"])
@pytest.mark.filterwarnings("error")
def test_the_key_in_a_message_leads_to_the_network(content: dict[str, Any], key: str | None, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    loaded = None
    for _ in range(3):
        try:
            loaded = load_checkpoint(tmp_path / "a.pth", key=key)
        except CheckpointError as error:
            key = re.findall(r"key='(.*?)'", str(error))[-1]
    x = images(2, 16)
    assert loaded is not None
    assert torch.equal(loaded(x), small_vgg()(x))


def test_a_state_dict_is_found_inside_at_most_four_dicts(tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": {"b": {"c": {"d": state()}}}}
    for way_out in ("name its key, as in key='a.b.c.d'", r"save the weights as a state dict"):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=way_out):
            load_checkpoint(tmp_path / "a.pth")
        content = {"e": content}
    load_checkpoint(tmp_path / "a.pth", key="e.a.b.c.d")


def test_dicts_that_contain_each_other_many_times_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bn_insert.checkpoints.state_dict._MAX_ENTRIES", 5000)  # all of them take seconds
    content: dict[str, Any] = {}
    content |= {f"{number}": content for number in range(1000)}
    torch.save({"state_dict": content}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="has a dict under 'state_dict', where a state dict has a tensor"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(("names", "is_removed"), [(1, True), (10, True), (1000, False)])
def test_a_prefix_longer_than_that_of_any_file_is_left(names: int, is_removed: bool) -> None:
    tensors = {"model." * names + "0.weight": torch.ones(1)}
    wanted = {"0.weight": torch.ones(2)}
    assert ("0.weight" in without_prefix(tensors, wanted)[1]) == is_removed


def test_the_key_in_a_message_is_quoted_for_the_shell(tmp_path: Path) -> None:
    torch.save({"my net": state()}, tmp_path / "a.pth")
    with messages_name_options(), pytest.raises(CheckpointError, match="as in --key 'my net';"):
        load_checkpoint(tmp_path / "a.pth")


def test_the_warning_of_moving_averages_names_the_key_that_leads_to_them(tmp_path: Path) -> None:
    averaged = {key: torch.zeros_like(value) for key, value in state().items()}
    torch.save({"model": {"state_dict": state(), "ema": averaged}}, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="which also has 'ema'; to read that instead, pass key='model.ema'"):
        load_checkpoint(tmp_path / "a.pth")
    assert not load_checkpoint(tmp_path / "a.pth", key="model.ema").features[0].weight.any()


def test_a_dict_without_tensors_under_a_common_key_is_passed_over(tmp_path: Path) -> None:
    torch.save({"net": {"config": {"depth": 16}}, "weights": state()}, tmp_path / "a.pth")
    load_checkpoint(tmp_path / "a.pth")


def two_networks() -> nn.Module:
    """Return a module with two VGGs, whose BatchNorms differ in eps."""
    both = nn.ModuleDict()
    for number, name in enumerate(("student", "teacher"), start=1):
        both[name] = insert_batchnorm(small_vgg(), [images(4, 16)])
        for norm in both[name].modules():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                norm.eps = number * 1e-3
    return both


@pytest.mark.parametrize("name", ["both.pth", "both.safetensors"])
def test_one_of_two_networks_is_read_with_its_own_settings(name: str, tmp_path: Path) -> None:
    both = two_networks()
    save_checkpoint(both, tmp_path / name)
    x = images(2, 16)
    for key in ("student", "teacher"):
        assert torch.equal(load_checkpoint(tmp_path / name, key=key)(x), both[key](x))
        with_model = load_checkpoint(tmp_path / name, key=key, model=both[key])
        assert torch.equal(with_model(x), both[key](x))


@pytest.mark.parametrize("options", [{}, {"ignore_unexpected": True}, {"model": small_vgg, "ignore_unexpected": True}])
def test_of_several_networks_none_is_guessed(options: dict[str, Any], tmp_path: Path) -> None:
    tensors = {f"net.encoder_{name}.{key}": value for name in "kq" for key, value in state().items()}
    torch.save(tensors | {"net.queue": torch.ones(3)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"choose one: key='net\.encoder_k' or key='net\.encoder_q'$"):
        load_checkpoint(tmp_path / "a.pth", **options)
    for key in ("net.encoder_q", "net.encoder_q."):
        assert load_checkpoint(tmp_path / "a.pth", key=key).state_dict().keys() == state().keys()


def test_of_several_networks_the_one_with_the_shapes_of_the_architecture_is_read(tmp_path: Path) -> None:
    other = {key: torch.zeros(1, *value.shape) for key, value in state().items()}
    tensors = {f"{name}.{key}": value for name, part in (("a", other), ("b", state())) for key, value in part.items()}
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="ignoring 10 tensors"):
        loaded = load_checkpoint(tmp_path / "a.pth", model=small_vgg, ignore_unexpected=True)
    assert torch.equal(loaded.features[0].weight, small_vgg().features[0].weight)


def test_a_network_at_the_top_is_read_where_what_is_beside_it_is_ignored(tmp_path: Path) -> None:
    averaged = {f"ema.module.{key}": torch.zeros_like(value) for key, value in state().items()}
    torch.save(averaged | state(), tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="ignoring 10 tensors"):
        loaded = load_checkpoint(tmp_path / "a.pth", ignore_unexpected=True)
    assert loaded.features[0].weight.any()
    assert not load_checkpoint(tmp_path / "a.pth", key="ema").features[0].weight.any()


def test_a_name_with_npy_in_it_is_no_array(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "weights.npy.pth")
    load_checkpoint(tmp_path / "weights.npy.pth")


@pytest.mark.parametrize(
    "name",
    ["prefix timm_model.", "prefix 0.", "features.module.N (DataParallel around the features)", "under params_ema"],
)
def test_the_network_of_each_form_has_the_weights_of_the_file(name: str, tmp_path: Path) -> None:
    FORMS[name].write(tmp_path / "a.pth")
    loaded, x = load_checkpoint(tmp_path / "a.pth"), images(2, 16)
    assert torch.equal(loaded(x), small_vgg()(x))
    assert loaded.state_dict().keys() == state().keys()


@pytest.mark.parametrize("model", [None, small_vgg])
@pytest.mark.parametrize(
    ("prefix", "other"),
    [
        ("model.", "loss_fn.weight"),
        ("module.", "total_ops"),
        ("module.", "module.features.0.total_ops"),
        ("net.", "train_acc.tp"),
        ("model.backbone.", "model.loss.weight"),
        ("", "loss_fn.weight"),
    ],
)
def test_tensors_without_the_prefix_of_the_network_can_be_ignored(
    tmp_path: Path, prefix: str, other: str, model: Callable[[], nn.Module] | None
) -> None:
    torch.save({other: torch.zeros(2)} | {prefix + key: value for key, value in state().items()}, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match=f"ignoring 1 tensor of .*a.pth: {other.removeprefix(prefix)}$"):
        loaded = load_checkpoint(tmp_path / "a.pth", model=model, ignore_unexpected=True)
    x = images(2, 16)
    assert torch.equal(loaded(x), small_vgg()(x))


def test_a_layer_whose_keys_are_spelled_wrong_is_named_among_the_ignored_tensors(tmp_path: Path) -> None:
    layer = {"featurez.5.weight": torch.zeros(12, 12, 3, 3), "featurez.5.bias": torch.zeros(12)}
    torch.save(state() | layer, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match=r"ignoring 2 tensors of .*a.pth: featurez.5.weight, featurez.5.bias"):
        load_checkpoint(tmp_path / "a.pth", ignore_unexpected=True)


def test_harmless_objects_beside_the_weights_are_not_made(tmp_path: Path) -> None:
    class Recorded:
        def __reduce__(self) -> tuple[object, ...]:
            import pathlib  # noqa: PLC0415

            return pathlib.PosixPath, ("/etc", ["anything", {"deep": 1}])

    torch.save({"model": state(), "args": Recorded()}, tmp_path / "a.pth")
    load_checkpoint(tmp_path / "a.pth")  # PosixPath itself would raise a TypeError


def test_two_keys_that_would_become_one_are_refused(tmp_path: Path) -> None:
    tensors = small_vgg().state_dict()
    tensors["features.module.0.weight"] = torch.zeros_like(tensors["features.0.weight"])
    torch.save(tensors, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"features\.module\.0\.weight"):
        load_checkpoint(tmp_path / "net.pth")


def test_a_state_dict_behind_a_large_dict_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bn_insert.checkpoints.state_dict._MAX_ENTRIES", 500)  # as many as there are take seconds
    torch.save({"index": dict.fromkeys(range(501), 0), "state_dict": small_vgg().state_dict()}, tmp_path / "net.pth")
    assert torch.equal(load_checkpoint(tmp_path / "net.pth")(images(2, 16)), small_vgg()(images(2, 16)))


def test_a_shared_parameter_may_have_two_dtypes_in_a_file(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        network[1].weight = network[0].weight
        return network

    torch.save({"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2).half()}, tmp_path / "net.pth")
    assert load_checkpoint(tmp_path / "net.pth", model=tied)[1].weight.tolist() == [[1, 1], [1, 1]]  # type: ignore[index]
