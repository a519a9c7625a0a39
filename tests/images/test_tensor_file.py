import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bn_insert.errors import ImageError
from bn_insert.images.batch_interface import sample
from bn_insert.images.image_sources import open_batches
from bn_insert.images.tensor_batches import tensor_batches
from bn_insert.images.transform import Transform

VALUES = torch.randn(7, 3, 5, 4, generator=torch.Generator().manual_seed(0))

WRITERS: dict[str, Callable[[Tensor, Path], Any]] = {
    "x.pt": torch.save,
    "x.PTH": torch.save,
    "dict.pt": lambda values, path: torch.save({"images": values, "labels": [1, 2]}, path),
    "parameter.pt": lambda values, path: torch.save(nn.Parameter(values), path),
    "old.pt": lambda values, path: torch.save(values, path, _use_new_zipfile_serialization=False),
    "x.npy": lambda values, path: np.save(path, values.numpy()),
    "fortran.npy": lambda values, path: np.save(path, np.asfortranarray(values.numpy())),
    "big_endian.npy": lambda values, path: np.save(path, values.numpy().astype(">f4")),
    "x.safetensors": lambda values, path: save_file({"images": values}, path),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save(VALUES, tmp_path / "x.pt")
    return tmp_path / "x.pt"


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_values_as_they_are(name: str, tmp_path: Path) -> None:
    WRITERS[name](VALUES, tmp_path / name)
    batches = tensor_batches(tmp_path / name, batch_size=3, channels=3)
    images = [batch.images for batch in batches]
    assert batches.images == 7
    assert [len(each) for each in images] == [3, 3, 1]
    assert torch.equal(torch.cat(images), VALUES)
    assert all(each.is_contiguous() and not each.requires_grad for each in images)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int16, torch.uint16, torch.bool]
)
def test_every_real_dtype_becomes_float32_without_scaling(dtype: torch.dtype, tmp_path: Path) -> None:
    values = (VALUES * 100).abs().to(dtype)
    for name, write in {"x.pt": torch.save, "x.safetensors": WRITERS["x.safetensors"]}.items():
        write(values, tmp_path / name)
        (batch,) = tensor_batches(tmp_path / name)
        assert batch.images.dtype == torch.float32
        assert torch.equal(batch.images, values.to(torch.float32))


def test_inputs_may_have_one_or_three_dimensions_behind_the_channels(tmp_path: Path) -> None:
    for dims, shape, layout in ((1, (2, 3, 9), "N x C x L"), (3, (2, 3, 4, 5, 6), "N x C x D x H x W")):
        torch.save(torch.ones(shape), tmp_path / "x.pt")
        (batch,) = tensor_batches(tmp_path / "x.pt", channels=3, dims=dims)
        assert batch.images.shape == shape
        with pytest.raises(ImageError, match="but N x C x H x W is expected"):
            tensor_batches(tmp_path / "x.pt", channels=3)
        torch.save(VALUES, tmp_path / "x.pt")
        with pytest.raises(ImageError, match=f"has the shape 7 x 3 x 5 x 4, but {layout} is expected"):
            tensor_batches(tmp_path / "x.pt", channels=3, dims=dims)


def test_features_and_whatever_the_network_takes_are_inputs(tmp_path: Path) -> None:
    torch.save(torch.ones(4, 6), tmp_path / "x.pt")
    (batch,) = tensor_batches(tmp_path / "x.pt", channels=6, dims=0)
    assert batch.images.shape == (4, 6)
    with pytest.raises(ImageError, match="has the shape 4 x 6, N x C, but the network takes C = 5"):
        tensor_batches(tmp_path / "x.pt", channels=5, dims=0)
    asked: list[tuple[int, ...]] = []
    batches = tensor_batches(tmp_path / "x.pt", channels=3, takes=lambda shape: asked.append(shape) or True)
    assert batches.image_shape == (6,)
    assert asked == [(6,)]
    with pytest.raises(ImageError, match="has the shape 4 x 6, but N x C x H x W is expected"):
        tensor_batches(tmp_path / "x.pt", channels=3, takes=lambda _: False)


def test_a_batch_names_the_rows_it_holds(saved: Path) -> None:
    first, *_ = tensor_batches(saved, batch_size=2)
    assert first.paths == (Path(f"{saved}[0]"), Path(f"{saved}[1]"))


def test_a_second_pass_gives_the_same_even_if_the_first_was_worked_on_in_place(saved: Path) -> None:
    batches = tensor_batches(saved, batch_size=4)
    for batch in batches:
        batch.images.zero_()
    assert torch.equal(torch.cat([batch.images for batch in batches]), VALUES)


