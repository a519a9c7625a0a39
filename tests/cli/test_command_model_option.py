"""`--model package.module:function`, as a user types it, with a network of the user's own in the current folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bn_insert import load_checkpoint
from bn_insert.checkpoints.read_file import read_checkpoint
from bn_insert.demo import network_path
from bn_insert.images import Transform, open_batches
from support.commands import AS_STORED, INSTALLED, Run, assert_refused, run, run_process, text_of
from support.digits import copy_labelled_digits

MODEL = ("--model", "my_nets:make")

NETS = """
import itertools

import torch.nn.functional as F
from torch import nn

numbers = itertools.count(1)  # no two of them are as close as random numbers may be


class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.features = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.hidden = nn.Linear(8, 12)
        self.drop = nn.Dropout(0.2)
        self.classifier = nn.Linear(12, classes)

    def forward(self, x):
        x = self.features(F.relu(self.conv(x))).mean((2, 3))
        return self.classifier(self.drop(F.relu(self.hidden(x))))


class Random(Net):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5))


class RandomElsewhere(Net):
    def forward(self, x):
        return super().forward(x * next(numbers))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.dense = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        return [self.conv(x)]


def make():
    return Net()


def make_random():
    return Random()


def make_random_elsewhere():
    return RandomElsewhere()


def make_seven():
    return Net(7)


def broken():
    raise OSError("no weights\\nand more")
