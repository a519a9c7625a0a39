"""Forms in which people have their checkpoints, each written small.

`python -m benchmarks.checkpoint_forms` prints what becomes of each.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import pathlib
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .networks import small_vgg


@dataclass(frozen=True)
class Form:
    """A form of checkpoint: a function that writes it to a path, the file's name, and arguments of load_checkpoint."""

    write: Callable[[Path], object]
    name: str = "network.pth"
    options: Mapping[str, Any] = field(default_factory=dict)


class OwnLoading(nn.Module):
    """An architecture whose load_state_dict has other parameters than PyTorch's and returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_vgg()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def load_state_dict(self, state_dict: Any) -> None:  # type: ignore[override]
        super().load_state_dict(state_dict)


def state() -> dict[str, Tensor]:
    return dict(small_vgg().state_dict())


def _saved(content: Callable[[], Any], **options: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(content(), path, **options)


def _prefixed(prefix: str) -> Form:
    return Form(_saved(lambda: {prefix + key: value for key, value in state().items()}))


def _wrapped(key: str) -> Form:
    return Form(_saved(lambda: {"epoch": 3, key: state()}))


def _beside(value: Any) -> Form:
    return Form(_saved(lambda: {"model": state(), "args": value}))


def _parallel_features() -> dict[str, Tensor]:
    return {key.replace("features.", "features.module."): value for key, value in state().items()}


def _training_state() -> dict[str, Any]:
    model = small_vgg()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.zeros(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(data_path=pathlib.PurePosixPath("/data"), lr=0.1, model="vgg16"),
        "scaler": {"scale": 65536.0, "growth_tracker": 0},
    }


def _lightning() -> dict[str, Any]:
    return {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {f"model.{key}": value for key, value in state().items()},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "dirpath": "/runs"}},
        "hyper_parameters": {"lr": np.float64(0.1), "root": pathlib.PurePosixPath("/data")},
    }


def _with_ema() -> dict[str, Any]:
    return _training_state() | {"model_ema": AveragedModel(small_vgg()).state_dict()}


def _imagenet_example() -> dict[str, Any]:
    best = {"best_acc1": torch.tensor(70.0), "optimizer": {"state": {}, "param_groups": []}}
    return {"epoch": 9, "arch": "vgg16", "state_dict": _parallel_features()} | best


def _timm() -> dict[str, Any]:
    training: dict[str, Any] = {"optimizer": {}, "version": 2, "args": argparse.Namespace(lr=0.1), "metric": 70.0}
    ema = {"state_dict_ema": state(), "amp_scaler": {"scale": 65536.0}}
    return {"epoch": 9, "arch": "vgg16", "state_dict": state()} | training | ema


def _deepspeed() -> dict[str, Any]:
    other: dict[str, Any] = {"buffer_names": [], "optimizer": None, "ds_version": "0.14.0", "ds_config": {"zero": {}}}
    return {"module": state()} | other


def _mmengine() -> dict[str, Any]:
    tensors = {f"backbone.{key}": value for key, value in state().items()}
    return {"meta": {"epoch": 9, "time": "2024"}, "state_dict": tensors, "message_hub": {"log_scalars": {}}}


def _quantized() -> dict[str, Any]:
    """What torch.ao's dynamic quantization makes of a dense layer, without its packed weights."""
    kept = {key: value for key, value in state().items() if "classifier.0" not in key}
    return kept | {"classifier.0.scale": _ZERO, "classifier.0._packed_params.dtype": torch.qint8}


