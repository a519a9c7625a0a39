"""The notebook runs from top to bottom, and shows what its text says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from support.digits import copy_digits

NOTEBOOK = Path(__file__).parents[2] / "examples" / "batchnorm-in-a-pretrained-vgg.ipynb"


def cells() -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return content


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # matplotlib, given tensors
def test_the_notebook_adapts_and_fine_tunes_as_its_text_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A third of the images say the same.
    monkeypatch.setattr("bn_insert.demo.images_path", lambda: copy_digits(tmp_path / "images", 12))
    matplotlib.use("agg")
    found: dict[str, Any] = {"print": lambda *_: None}
    for cell in cells():
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), found)
    found["plt"].close("all")
    accuracy, faded = found["accuracy"], found["faded_test"]
    assert found["compare_outputs"](found["network"], found["inserted"], found["test"]).bit_identical
    assert accuracy(found["network"], faded) < 0.5
    assert accuracy(found["adapted"], faded) > 0.8
    assert found["with_batchnorm"][-1] > 0.85
    assert found["compare_outputs"](found["tuned"], found["plain"], faded).max_rel < 1e-4


def test_the_notebook_is_stored_with_its_outputs_and_pictures() -> None:
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    pictures = [output for cell in code for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
