"""`bn-insert insert` and `bn-insert finetune` with their defaults, against the best that `finetune` reaches without.

    python -m benchmarks.finetuning.command_line --vgg16 vgg16-real.pth --cifar-vgg cifar-vgg.pth \\
        --cifar-folded cifar-folded.pth --cifar-deep cifar-deep.pth --clothing CLOTHING --cifar CIFAR10 \\
        --fashion-mnist FASHION --houses HOUSES --hands HANDS \\
        --output benchmarks/finetuning/results

Both sides are commands as a user types them, on folders of images, for as many epochs. The side with BatchNorm takes
the defaults: no option is chosen; on images of a different kind, `adapt --keep-batchnorm` takes the place of
`insert`, as the guide says. The side without tries SGD and AdamW, with and without dropout, with and without a
fit of the new output layer, each at several learning rates (factor 3.16, uphill from a usual one), with a warm-up of
half an epoch; validation images choose among them. Then both repeat with other seeds. `best.pth` is evaluated on test
images, which choose nothing. The solar cells (`pip install elpv-dataset`), Fashion-MNIST (Debian package
dataset-fashion-mnist), the houses and the hands were kept apart: no default of `finetune` was developed on them
(that dropout must be off on the hands was known before). With VGG16, the photographs of CIFAR-10 were kept apart, too,
until they showed that the trials of learning rates chose too high a one. Every finished run is a line in
`command-line.jsonl`: interrupted, the program continues where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from PIL import Image

from bn_insert.support.text import counted

from ..machine import machine
from ..record import Record
from .__main__ import rate_of, uphill
from .images import (
    Part,
    Split,
    cifar,
    cifar_enlarged,
    clothing,
    digits,
    fashion_mnist,
    hands,
    houses,
    noisy,
    per_class,
    solar_cells,
)

WARM_UP = ("--lr-warmup-epochs", "0.5")
LOWEST = -10  # index of the lowest learning rate, 1e-5


# With inserted BatchNorm: the defaults, which are compared, and another optimizer.
INSERTED = {"inserted": (), "inserted, SGD": ("--opt", "sgd")}
# Over hundreds of steps, a higher learning rate may be better than the one that trials of 20 steps find.
INSERTED_LONG = INSERTED | {"inserted, a higher learning rate": ("--lr", "0.003")}
# For batches of fewer than 8 images, the default is Batch Renormalization.
INSERTED_SMALL_BATCHES = INSERTED | {"inserted, batch statistics": ("--batchnorm", "train")}


@dataclass(frozen=True)
class Task:
    """A checkpoint and the images that it is fine-tuned on.

    Attributes:
        title: The task in words.
        checkpoint: Name of the option with the checkpoint.
        images: Returns the images.
        preprocessing: Options of the commands.
        epochs: Epochs of every run.
        options: Options of every run besides.
        guessing: Validation accuracy of a network that has learned nothing, with a margin.
        source: Returns images like those that the network was trained on, for a task on a different kind of images.
        inserted: Options of `finetune` with inserted BatchNorm, by method.
    """

    title: str
    checkpoint: str
    images: Callable[[argparse.Namespace], Split]
    preprocessing: tuple[str, ...]
    epochs: int = 5
    options: tuple[str, ...] = ()
    guessing: float = 0.15  # ten classes
    source: Callable[[argparse.Namespace], Part] | None = None
    inserted: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: INSERTED)


@dataclass(frozen=True)
class Opponent:
    """A method to fine-tune without BatchNorm.

    Attributes:
        title: The method in words.
        options: Options of `finetune`.
        start: Index of the learning rate that the search starts from: 10 ** (start / 2).
    """

    title: str
    options: tuple[str, ...]
    start: int


def _photographs(count: int, side: int) -> Callable[[argparse.Namespace], Split]:
    def images(places: argparse.Namespace) -> Split:
        split = clothing(places.clothing, side)
        return Split(per_class(split.train, count, 0), split.validation, split.test)

    return images


def _all_photographs(places: argparse.Namespace) -> Split:
    return clothing(places.clothing, 32)


def _noisy(places: argparse.Namespace) -> Split:
    split = cifar(places.cifar)
    parts = (per_class(split.train, 40, 0), split.validation, split.test)
    return Split(*(noisy(part, 0.2, number) for number, part in enumerate(parts)))


def _clean(places: argparse.Namespace) -> Part:
    return per_class(cifar(places.cifar).train, 100, 1)


_UNIT = ("--resize", "0", "--crop", "0", "--mean", "0", "--std", "1")
_IMAGENET = ("--resize", "0", "--crop", "0")
_CIFAR = ("--resize", "0", "--crop", "0", "--mean", "0.4914,0.4822,0.4465", "--std", "0.247,0.2435,0.2616")
_TEN_A_CLASS = Task(
    "CIFAR-10 network, 10 photographs of each kind of clothing, 32 px, 20 epochs",
    "cifar_vgg",
    _photographs(10, 32),
    _CIFAR,
    epochs=20,
)
_FIFTY_A_CLASS = Task(
    "CIFAR-10 network, 50 photographs of each kind of clothing, 32 px, 10 epochs",
    "cifar_vgg",
    _photographs(50, 32),
    _CIFAR,
    epochs=10,
)
_NOISE = Task(
    "CIFAR-10 network, 400 CIFAR-10 images with noise (sigma 0.2), 100 steps",
    "cifar_vgg",
    _noisy,
    _CIFAR,
    epochs=4,
    options=("-b", "16"),
    source=_clean,
)
_SMALL_BATCHES = replace(
    _NOISE,
    title="the same with batches of 4, 100 steps",
    epochs=1,
    options=("-b", "4"),
    inserted=INSERTED_SMALL_BATCHES,
)
_AGAIN = "another CIFAR-10 network, of the same program after 20 of its 30 epochs"
_FOLDED = "CIFAR-10 network whose own BatchNorm is folded, {}"
_DEEP = "CIFAR-10 network of thirteen convs, its own BatchNorm folded, 400 CIFAR-10 images with noise (sigma 0.2), {}"
TASKS = {
    "digits": Task("VGG16 and its own dense head, 300 digits, 48 px", "vgg16", lambda _: digits(48), _UNIT),
    "photographs": Task(
        "VGG16 and its own dense head, 600 photographs of clothing, 48 px", "vgg16", _photographs(60, 48), _UNIT
    ),
    "other preprocessing": Task(
        "the same, with ImageNet's mean and standard deviation, which this network does not expect",
        "vgg16",
        _photographs(60, 48),
        _IMAGENET,
    ),
    "solar cells": Task(
        "VGG16 and its own dense head, 300 photographs of solar cells, 64 px",
        "vgg16",
        lambda _: solar_cells(64),
        _UNIT,
        guessing=0.7,  # two classes, the larger one with 69%
    ),
    "animals and vehicles": Task(
        "VGG16 and its own dense head, 300 photographs of animals and vehicles (CIFAR-10), 48 px",
        "vgg16",
        lambda places: cifar_enlarged(places.cifar, 48),
        _UNIT,
    ),
    "fashion": Task(
        "VGG16 and its own dense head, 300 pictures of Fashion-MNIST, 48 px",
        "vgg16",
        lambda places: fashion_mnist(places.fashion_mnist, 48),
        _UNIT,
    ),
    "houses": Task(
        "VGG16 and its own dense head, 300 photographs of houses (three kinds of rooms, and the front), 48 px",
        "vgg16",
        lambda places: houses(places.houses, 48),
        _UNIT,
        guessing=0.3,  # four classes
    ),
    "hands": Task(
        "VGG16 and its own dense head, 618 photographs of hands that sign digits, 48 px",
        "vgg16",
        lambda places: hands(places.hands, 48),
        _UNIT,
    ),
    "10 a class": _TEN_A_CLASS,
    "10 a class, folded": replace(
        _TEN_A_CLASS,
        title=_FOLDED.format("10 photographs of each kind of clothing, 20 epochs"),
        checkpoint="cifar_folded",
    ),
    "50 a class": _FIFTY_A_CLASS,
    "50 a class, folded": replace(
        _FIFTY_A_CLASS,
        title=_FOLDED.format("50 photographs of each kind of clothing, 10 epochs"),
        checkpoint="cifar_folded",
    ),
    "all photographs": Task(
        f"{_AGAIN}, 2,848 photographs of clothing, 32 px",
        "cifar_vgg",
        _all_photographs,
        _CIFAR,
        epochs=3,
        inserted=INSERTED_LONG,
    ),
    "own images": Task(
        f"{_AGAIN}, 5,000 of the CIFAR-10 images that it was trained on",
        "cifar_vgg",
        lambda places: cifar(places.cifar),
        _CIFAR,
        epochs=1,
    ),
    "noise": _NOISE,
    "noise, small batches": _SMALL_BATCHES,
    "noise, folded": replace(
        _NOISE,
        title=_FOLDED.format("400 CIFAR-10 images with noise (sigma 0.2), 100 steps"),
        checkpoint="cifar_folded",
    ),
    "noise, folded, small batches": replace(_SMALL_BATCHES, checkpoint="cifar_folded"),
    "noise, deep": replace(_NOISE, title=_DEEP.format("100 steps"), checkpoint="cifar_deep"),
    "noise, deep, small batches": replace(
        _SMALL_BATCHES, title=_DEEP.format("batches of 4, 100 steps"), checkpoint="cifar_deep"
    ),
}
OPPONENTS = (
    Opponent("SGD, no dropout", ("--opt", "sgd", "--dropout", "0"), -6),
    Opponent("SGD, no dropout, output layer not fitted", ("--opt", "sgd", "--dropout", "0", "--no-fit-output"), -6),
    Opponent("AdamW, no dropout", ("--opt", "adamw", "--dropout", "0"), -8),
    Opponent("SGD, the checkpoint's dropout", ("--opt", "sgd"), -6),
    Opponent("AdamW, the checkpoint's dropout", ("--opt", "adamw"), -8),
    Opponent("AdamW, no dropout, output layer not fitted", ("--opt", "adamw", "--dropout", "0", "--no-fit-output"), -8),
)
# Until it was seen what it costs, `finetune` left on the dropout between the last BatchNorm and the output layer. The
# methods of runs from then end in these words, and the last table compares them with those of today.
EARLIER = "with the dropout before the output layer"
INTRODUCTION = """# The defaults of `insert` and `finetune` against the best without BatchNorm, on the command line

