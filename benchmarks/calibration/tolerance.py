"""How often the true error is below the tolerance at which calibration stopped.

    python -m benchmarks.calibration.tolerance --output benchmarks/calibration/results/tolerance.md

The demo network reads its 360 digits repeatedly in random order; their statistics are the ground truth. A run is honest
when the true error of mean and std, relative to std, is below the tolerance for 99 % of the channels of every layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from bn_insert import Moments, Site, calibrate, find_sites, load_checkpoint
from bn_insert.demo import images_path, network_path
from bn_insert.images.image_sources import open_batches
from bn_insert.images.transform import Transform
from bn_insert.report import versions

FRACTION = 0.99


def true_error(found: Moments, truth: Moments) -> float:
    """Return what 99 % of the channels stay below in error of mean and std, relative to std."""
    of_mean, of_std = (found.mean - truth.mean).abs(), (found.std - truth.std).abs()
    return float((torch.maximum(of_mean, of_std) / truth.std).quantile(FRACTION))


def measure(  # noqa: PLR0917 - one run has that many settings
    model: nn.Module, sites: list[Site], images: Tensor, tolerance: float, batch_size: int, runs: int
) -> tuple[int, list[int], list[float]]:
    """Return how many runs were honest, the images that each took, and the worst true error of each."""
    truth = calibrate(model, sites, [images])
    taken, errors = [], []
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        stream = torch.randint(len(images), (100_000,), generator=generator).split(batch_size)
        seen: list[int] = []
        found = calibrate(model, sites, (images[rows] for rows in stream), tolerance=tolerance, progress=seen.append)
        taken.append(seen[-1])
        errors.append(max(true_error(found[site.name], truth[site.name]) for site in sites))
    return sum(error < tolerance for error in errors), taken, errors


def main() -> None:
    """Measure at several tolerances and batch sizes, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model = load_checkpoint(network_path())
    transform = Transform(resize=None, crop=None, mean=(0.0,), std=(1.0,))
    images = torch.cat([batch.images for batch in open_batches(images_path(), transform)])
    sites = find_sites(model, images[:1])
    lines = [
        f"# Stopping at a tolerance, {options.runs} runs each",
        "",
        "| tolerance | batch size | images used | worst true error, median | largest | runs within tolerance |",
        "|---|---|---|---|---|---|",
    ]
    for tolerance, batch_size in ((0.3, 4), (0.3, 16), (0.15, 4), (0.15, 16), (0.08, 16)):
        honest, taken, errors = measure(model, sites, images, tolerance, batch_size, options.runs)
        median = float(torch.tensor(errors).median())
        row = (tolerance, batch_size, f"{min(taken)} .. {max(taken)}", f"{median:.3f}", f"{max(errors):.3f}")
        lines.append("| " + " | ".join(map(str, row)) + f" | {honest / options.runs:.0%} |")
        print(lines[-1], flush=True)
    lines += ["", ", ".join(f"{name} {number}" for name, number in versions().items()), ""]
    if options.output:
        options.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
