"""Run Python in several ranks, as torchrun does, forked from one process: importing torch once saves most of the time.

    python forked_ranks.py COUNT SCRIPT|-m MODULE ARGUMENTS

The exit code is the number of ranks that failed.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys

import torch
import torch._dynamo
import torch.distributed
import torch.export

import bn_insert  # noqa: F401
import bn_insert_cli.app  # noqa: F401


def main() -> None:
    """Fork the ranks and wait for all of them."""
    torch.set_num_threads(1)  # a process with threads cannot be forked safely
    count, *arguments = sys.argv[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": count}
    os.environ["TORCHELASTIC_RUN_ID"] = "forked"  # by this variable torch knows that torchrun started a process
    children = []
    for rank in map(str, range(int(count))):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
            return run(arguments)
        children.append(child)
    sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))


def run(arguments: list[str]) -> None:
    """Run a script or a module as if Python had been started with it."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
