"""`bn-insert compare` and `bn-insert compare-modes`."""

from __future__ import annotations

from pathlib import Path

import torch

from bn_insert import load_checkpoint, save_checkpoint
from bn_insert.demo import network_path
from support.commands import AS_STORED, Run, assert_refused, text_of


def test_compare_finds_the_result_bit_identical(run: Run, digits: Path) -> None:
    run("insert", network_path(), digits, "-o", "out.safetensors", *AS_STORED)
    result = run("compare", network_path(), "out.safetensors", digits)
    assert result.exit_code == 0, result.output
    assert "equal bit for bit" in result.stdout


def test_compare_exits_with_1_past_the_tolerance(run: Run, digits: Path) -> None:
    model = load_checkpoint(network_path())
    with torch.no_grad():
        model.classifier[-1].bias[3] += 0.01
    save_checkpoint(model, digits.parent / "other.pth")
    loose = run("compare", network_path(), "other.pth", digits, *AS_STORED, "--rtol", "1", "--atol", "0.02")
    assert loose.exit_code == 0, loose.output
    assert "The outputs are equal within --atol 0.02 and --rtol 1." in loose.stdout
    for bound, allowed in (
        (("--atol", "0.005", "--rtol", "1"), "--atol 0.005 and --rtol 1"),
        (("--rtol", "1e-5"), "--rtol 1e-05"),
    ):
        strict = run("compare", network_path(), "other.pth", digits, *AS_STORED, *bound)
        assert strict.exit_code == 1
        assert f"The outputs differ by more than {allowed} allows." in text_of(strict.stdout)


def test_compare_modes_refuses_what_it_cannot_measure(run: Run, digits: Path) -> None:
    assert_refused(
        run("compare-modes", network_path(), digits, *AS_STORED),
        f"{network_path()} has no BatchNorm, so both modes are the same; insert BatchNorm first: bn-insert insert",
        f"{digits} -o network-bn.pth",
    )
    assert_refused(
        run("compare-modes", network_path(), digits, *AS_STORED, "--batch-sizes", "4,many"),
        "is not an integer or several",
    )
