"""What commands refuse before they download weights or read large files, and how usage errors read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import bn_insert
from bn_insert import CalibrationError, TrainingError, check_output_dir
from bn_insert.demo import network_path
from bn_insert.support.arguments import usable_device
from bn_insert_cli.input_shapes import input_shape
from support.commands import Run, assert_refused, text_of


@pytest.fixture
def _no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reading of any checkpoint fail, and the download of weights."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(bn_insert, "torchvision_checkpoint", fail)
    monkeypatch.setattr(bn_insert, "read_checkpoint", fail)


@pytest.mark.usefixtures("_no_reading")
@pytest.mark.parametrize(
    ("words", "wording"),
    [
        ("insert vgg16 digit -o out.pth", "digit does not exist (did you mean digits?)"),
        ("insert vgg16 empty -o out.pth", "empty contains no image"),
        ("insert vgg16 digits -o none/out.pth", "does not exist; create it first"),
        ("insert vgg16 digits -o old.pth", "old.pth already exists"),
        ("insert vgg16 digits -o out.pth --report none/a.html", "does not exist; create it first"),
        ("insert vgg16 digits -o out.pth --device abacus", "'abacus' is not a device"),
        ("insert vgg16 digits -o out.pth --mean grey", "'grey' is not a number"),
        ("insert vgg16 digits -o out.pth --layers all", "'all' is not one of: conv, dense"),
        ("adapt vgg16 digits digit -o out.pth", "digit does not exist"),
        ("adapt vgg16 digits digits/0 -o old.pth", "old.pth already exists"),
        ("fold vgg16 digit -o out.pth", "digit does not exist"),
        ("compare vgg16 vgg16 digit", "digit does not exist"),
        ("compare-modes vgg16 digit", "digit does not exist"),
        ("predict vgg16 digit", "digit does not exist"),
        ("evaluate vgg16 digit", "digit does not exist"),
        ("finetune vgg16 digit -o run", "digit does not exist"),
        ("finetune vgg16 labelled -o old", "old already contains results (best.pth)"),
        ("finetune vgg16 labelled -o old.pth", "old.pth is not a folder"),
        ("finetune vgg16 labelled -o old.pth/run", "old.pth is not a folder"),
    ],
)
def test_what_can_be_known_before_the_weights_are_read_is_said_before(
    run: Run, digits: Path, words: str, wording: str
) -> None:
    Path("empty").mkdir()
    Path("old.pth").touch()
    Path("old").mkdir()
    Path("old/best.pth").touch()
    Path("labelled").mkdir()
    for part in ("train", "val"):
        Path("labelled", part).symlink_to(digits)
    assert_refused(run(*words.split()), wording)


def test_an_empty_path_is_not_taken_for_the_current_folder(run: Run) -> None:
    assert_refused(run("inspect", ""), "error: the path of the checkpoint is empty; pass a file")


# A file that is read is never written


@pytest.mark.usefixtures("_no_reading")
@pytest.mark.parametrize("output", ["net.pth", "digits/../net.pth", "symbolic.pth", "hard.pth"])
@pytest.mark.parametrize("command", ["insert", "adapt", "fold"])
def test_the_checkpoint_that_is_read_is_not_replaced_even_with_force(
    run: Run, digits: Path, command: str, output: str
) -> None:
    Path("net.pth").write_bytes(b"weights")
    Path("symbolic.pth").symlink_to("net.pth")
    os.link("net.pth", "hard.pth")
    for force in ([], ["--force"]):
        result = run(command, "net.pth", digits, "-o", output, *force)
        same = "the input" if output == "net.pth" else "the same file as the input net.pth"
        assert_refused(result, f"cannot write {output}: it is {same}; choose another name")
    assert Path("net.pth").read_bytes() == b"weights"


@pytest.mark.usefixtures("_no_reading")
def test_a_tensor_file_that_is_read_is_not_replaced(run: Run) -> None:
    torch.save(torch.zeros(1), "x.pt")
    result = run("insert", network_path(), "x.pt", "-o", "./x.pt", "--force")
    assert_refused(result, "cannot write x.pt: it is the input")


def test_a_report_does_not_replace_the_report_that_it_is_made_from(run: Run) -> None:
    Path("run").mkdir()
    Path("run/report.json").write_text("{}")
    result = run("report", "run", "-o", "run/../run/report.json", "--force")
    assert_refused(result, "it is the same file as the input run/report.json")
    assert Path("run/report.json").read_text() == "{}"


@pytest.mark.usefixtures("_no_reading")
def test_a_run_does_not_replace_the_checkpoint_that_it_starts_from(run: Run, digits: Path) -> None:
    Path("run").mkdir()
    Path("run/best.pth").touch()
    Path("link").symlink_to("run")
    for force in ([], ["--force"]):
        refused = run("finetune", "link/best.pth", digits, "-o", "run", *force)
        assert_refused(refused, "run contains the input link/best.pth, which the results would replace")
    with pytest.raises(TrainingError, match=r"contains the input run/best.pth.*resume=True"):
        check_output_dir("run", overwrite=True, inputs=["run/best.pth"])
    check_output_dir("run", overwrite=True, inputs=[network_path()])
    Path("run/state.pth").touch()  # a run that is continued does not start from it
    check_output_dir("run", resume=True, inputs=["run/best.pth"])


# Usage errors


@pytest.mark.parametrize(
    ("words", "wording"),
    [
        ("finetune a.pth b", "Example: bn-insert finetune vgg16-bn.pth flowers/ --output-dir run/"),
        ("insert a.pth b", "Example: bn-insert insert vgg16.pth photographs/ -o vgg16-bn.pth"),
        ("insert a.pth", "Missing argument 'CALIBRATION'. Example: bn-insert insert vgg16.pth photographs/ -o"),
    ],
)
def test_a_missing_argument_or_option_is_shown_by_an_example(run: Run, words: str, wording: str) -> None:
    assert_refused(run(*words.split()), "Missing ", wording)


def test_a_value_that_is_none_of_the_choices_is_told_without_the_name_of_a_class(run: Run) -> None:
    result = run("insert", "a.pth", "b", "-o", "c.pth", "--placement", "there")
    assert_refused(result, "'there' is not one of")
    assert "Value error" not in text_of(result.stderr)


@pytest.mark.parametrize("name", ["mps", "cuda:63", "meta"])
def test_a_device_that_is_not_there_is_one_short_message(run: Run, digits: Path, name: str) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    text = text_of(run("predict", network_path(), digits, "--device", name).stderr)
    assert f"the device '{name}' cannot be used on this machine" in text
    assert "; use 'cpu'" in text
    assert len(text) < 450


def test_a_message_on_devices_names_those_that_this_machine_has(
    run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gpus, names in ((0, "'cpu'"), (1, "'cpu' or 'cuda'"), (4, "'cpu' or 'cuda' or 'cuda:3'")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        text = text_of(run("predict", network_path(), digits, "--device", "abacus").stderr)
        assert f"'abacus' is not a device; use {names}" in text
        with pytest.raises(CalibrationError, match=f"device is 'abacus', which is not a device; use {names}$"):
            usable_device("abacus")


def test_images_too_small_for_a_network_are_refused_with_the_options_that_set_their_size(
    run: Run, digits: Path
) -> None:
    small = ("--resize", 8, "--crop", 8, "-j", 0)
    refused = run("insert", network_path(), digits, "-o", "out.pth", *small)
    assert_refused(refused, "Output size is too small. Pass inputs of the shape that it expects (--resize and --crop")
    refused = run("compare", network_path(), network_path(), digits, *small)
    assert_refused(refused, "Output size is too small. Use larger inputs (for image files: --resize, --crop)")


def test_a_folder_of_images_in_place_of_a_checkpoint_is_told_which_argument_comes_first(run: Run, digits: Path) -> None:
    wording = "digits is a folder of images, not a checkpoint file; pass the checkpoint first, and the images after it"
    for command in (
        ("insert", digits, network_path(), "-o", "out.pth"),
        ("insert", digits, digits, "-o", "out.pth"),
        ("predict", digits, digits),
        ("finetune", digits, digits, "--output-dir", "run"),
    ):
        assert_refused(run(*command), wording)
    (digits / "net.pth").touch()
    assert_refused(run("predict", digits, digits), "digits is a folder, not a checkpoint file; name a file in it")


def test_a_folder_of_images_is_recognized_beside_other_files_and_a_folder_of_runs_is_none(
    run: Run, digits: Path
) -> None:
    (digits / "labels.csv").touch()
    for hidden in (".DS_Store", ".cached.pth", ".cache/net.pth"):
        (digits / hidden).parent.mkdir(exist_ok=True)
        (digits / hidden).touch()
    assert_refused(run("predict", digits, digits), "digits is a folder of images, not a checkpoint file; pass the")
    Path("runs/run-1").mkdir(parents=True)
    for name in ("best.pth.tar", "curves.png", "last.CKPT"):
        Path("runs/run-1", name).touch()
    assert_refused(run("predict", "runs", digits), "runs is a folder, not a checkpoint file; name a file in it")


# Random inputs


def test_a_network_for_volumes_is_checked_on_small_ones() -> None:
    network = nn.Sequential(nn.Conv3d(3, 2, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2, 2))
    assert input_shape(network, image_side=224) == (3, 16, 16, 16)
    assert input_shape(network, 20) == (3, 20, 20, 20)
    clips = nn.Sequential(nn.Conv3d(3, 2, 3, padding=1), nn.MaxPool3d(16), nn.Flatten(), nn.Linear(2 * 49, 2))
    assert input_shape(clips) == (3, 16, 112, 112)
