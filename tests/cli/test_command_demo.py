"""`bn-insert demo`."""

from __future__ import annotations

from pathlib import Path

from support.commands import Run


def test_demo_runs_start_to_finish(run: Run, tmp_path: Path) -> None:
    result = run("demo")
    assert result.exit_code == 0, result.output
    assert "8 BatchNorm layers inserted" in result.stdout
    assert not list(tmp_path.iterdir())
