"""Output to the terminal: results on stdout; progress bars, notes and errors on stderr.

All text goes through this module. Names of files, classes and layers come from outside, and could contain escape
sequences that control the terminal, or square brackets that rich reads as markup. Here every text becomes one line
without control characters, and is never read as markup.

An output that is closed or full loses only the text, never the command's work: the rest of the text is dropped.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .interruption import write_from_handler

_PIPE_WIDTH = 120  # columns if the output is not a terminal, so that tables are not truncated
_NARROWEST = 60  # columns of a terminal, below which tables would be cut
_LONGEST = 4000  # characters of a text
_LONGEST_CELL = 1000


class _Output:
    """A text stream that may be lost: text written to it afterwards is dropped."""

    def __init__(self, stream: IO[str], lost: Callable[[OSError], None]) -> None:
        self._stream, self._lost = stream, lost

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        # Python flushes the stream once more at exit: its descriptor leads to the null device from here on.
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        self._lost(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_results_lost = False


def results_were_lost() -> bool:
    """Return whether results could not be printed, other than because their reader has read enough."""
    if sys.stdout is not None:
        with suppress(ValueError):  # closed
            sys.stdout.flush()
    return _results_lost


def _note_lost_results(error: OSError) -> None:
    global _results_lost  # noqa: PLW0603 - of the process, as the stream is
    if not isinstance(error, BrokenPipeError):  # whoever closes a pipe has read enough
        _results_lost = True
        print_note(f"Results cannot be printed: {error.strerror}. The command continues, and ends with exit code 1.")


def survive_lost_output() -> None:
    """Let nothing that is printed fail for the rest of the process, the pages of --help included."""
    for name, lost in (("stdout", _note_lost_results), ("stderr", lambda _: None)):
        if (stream := getattr(sys, name)) is not None:  # closed before the start
            setattr(sys, name, _Output(stream, lost))


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
    name = "stderr" if stderr else "stdout"
    stream = getattr(sys, name)
    if stream is None:  # closed before the start
        stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - for the rest of the process
        setattr(sys, name, stream)
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")  # the encoding may be ASCII
    # With NO_COLOR, rich drops only colors; without a color system it drops bold and dim too.
    color_system: Any = None if os.environ.get("NO_COLOR") else "auto"
    console = Console(file=stream, highlight=False, markup=False, color_system=color_system)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    elif not stderr:  # a progress bar has to know the true width
        console.width = max(console.width, _NARROWEST)  # a terminal wraps lines, and cuts no digits off
    return console


def plain(text: str, longest: int = _LONGEST_CELL, style: str = "") -> Text:
    """Return text as one line without control characters or markup; of a long one, the beginning and the end.

    Args:
        text: Any text, also from an untrusted file.
        longest: Maximum number of characters.
        style: Style of the text.
    """
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} [{len(text) - 2 * half:,} characters left out] {text[-half:]}"
    line = " ".join(text.splitlines())
    return Text("".join(character if character.isprintable() else "?" for character in line), style=style)


def print_error(message: str) -> None:
    """Print an error message on stderr."""
    stderr().print(Text.assemble(("error: ", "bold red"), plain(message, _LONGEST)), soft_wrap=True)


def print_warning(message: str) -> None:
    """Print a warning on stderr."""
    stderr().print(Text.assemble(("warning: ", "bold yellow"), plain(message, _LONGEST)), soft_wrap=True)


def print_note(message: str) -> None:
    """Print a note on stderr, unless the command is quiet."""
    if _quiet:
        return
    stderr().print(plain(message, _LONGEST, "dim"), soft_wrap=True)


def print_note_from_handler(message: str) -> None:
    """Print a note from a signal handler, which may have interrupted another one."""
    if not _quiet:
        write_from_handler(message)


def print_line(message: str) -> None:
    """Print a line on stdout."""
    stdout().print(plain(message, _LONGEST), soft_wrap=True)


def print_result(message: str, *, good: bool = True) -> None:
    """Print the final line of a command's result on stdout, green if good and red otherwise."""
    stdout().print(plain(message, _LONGEST, "bold green" if good else "bold red"), soft_wrap=True)


def show_warnings() -> None:
    """Print Python's warnings as those of commands, for the rest of the process."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print_warning(str(message))

    warnings.showwarning = show


class _PlainTable(Table):
    """A table whose cells are never read as markup."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row of strings, or of Text from `plain`."""
        super().add_row(*(cell if isinstance(cell, Text) else plain(str(cell)) for cell in cells), **options)


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """Return a table without rows.

    Args:
        title: Printed above the table.
        columns: The column headings.
        right: The headings of the right-aligned columns, for numbers.
    """
    result = _PlainTable(
        title=plain(title),
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        collapse_padding=True,  # two spaces between columns: most tables then fit in 80
    )
    for column in columns:
        result.add_column(plain(column), justify="right" if column in right else "left", overflow="fold")
    return result


def print_table(result: Table) -> None:
    """Print a table on stdout, unless the command is quiet."""
    if _quiet:
        return
    if isinstance(result.caption, str):
        result.caption = plain(result.caption)
    stdout().print(result)


def print_json(data: Any) -> None:
    """Print a result on stdout as JSON; NaN and Inf, which JSON lacks, become null."""
    output = stdout().file  # rich itself would wrap long lines
    output.write(json.dumps(_finite(data), indent=2) + "\n")
    output.flush()


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
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
    )
    console = stderr()
    shown &= console.is_terminal and not _quiet  # each bar would leave an empty line in a log
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def run_progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """Show a progress bar of an epoch or a trial, with images per second, on stderr if that is a terminal.

    Args:
        total: The number of images.

    Returns:
        A context manager that yields a function, to be called with the text before the bar and the number of images
        processed so far.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Speed())
    console = stderr()
    shown = console.is_terminal and not _quiet
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=total)
        yield lambda text, done: progress.update(task, description=text, completed=done)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "", style="progress.data.speed")
