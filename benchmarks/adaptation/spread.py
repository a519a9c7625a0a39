"""What the estimate of the spread between images changes in adapting to corrupted images.

    python -m benchmarks.adaptation.spread CIFAR_FOLDER --network cifar-vgg.pth

Statistics of a few target images are adopted only as far as their difference from the source exceeds what is expected
by chance, which follows from the spread between images. It was first estimated from the spread between the batches of
the source, and the statistics of the source counted as exact: the tables in this folder were measured then. Today, the
spread is measured image by image, and the sampling error of the source counts (`bn_insert/statistics/shrinkage.py`).
Both adapt to the same images: the corruptions of CIFAR-10-C at severities 2 and 4. The accuracy is that on 1,000
validation images, under bfloat16 autocast; the images adapted to are others of the validation images.

Every corruption and severity is a line in `spread.jsonl`: interrupted, the program continues where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch
from zlib import crc32

import torch

from bn_insert import load_checkpoint
from bn_insert.statistics.shrinkage import Prior
from bn_insert.surgery.adapt import adapt_inserted

from ..machine import machine
from ..record import Record
from ..renorm.cifar_network import load_part, preprocess
from .__main__ import BATCH, RESULTS, TEST_IMAGES, accuracy, inserted_on_source, source_batches
from .corruptions import CORRUPTIONS, corrupted

TARGETS = (8, 32, 1000)
ESTIMATES = {"batches": False, "images": True}


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with train/ and val/ of CIFAR-10")
    parser.add_argument("--network", type=Path, required=True, help="checkpoint of a VGG trained on it")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for spread.jsonl and .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.output / "spread.jsonl")
    network = load_checkpoint(options.network).eval()
    val, labels = load_part(options.folder, "val")
    source = source_batches(options.folder)
    insertions = {
        estimate: inserted_on_source(network, source, spread_by_image=by_image)
        for estimate, by_image in ESTIMATES.items()
    }
    order = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))
    test, pool = order[:TEST_IMAGES], order[TEST_IMAGES : TEST_IMAGES + max(TARGETS)]
    done = {(line["corruption"], line["severity"]) for line in record.lines}
    for name, severity in ((name, severity) for name in CORRUPTIONS for severity in (2, 4)):
        if (name, severity) in done:
            continue
        pixels = corrupted(val, name, severity)
        images, wanted = preprocess(pixels[test]), labels[test]
        generator = torch.Generator().manual_seed(crc32(f"{name} {severity}".encode()))
        drawn = pool[torch.randperm(len(pool), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16):
            original = accuracy(network, images, wanted)
        gains: dict[str, dict[str, float]] = {}
        for estimate, insertion in insertions.items():
            gains[estimate] = {}
            for count in TARGETS:
                with _source_exact(estimate == "batches"):
                    target = preprocess(pixels[drawn[:count]]).split(BATCH)
                    adapted = adapt_inserted(network, insertion, target, keep_batchnorm=True).model
                with torch.autocast("cpu", torch.bfloat16):
                    gains[estimate][str(count)] = accuracy(adapted, images, wanted) - original
        record.add({"corruption": name, "severity": severity, "gains": gains, "machine": machine()})
        print(name, severity, gains, flush=True)
    (options.output / "spread.md").write_text(report(record.lines))


@contextmanager
def _source_exact(exact: bool) -> Iterator[None]:
    """Let the statistics of the source count as exact."""
    of = Prior.of

    def exactly(*args: Any, **kwargs: Any) -> Prior:
        return replace(of(*args, **kwargs), images=inf)

    with patch.object(Prior, "of", exactly if exact else of):
        yield


def report(lines: list[dict[str, Any]]) -> str:
    """Return the page: mean gains, in points, by the estimate and the number of target images."""
    table = [["spread between", *(f"{count:,} target images" for count in TARGETS)], ["---", *["---:"] * len(TARGETS)]]
    for estimate in ESTIMATES:
        gains = {count: mean(line["gains"][estimate][str(count)] for line in lines) for count in TARGETS}
        shares = (f"{gains[count]:+.2f} ({gains[count] / gains[TARGETS[-1]]:.0%})" for count in TARGETS)
        table.append([estimate, *shares])
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    explanation = (
        f"Mean gain over the original in {len(lines)} cases, in points, and its share of that with 1,000 images."
    )
    title = "# The spread between images"
    return "\n\n".join(
        [title, (__doc__ or "").split("\n\n", 2)[2].strip(), explanation, text, lines[-1]["machine"], ""]
    )


if __name__ == "__main__":
    main()
