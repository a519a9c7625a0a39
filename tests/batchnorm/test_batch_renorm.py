"""Batch Renormalization against eval mode, nn.BatchNorm and its formula in float64."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from renorm_ranks import LIMITS as RANK_LIMITS
from renorm_ranks import SPLITS, batch, network, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bn_insert.batchnorm.batch_renorm import (
    BATCH_RENORMS,
    PLAIN_BATCHNORMS,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    check_can_renormalize,
)
from bn_insert.batchnorm.gradient_checkpointing import kept_passes
from bn_insert.errors import TrainingError
from support.commands import forked_ranks

# With one thread small tensors do not wait for cores that other processes use.
pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 6
SPACES: dict[str, tuple[type[Any], tuple[int, ...]]] = {
    "N x C": (BatchRenorm1d, ()),
    "N x C x L": (BatchRenorm1d, (7,)),
    "N x C x H x W": (BatchRenorm2d, (5, 7)),
    "N x C x D x H x W": (BatchRenorm3d, (3, 4, 5)),
}
spaces = pytest.mark.parametrize("space", SPACES)
limits = pytest.mark.parametrize(
    "limit", [{}, {"r_max": 1.3, "d_max": 0.4}, {"r_max": 1.2}, {"d_max": 0.3}, {"r_max": 1.0, "d_max": 0.0}]
)

some_limits = pytest.mark.parametrize("limit", [{}, {"r_max": 1.3, "d_max": 0.4}])


def batchnorm_of(renorm: Any) -> Any:
    """Return a copy of a BatchRenorm as a BatchNorm."""
    norm = copy.deepcopy(renorm)
    norm.__class__ = PLAIN_BATCHNORMS[type(renorm)]
    return norm


def randomised(module: Any) -> Any:
    """Give gamma, beta and statistics values at which a mistake shows; gamma of both signs."""
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                if norm.affine:
                    norm.weight.normal_()
                    norm.bias.normal_()
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.3, 3)
    return module


def inputs(space: str, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (size, CHANNELS, *SPACES[space][1])
    offset = torch.linspace(-1, 1, CHANNELS).view(1, -1, *[1] * (len(shape) - 2))
    return (torch.randn(shape) * (1.2 + offset) + offset).to(dtype)


def formula(norm: Any, x: Tensor) -> Tensor:
    """Return Batch Renormalization's output, written in the plainest way."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, var = x.mean(axes), x.var(axes, unbiased=False)
    r = ((var + norm.eps) / (norm.running_var + norm.eps)).sqrt().clamp(1 / norm.r_max, norm.r_max).detach()
    d = ((mean - norm.running_mean) / (norm.running_var + norm.eps).sqrt()).clamp(-norm.d_max, norm.d_max).detach()
    normalized = (x - mean.view(shape)) / (var + norm.eps).sqrt().view(shape) * r.view(shape) + d.view(shape)
    return normalized * norm.weight.view(shape) + norm.bias.view(shape)


