"""Ctrl-C and SIGTERM in every phase of a command: no traceback, and what the message says is true."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from bn_insert.demo import network_path
from support.commands import AS_STORED, run_forked, run_process, text_of
from support.digits import copy_digits

# Runs `python -m bn_insert`, and sends a signal to itself at an event of Python's audit.
SCRIPT = """
import os, runpy, signal, sys
number, event, word = int(sys.argv[1]), sys.argv[2], sys.argv[3]
del sys.argv[1:4]
def strike(name, values):
    global number
    if number and name == event and word in str(values[:2]):
        number, sent = 0, number
        os.kill(os.getpid(), sent)
sys.addaudithook(strike)
runpy.run_module("bn_insert", run_name="__main__", alter_sys=True)
"""

# The same twice: the first signal asks `finetune` to stop.
TWICE = SCRIPT.replace("os.kill(os.getpid(), sent)", "os.kill(os.getpid(), sent); os.kill(os.getpid(), sent)")

NOTHING = [
    ("import", "'typer'"),
    ("import", "'torch._C'"),
    ("open", "x.pth"),
    ("import", "'torch.export"),
    ("import", "torch.utils.data"),
]
WHILE_SAVING = [("os.mkdir", ".bn-insert-"), ("os.link", "out.pth"), ("os.chmod", ".bn-insert-"), ("os.rmdir", "")]


@pytest.mark.parametrize(("event", "word"), NOTHING)
@pytest.mark.parametrize("stop", [signal.SIGINT])
def test_a_signal_before_the_output_is_one_true_message(
    event: str, word: str, stop: signal.Signals, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.pth").write_bytes(network_path().read_bytes())
    command = ("insert", "x.pth", digits, "-o", "out.pth", *AS_STORED)
    run = partial(run_process, sys.executable) if event == "import" else run_forked
    done = run("-c", SCRIPT, int(stop), event, word, *command, folder=tmp_path)
    assert (done.returncode, text_of(done.stderr)) == (128 + stop, "error: interrupted; nothing was written ")
    assert {path.name for path in tmp_path.iterdir()} == {"x.pth", "digits"}


@pytest.mark.parametrize(("event", "word"), WHILE_SAVING)
@pytest.mark.parametrize("stop", [signal.SIGTERM])
def test_a_signal_while_the_output_is_saved_waits_and_says_that_it_is_written(
    event: str, word: str, stop: signal.Signals, digits: Path, tmp_path: Path
) -> None:
    command = ("insert", network_path(), digits, "-o", "out.pth", "--report", "r.json", *AS_STORED)
    done = run_forked("-c", SCRIPT, int(stop), event, word, *command, folder=tmp_path)
    assert done.returncode == 128 + stop, done.stderr
    assert "error: interrupted; out.pth is written and complete, the report r.json is not" in text_of(done.stderr)
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"digits", "out.pth"}


def test_a_second_signal_while_a_run_is_saved_leaves_nothing_unfinished(tmp_path: Path) -> None:
    for part in ("train", "val"):
        copy_digits(tmp_path / "data" / part, 2)
    command = ("finetune", network_path(), "data", "-o", "runs/new", "--lr", "0.001", "--no-fit-output", *AS_STORED)
    done = run_forked("-c", TWICE, int(signal.SIGINT), "os.chmod", ".bn-insert-", *command, folder=tmp_path)
    assert done.returncode == 128 + signal.SIGINT
    assert text_of(done.stderr).endswith("error: interrupted; nothing was written ")
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_a_signal_at_exit_does_not_change_the_outcome(tmp_path: Path) -> None:
    script = f"""
import atexit, os, signal
atexit.register(os.kill, {{pid}}, {int(signal.SIGINT)})
from bn_insert_cli.main import main
main()
""".format(pid="os.getpid()")
    done = run_process(sys.executable, "-c", script, "--version", folder=tmp_path)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr + done.stdout
