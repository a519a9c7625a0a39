"""Damaged and hostile files through every public function that reads one: what comes of each, counted.

    python -m fuzz.robustness --output fuzz/results/robustness.md

Each case is made from the seed and its number alone, by `mutations.py`, and runs in a process of its own kind: one that
crashes, or gives no answer, is counted and replaced. `--case N` runs one again, here, with its traceback.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bn_insert import BNInsertError, load_checkpoint
from bn_insert.checkpoints.read_file import read_checkpoint
from bn_insert.images.class_folders import open_class_folders
from bn_insert.images.image_sources import open_batches
from bn_insert.images.transform import Transform
from bn_insert.report import versions

from .mutations import KINDS, Kind, mutated, network, tensor, whole

EQUAL, CHANGED, ERROR, BAD = "loaded, equal", "loaded, other values", "clear error", "anything else"
OUTCOMES = (EQUAL, CHANGED, ERROR, BAD)
PATIENCE = 20  # seconds of wall time after which a case without an answer is a hang; other programs run here too
CPU_LIMIT = 5.0  # seconds of processor time
MEMORY_LIMIT = 1 << 30  # bytes of address space more than before; Pillow admits pictures of 89 million pixels
TRANSFORM = Transform(resize=None, crop=16)


@dataclass(frozen=True)
class Result:
    """What came of one case."""

    number: int
    kind: str
    mutation: str
    outcome: str
    detail: str


class UnexpectedError(Exception):
    """A file was read, and what came of it is not what the reader promises."""


def main() -> None:
    """Run the cases, print what is bad, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--case", type=int, help="run this one alone, and show its traceback")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.case is not None:
        print(run_case(options.seed, options.case, show=True))
        return
    start = time.monotonic()
    print(f"{options.cases} cases, seed {options.seed}", flush=True)
    with ThreadPoolExecutor(options.processes) as pool:
        shares = [range(first, options.cases, options.processes) for first in range(options.processes)]
        results = [
            result for part in pool.map(lambda share: list(supervised(options.seed, share)), shares) for result in part
        ]
    text = table(results, options.seed, time.monotonic() - start)
    print(text)
    if options.output:
        options.output.write_text(text)
    sys.exit(any(result.outcome == BAD for result in results))


def supervised(seed: int, numbers: range) -> Iterator[Result]:
    """Run cases in a process, and count its end, or its silence, as the outcome of the case at hand."""
    context = get_context("spawn")
    process, connection = None, None
    for number in numbers:
        if process is None or connection is None or not process.is_alive():
            connection, other = context.Pipe()
            process = context.Process(target=work, args=(other, seed), daemon=True)
            process.start()
            other.close()
            connection.recv()  # it is ready: importing torch takes its time
        try:
            connection.send(number)
            if not connection.poll(PATIENCE):
                process.kill()
                process.join()
                result = _named(seed, number, f"no answer within {PATIENCE} s")
            else:
                result = connection.recv()
        except (EOFError, OSError):
            process.join()
            result = _named(seed, number, f"the process ended with exit code {process.exitcode}")
        if result.outcome == BAD:
            process.kill()  # it may carry on what went wrong
            process.join()
            print(f"case {number} ({result.kind}, {result.mutation}): {result.detail}", flush=True)
        if number % 1000 < 2:
            print(f"at case {number}", flush=True)
        yield result
    if connection is not None:
        connection.close()


def work(connection: Connection, seed: int) -> None:
    """Answer the numbers of cases with their results, until the connection is closed."""
    torch.set_num_threads(1)
    for kind in KINDS:
        whole(kind)
    connection.send("ready")
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        result = run_case(seed, number)
        connection.send(result)


def run_case(seed: int, number: int, *, show: bool = False) -> Result:
    """Make one damaged file, read it, and say what came of it."""
    kind = KINDS[number % len(KINDS)]
    with tempfile.TemporaryDirectory() as name:
        trap, folder = Path(name, "trap"), Path(name, "input")
        trap.mkdir()
        folder.mkdir()
        mutation, content = mutated(kind, random.Random(f"{seed} {number}"), trap)
        path = _lay_out(kind, content, folder)
        before = _files(folder)
        home = Path.cwd()
        os.chdir(trap)
        try:
            with _watched(name) as faults:
                outcome, detail = _outcome(kind, path, show)
        finally:
            os.chdir(home)
        if _files(trap):
            faults.append(f"a payload ran and made {_files(trap)}")
        if _files(folder) != before:
            faults.append("the folder of the input has changed")
    if faults:
        outcome, detail = BAD, "; ".join(faults)
    return Result(number, str(kind), mutation, outcome, detail)


def _lay_out(kind: Kind, content: bytes, folder: Path) -> Path:
    """Write the damaged file, with whole ones beside it where there have to be some, and return what is opened."""
    (first, sound), *others = whole(kind).items()
    if kind.reader in ("image folder", "class folders"):
        parts = ["."] if kind.reader == "image folder" else ["train/a", "train/b", "val/a"]
        for part in parts:
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / f"sound.{kind.form}").write_bytes(sound)
        (folder / parts[0] / first).write_bytes(content)
        return folder
    (folder / first).write_bytes(content)
    for name, data in others:
        (folder / name).write_bytes(data)
    return folder / ("x.pth" if kind.reader == "settings" else first)