def gradients(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output = function(x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # Squared, so that the gradient is not the same for whatever output.
    return list(torch.autograd.grad((output.square() * weights.to(output)).sum(), [x, *module.parameters()]))


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * max(1.0, float(e.detach().abs().max())))


def layouts(x: Tensor) -> list[Tensor]:
    """Return a tensor contiguous, in channels_last where there is such a format, and transposed."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    others = [x.to(memory_format=formats[x.dim()])] if x.dim() in formats else []
    return [x, *others, x.transpose(0, -1).contiguous().transpose(0, -1)]


@spaces
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_output_in_train_mode_is_that_of_eval_mode_to_the_bit(space: str, dtype: torch.dtype) -> None:
    norm = randomised(SPACES[space][0](CHANNELS, dtype=torch.promote_types(dtype, torch.float32)))
    for size in (1, 2, 4, 32):
        for x in layouts(inputs(space, size, dtype)):
            expected = norm.eval()(x)
            actual = norm.train()(x)
            assert torch.equal(actual, expected)
            assert actual.dtype == expected.dtype == dtype
            assert actual.stride() == expected.stride()


@pytest.mark.parametrize(
    ("size", "dtype", "memory_format"),
    [
        (1, torch.bfloat16, torch.contiguous_format),
        (2, torch.float16, torch.channels_last),
        (32, torch.bfloat16, torch.channels_last),
    ],
)
def test_network_under_autocast_gives_in_train_mode_what_it_gives_in_eval_mode(
    size: int, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    model = randomised(small_network())
    x = torch.randn(size, 3, 12, 12).to(memory_format=memory_format)
    with torch.autocast("cpu", dtype=dtype):
        expected = model.eval()(x)
        actual = model.train()(x)
    assert torch.equal(actual, expected)
    actual.float().sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)
    assert all(buffer.dtype == torch.float32 for name, buffer in model.named_buffers() if "running" in name)


def small_network(dtype: torch.dtype = torch.float32, **keywords: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, dtype=dtype),
        BatchRenorm2d(8, dtype=dtype, **keywords),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, dtype=dtype),
        BatchRenorm2d(8, dtype=dtype, **keywords),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5, dtype=dtype),
        BatchRenorm1d(5, dtype=dtype, **keywords),
    )


def test_module_whose_parameters_are_bfloat16_gives_in_train_mode_what_it_gives_in_eval_mode() -> None:
    norm = randomised(BatchRenorm2d(CHANNELS)).bfloat16()
    x = inputs("N x C x H x W", 4, torch.bfloat16)
    expected = norm.eval()(x)
    assert torch.equal(norm.train()(x), expected)
    norm.r_max = 1.1
    norm(x).sum().backward()
    assert norm.weight.grad.dtype == torch.bfloat16


@spaces
@limits
def test_output_and_gradients_are_those_of_the_formula(space: str, limit: dict[str, float]) -> None:
    norm = randomised(SPACES[space][0](CHANNELS, dtype=torch.float64, **limit))
    for size in (2, 5):
        x = inputs(space, size)
        expected = gradients(lambda x: formula(norm, x), norm, x)
        torch.testing.assert_close(copy.deepcopy(norm)(x), formula(norm, x), rtol=1e-12, atol=1e-12)
        assert_all_close(gradients(norm, norm, x), expected, 1e-12)


@some_limits
def test_gradients_in_float32_and_channels_last_are_those_of_the_formula(limit: dict[str, float]) -> None:
    norm = randomised(BatchRenorm2d(CHANNELS, **limit))
    x = inputs("N x C x H x W", 8, torch.float32).to(memory_format=torch.channels_last)
    double = copy.deepcopy(norm).double()
    expected = [grad.float() for grad in gradients(lambda x: formula(double, x), double, x.double())]
    actual = gradients(norm, norm, x)
    assert_all_close(actual, expected, 1e-5)
    assert actual[0].is_contiguous(memory_format=torch.channels_last)


@some_limits
def test_second_derivatives_are_those_of_the_formula(limit: dict[str, float]) -> None:
    norm = randomised(BatchRenorm2d(CHANNELS, dtype=torch.float64, **limit))
    x = inputs("N x C x H x W", 3).requires_grad_()

    def penalty_gradients(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        (grad,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), [x, *norm.parameters()]))

    expected = penalty_gradients(lambda x: formula(norm, x))
    largest = max(float(grad.abs().max()) for grad in expected)
    for actual, grad in zip(penalty_gradients(norm), expected, strict=True):
        torch.testing.assert_close(actual, grad, rtol=1e-12, atol=1e-12 * largest)


def test_gradients_pass_gradcheck_where_the_limits_hold_r_and_d_still() -> None:
    # At r_max=1, d_max=0 both are constants, and the numerical gradient is that of batch normalization.
    norm = randomised(BatchRenorm2d(CHANNELS, dtype=torch.float64, r_max=1.0, d_max=0.0))
    norm.momentum = 0.0
    x = inputs("N x C x H x W", 2)[..., :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradgradcheck(norm, x)


def test_limits_of_these_tests_are_in_force_in_some_channels_and_not_in_others() -> None:
    norm = randomised(BatchRenorm2d(CHANNELS, dtype=torch.float64))
    x = inputs("N x C x H x W", 5)
    ratio = (x.var((0, 2, 3)) / norm.running_var).sqrt()
    distance = (x.mean((0, 2, 3)) - norm.running_mean).abs() / norm.running_var.sqrt()
    for clipped in ((ratio > 1.3) | (ratio < 1 / 1.3), distance > 0.4, distance > 0.3):
        assert 0 < clipped.sum() < CHANNELS


@spaces
def test_with_the_tightest_limits_it_is_batch_normalization(space: str) -> None:
    renorm = randomised(SPACES[space][0](CHANNELS, dtype=torch.float64, r_max=1.0, d_max=0.0))
    norm = batchnorm_of(renorm)
    x = inputs(space, 5)
    torch.testing.assert_close(renorm(x), norm(x), rtol=1e-12, atol=1e-12)
    assert_all_close(gradients(renorm, renorm, x), gradients(norm, norm, x), 1e-12)


def test_a_channel_within_the_limits_has_the_output_of_eval_mode_to_the_bit() -> None:
    norm = randomised(BatchRenorm2d(CHANNELS))
    x = inputs("N x C x H x W", 8, torch.float32)
    norm.running_mean.copy_(x.mean((0, 2, 3)))
    norm.running_var.copy_(x.var((0, 2, 3)) * torch.tensor([1, 1.1, 9, 1, 0.9, 0.1]))
    norm.r_max, norm.d_max = 1.5, 0.5
    expected = norm.eval()(x)
    same = (norm.train()(x) == expected).transpose(0, 1).flatten(1).all(1)
    assert same.tolist() == [True, True, False, True, True, False]


def test_limits_set_between_steps_are_in_force_at_the_next() -> None:
    norm = randomised(BatchRenorm2d(CHANNELS, momentum=0.0))
    x = inputs("N x C x H x W", 4, torch.float32)
    expected = norm.eval()(x)
    norm.train()
    assert torch.equal(norm(x), expected)
    norm.r_max, norm.d_max = 1.0, 0.0
    assert not torch.allclose(norm(x), expected)
    norm.r_max = norm.d_max = math.inf
    assert torch.equal(norm(x), expected)


@spaces
@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
def test_running_statistics_are_those_of_batchnorm_after_the_same_batches(space: str, momentum: float | None) -> None:
    renorm = randomised(SPACES[space][0](CHANNELS, momentum=momentum))
    norm = batchnorm_of(renorm)
    for size in (4, 2, 7):
        x = layouts(inputs(space, size, torch.float32))[size == 7]
        renorm(x)
        norm(x)
    for (name, actual), expected in zip(renorm.named_buffers(), norm.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, msg=name)
    assert renorm.num_batches_tracked == 3


@pytest.mark.parametrize("limit", [{}, {"d_max": 1e6}])
@pytest.mark.parametrize("shape", [(1, CHANNELS), (1, CHANNELS, 1), (1, CHANNELS, 1, 1)])
def test_gradient_of_a_single_value_is_that_of_eval_mode(limit: dict[str, float], shape: tuple[int, ...]) -> None:
    cls = BatchRenorm2d if len(shape) == 4 else BatchRenorm1d
    norm = randomised(cls(CHANNELS, dtype=torch.float64, **limit))
    x = torch.randn(shape, dtype=torch.float64)
    expected = gradients(norm.eval(), norm, x)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    assert_all_close(gradients(norm.train(), norm, x), expected, 1e-12)
    torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * x.flatten())
    assert torch.equal(norm.running_var, var)
    assert norm.num_batches_tracked == 1


def test_single_values_out_of_the_limits_are_clipped_and_have_no_gradient() -> None:
    norm = randomised(BatchRenorm1d(CHANNELS, dtype=torch.float64, d_max=0.5, r_max=2.0))
    x = torch.randn(1, CHANNELS, dtype=torch.float64, requires_grad=True)
    normalized = ((x - norm.running_mean) / (norm.running_var + norm.eps).sqrt()).clamp(-0.5, 0.5)
    expected = normalized * norm.weight + norm.bias
    expected_grads = torch.autograd.grad(expected.square().sum(), [x, *norm.parameters()])
    actual = norm(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_all_close(
        list(torch.autograd.grad(actual.square().sum(), [x, *norm.parameters()])), list(expected_grads), 1e-12
    )
    assert 0 < (expected_grads[0] == 0).sum() < CHANNELS


def test_an_empty_batch_leaves_the_statistics_alone() -> None:
    norm = randomised(BatchRenorm2d(CHANNELS))
    before = copy.deepcopy(norm.state_dict())
    x = torch.zeros(0, CHANNELS, 4, 4, requires_grad=True)
    assert norm(x).shape == x.shape
    assert all(torch.equal(after, before[key]) for key, after in norm.state_dict().items())


@some_limits
def test_without_gamma_and_beta_it_is_as_with_gamma_1_and_beta_0(limit: dict[str, float]) -> None:
    plain = randomised(BatchRenorm2d(CHANNELS, affine=False, dtype=torch.float64, **limit))
    affine = BatchRenorm2d(CHANNELS, dtype=torch.float64, **limit)
    affine.load_state_dict(plain.state_dict(), strict=False)
    x = inputs("N x C x H x W", 4)
    torch.testing.assert_close(copy.deepcopy(plain)(x), copy.deepcopy(affine)(x))
    assert_all_close(gradients(plain, plain, x), gradients(affine, affine, x)[:1], 1e-12)


def test_gamma_without_beta_has_its_gradient() -> None:
    norm = randomised(BatchRenorm2d(CHANNELS, dtype=torch.float64))
    without = BatchRenorm2d(CHANNELS, bias=False, dtype=torch.float64)
    norm.bias.detach().zero_()
    without.load_state_dict({key: value for key, value in norm.state_dict().items() if key != "bias"})
    x = inputs("N x C x H x W", 4)
    expected = gradients(norm, norm, x)[:2]
    assert_all_close(gradients(without, without, x), expected, 1e-12)


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"], ["x"]])
def test_what_needs_no_gradient_gets_none_and_the_rest_is_as_it_was(frozen: list[str]) -> None:
    norm = randomised(BatchRenorm2d(CHANNELS, dtype=torch.float64))
    whole, x = copy.deepcopy(norm), inputs("N x C x H x W", 4)
    inputs_of = {}
    for module in (norm, whole):
        needs = {"x": x.clone().requires_grad_(), **dict(module.named_parameters())}
        for name in frozen if module is norm else []:
            needs[name].requires_grad_(False)
        module(needs["x"]).pow(3).sum().backward()
        inputs_of[module] = needs
    for name, tensor in inputs_of[norm].items():
        if name in frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, inputs_of[whole][name].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", BATCH_RENORMS)
def test_state_dicts_go_both_ways_between_batchnorm_and_renorm(cls: type[Any]) -> None:
    norm, renorm = randomised(cls(CHANNELS)), BATCH_RENORMS[cls](CHANNELS, r_max=3.0)
    assert list(norm.state_dict()) == list(renorm.state_dict())
    renorm.load_state_dict(norm.state_dict())
    other = cls(CHANNELS)
    other.load_state_dict(renorm.state_dict())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in norm.state_dict().items())
    assert isinstance(renorm, cls)


def steps(model: nn.Module, batches: list[Tensor], run: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    """Return the gradients of inputs and parameters and the buffers, after some steps of SGD."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    results = []
    for inputs in batches:
        x = inputs.clone().requires_grad_()
        optimizer.zero_grad()
        run(model, x).square().sum().backward()
        optimizer.step()
        results += [x.grad, *(parameter.grad.clone() for parameter in model.parameters())]
        results += [buffer.clone() for buffer in model.buffers()]
    return results


def plain(model: Any, x: Tensor, **_: bool) -> Tensor:
    return model(x)


def whole(model: nn.Module, x: Tensor, call: Any = checkpoint, **reentrant: bool) -> Tensor:
    return call(model, x, **reentrant)


def nested(model: Any, x: Tensor, call: Any = checkpoint, **reentrant: bool) -> Tensor:
    def halves(x: Tensor) -> Tensor:
        return call(model[4:], call(model[:4], x, **reentrant), **reentrant)

    return call(halves, x, **reentrant)


def thrice(model: nn.Module, x: Tensor, call: Any = checkpoint, **reentrant: bool) -> Tensor:
    # The same batch twice, as for two dropout masks, and another between.
    first, second, third = (call(model, batch, **reentrant) for batch in (x, 2 * x, x))
    return first + 3 * second.sin() + third.cos()


# Within another checkpoint, a reentrant one runs without gradients at first.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("run", [whole, nested, thrice])
@pytest.mark.parametrize(("limit", "size"), [({}, 1), ({"r_max": 1.2, "d_max": 0.3}, 3)])
def test_checkpointing_changes_neither_gradients_nor_statistics(
    reentrant: bool, run: Any, limit: dict[str, float], size: int
) -> None:
    model = randomised(small_network(torch.float64, **limit))
    x = torch.randn(size, 3, 8, 8, dtype=torch.float64)
    batches = [x, torch.randn_like(x), x, x]  # the same batch again: other statistics, same batch statistics at first

    def without(model: nn.Module, x: Tensor) -> Tensor:
        return run(model, x, call=plain)

    def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
        return run(model, x, use_reentrant=reentrant)

    assert_all_close(steps(model, batches, checkpointed), steps(model, batches, without), 1e-11)


def test_checkpointing_is_right_where_a_layer_and_those_before_it_are_frozen() -> None:
    model = randomised(small_network(torch.float64))
    model[:4].requires_grad_(False)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)

    def trained_part(run: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        network = copy.deepcopy(model)
        run(network, x).square().sum().backward()
        return [*(p.grad for p in network[4:].parameters()), *network.buffers()]

    expected = trained_part(plain)
    assert_all_close(trained_part(lambda network, x: whole(network, x, use_reentrant=False)), expected, 1e-12)


def test_a_graph_can_be_walked_twice_under_checkpointing() -> None:
    model = randomised(small_network(torch.float64))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    loss = checkpoint(model, x, use_reentrant=False).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert_all_close(list(torch.autograd.grad(loss, x)), list(first), 1e-12)
    assert model[1].num_batches_tracked == 1


def test_a_forward_pass_of_another_batch_within_a_backward_pass_moves_no_statistics() -> None:
    norm = randomised(BatchRenorm2d(CHANNELS))
    x = inputs("N x C x H x W", 4, torch.float32).requires_grad_()
    before: list[Tensor] = []

    def forward_within(grad: Tensor) -> Tensor:
        before.append(norm.running_mean.clone())
        expected = copy.deepcopy(norm).eval()(x + 1)
        assert torch.equal(norm(x + 1), expected)
        return grad

    output = norm(x)
    output.register_hook(forward_within)
    output.sum().backward()
    assert torch.equal(norm.running_mean, before[0])


def test_gradients_add_up_over_forward_passes_before_one_backward_pass() -> None:
    model = randomised(small_network(torch.float64))
    batches = [torch.randn(size, 3, 8, 8, dtype=torch.float64) for size in (2, 1, 4)]
    one_by_one, at_once = copy.deepcopy(model), copy.deepcopy(model)
    for x in batches:
        one_by_one(x).square().sum().backward()
    torch.stack([at_once(x).square().sum() for x in batches]).sum().backward()
    actual = [*(p.grad for p in at_once.parameters()), *at_once.buffers()]
    expected = [*(p.grad for p in one_by_one.parameters()), *one_by_one.buffers()]
    assert_all_close(actual, expected, 1e-12)


def test_nothing_is_kept_of_a_pass_whose_graph_is_gone() -> None:
    norm = BatchRenorm2d(CHANNELS)
    for _ in range(5):
        norm(inputs("N x C x H x W", 2, torch.float32)).sum().backward()
    with torch.no_grad():
        for _ in range(100):
            norm(inputs("N x C x H x W", 2, torch.float32))
    assert len(kept_passes(norm)) == 64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))])
