"""Interrupt insert, fold and finetune at random moments: is what they leave always whole, and what they say true?

    python -m fuzz.interruption --output fuzz/results/interruption.md
    python -m fuzz.interruption --kills 0 --signals 500 --races 500

Each command runs on the demo network in a process forked from this one, which has imported everything already.

Kills: SIGKILL, half of them at a random moment of the run, half a random moment after one of its file operations. Then
the output is checked: it must be absent or the one that an undisturbed run writes; where one was there before
(--force), the old or the new one. The same command is then run again, to its end: it must write the output of an
undisturbed run, and leave nothing else in the folder.

Signals: SIGINT or SIGTERM, to the process or its whole group, most of them at or just after a file operation between
the first write and the exit. In addition the exit code must be that of the signal, or 0 with the output complete; there
must be no traceback; and what the message says about the output must be true.

Races: two processes write different outputs to one path at once. The path must have one of them, complete; without
--force, that of the only process that succeeded.

The exit code is 1 if anything else is left even once.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from bn_insert.checkpoints.load_network import build_network
from bn_insert.checkpoints.read_file import read_checkpoint
from bn_insert.demo import images_path, network_path
from bn_insert.report import versions
from bn_insert.training.metrics import write_curves
from bn_insert.training.results import BEST, CLASSES, CURVES, LAST, METRICS, RESULTS, STATE
from bn_insert.training.state import load_state
from bn_insert_cli.app import app
from bn_insert_cli.interruption import signals

AS_IT_IS = ("--resize", "0", "--crop", "0", "--mean", "0", "--std", "1")
CHANGES = {"os.mkdir", "os.rename", "os.link", "os.chmod", "os.remove", "os.rmdir"}
LONGEST_DELAY = 0.01  # seconds between a file operation and the kill
AIMED = 0.9  # share of the signals that are sent at a file operation


class WrongError(Exception):
    """Says what a kill has left that it should not."""


@dataclass
class Case:
    """One command, the names of what it writes, and what undisturbed runs give.

    arguments: of the command; `{output}` stands for the output's name.  before: a command whose output is there before
    the killed one runs.  states: by name ("old", "new", or what an epoch leaves) the digest of the output.
    """

    name: str
    arguments: tuple[str, ...]
    output: str
    before: tuple[str, ...] = ()
    states: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    operations: int = 0

    def command(self, *more: str) -> list[str]:
        """Return the command line."""
        return [*(argument.format(output=self.output) for argument in self.arguments), *more]


def run_forked(
    arguments: Sequence[str],
    folder: Path,
    watch: Callable[[int], object] | None = None,
    at_end: Callable[[], object] = lambda: None,
    *,
    ending: signal.Signals = signal.SIGKILL,
    group: bool = False,
) -> int:
    """Run a command line in a forked process, and send it a signal when `watch` returns.

    watch: called with a pipe on which each file operation is one byte; by default it waits for the pipe's end, which is
    the process's.  at_end: called by the process.  ending: the signal.  group: send it to the processes that the
    process has started too.  Return the exit code, or minus the signal that ended the process.
    """
    child, reader = start_forked(arguments, folder, at_end)
    try:
        (watch or operations_of)(reader)
        if watch is not None:
            with suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(child, ending)
        if ending != signal.SIGKILL:
            operations_of(reader)
    finally:
        os.close(reader)
        status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def start_forked(
    arguments: Sequence[str], folder: Path, at_end: Callable[[], object] = lambda: None, messages: str = "messages"
) -> tuple[int, int]:
    """Start a command line in a forked process; return its number and the pipe of its file operations."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setpgid(0, 0)
        _run(arguments, folder, writer, at_end, messages)
    with suppress(OSError):
        os.setpgid(child, child)
    os.close(writer)
    os.read(reader, 1)  # until then, a signal would meet no command, and the messages would be those of the run before
    return child, reader


def operations_of(reader: int) -> int:
    """Wait for the end of a pipe, and return the number of bytes in it."""
    return sum(iter(lambda: len(os.read(reader, 1 << 16)), 0))


