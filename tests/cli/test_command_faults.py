"""What insert, fold and finetune leave on a full disk, in a read-only folder, and when they are killed."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bn_insert import load_checkpoint
from bn_insert.demo import network_path
from support.commands import AS_STORED, assert_refused, run, run_forked, run_process, start_forked, text_of
from support.digits import copy_labelled_digits
from support.full_disk import file_size_limit

resource = pytest.importorskip("resource", reason="full disks are made by a limit that POSIX has")

NOBODY = 65534
INTERRUPTION = Path(__file__).parents[2] / "fuzz" / "interruption.py"

SIZE = network_path().stat().st_size

Command = Callable[[Path], tuple[object, ...]]


@pytest.fixture(scope="module")
def inputs() -> Iterator[Path]:
    """A folder that everybody may read, with digits/train, digits/val and bn.pth."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        copy_labelled_digits(folder / "digits")
        assert run(*insert(folder)(folder / "bn.pth")).exit_code == 0
        yield folder


def insert(inputs: Path) -> Command:
    return lambda output: ("insert", network_path(), inputs / "digits/val", "-o", output, *AS_STORED)


def fold(inputs: Path) -> Command:
    return lambda output: ("fold", inputs / "bn.pth", inputs / "digits/val", "-o", output)


def finetune(inputs: Path) -> Command:
    command = ("finetune", inputs / "bn.pth", inputs / "digits", "--epochs", 1, "-b", 20, "-j", 0, "--device", "cpu")
    return lambda output: (*command, "--lr", 0.001, "--output-dir", output)  # trials of rates take most of the time


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder, with the bytes of files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@contextmanager
def no_privileges() -> Iterator[None]:
    """Be subject to the modes of files, which root is not."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


# Whether there is an output to replace.
OUTPUTS = [
    (insert, "out.pth", SIZE // 2, False),
    (fold, "out.safetensors", SIZE // 2, True),
    (finetune, "new/run", SIZE // 2, False),
    (finetune, "new/run", SIZE * 3 // 2, True),  # checkpoints fit, the state with its momentum does not
]


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize("case", OUTPUTS, ids=lambda case: f"{case[0].__name__}-{case[1]}-{case[2]}")
def test_a_full_disk_is_one_message_and_changes_nothing(
    case: tuple[Callable[[Path], Command], str, int, bool], inputs: Path, tmp_path: Path
) -> None:
    make, name, size, force = case
    command = make(inputs)(tmp_path / name)
    if force:
        assert run(*command).exit_code == 0
        command = (*command, "--force")
    before = contents(tmp_path)
    with file_size_limit(size):
        result = run(*command)
    assert_refused(result, "cannot write", "File too large")
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize(("make", "name"), [(insert, "out.pth"), (fold, "out.safetensors"), (finetune, "run")])
def test_a_read_only_folder_is_one_message_before_the_work(
    make: Callable[[Path], Command], name: str, inputs: Path, tmp_path: Path
) -> None:
    assert run(*make(inputs)(tmp_path / name)).exit_code == 0  # also imports all, from where only root may read
    with tempfile.TemporaryDirectory(dir=inputs) as folder:
        Path(folder).chmod(0o555)
        with no_privileges():
            result = run(*make(inputs)(Path(folder, name)))
        assert_refused(result, "cannot write", "ermission")
        assert not {"Calibrated", "epoch"} & set(text_of(result.output).split())
        assert list(Path(folder).iterdir()) == []
        Path(folder).chmod(0o755)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc is Linux's")
@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize(("make", "name"), [(insert, "out.pth"), (fold, "out.safetensors"), (finetune, "run")])
def test_a_folder_that_takes_no_files_is_one_message_before_the_work(
    make: Callable[[Path], Command], name: str, inputs: Path
) -> None:
    result = run(*make(inputs)(Path("/proc", name)))
    assert_refused(result, f"cannot write /proc/{name}: No such file or directory")
    assert "Preprocessing" not in result.stderr


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_longest_name_of_a_file_is_written_and_a_longer_one_is_refused_before_the_work(
    suffix: str, inputs: Path, tmp_path: Path
) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    for length in (longest - 1, longest):
        output = tmp_path / ("x" * (length - len(suffix)) + suffix)
        assert run(*insert(inputs)(output)).exit_code == 0
        assert load_checkpoint(output)
    result = run(*insert(inputs)(output.with_name("x" + output.name)))
    assert_refused(result, "cannot write", "File name too long")
    assert "Calibrated" not in result.stderr


@pytest.mark.usefixtures("no_charts")
def test_finetune_sees_before_the_work_that_its_folder_is_read_only(inputs: Path) -> None:
    run(*finetune(inputs)(inputs / "first"))
    with tempfile.TemporaryDirectory(dir=inputs) as folder:
        Path(folder).chmod(0o555)
        with no_privileges():
            result = run(*finetune(inputs)(Path(folder)))
        assert_refused(result, "no permission to write")
        assert "epoch 1" not in result.stdout


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 40 bytes."),
        RuntimeError("unable to mmap 40 bytes from file <net.pth>: Cannot allocate memory (12)"),
        RuntimeError("can't start new thread"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        ImportError("IMPORTANT:\n\nOriginal error was: umath.so: failed to map segment from shared object\n"),
    ],
    ids=lambda error: f"{type(error).__name__}-{error!s:.20}",
)
@pytest.mark.parametrize("place", ["checkpoints.read_file.load_torch_file", "checkpoints.vgg.nn.Conv2d"])
def test_too_little_memory_is_one_message_and_never_a_damaged_file(
    place: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"bn_insert.{place}", fails)
    assert_refused(run("inspect", network_path()), "error: not enough memory (", "raise the limit (ulimit -v)")


def test_too_little_memory_to_import_torch_is_one_message(tmp_path: Path) -> None:
    script = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))
sys.argv[1:] = ["inspect", {str(network_path())!r}]
runpy.run_module("bn_insert", run_name="__main__", alter_sys=True)
"""
    done = run_process(sys.executable, "-c", script, folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch("error: not enough memory .*ulimit.*\n", done.stderr), done.stderr


def test_what_a_killed_process_staged_is_removed_and_what_a_live_one_stages_stays(inputs: Path, tmp_path: Path) -> None:
    # Two processes, of which one is forked from the other: importing everything takes most of the time.
    script = """
import os, signal, sys, time
from pathlib import Path
from bn_insert.support.files import write_atomically
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a killed child leaves nothing
name = "alive" if os.fork() else "killed"
line = f"{name} {os.getpid()}\\n".encode()  # in one piece: both processes write at once
write_atomically(name, lambda path: (path.write_text("half"), os.write(1, line), time.sleep(600)))
"""
    parent = start_forked("-c", script, folder=tmp_path)
    try:
        pids = dict(parent.stdout.readline().split() for _ in range(2))
        assert len(list(tmp_path.iterdir())) == 2
        os.kill(int(pids["killed"]), signal.SIGKILL)
        while Path("/proc", pids["killed"]).exists():
            time.sleep(0.01)
        assert run(*insert(inputs)(tmp_path / "out.pth")).exit_code == 0
        names = {path.name for path in tmp_path.iterdir()}
        assert len(names) == 2
        assert "out.pth" in names
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()


@pytest.mark.skipif(not INTERRUPTION.exists(), reason="fuzz/ is not in this distribution")
def test_killed_at_random_moments_every_output_is_whole() -> None:
    command = ("-m", "fuzz.interruption", "--kills", 1, "--seed", 1, "--share", 2)
    command += ("--commands", "finetune")  # those of insert are in tests/checkpoints
    done = run_forked(*command, folder=INTERRUPTION.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Outputs other than absent, old or new, each complete: 0." in done.stdout


def test_a_signal_to_the_whole_process_group_ends_finetune_in_good_order(inputs: Path, tmp_path: Path) -> None:
    command = (*finetune(inputs)(tmp_path / "run"), "--epochs", 1000, "-j", 1, "-b", 4)
    process = start_forked("-m", "bn_insert", *command, folder=tmp_path)
    process.stdout.readline()  # the first epoch is done
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert "the same command with --resume" in text_of(errors)
