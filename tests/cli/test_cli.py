"""The command line, as a user types it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import bn_insert.surgery.insert
from bn_insert import BNInsertError
from bn_insert.checkpoints.load import load_checkpoint
from bn_insert.checkpoints.read import read_settings
from bn_insert.checkpoints.save import save_checkpoint
from bn_insert.demo import images_path, network_path
from bn_insert_cli.app import app

AS_IT_IS = ("--resize", "0", "--crop", "0", "--mean", "0", "--std", "1", "-j", "0")

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A folder of 20 of the demo's images, two a class."""
    folder = tmp_path / "digits"
    for number in range(10):
        (folder / str(number)).mkdir(parents=True)
        for image in sorted((images_path() / str(number)).iterdir())[:2]:
            shutil.copy(image, folder / str(number))
    return folder


def images_of(folder: Path) -> Tensor:
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.png"))]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def assert_refused(result: Result, *wording: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    for words in wording:
        assert words in re.sub(r"\s+", " ", result.stderr)
    assert "Traceback" not in result.output


def small_vgg(features: tuple[int | str, ...] = (8, "M", 8, 8, "M"), classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    convs = torchvision.models.vgg.make_layers(list(features))
    model = torchvision.models.VGG(convs, num_classes=classes, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(
        nn.Linear(32, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, classes)
    )
    return model.eval()


def test_insert_writes_a_checkpoint_whose_outputs_are_equal_bit_for_bit(run: Run, digits: Path) -> None:
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS)
    assert result.exit_code == 0, result.output
    x = images_of(images_path())[::7]
    assert torch.equal(load_checkpoint("out.pth")(x), load_checkpoint(network_path())(x))
    assert "features.0" in result.stdout
    assert "classifier.3" in result.stdout
    assert "8 BatchNorm layers inserted" in result.stdout


def test_compare_finds_the_result_bit_identical(run: Run, digits: Path) -> None:
    run("insert", network_path(), digits, "-o", "out.safetensors", *AS_IT_IS)
    result = run("compare", network_path(), "out.safetensors", digits)
    assert result.exit_code == 0, result.output
    assert "equal bit for bit" in result.stdout


def test_compare_exits_with_1_past_the_tolerance(run: Run, digits: Path) -> None:
    model = load_checkpoint(network_path())
    with torch.no_grad():
        model.classifier[-1].bias[3] += 0.01
    save_checkpoint(model, digits.parent / "other.pth")
    loose = run("compare", network_path(), "other.pth", digits, *AS_IT_IS, "--rtol", "1", "--atol", "0.02")
    assert loose.exit_code == 0, loose.output
    for bound in (("--atol", "0.005", "--rtol", "1"), ("--rtol", "1e-5")):
        strict = run("compare", network_path(), "other.pth", digits, *AS_IT_IS, *bound)
        assert strict.exit_code == 1
        assert "differ by more than the tolerance" in strict.stdout


def test_insert_writes_nothing_and_exits_with_1_when_its_own_check_fails(
    run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget_eps(*arguments: object, **keywords: object) -> nn.Module:
        norm = exact(*arguments, **keywords)  # type: ignore[arg-type]
        nn.init.ones_(norm.weight)
        return norm

    exact = bn_insert.surgery.insert.identity_batchnorm
    monkeypatch.setattr(bn_insert.surgery.insert, "identity_batchnorm", forget_eps)
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS)
    assert result.exit_code == 1
    assert "nothing was written" in result.stdout
    assert not Path("out.pth").exists()


def test_preprocessing_is_remembered_beside_the_checkpoint(run: Run, digits: Path) -> None:
    run("insert", network_path(), digits, "-o", "first.pth", *AS_IT_IS)
    result = run("insert", "first.pth", digits, "-o", "second.pth", "--layers", "dense", "--include-output")
    assert result.exit_code == 0, result.output
    settings = read_settings("second.pth")
    assert settings is not None
    assert settings.transform is not None
    assert settings.transform["mean"] == [0.0]


def test_conv_alone_gives_torchvisions_own_batchnorm_network(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = torchvision.models.vgg11(num_classes=10).eval()
    torch.save(original.state_dict(), tmp_path / "vgg11.pth")
    torch.save(torch.randn(4, 3, 40, 40), tmp_path / "inputs.pt")
    result = run("insert", "vgg11.pth", "inputs.pt", "-o", "vgg11-bn.pth", "--layers", "conv")
    assert result.exit_code == 0, result.output
    theirs = torchvision.models.vgg11_bn(num_classes=10).eval()
    theirs.load_state_dict(torch.load("vgg11-bn.pth"), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(theirs(x), original(x))


def test_a_checkpoint_with_batchnorm_everywhere_has_nothing_to_insert(run: Run, digits: Path) -> None:
    run("insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS)
    result = run("insert", "out.pth", digits, "-o", "again.pth", *AS_IT_IS)
    assert_refused(result, "nothing to insert", "already followed by a normalization: features.0, features.4")
    assert not Path("again.pth").exists()


def test_dense_layers_of_a_network_with_conv_batchnorm_can_be_added(run: Run, digits: Path) -> None:
    run("insert", network_path(), digits, "-o", "conv.pth", "--layers", "conv", *AS_IT_IS)
    result = run("insert", "conv.pth", digits, "-o", "both.pth")
    assert result.exit_code == 0, result.output
    assert "2 BatchNorm layers inserted" in result.stdout


@pytest.mark.parametrize("source", ["inputs.pt", "inputs.npy", "inputs.safetensors"])
def test_a_tensor_file_is_taken_as_it_is(run: Run, digits: Path, source: str) -> None:
    x = images_of(digits)
    if source.endswith(".npy"):
        np.save(source, x.numpy())
    elif source.endswith(".pt"):
        torch.save(x, source)
    else:
        from safetensors.torch import save_file  # noqa: PLC0415

        save_file({"images": x.contiguous()}, source)
    result = run("insert", network_path(), source, "-o", "out.pth")
    assert result.exit_code == 0, result.output


def test_the_report_says_what_was_done(run: Run, digits: Path) -> None:
    result = run(
        "insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS, "--report", "r.json", "--skip", "features.1*"
    )
    assert result.exit_code == 0, result.output
    report = json.loads(Path("r.json").read_text())
    assert report["comparisons"]["cpu"]["bit_identical"] is True
    assert report["calibration"]["images"] == 20
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert len(layers["features.0"]["batchnorm"]["mean"]) == 16
    assert layers["features.11"]["reason"] == "skipped by pattern"
    assert len(report["output"]["sha256"]) == 64


def test_the_report_says_how_far_train_mode_is_from_eval_mode(run: Run, digits: Path) -> None:
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS, "--report", "r.json", "--equalize")
    assert result.exit_code == 0, result.output
    found = json.loads(Path("r.json").read_text())["train_mode"]
    assert [(each["batch_size"], each["images"]) for each in found["agreements"]] == [(4, 20), (8, 16), (16, 16)]
    assert found["reading"] in re.sub(r"\s+", " ", result.stderr)
    # The same figures by the command of its own, which reads images and preprocessing as insert did.
    alone = run("compare-modes", "out.pth", digits, "--batch-sizes", "4,16", "-j", 0)
    assert alone.exit_code == 0, alone.output
    for each in (found["agreements"][0], found["agreements"][2]):
        assert f"{each['top1_agreement']:.2%}" in alone.stdout
        assert f"{each['kl_divergence']:.3g}" in alone.stdout


def test_the_report_is_a_page_by_its_suffix(run: Run, digits: Path) -> None:
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS, "--report", "r.html", "-b", 5)
    assert result.exit_code == 0, result.output
    text = Path("r.html").read_text()
    assert text.startswith("<!doctype html>")
    assert text.count("<figure") == 5
    again = run("insert", network_path(), digits, "-o", "other.pth", *AS_IT_IS, "--report", "r.html")
    assert_refused(again, "r.html already exists", "--force")
    assert not Path("other.pth").exists()
    assert Path("r.html").read_text() == text


def test_a_report_of_another_suffix_is_refused_before_the_work(run: Run, digits: Path) -> None:
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS, "--report", "r.pdf")
    assert_refused(result, "cannot write the report to r.pdf: use a name that ends in .html or .json")
    assert list(Path().iterdir()) == [digits.relative_to(Path.cwd())]


def test_a_report_that_fails_leaves_the_checkpoint_and_says_so(
    run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_data: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bn_insert.report.page.page", fail)
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS, "--report", "r.html")
    assert_refused(result, "r.html: No space left on device; out.pth is written and whole")
    assert not Path("r.html").exists()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in load_checkpoint("out.pth").modules()) == 6


