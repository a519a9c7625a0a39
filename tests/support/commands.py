"""The command line, in this process and in processes started for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner, Result

from bn_insert_cli.app import app

Run = Callable[..., Result]

# Images as they are stored, decoded in the process itself: starting workers takes longer than the demo's few images.
AS_STORED = ("--resize", "0", "--crop", "0", "--mean", "0", "--std", "1", "-j", "0")
INSTALLED = Path(sys.executable).with_name("bn-insert")
# One thread per process: idle threads that spin would starve the others, and results depend on the number of threads.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "200"}


def run(*arguments: object) -> Result:
    """Run `bn-insert` with these arguments in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_process(*command: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a new process and wait for it."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def start_process(*command: object, folder: Path) -> subprocess.Popen[str]:
    """Start a command in a session of its own, so that a signal can be sent to it and all that it starts."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def forked_ranks(count: int, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments on several ranks, as torchrun does; the exit code is the number that failed."""
    return run_process(sys.executable, Path(__file__).with_name("forked_ranks.py"), count, *arguments, folder=folder)


def text_of(output: str) -> str:
    """Return output on one line, without the boxes around usage errors."""
    return re.sub(r"[\s│]+", " ", output)


def assert_refused(result: Result, *wording: str, code: int = 2) -> None:
    """Check that a command ended with this code, one message with this wording, and no traceback."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    if code == 2:
        assert len(re.findall("^error: ", result.stderr, re.MULTILINE)) == (not result.stderr.startswith("Usage: "))
    for words in wording:
        assert words in text_of(result.stderr), text_of(result.stderr)
