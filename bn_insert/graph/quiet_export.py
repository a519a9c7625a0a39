"""Keep torch.export from printing, and from recording what is not used."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO, cast

import torch.fx.config as fx_config

_LOGGERS = (
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.export",
    "torch._export.non_strict_utils",
)


class _SilentInThisThread:
    """A stream that drops what the thread that created it writes; other threads may be showing their progress."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet_export() -> Iterator[None]:
    """Keep torch.export from also printing the graph and the traceback of an exception that it raises, and warnings."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with redirect_stderr(cast(TextIO, _SilentInThisThread(sys.stderr))):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def no_stack_traces() -> Iterator[None]:
    """Keep torch.export from recording where in the source each node comes from: a seventh of the time, and unused."""
    before = getattr(fx_config, "do_not_emit_stack_traces", False)  # torch 2.11 records them in any case
    fx_config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = before
