"""docs/demo.svg, the picture of a terminal in the README."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from support.commands import run_forked

ROOT = Path(__file__).parents[2]


def words_of(picture: Path) -> str:
    return re.sub(r"\s+", " ", " ".join(ElementTree.parse(picture).getroot().itertext()))


def test_the_script_generates_the_committed_picture_from_a_real_run(tmp_path: Path) -> None:
    made = tmp_path / "demo.svg"
    done = run_forked(ROOT / "docs" / "picture.py", "--output", made, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    committed = ROOT / "docs" / "demo.svg"
    # Numbers may differ in the last digit between processors.
    assert re.sub(r"[\d.]+", "#", words_of(made)) == re.sub(r"[\d.]+", "#", words_of(committed))
    assert "8 BatchNorm layers inserted" in words_of(made)


def test_the_picture_loads_nothing_from_other_sites() -> None:
    text = (ROOT / "docs" / "demo.svg").read_text()
    assert "@font-face" not in text
    assert set(re.findall(r"https?://[^\s\"')]+", text)) == {"http://www.w3.org/2000/svg"}
