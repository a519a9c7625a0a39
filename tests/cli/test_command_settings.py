"""Settings of a checkpoint on the command line: `inspect` shows them, and every command reads its file once."""

from __future__ import annotations

import shutil
from importlib import import_module
from io import BufferedReader
from pathlib import Path

import pytest
import torch
from torch import nn

import bn_insert.checkpoints.read_file
from bn_insert import load_checkpoint, save_checkpoint
from bn_insert.demo import images_path, network_path
from bn_insert.images import Transform
from support.commands import AS_STORED, Run, assert_refused, text_of
from support.digits import save_plain_network
from support.networks import randomised
from support.vgg_specs import Conv, Spec, vgg_of

FEW = (*AS_STORED, "--images", "16")


@pytest.fixture
def digits() -> Path:
    return images_path()


def test_inspect_shows_the_settings_of_a_file_or_that_it_has_none(run: Run, digits: Path) -> None:
    plain = save_plain_network(Path("plain.pth"))
    result = run("inspect", plain)
    assert "The file stores no settings" in result.stdout
    assert "dropout with p 0.5 at classifier.2, classifier.5" in text_of(result.stderr)
    run("insert", plain, digits, "-o", "out.pth", *FEW, "--eps", 0.25, "--layers", "conv")
    result = run("inspect", "out.pth")
    assert "Assumed" not in result.stderr  # what was assumed by insert is what the file has
    shown = text_of(result.stdout)
    assert "stored in the file's metadata" in shown
    assert "BatchNorm eps 0.25, momentum 0.1 (6 layers)" in shown
    assert "dropout p 0.5 (2 layers)" in shown
    assert "preprocessing no resizing; no crop; mean 0; std 1" in shown
    assert "classes names not stored" in shown
    assert "changes 6 BatchNorm layers inserted" in shown


def test_settings_from_a_stranger_are_shown_without_markup_and_escapes(run: Run) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    save_checkpoint(model, "x.pth", transform={"[red]": "\x1b[2J", "long": "y" * 10_000})
    Path("nets_here.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))\n"
    )
    result = run("inspect", "x.pth", "--model", "nets_here:make", "--size", 8)
    assert result.exit_code == 0, result.output
    assert "[red] ?[2J" in result.stdout
    assert "\x1b" not in result.stdout
    assert len(result.stdout) < 10_000


