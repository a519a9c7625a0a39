"""Where results, progress and errors are drawn: tables on stdout, bars and messages on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 120  # columns when the output is no terminal, so that no table is cut


def stdout() -> Console:
    """Return the console for results."""
    return _console(stderr=False)


def stderr() -> Console:
    """Return the console for progress, notes and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    # Made at each use: tests and shells replace the streams.
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_PIPE_WIDTH)


def print_error(message: str) -> None:
    """Print one error message on stderr; brackets in it are no markup."""
    stderr().print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def print_note(message: str) -> None:
    """Print a remark on stderr."""
    stderr().print(Text(message, style="dim"), soft_wrap=True)


def print_result(message: str, *, good: bool = True) -> None:
    """Print the last line of a result on stdout."""
    stdout().print(Text(message, style="bold green" if good else "bold red"), soft_wrap=True)


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """Return an empty table; the columns named in `right` are flush right, as numbers are."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    for column in columns:
        result.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return result


def print_table(result: Table) -> None:
    """Print a table on stdout."""
    stdout().print(result)


@contextmanager
def image_progress(description: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a bar with images per second and time left on stderr; call what it gives with the images done so far."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    console = stderr()
    shown &= console.is_terminal  # in a log each bar would leave a blank line
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "", style="progress.data.speed")