def test_interrupted_while_train_mode_is_measured_the_checkpoint_is_there(
    run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_arguments: object, **_keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bn_insert.train_mode_agreement", interrupt)
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS, "--report", "r.html")
    assert_refused(result, "interrupted; out.pth is written and whole, the report r.html is not", code=130)
    assert "nothing was written" not in result.stderr
    load_checkpoint("out.pth")


def test_a_classifier_of_nan_has_a_report_without_train_mode(run: Run, digits: Path) -> None:
    model = load_checkpoint(network_path())
    with torch.no_grad():
        model.classifier[0].weight.fill_(torch.nan)
    save_checkpoint(model, digits.parent / "features.pth")
    result = run("insert", "features.pth", digits, "-o", "out.pth", *AS_IT_IS, "--layers", "conv", "--report", "r.json")
    assert result.exit_code == 0, result.output
    found = json.loads(Path("r.json").read_text())["train_mode"]
    assert found["agreements"] == []
    assert "logits are not finite in eval mode" in found["reading"]


def test_compare_modes_refuses_what_it_cannot_measure(run: Run, digits: Path) -> None:
    assert_refused(
        run("compare-modes", network_path(), digits, *AS_IT_IS),
        "has no BatchNorm that normalizes by the batch in train mode",
    )
    assert_refused(
        run("compare-modes", network_path(), digits, *AS_IT_IS, "--batch-sizes", "4,many"),
        "is not an integer or several",
    )