def test_copies_keep_limits_and_go_their_own_way(copied: Callable[[Any], Any]) -> None:
    norm = randomised(BatchRenorm2d(CHANNELS, r_max=2.0, d_max=1.0, synchronize=True))
    norm(inputs("N x C x H x W", 2, torch.float32))
    copy_of_it = copied(norm)
    assert repr(copy_of_it) == repr(norm)
    assert (copy_of_it.r_max, copy_of_it.d_max, copy_of_it.synchronize) == (2, 1, True)
    before = norm.running_mean.clone()
    copy_of_it(inputs("N x C x H x W", 2, torch.float32))
    assert torch.equal(norm.running_mean, before)
    assert not torch.equal(copy_of_it.running_mean, before)


# At a break of the graph, PyTorch looks at the gradient of what is passed on.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_network_gives_the_same(checkpointed: bool) -> None:
    model = randomised(small_network(torch.float64))
    batches = [torch.randn(2, 3, 8, 8, dtype=torch.float64) for _ in range(2)]
    expected = steps(model, batches, plain)

    def run(network: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(network, x, use_reentrant=False) if checkpointed else network(x)

    compiled = torch.compile(run, backend="aot_eager")

    try:
        assert_all_close(steps(model, batches, compiled), expected, 1e-12)
    finally:
        torch._dynamo.reset()


def test_convert_sync_batchnorm_replaces_it_by_a_batchnorm_that_does_not_renormalize() -> None:
    # As documented: pass synchronize=True instead.
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(BatchRenorm2d(CHANNELS))) is nn.SyncBatchNorm


