import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bn_insert.batchnorm.modes import BatchNormMode, freeze_batchnorm
from bn_insert.errors import TrainingError
from bn_insert.training.parameter_groups import parameter_groups


def network() -> nn.Sequential:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    with torch.no_grad():
        for tensor in (model[1].weight, model[1].bias, model[1].running_mean, model[1].running_var):
            tensor.copy_(torch.rand(4) + 0.5)
    result: nn.Sequential = model
    return result


def step(model: nn.Module) -> None:
    """One step of anybody's training loop."""
    model.train()
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-2), lr=0.1)
    model(torch.rand(8, 3, 4, 4)).square().sum().backward()
    optimizer.step()


def changed(model: nn.Sequential) -> set[str]:
    """Which tensors of the BatchNorm two steps change."""
    before = {name: tensor.clone() for name, tensor in model[1].state_dict().items()}
    step(model)
    step(model)
    return {name for name, tensor in model[1].state_dict().items() if not torch.equal(tensor, before[name])}


STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("train", STATISTICS | {"weight", "bias"}),
        ("freeze-statistics", {"weight", "bias"}),
        ("freeze", set()),
    ],
)
def test_a_mode_changes_what_it_says_and_survives_train(mode: BatchNormMode, expected: set[str]) -> None:
    model = network()
    freeze_batchnorm(model, mode)
    assert changed(model) == expected


def test_the_layer_in_front_of_a_frozen_batchnorm_still_learns() -> None:
    model = network()
    freeze_batchnorm(model, "freeze")
    before = model[0].weight.detach().clone()
    step(model)
    assert not torch.equal(model[0].weight, before)


def test_a_frozen_batchnorm_normalizes_by_its_running_statistics() -> None:
    model, x = network(), torch.rand(8, 3, 4, 4)
    expected = model.eval()(x).detach()
    freeze_batchnorm(model, "freeze-statistics")
    assert torch.equal(model.train()(x), expected)


@pytest.mark.parametrize("mode", ["freeze-statistics", "freeze"])
def test_train_is_the_way_back(mode: BatchNormMode) -> None:
    model = network()
    freeze_batchnorm(model, mode)
    freeze_batchnorm(model, "train")
    assert not model[1]._forward_pre_hooks
    assert changed(model) == STATISTICS | {"weight", "bias"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_frozen(copied: Callable[[nn.Module], nn.Sequential]) -> None:
    model = network()
    freeze_batchnorm(model, "freeze")
    assert changed(copied(model)) == set()


def test_keys_stay_as_they_are() -> None:
    model = network()
    keys = list(model.state_dict())
    freeze_batchnorm(model, "freeze")
    assert list(model.state_dict()) == keys


def test_an_unknown_mode_names_those_that_exist(unchecked: Callable[..., Any]) -> None:
    with pytest.raises(TrainingError, match="must be one of train, renorm, freeze-statistics, freeze, not 'eval'"):
        unchecked(freeze_batchnorm)(network(), "eval")


def test_a_batchnorm_without_running_statistics_cannot_be_frozen() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False))
    freeze_batchnorm(model, "train")
    with pytest.raises(TrainingError, match="BatchNorm 0 keeps no running statistics"):
        freeze_batchnorm(model, "freeze-statistics")
