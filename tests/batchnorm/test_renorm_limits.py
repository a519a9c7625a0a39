import math

import pytest
import torch
from torch import nn

from bn_insert.batchnorm.batch_renorm import BatchRenorm1d, BatchRenorm2d
from bn_insert.batchnorm.modes import set_batchnorm_mode
from bn_insert.batchnorm.renorm_limits import RenormScheduler, limits_at, set_renorm_limits
from bn_insert.errors import TrainingError


@pytest.mark.parametrize("values", [(0.5, 1.0), (2.0, -0.1), (math.nan, 1.0), (2.0, math.nan)])
def test_limits_out_of_range_are_refused(values: tuple[float, float]) -> None:
    norm = BatchRenorm1d(4)
    with pytest.raises(TrainingError, match="must be at least"):
        set_renorm_limits(norm, *values)
    assert (norm.r_max, norm.d_max) == (math.inf, math.inf)


def test_limits_are_set_where_a_network_renormalizes_and_nowhere_else() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)))
    set_batchnorm_mode(model[1], "renorm")
    x = torch.rand(2, 3, 4, 4)
    expected = model.eval()(x)
    set_renorm_limits(model, 1.0, 0.0)
    assert "_r_max" not in vars(model[0])
    model[0].eval()
    assert not torch.allclose(model[1].train()(model[0](x)), expected)


def test_limits_are_off_until_statistics_lag_behind_and_then_tighten() -> None:
    limits = [limits_at(lag, threshold=1.5) for lag in (0.5, 1.0, 1.4, 1.6, 2.0, 8.0)]
    assert limits[:3] == [(math.inf, math.inf)] * 3
    for part, least in ((0, 1), (1, 0)):
        found = [limit[part] for limit in limits[3:]]
        assert math.inf > found[0] > found[1] > found[2] > least


def scattered(shift: float, seed: int) -> torch.Tensor:
    """Return a batch of four images whose channels have the mean `shift` and the variance 1."""
    return torch.randn(4, 64, 2, 2, generator=torch.Generator().manual_seed(seed)) + shift


def test_the_scheduler_limits_a_network_while_its_statistics_lag_behind() -> None:
    norm = BatchRenorm2d(64, momentum=0.0)
    with RenormScheduler(norm) as scheduler:
        assert scheduler.lag == 1
        for step in range(50):
            norm.train()(scattered(0.0, step))
            scheduler.step()
            assert (norm.r_max, norm.d_max) == (math.inf, math.inf)
        assert scheduler.lag == pytest.approx(1, abs=0.2)
        norm(scattered(4.0, 50))
        scheduler.step()
        assert scheduler.lag > 2
        assert (norm.r_max, norm.d_max) == (1 + 2 / scheduler.lag**2, 2 / scheduler.lag**2)
        scheduler.step()  # without a forward pass
        norm.eval()(scattered(9.0, 0))
        scheduler.step()
        assert norm.d_max == 2 / scheduler.lag**2
        for step in range(100):
            norm.train()(scattered(0.0, step))
            scheduler.step()
        assert norm.d_max == math.inf
    assert not norm._forward_pre_hooks


def test_a_scheduler_continues_from_its_state() -> None:
    norm, other = BatchRenorm2d(64), BatchRenorm2d(64)
    scheduler, resumed = RenormScheduler(norm), RenormScheduler(other)
    for step in range(3):
        norm.train()(scattered(4.0, step))
        scheduler.step()
    other.load_state_dict(norm.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert (other.r_max, other.d_max) == (norm.r_max, norm.d_max)
    for module, each in ((norm, scheduler), (other, resumed)):
        module.train()(scattered(3.0, 3))
        each.step()
    assert resumed.lag == scheduler.lag
    assert other.d_max == norm.d_max < math.inf


def test_a_scheduler_without_anything_to_schedule_says_so() -> None:
    with pytest.raises(TrainingError, match=r"Sequential has no layer that renormalizes; call set_batchnorm_mode"):
        RenormScheduler(nn.Sequential(nn.BatchNorm2d(3)))


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(TrainingError, match="threshold is"):
        RenormScheduler(BatchRenorm2d(3), threshold=threshold)
