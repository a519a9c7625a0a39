"""Rules for the limits of Batch Renormalization at high learning rates: which one, if any, should be the default?

    python -m benchmarks.renorm.limit_rules --output benchmarks/renorm/results

The runs are those of `benchmarks.renorm.small_batches` on digits, with batches of 4 and rates up to ten times higher.
Every rule sees the same images in the same order. "Lag" is the root mean square of d over all layers, smoothed over
ten steps, divided by that of the first 20 steps: it grows when weights move faster than the running statistics follow.
Every finished run is a line in `limit-rules.jsonl`: interrupted, the program continues where it was.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bn_insert import recalibrate
from bn_insert.batchnorm.batch_renorm import BatchRenorm
from bn_insert.batchnorm.renorm_limits import Limits, set_renorm_limits

from ..machine import machine
from .small_batches import Data, Run, digits, sample, train

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
BATCH = 4
LAG_STEPS = 20  # first steps, whose d is taken as usual


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
    return lambda now: set_renorm_limits(now.network, Limits(r_max, d_max))


def by_step(now: Training) -> None:
    """Tighten from no limits over a tenth of the steps, then from 3 towards BatchNorm in equal ratios."""
    progress = (now.step / now.steps - 0.1) / 0.9
    if progress > 0:
        set_renorm_limits(now.network, Limits(1 + 2 * 0.05**progress, 3 * 0.05**progress))


def by_learning_rate(now: Training) -> None:
    """Limits in inverse proportion to the learning rate: about 4 and 3 at 0.001, 1.1 and 0.1 at 0.03."""
    limit = 0.003 / max(now.learning_rate, 1e-9)
    set_renorm_limits(now.network, Limits(1 + limit, limit))


def by_lag(now: Training) -> None:
    """No limits until the lag is 1.5; then the tighter the larger it is."""
    limit = math.inf if now.lag < 1.5 else 2 / now.lag**2
    set_renorm_limits(now.network, Limits(1 + limit, limit))


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
    "renorm, tightened by lag": by_lag,
    "renorm, momentum 0.3": faster_statistics,
    "renorm, re-estimated": reestimated,
    "plain": no_limits,
    "batchnorm": no_limits,
}


@dataclass
class Watched:
    """A rule applied before each step, and the lag measured in each."""

    rule: Callable[[Training], None]
    data: Data
    seed: int
    first: list[float] = field(default_factory=list)
    smoothed: float = math.nan
    distances: list[float] = field(default_factory=list)

    def before_step(self, network: nn.Module, step: int, steps: int, learning_rate: float) -> None:
        """Apply the rule; in the first step, start to watch."""
        if step == 0:
            for module in network.modules():
                if isinstance(module, BatchRenorm):
                    module.register_forward_pre_hook(self._watch)
        if self.distances:
            value = math.sqrt(sum(self.distances) / len(self.distances))
            self.distances.clear()
            self.smoothed = value if math.isnan(self.smoothed) else 0.9 * self.smoothed + 0.1 * value
            if len(self.first) < LAG_STEPS:
                self.first.append(value)
        lag = self.smoothed / (sum(self.first) / LAG_STEPS) if len(self.first) == LAG_STEPS else 1.0
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        self.rule(Training(network, self.data, step, steps, learning_rate, lag, generator))

    def _watch(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training and isinstance(module, BatchRenorm):
            with torch.no_grad():
                mean = inputs[0].mean([dim for dim in range(inputs[0].ndim) if dim != 1])
                distance = (mean - module.running_mean) / (module.running_var + module.eps).sqrt()
                self.distances.append(float(distance.square().mean()))


def plan(seeds: int) -> Iterator[tuple[str, str, float, int]]:
    """Yield rule, head, rate and seed of the runs, seed by seed."""
    for seed, head, rate, rule in product(range(seeds), ("old", "new"), RATES, RULES):
        yield rule, head, rate, seed


def table(lines: list[dict[str, Any]]) -> str:
    """Return a Markdown table: one row per rule, a column per head and rate; medians over seeds, lowest / last."""
    columns = sorted(
        {(line["head"], line["rate"]) for line in lines}, key=lambda column: (column[0] != "old", column[1])
    )
    heads = " | ".join(f"{head} head, {rate:g}" for head, rate in columns)
    rows = [f"| | {heads} |", "|---|" + "---:|" * len(columns)]
    for rule in RULES:
        cells = []
        for column in columns:
            runs = [
                line["accuracies"] for line in lines if (line["rule"], line["head"], line["rate"]) == (rule, *column)
            ]
            if not runs:
                cells.append("")
                continue
            # A run that diverged has the accuracy of no answer.
            finite = [[0.0 if math.isnan(value) else value for value in run] for run in runs]
            cells.append(f"{median(min(run[1:]) for run in finite):.3f} / {median(run[-1] for run in finite):.3f}")
        rows.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing, and write the table of all runs that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for limit-rules.jsonl and .md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1600, help="training images seen in each run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    record = options.output / "limit-rules.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    done = {(line["rule"], line["head"], line["rate"], line["seed"]) for line in lines}
    for rule, head, rate, seed in plan(options.seeds):
        if (rule, head, rate, seed) in done:
            continue
        run = Run("digits", rule.split(",")[0], BATCH, rate, head, seed)
        watched = Watched(RULES[rule], digits(), seed)
        accuracies = train(digits(), run, options.images, watched.before_step)
        line = asdict(run) | {"rule": rule, "accuracies": accuracies, "machine": machine()}
        lines.append(line)
        with record.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(rule, head, rate, seed, accuracies, flush=True)
    machines = "\n\n".join(dict.fromkeys(line["machine"] for line in lines))
    seeds = len({line["seed"] for line in lines})
    text = (
        f"# Rules for the limits of Batch Renormalization\n\n{(__doc__ or '').split(chr(10) * 2, 2)[2]}\n"
        f"Accuracy on held-out images, median of {seeds} seeds: lowest at any of four evaluations / last.\n\n"
        f"{table(lines)}\n\n{machines}\n"
    )
    (options.output / "limit-rules.md").write_text(text)


if __name__ == "__main__":
    main()