def _outcome(kind: Kind, path: Path, show: bool) -> tuple[str, str]:
    readers = {
        "checkpoint": _read_checkpoint,
        "settings": _read_checkpoint,
        "tensor file": _read_tensor_file,
        "image folder": _read_images,
        "class folders": _read_class_folders,
    }
    try:
        equal = readers[kind.reader](path)
    except BNInsertError as error:
        if show:
            traceback.print_exc()
        return _judged(error, path)
    except UnexpectedError as error:
        return BAD, str(error)
    except Exception as error:  # noqa: BLE001 - counting these is what this program is for
        if show:
            traceback.print_exc()
        return BAD, f"{type(error).__name__}: {error!s:.300}"
    return (EQUAL if equal else CHANGED), ""


def _judged(error: BNInsertError, path: Path) -> tuple[str, str]:
    """Look at a message: it names the file, is one line that a terminal can take, and hides no failed allocation."""
    text = str(error)
    if path.stem not in text or not text.isprintable() or len(text) > 1500:
        return BAD, f"the message does not name the file, or is no line of text: {text!a:.300}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or re.search(r"alloc|not enough memory|out of memory", str(cause).lower()):
            return BAD, f"an allocation was tried that failed: {cause!s:.300}"
        cause = cause.__cause__ or cause.__context__
    return ERROR, text


# What each reader promises


def _read_checkpoint(path: Path) -> bool:
    """Read a checkpoint in both ways. Without a check sum any bits are weights; shapes and settings must be sound."""
    expected = network()
    refusals, equal = [], []
    for architecture in (None, network):
        try:
            model = load_checkpoint(path, model=architecture)
        except BNInsertError as error:
            refusals.append(error)
        else:
            equal.append(_checked_network(model, path, expected))
    if settings := read_checkpoint(path, mmap=True).settings:
        _check_transform(settings.transform)
    if refusals:  # one way may take what the other does not: another architecture, say
        raise refusals[0]
    return all(equal)


def _checked_network(model: nn.Module, path: Path, expected: nn.Module) -> bool:
    state, wanted = model.state_dict(), expected.state_dict()
    held = sum(value.numel() * value.element_size() for value in state.values())
    _expect(not any(module.training for module in model.modules()), "the network is in train mode")
    _expect(all(type(value) is Tensor and value.device.type == "cpu" for value in state.values()), "odd tensors")
    _expect(held <= 12 * path.stat().st_size, f"{held} bytes of tensors from {path.stat().st_size} bytes of file")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            _expect(0 <= module.eps < float("inf"), f"eps is {module.eps}")
            _expect(module.momentum is None or abs(module.momentum) < float("inf"), f"momentum is {module.momentum}")
        if isinstance(module, nn.Dropout):
            _expect(0 <= module.p <= 1, f"p of dropout is {module.p}")
    if len({value.dtype for value in state.values() if value.is_floating_point()}) == 1:
        first = next(iter(model.parameters()))
        with torch.inference_mode():
            logits = model(torch.ones(2, first.shape[1], 16, 16, dtype=first.dtype))
        _expect(len(logits) == 2 and logits.ndim == 2, f"the outputs have the shape {tuple(logits.shape)}")
    settings = [(getattr(module, "eps", 0), getattr(module, "p", 0)) for module in model.modules()]
    return (
        list(state) == list(wanted)
        and all(torch.equal(state[key], wanted[key]) for key in wanted)
        and settings == [(getattr(module, "eps", 0), getattr(module, "p", 0)) for module in expected.modules()]
    )


def _check_transform(values: Any) -> None:
    """A transform out of a file is refused with its reason, or prepares a picture."""
    try:
        transform = Transform.from_dict(values)
    except BNInsertError:
        return
    channels = max(len(transform.mean), len(transform.std))
    _expect(transform.normalize(torch.zeros(channels, 2, 2, dtype=torch.uint8)).shape[0] == channels, "transform")


def _read_tensor_file(path: Path) -> bool:
    batches = open_batches(path, TRANSFORM, batch_size=2)
    images = [batch.images for batch in batches]
    _check_images(images, batches.images)
    _expect(sum(map(Tensor.numel, images)) <= 8 * path.stat().st_size, "more values than the file has bits")
    found = sorted(image.sum().item() for part in images for image in part)
    wanted = tensor()
    same = torch.cat(images).shape == wanted.shape
    return same and torch.allclose(torch.tensor(found), torch.tensor(sorted(image.sum().item() for image in wanted)))


def _read_images(path: Path) -> bool:
    batches = open_batches(path, TRANSFORM, batch_size=2)
    images = [batch.images for batch in batches]
    _check_images(images, 2 - len(batches.unreadable))
    _check_unreadable(batches.unreadable)
    whole_pair = torch.cat(images)
    return len(whole_pair) == 2 and torch.equal(whole_pair[0], whole_pair[1])


