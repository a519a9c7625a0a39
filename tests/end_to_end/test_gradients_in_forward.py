"""Networks whose forward computes gradients, such as a force field or one that returns maps of its attention."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bn_insert import (
    CalibrationError,
    GraphError,
    adapt_statistics,
    compare_outputs,
    evaluate,
    find_sites,
    insert,
    insert_batchnorm,
    recalibrate,
    replace_output,
    train_mode_agreement,
)
from support.networks import images, randomised


class GradCAM(nn.Module):
    """Logits, and the features weighted by their gradients (Selvaraju et al. 2017, arXiv:1610.02391)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    @torch.enable_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.conv2(F.relu(self.conv1(x))))
        logits = self.head(features.mean((2, 3)))
        (gradients,) = torch.autograd.grad(logits.amax(1).sum(), features, retain_graph=True)
        return logits, (gradients.mean((2, 3), keepdim=True) * features).sum(1)


class ForceField(nn.Module):
    """An energy, and the forces: its gradients in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1, self.hidden2, self.energy = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            positions = positions.detach().requires_grad_()
            energy = self.energy(F.softplus(self.hidden2(F.softplus(self.hidden1(positions)))))
            (gradients,) = torch.autograd.grad(energy.sum(), positions, create_graph=self.training)
        return energy, -gradients


class WithoutContext(ForceField):
    """The same, for a caller who has not switched gradients off."""

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.clone().requires_grad_()
        energy = self.energy(F.softplus(self.hidden1(positions)))
        return energy, -torch.autograd.grad(energy.sum(), positions)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_network_that_computes_gradients_in_its_forward_is_inserted_into_and_its_moments_need_none(
    dtype: torch.dtype,
) -> None:
    model, x = randomised(GradCAM()).to(dtype), images(8, 12).to(dtype)
    insertion = insert(model, x.split(2))
    assert list(insertion.norms) == ["conv1", "conv2"] and not insertion.fault
    assert compare_outputs(model, insertion.model, [x]).max_rel < 1e-5
    with torch.no_grad():
        expected = model.conv1(x).double()
    torch.testing.assert_close(insertion.moments["conv1"].mean.double(), expected.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    result = recalibrate(insertion.model, x.split(2))
    assert not any(each.requires_grad for each in result.buffers())
    adapted = adapt_statistics(model, x.split(2), (x / 2).split(2), keep_batchnorm=True)
    adapted.train()(x)[0].sum().backward()


def test_a_network_that_computes_gradients_in_its_forward_is_evaluated_and_gets_another_output_layer() -> None:
    model, x = randomised(GradCAM()), images(8, 12)
    with torch.no_grad():
        predicted = model.eval()(x)[0].argmax(1)
    assert evaluate(model, [(x, predicted)]).accuracy == 1
    assert train_mode_agreement(insert_batchnorm(model, [x]), [x], [4])[0].images == 8
    replace_output(model, 2, example=x)
    assert model.head.out_features == 2


def test_a_force_field_keeps_its_energies_and_its_forces() -> None:
    model, x = randomised(ForceField()), torch.randn(32, 6)
    result = insert_batchnorm(model, x.split(8), include_output=True, skip=["energy"])
    assert isinstance(result.hidden1[1], nn.BatchNorm1d) and isinstance(result.energy, nn.Linear)
    assert compare_outputs(model, result, [x]).max_rel < 1e-5


@pytest.mark.parametrize("function", [find_sites, lambda model, x: recalibrate(insert_into(model), [x])])
def test_a_forward_that_needs_gradients_to_be_on_is_told_to_switch_them_on_itself(function: Any) -> None:
    with pytest.raises((GraphError, CalibrationError), match=r"compute them inside torch\.enable_grad\(\)$"):
        function(randomised(WithoutContext()), torch.randn(8, 6))


def insert_into(model: ForceField) -> nn.Module:
    """Return a network with a BatchNorm, which was not traced."""
    model.hidden1 = nn.Sequential(model.hidden1, nn.BatchNorm1d(16))  # type: ignore[assignment]
    return model