def test_head_gives_the_first_images(saved: Path) -> None:
    batches = tensor_batches(saved, batch_size=2)
    assert torch.equal(torch.cat([batch.images for batch in batches.head(3)]), VALUES[:3])
    assert batches.head(3).images == 3
    assert batches.head(100).images == 7


def test_a_sample_is_the_one_of_the_function_sample(saved: Path) -> None:
    batches = open_batches(saved, Transform(), images=4, seed=5, batch_size=3)
    assert torch.equal(torch.cat([batch.images for batch in batches]), VALUES[sample(range(7), 4, 5)])
    assert batches.images == 4
    assert batches.unreadable == []


def test_without_a_number_all_images_come_shuffled(saved: Path) -> None:
    (batch,) = open_batches(saved, Transform())
    assert torch.equal(batch.images, VALUES[sample(range(7), None, 0)])
    assert not torch.equal(batch.images, VALUES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            torch.zeros(3, 5, 4),
            r"x.pt has the shape 3 x 5 x 4, but N x C x H x W is expected; save one image as image\[",
        ),
        (torch.zeros(3), "x.pt has the shape 3, but N x C x H x W is expected"),
        (torch.tensor(1.0), "x.pt has the shape .., but N x C x H x W is expected"),
        (torch.zeros(0, 3, 5, 4), "x.pt has the shape 0 x 3 x 5 x 4: it contains no image"),
        (torch.zeros(2, 3, 0, 4), "x.pt has the shape 2 x 3 x 0 x 4: it contains no image"),
        (torch.zeros(2, 1, 5, 4), "x.pt has the shape 2 x 1 x 5 x 4, N x C x H x W, but the network takes C = 3$"),
        (torch.zeros(2, 5, 4, 3), r"shape 2 x 5 x 4 x 3.* takes C = 3; save tensor.permute\(0, 3, 1, 2\)"),
    ],
)
def test_another_shape_is_refused_with_the_shape_and_the_way_out(values: Tensor, message: str, tmp_path: Path) -> None:
    torch.save(values, tmp_path / "x.pt")
    with pytest.raises(ImageError, match=message):
        tensor_batches(tmp_path / "x.pt", channels=3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_value_that_is_not_finite_is_named_with_its_place_in_the_file(bad: float, tmp_path: Path) -> None:
    values = VALUES.clone()
    values[5, 2, 4, 1] = bad
    values[6] = bad
    torch.save(values, tmp_path / "x.pt")
    batches = tensor_batches(tmp_path / "x.pt", batch_size=4)
    with pytest.raises(ImageError, match=rf"x.pt \(7 x 3 x 5 x 4\) contains {bad} at \[5, 2, 4, 1\]"):
        list(batches)
    list(batches.head(5))


def test_a_double_too_large_for_float32_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((1, 1, 1, 1), 1e300))
    with pytest.raises(ImageError, match=r"contains inf at \[0, 0, 0, 0\] \(in float32\)"):
        list(tensor_batches(tmp_path / "x.npy"))


def whole(name: str, tmp_path: Path) -> bytes:
    WRITERS[name](VALUES, tmp_path / name)
    return (tmp_path / name).read_bytes()


@pytest.mark.parametrize("name", ["x.pt", "old.pt", "x.npy", "x.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(name: str, share: float, tmp_path: Path) -> None:
    content = whole(name, tmp_path)
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ImageError, match=rf"{name} is damaged"):
        tensor_batches(tmp_path / name)


@pytest.mark.parametrize("name", ["x.pt", "old.pt", "x.npy", "x.safetensors"])
def test_whatever_byte_is_changed_nothing_but_an_image_error_comes_of_it(name: str, tmp_path: Path) -> None:
    content = bytearray(whole(name, tmp_path))
    generator = random.Random(0)
    for _ in range(60):
        changed = bytearray(content)
        changed[generator.randrange(min(len(content), 400))] ^= 1 << generator.randrange(8)
        (tmp_path / name).write_bytes(changed)
        try:
            list(tensor_batches(tmp_path / name, channels=3))
        except ImageError as error:
            assert name in str(error)


class Explosive:
    exploded = False

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return setattr, (Explosive, "exploded", True)


@pytest.mark.parametrize("protocol", [2, 5])
def test_code_in_a_file_is_refused_and_not_run(protocol: int, tmp_path: Path) -> None:
    torch.save({"images": VALUES, "more": Explosive()}, tmp_path / "zip.pt", pickle_protocol=protocol)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Explosive(), protocol))
    np.save(tmp_path / "objects.npy", np.array([Explosive()], dtype=object), allow_pickle=True)
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ImageError, match=rf"{name} .*contains more than a tensor.*torch.save\(tensor, path\)"):
            tensor_batches(tmp_path / name)
    with pytest.raises(ImageError, match=r"objects.npy is damaged, or not a .npy file"):
        tensor_batches(tmp_path / "objects.npy")
    assert not Explosive.exploded


