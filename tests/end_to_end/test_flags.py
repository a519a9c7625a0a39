"""Flags of the public functions are True or False: any text, such as the "no" of a settings file, would be true."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import bn_insert
import bn_insert.images
from bn_insert import BNInsertError, read_checkpoint
from bn_insert.demo import network_path
from bn_insert.demo.training import demo_network
from bn_insert.images import Transform, open_class_folders
from support.digits import copy_labelled_digits

X = torch.zeros(4, 3, 16, 16)
# What the functions with flags are called with, in a folder of class folders.
ARGUMENTS: dict[str, Callable[[Path], tuple[Any, ...]]] = {
    "adapt": lambda _: (_network(), [X], [X]),
    "adapt_statistics": lambda _: (_network(), [X], [X]),
    "build_network": lambda _: (read_checkpoint(network_path()),),
    "check_output": lambda folder: (folder / "a.pth",),
    "check_output_dir": lambda folder: (folder / "run",),
    "find_sites": lambda _: (_network(), X),
    "finetune": lambda folder: (demo_network(), open_class_folders(folder, Transform()), folder / "run"),
    "image_batches": lambda folder: (folder, Transform()),
    "insert": lambda _: (_network(), [X]),
    "insert_batchnorm": lambda _: (_network(), [X]),
    "load_checkpoint": lambda _: (network_path(),),
    "open_batches": lambda folder: (folder, Transform()),
    "open_class_folders": lambda folder: (folder, Transform()),
    "open_labelled_batches": lambda folder: (folder, Transform()),
    "read_checkpoint": lambda _: (network_path(),),
    "save_checkpoint": lambda folder: (_network(), folder / "a.pth"),
    "set_batchnorm_mode": lambda _: (_network(), "renorm"),
    "survey": lambda _: (_network(), X),
    "train_mode_agreement": lambda _: (_network(), [X]),
}
# Whether a bar of progress is shown, and memory for a GPU, change no result.
HARMLESS = {"progress", "pin_memory"}


def _network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten()).eval()


def _functions() -> dict[str, Callable[..., Any]]:
    modules = (bn_insert, bn_insert.images)
    found = {name: getattr(module, name) for module in modules for name in module.__all__}
    return {name: value for name, value in found.items() if inspect.isfunction(value)}


FLAGS = [
    (name, flag.name)
    for name, function in _functions().items()
    for flag in inspect.signature(function).parameters.values()
    if flag.annotation == "bool" and flag.name not in HARMLESS
]


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_text_is_no_flag(name: str, flag: str, tmp_path: Path) -> None:
    copy_labelled_digits(tmp_path, 1, 1, classes=2)
    arguments = ARGUMENTS[name](tmp_path)
    with pytest.raises(BNInsertError, match=f"^{flag} is 'no'; pass True or False$"):
        _functions()[name](*arguments, **{flag: "no"})


def test_text_does_not_synchronize_a_layer() -> None:
    with pytest.raises(BNInsertError, match=r"^synchronize is 'no'; pass True or False$"):
        bn_insert.BatchRenorm2d(4, synchronize="no")  # type: ignore[arg-type]


def test_the_truth_of_numpy_is_a_flag() -> None:
    sites = bn_insert.find_sites(_network(), X, include_output=numpy.True_)
    assert sites == bn_insert.find_sites(_network(), X, include_output=True)
