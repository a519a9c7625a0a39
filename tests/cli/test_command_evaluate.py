"""`bn-insert evaluate` and `bn-insert predict`, and the class names in checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torchvision.models import VGG

from bn_insert import load_checkpoint, read_checkpoint, save_checkpoint
from bn_insert.demo import network_path
from support.commands import AS_STORED, Run, assert_refused, text_of
from support.digits import IDENTITY_TRANSFORM, copy_labelled_digits, save_plain_network

DIGITS = tuple("0123456789")


def demo_network() -> VGG:
    network = load_checkpoint(network_path())
    assert isinstance(network, VGG)
    return network


def save(classes: Sequence[str], path: str = "net.pth", network: VGG | None = None) -> None:
    save_checkpoint(network or demo_network(), path, transform=IDENTITY_TRANSFORM.to_dict(), classes=classes)


def shuffled_network(order: Sequence[int]) -> VGG:
    """Return the demo network with its outputs in another order."""
    network = demo_network()
    output = network.classifier[-1]
    with torch.no_grad():
        output.weight.copy_(output.weight[list(order)])
        output.bias.copy_(output.bias[list(order)])
    return network


def classes_in(path: str) -> tuple[str, ...]:
    settings = read_checkpoint(path).settings
    assert settings is not None
    return settings.classes


# Names of classes


def test_class_names_survive_insert_and_fold_and_inspect_prints_them(run: Run, digits: Path) -> None:
    names = ("zero", "[red]", "\x1b[2Jtwo", "three", "four", "five", "six", "seven", "eight", "nine")
    save(names)
    for words in (
        ("insert", "net.pth", digits, "-o", "bn.safetensors", "-j", 0),
        ("fold", "bn.safetensors", "-o", "plain.pth"),
    ):
        result = run(*words)
        assert result.exit_code == 0, result.output
    assert classes_in("bn.safetensors") == classes_in("plain.pth") == names
    assert "10: zero, [red], ?[2Jtwo, three" in text_of(run("inspect", "plain.pth").stdout)


@pytest.mark.usefixtures("no_charts")
def test_finetune_keeps_outputs_in_the_order_of_their_stored_names(run: Run, tmp_path: Path) -> None:
    data = copy_labelled_digits(tmp_path / "data", train=1, val=2)
    order = [0, 1, 2, 3, 4, 5, 6, 8, 7, 9]
    names = [str(digit) for digit in order]
    save(names, network=shuffled_network(order))
    command = ("finetune", "net.pth", data, "--epochs", 1, "--lr", 1e-7, "-b", 10, "-j", 0, "--device", "cpu", "-o")
    trained = run(*command, "run")
    assert trained.exit_code == 0, trained.output
    assert "Output layer kept: validation accuracy 100.00% before training." in text_of(trained.stderr)
    assert list(classes_in("run/best.pth")) == names == Path("run/classes.txt").read_text().split()
    assert json.loads(run("evaluate", "run/best.pth", data, "--json").stdout)["accuracy"] == 1
    Path("net.pth").unlink()
    save([f"kind {name}" for name in names], network=shuffled_network(order))
    note = "The checkpoint stores other class names (kind 0, kind 1, kind 2, kind 3, kind 4 and 5 more) than those of"
    assert note in text_of(run(*command, "other").stderr)
    assert classes_in("other/best.pth") == DIGITS


@pytest.mark.usefixtures("no_charts")
def test_finetune_matches_a_renamed_folder_with_the_output_that_the_others_leave(run: Run, tmp_path: Path) -> None:
    data = copy_labelled_digits(tmp_path / "data", train=1, val=2)
    for part in ("train", "val"):
        (data / part / "0").rename(data / part / "zero")  # sorted last
    save(DIGITS)
    command = ("finetune", "net.pth", data, "--epochs", 1, "--lr", 1e-7, "-b", 10, "-j", 0, "--device", "cpu", "-o")
    trained = text_of(run(*command, "run").stderr)
    assert "Those without an output of their name get one that is left: zero that for 0." in trained
    assert "Output layer kept: validation accuracy 100.00% before training." in trained
    assert classes_in("run/best.pth") == ("zero", *DIGITS[1:])
    assert run(*command, "run", "--resume").exit_code == 0
    for part in ("train", "val"):
        (data / part / "9").rename(data / part / "nine")
    trained = text_of(run(*command, "second").stderr)
    assert "get one that is left: nine that for 0, zero that for 9." in trained, "as they are sorted"


# Evaluate


def test_folders_are_matched_with_stored_classes_by_name(run: Run, digits: Path) -> None:
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    save([str(digit) for digit in order], network=shuffled_network(order))
    without = save_plain_network(Path("plain.pth"))
    plain = json.loads(run("evaluate", without, digits, *AS_STORED, "--json").stdout)
    found = json.loads(run("evaluate", "net.pth", digits, "--json").stdout)
    assert (plain["classes_stored"], found["classes_stored"]) == (False, True)
    assert found["accuracy"] == plain["accuracy"] > 0.9
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert found["classes"] == [str(digit) for digit in order]
    for row, digit in enumerate(order):
        assert found["class_accuracy"][row] == plain["class_accuracy"][digit]
        assert found["confusion"][row] == [plain["confusion"][digit][other] for other in order]


def test_a_part_of_the_classes_is_enough_if_their_names_are_stored(run: Run, digits: Path) -> None:
    save(DIGITS)
    for digit in "0124789":
        (digits / digit).rename(digits.parent / f"without {digit}")
    result = run("evaluate", "net.pth", digits)
    assert result.exit_code == 0, result.output
    assert "7 of 10 classes have no images here" in text_of(result.stdout)
    assert re.findall(r"^ *(\d) +2 ", result.stdout, re.MULTILINE) == ["3", "5", "6"]
    found = json.loads(run("evaluate", "net.pth", digits, "--json").stdout)
    assert (found["images"], found["class_accuracy"][0], len(found["class_accuracy"])) == (6, None, 10)
    # Without names, nothing tells which outputs these folders are.
    refused = run("evaluate", save_plain_network(Path("plain.pth")), digits, *AS_STORED)
    assert_refused(refused, "VGG has 10 outputs, but there are 3 classes")
    assert (
        "The checkpoint stores no class names: the 3 folders, sorted by name, are assumed to match its outputs"
        in text_of(refused.stderr)
    )


def test_the_table_names_what_a_class_is_taken_for(run: Run, digits: Path) -> None:
    wrong = "1023456789"  # the network says 0 for a one, and 1 for a zero
    save(tuple(wrong))
    result = run("evaluate", "net.pth", digits)
    assert re.search(r"^ *0 +2 +0 +0.00% +1 \(2\)", result.stdout, re.MULTILINE), result.stdout
    assert re.search(r"^ *9 +2 +2 +100.00% +-", result.stdout, re.MULTILINE), result.stdout
    assert result.stdout.splitlines()[-1].startswith("Accuracy 80.00% on 20 images, loss ")


def test_val_is_taken_from_the_folder_that_finetune_takes_and_the_command_says_so(run: Run, digits: Path) -> None:
    save(DIGITS)
    (digits.parent / "data").mkdir()
    digits.rename(digits.parent / "data" / "val")
    result = run("evaluate", "net.pth", digits.parent / "data")
    assert result.exit_code == 0, result.output
    assert f"Images: 20 from {digits.parent / 'data' / 'val'}." in result.stderr
    note = "If these images were used to select the checkpoint, expect lower accuracy on new images."
    assert note in text_of(result.stderr)
    assert note in text_of(run("evaluate", "net.pth", digits.parent / "data" / "val").stderr)
    (digits.parent / "data" / "val").rename(digits.parent / "train")
    trained = text_of(run("evaluate", "net.pth", digits.parent / "train").stderr)
    assert note.replace("select", "train") in trained
    few = run("evaluate", "net.pth", digits.parent / "train", "--images", 3, "--quiet")
    assert few.stdout.startswith("Accuracy ")
    assert " on 3 images" in few.stdout
    assert few.stdout.count("\n") == 1
    assert few.stderr == ""


def test_folders_of_other_classes_are_refused(run: Run, digits: Path) -> None:
    save(tuple("abcdefghij"))
    assert_refused(
        run("evaluate", "net.pth", digits),
        "has folders that are not classes of the network: 0, 1, 2, 3, 4 and 5 more",
        "its classes are a, b, c, d, e and 5 more",
    )


def test_what_cannot_be_evaluated_is_one_message(run: Run, digits: Path) -> None:
    save(DIGITS)
    assert_refused(run("evaluate", "net.pth", "nowhere"), "nowhere does not exist; the layout is CLASS/IMAGE, or")
    assert_refused(run("evaluate", "net.pth", digits / "0"), "has no class folders; the layout is")
    assert_refused(run("evaluate", "missing.pth", digits), "there is no file missing.pth")
    refused = run("evaluate", "net.pth", digits, "--device", "abacus")
    assert_refused(refused, "'abacus' is not a device; use 'cpu'")
    (digits / "3" / "bad.png").write_bytes(b"no picture")
    assert_refused(run("evaluate", "net.pth", digits, "--strict"), "cannot read", "bad.png")
    assert f"Skipped 1 unreadable file: {digits / '3' / 'bad.png'}: " in run("evaluate", "net.pth", digits).stderr


def test_outputs_that_are_not_finite_fail_both_commands(run: Run, digits: Path) -> None:
    network = demo_network()
    with torch.no_grad():
        network.classifier[-1].bias[0] = torch.nan
    save(DIGITS, network=network)
    evaluated = run("evaluate", "net.pth", digits)
    assert evaluated.exit_code == 1
    assert "Outputs are not finite" in text_of(evaluated.stdout)
    assert json.loads(run("evaluate", "net.pth", digits, "--json").stdout)["loss"] is None
    predicted = run("predict", "net.pth", digits)
    assert predicted.exit_code == 1
    assert "the outputs for 20 images are not finite" in predicted.stderr
    (first, *_) = sorted((digits / "3").iterdir())
    assert "the outputs for 1 image are not finite, which makes" in text_of(run("predict", "net.pth", first).stderr)
    assert " on 1 image, loss" in text_of(run("evaluate", "net.pth", digits, "--images", 1).stdout)


# The confusion matrix as a picture


def test_a_picture_that_cannot_be_written_is_refused_before_the_work(run: Run, digits: Path) -> None:
    save(DIGITS)
    Path("old.png").write_text("old")
    words = ("evaluate", "missing.pth", digits, "--confusion")
    assert_refused(run(*words, "m.jpg"), "use a name that ends in .png, .svg or .pdf")
    assert_refused(run(*words, "none/m.png"), "the folder", "does not exist; create it first")
    assert_refused(run(*words, "old.png"), "old.png already exists", "--force")
    assert Path("old.png").read_text() == "old"
    result = run("evaluate", "net.pth", digits, "--confusion", "old.png", "--force")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(" Wrote old.png.\n")
    assert Path("old.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_charts")
def test_classes_that_the_picture_shows_by_number_are_named(
    run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bn_insert.report.confusion._families", lambda _: (["DejaVu Sans"], {"\u732b"}))
    (digits / "3").rename(digits / "\u732b")
    save((*DIGITS[:3], "\u732b", *DIGITS[4:]))
    result = run("evaluate", "net.pth", digits, "--confusion", "m.png")
    assert result.exit_code == 0, result.output
    assert "no installed font has all characters of their names: #3 \u732b. --json has the names" in text_of(
        result.stderr
    )


# Predict


def test_predict_prints_one_line_for_each_image_sorted_by_path(run: Run, digits: Path) -> None:
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    save(names)
    result = run("predict", "net.pth", digits)
    assert result.exit_code == 0, result.output
    paths = sorted(digits.rglob("*.png"))
    lines = result.stdout.splitlines()
    assert len(lines) == len(paths) == 20
    for line, path in zip(lines, paths, strict=True):
        assert re.fullmatch(rf"{re.escape(str(path))}: {names[int(path.parent.name)]} \d+\.\d\d%", line), line
    assert run("predict", "net.pth", digits, "--quiet").stdout == result.stdout


def test_predict_takes_one_image_and_prints_as_many_classes_as_asked_for(run: Run, digits: Path) -> None:
    save(DIGITS)
    image = sorted((digits / "4").iterdir())[0]
    lines = run("predict", "net.pth", image, "--top", 3).stdout.splitlines()
    assert len(lines) == 1
    assert re.search(r": 4 [\d.]+%, \d [\d.]+%, \d [\d.]+%$", lines[0])
    found = json.loads(run("predict", "net.pth", image, "--top", 99, "--json").stdout)
    assert (found["device"], found["skipped"]) == ("cpu" if not torch.cuda.is_available() else "cuda", [])
    (row,) = found["predictions"]
    assert row["path"] == str(image)
    assert [row["classes"][0][key] for key in ("class", "label")] == ["4", 4]
    assert sum(each["probability"] for each in row["classes"]) == pytest.approx(1)
    assert len(row["classes"]) == 10


def test_without_stored_names_classes_are_numbers_and_the_command_says_so(run: Run) -> None:
    torch.save(torch.rand(3, 3, 32, 32), "x.pt")
    result = run("predict", save_plain_network(Path("plain.pth")), "x.pt")
    assert result.exit_code == 0, result.output
    assert "the classes are numbered from 0" in text_of(result.stderr)
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == ["x.pt[0]", "x.pt[1]", "x.pt[2]"]


def test_what_cannot_be_predicted_is_one_message(run: Run, digits: Path) -> None:
    with pytest.warns(UserWarning, match="9 class names for the 10 outputs of classifier.6"):
        save(DIGITS[:9])
    assert_refused(run("predict", "net.pth", digits), "has 10 outputs, but there are 9 classes")
    assert_refused(run("predict", "net.pth", "none.png"), "none.png does not exist")
    assert_refused(run("predict", "net.pth", digits, "--top", 0), "Invalid value for '--top'")


def test_both_commands_take_other_architectures(run: Run, digits: Path) -> None:
    Path("nets_dense.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, 10))\n"
    )
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10)
    )
    save_checkpoint(network, "net.pth", transform=IDENTITY_TRANSFORM.to_dict(), classes=DIGITS)
    for command in ("evaluate", "predict"):
        result = run(command, "net.pth", digits, "--model", "nets_dense:make")
        assert result.exit_code == 0, result.output


@pytest.mark.filterwarnings("ignore:ignoring 1 tensor")
def test_commands_that_use_a_network_take_the_key_of_its_state_dict(run: Run, digits: Path) -> None:
    torch.save({"best": demo_network().state_dict() | {"total_ops": torch.zeros(1)}, "epoch": 3}, "network.pth")
    found = ("--key", "best", "--ignore-unexpected")
    Path("labelled").mkdir()
    for part in ("train", "val"):
        Path("labelled", part).symlink_to(digits)
    for words in (
        ("predict", "network.pth", digits),
        ("evaluate", "network.pth", digits),
        ("compare", "network.pth", save_plain_network(Path("plain.pth")), digits),  # which needs no key
        ("compare", "network.pth", "network.pth", digits),
        ("compare-modes", "network.pth", digits),  # refused later: no BatchNorm
        ("finetune", "network.pth", "labelled", "--output-dir", "runs", "--train", "batchnorm"),  # the same
    ):
        refused, accepted = run(*words, *AS_STORED), run(*words, *found, *AS_STORED)
        assert "its keys are best" in text_of(refused.output)
        assert "its keys are" not in text_of(accepted.output)
        assert accepted.exit_code == (0 if words[0] in ("predict", "evaluate", "compare") else 2), accepted.output


@pytest.mark.parametrize("name", ["best.pth", "last.pth"])
def test_a_checkpoint_of_a_run_without_a_complete_epoch_is_explained(run: Run, digits: Path, name: str) -> None:
    Path("run").mkdir()
    Path("run/state.pth").touch()
    assert_refused(
        run("evaluate", f"run/{name}", digits),
        f"run/{name} does not exist: the run in run has no complete epoch yet; continue it with `bn-insert finetune",
    )
    Path("run/metrics.csv").touch()  # it has been moved or removed
    assert_refused(run("evaluate", f"run/{name}", digits), f"there is no file run/{name}")