def test_a_report_that_would_replace_the_checkpoint_is_refused(run: Run, digits: Path) -> None:
    Path("r.json").symlink_to("out.pth")
    assert_refused(
        run("insert", network_path(), digits, "-o", "out.pth", "--report", "r.json", *AS_IT_IS),
        "the checkpoint is written there; choose another name",
    )
    assert not Path("out.pth").exists()


def test_a_report_with_the_name_of_the_checkpoint_is_written_beside_it(run: Run, digits: Path) -> None:
    result = run("insert", network_path(), digits, "-o", "out.pth", "--report", "out.json", *AS_IT_IS)
    assert result.exit_code == 0, result.output
    assert json.loads(Path("out.json").read_text())["format"] == "bn-insert report"
    assert read_settings("out.pth") is not None


def test_a_json_file_beside_the_output_is_never_touched(run: Run, digits: Path) -> None:
    Path("out.json").write_bytes(b'{"mine": 1}\n// \xe9\n')
    for force in ((), ("--force",)):
        result = run("insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS, *force)
        assert result.exit_code == 0, result.output
    assert Path("out.json").read_bytes() == b'{"mine": 1}\n// \xe9\n'


def test_inspect_shows_every_layer_and_why_one_gets_no_batchnorm(run: Run) -> None:
    result = run("inspect", network_path(), "--layers", "conv")
    assert result.exit_code == 0, result.output
    for words in ("features.13", "64 x 64 x 3 x 3", "inserted after features.13", "dense layers are not selected"):
        assert words in result.stdout


def test_inspect_on_a_batchnorm_network_names_the_normalization(run: Run, digits: Path) -> None:
    run("insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS)
    result = run("inspect", "out.pth")
    assert "already followed by a normalization: features.1" in re.sub(r"\s+", " ", result.stdout)
    assert "output layer" in result.stdout


def test_demo_runs_start_to_finish(run: Run, tmp_path: Path) -> None:
    result = run("demo")
    assert result.exit_code == 0, result.output
    assert "8 BatchNorm layers inserted" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_torchvision_name_fetches_the_imagenet_weights(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = small_vgg(classes=1000).state_dict()
    asked = []

    def fake_download(url: str, **_: object) -> dict[str, Tensor]:
        asked.append(url)
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fake_download)
    torch.save(torch.rand(4, 3, 32, 32), tmp_path / "x.pt")
    result = run("insert", "vgg16", "x.pt", "-o", "out.pth")
    assert result.exit_code == 0, result.output
    assert asked[0].endswith(torchvision.models.VGG16_Weights.DEFAULT.url.rsplit("/", 1)[-1])


def test_a_features_only_network_with_a_nan_classifier_works_for_conv(run: Run, tmp_path: Path) -> None:
    model = small_vgg()
    for parameter in model.classifier.parameters():
        nn.init.constant_(parameter, torch.nan)
    torch.save(model.state_dict(), tmp_path / "features.pth")
    torch.save(torch.rand(4, 3, 32, 32), tmp_path / "x.pt")
    result = run("insert", "features.pth", "x.pt", "-o", "out.pth", "--layers", "conv")
    assert result.exit_code == 0, result.output
    assert "compared before it" in result.stderr
    assert_refused(run("insert", "features.pth", "x.pt", "-o", "both.pth"), "classifier.0.weight", "NaN")
    assert not Path("both.pth").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(run: Run, tmp_path: Path, value: float) -> None:
    model = small_vgg()
    with torch.no_grad():
        model.features[3].weight[0, 0, 0, 0] = value
    torch.save(model.state_dict(), tmp_path / "bad.pth")
    torch.save(torch.rand(4, 3, 32, 32), tmp_path / "x.pt")
    assert_refused(run("insert", "bad.pth", "x.pt", "-o", "out.pth"), "features.3.weight", "NaN or Inf")
    assert not Path("out.pth").exists()


class Payload:
    """A pickle that runs code when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_code_in_a_pickle_is_never_run(run: Run, digits: Path) -> None:
    Path("evil.pth").write_bytes(pickle.dumps({"features.0.weight": Payload()}, protocol=2))
    torch.save({"state_dict": Payload()}, "evil-zip.pth")
    for name in ("evil.pth", "evil-zip.pth"):
        assert_refused(run("insert", name, digits, "-o", "out.pth", *AS_IT_IS), name)
    assert not Path("executed").exists()


def bad_checkpoints(folder: Path) -> dict[str, str]:
    """Make files that are no checkpoints; return what the message must say of each."""
    whole = network_path().read_bytes()
    (folder / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pth").write_text("not a checkpoint")
    (folder / "empty.pth").touch()
    torch.save({"conv1.weight": torch.zeros(4, 3, 3, 3)}, folder / "no-vgg.pth")
    (folder / "folder.pth").mkdir()
    return {
        "missing.pth": "missing.pth",
        "truncated.pth": "truncated.pth",
        "text.pth": "text.pth",
        "empty.pth": "empty.pth",
        "no-vgg.pth": "conv1",
        "folder.pth": "folder.pth",
        "vgg12": "vgg12",
    }


@pytest.mark.parametrize("command", ["insert", "inspect", "compare"])
def test_a_bad_checkpoint_gets_one_message_and_exit_code_2(run: Run, digits: Path, command: str) -> None:
    for name, wording in bad_checkpoints(digits.parent).items():
        rest = {"insert": (digits, "-o", "out.pth"), "compare": (network_path(), digits), "inspect": ()}[command]
        assert_refused(run(command, name, *rest), "error:", wording)
    assert not Path("out.pth").exists()


def test_bad_calibration_sets_get_one_message_and_exit_code_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "note.txt").write_text("no image")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"\xff\xd8\xff no image")
    torch.save(torch.rand(3, 32, 32), tmp_path / "three.pt")
    torch.save(torch.rand(2, 1, 32, 32), tmp_path / "grey.pt")
    torch.save(torch.rand(1, 3, 32, 32), tmp_path / "one.pt")
    np.save(tmp_path / "empty.npy", np.zeros((0, 3, 32, 32), np.float32))
    cases = {
        "missing": "does not exist",
        "empty": "no image",
        "texts": "no image",
        "broken": "a.jpg",
        "three.pt": "3 x 32 x 32",
        "grey.pt": "takes C = 3",
        "one.pt": "two values per channel",
        "empty.npy": "empty.npy",
    }
    for source, wording in cases.items():
        assert_refused(run("insert", network_path(), source, "-o", "out.pth", *AS_IT_IS), "error:", wording)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == []


def test_unreadable_images_are_skipped_and_counted_or_with_strict_an_error(run: Run, digits: Path) -> None:
    (digits / "0" / "broken.png").write_bytes(b"no image")
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS)
    assert result.exit_code == 0, result.output
    assert "1 unreadable" in result.stderr
    assert "broken.png" in result.stderr
    strict = run("insert", network_path(), digits, "-o", "strict.pth", *AS_IT_IS, "--strict")
    assert_refused(strict, "broken.png")
    assert not Path("strict.pth").exists()


def test_an_output_that_exists_is_kept_without_force(run: Run, digits: Path) -> None:
    Path("out.pth").write_text("precious")
    assert_refused(run("insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS), "out.pth", "exists", "--force")
    assert Path("out.pth").read_text() == "precious"
    assert run("insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS, "--force").exit_code == 0
    assert len(load_checkpoint("out.pth").features) > 16


@pytest.mark.parametrize("output", ["nowhere/out.pth", "out.onnx", "."])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(run: Run, digits: Path, output: str) -> None:
    assert_refused(run("insert", network_path(), digits, "-o", output, *AS_IT_IS), "cannot write")


@pytest.mark.parametrize(
    ("arguments", "wording"),
    [
        (("--layers", "pool"), "conv, dense"),
        (("--skip", "nothing.*"), "nothing.*"),
        (("--mean", "a"), "--mean"),
        (("--std", "0"), "std"),
        (("--mean", "0,0"), "mean"),
        (("--placement", "sideways"), "sideways"),
        (("--batch-size", "0"), "batch-size"),
        (("--device", "abacus"), "abacus"),
        (("--device", "meta"), "meta"),
        (("--momentum", "2"), "momentum"),
    ],
)
def test_bad_options_get_exit_code_2(run: Run, digits: Path, arguments: tuple[str, ...], wording: str) -> None:
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS, *arguments)
    assert_refused(result, wording)
    assert not Path("out.pth").exists()


@pytest.mark.parametrize("command", ["insert", "inspect", "compare", "demo"])
def test_every_help_has_an_example(run: Run, command: str) -> None:
    assert f"Example: bn-insert {command}" in re.sub(r"\s+", " ", run(command, "--help").stdout)


def test_every_error_of_ours_is_one_class() -> None:
    import bn_insert  # noqa: PLC0415

    errors = [value for name, value in vars(bn_insert).items() if name.endswith("Error")]
    assert len(errors) > 3
    assert all(issubclass(error, BNInsertError) for error in errors)


# The installed command, away from the checkout.

INSTALLED = Path(sys.executable).with_name("bn-insert")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def test_the_installed_command_works_away_from_the_checkout(tmp_path: Path, digits: Path) -> None:
    command = [INSTALLED, "insert", network_path(), digits, "-o", "out.pth", *AS_IT_IS]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.pth").exists()


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    script = """
import sys
from bn_insert_cli.app import app
try:
    app(['insert', '--help'])
except SystemExit:
    assert 'torch' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_from_outside_leaves_nothing_behind(tmp_path: Path, stop: signal.Signals, code: int) -> None:
    torch.save(torch.rand(20000, 3, 32, 32), tmp_path / "x.pt")
    command = [INSTALLED, "insert", network_path(), "x.pt", "-o", "out.pth", "--images", "1000000", "-b", "8"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(5)  # into the work: importing torch takes most of it
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
