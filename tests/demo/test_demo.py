import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.vgg import VGG

from bn_insert import read_checkpoint
from bn_insert.demo import images_path, network_path
from bn_insert.demo.training import demo_network, load_digits, main, split

IMAGES = sorted(images_path().glob("*/*.png"))


@pytest.fixture(scope="module")
def network() -> VGG:
    network = demo_network()
    network.load_state_dict(torch.load(network_path(), weights_only=True))
    return network.eval()


@pytest.fixture(scope="module")
def batch() -> Tensor:
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in IMAGES])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def test_the_shipped_network_classifies_at_least_97_percent_of_the_shipped_images(network: VGG, batch: Tensor) -> None:
    labels = torch.tensor([int(path.parent.name) for path in IMAGES])
    with torch.inference_mode():
        predicted = network(batch).argmax(1)
    assert (predicted == labels).double().mean() >= 0.97


def test_the_network_is_a_float32_state_dict_in_the_layout_of_torchvision() -> None:
    state = torch.load(network_path(), weights_only=True)
    layers = ["features.0", "features.3", "features.6", "features.8", "features.11", "features.13"]
    layers += ["classifier.0", "classifier.3", "classifier.6"]
    assert list(state) == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_the_network_stores_how_its_images_are_preprocessed_and_the_names_of_its_classes() -> None:
    settings = read_checkpoint(network_path()).settings
    assert settings is not None
    assert settings.transform == {"resize": None, "crop": None, "mean": [0.0], "std": [1.0]}
    assert settings.classes == tuple("0123456789")


def test_in_every_layer_at_least_nine_of_ten_channels_fire_on_some_image(network: VGG, batch: Tensor) -> None:
    firing: dict[str, float] = {}

    def record(name: str, output: Tensor) -> None:
        firing[name] = (output.movedim(1, 0).flatten(1) > 0).any(1).double().mean().item()

    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    hooks = [
        layer.register_forward_hook(lambda _layer, _inputs, output, name=name: record(name, output))
        for name, layer in layers.items()
    ]
    with torch.inference_mode():
        network(batch)
    for hook in hooks:
        hook.remove()
    assert firing.keys() == layers.keys()
    assert {name: share for name, share in firing.items() if share < 0.9} == {}


def test_300_to_400_images_lie_in_ten_folders_named_for_their_digits() -> None:
    folders = [path for path in images_path().iterdir() if path.is_dir()]
    assert sorted(path.name for path in folders) == [str(digit) for digit in range(10)]
    assert all(len(list(folder.glob("*.png"))) >= 30 for folder in folders)
    assert 300 <= len(IMAGES) <= 400


def test_network_and_images_together_stay_under_2_megabytes() -> None:
    assert network_path().stat().st_size + sum(path.stat().st_size for path in IMAGES) < 2_000_000


def test_the_renderer_gives_the_shipped_images_pixel_for_pixel() -> None:
    pytest.importorskip("sklearn")
    digits = load_digits()
    for path in IMAGES:
        number = int(path.stem)
        assert int(digits.labels[number]) == int(path.parent.name)
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), digits.pixels[number].numpy())


def test_the_shipped_images_are_the_held_out_ones_and_none_was_trained_on() -> None:
    pytest.importorskip("sklearn")
    training, held_out = split(load_digits())
    shipped = {int(path.stem) for path in IMAGES}
    assert shipped == set(held_out.numbers.tolist())
    assert shipped.isdisjoint(training.numbers.tolist())
    assert len(training.numbers) + len(shipped) == 1797


def test_without_scikit_learn_the_script_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["--output", str(tmp_path / "demo")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "scikit-learn" in message
    assert 'pip install "bn-insert[test]"' in message
    assert not (tmp_path / "demo").exists()


def test_the_script_leaves_data_that_is_there_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "network.pth").write_bytes(b"mine")
    assert main(["--output", str(tmp_path)]) == 2
    assert (tmp_path / "network.pth").read_bytes() == b"mine"
    assert "--force" in capsys.readouterr().err
