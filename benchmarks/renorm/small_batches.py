"""Training a network on with batches of 2 and 4: plain, with BatchNorm, and with Batch Renormalization.

    python -m benchmarks.renorm.small_batches --output benchmarks/renorm/results
    python -m benchmarks.renorm.small_batches --cifar CIFAR_FOLDER --network cifar-vgg.pth --output ...

The demo network trains on with the digits that it was trained on (new head: its output layer replaced by zeros). With
`--cifar`, a VGG without normalization does the same on CIFAR-10 (`benchmarks.renorm.cifar_network` trains one). SGD,
momentum 0.9, warm-up over 5 % of the steps, cosine; dropout is off; every method sees the same images in the same
order. Running statistics are re-estimated on 512 training images before each of four evaluations on held-out images.
Every finished run is a line in `small-batches.jsonl`: interrupted, the program continues where it was.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from bn_insert import insert_batchnorm, load_checkpoint, parameter_groups, recalibrate, replace_output
from bn_insert.batchnorm.batch_renorm import BATCH_RENORMS
from bn_insert.demo import network_path
from bn_insert.demo.training import as_input, load_digits, split

from ..machine import machine
from ..record import Record

RATES = {"plain": (1e-4, 3e-4, 1e-3, 3e-3), "renorm": (1e-4, 3e-4, 1e-3, 3e-3), "batchnorm": (3e-4, 1e-3, 3e-3, 1e-2)}
BATCHES = {"plain": (2, 4), "renorm": (2, 4), "batchnorm": (2, 4, 32)}
EVALUATIONS, CALIBRATION_IMAGES = 4, 512


@dataclass(frozen=True)
class Run:
    """One training run: data set, method, batch size, learning rate, head and seed."""

    data: str
    method: str
    batch: int
    rate: float
    head: str
    seed: int


@dataclass(frozen=True)
class Data:
    """A network and the images that it continues with."""

    network: nn.Module
    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


@cache
def digits() -> Data:
    """Return the demo network and the digits that it was trained on, and those that it was not."""
    train, held_out = split(load_digits())
    return Data(
        load_checkpoint(network_path()),
        as_input(train.pixels).contiguous(),
        train.labels,
        as_input(held_out.pixels).contiguous(),
        held_out.labels,
    )


@cache
def cifar(folder: Path, network: Path) -> Data:
    """Return a trained network with 4,000 of its training images and 1,000 others."""
    from .cifar_network import load_part, preprocess  # noqa: PLC0415 - torchvision's folders are needed here alone

    generator = torch.Generator().manual_seed(1)
    parts = []
    for part, count in (("train", 4000), ("val", 1000)):
        pixels, labels = load_part(folder, part)
        chosen = torch.randperm(len(pixels), generator=generator)[:count]
        parts += [preprocess(pixels[chosen]), labels[chosen]]
    return Data(load_checkpoint(network), *parts)


def prepared(data: Data, run: Run, generator: torch.Generator) -> nn.Module:
    """Return the network as a run starts from it."""
    network = copy.deepcopy(data.network)
    for module in network.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
    if run.method != "plain":
        network = insert_batchnorm(network, sample(data.train, generator))
    if run.head == "new":
        replace_output(network, 10)
    if run.method == "renorm":
        for module in network.modules():
            if type(module) in BATCH_RENORMS:
                module.__class__ = BATCH_RENORMS[type(module)]
    return network


def sample(images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return images to measure statistics on, in batches."""
    return images[torch.randperm(len(images), generator=generator)[:CALIBRATION_IMAGES]].split(64)


def accuracy(network: nn.Module, data: Data, run: Run, generator: torch.Generator) -> float:
    """Return the accuracy on held-out images, with running statistics re-estimated on training images."""
    evaluated = network if run.method == "plain" else recalibrate(network, sample(data.train, generator))
    evaluated.eval()
    correct = 0
    with torch.inference_mode():
        for images, labels in zip(data.held_out.split(250), data.held_out_labels.split(250), strict=True):
            correct += int((evaluated(images).argmax(1) == labels).sum())
    return correct / len(data.held_out)


