"""Code inside a model that torch.compile has compiled."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_inside = 0
_outermost = ExitStack()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run modules and functions compiled by torch.compile in eager mode.

    Recompiling them with the hooks and modes of a pass takes a long time, if it works at all. A model that is compiled
    as a whole is unwrapped beforehand. PyTorch's setting is one for all threads: the last to leave restores it.
    """
    global _inside  # noqa: PLW0603 - as the setting is
    with _lock:
        # Without this module, which takes a second to import, nothing is compiled.
        if _inside == 0 and "torch._dynamo" in sys.modules:
            _outermost.enter_context(torch.compiler.set_stance("force_eager"))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _outermost.close()
