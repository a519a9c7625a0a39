"""Rules for the limits of Batch Renormalization at high learning rates: which one, if any, should be the default?

    python -m benchmarks.renorm.limit_rules --output benchmarks/renorm/results
    python -m benchmarks.renorm.limit_rules --cifar CIFAR_FOLDER --network cifar-vgg.pth --output ...

The runs are those of `benchmarks.renorm.small_batches`, with batches of 4 and rates up to ten times higher.
Every rule sees the same images in the same order. "Lag" is the root mean square of d over channels, layers and recent
steps, relative to what it would be by chance with accurate statistics (`RenormScheduler`).
Every finished run is a line in `limit-rules.jsonl`: interrupted, the program continues where it was.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import nn

from bn_insert import recalibrate
from bn_insert.batchnorm.batch_renorm import BatchRenorm
from bn_insert.batchnorm.lag_meter import Lag, LagMeter
from bn_insert.batchnorm.renorm_limits import limits_at, set_renorm_limits

from ..machine import machine
from ..record import Record
from .small_batches import Data, Run, add_arguments, cifar, digits, sample, train

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
BATCH = 4


@dataclass
class Training:
    """What a rule may look at before a step."""

    network: nn.Module
    data: Data
    step: int
    steps: int
    learning_rate: float
    lag: float
    generator: torch.Generator


def no_limits(_now: Training) -> None:
    """Leave r and d without limits."""


def constant(r_max: float, d_max: float) -> Callable[[Training], None]:
    """Return a rule with the same limits in every step."""
    return lambda now: set_renorm_limits(now.network, r_max, d_max)


def by_step(now: Training) -> None:
    """Tighten from no limits over a tenth of the steps, then from 3 towards BatchNorm in equal ratios."""
    progress = (now.step / now.steps - 0.1) / 0.9
    if progress > 0:
        set_renorm_limits(now.network, 1 + 2 * 0.05**progress, 3 * 0.05**progress)


def by_learning_rate(now: Training) -> None:
    """Limits in inverse proportion to the learning rate: about 4 and 3 at 0.001, 1.1 and 0.1 at 0.03."""
    limit = 0.003 / max(now.learning_rate, 1e-9)
    set_renorm_limits(now.network, 1 + limit, limit)


def by_lag(threshold: float) -> Callable[[Training], None]:
    """Return the rule that tightens while the running statistics lag behind."""
    return lambda now: set_renorm_limits(now.network, *limits_at(now.lag, threshold))


def faster_statistics(now: Training) -> None:
    """Momentum 0.3 of the running statistics instead of 0.1."""
    for module in now.network.modules():
        if isinstance(module, BatchRenorm):
            module.momentum = 0.3


def reestimated(now: Training) -> None:
    """Running statistics measured anew on 128 training images every 25 steps."""
    if now.step and now.step % 25 == 0:
        fresh = recalibrate(now.network, [torch.cat(sample(now.data.train, now.generator))[:128]])
        with torch.no_grad():
            for module, other in zip(now.network.modules(), fresh.modules(), strict=True):
                if isinstance(module, BatchRenorm):
                    module.running_mean.copy_(other.running_mean)
                    module.running_var.copy_(other.running_var)


RULES: dict[str, Callable[[Training], None]] = {
    "renorm, no limits": no_limits,
    "renorm, r 3, d 5": constant(3.0, 5.0),
    "renorm, r 1.5, d 0.5": constant(1.5, 0.5),
    "renorm, tightened by step": by_step,
    "renorm, tightened by learning rate": by_learning_rate,
    "renorm, tightened by lag above 1.5": by_lag(1.5),
    "renorm, tightened by lag above 2 (default)": by_lag(2.0),
    "renorm, momentum 0.3": faster_statistics,
    "renorm, re-estimated": reestimated,
    "plain": no_limits,
    "batchnorm": no_limits,
}


class Watched:
    """A rule applied before each step, with the lag so far."""

    def __init__(self, rule: Callable[[Training], None], data: Data, seed: int) -> None:
        """Prepare the rule for one run."""
        self.rule, self.data, self.seed = rule, data, seed
        self.lag, self.largest = Lag(), 1.0
        self.meter: LagMeter | None = None

    def before_step(self, network: nn.Module, step: int, steps: int, learning_rate: float) -> None:
        """Apply the rule; in the first step, start to watch."""
        if self.meter is None:
            self.meter = LagMeter(network)
        observed = self.meter.read()
        self.lag = self.lag.after(*observed.tolist())
        self.largest = max(self.largest, self.lag.ratio)
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        self.rule(Training(network, self.data, step, steps, learning_rate, self.lag.ratio, generator))


def table(lines: list[dict[str, Any]]) -> str:
    """Return a Markdown table: one row per rule, a column per head and rate; medians over seeds, lowest / last."""
    found = {(line["head"], line["rate"]) for line in lines}
    columns = [column for column in product(("old", "new"), RATES) if column in found]
    heads = " | ".join(f"{head} head, {rate:g}" for head, rate in columns)
    rows = [f"| | {heads} |", "|---|" + "---:|" * len(columns)]
    for rule in RULES:
        cells = []
        for column in columns:
            case = (rule, *column)
            runs = [line["accuracies"] for line in lines if (line["rule"], line["head"], line["rate"]) == case]
            # A run that diverged has the accuracy of no answer.
            finite = [[0.0 if math.isnan(value) else value for value in run] for run in runs]
            lowest, last = [min(run[1:]) for run in finite], [run[-1] for run in finite]
            cells.append(f"{median(lowest):.3f} / {median(last):.3f}" if runs else "")
        if any(cells):
            rows.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing, and write the tables of all runs that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "limit-rules")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.output / "limit-rules.jsonl")
    lines = record.lines
    done = {(line["data"], line["rule"], line["head"], line["rate"], line["seed"]) for line in lines}
    name = "cifar" if options.cifar else "digits"
    for seed, head, rate, rule in product(range(options.seeds), ("old", "new"), RATES, options.rules):
        if (name, rule, head, rate, seed) in done:
            continue
        data = cifar(options.cifar, options.network) if options.cifar else digits()
        run = Run(name, rule.split(",")[0], BATCH, rate, head, seed)
        watched = Watched(RULES[rule], data, seed)
        accuracies = train(data, run, options.images, watched.before_step)
        line = asdict(run) | {"rule": rule, "accuracies": accuracies, "lag": watched.largest, "machine": machine()}
        record.add(line)
        print(name, rule, head, rate, seed, accuracies, round(watched.largest, 2), flush=True)
    parts = [f"# Rules for the limits of Batch Renormalization\n\n{(__doc__ or '').split(chr(10) * 2, 2)[2]}"]
    for data_name in sorted({line["data"] for line in lines}):
        these = [line for line in lines if line["data"] == data_name]
        seeds = len({line["seed"] for line in these})
        about = (
            f"{data_name}, accuracy on held-out images, median of seeds ({seeds}): lowest of four evaluations / last."
        )
        parts.append(f"{about}\n\n{table(these)}\n")
    parts.append("\n\n".join(dict.fromkeys(line["machine"] for line in lines)) + "\n")
    (options.output / "limit-rules.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
