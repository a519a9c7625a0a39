"""`bn-insert inspect`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bn_insert.demo import network_path
from support.commands import AS_STORED, Run, text_of
from support.idioms import DecidesByValues
from support.networks import small_vgg


def test_inspect_shows_every_layer_and_why_one_gets_no_batchnorm(run: Run) -> None:
    result = run("inspect", network_path(), "--layers", "conv")
    assert result.exit_code == 0, result.output
    for words in ("features.13", "64x64x3x3", "after features.13", "dense layers are not selected"):
        assert words in result.stdout
    assert "output: for an input of 3x224x224 (see --size)" in result.stdout


def test_inspect_on_a_batchnorm_network_names_the_normalization(run: Run, digits: Path) -> None:
    run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED)
    result = run("inspect", "out.pth")
    assert "already followed by a normalization: features.1" in text_of(result.stdout)
    assert "output layer" in result.stdout


def test_inspect_prints_what_is_assumed_of_a_vgg_and_takes_the_key_of_its_state_dict(run: Run) -> None:
    content = {"best": small_vgg().state_dict() | {"total_ops": torch.zeros(1)}, "epoch": 3}
    torch.save(content, "network.pth")
    refused = run("inspect", "network.pth")
    assert refused.exit_code == 2
    assert "its keys are best (OrderedDict), epoch (int)" in text_of(refused.output)
    with pytest.warns(UserWarning, match="ignoring 1 tensor of network.pth: total_ops"):
        result = run("inspect", "network.pth", "--key", "best", "--ignore-unexpected", "--size", "16")
    assert result.exit_code == 0, result.output
    words = "ReLU for every conv, 2 x 2 max pooling at features.2, features.5, dropout with p 0.5 at classifier.2, "
    assert words in text_of(result.output)
    with_model = run("inspect", "network.pth", "--key", "best", "--model", "support.networks:small_vgg")
    assert "total_ops is not in the model" in text_of(with_model.output)


def test_inspect_and_insert_note_that_a_network_is_recorded(run: Run, digits: Path) -> None:
    torch.save(DecidesByValues().state_dict(), "network.pth")
    options = ("--model", "support.idioms:DecidesByValues")
    found = run("inspect", "network.pth", *options)
    assert "after conv2" in found.stdout
    inserted = run("insert", "network.pth", digits, "-o", "out.pth", *options, *AS_STORED)
    for result in (found, inserted):
        assert result.exit_code == 0, result.output
        assert "torch.export cannot trace this network" in text_of(result.output)
    assert "cannot trace" not in run("inspect", network_path()).output