def _run(
    arguments: Sequence[str], folder: Path, writer: int, at_end: Callable[[], object], messages: str = "messages"
) -> None:
    """Run a command in this process and end it."""
    # PyTorch renews its thread pool at the first use after a fork, without a lock: here, before the first backward pass
    # starts a thread that would use it at the same time ("Invalid thread pool!").
    torch.set_num_threads(1)
    signals.install()
    os.chdir(folder)
    printed = os.open(folder.parent / messages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.write(writer, b".")
    writing = False

    def tell(event: str, values: tuple[object, ...]) -> None:
        nonlocal writing
        writing = writing or (event == "os.mkdir" and ".bn-insert-" in str(values[0]))
        if writing and (event in CHANGES or (event == "open" and "w" in str(values[1]))):
            with suppress(BrokenPipeError):
                os.write(writer, b".")

    sys.addaudithook(tell)
    code = 70
    try:
        app(list(arguments))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
        at_end()
    finally:
        sys.stdout.flush()
        os._exit(code)


def undisturbed(arguments: Sequence[str], folder: Path) -> tuple[float, int]:
    """Run a command to its end; return its seconds and the number of its file operations."""
    counted: list[int] = []
    started = time.monotonic()
    code = run_forked(arguments, folder, lambda reader: counted.append(operations_of(reader)))
    # The kill behind the pipe's end may still meet a process that is all but gone.
    if code not in (0, -signal.SIGKILL):
        raise WrongError(f"{' '.join(arguments)} ended with {code}: {_messages(folder)}")
    return time.monotonic() - started, counted[0]


def _messages(folder: Path) -> str:
    return (folder.parent / "messages").read_text(errors="replace").strip()[-5000:]  # an abort of PyTorch prints much


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a checkpoint's tensors and settings, read as any user's program reads them."""
    result = hashlib.sha256()
    checkpoint = read_checkpoint(path)
    result.update(b"none" if checkpoint.settings is None else checkpoint.settings.to_json().encode())
    for key, tensor in build_network(checkpoint).state_dict().items():
        result.update(key.encode())
        result.update(tensor.numpy().tobytes())
    return result.hexdigest()


def known(case: Case, path: Path, *wanted: str, stopped: bool = False) -> str:
    """Return which of the states of a case a checkpoint is in; raises WrongError when it is in none."""
    try:
        digest = digest_of(path)
    except Exception as error:
        raise WrongError(f"{path.name} does not load: {error}") from error
    for name, each in case.states.items():
        if each == digest and (not wanted or name in wanted):
            return name
    if stopped:
        return "saved between two steps"
    raise WrongError(f"{path.name} loads, and is neither the old nor the new output")


def look_at_checkpoint(case: Case, folder: Path) -> str:
    """Return what a kill of insert or fold has left."""
    path = folder / case.output
    check_names(folder, {case.output})
    if path.exists():
        return known(case, path)
    if "old" in case.states:
        raise WrongError("the old output is gone, and the new one is not there")
    return "absent"


def look_at_run(case: Case, folder: Path, *, stopped: bool = False) -> str:
    """Return what a kill of finetune has left; one that was stopped saves its weights in the middle of an epoch."""
    run = folder / case.output
    check_names(folder, {case.output})
    if not run.exists():
        return "absent"
    check_names(run, set(RESULTS))
    found = {name: known(case, run / name, stopped=stopped) for name in (LAST, BEST) if (run / name).exists()}
    if "old" in case.states and not (run / LAST).exists():
        raise WrongError("the old output is gone, and the new one is not there")
    if (run / METRICS).exists():
        rows = list(csv.DictReader((run / METRICS).read_text().splitlines()))
        if not rows or any(None in row.values() for row in rows):
            raise WrongError(f"{METRICS} is not whole")
    if (run / CURVES).exists():
        with Image.open(run / CURVES) as picture:
            picture.load()
    if (run / CLASSES).exists() and (run / CLASSES).read_text().split() != [str(digit) for digit in range(10)]:
        raise WrongError(f"{CLASSES} is not whole")
    if (run / STATE).exists():
        state = load_state(run / STATE)
        # One that was stopped in its first epoch has no figures yet, and no best epoch.
        described = {LAST, CLASSES} | ({BEST, METRICS, CURVES} if state.progress.history else set())
        if missing := described - {path.name for path in run.iterdir()}:
            raise WrongError(f"{STATE} tells of files that are not there: {missing}")
        if case.before and str(state.settings["lr"]) == case.before[-1]:
            return "old run, still to be resumed"
        return f"complete, {found[LAST]}" if state.progress.epoch else "complete"
    return "each file whole, not yet all" if found else "absent"


def check_names(folder: Path, allowed: set[str]) -> None:
    """Raise WrongError for a file that is neither an output nor plainly temporary."""
    names = {path.name for path in folder.iterdir() if not is_temporary(path)}
    if strange := names - allowed:
        raise WrongError(f"{folder.name} holds {strange}")


def is_temporary(path: Path) -> bool:
    """Say whether a name is that of a folder in which outputs are made."""
    return path.name.startswith(".bn-insert-") and path.name.endswith(".tmp")


def cases(root: Path, share: int) -> list[Case]:
    """Return the commands that are killed, with inputs made under `root`: `share` images of each digit."""
    images, labelled = root / "images", root / "labelled"
    for digit in range(10):
        files = sorted((images_path() / str(digit)).iterdir())[: 2 * share]
        for place, chosen in (
            (images, files[:share]),
            (labelled / "train", files[:share]),
            (labelled / "val", files[share:]),
        ):
            (place / str(digit)).mkdir(parents=True)
            for file in chosen:
                (place / str(digit) / file.name).symlink_to(file)
    original, inserted = str(network_path()), str(root / "inserted.pth")
    insert = ("insert", original, str(images), "-o", "{output}", "-j", "0", *AS_IT_IS)
    fold = ("fold", inserted, "-o", "{output}")
    tune = ("finetune", inserted, str(labelled), "--output-dir", "{output}", "--epochs", "2", "-j", "0", "-b", "16")
    tune += ("--lr-scheduler", "constant", "--lr", "0.001", "--device", "cpu")
    undisturbed([argument.format(output=inserted) for argument in insert], root)
    other = ("--eps", "0.001", "--layers", "conv")
    return [
        Case("insert, .pth", insert, "out.pth"),
        Case("insert, .safetensors", insert, "out.safetensors"),
        Case("insert --force, .pth", (*insert, "--force"), "out.pth", before=(*insert, *other)),
        Case("insert --force, .safetensors", (*insert, "--force"), "out.safetensors", before=(*insert, *other)),
        Case("fold, .pth", fold, "out.pth"),
        Case("fold --force, .pth", (*fold, "--force"), "out.pth", before=(*insert, *other)),
        Case("finetune", tune, "run"),
        Case("finetune --force", (*tune, "--force"), "run", before=(*tune, "--epochs", "1", "--lr", "0.002")),
    ]


def learn(case: Case, folder: Path) -> None:
    """Run a case undisturbed, for its states, its seconds and its file operations."""
    tuning = case.arguments[0] == "finetune"

    def remember(name: str) -> None:
        path = folder / case.output
        case.states[name] = digest_of(path / LAST if tuning else path)
        if tuning:
            case.states[f"{name}, {BEST}"] = digest_of(path / BEST)
        shutil.rmtree(folder)

    if case.before:
        folder.mkdir()
        undisturbed([argument.format(output=case.output) for argument in case.before], folder)
        shutil.copytree(folder, template(case, folder))
        remember("old")
    if tuning:
        folder.mkdir()
        undisturbed(case.command("--epochs", "1"), folder)
        remember("after epoch 1")
    prepare(case, folder)
    case.seconds, case.operations = undisturbed(case.command(), folder)
    remember("new")


def prepare(case: Case, folder: Path) -> None:
    """Make the folder as it is when the command begins."""
    if case.before:
        shutil.copytree(template(case, folder), folder)
    else:
        folder.mkdir()


def template(case: Case, folder: Path) -> Path:
    """Return where the folder is kept as it is when the command begins."""
    return folder.parent / f"before {case.name}"


def kill_once(case: Case, folder: Path, generator: random.Random) -> tuple[str, bool]:
    """Kill a run and look; run it again and look. Return what the kill left, and whether that was temporary files."""
    moment, delay = generator.uniform(0, case.seconds), generator.uniform(0, LONGEST_DELAY)
    operation = generator.randint(1, case.operations) if generator.random() < 0.5 else 0

    def wait(reader: int) -> None:
        if operation == 0:
            time.sleep(moment)
            return
        for _ in range(operation):
            if not os.read(reader, 1):
                return
        time.sleep(delay)

    run_forked(case.command(), folder, wait)
    look = look_at_run if case.arguments[0] == "finetune" else look_at_checkpoint
    left = look(case, folder)
    temporary = any(map(is_temporary, folder.rglob("*")))
    finish(case, folder, left)
    if any(map(is_temporary, folder.rglob("*"))):
        raise WrongError("the next run left temporary files")
    return left, temporary


def finish(case: Case, folder: Path, left: str) -> None:
    """Run the command again as a user would, and raise WrongError unless the result is that of an undisturbed run."""
    path = folder / case.output
    if case.arguments[0] == "finetune":
        own_state = (path / STATE).exists() and "old" not in left
        resumable = own_state or not any((path / name).exists() for name in RESULTS)
        plain = [argument for argument in case.command() if argument != "--force"]
        undisturbed([*plain, "--resume" if resumable else "--force"], folder)
        known(case, path / LAST, "new")
        known(case, path / BEST, f"new, {BEST}")
        return
    if left == "new" and not case.before:
        path.unlink()  # it would be refused, rightly
    undisturbed(case.command(), folder)
    known(case, path, "new")


def signal_once(case: Case, folder: Path, generator: random.Random) -> str:
    """Send a signal to a run, and check what it leaves and says; run it again and check. Return what it left."""
    moment, delay = generator.uniform(0, case.seconds), generator.choice((0, generator.uniform(0, LONGEST_DELAY)))
    operation = generator.randint(1, case.operations) if generator.random() < AIMED else 0
    ending = generator.choice((signal.SIGINT, signal.SIGTERM))

    def wait(reader: int) -> None:
        if operation == 0:
            time.sleep(moment)
            return
        for _ in range(operation):
            if not os.read(reader, 1):
                return
        time.sleep(delay)

    code = run_forked(case.command(), folder, wait, ending=ending, group=generator.random() < 0.5)
    tuning = case.arguments[0] == "finetune"
    left = look_at_run(case, folder, stopped=True) if tuning else look_at_checkpoint(case, folder)
    if any(map(is_temporary, folder.rglob("*"))):
        raise WrongError("it left temporary files")
    said = _messages(folder)
    if code not in (0, 128 + ending) or "Traceback" in said or "Exception ignored" in said:
        raise WrongError(f"it ended with {code} after {ending.name}: {said}")
    if code == 0 and "new" not in left:
        raise WrongError(f"it ended with 0, and the output is {left}: {said}")
    if code and not tuning:
        written = f"interrupted; {case.output} is written and complete" in said
        if written != (left == "new") or written == ("interrupted; nothing was written" in said):
            raise WrongError(f"the output is {left}, and it said: {said}")
    if code and tuning and "nothing was written" in said and left not in ("absent", "old run, still to be resumed"):
        raise WrongError(f"the output is {left}, and it said: {said}")
    finish(case, folder, left)
    return f"{left}, exit code {code}" if code == 0 else left


def race_once(case: Case, folder: Path, generator: random.Random) -> str:
    """Let two processes write different outputs to one path at once, and check which of them is there."""
    force = generator.random() < 0.5
    plain = [argument for argument in case.command() if argument != "--force"]
    commands = {"new": plain, "old": [argument.format(output=case.output) for argument in case.before]}
    runs = {}
    for name, command in generator.sample(list(commands.items()), 2):
        runs[name] = start_forked([*command, *(["--force"] if force else [])], folder, messages=f"messages {name}")
        time.sleep(generator.choice((0, generator.uniform(0, LONGEST_DELAY))))
    codes = {}
    for name, (child, reader) in runs.items():
        operations_of(reader)
        os.close(reader)
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    check_names(folder, {case.output})
    found = known(case, folder / case.output)
    if force and set(codes.values()) != {0}:
        raise WrongError(f"with --force the exit codes are {codes}")
    if not force and codes != {found: 0} | {name: 2 for name in codes if name != found}:
        raise WrongError(f"the output is that of {found}, and the exit codes are {codes}")
    if any(map(is_temporary, folder.rglob("*"))):
        raise WrongError("temporary files are left")
    return f"{'both' if force else 'one'} succeeded, whole"


def main() -> None:
    """Kill, count, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=208)
    parser.add_argument("--signals", type=int, default=0)
    parser.add_argument("--races", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", metavar="NAME", help="rows of the table; all by default")
    parser.add_argument("--share", type=int, default=8, help="images of each digit that a run sees")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads cannot be forked safely
    generator = random.Random(options.seed)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        import_everything(root)
        chosen = cases(root, options.share)
        everything = [case for case in chosen if options.commands is None or case.name in options.commands]
        counts = {case.name: Counter[str]() for case in everything}
        temporary = Counter[str]()
        for case in everything:
            learn(case, root / "run")
        for number in range(options.kills):
            case, folder = everything[number % len(everything)], root / "run"
            prepare(case, folder)
            try:
                left, was_temporary = kill_once(case, folder, generator)
                counts[case.name][left] += 1
                temporary[case.name] += was_temporary
            except WrongError as error:
                wrong.append(f"kill {number}, {case.name}: {error}")
                print(wrong[-1], flush=True)
            shutil.rmtree(folder)
            if (number + 1) % 20 == 0:
                print(f"{number + 1} kills, {len(wrong)} wrong", flush=True)
        racing = [case for case in everything if case.before and case.arguments[0] == "insert"]
        rows = repeated("signal", options.signals, everything, signal_once, root / "run", generator, wrong)
        rows += repeated("race", options.races, racing, race_once, root / "run", generator, wrong)
    lines = [
        f"# {options.kills} kills with SIGKILL, {options.signals} signals, {options.races} races, seed {options.seed}",
        "",
    ]
    lines += report(everything, counts, temporary, wrong)
    if rows:
        lines[-1:] = ["", "| | command | outcome |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows), ""]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines))
    sys.exit(bool(wrong))


def repeated(  # noqa: PLR0917 - what a trial is, in the order of its parts
    title: str,
    times: int,
    chosen: Sequence[Case],
    once: Callable[[Case, Path, random.Random], str],
    folder: Path,
    generator: random.Random,
    wrong: list[str],
) -> list[tuple[str, str, str]]:
    """Run a trial many times, and return a row for each case; what is wrong is added to `wrong`."""
    found = {case.name: Counter[str]() for case in chosen}
    for number in range(times):
        case = chosen[number % len(chosen)]
        if title == "race":
            folder.mkdir()
        else:
            prepare(case, folder)
        try:
            found[case.name][once(case, folder, generator)] += 1
        except WrongError as error:
            wrong.append(f"{title} {number}, {case.name}: {error}")
            print(wrong[-1], flush=True)
        shutil.rmtree(folder)
        if (number + 1) % 20 == 0:
            print(f"{number + 1} {title}s, {len(wrong)} wrong", flush=True)
    return [(title, name, _counted(counter)) for name, counter in found.items() if counter]


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{outcome}: {count}" for outcome, count in sorted(counter.items()))


def import_everything(folder: Path) -> None:
    """Import in this process what the commands import, which would take every child seconds.

    A child runs them and says what that was: run here, they could start threads, which no fork survives.
    """
    listed = folder / "modules"

    def list_modules() -> None:
        listed.write_text("\n".join(sys.modules))

    insert = (
        "insert",
        str(network_path()),
        str(images_path()),
        "-o",
        "warm.pth",
        "--images",
        "4",
        "-j",
        "0",
        *AS_IT_IS,
    )
    fold = ("fold", "warm.pth", "-o", "folded.pth", *AS_IT_IS)
    (folder / "warm").mkdir()
    for arguments in (insert, fold):
        if run_forked(arguments, folder / "warm", at_end=list_modules):
            raise WrongError(_messages(folder / "warm"))
        for name in listed.read_text().split():
            with suppress(Exception):  # some modules only come up as a part of another's import
                importlib.import_module(name)
    write_curves([], folder / "curves.png")


def report(
    everything: Sequence[Case],
    counts: dict[str, Counter[str]],
    temporary: Counter[str],
    wrong: Sequence[str],
) -> list[str]:
    """Return the table as lines of Markdown."""
    lines = [
        f"Outputs other than absent, old or new, each complete: {len(wrong)}.",
        "",
        "| command | seconds if not killed | file operations | kills | output afterwards | with temporary files |",
        "|---|---|---|---|---|---|",
    ]
    for case in everything:
        found = counts[case.name]
        row = (case.name, f"{case.seconds:.2f}", case.operations, found.total(), _counted(found), temporary[case.name])
        lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += ["", *(f"- {each}" for each in wrong), *([""] if wrong else [])]
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    return [*lines, ", ".join([machine, *(f"{name} {number}" for name, number in versions().items())]), ""]


if __name__ == "__main__":
    main()
