"""Which dropouts stand in front of a BatchNorm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bn_insert import compare_outputs, dropouts_before_batchnorm, insert_batchnorm, set_batchnorm_mode

CASES: dict[str, tuple[list[nn.Module], list[str]]] = {
    "through a dense layer": ([nn.Dropout(), nn.Linear(4, 4), nn.BatchNorm1d(4)], ["0"]),
    "through several": (
        [nn.Dropout(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)],
        ["0"],
    ),
    "directly": ([nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4)], ["1"]),
    "after the last": ([nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2)], []),
    "already off": ([nn.Dropout(0.0), nn.Linear(4, 4), nn.BatchNorm1d(4)], []),
    "corrected by another normalization": (
        [nn.Dropout(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.BatchNorm1d(4)],
        [],
    ),
    "in place": ([nn.Dropout(inplace=True), nn.Linear(4, 4), nn.BatchNorm1d(4)], ["0"]),
    "of an alpha dropout": ([nn.AlphaDropout(), nn.Linear(4, 4), nn.BatchNorm1d(4)], ["0"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_dropout_is_named_if_its_values_reach_a_batchnorm(case: str) -> None:
    modules, expected = CASES[case]
    assert dropouts_before_batchnorm(nn.Sequential(*modules), torch.zeros(1, 4)) == expected


def test_a_dropout_over_channels_is_named_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(0.2), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    assert dropouts_before_batchnorm(model, torch.zeros(1, 3, 8, 8)) == ["1"]


@pytest.mark.parametrize(("mode", "expected"), [("freeze", []), ("freeze-statistics", []), ("renorm", ["0"])])
def test_a_batchnorm_with_fixed_statistics_is_none_to_protect(mode: str, expected: list[str]) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    set_batchnorm_mode(model, mode)  # type: ignore[arg-type]
    assert dropouts_before_batchnorm(model, torch.zeros(1, 4)) == expected


class AlwaysOn(nn.Dropout):
    """As for Monte Carlo dropout."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in nn.Dropout
        return F.dropout(input, self.p, training=True)


def test_a_dropout_that_is_on_in_eval_mode_too_stays_on() -> None:
    model = nn.Sequential(AlwaysOn(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.rand(32, 4)
    inserted = insert_batchnorm(model, [x], dropout_before_batchnorm=False)
    comparison = compare_outputs(model, inserted, [x])
    assert comparison.bit_identical and comparison.random
    assert dropouts_before_batchnorm(inserted, x) == []
