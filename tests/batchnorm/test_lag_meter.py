import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bn_insert.batchnorm.batch_renorm import BatchRenorm2d
from bn_insert.batchnorm.lag_meter import Lag, LagMeter
from bn_insert.batchnorm.modes import BatchNormMode, set_batchnorm_mode


def test_the_lag_is_1_until_something_is_known_and_averages_over_steps() -> None:
    assert Lag().ratio == 1
    assert Lag().after(0.0, 0.0).ratio == 1  # batches that are all the same
    lag = Lag().after(0.4, 0.1)
    assert lag.ratio == 2
    assert lag.after(1.4, 0.1) == pytest.approx((0.5, 0.1))
    for _ in range(200):
        lag = lag.after(0.1, 0.1)
    assert lag.ratio == pytest.approx(1)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 5), (6, 3, 2, 4, 5)])
def test_distances_are_those_of_the_formula_in_float64(shape: tuple[int, ...]) -> None:
    x = 3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](3).double()
    norm.running_mean, norm.running_var = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 4.0, 9.0]).double()
    set_batchnorm_mode(norm, "renorm", r_max=1.0, d_max=0.0)
    of_images = x.flatten(2).mean(2) if x.ndim > 2 else x
    var = norm.running_var + 1e-5
    distance = ((of_images.mean(0) - torch.tensor([0.0, 1.0, 2.0])) ** 2 / var).mean()
    expected = (of_images.var(0) / 6 / var).mean()
    meter = LagMeter(norm)
    norm.train()(x)
    torch.testing.assert_close(meter.read(), torch.stack([distance, expected, torch.tensor(1.0)]), rtol=1e-12, atol=0)
    assert meter.read().tolist() == [0, 0, 0]


def test_batches_that_scatter_around_accurate_statistics_have_a_lag_of_1() -> None:
    norm = BatchRenorm2d(8, momentum=0.0)
    images = 2 * torch.randn(4000, 8, 1, 1, generator=torch.Generator().manual_seed(0)) + torch.zeros(1, 1, 3, 3)
    norm.running_mean.copy_(images.mean((0, 2, 3)))
    lag = Lag()
    meter = LagMeter(norm)
    for batch in images.split(4):
        norm.train()(batch)
        lag = lag.after(*meter.read()[:2].tolist())
    assert lag.ratio == pytest.approx(1, abs=0.2)


def test_neither_eval_mode_nor_a_single_image_nor_a_recomputed_pass_is_observed_and_hooks_are_removed() -> None:
    norm = BatchRenorm2d(3)
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    meter = LagMeter(norm)
    norm.eval()(x)
    norm.train()(x[:1])
    assert meter.read().tolist() == [0, 0, 0]
    output = checkpoint(norm, x, use_reentrant=False)
    assert meter.read().min() > 0
    output.sum().backward()
    assert meter.read().tolist() == [0, 0, 0]
    meter.close()
    norm(x)
    assert meter.read().tolist() == [0, 0, 0]
    assert not norm._forward_pre_hooks


def test_a_batchnorm_that_is_called_by_keyword_is_observed() -> None:
    norm = BatchRenorm2d(3)
    meter = LagMeter(norm)
    norm.train()(input=torch.rand(2, 3, 4, 4))
    assert meter.read()[2] == 1


@pytest.mark.parametrize("mode", ["train", "freeze", "freeze-statistics"])
def test_another_mode_while_the_layers_are_observed_does_no_harm(mode: BatchNormMode) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    set_batchnorm_mode(model, "renorm")
    meter = LagMeter(model)
    set_batchnorm_mode(model, mode)
    model.train()(torch.rand(2, 3, 4, 4))
    assert meter.read()[2] == 0


def test_copies_of_an_observed_network_are_not_observed() -> None:
    norm = BatchRenorm2d(3)
    meter = LagMeter(norm)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        other.train()(torch.rand(2, 3, 4, 4))
        assert all(not hook.__self__._observed for hook in other._forward_pre_hooks.values())
    assert meter.read()[2] == 0
