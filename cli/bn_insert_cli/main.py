"""The entry point of `bn-insert`. Signals are handled before anything that takes time is imported."""

from __future__ import annotations

import atexit
import gc
import os
import sys

from .interruption import signals

INTERNAL_ERROR = 70  # EX_SOFTWARE in sysexits.h


def main() -> None:
    """Run the command line, and report unexpected errors in one message too."""
    signals.install()
    # Without this, Python collects garbage among all of torch's objects at exit, which takes most of a second.
    atexit.register(gc.freeze)
    # torch reads this on import. Threads that spin while waiting take CPU time from the workers that decode images and
    # from other processes: on 2 busy cores, `insert` took 2.3 times as long with spinning threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .app import app  # noqa: PLC0415 - takes a third of a second
    from .console import print_error, show_warnings  # noqa: PLC0415

    show_warnings()
    try:
        app()
    except Exception as error:
        if "--traceback" in sys.argv:
            raise
        print_error(
            f"unexpected {type(error).__name__}: {error}; please report this bug with the output of --traceback"
        )
        sys.exit(INTERNAL_ERROR)
    finally:
        signals.finish()
