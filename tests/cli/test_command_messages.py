"""Messages name what the user passes: arguments in Python, options on the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import bn_insert
from bn_insert import CheckpointError, check_output
from support.commands import Run

LIBRARY = Path(bn_insert.__file__).parent
OPTION = re.compile(r"(?<![\w-])(?<!var\()--[a-z]")
# A script with options of its own, and the module that writes whole commands into reports.
WITH_COMMANDS = {"demo/training.py", "report/insertion_verdicts.py"}


def test_a_message_names_the_argument_in_python_and_the_option_on_the_command_line(run: Run, tmp_path: Path) -> None:
    there = tmp_path / "there.pth"
    there.touch()
    result = run("insert", "vgg16", tmp_path, "-o", there)
    assert result.exit_code == 2
    assert "choose another name, or replace it with --force\n" in result.stderr
    with pytest.raises(CheckpointError, match=r"replace it with overwrite=True$"):
        check_output(there)


def test_no_message_of_the_library_names_an_option_by_itself() -> None:
    paths = [path for path in LIBRARY.rglob("*.py") if path.relative_to(LIBRARY).as_posix() not in WITH_COMMANDS]
    assert len(paths) > 50
    found = [f"{path}: {text}" for path in paths for text in _texts(ast.parse(path.read_text(encoding="utf-8")))]
    assert not [text for text in found if OPTION.search(text)]


def _texts(node: ast.AST) -> Iterator[str]:
    """Yield the strings in a syntax tree, without docstrings and what `as_passed` is called with."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "as_passed":
        return
    for child in ast.iter_child_nodes(node):
        is_docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        if not is_docstring:
            yield from _texts(child)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
