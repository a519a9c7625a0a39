"""The README's Python blocks run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
NOT_RUN = "# not run by the tests"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", [block for block in BLOCKS if NOT_RUN not in block], ids=lambda block: block[:40])
def test_a_python_block_of_the_readme_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_the_readme_has_blocks_that_run() -> None:
    assert sum(NOT_RUN not in block for block in BLOCKS) >= 2
