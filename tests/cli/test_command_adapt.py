"""`bn-insert adapt`: the checkpoint it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.models import VGG

from bn_insert import insert_batchnorm, load_checkpoint, save_checkpoint
from bn_insert.demo import network_path
from support.commands import AS_STORED, Run, assert_refused, text_of
from support.digits import IDENTITY_TRANSFORM, copy_digits, save_plain_network
from support.networks import images, small_vgg


@pytest.fixture
def dark(digits: Path) -> Path:
    """The digits once more, with less contrast, in class folders."""
    folder = digits.with_name("dark")
    for file in sorted(digits.rglob("*.png")):
        copy = folder / file.relative_to(digits)
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).point(lambda value: 60 + value // 5).save(copy)
    return folder


def test_adapt_writes_a_network_with_the_originals_keys_and_prints_the_accuracy_by_class(
    run: Run, digits: Path, dark: Path
) -> None:
    result = run("adapt", network_path(), digits, dark, "-o", "out.pth", "--report", "out.json", *AS_STORED)
    assert result.exit_code == 0, result.output
    adapted, original = load_checkpoint("out.pth"), load_checkpoint(network_path())
    assert isinstance(adapted, VGG)
    assert adapted.state_dict().keys() == original.state_dict().keys()
    assert not torch.equal(adapted.features[0].weight, original.features[0].weight)
    assert "Accuracy on the target" in result.stdout
    assert "Wrote out.pth: adapted to 20 images." in result.stdout
    row = r"^ *features\.0 +16 +0\.\d+ +0\.\d\d \(0\.\d+ \.\. "
    assert re.search(row, result.stdout, re.MULTILINE), result.stdout
    assert "std factor: std on the target / std on the source, of the median channel" in text_of(result.stdout)
    assert "agrees with the original" in text_of(result.stderr)
    data = json.loads(Path("out.json").read_text())
    before, after = (sum(each[name] for each in data["predictions"]["per_class"]) for name in ("before", "after"))
    assert after >= before + 2, "of ten classes"
    assert (data["source"]["images"], data["target"]["images"]) == (20, 20)
    assert [shift["layer"] for shift in data["shifts"]][:2] == ["features.0", "features.3"]


def test_the_preprocessing_of_source_is_shown_where_target_is_a_tensor_file(run: Run, digits: Path) -> None:
    torch.save(torch.rand(16, 3, 32, 32), "target.pt")
    result = run("adapt", network_path(), digits, "target.pt", "-o", "out.pth", *AS_STORED)
    assert result.exit_code == 0, result.output
    shown = text_of(result.stderr)
    assert "Preprocessing: no resizing; no crop; mean 0; std 1 (from the options" in shown
    assert "The values of the tensor file target.pt are used unchanged." in shown


def test_the_page_has_a_chart_of_the_shift_and_the_verdicts(run: Run, digits: Path, dark: Path) -> None:
    result = run("adapt", network_path(), digits, dark, "-o", "out.pth", "--report", "out.html", *AS_STORED)
    assert result.exit_code == 0, result.output
    page = Path("out.html").read_text()
    assert 'id="chart-shift"' in page
    assert 'id="chart-ratio"' in page
    assert "network.pth adapted to dark" in page
    assert "Accuracy by class" in page


def test_keep_batchnorm_writes_a_network_to_fine_tune(run: Run, digits: Path, dark: Path) -> None:
    result = run("adapt", network_path(), digits, dark, "-o", "out.pth", "--keep-batchnorm", *AS_STORED)
    assert result.exit_code == 0, result.output
    assert "with 8 BatchNorm layers" in result.stdout
    assert "features.1.running_mean" in load_checkpoint("out.pth").state_dict()


def test_a_checkpoint_with_batchnorm_needs_no_source(run: Run) -> None:
    save_checkpoint(insert_batchnorm(small_vgg(), [images(16, 16)]), "bn.pth")
    torch.save(0.2 * images(40, 16), "target.pt")
    result = run("adapt", "bn.pth", "target.pt", "-o", "out.pth")
    assert result.exit_code == 0, result.output
    assert torch.load("out.pth").keys() == torch.load("bn.pth").keys()


def test_a_source_for_a_checkpoint_with_batchnorm_is_said_not_to_be_needed(run: Run, digits: Path, dark: Path) -> None:
    assert run("insert", network_path(), digits, "-o", "bn.pth", *AS_STORED).exit_code == 0
    result = run("adapt", "bn.pth", digits, dark, "-o", "out.pth")
    assert result.exit_code == 0, result.output
    note = "No BatchNorm was inserted, so SOURCE is used only to judge the result: features.0, features.4"
    assert note in text_of(result.stderr)
    assert "(already followed by a normalization); " in text_of(result.stderr)
    assert "insertion compared" not in result.stdout


def copied(folder: Path) -> Path:
    """Return a copy of a folder: SOURCE and TARGET must not be the same."""
    return Path(shutil.copytree(folder, folder.with_name("copied")))


def test_images_of_the_same_kind_are_said_to_gain_little(run: Run, digits: Path) -> None:
    result = run("adapt", network_path(), digits, copied(digits), "-o", "out.pth", *AS_STORED)
    assert result.exit_code == 0, result.output
    assert "Nothing was adapted: the statistics of the target differ from those of the source" in text_of(result.stderr)


def test_folders_that_are_not_the_networks_classes_are_not_taken_for_labels(run: Run, digits: Path, dark: Path) -> None:
    for name in "3456789":
        for file in (dark / name).iterdir():
            file.rename(dark / "0" / f"{name}-{file.name}")
        (dark / name).rmdir()
    plain = save_plain_network(Path("plain.pth"))
    result = run("adapt", plain, digits, dark, "-o", "out.pth", *AS_STORED)
    assert result.exit_code == 0, result.output
    assert "dark has 3 folders, and the network has 10 classes" in text_of(result.stderr)
    assert "Accuracy" not in result.stdout
    assert "Accuracy: Not measured; probably better than before" in text_of(result.stderr)


def test_a_single_folder_with_the_name_of_a_class_has_labels(run: Run, digits: Path, dark: Path) -> None:
    (dark / "3").rename("threes")
    (Path("target")).mkdir()
    Path("threes").rename("target/3")
    result = run("adapt", network_path(), digits, "target", "-o", "out.pth", *AS_STORED)
    assert result.exit_code == 0, result.output
    assert re.search(r"^ *3 +2 +", result.stdout, re.MULTILINE), result.stdout
    assert "after, on 2 labeled target images." in text_of(result.stderr)


def test_a_class_folder_without_images_is_no_label(run: Run, digits: Path, dark: Path) -> None:
    target = Path("target")
    (target / "3").mkdir(parents=True)
    for number, image in enumerate(sorted(dark.rglob("*.png"))):
        image.rename(target / f"{number}.png")
    result = run("adapt", network_path(), digits, target, "-o", "out.pth", *AS_STORED)
    assert result.exit_code == 0, result.output
    assert "Accuracy: Not measured; " in text_of(result.stderr)


def test_folders_are_matched_by_name_with_the_classes_in_the_checkpoint(run: Run, digits: Path, dark: Path) -> None:
    names = [f"digit {number}" for number in reversed(range(10))]  # sorted, in the wrong order
    names[9] = "zero"  # the network's class 9 is nobody's folder
    model = load_checkpoint(network_path())
    model.classifier[-1].weight.data = model.classifier[-1].weight.data.flip(0)
    model.classifier[-1].bias.data = model.classifier[-1].bias.data.flip(0)
    save_checkpoint(model, "net.pth", transform=IDENTITY_TRANSFORM.to_dict(), classes=names)
    for folder in list(digits.iterdir()):
        folder.rename(digits / f"digit {folder.name}")
    result = run("adapt", "net.pth", digits, copied(digits), "-o", "out.pth", "-j", 0)
    assert result.exit_code == 0, result.output
    assert re.search(r"^ *digit 9 +2 +100.0% +100.0%", result.stdout, re.MULTILINE), result.stdout
    assert re.search(r"^ *all +18 +100.0%", result.stdout, re.MULTILINE), result.stdout
    assert "are not counted in the accuracy: digit 0." in text_of(result.stderr)
    other = run("adapt", "net.pth", digits, dark, "-o", "other.pth", "-j", 0)
    assert other.exit_code == 0, other.output
    message = "dark (0, 1, 2, 3, 4 and 5 more) do not match the class names stored in the checkpoint (digit 9, "
    assert message in text_of(other.stderr)
    assert "Accuracy" not in other.stdout


def test_preprocessing_is_suspected_where_the_network_only_guesses(run: Run, digits: Path) -> None:
    result = run("adapt", network_path(), digits, copied(digits), "-o", "out.pth", "-j", 0, "--mean", 30, "--std", 9)
    assert result.exit_code == 0, result.output
    message = (
        "Neither is much better than guessing among 10 classes (10.0%). Check the preprocessing (--resize, --crop, "
        "--mean"
    )
    assert message in text_of(result.stderr)


def test_unreadable_images_are_skipped_and_an_image_alone_is_enough(run: Run, digits: Path, dark: Path) -> None:
    first, *others = sorted(dark.rglob("*.png"))
    for file in others:
        file.write_bytes(b"not an image")
    result = run("adapt", network_path(), digits, dark, "-o", "dark.pth", *AS_STORED)
    assert result.exit_code == 0, result.output
    assert "Skipped 19 unreadable files: " in text_of(result.stderr)
    assert "nothing was adapted" not in result.stdout
    first.write_bytes((digits / first.relative_to(dark)).read_bytes())
    result = run("adapt", network_path(), digits, dark, "-o", "out.pth", *AS_STORED)
    assert result.exit_code == 0, result.output
    assert "which may be due to chance with 1 target image. If the target is of the kind" in text_of(result.stderr)
    assert "nothing to gain; if not, use more images." in text_of(result.stderr)
    assert "Wrote out.pth: nothing was adapted." in result.stdout
    assert run("compare", network_path(), "out.pth", digits, *AS_STORED).exit_code == 0
    first.write_bytes(b"")
    assert_refused(
        run("adapt", network_path(), digits, dark, "-o", "again.pth", *AS_STORED), "none of the 20 image files"
    )
    assert not Path("again.pth").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("dark",), "as SOURCE (bn-insert adapt CHECKPOINT SOURCE TARGET)"),
        (("digits", "dark", "dark"), "3 folders were given; pass SOURCE and TARGET"),
        (("digits", "missing"), "missing does not exist"),
        (
            ("digits", "dark", "--momentum", "0.5"),
            "error: leave out --momentum, which matters only to BatchNorms that stay",
        ),
        (("digits", "dark", "--report", "out.pth"), "use a name that ends in .html or .json"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_written(
    run: Run, digits: Path, dark: Path, words: tuple[str, ...], message: str
) -> None:
    folders = {"digits": digits, "dark": dark}
    arguments = [folders.get(word, word) for word in words]
    assert_refused(run("adapt", network_path(), *arguments, "-o", "out.pth", *AS_STORED), message)
    assert not Path("out.pth").exists()


def test_a_failed_check_writes_nothing_and_exits_with_1(run: Run, digits: Path, dark: Path) -> None:
    result = run("adapt", network_path(), digits, dark, "-o", "out.pth", "--atol", "0", *AS_STORED)
    assert result.exit_code == 1
    assert "nothing was written" in result.stdout
    assert not Path("out.pth").exists()


def test_an_existing_file_is_replaced_with_force_alone(run: Run, tmp_path: Path, digits: Path) -> None:
    few = copy_digits(tmp_path / "few", 1)
    Path("out.pth").write_text("precious")
    command = ("adapt", network_path(), digits, few, "-o", "out.pth", *AS_STORED)
    assert_refused(run(*command), "out.pth")
    assert Path("out.pth").read_text() == "precious"
    assert run(*command, "--force").exit_code == 0


@pytest.mark.parametrize("keep", [(), ("--keep-batchnorm", "--layers", "conv")])
def test_an_adapted_file_says_so_and_a_source_for_it_is_warned_of(
    run: Run, digits: Path, dark: Path, keep: tuple[str, ...]
) -> None:
    words = ("adapt", network_path(), digits, dark, "-o", "out.pth", *keep, *AS_STORED)
    first = run(*words)
    assert first.exit_code == 0 and "already adapted" not in first.stderr
    assert "inserted; adapted to 20 images" in text_of(run("inspect", "out.pth").stdout)
    again = run("adapt", "out.pth", dark, digits, "-o", "again.pth")
    assert again.exit_code == 0, again.output
    assert "warning: Source: This network was already adapted to 20 images: SOURCE must be" in text_of(again.stderr)


def test_source_and_target_that_are_the_same_are_refused(run: Run, digits: Path) -> None:
    link = digits.with_name("link")
    link.symlink_to(digits)
    for other in (digits, link, digits / ".." / digits.name):
        refused = run("adapt", network_path(), digits, other, "-o", "out.pth", *AS_STORED)
        assert_refused(refused, "are the same folder; pass images of the kind that the network was trained on")
        assert refused.exit_code == 2
    torch.save(torch.rand(4, 3, 32, 32), "x.pt")
    assert_refused(run("adapt", network_path(), "x.pt", "./x.pt", "-o", "out.pth"), "are the same file;")


def test_a_failed_check_on_images_of_one_gray_names_the_layers(run: Run, digits: Path) -> None:
    Path("gray").mkdir()
    for number in range(16):
        Image.new("L", (32, 32), 128).save(f"gray/{number}.png")
    result = run("adapt", network_path(), digits, "gray", "-o", "out.pth", "--rtol", 0, *AS_STORED)
    assert result.exit_code == 1, result.output
    said = text_of(result.stderr)
    assert re.search(r"warning: the activations of .*classifier\.\d.* hardly vary on the target images", said), said
    assert "or leave out these layers (--skip " in said


def test_a_single_image_is_refused_with_the_ways_that_help(run: Run, digits: Path) -> None:
    torch.save(torch.rand(1, 3, 32, 32), "one.pt")
    words = ("-o", "out.pth", "--no-shrink", *AS_STORED)
    refused = run("adapt", network_path(), digits, "one.pt", *words)
    assert_refused(refused, "TARGET: a variance needs", "(--layers conv), or leave out --no-shrink")
    assert_refused(run("adapt", network_path(), "one.pt", digits, *words), "SOURCE: dense layer classifier.0: a")


def test_the_folder_that_has_the_class_folders_is_suggested(run: Run, digits: Path, dark: Path) -> None:
    target = digits.with_name("target")
    for part in ("train", "val"):
        shutil.copytree(dark, target / part)
    for network in (network_path(), save_plain_network(Path("plain.pth"))):
        result = run("adapt", network, digits, target, "-o", "out.pth", "--force", *AS_STORED)
        assert result.exit_code == 0, result.output
        said = f"{target} has its class folders in train and val; to measure it, pass {target / 'val'}."
        assert said in text_of(result.stderr)


def test_folders_that_differ_from_classes_in_case_are_hinted_at(run: Run, digits: Path, dark: Path) -> None:
    names = [f"digit{number}" for number in range(10)]
    save_checkpoint(load_checkpoint(network_path()), "net.pth", transform=IDENTITY_TRANSFORM.to_dict(), classes=names)
    for number in range(10):
        (dark / f"{number}").rename(dark / f"Digit{number}")
    result = run("adapt", "net.pth", digits, dark, "-o", "out.pth", "-j", 0)
    assert "upper and lower case matter: rename Digit0 to digit0, Digit1 to digit1," in text_of(result.stderr)
    for number in range(1, 10):
        (dark / f"Digit{number}").rename(dark / f"digit{number}")
    result = run("adapt", "net.pth", digits, dark, "-o", "other.pth", "-j", 0)
    assert "in the accuracy: Digit0; upper and lower case matter: rename Digit0 to digit0." in text_of(result.stderr)


def test_a_tolerance_that_is_not_reached_is_said_for_source_and_target(run: Run, digits: Path, dark: Path) -> None:
    words = ("adapt", network_path(), digits, dark, "-o", "out.pth", "-b", 2, *AS_STORED)
    result = run(*words, "--tolerance", "0.0001")
    assert result.exit_code == 0, result.output
    for which in ("source", "target"):
        assert f"The tolerance 0.0001 was not reached on {which} images: use more images" in text_of(result.stderr)
    assert "target images, with an error" not in run(*words, "--force").stderr


def test_few_source_images_are_put_down_to_an_option_that_limits_them(run: Run, digits: Path, dark: Path) -> None:
    for count, hint in ((10, "use at least 128 (see --images)."), (20, "use at least 128. ")):
        result = run("adapt", network_path(), digits, dark, "-o", f"{count}.pth", "--images", count, *AS_STORED)
        assert "With so few source images, " in text_of(result.stderr)
        assert hint in text_of(result.stderr)
    assert "Maximum number of images of SOURCE, and of TARGET" in text_of(run("adapt", "--help").stdout)
