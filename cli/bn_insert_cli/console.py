"""Output to the terminal: results on stdout; progress bars, notes and errors on stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 120  # columns if the output is not a terminal, so that tables are not truncated

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Choose whether tables, progress bars and notes are left out; results, warnings and errors never are."""
    global _quiet  # noqa: PLW0603 - one setting for one process, as the streams are
    _quiet = quiet


def stdout() -> Console:
    """Return the console for results."""
    return _console(stderr=False)


def stderr() -> Console:
    """Return the console for progress, notes and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    # Created at each use, because tests and shells replace sys.stdout and sys.stderr.
    # rich drops colors alone with NO_COLOR; without a color system it drops bold and dim too.
    color_system: Any = None if os.environ.get("NO_COLOR") else "auto"
    console = Console(stderr=stderr, highlight=False, color_system=color_system)
    if not console.is_terminal:
        return Console(stderr=stderr, highlight=False, color_system=color_system, width=_PIPE_WIDTH)
    return console


def print_error(message: str) -> None:
    """Print an error message on stderr; square brackets are not read as markup."""
    stderr().print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def print_warning(message: str) -> None:
    """Print a warning on stderr."""
    stderr().print(Text.assemble(("warning: ", "bold yellow"), message), soft_wrap=True)


def print_note(message: str) -> None:
    """Print a note on stderr, unless the command is quiet."""
    if _quiet:
        return
    stderr().print(Text(message, style="dim"), soft_wrap=True)


def print_result(message: str, *, good: bool = True) -> None:
    """Print the final line of a command's result on stdout, green if good and red otherwise."""
    stdout().print(Text(message, style="bold green" if good else "bold red"), soft_wrap=True)


def plain(text: str, longest: int = 1000) -> Text:
    """Return foreign text, such as a name from a file, as one line without control characters or markup."""
    return Text("".join(character if character.isprintable() else "?" for character in text[:longest]))


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """Return a table without rows.

    Args:
        title: Printed above the table.
        columns: The column headings.
        right: The headings of the right-aligned columns, for numbers.
    """
    result = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        collapse_padding=True,  # two spaces between columns: most tables then fit in 80
    )
    for column in columns:
        result.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return result


def print_table(result: Table) -> None:
    """Print a table on stdout, unless the command is quiet."""
    if not _quiet:
        stdout().print(result)


def print_json(data: Any) -> None:
    """Print a result on stdout as JSON; NaN and Inf, which JSON lacks, become null."""
    # Not through rich: it would wrap long lines.
    print(json.dumps(_finite(data), indent=2))  # noqa: T201


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(name): _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not isfinite(data) else data


@contextmanager
def image_progress(description: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr, with images per second and remaining time.

    Args:
        description: Printed before the bar.
        total: The number of images.
        shown: Whether to show the bar. It is hidden if stderr is not a terminal.

    Returns:
        A context manager that yields a function, to be called with the number of images processed so far.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    console = stderr()
    shown &= console.is_terminal and not _quiet  # each bar would leave an empty line in a log
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "", style="progress.data.speed")
