from pathlib import Path

import pytest

from support.commands import Run, run
from support.digits import copy_digits


@pytest.fixture(name="run")
def run_in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A folder of 20 of the demo's images, two of each class."""
    return copy_digits(tmp_path / "digits", 2)
