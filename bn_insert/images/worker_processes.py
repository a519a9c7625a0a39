"""Worker processes that decode images: how they start, and which signals reach them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue

import torch

_SIGNALS = {signal.SIGINT, signal.SIGTERM}


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Block SIGINT and SIGTERM while worker processes start; they are delivered to this process afterwards."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(_number: int) -> None:
    """Prepare a worker process: one thread, and no signals that are for the main process."""
    torch.set_num_threads(1)
    # Otherwise the main process would wait forever for a batch that cannot be sent for lack of memory.
    Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))  # type: ignore[attr-defined]
    # Signals to a whole process group (Ctrl-C, or from a scheduler) are for the main process, which ends the workers
    # when its results are complete: a worker that a signal kills would end it with a traceback from PyTorch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        os.setpgrp()
        while signal.sigpending() & _SIGNALS:  # sent to the group while this process was in it
            signal.sigwait(_SIGNALS)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