`python -m benchmarks.finetuning.command_line` produces these tables from `command-line.jsonl`. With BatchNorm: `insert`
on the training images, then `finetune`, both with their defaults (and with SGD for comparison); on noisy images, `adapt
--keep-batchnorm` instead of `insert`, with 1,000 images without noise as SOURCE. Without: `finetune` on the checkpoint
itself, with a warm-up of half an epoch, at the learning rate that is best on validation images (factor 3.16, seed 0);
of what was repeated with other seeds, the best on validation images over all seeds. Test accuracy of `best.pth`, mean
over the seeds with its standard error; test images choose nothing. With batches of 4, the default is Batch
Renormalization; `--batchnorm train` normalizes by the batch. Where a row of the defaults was measured before the last
change to the learning rate trials, these were checked to choose the same rate.
"""


class Comparison(Record):
    """The runs that are done, and those that are still to do."""

    def __init__(self, path: Path, places: argparse.Namespace, work: Path) -> None:
        """Read the lines that are there; images and checkpoints are made in the folder `work`."""
        super().__init__(path)
        self.places, self.work = places, work

    def run(self, name: str, method: str, options: Sequence[str], seed: int) -> dict[str, Any]:
        """Return the line of a run, from the file if it is there; the methods in INSERTED start with BatchNorm."""
        key = {"task": name, "method": method, "options": list(options), "seed": seed}
        for line in self.lines:
            if all(line[part] == value for part, value in key.items()):
                return line
        task = TASKS[name]
        data = self._data(name)
        checkpoint = self._inserted(name, data) if _is_inserted(method) else getattr(self.places, task.checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            options = (*task.preprocessing, *task.options, "--epochs", str(task.epochs), *options, "--seed", str(seed))
            finished = _command("finetune", checkpoint, data, "-o", Path(folder) / "run", *options)
            epochs, test, lr = [0.0], 0.0, None
            if finished.returncode == 0:
                metrics = json.loads((Path(folder) / "run" / "report.json").read_text())["runs"][0]
                lr = metrics["settings"]["lr"]
                epochs = [epoch["val_accuracy"] for epoch in metrics["epochs"]]
                evaluated = _command("evaluate", Path(folder) / "run" / "best.pth", data / "test", "--json", check=True)
                test = json.loads(evaluated.stdout)["accuracy"]
        validation = max(epochs)
        figures = {"lr": lr, "validation": validation, "test": test, "code": finished.returncode}
        line = key | figures | {"epochs": [round(accuracy, 4) for accuracy in epochs], "machine": machine()}
        self.add(line)
        print(
            f"{name}: {method} {' '.join(options)} seed {seed}, lr {lr}: validation {validation:.3f}, test {test:.3f}",
            flush=True,
        )
        return line

    def _data(self, name: str) -> Path:
        folder = self.work / name.replace(" ", "-")
        if not (folder / "complete").exists():
            split = TASKS[name].images(self.places)
            for part, images in (("train", split.train), ("val", split.validation), ("test", split.test)):
                _write(images, folder / part)
            (folder / "complete").touch()
        return folder

    def _inserted(self, name: str, data: Path) -> Path:
        output, task = self.work / f"{name.replace(' ', '-')}-bn.pth", TASKS[name]
        if not output.exists():
            checkpoint = getattr(self.places, task.checkpoint)
            if task.source:
                source = data / "source"
                _write(task.source(self.places), source)
                command: tuple[object, ...] = ("adapt", checkpoint, source, data / "train", "--keep-batchnorm")
            else:
                command = ("insert", checkpoint, data / "train")
            _command(*command, "-o", output, *task.preprocessing, check=True)
        return output


def _write(images: Part, folder: Path) -> None:
    for number, (pixels, label) in enumerate(zip(images.pixels, images.classes.tolist(), strict=True)):
        path = folder / f"class-{label}" / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def _command(*arguments: object, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command; one that fails otherwise than by diverging ends the program with what it says."""
    command = [sys.executable, "-m", "bn_insert", *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode and (check or finished.returncode != 1):
        sys.exit(f"{' '.join(command)}\n{finished.stderr}")
    return finished


def run_task(record: Comparison, name: str, seeds: int, opponents: Sequence[Opponent]) -> None:
    """Run what is missing of a task: both sides with seed 0, then what is best without BatchNorm with other seeds."""
    for (method, options), seed in product(TASKS[name].inserted.items(), range(seeds)):
        record.run(name, method, options, seed)
    for opponent in opponents:
        if TASKS[name].source and "--no-fit-output" in opponent.options:
            continue  # the checkpoint's output layer knows the classes, and is not fitted

        def validation(index: int, opponent: Opponent = opponent) -> float:
            line = record.run(name, opponent.title, _plain(opponent, rate_of(index)), 0)
            # A network that guesses has failed as much as one that has diverged.
            return float(line["validation"]) if line["validation"] > TASKS[name].guessing else 0.0

        start = opponent.start
        while validation(start) == 0 and start > LOWEST:
            start -= 1
        uphill(validation, start)
    best_line = _best_without(record.lines, name)
    for seed in range(1, seeds):
        record.run(name, best_line["method"], best_line["options"], seed)


def _is_inserted(method: str) -> bool:
    return method.startswith("inserted")


def _plain(opponent: Opponent, rate: float) -> tuple[str, ...]:
    return (*opponent.options, *WARM_UP, "--lr", f"{rate:g}")


def _best_without(lines: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the line of the run without BatchNorm that is best on validation images with seed 0."""
    plain = [line for line in lines if line["task"] == name and not _is_inserted(line["method"]) and line["seed"] == 0]
    return max(plain, key=lambda line: line["validation"])


def _best_repeated(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs without BatchNorm that are best on validation images, of those with the most seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if not _is_inserted(line["method"]):
            groups.setdefault(f"{line['method']} {line['options']}", []).append(line)
    return max(groups.values(), key=lambda runs: (len(runs), mean(run["validation"] for run in runs)))


def table(lines: Sequence[dict[str, Any]], name: str) -> str:
    """Return the table of a task, from the runs that there are."""
    of_task = [line for line in lines if line["task"] == name]
    inserted: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in of_task:
        if _is_inserted(line["method"]) and not line["method"].endswith(EARLIER):
            inserted.setdefault(tuple(line["options"]), []).append(line)
    ours, theirs = inserted[()], _best_repeated(of_task)
    searched = dict.fromkeys(line["method"] for line in of_task if not _is_inserted(line["method"]))
    return "\n".join(
        [
            f"## {_title(name)}",
            "",
            f"{counted(TASKS[name].epochs, 'epoch')}. Without BatchNorm: {'; '.join(searched)}; the best on validation "
            "images is shown.",
            "",
            "| | learning rate | seeds | test accuracy |",
            "|---|---|---|---|",
            *(_row(f"inserted BatchNorm, {_options_text(each)}", runs) for each, runs in sorted(inserted.items())),
            _row(f"without BatchNorm: {theirs[0]['method']}", theirs),
            "",
            f"Difference of the defaults: {_difference(ours, theirs)} points.",
            *_until_as_good(ours, mean(line["validation"] for line in theirs)),
        ]
    )


def _options_text(options: Sequence[str]) -> str:
    return f"`{' '.join(options)}`" if options else "the defaults"


def dropout_table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the table of what the dropout between the last BatchNorm and the output layer costs or gains."""
    rows = ["| | left on | switched off (the default) | difference in points |", "|---|---|---|---|"]
    for name in TASKS:
        sides = [
            [line for line in lines if (line["task"], line["method"], line["options"]) == (name, method, [])]
            for method in (f"inserted, {EARLIER}", "inserted")
        ]
        if all(sides):
            left_on, off = sides
            cells = (_title(name), _accuracy(left_on), _accuracy(off), _difference(off, left_on))
            rows.append(f"| {' | '.join(cells)} |")
    text = "The runs with it left on come from an earlier version, whose default that was."
    return "\n".join(["## The dropout before the output layer", "", text, "", *rows])


def _until_as_good(ours: Sequence[dict[str, Any]], validation: float) -> list[str]:
    """Return in words in which epoch each run reaches a validation accuracy; nothing if that is not recorded."""
    if not all("epochs" in line for line in ours):
        return []
    reached = [
        next((n for n, accuracy in enumerate(line["epochs"], 1) if accuracy >= validation), None) for line in ours
    ]
    epochs = ", ".join("never" if number is None else str(number) for number in reached)
    target = f"the validation accuracy of the best without BatchNorm ({validation:.3f})"
    if not any(reached):
        return ["", f"No run reaches {target}."]
    return ["", f"Epoch in which each run reaches {target}: {epochs}."]


def _row(title: str, side: Sequence[dict[str, Any]]) -> str:
    rates = ", ".join(dict.fromkeys(f"{line['lr']:g}" for line in side))
    return f"| {title} | {rates} | {len(side)} | {_accuracy(side)} |"


def _title(name: str) -> str:
    title = TASKS[name].title
    return f"{title[0].upper()}{title[1:]}"


def _difference(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> str:
    """Return by how much the accuracy of the first is higher, in points, with the standard error if there is one."""
    difference = mean(line["test"] for line in first) - mean(line["test"] for line in second)
    error = math.hypot(_standard_error(first), _standard_error(second))
    return f"{100 * difference:+.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")


def _accuracy(side: Sequence[dict[str, Any]]) -> str:
    error = _standard_error(side)
    return f"{mean(line['test'] for line in side):.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _standard_error(side: Sequence[dict[str, Any]]) -> float:
    return stdev(line["test"] for line in side) / math.sqrt(len(side)) if len(side) > 1 else math.nan


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (
        "vgg16",
        "cifar-vgg",
        "cifar-folded",
        "cifar-deep",
        "clothing",
        "cifar",
        "fashion-mnist",
        "houses",
        "hands",
        "output",
    ):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tuple(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    titles = [opponent.title for opponent in OPPONENTS]
    parser.add_argument("--methods", nargs="+", choices=titles, default=titles, help="without BatchNorm")
    parser.add_argument("--tables", action="store_true", help="write the tables from what there is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        record = Comparison(options.output / "command-line.jsonl", options, Path(work))
        for name in () if options.tables else options.tasks:
            run_task(record, name, options.seeds, [each for each in OPPONENTS if each.title in options.methods])
    names = [name for name in TASKS if any(line["task"] == name for line in record.lines)]
    machines = sorted({line["machine"] for line in record.lines})
    tables = [*(table(record.lines, name) for name in names), dropout_table(record.lines)]
    sections = [INTRODUCTION.rstrip(), *tables, *machines]
    (options.output / "command-line.md").write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    main()
