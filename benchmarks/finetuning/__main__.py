"""Which way of inserting BatchNorm makes fine-tuning gain, over learning rates, input ranges and seeds.

    python -m benchmarks.finetuning --checkpoint vgg16.pth --output results

The conv layers of a pretrained VGG16 get a new two-layer head and are fine-tuned on 48x48 images for a few steps of
SGD. Every finished run is a line in `finetuning.jsonl`: stop and start again at will, only what is missing is run. The
table and the figure are made from all lines that are there.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import multiprocessing

from .report import write_figure, write_table
from .runs import METHODS, Result, Setting, run

DATASETS = ("digits", "pictures")
INPUT_RANGES = ("0..1", "-120..150")
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def main() -> None:
    """Run what is missing of the grid, then write the table and the figure."""
    arguments = _parser().parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "finetuning.jsonl"
    missing = [setting for setting in _grid(arguments) if setting not in {r.setting for r in read_results(path)}]
    print(f"{len(missing)} runs to do")
    for count, result in enumerate(_run_all(missing, arguments.checkpoint, arguments.processes), 1):
        with path.open("a") as file:
            file.write(json.dumps(result.as_json()) + "\n")
        print(f"{count}/{len(missing)} {_line(result)}", flush=True)
    results = read_results(path)
    write_table(results, arguments.output / "finetuning.md")
    write_figure(results, arguments.output / "finetuning.png")


def read_results(path: Path) -> list[Result]:
    """Return the results in a file of JSON lines, none if there is no such file."""
    if not path.exists():
        return []
    return [Result.from_json(json.loads(line)) for line in path.read_text().splitlines()]


def _grid(arguments: argparse.Namespace) -> list[Setting]:
    """Seed by seed, so that a grid cut short has the first seeds complete."""
    axes = product(range(arguments.seeds), arguments.methods, arguments.input_range, arguments.learning_rates)
    return [
        Setting(arguments.dataset, input_range, method, rate, seed, arguments.steps, arguments.precision)
        for seed, method, input_range, rate in axes
    ]


def _run_all(settings: Sequence[Setting], checkpoint: Path, processes: int) -> Iterator[Result]:
    if not settings:
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // processes)
    with context.Pool(processes, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        yield from pool.imap_unordered(partial(run, checkpoint=checkpoint), settings)


def _line(result: Result) -> str:
    setting = result.setting
    what = f"{setting.dataset} {setting.input_range} {setting.method} lr {setting.learning_rate:g} seed {setting.seed}"
    if result.failed_at is not None:
        return f"{what}: loss not finite at step {result.failed_at}"
    last = result.measurements[-1]
    return f"{what}: {last.accuracy:.3f}, re-estimated {last.recalibrated_accuracy:.3f} ({result.seconds:.0f} s)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a VGG16 with pretrained conv layers")
    parser.add_argument("--output", type=Path, required=True, help="folder for finetuning.jsonl, .md and .png")
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--input-range", nargs="+", choices=INPUT_RANGES, default=INPUT_RANGES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--learning-rates", nargs="+", type=float, default=LEARNING_RATES)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time")
    return parser


if __name__ == "__main__":
    main()
