"""Calibrate VGG16 on one rank's share of 256 images under torchrun, and print the seconds."""

from __future__ import annotations

import time

import torch
import torchvision

from bn_insert import calibrate, find_sites
from bn_insert.support.processes import Ranks, process_group


def main() -> None:
    """Time the calibration alone: from when all processes are ready until all have the merged moments."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = torchvision.models.vgg16(weights=None).eval()
    sites = find_sites(network, torch.rand(1, 3, 224, 224))
    batches = torch.randn(256, 3, 224, 224, generator=torch.Generator().manual_seed(1)).split(16)
    with process_group(torch.device("cpu")):
        ranks = Ranks.current()
        ranks.gathered([])  # wait for each other
        began = time.perf_counter()
        calibrate(network, sites, batches[ranks.rank :: ranks.count])
        if ranks.first:
            print(time.perf_counter() - began)


if __name__ == "__main__":
    main()
