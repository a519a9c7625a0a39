"""What does a training step with Batch Renormalization cost, against the same step with nn.BatchNorm2d?

    python -m benchmarks.renorm.step_cost --rounds 40

VGG11's convolutions with BatchNorm and a linear head: forward, backward and SGD. In each round every kind of layer
takes one step, in random order; a ratio is between two steps of one round, so that other load on the machine meets
both. The time is processor time of this process, to which other processes do not add; wall-clock time is beside it.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from bn_insert import RenormScheduler
from bn_insert.batchnorm.batch_renorm import BATCH_RENORMS

from ..machine import machine

LIMITS = {"unlimited": {}, "limited": {"r_max": 1.5, "d_max": 0.5}, "with RenormScheduler": {}}
BASELINE = "nn.BatchNorm2d"


@dataclass
class Step:
    """One training step of a model that is kept from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    scheduler: RenormScheduler | None

    def __call__(self) -> tuple[float, float]:
        """Return the seconds it took: of this process, and on the wall."""
        start = time.process_time(), time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        return time.process_time() - start[0], time.perf_counter() - start[1]


def network() -> nn.Module:
    """Return VGG11 with BatchNorm, with a small head: its dense layers would hide what a BatchNorm costs."""
    vgg = torchvision.models.vgg11_bn(weights=None)
    return nn.Sequential(vgg.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def steps(batch_size: int, side: int, memory_format: torch.memory_format) -> dict[str, Step]:
    """Return the step with each kind of layer; all start from the same weights."""
    model = network().train().to(memory_format=memory_format)
    images = torch.randn(batch_size, 3, side, side).contiguous(memory_format=memory_format)
    labels = torch.randint(10, (batch_size,))
    models = {BASELINE: model}
    for name, limits in LIMITS.items():
        models[f"BatchRenorm2d, {name}"] = changed = copy.deepcopy(model)
        for norm in changed.modules():
            if type(norm) in BATCH_RENORMS:
                norm.__class__ = BATCH_RENORMS[type(norm)]
                for limit, value in limits.items():
                    setattr(norm, limit, value)
    return {
        name: Step(
            model,
            torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
            images,
            labels,
            RenormScheduler(model) if name.endswith("RenormScheduler") else None,
        )
        for name, model in models.items()
    }


def rows(batch_size: int, side: int, memory_format: torch.memory_format, rounds: int) -> list[str]:
    """Return the lines of the table for one batch size and memory format."""
    every = steps(batch_size, side, memory_format)
    for step in every.values():
        step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in every}
    for _ in range(rounds):
        for name in random.sample(list(every), len(every)):
            times[name].append(every[name]())
    baseline = times[BASELINE]
    lines = []
    for name, taken in times.items():
        own, wall = (
            statistics.quantiles((step[clock] / base[clock] for step, base in zip(taken, baseline, strict=True)), n=4)
            for clock in (0, 1)
        )
        milliseconds = statistics.median(step[0] for step in taken) * 1000
        ratio = f"{own[1]:.3f} ({own[0]:.3f} .. {own[2]:.3f}) | {wall[1]:.3f} ({wall[0]:.3f} .. {wall[2]:.3f})"
        layout = str(memory_format).removeprefix("torch.")
        lines.append(f"| {batch_size} | {layout} | {name} | {milliseconds:.1f} | {ratio} |")
    return lines


def main() -> None:
    """Measure contiguous and channels_last, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16])
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(f"# A training step, VGG11's convolutions at {options.side} x {options.side}, {options.rounds} rounds\n")
    print("| batch | memory format | layer | processor time, ms | ratio, median (quartiles) | wall-clock ratio |")
    print("|---|---|---|---|---|---|")
    for batch_size in options.batch_sizes:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for line in rows(batch_size, options.side, memory_format, options.rounds):
                print(line, flush=True)
    print(f"\n{machine()}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
