"""The command line, in this process and in processes started for it."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import typer.testing
from typer.testing import CliRunner, Result

from bn_insert_cli.app import app

Run = Callable[..., Result]

# CliRunner builds all commands anew for each call, from hundreds of annotations.
typer.testing._get_command = cache(typer.testing._get_command)

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


class ForkedProcess:
    """A process that a fork server has started; used as `subprocess.Popen` is."""

    def __init__(self, output: int, errors: int, status: int) -> None:
        """Take over the descriptors that are read from."""
        self._status = open(status, encoding="ascii")  # noqa: SIM115
        self.stdout = open(output, encoding="utf-8")  # noqa: SIM115
        self.stderr = open(errors, encoding="utf-8")  # noqa: SIM115
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for the end of the process, and return what it printed; kill it after some seconds."""
        deadline = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
        deadline.start()
        with ThreadPoolExecutor() as readers:  # both at once: the process waits while a pipe is full
            outputs = list(readers.map(lambda stream: stream.read(), (self.stdout, self.stderr)))
        self.returncode = int(self._status.readline())
        deadline.cancel()
        for stream in (self.stdout, self.stderr, self._status):
            stream.close()
        return outputs[0], outputs[1]


@cache
def fork_server() -> socket.socket:
    """Start the process from which all others are forked, and return the socket that it listens to."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = Path(__file__).with_name("fork_server.py")
    with its:
        server = subprocess.Popen(
            [sys.executable, program, str(its.fileno())],
            env=ENVIRONMENT,
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
        )

    def stop() -> None:
        ours.close()
        server.wait()

    atexit.register(stop)
    return ours


def start_forked(
    *arguments: object, folder: Path, stdout: int | None = None, environment: Mapping[str, str] | None = None
) -> ForkedProcess:
    """Start Python with these arguments: `-m MODULE`, `-c CODE` or a script, and those of the program.

    The process is forked from one that has imported torch and bn_insert, in a session of its own. stdout: where its
    output goes, instead of to a pipe.
    """
    output, errors, status = os.pipe(), os.pipe(), os.pipe()
    request = {
        "arguments": [str(argument) for argument in arguments],
        "folder": str(folder),
        "environment": {**ENVIRONMENT, **(environment or {})},
    }
    descriptors = [output[1] if stdout is None else stdout, errors[1], status[1]]
    socket.send_fds(fork_server(), [json.dumps(request).encode()], descriptors)
    for _, writer in (output, errors, status):
        os.close(writer)
    return ForkedProcess(output[0], errors[0], status[0])


def run_forked(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as `start_forked` does, and wait for it."""
    return _completed(start_forked(*arguments, folder=folder))


def _completed(process: ForkedProcess) -> subprocess.CompletedProcess[str]:
    output, errors = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess([], process.returncode, output, errors)


def forked_ranks(count: int, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments on several ranks, as torchrun does; the exit code is the number that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared["TORCHELASTIC_RUN_ID"] = "forked"  # by this variable torch knows that torchrun started a process
    ranks = [
        start_forked(*arguments, folder=folder, environment=shared | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in map(str, range(count))
    ]
    done = [_completed(rank) for rank in ranks]
    outputs = ("".join(rank.stdout for rank in done), "".join(rank.stderr for rank in done))
    return subprocess.CompletedProcess([], sum(rank.returncode != 0 for rank in done), *outputs)


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
