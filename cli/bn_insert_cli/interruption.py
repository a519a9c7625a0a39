"""Ctrl-C and SIGTERM: end the command at once, or set a flag that a long job polls at safe points."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_on_sigterm() -> None:
    """Make SIGTERM raise an exception, as Ctrl-C does, so that temporary files are removed."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(signal_number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + signal_number)


class StopRequest:
    """A flag that returns, when called, whether a signal has asked to stop; `signal_number` is that signal."""

    def __init__(self) -> None:
        """Create the flag, not set."""
        self.signal_number: int | None = None
        self._process = os.getpid()

    def __call__(self) -> bool:
        """Return whether to stop."""
        return self.signal_number is not None

    def receive(self, signal_number: int, _frame: FrameType | None) -> None:
        """Record the first signal; stop immediately on the second."""
        if os.getpid() != self._process:
            return  # a process that decodes images: it ends with its parent, which still needs it
        if self.signal_number is None:
            self.signal_number = signal_number
        elif signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            sys.exit(128 + signal_number)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn Ctrl-C and SIGTERM into a StopRequest; the previous handlers are restored afterwards."""
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
