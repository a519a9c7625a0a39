"""The wheel, and an editable install."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]


def built(kind: str, folder: Path) -> Path:
    """Return a folder with the unpacked wheel: what pip would put into site-packages."""
    program = f"import hatchling.build; print(hatchling.build.build_{kind}({str(folder)!r}))"
    name = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with ZipFile(folder / name.strip()) as wheel:
        wheel.extractall(folder / kind)
    return folder / kind


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_claims_no_import_name_but_those_of_bn_insert(wheel: Path) -> None:
    names = {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"}
    assert names == {"bn_insert", "bn_insert_cli"}


def test_the_wheel_has_the_data_that_the_package_reads(wheel: Path) -> None:
    for path in ("py.typed", "demo/network.pth", "report/templates/page.html", "report/templates/page.css"):
        assert (wheel / "bn_insert" / path).is_file()


def test_the_description_for_a_package_index_has_no_link_that_works_in_the_repository_alone(wheel: Path) -> None:
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    description = metadata.read_text(encoding="utf-8")
    headings = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert "Description-Content-Type: text/markdown" in description
    assert [line for line in description.splitlines() if line.startswith("#")] == headings
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]*)\)", description))


def test_it_runs_as_a_module_in_a_folder_with_a_cli_of_the_users(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "cli").mkdir()
    for path in ("cli.py", "cli/__init__.py"):
        (tmp_path / path).write_text("raise ImportError('this is the user\\'s own cli')\n")
    result = subprocess.run(
        [sys.executable, "-m", "bn_insert", "--help"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(wheel), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "finetune" in result.stdout


def test_an_editable_install_finds_both_packages(tmp_path: Path) -> None:
    pytest.importorskip("editables")
    program = (
        f"import site; site.addsitedir({str(built('editable', tmp_path))!r})\n"
        "from importlib.util import find_spec\n"
        "print(*(find_spec(name).origin for name in ('bn_insert', 'bn_insert_cli')), sep='\\n')"
    )
    # -I and -S: no other folder is searched, neither the current one nor that of installed packages.
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert found.stdout.splitlines() == [
        str(ROOT / "bn_insert" / "__init__.py"),
        str(ROOT / "cli" / "bn_insert_cli" / "__init__.py"),
    ]
