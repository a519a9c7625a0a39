"""`bn-insert demo`."""

from __future__ import annotations

from pathlib import Path

from support.commands import Run


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