def test_a_small_file_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(1).expand(10**9, 3, 224, 224), tmp_path / "x.pt")
    with pytest.raises(ImageError, match=r"x.pt of .* bytes claims the shape 1000000000 x 3 x 224 x 224"):
        tensor_batches(tmp_path / "x.pt")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 3, 224, 224)}
    )
    (tmp_path / "x.npy").write_bytes(header.getvalue())
    with pytest.raises(ImageError, match=r"x.npy is damaged"):
        tensor_batches(tmp_path / "x.npy")


@pytest.mark.parametrize(
    "values",
    [torch.zeros(1, 1, 2, 2).to_sparse(), torch.zeros(1, 1, 2, 2, dtype=torch.complex64)],
    ids=["sparse", "complex"],
)
def test_a_tensor_that_is_no_plain_array_of_real_numbers_is_refused(values: Tensor, tmp_path: Path) -> None:
    torch.save(values, tmp_path / "x.pt")
    with pytest.raises(ImageError, match=r"x.pt contains a tensor that is sparse, .* complex"):
        tensor_batches(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": VALUES, "b": VALUES}, r"x.pt contains 2 tensors \(a, b\); save only the one with the images"),
        ({f"{number}": VALUES for number in range(9)}, r"contains 9 tensors \(0, 1, 2, 3, ...\)"),
        ({"0.weight": VALUES, "0.bias": VALUES}, r"\(0.weight, 0.bias\); it looks like a checkpoint, and images are"),
        ({"labels": [1, 2]}, "x.pt contains 0 tensors; save"),
        ([VALUES], "x.pt contains a list, not a tensor; save only the tensor"),
        (None, "x.pt contains None, not a tensor"),
    ],
)
def test_a_file_with_not_exactly_one_tensor_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ImageError, match=message):
        tensor_batches(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [(VALUES, VALUES), [VALUES], VALUES.numpy()], ids=["tuple", "list", "array"])
def test_for_several_inputs_a_file_without_a_dict_is_refused_with_the_names_it_needs(
    content: Any, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "x.pt", pickle_protocol=4)
    with pytest.raises(ImageError, match=r"a dict of .*torch\.save\(tensors, path\)") as caught:
        open_batches(tmp_path / "x.pt", Transform(), inputs=["left", "right"])
    assert "only the tensor," not in str(caught.value)


def test_safetensors_with_two_tensors_are_refused(tmp_path: Path) -> None:
    save_file({"a": VALUES, "b": VALUES.clone()}, tmp_path / "x.safetensors")
    with pytest.raises(ImageError, match=r"x.safetensors contains 2 tensors \(a, b\)"):
        tensor_batches(tmp_path / "x.safetensors")


def test_another_format_under_a_known_suffix_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    np.savez(tmp_path / "x.npz", VALUES.numpy())
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    (tmp_path / "x.safetensors").write_text("hello, this is text")
    for suffix in ("pt", "npy", "safetensors"):
        with pytest.raises(ImageError, match=f"x.{suffix} is damaged"):
            tensor_batches(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("name", ["x.pt", "x.npy", "x.safetensors"])
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=f"cannot read .*{name}: No such file"):
        tensor_batches(tmp_path / name)


def test_options_out_of_range_are_refused(saved: Path) -> None:
    with pytest.raises(ImageError, match="batch_size is 0; use 1 or more"):
        tensor_batches(saved, batch_size=0)
    with pytest.raises(ImageError, match="images is 0; use 1 or more"):
        open_batches(saved, Transform(), images=0)
    with pytest.raises(ImageError, match="images is -1; use 1 or more"):
        tensor_batches(saved).head(-1)


@pytest.mark.parametrize("name", ["nested", "bits8", "float4"])
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_numbers_are_refused_by_name(name: str, tmp_path: Path) -> None:
    values = {
        "nested": lambda: torch.nested.nested_tensor([torch.rand(3, 4, 4), torch.rand(3, 4, 5)]),
        "bits8": lambda: torch.zeros(2, 3, 4, 4, dtype=torch.uint8).view(torch.bits8),
        "float4": lambda: torch.zeros(2, 3, 4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }[name]()
    torch.save(values, tmp_path / "x.pt")
    with pytest.raises(ImageError, match=r"x\.pt "):
        list(tensor_batches(tmp_path / "x.pt"))
