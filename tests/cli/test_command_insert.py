"""`bn-insert insert`: the checkpoint it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

import bn_insert.surgery.insert
from bn_insert import load_checkpoint
from bn_insert.checkpoints.read_file import read_checkpoint
from bn_insert.demo import images_path, network_path
from support.commands import AS_STORED, Run, assert_refused, text_of
from support.digits import images_of
from support.networks import narrow_vgg, small_vgg


def test_insert_writes_a_checkpoint_whose_outputs_are_equal_bit_for_bit(run: Run, digits: Path) -> None:
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED)
    assert result.exit_code == 0, result.output
    x = images_of(images_path())[::7]
    assert torch.equal(load_checkpoint("out.pth")(x), load_checkpoint(network_path())(x))
    assert "features.0" in result.stdout
    assert "classifier.3" in result.stdout
    assert "8 BatchNorm layers inserted" in result.stdout


def test_insert_writes_nothing_and_exits_with_1_when_its_own_check_fails(
    run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget_eps(*arguments: object, **keywords: object) -> nn.Module:
        norm = exact(*arguments, **keywords)  # type: ignore[arg-type]
        nn.init.ones_(norm.weight)
        return norm

    exact = bn_insert.surgery.insert.identity_batchnorm
    monkeypatch.setattr(bn_insert.surgery.insert, "identity_batchnorm", forget_eps)
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED)
    assert result.exit_code == 1
    assert "nothing was written" in result.stdout
    assert not Path("out.pth").exists()


def test_preprocessing_is_remembered_beside_the_checkpoint(run: Run, digits: Path) -> None:
    run("insert", network_path(), digits, "-o", "first.pth", *AS_STORED)
    result = run("insert", "first.pth", digits, "-o", "second.pth", "--layers", "dense", "--include-output")
    assert result.exit_code == 0, result.output
    settings = read_checkpoint("second.pth").settings
    assert settings is not None
    assert settings.transform is not None
    assert settings.transform["mean"] == [0.0]


def test_conv_alone_gives_torchvisions_own_batchnorm_network(run: Run, tmp_path: Path) -> None:
    original = narrow_vgg("vgg11")
    torch.save(original.state_dict(), tmp_path / "vgg11.pth")
    torch.save(torch.randn(4, 3, 40, 40), tmp_path / "inputs.pt")
    result = run("insert", "vgg11.pth", "inputs.pt", "-o", "vgg11-bn.pth", "--layers", "conv")
    assert result.exit_code == 0, result.output
    theirs = narrow_vgg("vgg11_bn")
    theirs.load_state_dict(torch.load("vgg11-bn.pth"), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(theirs(x), original(x))


def test_a_default_preprocessing_that_no_images_were_read_with_is_not_stored(run: Run) -> None:
    torch.save(small_vgg().state_dict(), "network.pth")
    for name in ("inputs.pt", "others.pt"):
        torch.save(torch.rand(8, 3, 16, 16), name)
    for command in (
        ("insert", "network.pth", "inputs.pt", "-o", "bn.pth"),
        ("fold", "bn.pth", "inputs.pt", "-o", "folded.pth"),
        ("fold", "bn.pth", "-o", "unseen.pth"),
        ("adapt", "network.pth", "inputs.pt", "others.pt", "-o", "adapted.pth"),
    ):
        assert run(*command).exit_code == 0
        settings = read_checkpoint(command[command.index("-o") + 1]).settings
        assert settings is None or settings.transform is None
    assert run("insert", "network.pth", "inputs.pt", "-o", "as-passed.pth", "--crop", "16").exit_code == 0
    stored = read_checkpoint("as-passed.pth").settings
    assert stored and stored.transform and stored.transform["crop"] == 16


def test_a_checkpoint_with_batchnorm_everywhere_has_nothing_to_insert(run: Run, digits: Path) -> None:
    run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED)
    result = run("insert", "out.pth", digits, "-o", "again.pth", *AS_STORED)
    assert_refused(result, "and nothing was written: features.0, features.4", "(already followed by a normalization); ")
    assert not Path("again.pth").exists()


def test_dense_layers_of_a_network_with_conv_batchnorm_can_be_added(run: Run, digits: Path) -> None:
    run("insert", network_path(), digits, "-o", "conv.pth", "--layers", "conv", *AS_STORED)
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


def test_a_torchvision_name_fetches_the_imagenet_weights(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = small_vgg().state_dict()
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
        assert_refused(run("insert", network_path(), source, "-o", "out.pth", *AS_STORED), "error:", wording)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == []


def test_unreadable_images_are_skipped_and_counted_or_with_strict_an_error(run: Run, digits: Path) -> None:
    (digits / "0" / "broken.png").write_bytes(b"no image")
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED)
    assert result.exit_code == 0, result.output
    assert "Skipped 1 unreadable file: " in result.stderr
    assert "broken.png" in result.stderr
    strict = run("insert", network_path(), digits, "-o", "strict.pth", *AS_STORED, "--strict")
    assert_refused(strict, "broken.png")
    assert not Path("strict.pth").exists()


def test_an_output_that_exists_is_kept_without_force(run: Run, digits: Path) -> None:
    Path("out.pth").write_text("precious")
    assert_refused(run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED), "out.pth", "exists", "--force")
    assert Path("out.pth").read_text() == "precious"
    assert run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED, "--force").exit_code == 0
    assert len(load_checkpoint("out.pth").features) > 16


@pytest.mark.parametrize("output", ["nowhere/out.pth", "out.onnx", "."])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(run: Run, digits: Path, output: str) -> None:
    assert_refused(run("insert", network_path(), digits, "-o", output, *AS_STORED), "cannot write")


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
        (("--seed", "-3"), "seed"),
        (("--eps", "0"), "--eps must be a finite number"),
    ],
)
def test_bad_options_get_exit_code_2(run: Run, digits: Path, arguments: tuple[str, ...], wording: str) -> None:
    result = run("insert", network_path(), digits, "-o", "out.pth", *AS_STORED, *arguments)
    assert_refused(result, wording)
    assert not Path("out.pth").exists()


@pytest.mark.parametrize("suffix", [".pt", ".npy"])
def test_integers_in_a_tensor_file_are_used_unscaled_with_a_warning(run: Run, suffix: str) -> None:
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    for name, values in (("integers", pixels), ("numbers", pixels / 255)):
        if suffix == ".npy":
            np.save(f"{name}.npy", values.numpy())
        else:
            torch.save(values, f"{name}.pt")
    warned = run("insert", network_path(), f"integers{suffix}", "-o", "a.pth", "-b", 2)
    assert warned.exit_code == 0
    warning = f"warning: integers{suffix} contains torch.uint8, whose values are used without scaling."
    assert text_of(warned.stderr).count(warning) == 1
    assert "without scaling" not in run("insert", network_path(), f"numbers{suffix}", "-o", "b.pth").stderr