def _zip_of(*members: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for member in members:
                archive.writestr(member, "x")

    return write


def _tar(path: Path) -> None:
    torch.save(state(), path.with_name("inner.pth"))
    with tarfile.open(path, "w") as archive:
        archive.add(path.with_name("inner.pth"), "network.pth")


def _folder_of(*names: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.mkdir()
        for name in names:
            path.joinpath(name).write_text("{}")

    return write


def _pickled(content: Callable[[], Any]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(pickle.dumps(content()))


def _npz(path: Path) -> None:
    np.savez(path.open("wb"), **_arrays())


def _traced(path: Path) -> None:
    torch.jit.trace(small_vgg(), torch.zeros(1, 3, 16, 16)).save(path)


def _arrays() -> dict[str, Any]:
    return {key: value.numpy() for key, value in state().items()}


def _student_and_teacher() -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name in ("student", "teacher") for key, value in state().items()}


def _with(**extra: Tensor) -> dict[str, Tensor]:
    return state() | {key.replace("__", "."): value for key, value in extra.items()}


def _in_parts(index: str = "", *, absent: bool = False) -> Callable[[Path], object]:
    """Write the first four tensors, which are those of a shorter VGG, and beside them the others."""

    def write(path: Path) -> None:
        tensors = list(state().items())
        other = path.with_name(path.name.replace("1", "2", 1))
        write_part = torch.save if path.suffix == ".bin" else safetensors.torch.save_file
        parts = {path: dict(tensors[:4]), other: dict(tensors[4:])}
        for each, part in parts.items():
            if each == path or not absent:
                write_part(part, each)
        if index:
            files = {key: each.name for each, part in parts.items() for key in part}
            path.with_name(index).write_text(json.dumps({"metadata": {}, "weight_map": files}))

    return write


def _index(*files: str) -> Callable[[Path], object]:
    """Write an index of these files, and the files."""

    def write(path: Path) -> None:
        for file in files:
            path.with_name(file).touch()
        path.write_text(
            json.dumps({"weight_map": {f"features.{number}.weight": file for number, file in enumerate(files)}})
        )

    return write


_ZERO = torch.zeros(1)
_IGNORE = {"ignore_unexpected": True}

FORMS: Mapping[str, Form] = {
    "state dict": Form(_saved(state)),
    "state dict, OrderedDict with metadata": Form(_saved(lambda: small_vgg().state_dict())),
    "state dict, format before PyTorch 1.6": Form(_saved(state, _use_new_zipfile_serialization=False)),
    "state dict, pickle protocol 4": Form(_saved(state, pickle_protocol=4)),
    "state dict, suffix .bin": Form(_saved(state), "pytorch_model.bin"),
    "state dict, suffix .pkl": Form(_saved(state), "network.pkl"),
    "state dict of parameters": Form(_saved(lambda: OrderedDict(small_vgg().named_parameters()))),
    "safetensors": Form(lambda path: safetensors.torch.save_file(state(), path), "network.safetensors"),
    "safetensors named .pth": Form(lambda path: safetensors.torch.save_file(state(), path)),
    "float16": Form(_saved(lambda: {key: value.half() for key, value in state().items()})),
    "bfloat16": Form(_saved(lambda: {key: value.bfloat16() for key, value in state().items()})),
    **{
        f"prefix {prefix}": _prefixed(prefix)
        for prefix in (
            *("module.", "model.", "_orig_mod.", "module._orig_mod.", "net.", "backbone.", "vgg.", "encoder."),
            *("timm_model.", "model.backbone.", "network.", "module.vgg.", "vgg16.", "feature_extractor."),
            *("_forward_module.", "_orig_mod.module.", "student.", "teacher.", "0."),
        )
    },
    "prefix student. and prefix teacher.": Form(_saved(_student_and_teacher)),
    "prefix student. and prefix teacher., with key": Form(_saved(_student_and_teacher), options={"key": "teacher"}),
    "prefix student. and prefix teacher., with model": Form(_saved(_student_and_teacher), options={"model": small_vgg}),
    "prefix student. and prefix teacher., ignored": Form(_saved(_student_and_teacher), options=_IGNORE),
    "prefix student. and prefix teacher., under state_dict": Form(
        _saved(lambda: {"state_dict": _student_and_teacher()})
    ),
    "prefix backbone., and another layer": Form(
        _saved(lambda: {f"backbone.{key}": value for key, value in state().items()} | {"head.weight": _ZERO})
    ),
    "features.module.N (DataParallel around the features)": Form(_saved(_parallel_features)),
    "AveragedModel": Form(_saved(lambda: AveragedModel(small_vgg()).state_dict())),
    **{
        f"under {key}": _wrapped(key)
        for key in (
            *("state_dict", "model", "model_state_dict", "model_ema", "state_dict_ema", "net", "params"),
            *("params_ema", "weights", "ema", "network"),
        )
    },
    "under best_model": _wrapped("best_model"),
    "under best_model, with key": Form(_saved(lambda: {"best_model": state()}), options={"key": "best_model"}),
    "under generator, with another key": Form(_saved(lambda: {"generator": state()}), options={"key": "g"}),
    "two levels: state_dict in model": Form(_saved(lambda: {"model": {"state_dict": state()}})),
    "two unknown levels: best in trainer": Form(_saved(lambda: {"trainer": {"epoch": 3, "best": state()}})),
    "two unknown levels: best in trainer, with key": Form(
        _saved(lambda: {"trainer": {"epoch": 3, "best": state()}}), options={"key": "trainer.best"}
    ),
    "two unknown levels: best in trainer, with half a key": Form(
        _saved(lambda: {"trainer": {"epoch": 3, "best": state()}}), options={"key": "best"}
    ),
    "beside argparse.Namespace": _beside(argparse.Namespace(lr=0.1, layers=[1, 2])),
    "beside a path": _beside(pathlib.PurePosixPath("/data/train")),
    "beside a NumPy number": _beside(np.float64(0.75)),
    "beside a NumPy array": _beside(np.arange(3.0)),
    "beside a range": _beside(range(5)),
    "beside a frozenset": _beside(frozenset({"a"})),
    "beside a datetime": _beside(datetime.datetime(2024, 5, 1, 12, 0)),
    "beside a timedelta": _beside(datetime.timedelta(hours=3)),
    "beside a function": _beside(partial(print, "x")),
    "beside a module": _beside(nn.ReLU()),
    "training state of torchvision's references": Form(_saved(_training_state)),
    "training state of torchvision's references, with EMA": Form(_saved(_with_ema)),
    "training state of Lightning": Form(_saved(_lightning)),
    "training state of PyTorch's ImageNet example, .pth.tar": Form(_saved(_imagenet_example), "model_best.pth.tar"),
    "training state of timm, with EMA": Form(_saved(_timm)),
    "training state of DeepSpeed": Form(_saved(_deepspeed), "mp_rank_00_model_states.pt"),
    "training state of MMEngine": Form(_saved(_mmengine)),
    "float8": Form(_saved(lambda: {key: value.to(torch.float8_e4m3fn) for key, value in state().items()})),
    "quantized dense layer": Form(_saved(_quantized)),
    "whole module": Form(_saved(small_vgg)),
    "TorchScript": Form(_traced, "network.pt"),
    "list of tensors": Form(_saved(lambda: list(state().values()))),
    "one tensor": Form(_saved(lambda: _ZERO)),
    "total_ops of a profiler": Form(_saved(lambda: _with(total_ops=_ZERO, features__0__total_ops=_ZERO))),
    "total_ops of a profiler, ignored": Form(
        _saved(lambda: _with(total_ops=_ZERO, features__0__total_ops=_ZERO)), options=_IGNORE
    ),
    "weights of the loss, with model": Form(_saved(lambda: _with(loss_fn__weight=_ZERO)), options={"model": small_vgg}),
    "weights of the loss, ignored, with model": Form(
        _saved(lambda: _with(loss_fn__weight=_ZERO)), options={"model": small_vgg} | _IGNORE
    ),
    "another network": Form(_saved(lambda: dict(nn.Sequential(nn.Conv2d(3, 8, 3)).state_dict()))),
    "prefix net., with model": Form(
        _saved(lambda: {f"net.{key}": value for key, value in state().items()}), options={"model": small_vgg}
    ),
    "prefix that the model itself has": Form(_saved(lambda: OwnLoading().state_dict()), options={"model": OwnLoading}),
    "the model lacks a layer": Form(
        _saved(lambda: {key: value for key, value in state().items() if "6" not in key}), options={"model": small_vgg}
    ),
    "part 1 of 2": Form(_in_parts(), "model-00001-of-00002.safetensors"),
    "part 1 of 2, with index": Form(_in_parts("model.safetensors.index.json"), "model-00001-of-00002.safetensors"),
    "part 1 of 2, torch": Form(_in_parts(), "pytorch_model-00001-of-00002.bin"),
    "part 1 of 2, the other absent": Form(_in_parts(absent=True), "model-00001-of-00002.safetensors"),
    "part 1 of 2, short numbers": Form(_in_parts(), "model-part-1-of-2.safetensors"),
    "part 1 of 2, upper case": Form(_in_parts(), "MODEL-00001-OF-00002.SAFETENSORS"),
    "part 1 of 2, precision in the name": Form(_in_parts(), "model-00001-of-00002.fp16.safetensors"),
    "part 1 of 2, precision in the names, with index": Form(
        _in_parts("model.safetensors.index.fp16.json"), "model-00001-of-00002.fp16.safetensors"
    ),
    "part under another name, with index": Form(_in_parts("model.safetensors.index.json"), "part1.safetensors"),
    "part under another name, with index, the other absent": Form(
        _in_parts("model.safetensors.index.json", absent=True), "part1.safetensors"
    ),
    "part 1 of 1": Form(lambda path: safetensors.torch.save_file(state(), path), "model-00001-of-00001.safetensors"),
    "fold 1 of 5": Form(_saved(state), "fold-1-of-5.pth"),
    "index of parts": Form(_index("model-1.safetensors", "model-2.safetensors"), "model.safetensors.index.json"),
    "index of parts, torch": Form(_index("pytorch_model-1.bin", "pytorch_model-2.bin"), "pytorch_model.bin.index.json"),
    "index of one file": Form(_index("model-00001-of-00001.safetensors"), "model.safetensors.index.json"),
    "NumPy arrays": Form(_saved(_arrays)),
    "NumPy arrays under state_dict": Form(_saved(lambda: {"epoch": 3, "state_dict": _arrays()})),
    "NumPy scalar in the state dict": Form(_saved(lambda: state() | {"accuracy": np.float32(0.5)})),
    "epoch in the state dict": Form(_saved(lambda: state() | {"epoch": 3})),
    ".npz": Form(_npz, "network.npz"),
    "plain pickle of NumPy arrays": Form(_pickled(_arrays)),
    "plain pickle of a whole module": Form(_pickled(small_vgg)),
    "plain pickle of numbers": Form(_pickled(lambda: {"a": 1})),
    "HDF5": Form(lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64)), "network.h5"),
    "ONNX": Form(lambda path: path.write_bytes(b"\x08\x07\x12\x07pytorch\x1a\x052.0.0"), "network.onnx"),
    "torch.export program": Form(_zip_of("network/data/weights/weight_0", "network/models/model.json"), "network.pt2"),
    "Keras model": Form(_zip_of("metadata.json", "config.json", "model.weights.h5"), "network.keras"),
    "zip archive of a checkpoint": Form(_zip_of("network.pth"), "network.zip"),
    "zip archive": Form(_zip_of("photographs/1.png"), "photographs.zip"),
    "tar archive of a checkpoint": Form(_tar, "network.tar"),
    "compressed with gzip": Form(lambda path: path.write_bytes(gzip.compress(bytes(64))), "network.pth.gz"),
    "folder of Hugging Face's libraries": Form(_folder_of("config.json", "model.safetensors"), "network"),
    "folder of a distributed checkpoint (FSDP)": Form(_folder_of(".metadata", "__0_0.distcp"), "network"),
    "Git LFS pointer": Form(lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid x\n")),
    "web page": Form(lambda path: path.write_text("<!DOCTYPE html>\n<html><title>Größe der Datei</title></html>")),
    "text": Form(lambda path: path.write_text("Access denied: invalid token.")),
    "zeros": Form(lambda path: path.write_bytes(bytes(1000))),
    "empty": Form(lambda path: path.write_bytes(b"")),
    "folder": Form(lambda path: path.mkdir()),
    "truncated": Form(lambda path: (torch.save(state(), path), path.write_bytes(path.read_bytes()[:-4000]))),
    "absent": Form(lambda path: path),
}


def outcome(name: str, folder: Path) -> str:
    """Return "loaded", or the message of the error without the folder."""
    import warnings  # noqa: PLC0415

    from bn_insert import CheckpointError, load_checkpoint  # noqa: PLC0415

    form = FORMS[name]
    path = folder / form.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, and of pickles
        form.write(path)
    try:
        load_checkpoint(path, **form.options)
    except CheckpointError as error:
        return str(error).replace(f"{folder}/", "").replace(str(folder), ".")
    return "loaded"