"""


@pytest.fixture(name="run")
def run_with_own_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a command line in a folder with my_nets.py, net.pth, encoder.pth and backwards.pth."""
    (tmp_path / "my_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    nets: dict[str, type] = {}
    exec(NETS, nets)
    for name in ("Net", "Encoder"):
        torch.save(nets[name]().state_dict(), f"{name.lower()}.pth")
    yield run
    sys.modules.pop("my_nets", None)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_labelled_digits(tmp_path_factory.mktemp("digits"))


@pytest.mark.usefixtures("no_charts")
def test_every_command_goes_on_from_what_the_one_before_wrote(run: Run, digits: Path) -> None:
    inserted = run("insert", "net.pth", digits / "train", "-o", "bn.pth", "--equalize", *AS_STORED, *MODEL)
    assert inserted.exit_code == 0, inserted.output
    assert "3 BatchNorm layers inserted" in inserted.stdout
    architecture = json.loads(torch.load("bn.pth")._metadata[""]["bn_insert"])["architecture"]
    assert architecture["function"] == "my_nets:make"
    assert [site["anchor"] for site in architecture["changes"][0]["insert"]] == ["conv", "features.0", "hidden"]
    compared = run("compare", "net.pth", "bn.pth", digits / "val", *MODEL)
    assert "equal bit for bit" in compared.stdout, compared.output
    shown = run("inspect", "bn.pth", "--size", 32, *MODEL)
    assert "already followed by a normalization: conv.1" in text_of(shown.stdout)
    copy_labelled_digits(Path("four"), classes=4)  # fewer than the network's ten
    trained = run("finetune", "bn.pth", "four", "--output-dir", "run", "--epochs", 1, "-b", 8, "-j", 0, *MODEL)
    assert trained.exit_code == 0, trained.output
    resumed = run(
        *("finetune", "bn.pth", "four", "--output-dir", "run", "--epochs", 2, "-b", 8, "-j", 0, "--resume"), *MODEL
    )
    assert resumed.exit_code == 0, resumed.output
    folded = run("fold", "run/best.pth", "-o", "plain.safetensors", *MODEL)
    assert folded.exit_code == 0, folded.output
    compared = run("compare", "run/best.pth", "plain.safetensors", "four", *MODEL, "--rtol", "1e-4")
    assert compared.exit_code == 0, compared.output
    assert load_checkpoint("plain.safetensors", model="my_nets:make").classifier.out_features == 4


def test_the_installed_command_works_away_from_the_checkout_and_finds_code_in_the_current_folder(
    run: Run, digits: Path, tmp_path: Path
) -> None:
    assert run  # made the files
    command = (INSTALLED, "insert", "net.pth", digits / "val", "-o", "out.pth", *AS_STORED, *MODEL)
    done = run_process(*command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 BatchNorm layers inserted" in done.stdout
    said = ("Preprocessing: ", "Calibrated on ", "With so few images, ", "Dropout before BatchNorm: ")
    assert [line for line in done.stderr.splitlines() if not line.startswith(said)] == []  # the end is quiet too
    assert (tmp_path / "out.pth").exists()


def test_a_checkpoint_that_names_its_function_is_not_read_without_it(run: Run, digits: Path) -> None:
    run("insert", "net.pth", digits / "val", "-o", "bn.pth", *AS_STORED, *MODEL)
    sys.modules.pop("my_nets")
    for command in (
        ("insert", "bn.pth", digits / "val", "-o", "out.pth"),
        ("inspect", "bn.pth"),
        ("fold", "bn.pth", "-o", "out.pth"),
        ("finetune", "bn.pth", digits, "--output-dir", "out"),
        ("compare", network_path(), "bn.pth", digits / "val"),
    ):
        assert_refused(run(*command), "bn.pth: its settings name the function", "pass --model my_nets:make")
    assert "my_nets" not in sys.modules
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize(
    "command",
    [
        ("insert", "net.pth", "val", "-o", "out.pth"),
        ("compare", "net.pth", "net.pth", "val"),
        ("adapt", "net.pth", "train", "val", "-o", "out.pth"),
        ("fold", "net.pth", "val", "-o", "out.pth"),
    ],
    ids=lambda command: command[0],
)
def test_where_the_forward_is_random_it_is_said_and_pytorch_s_random_numbers_are_those_of_the_original(
    run: Run, digits: Path, command: tuple[str, ...]
) -> None:
    words = [digits / word if word in {"train", "val"} else word for word in command]
    if command[0] == "fold":
        assert run("insert", "net.pth", digits / "val", "-o", "bn.pth", *AS_STORED, *MODEL).exit_code == 0
        shutil.move("bn.pth", "net.pth")
    failed = run(*words, *AS_STORED[:-2], "--model", "my_nets:make_random_elsewhere")
    assert failed.exit_code == 1, failed.output
    assert "the outputs of net.pth itself differ between two runs on the same inputs" in text_of(failed.stderr)
    assert "The outputs differ by more than --rtol 0.0001 allows" in text_of(failed.stdout)
    done = run(*words, *AS_STORED[:-2], "--model", "my_nets:make_random")
    assert done.exit_code == 0, done.output
    assert "the forward of net.pth draws random numbers in eval mode" in text_of(done.stderr)
    assert "check that F.dropout gets training=self.training" in text_of(done.stderr)


def test_compare_takes_two_architectures_and_torchvision_s_names_need_none(
    run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = run("compare", network_path(), "net.pth", digits / "val", *AS_STORED, "--model-b", "my_nets:make")
    assert compared.exit_code == 1, compared.output
    assert "differ by more than --rtol 0.0001 allows" in compared.stdout
    assert "random" not in compared.stderr
    monkeypatch.setattr(
        "bn_insert.torchvision_checkpoint",
        lambda _name: read_checkpoint(network_path()),
    )
    for pair in (("vgg16", "net.pth"), ("net.pth", "vgg16")):
        compared = run("compare", *pair, digits / "val", *AS_STORED, *MODEL)
        assert compared.exit_code == 1, compared.output
    assert_refused(run("compare", "vgg16", "vgg11", digits / "val", *MODEL), "vgg16 is a network of torchvision")
    assert_refused(
        run("inspect", "vgg16", *MODEL), "vgg16 is a network of torchvision", "--model is for checkpoint files"
    )


@pytest.mark.parametrize(
    ("function", "wording"),
    [
        ("make", "'make' does not name a function; write package.module:function"),
        ("my_nets.py:make", "write my_nets:make"),
        ("their_nets:make", "there is no module their_nets to import"),
        ("my_nets:mak", "the module my_nets has no mak"),
        ("my_nets:nn", "my_nets:nn is a module, not a function that returns a network"),
        ("my_nets:F.relu", "cannot be called without arguments"),
        ("my_nets:broken", "my_nets:broken raised OSError: no weights"),
        (
            "my_nets:make_seven",
            "net.pth: the checkpoint does not fit Net: classifier.weight is (10, 12) in the file and",
        ),
        ("my_nets:Encoder", "net.pth: the checkpoint does not fit Encoder"),
        ("builtins:dict", "builtins:dict returned a dict, not a torch.nn.Module"),
    ],
)
def test_a_function_that_gives_no_network_for_the_checkpoint_is_one_message(
    run: Run, function: str, wording: str
) -> None:
    assert_refused(run("inspect", "net.pth", "--model", function), wording)


def test_a_checkpoint_that_is_no_vgg_says_how_to_name_its_architecture(run: Run) -> None:
    assert_refused(run("inspect", "net.pth"), "this is not a VGG", "pass --model package.module:function")


def test_finetune_says_what_is_no_classifier(run: Run, digits: Path) -> None:
    command = ("finetune", "encoder.pth", digits, "--output-dir", "run", "-b", 8, *AS_STORED)
    result = run(*command, "--device", "cpu", "--model", "my_nets:Encoder")
    assert_refused(result, "Encoder returns a list for a batch of 2 images instead of one logit for each of 10")
    assert not Path("run").exists()


@pytest.mark.usefixtures("no_charts")
def test_features_of_an_own_network_can_be_frozen(run: Run, digits: Path) -> None:
    run("insert", "net.pth", digits / "val", "-o", "bn.pth", *AS_STORED, *MODEL)
    command = ("finetune", "bn.pth", digits, "--output-dir", "run", "--epochs", 1, "-b", 8, "-j", 0, *MODEL)
    result = run(*command, "--freeze-features", "--device", "cpu")
    assert result.exit_code == 0, result.output


NETS_OF_OTHER_SHAPES = """
import torch
from torch import nn


def tail(dims, last):
    pool = {1: nn.AdaptiveAvgPool1d, 3: nn.AdaptiveAvgPool3d}[dims]
    return [nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(last, 5), nn.ReLU(), nn.Linear(5, 2)]


def signals():
    return nn.Sequential(nn.Conv1d(2, 4, 3), *tail(1, 4))


def volumes():
    return nn.Sequential(nn.Conv3d(1, 4, 3), *tail(3, 4))


def of_32_pixels():
    return nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 14 * 14, 10))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.conv = nn.Embedding(10, 4), nn.Conv2d(3, 4, 3)
        self.hidden, self.output = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, left, right):
        return self.output(self.hidden(self.conv(left).mean((2, 3)) + self.embedding(right)).relu())


class ByName(TwoInputs):
    def forward(self, left, *, right):
        return super().forward(left, right)


class ByPosition(TwoInputs):
    def forward(self, left, right, /):
        return super().forward(left, right)


class OfADict(TwoInputs):
    def forward(self, inputs: dict):
        return super().forward(inputs["left"], inputs["right"])


class WithOwnConv(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), OwnConv(), nn.Flatten(), nn.Linear(64, 2))


class OwnConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4, 3, 3) - 0.5)

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x):
        return self.layers(x)


class ColorsToGray(nn.Module):
    def __init__(self, channels=1):
        super().__init__()
        self.last, self.first = nn.Conv2d(8, 8, 3), nn.Conv2d(channels, 8, 3)
        self.output = nn.Linear(8, 2)

    def before(self, x):
        return x.mean(1, keepdim=True)

    def forward(self, x):
        return self.output(self.last(self.first(self.before(x)).relu()).relu().mean((2, 3)))


class DeclaredLate(ColorsToGray):
    def __init__(self):
        super().__init__(3)

    def before(self, x):
        return x


class UnshuffledPixels(ColorsToGray):
    def __init__(self):
        super().__init__(12)

    def before(self, x):
        return nn.functional.pixel_unshuffle(x, 2)


class WithCoordinates(ColorsToGray):
    def __init__(self):
        super().__init__(4)

    def before(self, x):
        rows = torch.linspace(-1, 1, x.shape[2])[:, None].expand(len(x), 1, *x.shape[2:])
        return torch.cat([x, rows], 1)


class OfOwnConv(ColorsToGray):
    def __init__(self):
        super().__init__(4)
        self.stem = nn.Parameter(torch.rand(4, 3, 3, 3) - 0.5)

    def before(self, x):
        return nn.functional.conv2d(x, self.stem)


class CallsDropout(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(6, 2))

    def forward(self, x):
        return self[2](self[1](nn.functional.dropout(self[0](x).mean((2, 3)), 0.25, self.training)).relu())


class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.hidden, self.output = nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.output(self.hidden(self.conv(x).mean((2, 3), keepdim=True).squeeze()).relu())
"""


OF_COLORS = ("ColorsToGray", "DeclaredLate", "UnshuffledPixels", "WithCoordinates", "OfOwnConv")


@pytest.fixture
def shapes(run: Run) -> Run:
    """Run commands in a folder with functions that build networks of other inputs, and their checkpoints."""
    Path("nets_of_other_shapes.py").write_text(NETS_OF_OTHER_SHAPES)
    namespace: dict[str, Any] = {}
    exec(NETS_OF_OTHER_SHAPES, namespace)
    names = ("signals", "volumes", "of_32_pixels", "TwoInputs", "WithOwnConv", "CallsDropout", "Squeezed", "Dense")
    for name in (*names, *OF_COLORS):
        torch.save(namespace[name]().state_dict(), f"{name}.pth")
    return run


def of_other_shapes(name: str) -> tuple[str, str]:
    return "--model", f"nets_of_other_shapes:{name}"


@pytest.mark.parametrize(("name", "shape"), [("signals", (6, 2, 20)), ("volumes", (6, 1, 6, 6, 6))])
def test_signals_and_volumes_in_a_tensor_file_are_inputs_too(shapes: Run, name: str, shape: tuple[int, ...]) -> None:
    torch.save(torch.rand(shape), "x.pt")
    for words in (
        ("insert", f"{name}.pth", "x.pt", "-o", "bn.pth"),
        ("compare", f"{name}.pth", "bn.pth", "x.pt"),
        ("inspect", "bn.pth"),
        ("fold", "bn.pth", "x.pt", "-o", "folded.pth"),  # without x.pt, on 8 random volumes of 224 x 224 x 224
        ("predict", "folded.pth", "x.pt"),
    ):
        result = shapes(*words, *of_other_shapes(name))
        assert result.exit_code == 0, result.output
    Path("images").mkdir()
    Image.new("RGB", (8, 8)).save("images/x.png")
    refused = shapes("insert", f"{name}.pth", "images", "-o", "other.pth", *of_other_shapes(name))
    assert_refused(refused, f"takes inputs with {len(shape) - 2} dimensions after the channels, not images; save them")


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize("name", OF_COLORS)
def test_images_are_read_in_color_whatever_the_first_conv_that_is_declared_takes(shapes: Run, name: str) -> None:
    for folder in ("images/train/a", "images/train/b", "images/val/a", "images/val/b"):
        Path(folder).mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8) // torch.tensor([8, 4, 1])
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(f"{folder}/{number}.png")
    (batch,) = open_batches("images", Transform(None, None, (0,), (1,)))
    torch.save(batch.images, "colors.pt")
    model, means = of_other_shapes(name), []
    for source in ("images", "colors.pt"):
        result = shapes("insert", f"{name}.pth", source, "-o", "bn.pth", "--force", *AS_STORED, *model)
        assert result.exit_code == 0, result.output
        means.append(torch.load("bn.pth")["first.1.running_mean"])
    assert torch.allclose(*means, rtol=0, atol=1e-5)
    if name != OF_COLORS[0]:
        return  # one is enough for the other commands, which find the channels by the same function
    for words in (
        ("inspect", f"{name}.pth"),
        ("predict", "bn.pth", "images", *AS_STORED),
        ("evaluate", "bn.pth", "images", *AS_STORED),
        ("finetune", "bn.pth", "images", "--output-dir", "run", "--epochs", 1, *AS_STORED),
    ):
        result = shapes(*words, *model)
        assert result.exit_code == 0, result.output


def test_a_tensor_file_may_have_any_channels_that_the_network_runs_on(shapes: Run) -> None:
    torch.save(torch.rand(6, 1, 8, 8), "gray.pt")
    torch.save(torch.rand(6, 8, 8, 3), "last.pt")
    words = ("-o", "out.pth", "--force")
    assert shapes("insert", "ColorsToGray.pth", "gray.pt", *words, *of_other_shapes("ColorsToGray")).exit_code == 0
    late = of_other_shapes("DeclaredLate")
    assert_refused(
        shapes("insert", "DeclaredLate.pth", "gray.pt", *words, *late),
        "gray.pt has the shape 6 x 1 x 8 x 8, N x C x H x W, but the network takes C = 3",
    )
    assert_refused(
        shapes("insert", "DeclaredLate.pth", "last.pt", *words, *late),
        "but the network takes C = 3; save tensor.permute(0, 3, 1, 2)",
    )


def test_features_in_a_tensor_file_are_inputs_of_a_network_that_begins_with_a_dense_layer(shapes: Run) -> None:
    torch.save(torch.rand(64, 20), "x.pt")
    torch.save(torch.rand(64, 20), "others.pt")
    torch.save(torch.rand(64, 21), "wider.pt")
    model = of_other_shapes("Dense")
    for words in (
        ("inspect", "Dense.pth"),
        ("insert", "Dense.pth", "x.pt", "-o", "bn.pth"),
        ("compare", "Dense.pth", "bn.pth", "x.pt"),
        ("compare-modes", "bn.pth", "x.pt"),
        ("adapt", "Dense.pth", "x.pt", "others.pt", "-o", "adapted.pth"),
        ("predict", "bn.pth", "x.pt"),
        ("fold", "bn.pth", "-o", "folded.pth"),
    ):
        result = shapes(*words, *model)
        assert result.exit_code == 0, result.output
    assert "checked on 8 random inputs of 20." in text_of(result.stderr)
    refused = shapes("insert", "Dense.pth", "wider.pt", "-o", "out.pth", *model)
    assert_refused(refused, "wider.pt has the shape 64 x 21, N x C, but the network takes C = 20")


@pytest.mark.parametrize(
    ("name", "shape"), [("DeclaredLate", (3, 18, 23)), ("signals", (2, 41)), ("volumes", (1, 7, 8, 9))]
)
def test_the_shape_of_the_inputs_in_a_tensor_file_is_stored_for_checks_without_one(
    shapes: Run, name: str, shape: tuple[int, ...]
) -> None:
    torch.save(torch.rand(9, *shape), "x.pt")
    model, shown = of_other_shapes(name), "x".join(map(str, shape))
    assert shapes("insert", f"{name}.pth", "x.pt", "-o", "bn.pth", *model).exit_code == 0
    folded = shapes("fold", "bn.pth", "-o", "folded.pth", *model)
    assert f"random inputs of {' x '.join(map(str, shape))}." in text_of(folded.stderr), folded.output
    for file in ("bn.pth", "folded.pth"):
        inspected = text_of(shapes("inspect", file, *model).stdout)
        assert f"for an input of {shown} (see --size)" in inspected
        assert f"{shown}, as in the tensor file it was calibrated on" in inspected
    sized = text_of(shapes("inspect", "bn.pth", "--size", 20, *model).stdout)
    assert f"for an input of {'x'.join(map(str, (shape[0], *[20] * (len(shape) - 1))))} (" in sized
    assert json.loads(shapes("inspect", "bn.pth", "--json", *model).stdout)["settings"]["input_shape"] == list(shape)
    assert shapes("adapt", "bn.pth", "x.pt", "-o", "adapted.pth", *model).exit_code == 0
    assert f"for an input of {shown} (" in text_of(shapes("inspect", "adapted.pth", *model).stdout)


def test_the_shape_of_earlier_tensors_is_not_stored_with_a_calibration_on_images(shapes: Run, digits: Path) -> None:
    torch.save(torch.rand(9, 3, 18, 23), "x.pt")
    model = of_other_shapes("DeclaredLate")
    assert shapes("insert", "DeclaredLate.pth", "x.pt", "-o", "bn.pth", *model).exit_code == 0
    adapted = shapes("adapt", "bn.pth", digits / "val", "-o", "adapted.pth", *AS_STORED, *model)
    assert adapted.exit_code == 0, adapted.output
    settings = read_checkpoint("adapted.pth").settings
    assert settings is not None
    assert settings.input_shape == ()


def test_a_size_that_nothing_tells_is_one_that_the_network_runs_on(shapes: Run) -> None:
    torch.save(torch.rand(6, 3, 32, 32), "x.pt")
    model = of_other_shapes("of_32_pixels")
    assert "4x28x28" in shapes("inspect", "of_32_pixels.pth", *model).stdout
    assert (
        shapes("insert", "of_32_pixels.pth", "x.pt", "-o", "bn.pth", "--resize", 0, "--crop", 0, *model).exit_code == 0
    )
    result = shapes("fold", "bn.pth", "-o", "folded.pth", *model)
    assert result.exit_code == 0, result.output
    assert "checked on 8 random inputs of 3 x 32 x 32" in text_of(result.stderr)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_several_inputs_are_a_dict_of_tensors_in_a_file(shapes: Run, suffix: str) -> None:
    inputs = {"left": torch.rand(6, 3, 8, 8), "right": torch.arange(6), "label": torch.zeros(2)}
    for name in ("x", "others"):
        (save_file if suffix == ".safetensors" else torch.save)(inputs, f"{name}{suffix}")
    for words in (
        ("insert", "TwoInputs.pth", f"x{suffix}", "-o", "bn.pth", "-b", 4),
        ("compare", "TwoInputs.pth", "bn.pth", f"x{suffix}", "-b", 4),
        ("fold", "bn.pth", f"x{suffix}", "-o", "folded.pth"),
        ("adapt", "TwoInputs.pth", f"x{suffix}", f"others{suffix}", "-o", "adapted.pth"),
        ("predict", "folded.pth", f"x{suffix}"),
    ):
        result = shapes(*words, *of_other_shapes("TwoInputs"))
        assert result.exit_code == 0, result.output
    assert f"x{suffix}[5]: " in result.stdout
    report = shapes(
        "insert", "TwoInputs.pth", f"x{suffix}", "-o", "b.pth", "--report", "r.html", *of_other_shapes("TwoInputs")
    )
    assert report.exit_code == 0, report.output
    assert "Train mode could not be measured for the report: TwoInputs takes several inputs" in text_of(report.stderr)
    modes = shapes("compare-modes", "bn.pth", f"x{suffix}", *of_other_shapes("TwoInputs"))
    assert_refused(modes, "TwoInputs takes several inputs (left, right): train mode and eval mode can only be compared")
    namespace: dict[str, Any] = {}
    exec(NETS_OF_OTHER_SHAPES, namespace)
    network: Any = load_checkpoint("TwoInputs.pth", model=namespace["TwoInputs"]).double()
    features = network.conv(inputs["left"].double()).mean((2, 3)) + network.embedding(inputs["right"])
    inserted: Any = load_checkpoint("bn.pth", model=namespace["TwoInputs"])
    assert torch.allclose(inserted.hidden[1].running_mean.double(), network.hidden(features).mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["ByName", "ByPosition", "OfADict"])
def test_inputs_that_are_taken_by_name_or_by_position_alone_or_in_a_dict_are_read_from_a_file(
    shapes: Run, name: str
) -> None:
    torch.save({"right": torch.arange(6), "left": torch.rand(6, 3, 8, 8)}, "x.pt")
    outputs = []
    for model in ("TwoInputs", name):
        for words in (
            ("insert", "TwoInputs.pth", "x.pt", "-o", f"{model}-bn.pth"),
            ("predict", f"{model}-bn.pth", "x.pt"),
        ):
            result = shapes(*words, *of_other_shapes(model))
            assert result.exit_code == 0, result.output
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1]
    torch.save(torch.rand(6, 3, 8, 8), "one.pt")
    taken = "and the network takes one" if name == "OfADict" else "and the network takes several inputs (left, right)"
    refused = shapes("insert", "TwoInputs.pth", "one.pt", "-o", "other.pth", *of_other_shapes(name))
    assert_refused(refused, taken)
    taken = "a dict of inputs" if name == "OfADict" else "several inputs (left, right)"
    refused = shapes("inspect", "TwoInputs.pth", *of_other_shapes(name))
    assert_refused(refused, f"{name} takes {taken}: no file says which shapes they have")


def test_several_inputs_that_are_not_there_are_named(shapes: Run) -> None:
    torch.save(torch.rand(4, 3, 8, 8), "x.pt")
    torch.save({"left": torch.rand(4, 3, 8, 8), "rigth": torch.arange(4)}, "mistyped.pt")
    torch.save({"left": torch.rand(4, 3, 8, 8), "right": torch.arange(5)}, "uneven.pt")
    Path("images").mkdir()
    Image.new("RGB", (8, 8)).save("images/x.png")
    model = of_other_shapes("TwoInputs")
    for source, message in {
        "x.pt": "x.pt has no tensor left, and the network takes several inputs (left, right); save a dict",
        "mistyped.pt": "mistyped.pt has no tensor right (it has left, rigth)",
        "uneven.pt": "the shapes left 4 x 3 x 8 x 8, right 5: inputs need the same number of rows",
        "images": "images is not a tensor file, but the network takes several inputs (left, right)",
    }.items():
        assert_refused(shapes("insert", "TwoInputs.pth", source, "-o", "out.pth", *model), message)
    names = "TwoInputs takes several inputs (left, right): "
    assert_refused(shapes("inspect", "TwoInputs.pth", *model), f"{names}no file says which shapes they have")
    assert_refused(
        shapes("fold", "TwoInputs.pth", "-o", "out.pth", *model), f"{names}pass a file with a dict of named tensors"
    )
    for folder in ("classes/train/a", "classes/train/b", "classes/val/a", "classes/val/b"):
        Path(folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(f"{folder}/x.png")
    for command in ("evaluate", "finetune"):
        words = (command, "TwoInputs.pth", "classes", *(["--output-dir", "run"] * (command == "finetune")))
        assert_refused(shapes(*words, *model), f"{names}class folders contain only images")


@pytest.mark.parametrize(
    "words", [("insert", "WithOwnConv.pth", "x.pt"), ("adapt", "WithOwnConv.pth", "x.pt", "others.pt")]
)
def test_layers_that_get_no_batchnorm_for_their_class_are_warned_of(shapes: Run, words: tuple[str, ...]) -> None:
    for name in ("x.pt", "others.pt"):
        torch.save(torch.rand(4, 3, 8, 8), name)
    result = shapes(*words, "-o", "out.pth", *of_other_shapes("WithOwnConv"))
    assert result.exit_code == 0, result.output
    assert "warning: no BatchNorm was inserted after layers that are not modules of torch.nn: 2" in text_of(
        result.stderr
    )


def test_dropout_that_is_a_function_before_a_batchnorm_is_warned_of_even_if_notes_are_left_out(shapes: Run) -> None:
    torch.save(torch.rand(4, 3, 8, 8), "x.pt")
    result = shapes("-q", "insert", "CallsDropout.pth", "x.pt", "-o", "bn.pth", *of_other_shapes("CallsDropout"))
    assert result.exit_code == 0, result.output
    said = "warning: dropout before BatchNorm is called as a function in the forward of CallsDropout with p = 0.25"
    assert said in text_of(result.stderr)


def test_a_network_that_squeezes_a_batch_of_one_is_traced_with_two_images(shapes: Run) -> None:
    torch.save(torch.rand(1, 3, 8, 8), "one.pt")
    torch.save(torch.rand(4, 3, 8, 8), "x.pt")
    words = ("insert", "Squeezed.pth", "one.pt", "-o", "out.pth", *of_other_shapes("Squeezed"))
    assert_refused(
        shapes(*words), "the outputs of layer hidden have the shape (6,), not a batch of 6 channels", "flatten(1)"
    )
    inserted = shapes("insert", "Squeezed.pth", "x.pt", "-o", "bn.pth", *of_other_shapes("Squeezed"))
    assert inserted.exit_code == 0
    assert "with BatchNorm inserted, Squeezed cannot run on a single image: expected 2D or 3D" in text_of(
        inserted.stderr
    )
    compared = shapes("compare", "Squeezed.pth", "bn.pth", "one.pt", *of_other_shapes("Squeezed"))
    assert_refused(compared, "the candidate (Squeezed) failed on batch 0", "use batches of at least two images")
    for network in ("Squeezed.pth", "bn.pth"):
        predicted = shapes("predict", network, "one.pt", *of_other_shapes("Squeezed"))
        assert predicted.exit_code == 0, predicted.output
    words = ("adapt", "Squeezed.pth", "x.pt", "one.pt", "-o", "out.pth", *of_other_shapes("Squeezed"))
    assert_refused(
        shapes(*words), "TARGET: ", "the BatchNorm after hidden needs a batch", "use batches of at least two images"
    )
    folded = shapes("fold", "bn.pth", "x.pt", "-o", "folded.pth", *of_other_shapes("Squeezed"))
    assert "2 BatchNorm layers folded" in folded.stdout