def test_batchnorm_whose_class_is_set_to_renorm_is_complete() -> None:
    norm = randomised(nn.BatchNorm2d(CHANNELS))
    x = inputs("N x C x H x W", 4, torch.float32)
    expected = norm.eval()(x)
    norm.__class__ = BatchRenorm2d
    assert (norm.r_max, norm.d_max, norm.synchronize) == (math.inf, math.inf, False)
    assert torch.equal(norm.train()(x), expected)
    norm.__class__ = nn.BatchNorm2d
    assert "r_max" not in repr(norm)
    assert not torch.allclose(norm(x), expected)


def test_limits_are_shown_where_there_are_any() -> None:
    assert "r_max" not in repr(BatchRenorm2d(4))
    assert "r_max=3.0, d_max=inf" in repr(BatchRenorm2d(4, r_max=3.0))
    assert "synchronize=True" in repr(BatchRenorm2d(4, synchronize=True))


@pytest.mark.parametrize(
    ("name", "value", "least"), [("r_max", 0.5, 1), ("d_max", -0.1, 0), ("r_max", math.nan, 1), ("d_max", math.nan, 0)]
)
def test_limits_out_of_range_are_refused_when_they_are_set(name: str, value: float, least: int) -> None:
    with pytest.raises(TrainingError, match=f"{name} must be at least {least}.*{value}"):
        BatchRenorm2d(4, **{name: value})
    norm = BatchRenorm2d(4)
    with pytest.raises(TrainingError, match=name):
        setattr(norm, name, value)
    assert getattr(norm, name) == math.inf


