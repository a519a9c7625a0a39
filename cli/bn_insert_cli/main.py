"""The entry point of `bn-insert`. Signals are handled before anything that takes time is imported."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress

from .interruption import signals

INTERNAL_ERROR = 70  # EX_SOFTWARE in sysexits.h


def main() -> None:
    """Run the command line, and report unexpected errors in a single message too."""
    signals.install()
    status = INTERNAL_ERROR  # of an exception that Python itself reports, with --traceback

    def end_process() -> None:
        # Python would now collect garbage among all of torch's objects. This takes up to a second, and libraries that
        # are taken apart in an arbitrary order report leaks and failing finalizers.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or None
                stream.flush()
        os._exit(status)

    atexit.register(end_process)  # registered before all other exit handlers, so that it runs after them
    # torch reads this on import. Threads that spin while waiting take CPU time from the workers that decode images and
    # from other processes: on 2 busy cores, `insert` took 2.3 times as long with spinning threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .app import app  # noqa: PLC0415 - takes a third of a second
    from .console import print_error, results_were_lost, show_warnings, survive_lost_output  # noqa: PLC0415

    survive_lost_output()
    show_warnings()
    if os.environ.get("NO_COLOR"):
        from typer import rich_utils  # noqa: PLC0415

        rich_utils.COLOR_SYSTEM = None  # help without bold too
    try:
        app()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        status = status or int(results_were_lost())
        raise
    except Exception as error:
        if "--traceback" in sys.argv:
            raise
        print_error(
            f"unexpected {type(error).__name__}: {error}; please report this bug with the output of --traceback"
        )
        sys.exit(status)
    finally:
        signals.finish()
