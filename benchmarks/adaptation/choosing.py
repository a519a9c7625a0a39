"""The measurements that the defaults of `adapt_statistics` were chosen by.

    python -m benchmarks.adaptation.choosing CIFAR_FOLDER --network cifar-vgg.pth

The gain in accuracy on validation images that the benchmark itself does not use, with the corruptions that CIFAR-10-C
sets apart for choosing, and contrast. Every way adapts to the same images. Prints a line per way, and writes them to
`choosing.jsonl`; interrupted, the program continues where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any
from zlib import crc32

import torch

from bn_insert import insert, load_checkpoint
from bn_insert.statistics import shrinkage
from bn_insert.surgery.adapt import adapt_inserted

from ..machine import machine
from ..record import Record
from ..renorm.cifar_network import load_part, preprocess
from .__main__ import BATCH, CLEAN, RESULTS, SOURCE_IMAGES, accuracy
from .corruptions import FOR_CHOOSING, corrupted

SETS = [(CLEAN, 0)] + [(name, severity) for name in (*FOR_CHOOSING, "contrast") for severity in (2, 5)]
LAST = 1000  # validation images, which the benchmark does not use


@dataclass(frozen=True)
class Way:
    """One way to adapt: number of target images, factor of chance in the shrinkage, layers, images per batch."""

    images: int
    caution: float | None = None  # None: the default
    layers: str = "all"
    batch: int = BATCH


def ways() -> Iterator[Way]:
    """Yield the ways, the most telling first."""
    for images in (32, 512, 8, 1):
        for layers in ("all", "conv"):
            yield Way(images, layers=layers)
    for images in (32, 8):
        for caution in (0.0, 0.5, 2.0):
            yield Way(images, caution)
    for layers in ("first 2", "first 4"):
        yield Way(512, layers=layers)
    yield Way(512, batch=128)
    yield Way(512, batch=8)
    yield Way(512, caution=0.0)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--test-images", type=int, default=250)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.output / "choosing.jsonl")
    lines = record.lines
    done = [line["way"] for line in lines]
    network = load_checkpoint(options.network).eval()
    train, _ = load_part(options.folder, "train")
    val, labels = load_part(options.folder, "val")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:SOURCE_IMAGES]
    source = preprocess(train[order]).split(BATCH)
    order = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))[-LAST:]
    test, pool = order[: options.test_images], order[options.test_images :]
    sets = {f"{name} {severity}": corrupted(val, name, severity) if severity else val for name, severity in SETS}
    before = {name: accuracy(network, preprocess(pixels[test]), labels[test]) for name, pixels in sets.items()}
    insertions: dict[str, Any] = {}
    default = shrinkage.caution
    for way in ways():
        if asdict(way) in done:
            continue
        if way.layers not in insertions:
            names = [site.name for site in insert(network, source[:1]).sites]
            first = int(way.layers.removeprefix("first ")) if way.layers.startswith("first") else len(names)
            skip = names[first:]
            insertions[way.layers] = insert(
                network, source, layers="conv" if way.layers == "conv" else ("conv", "dense"), skip=skip
            )
        shrinkage.caution = default if way.caution is None else lambda _images, factor=way.caution: factor
        gains = {}
        for name, pixels in sets.items():
            generator = torch.Generator().manual_seed(crc32(name.encode()))
            rows = pool[torch.randperm(len(pool), generator=generator)[: way.images]]
            adapted = adapt_inserted(network, insertions[way.layers], preprocess(pixels[rows]).split(way.batch)).model
            gains[name] = accuracy(adapted, preprocess(pixels[test]), labels[test]) - before[name]
        corrupt = [gain for name, gain in gains.items() if not name.startswith(CLEAN)]
        line = {"way": asdict(way), "mean": mean(corrupt), "worst": min(corrupt), "gains": gains, "machine": machine()}
        record.add(line)
        print(way, f"mean {mean(corrupt):+.2f} worst {min(corrupt):+.1f} clean {gains['clean 0']:+.1f}", flush=True)


if __name__ == "__main__":
    main()