def test_a_batchnorm_without_running_statistics_is_refused() -> None:
    with pytest.raises(TrainingError, match="running statistics"):
        BatchRenorm2d(4, track_running_stats=False)
    with pytest.raises(TrainingError, match="running statistics"):
        check_can_renormalize(nn.BatchNorm2d(4, track_running_stats=False))


def test_other_classes_cannot_renormalize() -> None:
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(TrainingError, match="Own"):
        check_can_renormalize(Own(4))


def test_two_ranks_with_synchronized_statistics_are_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    done = forked_ranks(2, Path(__file__).with_name("renorm_ranks.py"), tmp_path, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for dtype, limit, split in ranks[0]:
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        model = network(dtype, synchronize=True, **RANK_LIMITS[limit])
        expected = trained(model, [batch(sum(SPLITS.get(split, (4, 4))), dtype, step) for step in range(2)])
        results = [rank[dtype, limit, split] for rank in ranks]
        for name in ("outputs", "input_grads"):
            joined = [torch.cat(parts) for parts in zip(*(result[name] for result in results), strict=True)]
            assert_all_close(joined, expected[name], tolerance)
        for result in results:
            # DDP averages over two ranks.
            grads = [2 * grad for grad in result["grads"]] if split == "parallel" else result["grads"]
            assert_all_close(grads, expected["grads"], tolerance)
            assert_all_close(result["buffers"], expected["buffers"], tolerance)
    assert len(ranks[0]) == 2 * 2 * 6
