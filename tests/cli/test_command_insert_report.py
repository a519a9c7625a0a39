"""`bn-insert insert --report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bn_insert import load_checkpoint, save_checkpoint
from bn_insert.checkpoints.read_file import read_checkpoint
from bn_insert.demo import images_path, network_path
from support.commands import AS_STORED, Run, assert_refused, text_of


def test_the_report_says_what_was_done(run: Run, digits: Path) -> None:
    result = run(
        "insert", network_path(), digits, "-o", "out.pth", *AS_STORED, "--report", "r.json", "--skip", "features.1*"
    )
    assert result.exit_code == 0, result.output
    report = json.loads(Path("r.json").read_text())
    assert report["comparisons"]["cpu"]["bit_identical"] is True
    assert report["calibration"]["images"] == 20
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert len(layers["features.0"]["batchnorm"]["mean"]) == 16
    assert layers["features.11"]["reason"] == "skipped by pattern"
    assert len(report["output"]["sha256"]) == 64


def test_the_report_says_how_far_train_mode_is_from_eval_mode(run: Run) -> None:
    images = (images_path(), "--images", 64)
    result = run("insert", network_path(), *images, "-o", "out.pth", *AS_STORED, "--report", "r.json", "--equalize")
    assert result.exit_code == 0, result.output
    found = json.loads(Path("r.json").read_text())["train_mode"]
    assert [(each["batch_size"], each["images"]) for each in found["agreements"]] == [(8, 64), (16, 64), (32, 64)]
    assert [(each["batch_size"], each["top1_agreement"]) for each in found["renorm"]] == [(8, 1), (16, 1), (32, 1)]
    assert found["reading"] in text_of(result.stderr)
    assert "This was measured on 64 images; the margin is at most ±" in found["reading"]
    # The same figures by the command of its own, which reads images and preprocessing as insert did.
    alone = run("compare-modes", "out.pth", *images, "--batch-sizes", "8,32", "-j", 0)
    assert alone.exit_code == 0, alone.output
    for each in (found["agreements"][0], found["agreements"][2]):
        assert f"{each['top1_agreement']:.1%} ± {each['top1_margin']:.1%}" in alone.stdout
        assert f"{each['kl_divergence']:.3g}" in alone.stdout
    assert alone.stdout.count("100.00%") >= 2
    assert "With Batch Renormalization it keeps 100% at batch sizes of 8 and above." in text_of(alone.stdout)


def test_a_batch_size_with_a_single_batch_is_left_out(run: Run, digits: Path) -> None:
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED, "--report", "r.json")
    found = json.loads(Path("r.json").read_text())["train_mode"]
    assert [(each["batch_size"], each["images"]) for each in found["agreements"]] == [(8, 16)]
    assert "Batch sizes left out of train mode: 16, 32 (20 images are fewer than 2 batches)." in text_of(result.stderr)


def test_train_mode_is_measured_within_a_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bn_insert_cli.insert.REPORT_SECONDS", 0.0)
    words = ("insert", network_path(), images_path(), "--images", 64, *AS_STORED)
    result = run(*words, "-o", "out.pth", "--report", "r.json")
    found = json.loads(Path("r.json").read_text())["train_mode"]
    assert [(each["batch_size"], each["images"]) for each in found["agreements"]] == [(8, 16)]
    message = text_of(result.stderr)
    assert "on up to 64 images, for at most 0 s (but at least 2 batches of 8)." in message
    assert "Batch sizes left out of train mode: 16, 32 (the time limit was reached)." in message
    assert "fewer" not in message


def test_the_report_has_its_time_and_its_command(run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/bn-insert", "insert", "my net.pth"])
    run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED, "--report", "r.json")
    report = json.loads(Path("r.json").read_text())
    assert 0 < report["report_seconds"] < report["seconds"]
    assert report["preprocessing"]["origin"] == "from the options"
    assert report["command"] == "bn-insert insert 'my net.pth'"


def test_the_report_is_a_page_by_its_suffix(run: Run, digits: Path) -> None:
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED, "--report", "r.html", "-b", 5)
    assert result.exit_code == 0, result.output
    text = Path("r.html").read_text()
    assert text.startswith("<!doctype html>")
    assert text.count("<figure") == 3
    again = run("insert", network_path(), digits, "-o", "other.pth", *AS_STORED, "--report", "r.html")
    assert_refused(again, "r.html already exists", "--force")
    assert not Path("other.pth").exists()
    assert Path("r.html").read_text() == text


def test_a_report_of_another_suffix_is_refused_before_the_work(run: Run, digits: Path) -> None:
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED, "--report", "r.pdf")
    assert_refused(result, "cannot write the report to r.pdf: use a name that ends in .html or .json")
    assert list(Path().iterdir()) == [digits.relative_to(Path.cwd())]


def test_a_report_that_fails_leaves_the_checkpoint_and_says_so(
    run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_data: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bn_insert.report.page.page", fail)
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED, "--report", "r.html")
    assert_refused(result, "r.html: No space left on device; out.pth is written and complete")
    assert not Path("r.html").exists()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in load_checkpoint("out.pth").modules()) == 6


def test_interrupted_while_train_mode_is_measured_the_checkpoint_is_there(
    run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_arguments: object, **_keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bn_insert.train_mode_agreement", interrupt)
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED, "--report", "r.html")
    assert_refused(result, "interrupted; out.pth is written and complete, the report r.html is not", code=130)
    assert "nothing was written" not in result.stderr
    load_checkpoint("out.pth")


def test_a_classifier_of_nan_has_a_report_without_train_mode(run: Run, digits: Path) -> None:
    model = load_checkpoint(network_path())
    with torch.no_grad():
        model.classifier[0].weight.fill_(torch.nan)
    save_checkpoint(model, digits.parent / "features.pth")
    result = run(
        "insert", "features.pth", digits, "-o", "out.pth", *AS_STORED, "--layers", "conv", "--report", "r.json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(Path("r.json").read_text())["train_mode"]
    assert found["agreements"] == []
    assert "logits are not finite in eval mode" in found["reading"]


def test_a_report_that_would_replace_the_checkpoint_is_refused(run: Run, digits: Path) -> None:
    Path("r.json").symlink_to("out.pth")
    assert_refused(
        run("insert", network_path(), digits, "-o", "out.pth", "--report", "r.json", *AS_STORED),
        "the checkpoint is written there; choose another name",
    )
    assert not Path("out.pth").exists()


def test_a_report_with_the_name_of_the_checkpoint_is_written_beside_it(run: Run, digits: Path) -> None:
    result = run("insert", network_path(), digits, "-o", "out.pth", "--report", "out.json", *AS_STORED)
    assert result.exit_code == 0, result.output
    assert json.loads(Path("out.json").read_text())["format"] == "bn-insert report"
    assert read_checkpoint("out.pth").settings is not None


def test_a_json_file_beside_the_output_is_never_touched(run: Run, digits: Path) -> None:
    Path("out.json").write_bytes(b'{"mine": 1}\n// \xe9\n')
    for force in ((), ("--force",)):
        result = run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED, *force)
        assert result.exit_code == 0, result.output
    assert Path("out.json").read_bytes() == b'{"mine": 1}\n// \xe9\n'
