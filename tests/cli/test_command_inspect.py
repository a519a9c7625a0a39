"""`bn-insert inspect`."""

from __future__ import annotations

from pathlib import Path

from bn_insert.demo import network_path
from support.commands import AS_STORED, Run, text_of


def test_inspect_shows_every_layer_and_why_one_gets_no_batchnorm(run: Run) -> None:
    result = run("inspect", network_path(), "--layers", "conv")
    assert result.exit_code == 0, result.output
    for words in ("features.13", "64x64x3x3", "after features.13", "dense layers are not selected"):
        assert words in result.stdout


def test_inspect_on_a_batchnorm_network_names_the_normalization(run: Run, digits: Path) -> None:
    run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED)
    result = run("inspect", "out.pth")
    assert "already followed by a normalization: features.1" in text_of(result.stdout)
    assert "output layer" in result.stdout
