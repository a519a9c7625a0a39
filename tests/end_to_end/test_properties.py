"""What holds for every network and every calibration set.

The examples are fixed and few; for a search, BN_INSERT_EXAMPLES=1000 draws so many at random.
"""

import os
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from bn_insert import fold_batchnorm, insert_batchnorm, load_checkpoint, save_checkpoint
from support.random_networks import CALIBRATION_SETS, NETWORKS, CalibrationSet, Network, batches_of, built

EXAMPLES = int(os.environ.get("BN_INSERT_EXAMPLES", "0"))

whatever = settings(
    max_examples=EXAMPLES or 6,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
PLACEMENTS = st.sampled_from(["before_activation", "after_activation"])


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(model(x.clone()))


def assert_equal_outputs(actual: nn.Module, expected: nn.Module, batches: list[Tensor]) -> None:
    for x in batches:
        for a, e in zip(outputs(actual, x), outputs(expected, x), strict=True):
            assert torch.equal(a, e), (a - e).abs().max()


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    states = actual.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


@whatever
@given(
    network=NETWORKS, calibration=CALIBRATION_SETS, placement=PLACEMENTS, equalize=st.booleans(), output=st.booleans()
)
def test_any_network_keeps_its_outputs_and_folds_back(
    network: Network, calibration: CalibrationSet, placement: str, equalize: bool, output: bool
) -> None:
    model, batches = built(network), batches_of(network, calibration)
    inserted = insert_batchnorm(model, batches, placement=placement, equalize=equalize, include_output=output)
    assert_same_state(model, built(network))
    assert_equal_outputs(inserted, model, batches)
    folded = fold_batchnorm(inserted, batches[0])
    assert norms(folded) == []
    assert list(folded.state_dict()) == list(model.state_dict())
    if not equalize:
        assert_same_state(folded, model)
    assert_equal_outputs(folded, model, batches)


@whatever
@given(
    network=NETWORKS,
    calibration=CALIBRATION_SETS,
    placement=PLACEMENTS,
    suffix=st.sampled_from([".pth", ".safetensors"]),
    eps=st.floats(1e-6, 1.0),
    momentum=st.none() | st.floats(0, 1),
)
def test_any_network_survives_a_checkpoint(  # noqa: PLR0917 - hypothesis gives them by name
    network: Network, calibration: CalibrationSet, placement: str, suffix: str, eps: float, momentum: float | None
) -> None:
    batches = batches_of(network, calibration)
    inserted = insert_batchnorm(built(network), batches, placement=placement, eps=eps, momentum=momentum)

    def architecture() -> nn.Module:
        return insert_batchnorm(built(network, seed=network.seed + 1), batches, placement=placement)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network" + suffix)
        save_checkpoint(inserted, path)
        loaded = load_checkpoint(path, model=architecture)
    assert_same_state(loaded, inserted)
    for name in norms(inserted):
        assert loaded.get_submodule(name).eps == eps
        assert loaded.get_submodule(name).momentum == momentum
    assert_equal_outputs(loaded, inserted, batches)
