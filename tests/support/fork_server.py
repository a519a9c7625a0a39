"""Starts Python programs in processes forked from this one: importing torch only once saves most of their time.

Each message on the socket that this process inherits asks for one program. The message is a JSON object with
`arguments` (`-m MODULE`, `-c CODE` or `SCRIPT`, and those of the program), `folder` and `environment`. Three file
descriptors come with it: standard output, standard error, and one to which the process id and, at the end, the exit
code are written, a line each. As with `subprocess`, the exit code is -N if signal N ended the program.
"""

# ruff: noqa: E402 - the exit handler comes first

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import socket
import sys
from contextlib import suppress

exit_code: int | None = None  # of a program that has ended as it wanted to


def end_process() -> None:
    """End a process as the command line does, without taking apart what was imported: 0.4 s for each program."""
    if exit_code is not None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(exit_code)


atexit.register(end_process)  # before all other exit handlers, so that it runs after them
gc.disable()  # during imports, whose objects stay: a quarter of their time

import torch
import torch._dynamo
import torch.distributed
import torchvision.models  # noqa: F401
from PIL import Image
from typer.testing import CliRunner

import bn_insert.report.page  # with matplotlib and jinja2
import bn_insert.training.finetune  # noqa: F401
from bn_insert import *  # noqa: F403 - the names themselves are imported at their first use
from bn_insert.demo import network_path
from bn_insert_cli.app import app


def main() -> None:
    """Fork until the other end of the socket is closed."""
    torch.set_num_threads(1)  # a process with threads cannot be forked safely
    Image.init()
    CliRunner().invoke(app, ["inspect", str(network_path())])  # imports what commands and torch.export import late
    gc.enable()
    gc.freeze()  # otherwise every child would look for garbage among all of torch's objects, and copy their memory
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        while True:
            message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 3)
            with suppress(ChildProcessError):  # there is none
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if not message:
                os._exit(0)
            if os.fork() == 0:
                requests.close()
                start(json.loads(message), *descriptors)
                return
            for descriptor in descriptors:
                os.close(descriptor)


def start(request: dict[str, object], output: int, errors: int, status: int) -> None:
    """Run a program in a child process, and wait for it: the process that forks on must not."""
    child = os.fork()
    if child == 0:
        os.close(status)
        for descriptor, standard in ((output, 1), (errors, 2)):
            os.dup2(descriptor, standard)
            os.close(descriptor)
        # New, since those of this process know whether they could seek, and have its encoding.
        encoding = request["environment"].get("PYTHONIOENCODING")  # type: ignore[attr-defined]
        sys.stdout = sys.__stdout__ = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        run_to_its_end(request)
        return
    os.close(output)
    os.close(errors)
    os.write(status, f"{child}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(status, f"{code}\n".encode())
    os._exit(0)


def run_to_its_end(request: dict[str, object]) -> None:
    """Run a program, and note the code that it ends with; Python itself reports exceptions."""
    global exit_code  # noqa: PLW0603 - the exit handler takes no arguments
    try:
        run(**request)  # type: ignore[arg-type]
    except SystemExit as stop:
        exit_code = stop.code if isinstance(stop.code, int) else None if stop.code else 0
        raise
    exit_code = 0


def run(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """Run a program as if Python had been started with it, in a session of its own."""
    os.setsid()
    # PyTorch renews its thread pool at the first use after a fork, without a lock: here, before a backward pass starts
    # a thread that would use it at the same time ("Invalid thread pool!").
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    kind, *words = arguments
    if kind == "-m":
        sys.argv, sys.path[0] = words, folder
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *words[1:]], ""
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(kind))  # noqa: PTH100, PTH120
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main()