def _read_class_folders(path: Path) -> bool:
    folders = open_class_folders(path, TRANSFORM)
    images = [batch.images for batch in folders.batches(folders.train, 2)]
    _check_images(images, len(folders.train) - len(folders.unreadable))
    _check_unreadable(folders.unreadable)
    found = torch.cat(images)
    return len(found) == 3 and bool((found == found[0]).all())


def _check_images(images: list[Tensor], count: int) -> None:
    _expect(sum(map(len, images)) == count, f"{sum(map(len, images))} images, and {count} were announced")
    for part in images:
        _expect(part.dtype == torch.float32 and part.ndim == 4 and part.shape[1] == 3, f"a batch {tuple(part.shape)}")
        _expect(bool(part.isfinite().all()), "an image is not finite")


def _check_unreadable(files: list[Any]) -> None:
    """A file that was skipped is a clear error if it is named, and says why in a line."""
    if files:
        (file, reason), *others = files
        _expect(not others and file.stem == "x", f"skipped {files}")
        raise BNInsertError(f"{file}: {reason}")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UnexpectedError(otherwise)


# Watching a case


@contextmanager
def _watched(folder: str) -> Iterator[list[str]]:
    """Give a list of what went wrong besides: output, warnings, time, memory."""
    faults: list[str] = []
    peak, start = _peak(), time.process_time()
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with open(Path(folder, "printed"), "w+b") as printed, warnings.catch_warnings(record=True) as warned:  # noqa: PTH123
        warnings.simplefilter("always")
        for stream in (1, 2):
            os.dup2(printed.fileno(), stream)
        try:
            yield faults
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, saved in enumerate(kept, 1):
                os.dup2(saved, stream)
                os.close(saved)
        printed.seek(0)
        if text := printed.read(300):
            faults.append(f"it printed {text!r}")
        if warned:
            faults.append(f"it warned {warned[0].message!s:.300}")
    if (spent := time.process_time() - start) > CPU_LIMIT:
        faults.append(f"it took {spent:.1f} s")
    if (more := _peak() - peak) > MEMORY_LIMIT:
        faults.append(f"it took {more:,} bytes of address space")


def _peak() -> int:
    """Return the largest address space so far, in bytes: it counts memory that is asked for and never touched."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(re.search(r"VmPeak:\s*(\d+)", status)[1]) * 1024  # type: ignore[index]


def _files(folder: Path) -> list[str]:
    return sorted(f"{path.relative_to(folder)} {path.stat().st_size}" for path in folder.rglob("*") if path.is_file())


# The table


def _named(seed: int, number: int, detail: str) -> Result:
    kind = KINDS[number % len(KINDS)]
    mutation, _ = mutated(kind, random.Random(f"{seed} {number}"), Path("trap"))
    return Result(number, str(kind), mutation, BAD, detail)


def table(results: list[Result], seed: int, seconds: float) -> str:
    """Return the counts by kind and by mutation, what made them, and every bad case."""
    lines = [
        f"# {len(results):,} damaged files, seed {seed}",
        "",
        f"`python -m fuzz.robustness --cases {len(results)} --seed {seed}`, {seconds:.0f} s. "
        f'"{BAD}" counts: an exception other than BNInsertError, a message that does not name the file or has more '
        f"than one line, a warning, printed output, a crash, more than {CPU_LIMIT:g} s of CPU time, more than "
        f"{MEMORY_LIMIT >> 30} GiB of memory or a failed attempt to allocate it, a file created by a payload, and a "
        "result that violates the guarantees of its reader.",
        "",
        f'"{CHANGED}" is legitimate: the formats have no checksum over values, so a weight or pixel with a flipped bit '
        "is still a weight or pixel. In this case the program checks shapes, dtypes, the ranges of settings, a forward "
        "pass, that the size of the file bounds the sizes, and that images are finite and as many as announced.",
        "",
    ]
    for title, of in (("input", lambda result: result.kind), ("mutation", lambda result: result.mutation)):
        counts = Counter((of(result), result.outcome) for result in results)
        rows = dict.fromkeys(of(result) for result in results)
        lines += [f"| {title} | {' | '.join(OUTCOMES)} |", "|---|---|---|---|---|"]
        for row in sorted(rows) if title == "mutation" else rows:
            lines.append(f"| {row} | {' | '.join(str(counts[row, outcome]) for outcome in OUTCOMES)} |")
        totals = Counter(result.outcome for result in results)
        lines += [f"| all | {' | '.join(str(totals[outcome]) for outcome in OUTCOMES)} |", ""]
    bad = [result for result in results if result.outcome == BAD]
    lines += [f"- case {one.number} ({one.kind}, {one.mutation}): {one.detail}" for one in bad] + [""] * bool(bad)
    payloads = sum("payload" in result.mutation for result in results)
    lines += [
        f"{payloads:,} of the files contained a payload that creates a file when executed; none was created."
        * (not bad),
        "",
    ]
    found = versions() | {name: version(name) for name in ("pillow", "numpy", "safetensors")}
    lines += [
        ", ".join(f"{name} {number}" for name, number in found.items()),
        f"{os.cpu_count()} x {platform.machine()}",
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
