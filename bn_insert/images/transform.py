"""Preprocessing of a picture: resize, crop, scale to 0..1, normalize."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor

from ..errors import ImageError, as_passed, messages_name_options, values_as_passed
from ..support.schema import Finite, SchemaError, checked
from ..support.text import counted

# Pillow's limit against decompression bombs applies to the size in the file, these to the size after resizing and
# padding: a picture of 1 x 30000 pixels becomes one of 256 x 7680000.
_LONGEST_SIDE = 1 << 14
_MOST_PIXELS = _LONGEST_SIDE**2
# For a transform stored in a file: 50 MB per picture, where _LONGEST_SIDE would take 0.8 GB.
_LONGEST_STORED_SIDE = 1 << 12


@dataclass(frozen=True)
class Transform:
    """Resize, center crop, scaling to 0..1 and normalization; the defaults are torchvision's for its ImageNet VGGs.

    On a Pillow image the result equals `torchvision.models.VGG16_Weights.IMAGENET1K_V1.transforms()` bit for bit.

    Args:
        resize: Length of the shorter side in pixels, bilinear with antialiasing; None keeps the size.
        crop: Side of the square cut from the center in pixels, padded with black where the picture is smaller; None
            does not crop.
        mean: Subtracted from the values in 0..1; one value for all channels, or one per channel.
        std: Divides the result; one value for all channels, or one per channel.

    Raises:
        ImageError: For sizes that are not one number from 1 to 16384, a std that is not positive, and numbers of values
            that do not match.

    Examples:
        >>> Transform(resize=None, crop=48, mean=(0.5,), std=(0.5,))(Image.new("RGB", (48, 48))).unique()
        tensor([-1.])
    """

    resize: int | None = 256
    crop: int | None = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        """Check the values before any picture is read."""
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and not isinstance(size, int):
                meaning = "length of the shorter side" if name == "resize" else "side of a square"
                raise ImageError(
                    f"{name} is {size!r}; pass the {meaning} as one number of pixels, or None (images keep their "
                    "aspect ratio: train with torchvision's Resize(n) and CenterCrop(n), not with Resize((n, n)))"
                )
            if size is not None and not 1 <= size <= _LONGEST_SIDE:
                none = "to keep the size" if name == "resize" else "not to crop"
                raise ImageError(
                    f"{as_passed(name)} is {size}; use 1 to {_LONGEST_SIDE} pixels, or {as_passed('None', option='0')} "
                    f"{none}"
                )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not isinstance(values, (tuple, list)):
                raise ImageError(
                    f"{name} is {values!r:.80}; pass a tuple with one value for all channels, such as (0.5,), or one "
                    "per channel"
                )
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (self.mean, self.std))
        if not len(mean) or not mean.isfinite().all():
            raise ImageError(
                f"{as_passed('mean')} is {values_as_passed(self.mean)}; use one finite value for all channels, or one "
                "per channel"
            )
        if not len(std) or not (std.isfinite() & (std > 0)).all():
            raise ImageError(
                f"{as_passed('std')} is {values_as_passed(self.std)}; use one value above 0 for all channels, or one "
                "per channel"
            )
        if len({len(self.mean), len(self.std)} - {1}) > 1:
            raise ImageError(
                f"{as_passed('mean')} has {counted(len(self.mean), 'value')} and {as_passed('std')} {len(self.std)}; "
                "pass both, with one value per channel"
            )

    def __call__(self, image: Image.Image) -> Float32[Tensor, "channels height width"]:
        """Return the network's input for one picture of mode RGB or L.

        Raises:
            ImageError: For the reasons of `pixels` and `check_channels`.
        """
        self.check_channels(len(image.getbands()))
        pixels = torch.from_numpy(self.pixels(image)).contiguous()
        return self.normalize(pixels)

    def pixels(self, image: Image.Image) -> UInt8[np.ndarray, "channels height width"]:
        """Return the resized and cropped pixels of a picture of mode RGB or L, 0..255, not yet normalized.

        Raises:
            ImageError: When resizing a very long and thin picture would take gigabytes.
        """
        if self.resize is not None:
            image = _resized(image, self.resize)
        if self.crop is not None:
            # Pillow fills everything outside the picture with 0.
            left, top = _offset(image.width, self.crop), _offset(image.height, self.crop)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels = np.array(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def normalize(
        self, pixels: UInt8[Tensor, "*images channels height width"]
    ) -> Float32[Tensor, "*images channels height width"]:
        """Return pixels of 0..255 scaled to 0..1, minus the mean, divided by std."""
        # The order of operations of torchvision's preset: with any other the last bit differs.
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def check_channels(self, channels: int) -> None:
        """Raise ImageError unless mean and std each have one value, or one per channel."""
        needed = "1 value" if channels == 1 else f"1 or {channels} values"
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ImageError(
                    f"{name} has {len(values)} values, but the network takes {channels} channel"
                    f"{'s' * (channels > 1)}; pass {needed} as {as_passed(name)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON can hold them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any) -> Transform:
        """Return the transform that `to_dict` described.

        Raises:
            ImageError: For anything else.
        """
        try:
            stored: _Stored = checked(values, _Stored)
        except SchemaError as error:
            raise ImageError(f"a transform has the fields resize, crop, mean and std; {error}") from error
        for name, size in (("resize", stored.resize), ("crop", stored.crop)):
            if size is not None and size > _LONGEST_STORED_SIDE:
                raise ImageError(
                    f"{name} of a transform is {size}, and a file may ask for {_LONGEST_STORED_SIDE} pixels at most; "
                    f"if this size is intended, pass {as_passed(name)}"
                )
        with messages_name_options(False):  # a field of a file, not an option
            return cls(stored.resize, stored.crop, stored.mean, stored.std)


class _Stored(msgspec.Struct, forbid_unknown_fields=True):
    """A transform in a file."""

    resize: int | None
    crop: int | None
    mean: tuple[Finite, ...]
    std: tuple[Finite, ...]


def _resized(image: Image.Image, shorter: int) -> Image.Image:
    width, height = image.size
    longer = int(shorter * max(width, height) / min(width, height))
    size = (shorter, longer) if width <= height else (longer, shorter)
    if size == image.size:
        return image
    if shorter * longer > _MOST_PIXELS:
        raise ImageError(f"{width} x {height} pixels resized to {size[0]} x {size[1]} would take gigabytes of memory")
    return image.resize(size, Image.Resampling.BILINEAR)


def _offset(side: int, crop: int) -> int:
    """Return where a center crop starts; torchvision rounds differently where it pads."""
    return -((crop - side) // 2) if crop > side else round((side - crop) / 2)
