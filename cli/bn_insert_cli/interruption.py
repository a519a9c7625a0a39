"""Ctrl-C and SIGTERM: a command ends at once, unless it is saving, with a true message about what it has written.

The handlers never raise an exception. It would come between any two instructions of any library: torch ends the process
by std::terminate when one reaches it in a destructor, imports turn it into other errors, and Python prints and ignores
it in __del__. Instead the handler itself prints the message, cleans up and ends the process. While a result is saved, a
signal is only recorded, and honored when the result is complete. `finetune` stops after the current step instead
(`stop_on_signals`), and its message about what is saved is in finetune.py.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 1.0  # seconds after which another signal ends a process that is still saving
_CLEAR_LINE, _SHOW_CURSOR = b"\r\x1b[2K", b"\x1b[?25h"


class Signals:
    """The signals of this process, from the start of a command to its end.

    Attributes:
        number: The first signal received; None before.
    """

    def __init__(self) -> None:
        """Handle no signals yet."""
        self.number: int | None = None
        self._installed = False
        self._time = 0.0
        self._process = os.getpid()
        self._outputs: dict[str, bool] = {}
        self._saving = ""
        self._kept: Callable[[], str] | None = None
        self._cleaning: list[Callable[[], object]] = []

    def install(self) -> None:
        """Handle the signals of this process until it ends."""
        self._installed, self._process = True, os.getpid()
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def begin(self, *outputs: str) -> None:
        """Begin a command that will write these outputs, given as a message names them."""
        self._outputs = dict.fromkeys(outputs, False)

    @contextmanager
    def saving(self, output: str) -> Iterator[None]:
        """Put off signals until an output is written, or has failed to be."""
        self._saving = output
        try:
            yield
            self._outputs[output] = True
        finally:
            self._saving = ""
            self.check()

    @contextmanager
    def cleaning(self, clean_up: Callable[[], object]) -> Iterator[None]:
        """Call `clean_up` if a signal ends the process within this block."""
        self._cleaning.append(clean_up)
        try:
            yield
        finally:
            self._cleaning.remove(clean_up)

    def keep(self, described: Callable[[], str] | None) -> None:
        """Set a function that describes what an interruption leaves, in place of the list of outputs."""
        self._kept = described

    def check(self) -> None:
        """End the process if a signal was put off."""
        if self.number is not None:
            self.leave()

    def finish(self) -> None:
        """Ignore signals: all that is left to do is to exit."""
        if self._installed:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def described(self) -> str:
        """Return what is written and what is not, as a phrase."""
        if self._kept:
            return self._kept()
        written = [output for output, done in self._outputs.items() if done]
        missing = [output for output, done in self._outputs.items() if not done]
        if not written:
            return "nothing was written"
        are = "is" if len(written) == 1 else "are"
        return f"{' and '.join(written)} {are} written and complete" + (f", {missing[0]} is not" if missing else "")

    def exit_code(self) -> int:
        """Return the exit code of an interrupted command."""
        return 128 + (self.number or signal.SIGINT)

    def leave(self) -> NoReturn:
        """End the process without its exit handlers."""
        text = f"error: interrupted; {self.described()}"
        if self._saving:
            text = f"error: stopped immediately; {self._saving} is either complete or unchanged"
        with suppress(Exception):
            for clean_up in reversed(self._cleaning):
                clean_up()
            if processes := sys.modules.get("multiprocessing"):  # those that decode images
                for process in processes.active_children():
                    process.kill()
        if os.isatty(2):
            with suppress(OSError):
                os.write(2, _SHOW_CURSOR)
        write_from_handler(text)
        os._exit(self.exit_code())

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            os._exit(128 + number)  # a process that decodes images
        if self.number is None:
            self.number, self._time = number, time.monotonic()
        if not self._saving or time.monotonic() - self._time > _PATIENCE:
            self.leave()


signals = Signals()


def write_from_handler(text: str) -> None:
    """Print a line on stderr, in place of a progress bar, without anything that a signal may have interrupted."""
    line = "".join(character if character.isprintable() else "?" for character in text) + "\n"
    with suppress(OSError):
        os.write(2, (_CLEAR_LINE if os.isatty(2) else b"") + line.encode(errors="replace"))


class StopRequest:
    """A flag that returns, when called, whether a signal has asked to stop; `signal_number` is that signal."""

    def __init__(self, on_request: Callable[[int], None] | None = None) -> None:
        """Create the flag, not set.

        Args:
            on_request: Called by the signal handler, with the number of the first signal.
        """
        self.signal_number: int | None = None
        self._on_request = on_request
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
            if self._on_request:
                self._on_request(signal_number)
        else:
            signals.number = signal_number
            signals.leave()


@contextmanager
def stop_on_signals(on_request: Callable[[int], None] | None = None) -> Iterator[StopRequest]:
    """Turn Ctrl-C and SIGTERM into a StopRequest; the previous handlers are restored afterwards.

    Args:
        on_request: As for `StopRequest`.
    """
    request = StopRequest(on_request)
    before = {number: signal.signal(number, request.receive) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
