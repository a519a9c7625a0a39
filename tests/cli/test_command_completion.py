"""Shell completion, as a shell asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bn_insert_cli.app import app


def completions(line: str) -> list[str]:
    """Return what bash is offered for the last word of a line."""
    words = line.split(" ")
    environment = {
        "_BN_INSERT_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    return CliRunner().invoke(app, prog_name="bn-insert", env=environment).output.split()


def test_commands_are_completed() -> None:
    assert completions("bn-insert ins") == ["insert", "inspect"]


def test_options_are_completed() -> None:
    assert completions("bn-insert insert --eq") == ["--equalize"]


def test_the_choices_of_an_option_are_completed() -> None:
    assert completions("bn-insert finetune a b --batchnorm ") == ["train", "renorm", "freeze-statistics", "freeze"]


def test_completion_is_installed_for_the_shell_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))
    result = CliRunner().invoke(app, ["--install-completion"], prog_name="bn-insert")
    assert result.exit_code == 0, result.output
    assert "_BN_INSERT_COMPLETE=complete_bash" in (tmp_path / ".bash_completions" / "bn-insert.sh").read_text()
    assert "bn-insert.sh" in (tmp_path / ".bashrc").read_text()
