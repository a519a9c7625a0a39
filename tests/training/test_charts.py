"""The charts of a run, which the other tests of runs leave out."""

from pathlib import Path

import pytest
from torch import nn

from bn_insert import TrainingSettings, finetune
from support.digits import copy_labelled_digits, open_digits


@pytest.mark.usefixtures("one_thread")
def test_a_run_draws_its_curves_and_charts(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    finetune(
        model, open_digits(copy_labelled_digits(tmp_path / "digits")), tmp_path / "run", TrainingSettings(epochs=1)
    )
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "report.html").read_text().count("<figure") == 3
