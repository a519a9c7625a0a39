"""Confusion matrices as pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib import rc_context
from matplotlib.font_manager import FontProperties, findfont, get_font

from bn_insert.report import confusion, write_confusion_matrix


@pytest.mark.parametrize(("name", "start"), [("m.png", b"\x89PNG"), ("m.SVG", b"<?xml"), ("m.pdf", b"%PDF")])
def test_the_suffix_determines_the_format(name: str, start: bytes, tmp_path: Path) -> None:
    write_confusion_matrix(tmp_path / name, ["ant", "bee"], [[2, 0], [1, 3]])
    assert (tmp_path / name).read_bytes().startswith(start)


def test_names_are_drawn_as_they_are_whatever_characters_they_have(tmp_path: Path) -> None:
    # A formula that would not parse, a script that is written from right to left, and a name that is too long.
    names = ["$\\frac{$", "\u0642\u0637\u0629", "x" * 1000]
    assert write_confusion_matrix(tmp_path / "m.svg", names, [[2, 0, 0], [1, 1, 0], [0, 0, 0]]) == {}
    assert (tmp_path / "m.svg").stat().st_size > 1000


def test_names_with_characters_that_no_font_has_are_shown_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confusion, "_families", lambda characters: (["DejaVu Sans"], characters & {"\u732b"}))
    shown = write_confusion_matrix(tmp_path / "m.png", ["dog", "\u5bb6\u732b", "ox"], [[2, 0, 0], [1, 1, 0], [0, 0, 2]])
    assert shown == {1: "\u5bb6\u732b"}
    assert confusion._labels(["dog", "\u5bb6\u732b"])[0] == ["dog", "#1"]


def test_another_installed_font_is_used_for_characters_that_the_usual_one_lacks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    character = "\u2a0c"  # in fonts that come with matplotlib
    with rc_context({"font.family": ["cmr10"]}):
        families, missing = confusion._families({"a", character, "\U000e0fff"})
    assert (families[0], missing) == ("cmr10", {"\U000e0fff"})
    assert len(families) == 2
    assert not [record for record in caplog.records if record.name.startswith("matplotlib")]
    assert ord(character) in get_font(findfont(FontProperties(family=families[1:]))).get_charmap()


@pytest.mark.parametrize("count", [2, 300])
def test_a_picture_has_a_size_that_can_be_looked_at(count: int, tmp_path: Path) -> None:
    diagonal = [[int(row == column) for column in range(count)] for row in range(count)]
    write_confusion_matrix(tmp_path / "m.svg", [str(number) for number in range(count)], diagonal)
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', (tmp_path / "m.svg").read_text())
    assert size
    assert all(150 < float(points) < 2000 for points in size.groups())
