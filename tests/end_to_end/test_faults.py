"""What happens in the middle of a run: memory ends, activations overflow or become NaN."""

import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bn_insert import CalibrationError, calibrate, find_sites, insert_batchnorm
from bn_insert.checkpoints.save import save_checkpoint
from bn_insert.images.batch_interface import Batch
from bn_insert.statistics.passes import checked_batches
from support.commands import AS_STORED, assert_refused, run
from support.networks import images, sequential, small_vgg


class LimitedMemory(nn.Module):
    """Raises what PyTorch raises on a GPU that is full, from the given number of images on; `sizes` are its batches."""

    def __init__(self, network: nn.Module, room_for: int, where: str = "front") -> None:
        super().__init__()
        self.network, self.room_for, self.where = network, room_for, where
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return self.network(x)
        self.sizes.append(len(x))
        full = len(x) > self.room_for
        if self.where == "front" and full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        result = self.network[:2](x) if full else self.network(x)  # else: behind the first site
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result


def plain() -> nn.Sequential:
    return sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))


@pytest.mark.parametrize("where", ["front", "behind the first site"])
def test_out_of_memory_halves_the_batch_says_so_and_changes_no_statistics(where: str) -> None:
    batches = [images(12, 12, seed=1), images(12, 12, seed=2), images(5, 12, seed=3)]
    limited = LimitedMemory(plain(), room_for=4, where=where)
    sites = find_sites(limited, batches[0])
    whole = calibrate(LimitedMemory(plain(), room_for=99), sites, batches)
    done: list[int] = []
    with pytest.warns(UserWarning, match="a batch of .* does not fit into memory") as warned:
        halved = calibrate(limited, sites, batches, progress=done.append)
    assert [str(one.message) for one in warned] == [
        "a batch of 12 does not fit into memory: continuing with batches of 6",
        "a batch of 6 does not fit into memory: continuing with batches of 3",
    ]
    assert done == [12, 24, 29]
    for name, moments in whole.items():
        assert halved[name].count == moments.count
        torch.testing.assert_close(halved[name].mean, moments.mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(halved[name].m2, moments.m2, rtol=1e-6, atol=0)


def test_no_activation_is_kept_in_memory_while_a_smaller_batch_is_run() -> None:
    inputs: list[weakref.ref[Tensor]] = []
    sizes: list[int] = []

    class Watched(LimitedMemory):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_exporting():
                assert all(reference() is None for reference in inputs)
                inputs.append(weakref.ref(x))
                sizes.append(len(x))
            return super().forward(x)

    model = Watched(plain(), room_for=3)
    sites = find_sites(model, images(12, 12))
    sizes.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibrate(model, sites, [images(12, 12)])
    assert sizes == [12, 6, 3, 3, 3, 3]


def test_after_running_out_of_memory_outputs_stay_bit_identical_and_the_smaller_batch_is_kept() -> None:
    x = images(8, 12)
    limited = LimitedMemory(plain(), room_for=2)
    with pytest.warns(UserWarning, match="continuing with batches of"):
        result = insert_batchnorm(limited, [x, x])
    result.room_for = 99
    assert torch.equal(result(x), plain()(x))
    assert result.sizes == [8]  # nothing of the calibration's own copy is left in the result


def test_a_value_that_is_not_finite_is_told_by_its_place_in_the_batch_that_was_halved() -> None:
    whole = images(12, 12)
    whole[9, 0, 3, 3] = torch.inf
    limited = LimitedMemory(plain(), room_for=4)
    with warnings.catch_warnings(), pytest.raises(CalibrationError, match="image 9 of batch 0"):
        warnings.simplefilter("ignore")
        calibrate(limited, find_sites(limited, whole), [whole])


def test_one_image_that_does_not_fit_is_an_error_with_its_shape() -> None:
    limited = LimitedMemory(plain(), room_for=0)
    with warnings.catch_warnings(), pytest.raises(CalibrationError) as caught:
        warnings.simplefilter("ignore")
        calibrate(limited, find_sites(limited, images(4, 12)), [images(4, 12)])
    assert "failed on batch 0 of shape (4, 3, 12, 12): CUDA out of memory" in str(caught.value)
    assert str(caught.value).endswith(". Use smaller batches or inputs")


def test_a_large_image_that_overflows_in_float16_is_named_with_its_layer() -> None:
    model = plain().half()
    batch = Batch(images(4, 12), tuple(Path(f"{name}.png") for name in "abcd"))
    batch.images[2] *= 60_000
    with pytest.raises(CalibrationError, match=r"activations of 0 are not finite in torch\.float16, first in c\.png"):
        insert_batchnorm(model, [batch])


def test_activations_that_overflow_in_a_deep_layer_name_that_layer_and_the_image() -> None:
    model = plain()
    with torch.no_grad():
        model[2].weight *= 1e20
        model[4].weight *= 1e20
    batch = Batch(images(4, 12), tuple(Path(f"{name}.png") for name in "abcd"))
    batch.images[:1] = 0
    with pytest.raises(
        CalibrationError, match=r"activations of 4 are not finite in torch\.float32, first in [ab]\.png"
    ):
        insert_batchnorm(model, [batch], include_output=True)


def test_through_the_command_line_an_overflow_names_layer_and_image_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vgg = small_vgg()
    with torch.no_grad():
        vgg.features[0].weight.fill_(1.0)
        vgg.features[0].bias.zero_()
        vgg.features[3].weight.fill_(3000.0)
    save_checkpoint(vgg.half(), "half.pth")
    Path("pictures").mkdir()
    for name, value in (("bright", 255), ("dark", 0), ("dim", 1)):
        Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(f"pictures/{name}.png")
    result = run("insert", "half.pth", "pictures", "-o", "out.pth", *AS_STORED)
    wording = "the activations of features.3 are not finite in torch.float16, first in pictures/bright.png"
    assert_refused(result, wording)
    assert not Path("out.pth").exists()


def test_the_command_line_takes_a_float16_checkpoint_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(small_vgg().half(), "half.pth")
    torch.save(images(6, 16), "x.pt")
    assert run("insert", "half.pth", "x.pt", "-o", "bn.pth").exit_code == 0
    assert run("fold", "bn.pth", "x.pt", "-o", "folded.pth").exit_code == 0
    before, after = torch.load("half.pth"), torch.load("folded.pth")
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("batches", ["photographs", Path("photographs")])
def test_a_path_is_not_taken_for_batches_and_the_message_says_how_to_read_it(
    batches: Any, unchecked: Callable[..., Any]
) -> None:
    with pytest.raises(CalibrationError, match=r"^batches is a path, 'photographs'.* DataLoader.*open_batches\("):
        unchecked(checked_batches)(batches)


@pytest.mark.parametrize(("batches", "what"), [(None, "None"), (3, "an int")])
def test_what_holds_no_batches_is_not_taken_for_them(batches: Any, what: str, unchecked: Callable[..., Any]) -> None:
    with pytest.raises(CalibrationError, match=f"^batches is {what}, not an iterable of batches; pass a DataLoader"):
        unchecked(checked_batches)(batches)
