import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import VGG16_Weights
from torchvision.transforms import functional as F

from bn_insert.errors import ImageError
from bn_insert.images.transform import Transform
from support.photographs import photograph

PHOTOGRAPHS = {name: photograph(name) for name in ("china", "flower")}


@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
@pytest.mark.parametrize("size", [None, (500, 375), (375, 500), (256, 256), (300, 256), (257, 900), (64, 48), (1, 90)])
def test_the_defaults_equal_the_preset_of_torchvisions_vgg16_bit_for_bit(
    photograph: str, size: tuple[int, int] | None
) -> None:
    image = Image.fromarray(PHOTOGRAPHS[photograph])
    image = image if size is None else image.resize(size)
    preset = VGG16_Weights.IMAGENET1K_V1.transforms()
    assert torch.equal(Transform()(image), preset(image))


@pytest.mark.parametrize("resize", [None, 97, 256])
@pytest.mark.parametrize("crop", [None, 1, 96, 225, 700])
@pytest.mark.parametrize("size", [(101, 64), (64, 101), (226, 225)])
def test_every_size_crops_and_pads_as_torchvision_does(
    resize: int | None, crop: int | None, size: tuple[int, int]
) -> None:
    image = Image.fromarray(PHOTOGRAPHS["flower"]).resize(size)
    expected = image if resize is None else F.resize(image, resize)
    expected = expected if crop is None else F.center_crop(expected, crop)
    expected = F.normalize(F.to_tensor(expected), [0.1, 0.2, 0.3], [0.7, 0.8, 0.9])
    assert torch.equal(Transform(resize, crop, (0.1, 0.2, 0.3), (0.7, 0.8, 0.9))(image), expected)


def test_a_grey_picture_has_one_channel_and_one_value_of_mean_and_std() -> None:
    image = Image.new("L", (4, 4), 255)
    assert Transform(None, None, (0.5,), (0.25,))(image).tolist() == [[[2.0] * 4] * 4]


def test_one_value_of_mean_and_std_stands_for_all_channels() -> None:
    image = Image.fromarray(PHOTOGRAPHS["china"])
    one, three = Transform(mean=(0.5,), std=(0.2,)), Transform(mean=(0.5,) * 3, std=(0.2,) * 3)
    assert torch.equal(one(image), three(image))


def test_normalizing_a_batch_equals_normalizing_each_picture() -> None:
    pixels = torch.from_numpy(np.stack([PHOTOGRAPHS["china"], PHOTOGRAPHS["flower"]])).permute(0, 3, 1, 2)
    batch = Transform().normalize(pixels)
    assert torch.equal(batch, torch.stack([Transform().normalize(each) for each in pixels]))
    assert batch.dtype == torch.float32


def test_a_transform_comes_back_from_json() -> None:
    for transform in (Transform(), Transform(None, 48, (0.5,), (0.5,)), Transform(48, None, (0.0,), (1.0,))):
        assert Transform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resize": 256}, "the field crop is missing"),
        ({**Transform().to_dict(), "flip": True}, "unknown field flip"),
        ({}, "the field resize is missing"),
        ({**Transform().to_dict(), "crop": "224"}, "the field crop is wrong: expected int . null, got str"),
        ({**Transform().to_dict(), "crop": True}, "the field crop is wrong: expected int . null, got bool"),
        ({**Transform().to_dict(), "mean": "0.5"}, "the field mean is wrong: expected array, got str"),
        ({**Transform().to_dict(), "std": [0.5, None]}, r"the field std\[1\] is wrong: expected float, got null"),
        ({**Transform().to_dict(), "std": [0]}, r"std is \(0.0,\)"),
        ({**Transform().to_dict(), "mean": [10**400]}, r"the field mean\[0\] is wrong: number out of range"),
    ],
)
def test_a_description_that_is_no_transform_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        Transform.from_dict(values)


def test_something_else_than_a_dict_is_refused() -> None:
    with pytest.raises(
        ImageError, match="a transform has the fields resize, crop, mean and std; expected object, got array"
    ):
        Transform.from_dict([256])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resize": 0}, "resize is 0; use 1 to 16384 pixels, or None to keep the size"),
        ({"crop": -3}, "crop is -3; use 1 to 16384 pixels, or None not to crop"),
        ({"crop": 10**6}, "crop is 1000000; use 1 to 16384 pixels"),
        ({"std": (0.2, 0.0, 0.2)}, r"std is \(0.2, 0.0, 0.2\); use one value above 0"),
        ({"std": (-1.0,)}, r"std is \(-1.0,\); use one value above 0"),
        ({"std": (1e-60,)}, "std is .*; use one value above 0"),
        ({"std": (float("nan"),)}, "std is .*; use one value above 0"),
        ({"mean": (float("inf"),)}, "mean is .*; use one finite value"),
        ({"mean": (1e300,)}, "mean is .*; use one finite value"),
        ({"mean": ()}, "mean is .*; use one finite value"),
        ({"mean": (0.1, 0.2)}, "mean has 2 values and std 3; pass both, with one value per channel"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        Transform(**values)  # type: ignore[arg-type]


def test_a_width_and_a_height_are_refused() -> None:
    transform = Transform()
    object.__setattr__(transform, "resize", (48, 48))  # past the type checks of the tests
    with pytest.raises(ImageError, match=r"resize is \(48, 48\); pass the length of the shorter side as one number"):
        transform.__post_init__()


def test_a_number_for_mean_or_std_is_refused() -> None:
    transform = Transform()
    object.__setattr__(transform, "mean", 0.5)
    with pytest.raises(
        ImageError, match=r"mean is 0.5; pass a tuple with one value for all channels, such as \(0.5,\)"
    ):
        transform.__post_init__()


def test_three_values_for_one_channel_are_refused_with_the_way_out() -> None:
    message = r"mean has 3 values, but the network takes 1 channel; pass 1 value as mean"
    with pytest.raises(ImageError, match=message):
        Transform().check_channels(1)
    with pytest.raises(ImageError, match=message):
        Transform()(Image.new("L", (4, 4)))


def test_two_values_for_three_channels_are_refused_with_the_way_out() -> None:
    transform = Transform(mean=(0.5,), std=(0.5, 0.5))
    with pytest.raises(
        ImageError, match=r"std has 2 values, but the network takes 3 channels; pass 1 or 3 values as std"
    ):
        transform.check_channels(3)


def test_a_thin_picture_that_would_be_resized_to_gigabytes_is_refused() -> None:
    message = "1 x 30000 pixels resized to 256 x 7680000 would take gigabytes"
    with pytest.raises(ImageError, match=message):
        Transform().pixels(Image.new("RGB", (1, 30000)))


def test_no_warning_comes_of_normalizing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Transform()(Image.new("RGB", (4, 4)))


@pytest.mark.parametrize("name", ["resize", "crop"])
def test_a_file_may_not_ask_for_pictures_of_nearly_a_gigabyte(name: str) -> None:
    values = Transform().to_dict() | {name: 16384}
    with pytest.raises(ImageError, match=rf"{name} of a transform is 16384, and a file may ask for 4096 .*pass {name}"):
        Transform.from_dict(values)
