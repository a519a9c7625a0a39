import math

import pytest
import torch
from torch import nn

from bn_insert.batchnorm.batch_renorm import BatchRenorm1d
from bn_insert.batchnorm.modes import set_batchnorm_mode
from bn_insert.batchnorm.renorm_lag import Lag
from bn_insert.batchnorm.renorm_limits import (
    ConstantLimits,
    Limits,
    LimitsByLag,
    RenormLimits,
    set_renorm_limits,
)
from bn_insert.errors import TrainingError


def test_constant_limits_are_a_rule_and_the_same_for_every_step() -> None:
    limits = ConstantLimits(3.0, 0.5)
    assert isinstance(limits, RenormLimits)
    assert {limits.at(step, rate, Lag()) for step in (0, 1000) for rate in (0.0, 1.0)} == {Limits(3.0, 0.5)}
    assert ConstantLimits().at(0, 0.1, Lag()) == (math.inf, math.inf)


@pytest.mark.parametrize("values", [(0.5, 1.0), (2.0, -0.1), (math.nan, 1.0), (2.0, math.nan)])
def test_limits_out_of_range_are_refused(values: tuple[float, float]) -> None:
    with pytest.raises(TrainingError, match="must be at least"):
        ConstantLimits(*values)
    norm = BatchRenorm1d(4)
    with pytest.raises(TrainingError, match="must be at least"):
        set_renorm_limits(norm, Limits(*values))
    assert (norm.r_max, norm.d_max) == (math.inf, math.inf)


def test_limits_are_set_where_a_network_renormalizes_and_nowhere_else() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)))
    set_batchnorm_mode(model[1], "renorm")
    x = torch.rand(2, 3, 4, 4)
    expected = model.eval()(x)
    set_renorm_limits(model, Limits(1.0, 0.0))
    assert "_r_max" not in vars(model[0])
    model[0].eval()
    assert not torch.allclose(model[1].train()(model[0](x)), expected)


def test_limits_by_lag_are_off_until_statistics_lag_behind_and_then_tighten() -> None:
    rule = LimitsByLag()
    assert isinstance(rule, RenormLimits)
    limits = [rule.at(100, 0.1, Lag(ratio**2 * 0.3, 0.3)) for ratio in (0.5, 1.0, 1.4, 1.6, 2.0, 8.0)]
    assert limits[:3] == [Limits(math.inf, math.inf)] * 3
    assert math.inf > limits[3].r_max > limits[4].r_max > limits[5].r_max > 1
    assert math.inf > limits[3].d_max > limits[4].d_max > limits[5].d_max > 0
