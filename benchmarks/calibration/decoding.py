"""Methods to turn JPEG files into input for a network: how long each takes, and whether the pixels equal the preset's.

    python -m benchmarks.calibration.decoding --output benchmarks/calibration/results/decoding.md

Each method reads, decodes, resizes to 256 and crops to 224 x 224, in one single-threaded process; they take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from bn_insert.images.image_files import read_pixels
from bn_insert.images.image_sources import open_batches
from bn_insert.images.transform import Transform

from ..machine import machine
from .commands import photographs_in

TRANSFORM = Transform()
PRESET = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])


def ours(path: Path) -> Tensor:
    """Pillow, as bn-insert calls it."""
    pixels = read_pixels(path, TRANSFORM, channels=3)
    if isinstance(pixels, tuple):
        raise ValueError(f"{path}: {pixels.reason}")
    return torch.from_numpy(pixels.copy())


def preset(path: Path) -> Tensor:
    """Pillow, as torchvision's preset for ImageNet is usually fed."""
    with Image.open(path) as picture:
        return v2.functional.pil_to_tensor(PRESET(picture.convert("RGB")))


def torchvision_io(path: Path) -> Tensor:
    """torchvision.io, resized as a tensor."""
    return PRESET(decode_image(str(path), ImageReadMode.RGB))


METHODS: dict[str, Callable[[Path], Tensor]] = {
    "Pillow, as bn-insert calls it": ours,
    "Pillow and torchvision's transforms": preset,
    "`torchvision.io` and torchvision's transforms": torchvision_io,
}


def main() -> None:
    """Print two tables: methods of decoding, and processes that decode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lines = [
        "# Decoding speed",
        "",
        "| implementation | ms per image | images identical to those of torchvision's preset |",
        "|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(photographs_in(Path(folder) / "photographs", options.count).rglob("*.jpg"))
        times: dict[str, list[float]] = {method: [] for method in METHODS}
        for _ in range(options.repeats):
            for method, read in METHODS.items():
                began = time.perf_counter()
                for path in files:
                    read(path)
                times[method].append(time.perf_counter() - began)
        for method, read in METHODS.items():
            equal = sum(torch.equal(read(path), preset(path)) for path in files)
            lines.append(
                f"| {method} | {1000 * statistics.median(times[method]) / len(files):.2f} | {equal} of {len(files)} |"
            )
        torch.set_num_threads(threads)
        lines += ["", "| decoding processes (`-j`) | images per second |", "|---|---|"]
        for workers in (0, 1, 2):
            batches = open_batches(Path(folder) / "photographs", TRANSFORM, workers=workers)
            began = time.perf_counter()
            images = sum(len(batch.images) for batch in batches)
            lines.append(f"| {workers} | {images / (time.perf_counter() - began):.0f} |")
    lines += ["", f"JPEGs of 500 x 375. {machine()}", ""]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
