import pytest
import torch
from torch import nn

from bn_insert.checkpoints.load_network import load_checkpoint
from bn_insert.demo import network_path
from bn_insert.errors import TrainingError
from bn_insert.training.parameter_groups import parameter_groups


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.BatchNorm1d(8),
        nn.LayerNorm(8),
        nn.Linear(8, 2, bias=False),
    )


def decay_of(model: nn.Module, *decays: float) -> dict[str, float]:
    groups = parameter_groups(model, *decays)
    by_parameter = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    return {name: by_parameter[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("model", [network(), load_checkpoint(network_path()), nn.MultiheadAttention(8, 2)])
def test_every_trainable_parameter_is_in_exactly_one_group(model: nn.Module) -> None:
    grouped = [id(parameter) for group in parameter_groups(model, 0.1) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}


def test_weights_alone_decay() -> None:
    decays = decay_of(network(), 0.1)
    assert {name for name, decay in decays.items() if decay} == {"0.weight", "5.weight", "8.weight"}
    assert set(decays.values()) == {0.1, 0.0}


def test_gamma_and_beta_decay_by_the_number_of_their_own_and_biases_never_do() -> None:
    decays = decay_of(network(), 0.1, 0.03)
    assert {name for name, decay in decays.items() if decay == 0.03} == {
        f"{layer}.{name}" for layer in (1, 3, 6, 7) for name in ("weight", "bias")
    }
    assert decays["0.bias"] == decays["5.bias"] == 0.0


def test_parameters_without_gradient_are_in_no_group_and_empty_groups_are_left_out() -> None:
    model = network().requires_grad_(requires_grad=False)
    model[8].weight.requires_grad_()
    (group,) = parameter_groups(model, 0.1)
    assert len(group["params"]) == 1
    assert group["params"][0] is model[8].weight


def test_a_weight_that_two_layers_share_is_there_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == 3


def test_an_optimizer_takes_the_groups() -> None:
    model = network()
    optimizer = torch.optim.SGD(parameter_groups(model, 1.0), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = name in {"0.weight", "5.weight", "8.weight"}
        assert torch.equal(parameter, before[name] * 0.5 if shrunk else before[name])


def test_nothing_to_train_and_negative_decay_are_refused() -> None:
    with pytest.raises(TrainingError, match="no parameter that requires a gradient"):
        parameter_groups(network().requires_grad_(requires_grad=False), 0.1)
    with pytest.raises(TrainingError, match="norm_weight_decay is -1"):
        parameter_groups(network(), 0.1, -1.0)
    with pytest.raises(TrainingError, match="weight_decay is nan"):
        parameter_groups(network(), float("nan"))
