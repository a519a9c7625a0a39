"""The ways of a checkpoint and of a batch through the code are those that CONTRIBUTING.md lists."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from bn_insert import calibrate, find_sites, load_checkpoint
from bn_insert.demo import images_path, network_path
from bn_insert.images import Transform, image_batches
from support.commands import AS_STORED, run
from support.networks import images

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
ROW = re.compile(r"^\| `(\S+\.py)` \| `(\S+)` \|", re.MULTILINE)

Call = tuple[str, str]  # file, and function in it


def listed(title: str) -> list[Call]:
    """Return the rows of the table in a section."""
    section = CONTRIBUTING.read_text(encoding="utf-8").partition(f"### {title}\n")[2]
    return ROW.findall(re.split(r"^#", section, maxsplit=1, flags=re.MULTILINE)[0])


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Record the calls of functions of the library and the command line, in order."""
    calls: list[Call] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        package, *modules = frame.f_globals.get("__name__", "").split(".")
        # Methods that dataclasses and named tuples get are in no file.
        if event == "call" and package in ("bn_insert", "bn_insert_cli") and frame.f_code.co_filename.endswith(".py"):
            folder = "cli/bn_insert_cli" if package == "bn_insert_cli" else "bn_insert"
            calls.append((f"{'/'.join((folder, *modules))}.py", frame.f_code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def assert_in_order(calls: list[Call], way: list[Call]) -> None:
    assert [step for step in way if step not in calls] == []
    assert sorted(way, key=calls.index) == way


def test_a_checkpoint_takes_the_listed_way(tmp_path: Path) -> None:
    output = tmp_path / "out.pth"
    with recorded() as calls:
        result = run("insert", network_path(), images_path(), "-o", output, "--images", 4, *AS_STORED)
    assert result.exit_code == 0, result.output
    way = listed("The path of a checkpoint")
    assert len({file for file, _ in way}) == len(way) <= 15
    assert_in_order(calls, way)


def test_a_batch_takes_the_listed_way_and_passes_no_other_file() -> None:
    model = load_checkpoint(network_path())
    sites = find_sites(model, images(1, 32))
    with recorded() as calls:
        calibrate(model, sites, image_batches(images_path(), Transform(32, 32, (0.0,), (1.0,)), batch_size=4).head(4))
    way = listed("The path of a batch")
    assert len({file for file, _ in way}) == len(way) <= 8
    assert_in_order(calls, way)
    on_the_way = calls[calls.index(way[0]) : calls.index(way[-1]) + 1]
    rooms = ("bn_insert/images/", "bn_insert/statistics/")
    passed = {file for file, _ in on_the_way if file.startswith(rooms)}
    assert passed == {file for file, _ in way if file.startswith(rooms)}
