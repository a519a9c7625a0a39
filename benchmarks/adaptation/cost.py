"""The time that adapting takes, compared with plain forward loops over source and target.

    python -m benchmarks.adaptation.cost --output benchmarks/adaptation/results/cost.md

VGG16 with random weights at 224 x 224, in batches of 8. Processor time of one thread, the best of several rounds in
which the two alternate, so that other programs on the machine matter less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision

from bn_insert import adapt_statistics

from ..machine import machine

BATCH = 8


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="of the source, and of the target")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = torchvision.models.vgg16(weights=None).eval()
    source = torch.rand(options.images, 3, 224, 224, generator=torch.Generator().manual_seed(0)).split(BATCH)
    target = [0.3 * images for images in source]

    def loops() -> None:
        with torch.inference_mode():
            for images in (*source, *target):
                model(images)

    def adapting() -> None:
        adapt_statistics(model, source, target)

    times: dict[str, list[float]] = {"two forward loops": [], "adapt_statistics": []}
    for _ in range(options.rounds):
        for name, work in zip(times, (loops, adapting), strict=True):
            times[name].append(seconds(work))
    best = {name: min(found) for name, found in times.items()}
    plain = best["two forward loops"]
    rows = [f"| {name} | {value:.1f} | {value / plain:.2f} |" for name, value in best.items()]
    table = "\n".join(["| | seconds | of the loops |", "|---|---:|---:|", *rows])
    text = f"# The cost of adapting\n\n{(__doc__ or '').split(chr(10) * 2, 2)[2].strip()}\n\n{table}\n\n{machine()}\n"
    print(text)
    if options.output:
        options.output.write_text(text)


def seconds(work: Callable[[], None]) -> float:
    """Return the processor time that some work takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
