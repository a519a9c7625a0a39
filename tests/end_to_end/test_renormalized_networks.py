"""What is not training knows no difference between a BatchNorm and one that renormalizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bn_insert import (
    BatchRenorm2d,
    Settings,
    calibrate,
    find_sites,
    fold_batchnorm,
    insert_batchnorm,
    load_checkpoint,
    parameter_groups,
    recalibrate,
    save_checkpoint,
    set_batchnorm_mode,
)
from bn_insert.graph.copies import deep_copy, working_copy
from support.networks import images, randomised, small_vgg

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """Return a network with BatchNorm, and a copy that renormalizes."""
    plain = insert_batchnorm(randomised(small_vgg()), [images(16)])
    renorm = copy.deepcopy(plain)
    set_batchnorm_mode(renorm, "renorm", r_max=3.0)
    return plain, renorm


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    assert list(a.state_dict()) == list(b.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_checkpoint_has_the_same_keys_and_settings_and_loads_with_batchnorm(
    models: tuple[nn.Module, nn.Module], tmp_path: Path, suffix: str
) -> None:
    plain, renorm = models
    save_checkpoint(renorm, tmp_path / f"renorm.{suffix}")
    loaded = load_checkpoint(tmp_path / f"renorm.{suffix}")
    assert not any(isinstance(module, BatchRenorm2d) for module in loaded.modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in loaded.modules()) > 0
    assert_same_state(loaded, plain)
    assert Settings.of(renorm).batchnorm == Settings.of(plain).batchnorm


def test_folding_is_the_same(models: tuple[nn.Module, nn.Module]) -> None:
    plain, renorm = (fold_batchnorm(model, images(1)) for model in models)
    assert_same_state(plain, renorm)


def test_recalibration_is_the_same_and_keeps_the_mode(models: tuple[nn.Module, nn.Module]) -> None:
    batches = images(12, seed=7).split(4)
    plain, renorm = (recalibrate(model, batches) for model in models)
    assert_same_state(plain, renorm)
    norms = [module for module in renorm.modules() if isinstance(module, BatchRenorm2d)]
    assert norms
    assert {norm.r_max for norm in norms} == {3.0}


def test_convs_run_on_micro_batches_as_with_batchnorm(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: set[int] = set()
    batch_norm = nn.functional.batch_norm

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.add(len(x))
        return batch_norm(x, *args, **kwargs)

    convs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    x = images(12)
    model = nn.Sequential(convs, nn.Flatten())
    sites = find_sites(model, x, include_output=True)
    set_batchnorm_mode(model, "renorm")
    monkeypatch.setattr("bn_insert.statistics.calibrate._MICRO_BATCH_BYTES", 4 * 8 * 30 * 30 * 4)
    monkeypatch.setattr(nn.functional, "batch_norm", counted)
    calibrate(model, sites, [x])
    assert sizes - {1} == {4}  # 1: on the meta device, for the shapes


def test_inserting_into_a_network_that_renormalizes_inserts_nothing_twice(
    models: tuple[nn.Module, nn.Module],
) -> None:
    plain, renorm = models
    x = images(8)
    assert find_sites(renorm, x) == find_sites(plain, x)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchRenorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    result = insert_batchnorm(model.train(), [x], include_output=True)
    assert [type(module).__name__ for module in result] == [
        *("Conv2d", "BatchRenorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU")
    ]
    assert torch.equal(result.eval()(x), model.eval()(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, deep_copy, working_copy])
def test_copies_keep_the_mode(models: tuple[nn.Module, nn.Module], copied: Callable[[nn.Module], nn.Module]) -> None:
    _, renorm = models
    result = copied(renorm)
    assert repr(result) == repr(renorm)
    assert_same_state(result, renorm)


def test_export_writes_the_same_graph(models: tuple[nn.Module, nn.Module]) -> None:
    graphs = [
        [str(node.target) for node in torch.export.export(model.eval(), (images(2),)).graph.nodes] for model in models
    ]
    assert graphs[0] == graphs[1]


def test_parameters_are_in_the_same_groups(models: tuple[nn.Module, nn.Module]) -> None:
    plain, renorm = (
        [(group["weight_decay"], [parameter.shape for parameter in group["params"]]) for group in groups]
        for groups in (parameter_groups(model, 1e-4, 1e-5) for model in models)
    )
    assert plain == renorm
