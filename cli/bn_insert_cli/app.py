"""The `bn-insert` command: combines the subcommands, and turns every error into one message and an exit code."""

from __future__ import annotations

import traceback
from importlib.metadata import version
from typing import Annotated, Any

import typer

from bn_insert.errors import BNInsertError, out_of_memory

from .adapt import adapt
from .base_command import Command, CommandGroup, wants_traceback
from .compare import compare
from .compare_modes import compare_modes
from .console import print_error
from .demo import demo
from .evaluate import evaluate
from .finetune import finetune
from .fold import fold
from .insert import insert
from .inspect import inspect
from .interruption import signals
from .main import main  # noqa: F401 - where commands that were installed earlier look for it
from .predict import predict
from .report import report

BAD_INPUT = 2

_reserve = bytearray(1 << 22)  # for the message that there is no memory left


class _Commands(CommandGroup):
    """Runs a command. A BNInsertError becomes one message on stderr and exit code 2, Ctrl-C exit code 130."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        signals.begin()
        signals.keep(None)
        try:
            try:
                return super().invoke(ctx)
            except Exception as error:
                if not (message := _message(error)):
                    raise
                if wants_traceback(ctx):
                    traceback.print_exc()  # ends with the message
                else:
                    print_error(message)
                raise typer.Exit(BAD_INPUT) from None
            finally:
                signals.finish()  # so that no signal comes between the outcome and the exit
        except KeyboardInterrupt:  # where `main` has not installed the handlers
            print_error(f"interrupted; {signals.described()}")
            raise typer.Exit(signals.exit_code()) from None


def _message(error: Exception) -> str:
    """Return the message of an error that a user can cause; empty for any other."""
    if isinstance(error, BNInsertError):
        return str(error)
    if reason := out_of_memory(error):
        _reserve.clear()
        return (
            f"not enough memory ({reason.rstrip('.')}); free some, or raise the limit (ulimit -v); smaller batches and "
            "fewer workers need less"
        )
    return str(error) if isinstance(error, OSError) else ""


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
) -> None:
    """Insert BatchNorm into a pretrained VGG without changing its outputs.

    Start with `bn-insert demo`, or with your own checkpoint and a folder of images:

    `bn-insert insert vgg16.pth photographs/ -o vgg16-bn.pth`
    """


for command in (insert, adapt, inspect, compare, compare_modes, finetune, evaluate, predict, fold, report, demo):
    app.command(cls=Command)(command)
