"""Confusion matrices as pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bn_insert.report import write_confusion_matrix


@pytest.mark.parametrize(("name", "start"), [("m.png", b"\x89PNG"), ("m.SVG", b"<?xml"), ("m.pdf", b"%PDF")])
def test_the_suffix_determines_the_format(name: str, start: bytes, tmp_path: Path) -> None:
    write_confusion_matrix(tmp_path / name, ["ant", "bee"], [[2, 0], [1, 3]])
    assert (tmp_path / name).read_bytes().startswith(start)


def test_names_are_drawn_as_they_are_whatever_characters_they_have(tmp_path: Path) -> None:
    # A formula that would not parse, a character that the font lacks, and a name that is too long.
    names = ["$\\frac{$", "\U00013000", "x" * 1000]
    write_confusion_matrix(tmp_path / "m.svg", names, [[2, 0, 0], [1, 1, 0], [0, 0, 0]])
    assert (tmp_path / "m.svg").stat().st_size > 1000


@pytest.mark.parametrize("count", [2, 300])
def test_a_picture_has_a_size_that_can_be_looked_at(count: int, tmp_path: Path) -> None:
    confusion = [[int(row == column) for column in range(count)] for row in range(count)]
    write_confusion_matrix(tmp_path / "m.svg", [str(number) for number in range(count)], confusion)
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', (tmp_path / "m.svg").read_text())
    assert size
    assert all(150 < float(points) < 2000 for points in size.groups())
