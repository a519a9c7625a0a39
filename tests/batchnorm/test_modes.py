import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bn_insert.batchnorm.batch_renorm import BATCH_RENORMS, BatchRenorm2d
from bn_insert.batchnorm.modes import (
    BatchNormMode,
    freeze_batchnorm,
    needs_several_values,
    set_batchnorm_mode,
    uses_batch_statistics,
)
from bn_insert.errors import TrainingError
from bn_insert.training.parameter_groups import parameter_groups
from support.networks import narrow_vgg


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
        ("renorm", STATISTICS | {"weight", "bias"}),
        ("freeze-statistics", {"weight", "bias"}),
        ("freeze", set()),
    ],
)
def test_a_mode_changes_what_it_says_and_survives_train(mode: BatchNormMode, expected: set[str]) -> None:
    model = network()
    set_batchnorm_mode(model, mode)
    assert changed(model) == expected


def test_the_layer_upstream_of_a_frozen_batchnorm_still_learns() -> None:
    model = network()
    set_batchnorm_mode(model, "freeze")
    before = model[0].weight.detach().clone()
    step(model)
    assert not torch.equal(model[0].weight, before)


def test_a_frozen_batchnorm_normalizes_by_its_running_statistics() -> None:
    model, x = network(), torch.rand(8, 3, 4, 4)
    expected = model.eval()(x).detach()
    set_batchnorm_mode(model, "freeze-statistics")
    assert torch.equal(model.train()(x), expected)


MODES: list[BatchNormMode] = ["train", "renorm", "freeze-statistics", "freeze"]


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_only_the_last_of_several_modes_counts(first: BatchNormMode, second: BatchNormMode) -> None:
    model, expected = network(), network()
    before = vars(model[1]).keys() | {"_r_max", "_d_max", "synchronize"}
    set_batchnorm_mode(model, first, r_max=2.0, d_max=1.0, synchronize=True)
    set_batchnorm_mode(model, second)
    set_batchnorm_mode(expected, second)
    assert type(model[1]) is type(expected[1])
    assert vars(model[1]).keys() == vars(expected[1]).keys() <= before
    assert repr(model) == repr(expected)
    assert len(model[1]._forward_pre_hooks) == second.startswith("freeze")
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert changed(model) == changed(expected)


def test_with_renorm_train_mode_is_the_function_of_eval_mode_and_the_module_stays() -> None:
    model, x = network(), torch.rand(2, 3, 4, 4)
    expected = model.eval()(x)
    norm, optimizer, called = model[1], torch.optim.SGD(model.parameters(), lr=0.1), []
    norm.register_forward_hook(lambda *_: called.append(1))
    set_batchnorm_mode(model, "renorm")
    assert model[1] is norm
    assert torch.equal(model.train()(x), expected)
    assert called == [1]
    before = norm.weight.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(norm.weight, before)


def test_limits_and_synchronization_are_set() -> None:
    model = network()
    set_batchnorm_mode(model, "renorm", r_max=3.0, d_max=0.5, synchronize=True)
    norm: Any = model[1]
    assert (norm.r_max, norm.d_max, norm.synchronize) == (3, 0.5, True)


def test_torchvisions_vgg_renormalizes_a_batch_of_one() -> None:
    model, x = narrow_vgg("vgg16_bn"), torch.rand(1, 3, 32, 32)
    expected = model(x)
    keys = list(model.state_dict())
    set_batchnorm_mode(model, "renorm")
    assert list(model.state_dict()) == keys
    assert torch.equal(model.train().requires_grad_(False).apply(without_dropout)(x), expected)
    assert sum(isinstance(module, BatchRenorm2d) for module in model.modules()) == 13


def without_dropout(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.eval()


class Own(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as nn.BatchNorm names it
        return input


@pytest.mark.parametrize(
    ("norm", "wording"),
    [
        (lambda: Own(4), "BatchNorm 1 is an Own, whose forward pass may do something else"),
        (
            lambda: nn.SyncBatchNorm(4),
            "BatchNorm 1 is an nn.SyncBatchNorm.*keep nn.BatchNorm and pass synchronize=True",
        ),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), "BatchNorm 1 keeps no running statistics"),
    ],
)
def test_what_cannot_renormalize_is_named_and_nothing_is_changed(norm: Callable[[], nn.Module], wording: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), norm())
    with pytest.raises(TrainingError, match=wording):
        set_batchnorm_mode(model, "renorm")
    assert type(model[0]) is nn.BatchNorm2d


def test_a_limit_out_of_range_changes_nothing() -> None:
    model = network()
    with pytest.raises(TrainingError, match="r_max must be at least 1"):
        set_batchnorm_mode(model, "renorm", r_max=0.5)
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("cls", BATCH_RENORMS)
def test_each_class_has_the_forward_of_the_class_it_declares_in_eval_mode(cls: Any) -> None:
    assert BATCH_RENORMS[cls].eval_class is cls


def test_modes_differ_in_batch_statistics_and_in_the_values_they_need() -> None:
    found = []
    for mode in MODES:
        model = network()
        set_batchnorm_mode(model, mode)
        found.append((uses_batch_statistics(model[1]), needs_several_values(model[1])))
    assert found == [(True, True), (True, False), (False, False), (False, False)]
    assert not uses_batch_statistics(network()[0])


def test_freeze_batchnorm_is_the_older_name() -> None:
    model = network()
    freeze_batchnorm(model, "freeze")
    assert changed(model) == set()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_frozen(copied: Callable[[nn.Module], nn.Sequential]) -> None:
    model = network()
    set_batchnorm_mode(model, "freeze")
    assert changed(copied(model)) == set()


def test_keys_stay_as_they_are() -> None:
    model = network()
    keys = list(model.state_dict())
    set_batchnorm_mode(model, "freeze")
    assert list(model.state_dict()) == keys


def test_an_unknown_mode_names_those_that_exist(unchecked: Callable[..., Any]) -> None:
    with pytest.raises(TrainingError, match="must be one of train, renorm, freeze-statistics, freeze, not 'eval'"):
        unchecked(set_batchnorm_mode)(network(), "eval")


def test_a_batchnorm_without_running_statistics_cannot_be_frozen() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False))
    set_batchnorm_mode(model, "train")
    with pytest.raises(TrainingError, match="BatchNorm 0 keeps no running statistics"):
        set_batchnorm_mode(model, "freeze-statistics")
