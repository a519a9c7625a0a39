"""The `bn-insert` command: combines the subcommands, and turns every error into one message and an exit code."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .compare import compare
from .compare_modes import compare_modes
from .console import print_error
from .demo import demo
from .finetune import finetune
from .fold import fold
from .insert import insert
from .inspect import inspect
from .interruption import exit_on_sigterm
from .report import report

BAD_INPUT = 2
INTERNAL_ERROR = 70  # EX_SOFTWARE in sysexits.h
INTERRUPTED = 130


class _Commands(TyperGroup):
    """Runs a command. A BNInsertError becomes one message on stderr and exit code 2, Ctrl-C exit code 130."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        exit_on_sigterm()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print_error("interrupted; nothing was written")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if not _is_expected(error) or ctx.params.get("traceback"):
                raise
            print_error(str(error))
            raise typer.Exit(BAD_INPUT) from None


def _is_expected(error: Exception) -> bool:
    errors = sys.modules.get("bn_insert.errors")  # not imported: --help raises an exception too, and should stay fast
    return isinstance(error, OSError) or (errors is not None and isinstance(error, errors.BNInsertError))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bn-insert {version('bn-insert')}")
        raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Print the traceback of an error, for a bug report.")
    ] = False,
) -> None:
    """Insert BatchNorm into a pretrained VGG without changing its outputs.

    Start with `bn-insert demo`, or with your own checkpoint and a folder of images:

    `bn-insert insert vgg16.pth photographs/ -o vgg16-bn.pth`
    """


for command in (insert, inspect, compare, compare_modes, finetune, fold, report, demo):
    app.command()(command)


def main() -> None:
    """Run the command line, and report unexpected errors in one message too."""
    # Without this, Python collects garbage among all of torch's objects at exit, which takes most of a second.
    atexit.register(gc.freeze)
    # torch reads this on import. Threads that spin while waiting take CPU time from the workers that decode images and
    # from other processes: on 2 busy cores, `insert` took 2.3 times as long with spinning threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except Exception as error:
        if "--traceback" in sys.argv:
            raise
        print_error(
            f"unexpected {type(error).__name__}: {error}; please report this bug with the output of --traceback"
        )
        sys.exit(INTERNAL_ERROR)
