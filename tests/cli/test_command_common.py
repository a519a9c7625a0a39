"""What commands share: help, `--quiet`, `--json`, `--traceback`, names of networks, the line on preprocessing."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import bn_insert
from bn_insert import save_checkpoint
from bn_insert.demo import images_path, network_path
from bn_insert.images import find_images
from bn_insert_cli import console
from support.commands import AS_STORED, Run, assert_refused, run_forked, text_of
from support.digits import save_plain_network

COMMANDS = (
    "insert",
    "inspect",
    "compare",
    "compare-modes",
    "finetune",
    "evaluate",
    "predict",
    "fold",
    "report",
    "demo",
)
SMALL = (*AS_STORED, "--images", 16)
HINT = "If the network was trained with other preprocessing, pass --resize, --crop, --mean and --std: bn-insert"


def at_width(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_PIPE_WIDTH", columns)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_help_page_ends_with_help_and_names_no_type_of_a_flag(run: Run, command: str) -> None:
    page = run(command, "--help").stdout
    assert "<bool>" not in page
    options = re.findall(r"^[│ *]+(--[a-z-]+)", page, re.MULTILINE)
    assert options[-3:] == ["--quiet", "--traceback", "--help"]


@pytest.mark.parametrize("command", ["compare", "compare-modes", "predict", "fold"])
def test_only_commands_that_calibrate_speak_of_calibration(run: Run, command: str) -> None:
    page = run(command, "--help").stdout
    assert "CALIBRATION" not in page
    assert "IMAGES" in page


@pytest.mark.parametrize("place", ["after-activation", "after_activation"])
@pytest.mark.parametrize("equals", [True, False])
def test_values_are_accepted_with_hyphens_and_with_underscores(run: Run, place: str, *, equals: bool) -> None:
    words = (f"--placement={place}",) if equals else ("--placement", place)
    result = run("inspect", network_path(), *words, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["layers"][0]["batchnorm_after"] == "features.1"


@pytest.mark.parametrize("columns", [80, 120])
def test_help_names_values_in_words(run: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in (*COMMANDS, "adapt"):
        page = run(command, "--help").stdout
        assert not re.search(r"[{}]|<[a-z][a-z]", page), page
        assert "…" not in page  # nothing is too narrow for a name
    assert "adapt [OPTIONS] CHECKPOINT [SOURCE] TARGET\n" in re.sub(" +\n", "\n", run("adapt", "--help").stdout)


@pytest.mark.parametrize(
    ("command", "other", "ours"),
    [
        ("finetune", "--learning-rate", "--lr"),
        ("finetune", "--bs", "--batch-size"),
        ("finetune", "--epoch", "--epochs"),
        ("finetune", "--output", "--output-dir"),
        ("finetune", "--optimizer", "--opt"),
    ],
)
def test_an_option_by_another_name_is_refused_with_ours(run: Run, command: str, other: str, ours: str) -> None:
    result = run(command, "net.pth", "data", other, "1")
    assert result.exit_code == 2
    message = " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    assert re.search(rf"No such option: {other}\b.*{ours}\b", message), message


def test_an_option_that_the_command_does_not_have_is_not_named(run: Run) -> None:
    assert "--lr" not in run("inspect", "net.pth", "--learning-rate", "1").stderr


@pytest.mark.parametrize(
    ("command", "option", "shown"),
    [
        ("insert", "--eps", "X [x>0]"),
        ("insert", "--tolerance", "X [x>0]"),
        ("insert", "--seed", "N [x>=0]"),
        ("finetune", "--lr", "X [x>0]"),
        ("finetune", "--momentum", "X [0<=x<1]"),
        ("finetune", "--label-smoothing", "X [0<=x<1]"),
        ("finetune", "--crop-scale", "X [0<x<=1]"),
        ("finetune", "--dropout", "X [0<=x<1]"),
    ],
)
def test_a_help_page_shows_the_values_that_an_option_takes(run: Run, command: str, option: str, shown: str) -> None:
    assert f" {option} {shown} " in text_of(run(command, "--help").stdout)


@pytest.mark.parametrize("before", [True, False])
def test_a_traceback_can_be_asked_for_before_and_after_the_command(run: Run, *, before: bool) -> None:
    words = ["inspect", "missing.pth"]
    result = run(*(["--traceback", *words] if before else [*words, "--traceback"]))
    assert result.exit_code == 2
    *_, last = result.stderr.splitlines()
    assert last.startswith("bn_insert.errors.CheckpointError: there is no file missing.pth")
    assert result.stderr.startswith("Traceback")
    assert "Traceback" not in run(*words).stderr


@pytest.mark.parametrize(
    ("name", "wording"),
    [
        ("VGG16", "did you mean vgg16?"),
        ("vgg61", "did you mean vgg16?"),
        ("vgg7", "pass the file with --model, such as --model torchvision.models:alexnet"),
        ("vgg16_bn", "torchvision's vgg16_bn already has BatchNorm; to insert BatchNorm, use vgg16"),
        ("resnet50", "pass the file with --model, such as --model torchvision.models:alexnet"),
    ],
)
def test_the_name_of_another_network_is_refused_with_the_names_that_work(run: Run, name: str, wording: str) -> None:
    for command in (("inspect", name), ("insert", name, "photos", "-o", "out.pth")):
        assert_refused(run(*command), f"there is no file {name}", "vgg11, vgg13, vgg16, vgg19", wording)


def test_each_command_that_uses_images_prints_their_preprocessing(run: Run, digits: Path) -> None:
    inserted = run("insert", network_path(), digits, "-o", "out.pth", *SMALL)
    assert "Preprocessing: no resizing; no crop; mean 0; std 1 (from the options)." in text_of(inserted.stderr)
    for words in (
        ("compare", network_path(), "out.pth", digits),
        ("compare-modes", "out.pth", digits, "--batch-sizes", 4),
        ("fold", "out.pth", digits, "-o", "folded.pth"),
        ("evaluate", "out.pth", digits),
        ("predict", "out.pth", digits),
    ):
        result = run(*words)
        assert result.exit_code == 0, result.output
        origin = "out.pth" if words[0] == "compare" else "the checkpoint"
        stored = f"Preprocessing: no resizing; no crop; mean 0; std 1 (from {origin})."
        assert text_of(result.stderr).count(stored) == 1
    mixed = run("compare", network_path(), "out.pth", digits, "--mean", "0.5")
    origin = "--mean from the options, the rest from out.pth; out.pth stores "
    origin += "no resizing; no crop; mean 0; std 1"
    assert f"mean 0.5; std 1 ({origin})." in text_of(mixed.stderr)


def test_the_default_preprocessing_is_called_one(run: Run, digits: Path) -> None:
    plain = save_plain_network(Path("plain.pth"))
    result = run("compare", plain, plain, digits, "--images", 2, "-j", 0)
    line = "resize 256; crop 224; mean 0.485, 0.456, 0.406; std 0.229, 0.224, 0.225 (ImageNet's, the default"
    assert line in text_of(result.stderr)
    assert HINT in text_of(result.stderr)
    some = run("compare", plain, plain, digits, "--images", 2, "-j", 0, "--resize", 32, "--crop", 32)
    assert f"(--resize, --crop from the options, the rest by default). {HINT}" in text_of(some.stderr)


def test_a_crop_larger_than_the_images_is_warned_of(run: Run, digits: Path) -> None:
    words = ("compare", network_path(), network_path(), digits, "--images", 2, "-j", 0, "--quiet", "--resize", 32)
    assert (
        "warning: the crop of 48 is larger than images resized to 32, which are padded with black. To avoid this, use "
        "--crop 32." in text_of(run(*words, "--crop", 48).stderr)
    )
    assert "warning" not in run(*words, "--crop", 32).stderr
    first = find_images(digits)[0]
    with Image.open(first) as image:
        width, height = image.size
    as_they_are = (*words[:-1], 0, "--crop")
    assert (
        f"warning: the crop of 64 is larger than images such as {first} ({width} x {height}), which are padded with "
        f"black. Unless the network was trained on such images, use --resize 64, or --crop {height}."
        in text_of(run(*as_they_are, 64).stderr)
    )
    assert "warning" not in run(*as_they_are, height).stderr


@pytest.mark.parametrize(
    ("mean", "std", "advice"),
    [
        ("123.68,116.78,103.94", "1", "--mean 0.485,0.458,0.4076 --std 0.003922"),
        ("123.68,116.28,103.53", "58.4,57.12,57.38", "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"),
        ("0", "255", "--mean 0 --std 1"),
    ],
)
def test_a_mean_or_std_of_pixels_in_0_to_255_is_warned_of(
    run: Run, digits: Path, mean: str, std: str, advice: str
) -> None:
    words = ("compare", network_path(), network_path(), digits, "--images", 2, "-j", 0)
    warned = text_of(run(*words, "--quiet", "--mean", mean, "--std", std).stderr)
    assert "are applied to pixels in 0..1. For a network trained on pixels in 0..255, use" in warned
    assert warned.rstrip().endswith(f"{advice}.")
    assert "warning" not in run(*words, "--mean", 1, "--std", 1).stderr


def test_options_that_no_images_were_read_with_are_stored_and_the_command_says_so(run: Run) -> None:
    torch.save(torch.rand(4, 3, 32, 32), "x.pt")
    options = ("--resize", 40, "--crop", 32, "--mean", 0.5, "--std", 0.25)
    wording = "for later commands (no image files were read here): resize 40; crop 32; mean 0.5; std 0.25."
    inserted = run("insert", network_path(), "x.pt", "-o", "bn.pth", *options)
    assert f"Stored in bn.pth {wording}" in text_of(inserted.stderr)
    assert wording not in run("insert", network_path(), "x.pt", "-o", "other.pth").stderr
    folded = run("fold", "bn.pth", "-o", "folded.pth", *options)
    assert f"Stored in folded.pth {wording}" in text_of(folded.stderr)
    assert wording not in run("fold", "bn.pth", "-o", "second.pth").stderr


def test_a_tensor_file_is_not_preprocessed_and_the_command_says_so(run: Run) -> None:
    torch.save(torch.rand(4, 3, 32, 32), "x.pt")
    result = run("compare", network_path(), network_path(), "x.pt")
    assert "Preprocessing: none (the values of a tensor file are used unchanged)." in text_of(result.stderr)


def test_results_as_json(run: Run, digits: Path) -> None:
    run("insert", network_path(), digits, "-o", "out.pth", *SMALL)
    found = json.loads(run("inspect", "out.pth", "--json").stdout)
    assert (found["batchnorms"], found["sites"]) == (8, 0)
    assert found["layers"][0]["reason"] == "already followed by a normalization: features.1"
    assert found["settings"]["transform"]["std"] == [1.0]
    found = json.loads(run("compare", network_path(), "out.pth", digits, "--json").stdout)
    assert (found["bit_identical"], found["within_tolerance"], found["images"]) == (True, True, 20)
    found = json.loads(run("compare-modes", "out.pth", digits, "--json").stdout)
    assert [each["batch_size"] for each in found["agreements"]] == [4, 8]
    failed = run("compare", network_path(), "out.pth", digits, "--json", "--mean", 0.3, "--rtol", 0, "--atol", 0)
    assert failed.exit_code == 0  # bit-identical on any images


def test_a_result_that_json_lacks_is_null(run: Run) -> None:
    torch.save(torch.rand(4, 3, 8, 8), "x.pt")
    Path("nets_one.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Conv2d(3, 2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(2, 1))\n"
    )
    sys.path.insert(0, str(Path.cwd()))
    try:
        import nets_one  # noqa: PLC0415
    finally:
        sys.path.pop(0)
    save_checkpoint(nets_one.make(), "one.pth")
    words = ("compare", "one.pth", "one.pth", "x.pt", "--model", "nets_one:make")
    assert json.loads(run(*words, "--json").stdout)["top1_agreement"] is None
    assert "top-1" not in run(*words).stdout


def test_quiet_leaves_the_last_line(run: Run, digits: Path) -> None:
    for words in (
        ("--quiet", "insert", network_path(), digits, "-o", "a.pth", *SMALL),
        ("insert", network_path(), digits, "-o", "b.pth", *SMALL, "-q"),
    ):
        result = run(*words)
        assert result.stdout.startswith("Wrote ")
        assert result.stdout.count("\n") == 1
        assert result.stderr == ""
    assert "Calibrated on" in run("insert", network_path(), digits, "-o", "c.pth", *SMALL).stderr


def test_no_color_drops_bold_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert console.stdout().color_system is not None
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.stdout().color_system is None


def test_tables_fit_in_80_columns(run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_width(80, monkeypatch)
    inserted = run("insert", network_path(), images_path(), "-o", "out.pth", *AS_STORED, "-b", 32)
    shown = run("inspect", network_path())
    after = run("inspect", "out.pth")
    for result in (inserted, shown, after):
        assert max(map(len, result.stdout.splitlines())) <= 80 or "The file stores no settings" in result.stdout
        rows = [line for line in result.stdout.splitlines() if "classifier.0" in line]
        assert len(rows) == 1
        following = result.stdout.splitlines()[result.stdout.splitlines().index(rows[0]) + 1]
        assert "classifier." in following  # no row takes two lines
    assert "kind" not in inserted.stdout
    at_width(120, monkeypatch)
    assert "kind" in run("insert", network_path(), digits, "-o", "wide.pth", *SMALL).stdout


def test_an_error_of_few_batches_is_left_out_and_the_reason_given(run: Run, digits: Path) -> None:
    words = ("insert", network_path(), digits, *AS_STORED)
    few = run(*words, "-o", "a.pth", "-b", 10)
    assert "not estimated from fewer than 8 batches" in text_of(few.stdout)
    assert "With so few images, the statistics may be far from those of other images: use at" in text_of(few.stderr)
    many = run(*words, "-o", "b.pth", "-b", 2)
    assert "0.1 or less is good" in text_of(many.stdout)
    assert "With so few images" not in many.stderr


def test_inexact_statistics_are_noted_with_the_number_of_images_that_would_do(run: Run, digits: Path) -> None:
    words = ("insert", network_path(), digits, *AS_STORED)
    inexact = text_of(run(*words, "-o", "a.pth", "-b", 2).stderr)
    found = re.search(
        r"Sampling error above 0.1 in features.6, .* more\. .* about ([\d,]+) instead of 20 for an error of 0.1\.",
        inexact,
    )
    assert found
    assert int(found[1].replace(",", "")) > 20
    assert "Sampling error" not in run(*words, "-o", "b.pth", "-b", 10).stderr  # not known
    limited = text_of(run(*words, "-o", "c.pth", "-b", 2, "--images", 18).stderr)
    assert "instead of 18 for an error of 0.1 (see --images)." in limited


def test_the_process_ends_quietly_with_the_code_of_the_command(tmp_path: Path) -> None:
    for words, code in ((("inspect", network_path()), 0), (("inspect", "missing.pth"), 2), (("--version",), 0)):
        # test_command_model_option.py has one that imports torch itself, and ends what torch has made.
        done = run_forked("-m", "bn_insert", *words, folder=tmp_path)
        assert done.returncode == code
        assert len(done.stderr.splitlines()) == (code == 2)
    done = run_forked("-m", "bn_insert", "inspect", "missing.pth", "--traceback", folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_dir_of_the_package_shows_the_public_names_alone() -> None:
    assert dir(bn_insert) == sorted(bn_insert.__all__)


def test_results_print_on_one_screen() -> None:
    model = bn_insert.load_checkpoint(network_path())
    images = torch.rand(8, 3, 32, 32)
    inserted = bn_insert.insert(model, [images])
    results = (
        inserted,
        inserted.moments["features.0"],
        bn_insert.fold(inserted.model.eval(), images),
        bn_insert.read_checkpoint(network_path()),
    )
    assert all(len(repr(result)) < 1000 for result in results)
    assert repr(results[1]) == "Moments(channels=16, count=8192)"
