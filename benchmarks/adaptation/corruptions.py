"""The corruptions of CIFAR-10-C for images of 32 x 32, at five severities, by their published parameters.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", 2019,
arXiv:1903.12261. 17 of their 19 corruptions: frost needs photographs of frost, and spatter an edge detector of OpenCV.
The published packages (imagecorruptions and its forks) have the parameters of ImageNet-C, which are far stronger on
images of this size. Motion blur follows a line of nearest pixels, and zoom blur and elastic transform interpolate
bilinearly with mirrored borders, so that pixels differ from the published files in detail.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import convolve, gaussian_filter
from skimage.color import hsv2rgb, rgb2hsv
from torch import Tensor

SIDE = 32
SEVERITIES = (1, 2, 3, 4, 5)
# CIFAR-10-C has these apart from the others, for choosing settings.
FOR_CHOOSING = ("speckle noise", "gaussian blur", "saturate")

Images = NDArray[np.float64]  # images x rows x columns x channels, in 0..1
Corruption = Callable[[Images, Generator, int], Images]


def corrupted(pixels: Tensor, name: str, severity: int) -> Tensor:
    """Return corrupted images, the same at every call.

    Args:
        pixels: uint8, N x 3 x 32 x 32.
        name: One of CORRUPTIONS.
        severity: From 1 to 5.
    """
    random = np.random.default_rng([crc32(name.encode()), severity])
    images = pixels.permute(0, 2, 3, 1).numpy() / 255
    result = CORRUPTIONS[name](images, random, severity - 1)
    return torch.from_numpy(np.uint8(np.clip(result, 0, 1) * 255)).permute(0, 3, 1, 2).contiguous()


def _gaussian_noise(x: Images, random: Generator, level: int) -> Images:
    return x + random.normal(scale=(0.04, 0.06, 0.08, 0.09, 0.10)[level], size=x.shape)


def _shot_noise(x: Images, random: Generator, level: int) -> Images:
    photons = (500, 250, 100, 75, 50)[level]
    return random.poisson(x * photons) / photons


def _impulse_noise(x: Images, random: Generator, level: int) -> Images:
    hit = random.random(x.shape) < (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    return np.where(hit, random.integers(0, 2, x.shape), x)


def _speckle_noise(x: Images, random: Generator, level: int) -> Images:
    return x + x * random.normal(scale=(0.06, 0.1, 0.12, 0.16, 0.2)[level], size=x.shape)


def _gaussian_blur(x: Images, _random: Generator, level: int) -> Images:
    return _blurred(x, (0.4, 0.6, 0.7, 0.8, 1.0)[level])


def _glass_blur(x: Images, random: Generator, level: int) -> Images:
    sigma, reach, rounds = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))[level]
    x = np.floor(_blurred(x, sigma) * 255) / 255
    every = np.arange(len(x))
    for _ in range(rounds):
        for row in range(SIDE - reach, reach, -1):
            for column in range(SIDE - reach, reach, -1):
                down, right = random.integers(-reach, reach, (2, len(x)))
                # The published program's swap reads the pixel after it was overwritten: in effect, this copy.
                x[:, row, column] = x[every, row + down, column + right]
    return _blurred(x, sigma)


def _defocus_blur(x: Images, _random: Generator, level: int) -> Images:
    radius, alias_sigma = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[level]
    offsets = np.arange(-8, 9)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(float)
    line = np.exp(-(np.arange(-1, 2) ** 2) / (2 * alias_sigma**2))
    kernel = convolve(disk / disk.sum(), np.outer(line, line) / line.sum() ** 2, mode="mirror")
    return convolve(x, kernel[None, :, :, None], mode="mirror")


def _motion_blur(x: Images, random: Generator, level: int) -> Images:
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[level]
    return _moved(x, radius, sigma, random.uniform(-45, 45, len(x)))


def _zoom_blur(x: Images, _random: Generator, level: int) -> Images:
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[level], 0.01)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _snow(x: Images, random: Generator, level: int) -> Images:
    mean, std, zoom, threshold, radius, sigma, share = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[level]
    flakes = _zoomed(random.normal(mean, std, (*x.shape[:3], 1)), zoom)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = _moved(flakes, radius, sigma, random.uniform(-135, -45, len(x)))
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    return share * x + (1 - share) * np.maximum(x, grey * 1.5 + 0.5) + flakes + flakes[:, ::-1, ::-1]


def _fog(x: Images, random: Generator, level: int) -> Images:
    amount, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[level]
    brightest = x.max((1, 2, 3), keepdims=True)
    return (x + amount * _plasma(len(x), decay, random)[..., None]) * brightest / (brightest + amount)


def _brightness(x: Images, _random: Generator, level: int) -> Images:
    hsv = rgb2hsv(x)
    hsv[..., 2] = np.clip(hsv[..., 2] + (0.05, 0.1, 0.15, 0.2, 0.3)[level], 0, 1)
    return hsv2rgb(hsv)


def _saturate(x: Images, _random: Generator, level: int) -> Images:
    scale, shift = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[level]
    hsv = rgb2hsv(x)
    hsv[..., 1] = np.clip(hsv[..., 1] * scale + shift, 0, 1)
    return hsv2rgb(hsv)


def _contrast(x: Images, _random: Generator, level: int) -> Images:
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[level] + mean


def _elastic_transform(x: Images, random: Generator, level: int) -> Images:
    strength, sigma, reach = (
        SIDE * np.array(((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)))
    )[level]
    center, half = SIDE // 2, SIDE // 3
    corners = center + half * np.array([[1, 1], [1, -1], [-1, -1]])  # column, row
    moved = corners + random.uniform(-reach, reach, (len(x), 3, 2))
    back = np.linalg.solve(np.concatenate([moved, np.ones((len(x), 3, 1))], 2), np.broadcast_to(corners, moved.shape))
    column, row = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    places = np.stack([column, row, np.ones_like(row)], -1) @ back[:, None]
    if strength:
        shifts = random.uniform(-1, 1, (len(x), SIDE, SIDE, 2))
        places += gaussian_filter(shifts, (0, sigma, sigma, 0), mode="reflect", truncate=3) * strength
    return _read_at(x, places)


def _pixelate(x: Images, _random: Generator, level: int) -> Images:
    side = int(SIDE * (0.95, 0.9, 0.85, 0.75, 0.65)[level])
    box = Image.Resampling.BOX
    return _by_pillow(x, lambda image: image.resize((side, side), box).resize((SIDE, SIDE), box))


def _jpeg_compression(x: Images, _random: Generator, level: int) -> Images:
    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=(80, 65, 58, 50, 40)[level])
        return Image.open(file)

    return _by_pillow(x, compressed)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian noise": _gaussian_noise,
    "shot noise": _shot_noise,
    "impulse noise": _impulse_noise,
    "speckle noise": _speckle_noise,
    "defocus blur": _defocus_blur,
    "gaussian blur": _gaussian_blur,
    "glass blur": _glass_blur,
    "motion blur": _motion_blur,
    "zoom blur": _zoom_blur,
    "snow": _snow,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "saturate": _saturate,
    "elastic transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg compression": _jpeg_compression,
}


def _blurred(x: Images, sigma: float) -> Images:
    return gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")


def _by_pillow(x: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    pixels = np.rint(x * 255).astype(np.uint8)
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in pixels]) / 255


def _moved(x: Images, radius: float, sigma: float, degrees: NDArray[np.float64]) -> Images:
    """Return the weighted sum of the images shifted along a line of 2 radius + 1 pixels, half a Gaussian as weights."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    rows, columns = np.arange(SIDE)[:, None], np.arange(SIDE)
    images = np.arange(len(x))[:, None, None]
    result = np.zeros_like(x)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        down = np.rint(step * np.sin(np.deg2rad(degrees))).astype(int)[:, None, None]
        right = np.rint(step * np.cos(np.deg2rad(degrees))).astype(int)[:, None, None]
        result += weight * x[images, np.clip(rows + down, 0, SIDE - 1), np.clip(columns + right, 0, SIDE - 1)]
    return result