def train(
    data: Data, run: Run, images_seen: int, before_step: Callable[[nn.Module, int, int, float], None] | None = None
) -> list[float]:
    """Return the accuracies before the first step and at each evaluation; NaN from where the loss is not finite.

    Args:
        data: Network and images.
        run: What is trained, and how.
        images_seen: Training images in all.
        before_step: Called with the network, the step, the number of steps and the learning rate of the step.
    """
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    network = prepared(data, run, generator)
    optimizer = torch.optim.SGD(parameter_groups(network, 1e-4), lr=run.rate, momentum=0.9)
    found = [accuracy(network, data, run, generator)]
    epochs = -(-images_seen // len(data.train))
    order = torch.cat([torch.randperm(len(data.train), generator=generator) for _ in range(epochs)])[:images_seen]
    steps = images_seen // run.batch
    for step, rows in enumerate(order[: steps * run.batch].view(steps, run.batch)):
        warm_up = min(1, (step + 1) / max(1, 0.05 * steps))
        for group in optimizer.param_groups:
            group["lr"] = run.rate * warm_up * (1 + math.cos(math.pi * step / steps)) / 2
        network.train()
        if before_step:
            before_step(network, step, steps, optimizer.param_groups[0]["lr"])
        loss = F.cross_entropy(network(data.train[rows]), data.train_labels[rows])
        if not loss.isfinite():
            return found + [math.nan] * (EVALUATIONS + 1 - len(found))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % (steps // EVALUATIONS) == 0 and len(found) <= EVALUATIONS:
            found.append(accuracy(network, data, run, generator))
    return found


def plan(names: list[str], seeds: int) -> Iterator[Run]:
    """Yield the runs, seed by seed."""
    for seed, name, head in product(range(seeds), names, ("old", "new")):
        for method, rates in RATES.items():
            for batch, rate in product(BATCHES[method], rates):
                yield Run(name, method, batch, rate, head, seed)


def table(lines: list[dict[str, Any]]) -> str:
    """Return a Markdown table: one row per case, medians over seeds."""
    cases: dict[tuple[Any, ...], list[list[float]]] = {}
    for line in lines:
        key = tuple(line[name] for name in ("data", "head", "batch", "method", "rate"))
        cases.setdefault(key, []).append(line["accuracies"])
    rows = [
        "| data | head | batch | method | rate | seeds | start | lowest | last |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, head, batch, method, rate), runs in sorted(cases.items(), key=str):
        start, lowest, last = (
            median(map(pick, runs)) for pick in (lambda run: run[0], lambda run: min(run[1:]), lambda run: run[-1])
        )
        figures = " | ".join("diverged" if math.isnan(value) else f"{value:.3f}" for value in (start, lowest, last))
        rows.append(f"| {name} | {head} | {batch} | {method} | {rate:g} | {len(runs)} | {figures} |")
    return "\n".join(rows)


def comparison(lines: list[dict[str, Any]]) -> str:
    """Return two tables of medians over seeds: the fall below the start, and the distance from batches of 32."""
    runs: dict[tuple[Any, ...], list[list[float]]] = {}
    for line in lines:
        # A run that diverged has the accuracy of no answer.
        accuracies = [0.0 if math.isnan(value) else value for value in line["accuracies"]]
        key = (line["data"], line["head"], line["method"], line["batch"], line["rate"])
        runs.setdefault(key, []).append(accuracies)

    def last(*case: Any) -> float | None:
        return median(run[-1] for run in runs[case]) if case in runs else None

    def fall(*case: Any) -> str:
        return f"{100 * median(run[0] - min(run[1:]) for run in runs[case]):.1f}" if case in runs else ""

    fallen = ["| data | batch | rate | plain | BatchNorm | renorm |", "|---|---:|---:|---:|---:|---:|"]
    rates = " | ".join(f"renorm {rate:g}" for rate in RATES["renorm"])
    distances = [f"| data | head | BatchNorm, 32 | batch | {rates} |", "|---|---|---:|---:|" + "---:|" * 4]
    for name in sorted({line["data"] for line in lines}):
        for batch, rate in product(BATCHES["renorm"], RATES["renorm"]):
            cells = " | ".join(fall(name, "old", method, batch, rate) for method in ("plain", "batchnorm", "renorm"))
            fallen.append(f"| {name} | {batch} | {rate:g} | {cells} |")
        for head, batch in product(("old", "new"), BATCHES["renorm"]):
            reference = [last(name, head, "batchnorm", 32, rate) for rate in RATES["batchnorm"]]
            best = max((value for value in reference if value is not None), default=None)
            if best is None:
                continue
            found = [last(name, head, "renorm", batch, rate) for rate in RATES["renorm"]]
            cells = " | ".join("" if value is None else f"{100 * (value - best):+.1f}" for value in found)
            distances.append(f"| {name} | {head} | {best:.3f} | {batch} | {cells} |")
    return "\n".join(
        [
            "Old head: points of accuracy by which the lowest of the four evaluations is below the start.\n",
            *fallen,
            "\nLast accuracy of renorm, in points above that of BatchNorm with batches of 32 at its best rate.\n",
            *distances,
            "\nAll runs:\n",
        ]
    )


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare the options of a program that makes such runs, and writes NAME.jsonl and .md."""
    parser.add_argument("--output", type=Path, required=True, help=f"folder for {name}.jsonl and .md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1600, help="training images seen in each run")
    parser.add_argument("--cifar", type=Path, help="folder with train/ and val/ of CIFAR-10")
    parser.add_argument("--network", type=Path, help="checkpoint of a VGG trained on it")


def main() -> None:
    """Run what is missing, and write the table of all runs that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "small-batches")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.output / "small-batches.jsonl")
    lines = record.lines
    done = {tuple(line[name] for name in asdict(Run("", "", 0, 0.0, "", 0))) for line in lines}
    name = "cifar" if options.cifar else "digits"
    for run in plan([name], options.seeds):
        if tuple(asdict(run).values()) in done:
            continue
        data = cifar(options.cifar, options.network) if name == "cifar" else digits()
        line = asdict(run) | {"accuracies": train(data, run, options.images), "machine": machine()}
        record.add(line)
        print(run, line["accuracies"], flush=True)
    machines = "\n\n".join(dict.fromkeys(line["machine"] for line in lines))
    about = (__doc__ or "").split("\n\n", 2)[2]
    text = f"# Small batches\n\n{about}\n{comparison(lines)}\n{table(lines)}\n\n{machines}\n"
    (options.output / "small-batches.md").write_text(text)


if __name__ == "__main__":
    main()
