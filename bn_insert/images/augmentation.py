"""Random changes to training images: mirroring, and random resized crops."""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

_RATIO = (3 / 4, 4 / 3)  # torchvision's default range of aspect ratios


def augmented(
    images: Float32[Tensor, "n c h w"], *, seed: int, hflip: float = 0.0, crop_scale: float = 1.0
) -> Float32[Tensor, "n c h w"]:
    """Return images changed at random, each on its own; PyTorch's random state is left alone.

    Args:
        images: Images of one size, which the result has too.
        seed: The changes depend on this and nothing else.
        hflip: Probability of mirroring an image from left to right.
        crop_scale: Smallest fraction of its area that a random resized crop keeps; 1 crops none.
    """
    if crop_scale < 1:
        images = _cropped(images, seed, crop_scale)
    if hflip > 0:
        chosen = torch.rand(len(images), generator=torch.Generator().manual_seed(seed)) < hflip
        images = torch.where(chosen[:, None, None, None], images.flip(3), images)
    return images


def _cropped(images: Float32[Tensor, "n c h w"], seed: int, scale: float) -> Float32[Tensor, "n c h w"]:
    from torchvision.transforms import v2  # noqa: PLC0415 - takes a second, and few runs need it

    height, width = images.shape[2:]
    crop = v2.RandomResizedCrop((height, width), scale=(scale, 1.0), ratio=_RATIO, antialias=True)
    with torch.random.fork_rng(devices=()):  # torchvision draws from the global generator
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
        return torch.stack([crop(image) for image in images])