def _zoomed(x: Images, factor: float) -> Images:
    """Return the images enlarged about their centers."""
    column, row = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    center = (SIDE - 1) / 2
    places = (np.stack([column, row], -1) - center) / factor + center
    return _read_at(x, np.broadcast_to(places, (len(x), SIDE, SIDE, 2)))


def _read_at(x: Images, places: NDArray[np.float64]) -> Images:
    """Return the images read at (column, row), between pixels bilinearly and outside of the image mirrored."""
    images = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)
    grid = torch.from_numpy(np.ascontiguousarray(places)) * 2 / (SIDE - 1) - 1
    read = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
    return read.permute(0, 2, 3, 1).numpy()


def _plasma(count: int, decay: float, random: Generator) -> NDArray[np.float64]:
    """Return height maps in 0..1 by the diamond-square algorithm on a torus."""
    maps = np.zeros((count, SIDE, SIDE))
    step, range_ = SIDE, 1.0

    def displaced(total: NDArray[np.float64]) -> NDArray[np.float64]:
        return total / 4 + range_ * random.uniform(-range_, range_, total.shape)

    while step >= 2:
        half = step // 2
        corners = maps[:, ::step, ::step]
        around = corners + np.roll(corners, -1, 1)
        maps[:, half::step, half::step] = displaced(around + np.roll(around, -1, 2))
        middles = maps[:, half::step, half::step]
        above_below = middles + np.roll(middles, 1, 1)
        left_right = corners + np.roll(corners, -1, 2)
        maps[:, ::step, half::step] = displaced(above_below + left_right)
        left_right = middles + np.roll(middles, 1, 2)
        above_below = corners + np.roll(corners, -1, 1)
        maps[:, half::step, ::step] = displaced(left_right + above_below)
        step, range_ = half, range_ / decay
    maps -= maps.min((1, 2), keepdims=True)
    return maps / maps.max((1, 2), keepdims=True)
