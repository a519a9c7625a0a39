"""Where the text of a command goes: to pipes that close, full devices, ASCII terminals, and never as escapes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from bn_insert.demo import network_path
from bn_insert_cli.console import plain, print_error, print_result, print_table, table
from support.commands import AS_STORED, Run, assert_refused, run_forked, start_forked

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x1b]8;;http://x\x1b\\\u202e[red]"


def test_a_pipe_that_closes_early_loses_no_work(digits: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = ("insert", network_path(), digits, "-o", "out.pth", *AS_STORED)
    process = start_forked("-m", "bn_insert", *command, folder=tmp_path, stdout=writer)
    os.close(writer)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    first, *others = errors.splitlines()
    assert first.startswith("Preprocessing: ")
    calibrated, few, dropout = others
    assert calibrated == "Calibrated on 20 images."
    assert few.startswith("With so few images, the statistics may be far from those of other images: use at least 128.")
    assert dropout.startswith(f"Dropout before BatchNorm: classifier.3 (classifier.2 in {network_path().name}). ")
    assert (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("words", [("--help",), ("insert", "--help"), ("--version",), ("inspect", network_path())])
def test_a_pipe_that_closes_early_does_not_change_the_exit_code(words: tuple[object, ...], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start_forked("-m", "bn_insert", *words, folder=tmp_path, stdout=writer)
    os.close(writer)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_output_is_noted_once_and_loses_no_work_but_is_no_success(digits: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        command = ("insert", network_path(), digits, "-o", "out.pth", *AS_STORED)
        process = start_forked("-m", "bn_insert", *command, folder=tmp_path, stdout=full.fileno())
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.count("Results cannot be printed: No space left on device") == 1
    assert (tmp_path / "out.pth").exists()


def test_an_output_that_only_takes_ascii_gets_escapes_for_the_rest(digits: Path, tmp_path: Path) -> None:
    command = ("insert", network_path(), digits, "-o", "netz-für-später.pth", *AS_STORED)
    process = start_forked("-m", "bn_insert", *command, folder=tmp_path, environment={"PYTHONIOENCODING": "ascii"})
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Wrote netz-f\\xfcr-sp\\xe4ter.pth" in output
    assert (tmp_path / "netz-für-später.pth").exists()


def test_closed_standard_streams_lose_no_work(digits: Path, tmp_path: Path) -> None:
    # As Python starts with `>&- 2>&-`: files that are opened get the numbers of the streams, which are None.
    script = """
import os, sys
os.close(1)
os.close(2)
sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None
from bn_insert_cli.main import main
main()
"""
    command = ("insert", network_path(), digits, "-o", "out.pth", *AS_STORED)
    assert run_forked("-c", script, *command, folder=tmp_path).returncode == 0
    assert (tmp_path / "out.pth").exists()


def test_no_escape_and_no_markup_reaches_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(f"a {ESCAPES} b")
    print_result(f"a {ESCAPES} b")
    result = table(f"title {ESCAPES}", "column")
    result.add_row(f"cell {ESCAPES}")
    result.caption = f"caption {ESCAPES}"
    print_table(result)
    captured = capsys.readouterr()
    for text in captured:
        assert all(character.isprintable() or character == "\n" for character in text)
    assert captured.out.count("[red]") == 4
    assert captured.err.count("[red]") == 1


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "words",
    [
        (ESCAPES,),
        ("--" + ESCAPES,),
        ("inspect", "x.pth", ESCAPES),
        ("inspect", "x.pth", "--" + ESCAPES),
        ("inspect", "x.pth", "--placement", ESCAPES),
        ("compare", "x.pth", "x.pth", "digits", "--mean", ESCAPES),
    ],
)
def test_usage_errors_quote_no_escape_and_no_markup(
    run: Run, words: tuple[str, ...], terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("x.pth").write_bytes(network_path().read_bytes())
    monkeypatch.setattr("typer.rich_utils.FORCE_TERMINAL", terminal)
    result = run(*words)
    assert result.exit_code == 2
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.stderr) if terminal else result.stderr  # colors
    assert (text != result.stderr) == terminal
    assert "[red]" in text
    assert all(character.isprintable() or character == "\n" for character in text), ascii(text)


def test_file_names_with_markup_and_escapes_are_printed_as_they_are(run: Run, digits: Path) -> None:
    Path("x[").mkdir()
    Path("[red].pth").write_bytes(network_path().read_bytes())
    result = run("compare", "[red].pth", "[red].pth", digits, *AS_STORED)
    assert result.exit_code == 0, result.output
    assert "[red].pth and [red].pth" in result.stdout
    assert_refused(run("inspect", "x["), "error: x[ is a folder")
    assert_refused(run("inspect", "\x1b[31mx"), "error: there is no file ?[31mx")


def test_keys_with_escapes_are_not_obeyed(run: Run) -> None:
    torch.save({ESCAPES: torch.ones(2)}, "x.pth")
    result = run("inspect", "x.pth")
    assert_refused(result)
    assert "\x1b" not in result.stderr


def test_a_message_of_a_megabyte_keeps_its_beginning_and_its_end() -> None:
    text = plain("begin" + "x" * 1_000_000 + "end", 1000).plain
    assert text.startswith("begin")
    assert text.endswith("end")
    assert len(text) < 1100


def test_markup_is_text() -> None:
    assert plain("[/x] [red]a\nb").plain == "[/x] [red]a b"
