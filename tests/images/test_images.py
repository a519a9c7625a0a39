import io
import os
import random
import re
import signal
import textwrap
import time
import tracemalloc
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.models import VGG16_Weights

from bn_insert.errors import ImageError
from bn_insert.images import (
    Batches,
    Transform,
    find_images,
    image_batches,
    open_batches,
    open_class_folders,
    open_labelled_batches,
    sample,
)
from bn_insert.images.batch_interface import Unreadable
from bn_insert.images.image_files import read_image, read_pixels
from support.commands import start_forked
from support.photographs import photograph

PLAIN = Transform(resize=None, crop=8, mean=(0.0,), std=(1.0,))
PHOTOGRAPH = photograph("china")


def picture(number: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures in two class folders."""
    for number in range(10):
        path = tmp_path / "pictures" / ("cat" if number < 5 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return tmp_path / "pictures"


def break_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def all_images(batches: Batches) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


# Finding


def test_images_are_found_in_subfolders_sorted_and_whatever_the_case_of_their_suffix(tmp_path: Path) -> None:
    names = ["b/z.JPG", "b/c/y.jpeg", "a.png", "b/x.Tiff", "ä.webp", "c.pgm", "d.gif", "e.bmp", "f.tif", "g.ppm"]
    for name in [*names, "notes.txt", "b/labels.csv", "no_suffix", ".hidden.png", ".git/h.png", "b/._z.jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "a.png", "b/c/y.jpeg", "b/x.Tiff", "b/z.JPG", "c.pgm", "d.gif", "e.bmp", "f.tif", "g.ppm", "ä.webp"
    ]  # fmt: skip


def test_links_are_followed_once_and_loops_do_no_harm(folder: Path, tmp_path: Path) -> None:
    picture(77).save(tmp_path / "elsewhere.png")
    (folder / "linked.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "cat" / "up").symlink_to(folder)
    (folder / "twice").symlink_to(folder / "dog")
    (folder / "self").symlink_to(folder / "self")
    found = find_images(folder)
    assert len(found) == 11
    assert found == find_images(folder)


def test_a_link_into_nowhere_is_found_and_then_unreadable_but_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "me.png").symlink_to(folder / "me.png")
    os.mkfifo(folder / "pipe.png")
    batches = image_batches(folder, PLAIN)
    assert len(all_images(batches)) == 10
    assert [path.name for path, _ in batches.unreadable] == ["gone.png", "me.png"]
    assert batches.unreadable[0].reason == "No such file or directory"


def test_a_mistyped_folder_is_told_with_what_it_may_mean(tmp_path: Path) -> None:
    (tmp_path / "photographs" / "train").mkdir(parents=True)
    mistyped, meant = (tmp_path / name / "train" for name in ("photograhps", "photographs"))
    for opener in (find_images, open_batches, open_class_folders, open_labelled_batches):
        with pytest.raises(ImageError) as refusal:
            opener(mistyped, PLAIN) if opener is not find_images else opener(mistyped)
        assert str(refusal.value).startswith(f"{mistyped} does not exist (did you mean {meant}?); ")


@pytest.mark.parametrize("opener", [find_images, lambda folder: image_batches(folder, PLAIN)])
def test_what_is_no_folder_of_images_is_named_with_the_suffixes_looked_for(
    opener: Callable[[Path], object], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    for name in ("file.txt", "text/a.txt", "texts/a.txt", "texts/sub/b.txt"):
        (tmp_path / name).touch()
    suffixes = r".*\.avif, \.bmp, .*\.jpeg, .*\.webp"
    with pytest.raises(ImageError, match=rf"missing does not exist; pass a folder of images{suffixes}"):
        opener(tmp_path / "missing")
    with pytest.raises(ImageError, match=rf"file.txt is not a folder; pass a folder of images{suffixes}"):
        opener(tmp_path / "file.txt")
    with pytest.raises(ImageError, match=rf"empty contains no image: no file in it ends in{suffixes}"):
        opener(tmp_path / "empty")
    with pytest.raises(ImageError, match=rf"text contains no image: the only file in it, .* does not end in{suffixes}"):
        opener(tmp_path / "text")
    with pytest.raises(ImageError, match=rf"texts contains no image: none of the 2 files .* ends in{suffixes}"):
        opener(tmp_path / "texts")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read every folder")
def test_a_subfolder_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "dog").chmod(0)
    try:
        with pytest.raises(ImageError, match=r"cannot read the folder .*dog: Permission denied"):
            find_images(folder)
    finally:
        (folder / "dog").chmod(0o755)


# Sampling


def test_a_sample_has_no_item_twice_and_is_the_same_for_the_same_seed() -> None:
    items = [Path(f"{number}") for number in range(100)]
    drawn = sample(items, 30, 3)
    assert len(set(drawn)) == 30
    assert drawn == sample(items, 30, 3) != sample(items, 30, 4)
    assert sorted(sample(items, 1000, 3)) == sorted(sample(items, None, 3)) == sorted(items)


def test_a_sample_begins_like_a_larger_one_and_stays_the_same_over_versions() -> None:
    assert sample(range(10), 3, 0) == sample(range(10), None, 0)[:3]
    assert sample(range(10), None, 0) == [3, 7, 5, 2, 8, 4, 9, 1, 6, 0]


def test_a_sample_draws_each_item_equally_often() -> None:
    drawn = [item for seed in range(2000) for item in sample(range(10), 3, seed)]
    assert all(500 < drawn.count(item) < 700 for item in range(10))


def test_a_sample_does_not_depend_on_the_order_of_files_on_disk_nor_on_where_the_folder_is(tmp_path: Path) -> None:
    for name, order in (("one", range(10)), ("two", reversed(range(10)))):
        (tmp_path / name).mkdir()
        for number in order:
            picture(number).save(tmp_path / name / f"{number}.png")
    one, two = (open_batches(tmp_path / name, PLAIN, images=4, seed=1) for name in ("one", "two"))
    assert torch.equal(all_images(one), all_images(two))
    assert len(all_images(one)) == one.images == 4


def test_a_sample_of_a_class_sorted_folder_has_images_of_all_classes(folder: Path) -> None:
    (batch,) = open_batches(folder, PLAIN, images=6, seed=0)
    assert {path.parent.name for path in batch.paths} == {"cat", "dog"}


# Decoding


@pytest.mark.parametrize("workers", [0, 2])
def test_photographs_equal_the_preset_of_torchvisions_vgg16_bit_for_bit(workers: int, tmp_path: Path) -> None:
    for number, size in enumerate([(500, 375), (375, 500), (256, 256), (100, 80)]):
        Image.fromarray(PHOTOGRAPH).resize(size).save(tmp_path / f"{number}.jpg", quality=90)
    preset = VGG16_Weights.IMAGENET1K_V1.transforms()
    batches = image_batches(tmp_path, Transform(), batch_size=2, workers=workers)
    for batch in batches:
        for image, path in zip(batch.images, batch.paths, strict=True):
            with Image.open(path) as photograph:
                assert torch.equal(image, preset(photograph))
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous()


MODES: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "RGB": ("png", lambda image: image),
    "grey": ("png", lambda image: image.convert("L")),
    "grey jpeg": ("jpg", lambda image: image.convert("L")),
    "one bit": ("png", lambda image: image.convert("1")),
    "palette": ("png", lambda image: image.convert("P", palette=Image.Palette.ADAPTIVE)),
    "palette gif": ("gif", lambda image: image.quantize(16)),
    "RGBA": ("png", lambda image: image.convert("RGBA")),
    "LA": ("png", lambda image: image.convert("LA")),
    "CMYK": ("jpg", lambda image: image.convert("CMYK")),
    "CMYK tiff": ("tif", lambda image: image.convert("CMYK")),
    "YCbCr": ("tif", lambda image: image.convert("YCbCr")),
    "bmp": ("bmp", lambda image: image),
    "webp": ("webp", lambda image: image),
    "ppm": ("ppm", lambda image: image),
    "pgm": ("pgm", lambda image: image.convert("L")),
    "pbm": ("pbm", lambda image: image.convert("1")),
    "jpeg 2000": ("jp2", lambda image: image),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("channels", "name"), [(3, "RGB"), (1, "L")])
def test_every_mode_becomes_rgb_or_grey_as_pillow_converts_it(
    mode: str, channels: int, name: str, tmp_path: Path
) -> None:
    suffix, convert = MODES[mode]
    path = tmp_path / f"x.{suffix}"
    convert(picture(0)).save(path)
    (batch,) = image_batches([str(path)], PLAIN, channels=channels)
    assert batch.images.shape == (1, channels, 8, 8)
    with Image.open(path) as image:
        assert torch.equal(batch.images[0], PLAIN(image.convert(name)))


def test_colour_under_transparency_comes_to_light(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "x.png")
    (batch,) = image_batches(tmp_path, PLAIN)
    assert batch.images[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_of_16_bit_values_the_high_byte_is_taken(suffix: str, channels: int, tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    (batch,) = image_batches(tmp_path, PLAIN, channels=channels)
    expected = torch.from_numpy((values >> 8).astype(np.float32)) / 255
    assert torch.equal(batch.images[0], expected.expand(channels, 8, 8))


def test_values_without_a_known_range_make_a_file_unreadable(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "c.png")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a.tif")
    Image.fromarray(np.full((8, 8), 1 << 20, np.int32)).save(tmp_path / "b.tif")
    batches = image_batches(tmp_path, PLAIN)
    assert len(all_images(batches)) == 1
    reasons = {path.name: reason for path, reason in batches.unreadable}
    assert reasons == {
        "a.tif": "its pixels are floating-point numbers, whose range is not known",
        "b.tif": "its pixels are 32-bit numbers, whose range is not known",
    }


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame_is_taken(suffix: str, tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(tmp_path / f"x.{suffix}", save_all=True, append_images=[blue])
    (batch,) = image_batches(tmp_path, PLAIN)
    red_channel, _, blue_channel = batch.images[0, :, 4, 4].tolist()
    assert red_channel > 0.9
    assert blue_channel < 0.1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(0).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        expected = ImageOps.exif_transpose(image)
    assert expected.size == ((12, 10) if orientation < 5 else (10, 12))
    assert read_image(tmp_path / "x.png", 3).tobytes() == expected.tobytes()


def test_damaged_exif_does_not_make_a_picture_unreadable(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    batches = image_batches(tmp_path, PLAIN)
    assert len(all_images(batches)) == 1
    assert batches.unreadable == []


def test_postscript_behind_an_images_suffix_is_not_run(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.jpg")
    with pytest.raises(ImageError, match="not an image in a supported format"):
        list(image_batches(tmp_path, PLAIN))


def test_a_content_that_differs_from_the_suffix_is_read(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert len(all_images(image_batches(tmp_path, PLAIN))) == 1


# Unreadable files


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_skipped_and_listed_with_their_reasons(workers: int, tmp_path: Path) -> None:
    for number in range(8):
        Image.fromarray(PHOTOGRAPH).resize((64, 64)).save(tmp_path / f"{number}.jpg")
    (tmp_path / "1.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:900])
    (tmp_path / "2.jpg").write_bytes(b"")
    (tmp_path / "3.jpg").write_bytes(b"hello")
    (tmp_path / "6.jpg").unlink()
    (tmp_path / "6.jpg").mkdir()
    batches = image_batches([tmp_path / f"{number}.jpg" for number in range(8)], PLAIN, batch_size=3, workers=workers)
    assert [tuple(path.stem for path in batch.paths) for batch in batches] == [("0",), ("4", "5"), ("7",)]
    reasons = {path.stem: reason for path, reason in batches.unreadable}
    assert list(reasons) == ["1", "2", "3", "6"]
    assert "image file is truncated" in reasons["1"]
    assert reasons["2"] == "the file is empty"
    assert reasons["3"] == "not an image in a supported format"
    assert reasons["6"] == "Is a directory"
    assert batches.images == 8
    list(batches)
    assert len(batches.unreadable) == 4


def test_a_batch_of_unreadable_files_alone_is_left_out(folder: Path) -> None:
    paths = find_images(folder)
    for path in paths[2:4]:
        break_file(path)
    assert [len(batch.images) for batch in image_batches(folder, PLAIN, batch_size=2)] == [2, 2, 2, 2]


def fail_for_lack_of_memory(*_: object) -> None:
    raise MemoryError


@pytest.mark.parametrize("workers", [0, 2])
def test_no_picture_is_left_out_for_lack_of_memory(workers: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bn_insert.images.image_files.read_image", fail_for_lack_of_memory)
    batches = image_batches(folder, PLAIN, batch_size=2, workers=workers)
    with pytest.raises(ImageError, match=r"none of the 10 image files can be read.*takes more memory than any picture"):
        list(batches)  # there is memory for any picture within the limits: the files are to blame
    monkeypatch.setattr("bn_insert.images.image_files._MAX_BYTES", 1 << 60)
    with pytest.raises(MemoryError):
        list(batches)


def test_a_batch_that_a_worker_cannot_send_for_lack_of_memory_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, dumps = os.getpid(), ForkingPickler.dumps
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # seconds until a worker is missed
    monkeypatch.setattr(ForkingPickler, "dumps", lambda it: dumps(it) if os.getpid() == main else bytes(1 << 60))
    with pytest.raises(ImageError, match="ended early, perhaps out of memory"):
        list(image_batches(folder, PLAIN, batch_size=2, workers=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_makes_the_first_unreadable_file_an_error(workers: int, folder: Path) -> None:
    for number in (3, 4):
        break_file(folder / "cat" / f"{number}.png")
    batches = image_batches(folder, PLAIN, batch_size=2, workers=workers, strict=True)
    with pytest.raises(ImageError, match=r"cannot read .*3.png: .*; repair or remove the file, or leave out strict"):
        list(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_unreadable_files_alone_is_an_error_with_their_number_and_the_first_reason(
    workers: int, tmp_path: Path
) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    message = "none of the 5 image files can be read; the first is .*0.jpg: the file is empty"
    with pytest.raises(ImageError, match=message):
        list(image_batches(tmp_path, PLAIN, batch_size=2, workers=workers))


def test_a_folder_of_one_unreadable_file_is_an_error_about_this_file(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(b"")
    with pytest.raises(ImageError, match=r"the only image file cannot be read: .*0.jpg: the file is empty"):
        list(image_batches(tmp_path, PLAIN, batch_size=2))


@pytest.mark.parametrize("limit", [30, 80])  # of 120 pixels Pillow makes an error and a warning
@pytest.mark.parametrize("workers", [0, 2])
def test_a_decompression_bomb_is_unreadable_and_nothing_is_printed(
    limit: int,
    workers: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for number in (0, 1):
        picture(number, (7, 4)).save(folder / "cat" / f"{number}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    batches = image_batches(folder, Transform(None, 4), batch_size=4, workers=workers)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert len(all_images(batches)) == 2
    assert len(batches.unreadable) == 8
    assert re.search("120 pixels.* exceeds limit of [68]0 pixels", batches.unreadable[0].reason)
    assert capfd.readouterr() == ("", "")


def test_whatever_byte_of_a_picture_is_changed_nothing_but_pixels_or_a_reason_comes_of_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    for suffix in ("jpg", "png", "gif", "tif", "webp", "bmp", "pgm", "jp2"):
        buffer = io.BytesIO()
        picture(0).save(buffer, {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM", "jp2": "JPEG2000"}.get(suffix, suffix))
        for number in range(40):
            content = bytearray(buffer.getvalue())
            content[generator.integers(min(len(content), 200))] ^= 1 << generator.integers(8)
            (tmp_path / f"{number}.{suffix}").write_bytes(content)
    batches = image_batches(tmp_path, PLAIN)
    readable = sum(len(batch.images) for batch in batches)
    assert readable + len(batches.unreadable) == 320
    assert all(reason for _, reason in batches.unreadable)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "jpeg", "packbits", "group4"])
def test_of_a_damaged_tiff_libtiff_prints_nothing(
    compression: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    buffer = io.BytesIO()
    (picture(0).convert("1") if compression == "group4" else picture(0)).save(buffer, "TIFF", compression=compression)
    for offset in range(8, len(buffer.getvalue()), 11):
        content = bytearray(buffer.getvalue())
        content[offset] ^= 0x80
        (tmp_path / "x.tif").write_bytes(content)
        read_pixels(tmp_path / "x.tif", PLAIN, 3)
    assert capfd.readouterr().err == ""


def test_a_thin_picture_that_would_be_resized_to_gigabytes_is_unreadable(folder: Path) -> None:
    Image.new("1", (1, 30000)).save(folder / "thin.png")
    batches = image_batches(folder, Transform(8, 8))
    assert len(all_images(batches)) == 11
    batches = image_batches(folder, Transform(256, 8))
    list(batches)
    assert "would take gigabytes" in batches.unreadable[0].reason


# Sizes


def test_pictures_of_several_sizes_are_fine_with_a_crop(tmp_path: Path) -> None:
    for number, size in enumerate([(20, 10), (10, 20), (4, 4)]):
        picture(number, size).save(tmp_path / f"{number}.png")
    assert all_images(image_batches(tmp_path, PLAIN)).shape == (3, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_of_several_sizes_in_one_batch_without_a_crop_are_named_with_the_way_out(
    workers: int, tmp_path: Path
) -> None:
    for number, size in enumerate([(12, 10), (12, 10), (12, 11), (9, 9)]):
        picture(number, size).save(tmp_path / f"{number}.png")
    uncropped = Transform(None, None)
    message = r"differ in size: .*0.png has 12 x 10 and .*2.png has 12 x 11; set a crop \(crop\)$"
    with pytest.raises(ImageError, match=message):
        list(image_batches(tmp_path, uncropped, batch_size=3, workers=workers))
    assert len(list(image_batches(tmp_path, uncropped, batch_size=1, workers=workers))) == 4


# Passes


def test_every_pass_and_every_number_of_workers_gives_the_same_batches(folder: Path) -> None:
    break_file(folder / "dog" / "7.png")
    serial, parallel = (open_batches(folder, PLAIN, seed=2, batch_size=3, workers=workers) for workers in (0, 2))
    first, again, other = list(serial), list(serial), list(parallel)
    assert sum(len(batch.images) for batch in first) == 9
    for passes in (again, other):
        assert [batch.paths for batch in first] == [batch.paths for batch in passes]
        assert all(torch.equal(one.images, two.images) for one, two in zip(first, passes, strict=True))
    assert serial.unreadable == parallel.unreadable


def test_head_gives_the_first_images_that_can_be_read(folder: Path) -> None:
    break_file(folder / "cat" / "1.png")
    batches = image_batches(folder, PLAIN, batch_size=4)
    for count, names in ((1, "0"), (2, "02"), (6, "023456"), (100, "023456789")):
        head = batches.head(count)
        assert "".join(path.stem for batch in head for path in batch.paths) == names
        assert head.images == min(count, 10)
    assert torch.equal(all_images(batches.head(6)), all_images(batches)[:6])


def test_the_head_of_a_head_and_a_sample_of_a_head_stay_within_it(folder: Path) -> None:
    head = image_batches(folder, PLAIN).head(4)
    assert head.head(9).images == 4
    assert {path.stem for batch in head.sample(None, 0) for path in batch.paths} == set("0123")


def test_a_pass_may_be_left_early_and_taken_up_again(folder: Path) -> None:
    batches = image_batches(folder, PLAIN, batch_size=2, workers=2)
    first = next(iter(batches))
    assert torch.equal(first.images, next(iter(batches)).images)


def test_one_image_file_is_a_set_of_one(folder: Path) -> None:
    (batch,) = open_batches(folder / "cat" / "3.png", PLAIN, images=5)
    assert batch.paths == (folder / "cat" / "3.png",)


def test_more_workers_than_cores_and_batches_warn_of_nothing(folder: Path) -> None:
    assert len(all_images(image_batches(folder, PLAIN, batch_size=6, workers=64))) == 10


def test_a_batch_is_a_tuple_whose_first_value_is_the_input(folder: Path) -> None:
    batch = next(iter(image_batches(folder, PLAIN, batch_size=2)))
    assert batch[0] is batch.images
    assert batch.paths == (folder / "cat" / "0.png", folder / "cat" / "1.png")


def test_pinned_batches_are_pinned_where_there_is_a_gpu_and_equal_everywhere(folder: Path) -> None:
    torch.save(torch.rand(2, 3, 8, 8), folder / "x.pt")
    for source in (folder, folder / "x.pt"):
        plain, pinned = (next(iter(open_batches(source, PLAIN, pin_memory=pin))).images for pin in (False, True))
        assert torch.equal(plain, pinned)
        assert pinned.is_pinned() == torch.cuda.is_available()


# Options


def test_a_source_of_another_kind_is_refused_with_the_kinds_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").touch()
    with pytest.raises(ImageError, match=r"x.csv is neither a folder of images nor .* tensor files \(.npy, .*images"):
        open_batches(tmp_path / "x.csv", PLAIN)
    with pytest.raises(ImageError, match=r"missing.pt does not exist; pass a folder of images, or a file: tensor"):
        open_batches(tmp_path / "missing.pt", PLAIN)


def test_options_out_of_range_are_refused(folder: Path) -> None:
    for option, value, message in (
        ("batch_size", 0, "batch_size is 0; use 1 or more"),
        ("workers", -1, "workers is -1; use 0 or more"),
        ("images", 0, "images is 0; use 1 or more"),
        (
            "channels",
            4,
            "image files provide 1 or 3 channels, but the network takes 4; such images are read from tensor files only",
        ),
    ):
        with pytest.raises(ImageError, match=message):
            open_batches(folder, PLAIN, **{option: value})  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="mean has 3 values, but the network takes 1 channel"):
        image_batches(folder, Transform(), channels=1)
    with pytest.raises(ImageError, match="the list of image files is empty"):
        image_batches([], PLAIN)


# The process around


@pytest.mark.parametrize("workers", [0, 2])
def test_no_random_state_is_touched(workers: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def states() -> tuple[object, ...]:
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # type: ignore[index]

    # The checks of annotations in these tests draw from `random` by names of their own, so its state says nothing.
    for name in ("random", "getrandbits", "sample", "shuffle", "choice", "choices", "randint", "randrange"):
        monkeypatch.delattr(random, name)
    before = states()
    torch.save(torch.zeros(4, 3, 8, 8), folder / "x.pt")
    for source in (folder, folder / "x.pt"):
        assert open_batches(source, PLAIN, images=4, seed=1, batch_size=3, workers=workers).images == 4
        assert len(all_images(open_batches(source, PLAIN, images=4, seed=1, batch_size=3, workers=workers))) == 4
    assert before == states()


def test_ctrl_c_ends_the_workers_without_a_word_from_them(folder: Path) -> None:
    script = """
        import signal, sys, time
        from bn_insert.images import Transform, image_batches
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        try:
            for batch in image_batches(sys.argv[1], Transform(None, 8), batch_size=1, workers=2):
                print("ready", flush=True)
                time.sleep(30)
        except KeyboardInterrupt:
            print("interrupted")
    """
    process = start_forked("-c", textwrap.dedent(script), folder, folder=folder)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == ("interrupted\n", "")


def test_a_killed_worker_is_reported_as_such(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bn_insert.images.image_files.read_image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ImageError, match=r"a process that decodes images ended early, .*; use fewer workers"):
        list(image_batches(folder, PLAIN, batch_size=2, workers=2))


def test_a_file_of_gigabytes_is_skipped_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "x.jpg").open("wb") as file:
        file.truncate(3 << 30)
    tracemalloc.start()
    result = read_pixels(tmp_path / "x.jpg", Transform(), 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(result, Unreadable)
    assert result.reason == "the file has more than 268,500,991 bytes"
    assert peak < 1 << 20
