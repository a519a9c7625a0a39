"""`bn-insert compare` and `bn-insert compare-modes`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bn_insert import load_checkpoint, save_checkpoint
from bn_insert.checkpoints.model_option import make_network
from bn_insert.demo import network_path
from bn_insert.images import Transform
from support.commands import AS_STORED, Run, assert_refused, text_of
from support.digits import save_plain_network


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


def test_a_key_for_compare_has_to_be_in_one_of_the_files(run: Run, digits: Path) -> None:
    plain = save_plain_network(Path("plain.pth"))
    torch.save({"best": torch.load(plain)}, "best.pth")
    result = run("compare", plain, "best.pth", digits, *AS_STORED, "--key", "best")
    assert result.exit_code == 0, result.output
    refused = run("compare", plain, plain, digits, *AS_STORED, "--key", "best")
    assert_refused(refused, "plain.pth is a state dict itself; leave out --key")
    assert_refused(run("inspect", "vgg16", "--key", "best"), "vgg16 is a network of torchvision; leave out --key")


NET_WITH_A_MODEL = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x)


class NetWithHead(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.model(x))
"""


@pytest.mark.parametrize("function", ["Net", "NetWithHead"])
def test_compare_tells_a_key_from_an_attribute_of_the_network(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    Path("nets_with_a_model.py").write_text(NET_WITH_A_MODEL)
    options = ("--model", f"nets_with_a_model:{function}", "--key", "model")
    torch.save({"model": make_network(options[1]).state_dict()}, "net.pth")
    torch.save(torch.rand(8, 3, 8, 8), "x.pt")
    inserted = run("insert", "net.pth", "x.pt", "-o", "out.pth", *options)
    assert inserted.exit_code == 0, inserted.output
    for files in (("net.pth", "out.pth"), ("out.pth", "net.pth")):
        compared = run("compare", *files, "x.pt", *options)
        assert compared.exit_code == 0, compared.output
    assert_refused(run("compare", "out.pth", "out.pth", "x.pt", *options), "error: out.pth")


def test_compare_takes_the_preprocessing_of_a_where_b_stores_none(run: Run, digits: Path) -> None:
    plain = save_plain_network(Path("plain.pth"))
    for mean, name in ((0.25, "one.pth"), (0.5, "two.pth")):
        transform = Transform(None, None, (mean,), (1.0,)).to_dict()
        save_checkpoint(load_checkpoint(network_path()), name, transform=transform)
    for files, wording in (
        (("one.pth", plain), "mean 0.25; std 1 (from one.pth)."),
        (("one.pth", "two.pth"), "mean 0.5; std 1 (from two.pth)."),
        ((plain, plain), "(ImageNet's, the default: the checkpoint stores none)."),
        (("one.pth", plain, "--std", 2), "std 2 (--std from the options, the rest from one.pth; one.pth stores "),
    ):
        result = run("compare", *files[:2], digits, "--images", 2, "-j", 0, *files[2:])
        assert result.exit_code == 0, result.output
        assert wording in text_of(result.stderr)


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
