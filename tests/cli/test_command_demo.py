"""`bn-insert demo`."""

from __future__ import annotations

from pathlib import Path

from support.commands import Run, assert_refused, text_of


def test_demo_runs_start_to_finish(run: Run, tmp_path: Path) -> None:
    result = run("demo")
    assert result.exit_code == 0, result.output
    assert "classifier.3" in result.stdout
    assert "Wrote" not in result.output
    assert "The result was not saved. To save it, pass --output digits-bn.pth." in result.stdout
    assert not list(tmp_path.iterdir())


def test_demo_keeps_its_result_with_output(run: Run) -> None:
    result = run("demo", "--output", "digits-bn.pth")
    assert result.exit_code == 0, result.output
    assert "Wrote digits-bn.pth: 8 BatchNorm layers inserted." in result.stdout
    assert Path("digits-bn.pth").exists()
    assert_refused(run("demo", "-o", "digits-bn.pth"), "digits-bn.pth already exists", "replace it with --force")
    assert run("demo", "-o", "digits-bn.pth", "--force").exit_code == 0


def test_demo_says_whose_files_the_command_that_it_shows_is_about(run: Run) -> None:
    shown = text_of(run("demo", "-o", "./out.pth").stderr)
    assert "bn-insert insert network.pth images/ -o out.pth, with the network and the images that ship with" in shown
