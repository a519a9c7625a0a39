"""The command as users run it: end to end on JPEGs, start-up, what it adds around calibration, several processes."""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images

import bn_insert
from bn_insert import calibrate
from bn_insert_cli.app import app

WORKERS = 2
HERE = Path(__file__).parent


def end_to_end(options: argparse.Namespace) -> Iterator[str]:
    """`bn-insert insert` on 1,000 JPEGs against a plain script that decodes and forwards the same images."""
    with tempfile.TemporaryDirectory() as folder:
        photographs = photographs_in(Path(folder) / "photographs", 1000)
        checkpoint = _checkpoint("vgg16", Path(folder))
        output = Path(folder) / "result.pth"
        insert = _command("insert", checkpoint, photographs, "-o", output, "--force", "-j", WORKERS, "--images", 1000)
        methods = {
            "`bn-insert insert`": insert,
            "plain script": _script("both", checkpoint, photographs),
            "plain script, decoding only": _script("decode", checkpoint, photographs),
            "plain script, forward pass only": _script("forward", checkpoint, photographs),
        }
        times = _in_turns(methods, options.command_repeats)
    yield from ("| | seconds, median | ratio |", "|---|---|---|")
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["`bn-insert insert`"], taken, strict=True))
        yield f"| {name} | {statistics.median(taken):.1f} | {ratio:.2f} |"
    yield ""
    yield (
        f"VGG16, {WORKERS} workers, batch size 32, {options.command_repeats} rounds. Ratio: time of `bn-insert insert` "
        "relative to the time in that row. Plain script: torchvision's ImageNet transform in a DataLoader, followed by "
        "`model(images)`, without statistics."
    )


def start_up(options: argparse.Namespace) -> Iterator[str]:
    """From the shell's prompt back to it."""
    with tempfile.TemporaryDirectory() as folder:
        photographs = photographs_in(Path(folder) / "photographs", 2)
        vgg16 = _checkpoint("vgg16", Path(folder))
        output = Path(folder) / "result.pth"
        times = _in_turns(
            {
                "`python -c 'import torch, torchvision'`": [sys.executable, "-c", "import torch, torchvision"],
                "`bn-insert --help`": _command("--help"),
                "`bn-insert inspect vgg16.pth`": _command("inspect", vgg16),
                "`bn-insert insert vgg16.pth` on two images": _command(
                    "insert", vgg16, photographs, "-o", output, "--force", "--layers", "conv"
                ),
            },
            max(3, options.command_repeats),
        )
    yield from ("| command | seconds, median | fastest |", "|---|---|---|")
    for name, taken in times.items():
        yield f"| {name} | {statistics.median(taken):.2f} | {min(taken):.2f} |"


def around_calibration(options: argparse.Namespace) -> Iterator[str]:
    """All of `insert` on VGG19 (575 MB) but for the calibration, and how much of that is reading and writing files."""
    with tempfile.TemporaryDirectory() as folder:
        photographs = photographs_in(Path(folder) / "photographs", 32)
        checkpoint = _checkpoint("vgg19", Path(folder))
        runs = []
        for _ in range(max(3, options.command_repeats)):
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                runs.append(fresh.submit(_steps_of_insert, checkpoint, photographs, Path(folder)).result())
    yield from ("| | seconds, median |", "|---|---|")
    for step in runs[0]:
        yield f"| {step} | {statistics.median(run[step] for run in runs):.2f} |"
    yield ""
    yield (
        "32 images. Each run takes place in a new process that has already imported torch and torchvision. Reading, "
        "writing and calibration are timed while `insert` runs."
    )


def _steps_of_insert(checkpoint: Path, photographs: Path, folder: Path) -> dict[str, float]:
    seconds: dict[str, float] = {}

    def timed(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - began
            return result

        return measured

    words = ["insert", checkpoint, photographs, "-o", folder / "result.pth", "--force", "-j", WORKERS]
    with (
        patch.object(bn_insert, "calibrate", timed("calibration, including decoding", calibrate)),
        patch.object(torch, "load", timed("`torch.load` of the checkpoint", torch.load)),
        patch.object(torch, "save", timed("`torch.save` of the result, and fsync", torch.save)),
        patch.object(os, "fsync", timed("`torch.save` of the result, and fsync", os.fsync)),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        began = time.perf_counter()
        app(list(map(str, words)), standalone_mode=False)
        whole = time.perf_counter() - began
    rest = whole - sum(seconds.values())
    return {"`insert`": whole, **seconds, "the rest: analysis, insertion, verification, settings": rest}


def processes(options: argparse.Namespace) -> Iterator[str]:
    """The calibration of VGG16 on 256 images by one process of one thread, and by two."""
    script = HERE / "ranks.py"
    methods = {
        f"{ranks} process{'es' if ranks > 1 else ''} with one thread": [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            str(script),
        ]
        for ranks in (1, 2)
    }
    runs: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(options.command_repeats):
        for name, command in methods.items():
            runs[name].append(float(_run(command).split()[-1]))
    one = next(iter(runs.values()))
    yield from ("| | seconds of calibration, median | speedup |", "|---|---|---|")
    for name, taken in runs.items():
        ratio = statistics.median(a / b for a, b in zip(one, taken, strict=True))
        yield f"| {name} | {statistics.median(taken):.1f} | {ratio:.2f} |"


def photographs_in(folder: Path, count: int) -> Path:
    """Write so many JPEGs of 500 x 375: cuttings of scikit-learn's two photographs, all different."""
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    for number in range(count):
        picture = pictures[number % len(pictures)]
        side = 160 + number % 200
        left, top = (37 * number) % (picture.width - side), (53 * number) % (picture.height - side * 3 // 4)
        cutting = picture.crop((left, top, left + side, top + side * 3 // 4)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        target = folder / f"class{number % 10}" / f"{number:04}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        cutting.save(target, quality=90)
    return folder


def _checkpoint(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / f"{name}.pth"
    torch.save(torchvision.models.get_model(name, weights=None).state_dict(), path)
    return path


def _command(*words: object) -> list[str]:
    return [sys.executable, "-m", "bn_insert", *map(str, words)]


def _script(part: str, checkpoint: Path, photographs: Path) -> list[str]:
    return [sys.executable, str(HERE / "plain_script.py"), part, str(checkpoint), str(photographs)]


def _in_turns(methods: dict[str, list[str]], repeats: int) -> dict[str, list[float]]:
    """Time whole processes, one of each in turn; a first round, not counted, fills the file cache where it is short."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, command in methods.items():
            began = time.perf_counter()
            _run(command)
            times[name].append(time.perf_counter() - began)
    return times


def _run(command: Sequence[str]) -> str:
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
