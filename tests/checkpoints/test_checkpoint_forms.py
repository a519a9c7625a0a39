"""The forms in which people have their checkpoints are read, or named with a way out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bn_insert import load_checkpoint
from support.checkpoint_forms import FORMS, outcome, state
from support.networks import images, small_vgg

# What the message names, for each form that is not loaded.
REFUSED = {
    "state dict, pickle protocol 4": "has a newer pickle protocol than PyTorch reads without running code",
    "under best_model": "name its key, as in key='best_model'; its keys are epoch (int), best_model (dict)",
    "under generator, with another key": "has no dict under the key 'g'; its keys are generator (dict)",
    "beside a function": "contains code or objects other than tensors (functools.partial)",
    "beside a module": "contains code or objects other than tensors (torch.nn.modules.activation.ReLU)",
    "whole module": "contains code or objects other than tensors (torchvision.models.vgg.VGG)",
    "TorchScript": "is a TorchScript program, not a state dict",
    "list of tensors": "contains a list, not a state dict",
    "one tensor": "contains a Tensor, not a state dict",
    "total_ops of a profiler": "the key 'total_ops' is not features.N or classifier.N with a tensor of a conv, dense "
    "or BatchNorm; for other architectures pass model, or leave out what does not belong to the network "
    "(ignore_unexpected=True)",
    "weights of the loss, with model": "loss_fn.weight is not in the model; pass the architecture that it was saved "
    "from, or leave these tensors out (ignore_unexpected=True)",
    "another network": "this is not a VGG in torchvision's layout",
    "the model lacks a layer": "classifier.6.weight is not in the file",
    "part 1 of 2": "is part 1 of 2 of a checkpoint; merge the parts into one file first",
    "index of parts": "is the index of a checkpoint in parts; merge the parts into one file first",
    "index of parts, torch": "is the index of a checkpoint in parts; merge the parts into one file first",
    ".npz": "is an .npz file of NumPy arrays; convert it",
    "plain pickle of NumPy arrays": "is a pickle that torch.save did not write",
    "plain pickle of numbers": "is a pickle that torch.save did not write",
    "float8": "classifier.0.weight is torch.float8_e4m3fn; weights must be float16, bfloat16, float32 or float64",
    "quantized dense layer": "the layer is quantized: save the network as it was before that",
    "ONNX": "it is perhaps an ONNX model; save the weights as a state dict",
    "torch.export program": "save its weights: torch.save(torch.export.load(path).state_dict, other_path)",
    "Keras model": "it is a Keras model; save the weights as a state dict",
    "zip archive of a checkpoint": "it is a zip archive with a checkpoint in it: unpack it first",
    "tar archive of a checkpoint": "it is a tar archive: unpack it first",
    "compressed with gzip": "it is compressed with gzip: unpack it first",
    "folder of Hugging Face's libraries": "name the file in it: network/model.safetensors",
    "folder of a distributed checkpoint (FSDP)": "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE",
    "HDF5": "it is an HDF5 file, as Keras writes",
    "Git LFS pointer": "it is a Git LFS pointer",
    "text": "it is a text file",
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


@pytest.mark.parametrize(
    "name", ["prefix timm_model.", "features.module.N (DataParallel around the features)", "under params_ema"]
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
