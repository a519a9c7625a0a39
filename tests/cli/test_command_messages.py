"""Messages name what the user passes: arguments in Python, options on the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import bn_insert
from bn_insert import CheckpointError, check_output
from bn_insert.demo import network_path
from bn_insert.support.text import with_article
from support.commands import AS_STORED, Run, assert_refused

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


@pytest.mark.parametrize(
    ("options", "wording"),
    [
        ("--resize 100000", "--resize is 100000; use 1 to 16384 pixels, or 0 to keep the size"),
        ("--crop 100000", "--crop is 100000; use 1 to 16384 pixels, or 0 not to crop"),
        ("--std 0", "--std is 0; use one value above 0"),
        ("--std 0.5,0", "--std is 0.5,0; use one value above 0"),
        ("--mean nan", "--mean is nan; use one finite value"),
        ("--mean 0,0 --std 1,1,1", "--mean has 2 values and --std 3; pass both"),
        ("--tolerance -1", "--tolerance must be a finite number above 0"),
    ],
)
def test_a_value_out_of_range_is_named_as_it_was_typed(run: Run, digits: Path, options: str, wording: str) -> None:
    assert_refused(run("insert", network_path(), digits, "-o", "out.pth", *options.split()), wording)


def test_a_batch_size_out_of_range_is_named_as_it_was_typed(run: Run, digits: Path) -> None:
    assert run("insert", network_path(), digits, "-o", "bn.pth", *AS_STORED).exit_code == 0
    result = run("compare-modes", "bn.pth", digits, "--batch-sizes", "8,0", *AS_STORED)
    assert_refused(result, "--batch-sizes is 8,0; pass one or more sizes of 1 or more")


def test_no_message_of_the_library_names_an_option_by_itself() -> None:
    paths = [path for path in LIBRARY.rglob("*.py") if path.relative_to(LIBRARY).as_posix() not in WITH_COMMANDS]
    assert len(paths) > 50
    found = [f"{path}: {text}" for path in paths for text in _texts(ast.parse(path.read_text(encoding="utf-8")))]
    assert not [text for text in found if OPTION.search(text)]


def test_the_name_of_a_class_has_the_article_that_it_is_spoken_with() -> None:
    names = {
        "a": ("ResNet", "UNet", "Unet", "VGG", "TokenMixer", "UserDict", "dict"),
        "an": ("LSTM", "RNN", "MLP", "Upsample", "Int", "AlexNet", "ndarray", "int"),
    }
    for article, each in ((article, each) for article, some in names.items() for each in some):
        assert with_article(type(each, (), {})()) == f"{article} {each}"
    assert with_article(None) == "None"


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
