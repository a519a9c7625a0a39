"""The corruptions of ImageNet-C at five severities, by the package imagecorruptions-imaug.

Hendrycks and Dietterich, 2019, arXiv:1903.12261; Michaelis et al., 2019, arXiv:1907.07484. All 19 corruptions. Their
parameters are meant for larger images: on images of 32 x 32 they are far stronger than those of CIFAR-10-C
(`corruptions.py`).
"""

from __future__ import annotations

import warnings
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

PACKAGE = "imagecorruptions-imaug"
# Those that draw from generators of their own, unless they get a seed.
_WITH_SEED = {"glass_blur", "impulse_noise"}


def package_corrupted(pixels: Tensor, name: str, severity: int) -> Tensor:
    """Return corrupted images, the same at every call.

    Args:
        pixels: uint8, N x 3 x H x W, with H and W at least 32.
        name: The name of a corruption, such as "gaussian noise".
        severity: From 1 to 5.
    """
    try:
        from imagecorruptions import corrupt  # noqa: PLC0415 - for this benchmark alone
    except ModuleNotFoundError as error:
        raise SystemExit(f"--package needs `pip install {PACKAGE}`") from error

    function, seed = name.replace(" ", "_"), crc32(f"{name} {severity}".encode())
    np.random.seed(seed)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # values beyond 0..255 are cut off by a cast
        for number, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            options = {"seed": (seed + number) % 2**32} if function in _WITH_SEED else {}
            results.append(corrupt(image, severity, function, **options))
    return torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2).contiguous()