def test_a_command_reads_its_checkpoint_once(run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(network_path(), "net.pth")
    read: list[str] = []
    original = bn_insert.checkpoints.read_file.load_torch_file

    def counted(file: BufferedReader, *, mapped: bool) -> object:
        read.append(Path(file.name).name)
        return original(file, mapped=mapped)

    monkeypatch.setattr(bn_insert.checkpoints.read_file, "load_torch_file", counted)
    run("insert", "net.pth", digits, "-o", "out.pth", *FEW)
    run("fold", "out.pth", "-o", "folded.pth")
    run("inspect", "folded.pth")
    assert read == ["net.pth", "out.pth", "folded.pth"]


def test_what_was_inserted_is_folded_alone_on_request(run: Run) -> None:
    save_checkpoint(vgg_of(Spec((Conv(norm="before"), Conv(5)), ())), "net.pth")
    torch.save(torch.rand(8, 3, 8, 8), "x.pt")
    assert run("insert", "net.pth", "x.pt", "-o", "bn.pth").exit_code == 0
    result = run("fold", "bn.pth", "x.pt", "-o", "folded.pth", "--inserted-only")
    assert result.exit_code == 0, result.output
    assert "Wrote folded.pth: 1 BatchNorm layer folded, 1 left in place." in result.stdout
    assert torch.load("folded.pth").keys() == torch.load("net.pth").keys()
    refused = run("fold", "net.pth", "x.pt", "-o", "all.pth", "--inserted-only")
    assert_refused(refused, "net.pth contains no BatchNorm inserted by bn-insert", "without --inserted-only")


@pytest.mark.parametrize("options", [(), ("--inserted-only",)])
def test_a_folded_network_has_nothing_to_fold(run: Run, options: tuple[str, ...]) -> None:
    torch.save(torch.rand(8, 3, 32, 32), "x.pt")
    assert run("insert", network_path(), "x.pt", "-o", "bn.pth").exit_code == 0
    assert run("fold", "bn.pth", "-o", "folded.pth").exit_code == 0
    result = run("fold", "folded.pth", "-o", "again.pth", *options)
    assert_refused(result, "nothing to fold in folded.pth: it has no BatchNorm; nothing was written")


def test_a_failed_check_names_the_tolerances(run: Run) -> None:
    torch.manual_seed(0)
    save_checkpoint(randomised(vgg_of(Spec((Conv(norm="before"), Conv(5)), ()))), "net.pth")
    failed = run("fold", "net.pth", "-o", "folded.pth", "--rtol", 0, "--atol", 1e-12)
    assert failed.exit_code == 1
    assert "The outputs differ by more than --atol 1e-12 and --rtol 0 allows: nothing was written." in failed.stdout


def test_fold_without_batchnorm_says_nothing_of_a_check(run: Run) -> None:
    result = run("fold", network_path(), "-o", "folded.pth")
    assert_refused(result, "nothing to fold in", "it has no BatchNorm; nothing was written")
    assert "the result is checked" not in result.stderr


def test_fold_names_batchnorms_that_are_not_modules_of_torch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("frozen_nets.py").write_text(
        "from torch import nn\n"
        "from torchvision.ops import FrozenBatchNorm2d\n"
        "def frozen(): return nn.Sequential(nn.Conv2d(3, 2, 3), FrozenBatchNorm2d(2), nn.ReLU())\n"
        "def partly(): return nn.Sequential(frozen(), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))\n"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    torch.save(torch.rand(2, 3, 8, 8), "x.pt")
    result = {}
    for name in ("frozen", "partly"):
        network = getattr(import_module("frozen_nets"), name)()
        torch.save(network.state_dict(), f"{name}.pth")
        result[name] = run("fold", f"{name}.pth", "x.pt", "-o", f"{name}-out.pth", "--model", f"frozen_nets:{name}")
    words = "BatchNorms are not modules of torch.nn: 1 (FrozenBatchNorm2d); nothing was written"
    assert_refused(result["frozen"], "nothing to fold in frozen.pth", words)
    assert result["partly"].exit_code == 0, result["partly"].output
    assert "were not folded: 0.1 (FrozenBatchNorm2d)." in text_of(result["partly"].stderr)


def test_a_wrong_transform_is_named_with_its_file_and_can_be_replaced(run: Run, digits: Path) -> None:
    network = load_checkpoint(network_path())
    save_checkpoint(network, "x.pth", transform=Transform(resize=None).to_dict() | {"crop": 16384})
    command = ("insert", "x.pth", digits, "-o", "out.pth", "--resize", 0, "--mean", 0, "--std", 1, "-j", 0)
    assert_refused(
        run(*command), "error: x.pth: the preprocessing in the file's metadata: crop of a transform is 16384"
    )
    assert run(*command, "--crop", 0).exit_code == 0


def test_a_transform_of_another_kind_is_replaced_by_options_that_name_all_of_it(run: Run, digits: Path) -> None:
    stored = Transform(resize=None).to_dict() | {"interpolation": "bicubic"}
    save_checkpoint(load_checkpoint(network_path()), "x.pth", transform=stored)
    command = ("insert", "x.pth", digits, "-o", "out.pth", "--resize", 0, "--crop", 0, "--mean", 0, "-j", 0)
    refused = run(*command)
    assert_refused(refused, "unknown field interpolation; to use another, pass all of --resize, --crop")
    assert run(*command, "--std", 1).exit_code == 0
    assert run("fold", "out.pth", digits, "-o", "folded.pth").exit_code == 0
