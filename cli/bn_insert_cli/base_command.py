"""What all commands have in common: `--quiet` and `--traceback`, and help pages that end with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from bn_insert.errors import messages_name_options

from .console import plain, print_result, set_quiet

_TRACEBACK = "bn_insert.traceback"
_PANEL = "General"
_VALUES = {"int": "N", "float": "X", "str": "TEXT", "list[str]": "TEXT", "path": "FILE"}
_EXAMPLE = re.compile("Example: `([^`]+)`")
# Names that other tools have for our options, and that are not spelled like them.
_OTHER_NAMES = {"--learning-rate": "--lr", "--bs": "--batch-size"}
_USAGE_ERROR: Any = typer.BadParameter.__base__  # its module differs between versions of typer


def wants_traceback(ctx: typer.Context) -> bool:
    """Return whether `--traceback` was given, before or after the name of the command."""
    return bool(ctx.meta.get(_TRACEBACK))


class Command(TyperCommand):
    """A command with the general options."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        """Add the general options."""
        super().__init__(*args, **settings)
        self.params += _general_options()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept the values of choices with underscores too, as the Python API has them."""
        names = {name for param in self.params if _has_choices(param) for name in param.opts}
        parsed, previous = [], ""
        for word in args:
            name, equals, value = word.partition("=")
            if previous in names:
                word = word.replace("_", "-")  # noqa: PLW2901
            elif equals and name in names:
                word = f"{name}={value.replace('_', '-')}"  # noqa: PLW2901
            parsed.append(word)
            previous = word
        return super().parse_args(ctx, parsed)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, whose messages name its options, and print the line that it may return."""
        with messages_name_options():
            if line := super().invoke(ctx):
                print_result(line)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words of the usage line; arguments without the braces that newer versions of typer add."""
        pieces = [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]
        return [piece.removesuffix("...") if " " in piece else piece for piece in pieces]

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters as the help page shows them: the general options last, in a panel of their own."""
        params = _readable(super().get_params(ctx), ctx)
        params[-1].rich_help_panel = _PANEL  # --help
        return params


class CommandGroup(TyperGroup):
    """A group of commands with the general options."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        """Add the general options."""
        super().__init__(*args, **settings)
        self.params += _general_options()

    def make_context(self, *args: Any, **settings: Any) -> Any:
        """Parse the options before the command."""
        with _plain_usage_errors():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: Any) -> Any:
        """Parse the words of the command, and run it."""
        with _plain_usage_errors():
            return super().invoke(ctx)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters as the help page shows them."""
        params = _readable(super().get_params(ctx), ctx)
        for param in params:
            param.rich_help_panel = None  # one panel is enough here
        return params


@contextmanager
def _plain_usage_errors() -> Iterator[None]:
    """Make usage errors, which typer itself prints, readable.

    They quote what the user typed, whose control characters are replaced. One about something that is missing gets the
    example of the command's help page. One about an option that does not exist names the option that does the same.
    """
    try:
        yield
    except _USAGE_ERROR as error:
        error.message = plain(error.message).plain.removeprefix("Value error, ")  # pydantic's
        example = _EXAMPLE.search(error.ctx.command.help or "") if error.ctx else None
        if example and not error.message and isinstance(error, typer.BadParameter):  # a missing one has no message
            error.message = f"Example: {' '.join(example[1].split())}"
        ours = _OTHER_NAMES.get(getattr(error, "option_name", None) or "")
        if ours and error.ctx and any(ours in param.opts for param in error.ctx.command.params):
            error.possibilities = [ours]
        raise


def _general_options() -> list[Any]:
    """Return new objects for the general options, declared as those of any command are."""
    app = typer.Typer(add_completion=False)
    app.command()(_declaration)
    return list(get_command(app).params)


def _set_quiet(ctx: typer.Context, value: bool) -> None:
    if value or ctx.parent is None:  # otherwise it would undo what was given before the command
        set_quiet(value)


def _set_traceback(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.meta[_TRACEBACK] = True


def _declaration(
    quiet: Annotated[
        bool,
        typer.Option(
            "-q",
            "--quiet",
            callback=_set_quiet,
            expose_value=False,
            rich_help_panel=_PANEL,
            help="Print only results, warnings and errors: no tables, notes or progress bars.",
        ),
    ] = False,
    traceback: Annotated[
        bool,
        typer.Option(
            "--traceback",
            callback=_set_traceback,
            expose_value=False,
            rich_help_panel=_PANEL,
            help="Print the traceback of an error, for a bug report.",
        ),
    ] = False,
) -> None: ...


def _has_choices(param: Any) -> bool:
    # typer has moved this from one attribute to the other.
    return any(getattr(getattr(param, place, None), "choices", None) for place in ("type_descriptor", "type"))


def _readable(params: list[Any], ctx: Any) -> list[Any]:
    """Let a help page name values as N, X, TEXT or FILE, and flags and arguments by their names alone."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""  # a flag takes no value, so there is no type to name
        elif param.param_type_name == "argument":
            param.display_type_rich = lambda **_: None  # its name and its help say what it is
        elif param.metavar is None and hasattr(param, "display_type"):
            kind = (param.display_type(ctx) or "").strip("<>")
            param.metavar = next((name for start, name in _VALUES.items() if kind.startswith(start)), kind)
    return params
