"""Every claim in the table of operators, checked on numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bn_insert.graph.operator_rules import (
    OPERATORS,
    PER_IMAGE_MODULES,
    Operator,
    Role,
    flattens_channels,
    keeps_channels,
    operation,
)
from bn_insert.graph.trace import Trace
from support.networks import randomised

aten = torch.ops.aten
CHANNELS = 6


@dataclass(frozen=True)
class Sample:
    """One call of an operation on a tensor with this many axes of positions."""

    name: str
    call: Callable[[Tensor], Tensor]
    positions: int = 2

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return 2 * torch.randn(4, CHANNELS, *[5] * self.positions, generator=generator, dtype=torch.float64).to(dtype)

    def output(self, x: Tensor) -> Tensor:
        torch.manual_seed(7)  # dropout drops the same values each time
        return self.call(x.clone())

    @cached_property
    def node(self) -> fx.Node:
        """The operation's node in a graph, which has its name and arguments."""
        nodes = Trace.of(_Call(self.call), self.inputs()).nodes
        return next(node for node in nodes if operation(node) == self.name)


class _Call(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


WEIGHT = torch.linspace(0.1, 0.4, CHANNELS, dtype=torch.float64)


def prelu(x: Tensor) -> Tensor:
    return F.prelu(x, WEIGHT.to(x.dtype))


# For which some claim of the row holds: one sample for each row with a claim, more where arguments matter.
CLAIMED = [
    Sample("relu", F.relu),
    Sample("leaky_relu", F.leaky_relu),
    Sample("prelu", prelu),
    Sample("rrelu", F.rrelu),
    Sample("clamp", lambda x: x.clamp(min=0)),
    Sample("clamp", lambda x: x.clamp(0, float("inf"))),
    Sample("clip", lambda x: x.clip(max=0)),
    Sample("clamp_min", lambda x: aten.clamp_min(x, 0)),
    Sample("clamp_max", lambda x: aten.clamp_max(x, 0)),
    Sample("hardtanh", lambda x: F.hardtanh(x, 0, float("inf"))),
    Sample("threshold", lambda x: F.threshold(x, 0, 0)),
    Sample("dropout", lambda x: F.dropout(x, training=False)),
    Sample("dropout", lambda x: F.dropout(x, 0.3, training=True)),
    Sample("feature_dropout", lambda x: F.dropout2d(x, training=False)),
    Sample("feature_dropout", lambda x: F.dropout2d(x, 0.3, training=True)),
    Sample("alpha_dropout", lambda x: F.alpha_dropout(x, training=False)),
    Sample("feature_alpha_dropout", lambda x: F.feature_alpha_dropout(x, training=False)),
    Sample("alias", aten.alias),
    Sample("clone", lambda x: x.clone()),
    Sample("contiguous", lambda x: x.transpose(2, 3).contiguous()),
    Sample("detach", lambda x: x.detach()),
    Sample("lift_fresh_copy", aten.lift_fresh_copy),
    Sample("getitem", lambda x: F.adaptive_max_pool2d(x, 2)),
    Sample("flatten", lambda x: x.flatten(1)),
    Sample("flatten", lambda x: x.flatten(2)),
    Sample("unflatten", lambda x: x.unflatten(2, (5, 1))),
    Sample("reshape", lambda x: x.reshape(4, -1)),
    Sample("view", lambda x: x.view(4, CHANNELS, -1)),
    Sample("squeeze", lambda x: x[..., :1].squeeze(-1)),
    Sample("unsqueeze", lambda x: x.unsqueeze(2)),
    *(
        Sample(f"max_pool{dims}d", lambda x, dims=dims: getattr(F, f"max_pool{dims}d")(x, 3, 2, 1), dims)
        for dims in (1, 2, 3)
    ),
    *(
        Sample(f"adaptive_max_pool{dims}d", lambda x, dims=dims: getattr(F, f"adaptive_max_pool{dims}d")(x, 2), dims)
        for dims in (1, 2, 3)
    ),
    *(
        Sample(f"avg_pool{dims}d", lambda x, dims=dims: getattr(F, f"avg_pool{dims}d")(x, 3, 2, 1), dims)
        for dims in (1, 2, 3)
    ),
    *(
        Sample(
            f"avg_pool{dims}d",
            lambda x, dims=dims: getattr(F, f"avg_pool{dims}d")(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
            dims,
        )
        for dims in (1, 2, 3)
    ),
    Sample("avg_pool2d", lambda x: F.avg_pool2d(x, 2, divisor_override=3)),
    *(
        Sample(f"adaptive_avg_pool{dims}d", lambda x, dims=dims: getattr(F, f"adaptive_avg_pool{dims}d")(x, 2), dims)
        for dims in (1, 2, 3)
    ),
    Sample("pad", lambda x: F.pad(x, (1, 2, 0, 1))),
    Sample("pad", lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect")),
    Sample("pad", lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate")),
    Sample("pad", lambda x: F.pad(x, (1, 2, 0, 1), mode="circular")),
    Sample("constant_pad_nd", lambda x: torch.constant_pad_nd(x, (1, 2))),
    *(
        Sample(name, lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode), dims)
        for name, mode, dims in [
            *((f"upsample_nearest{dims}d", "nearest", dims) for dims in (1, 2, 3)),
            *((f"_upsample_nearest_exact{dims}d", "nearest-exact", dims) for dims in (1, 2, 3)),
            *(("upsample_linear1d", "linear", 1), ("upsample_bilinear2d", "bilinear", 2)),
            *(("upsample_bicubic2d", "bicubic", 2), ("upsample_trilinear3d", "trilinear", 3)),
        ]
    ),
    Sample("mean", lambda x: x.mean((2, 3))),
    Sample("sum", lambda x: x.sum((2, 3))),
    Sample("amax", lambda x: x.amax((2, 3))),
    Sample("cat", lambda x: torch.cat([x, x], 1)),
    Sample("concat", lambda x: torch.concat([x, x], 1)),
    Sample("concatenate", lambda x: torch.concatenate([x, x], 1)),
]

# The nearest operations and arguments for which a claim must not be made: they look alike, and are not homogeneous.
NOT_HOMOGENEOUS = [
    Sample("relu6", F.relu6),
    Sample("hardtanh", F.hardtanh),
    Sample("hardtanh", nn.ReLU6()),
    Sample("clamp", lambda x: x.clamp(max=1)),
    Sample("clamp", lambda x: x.clamp(0, 1)),
    Sample("clip", lambda x: x.clip(min=1)),
    Sample("clamp_min", lambda x: aten.clamp_min(x, -1)),
    Sample("clamp_max", lambda x: aten.clamp_max(x, 1)),
    Sample("threshold", lambda x: F.threshold(x, 1, 0)),
    Sample("threshold", lambda x: F.threshold(x, 0, 1)),
    Sample("elu", F.elu),
    Sample("selu", F.selu),
    Sample("celu", F.celu),
    Sample("gelu", F.gelu),
    Sample("silu", F.silu),
    Sample("mish", F.mish),
    Sample("softplus", F.softplus),
    Sample("hardswish", F.hardswish),
    Sample("hardsigmoid", F.hardsigmoid),
    Sample("hardshrink", F.hardshrink),
    Sample("softshrink", F.softshrink),
    Sample("sigmoid", torch.sigmoid),
    Sample("tanh", torch.tanh),
    Sample("log_sigmoid", F.logsigmoid),
    Sample("glu", lambda x: F.glu(x, 1)),
    Sample("alpha_dropout", lambda x: F.alpha_dropout(x, training=True)),
    Sample("feature_alpha_dropout", lambda x: F.feature_alpha_dropout(x, training=True)),
    Sample("pad", lambda x: F.pad(x, (1, 1), value=1.0)),
    Sample("constant_pad_nd", lambda x: torch.constant_pad_nd(x, (1, 1), 1.0)),
    Sample("add", lambda x: x + 1),
    Sample("sub", lambda x: x - 1),
]

# The same for a shift: they commute with a scale, or are only homogeneous.
NOT_SHIFTED = [
    Sample("relu", F.relu),
    Sample("leaky_relu", F.leaky_relu),
    Sample("dropout", lambda x: F.dropout(x, training=True)),
    Sample("feature_dropout", lambda x: F.dropout2d(x, training=True)),
    Sample("pad", lambda x: F.pad(x, (1, 1))),
    Sample("constant_pad_nd", lambda x: torch.constant_pad_nd(x, (1, 1))),
    Sample("avg_pool1d", lambda x: F.avg_pool1d(x, 2, padding=1), 1),
    Sample("avg_pool2d", lambda x: F.avg_pool2d(x, 2, padding=1)),
    Sample("avg_pool2d", lambda x: F.avg_pool2d(x, 2, divisor_override=3)),
    Sample("avg_pool3d", lambda x: F.avg_pool3d(x, 2, padding=1), 3),
    Sample("avg_pool3d", lambda x: F.avg_pool3d(x, 2, divisor_override=3), 3),
]

SAMPLES = [*CLAIMED, *NOT_HOMOGENEOUS, *NOT_SHIFTED]


def claims(operator: Operator) -> bool:
    return any(claim.__name__ != "unclaimed" for claim in (operator.homogeneous, operator.scale, operator.shift))


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Return one value for each channel in a shape that multiplies `like`, which may be flattened or concatenated."""
    times = like.shape[1] // CHANNELS
    concatenated = like.ndim == 4 and times == 2
    vector = values.repeat(times) if concatenated else values.repeat_interleave(times)
    return vector.view(1, -1, *[1] * (like.ndim - 2)).to(like.dtype)


def test_every_row_has_the_name_of_an_operation_of_torch() -> None:
    assert {name for name in OPERATORS if not hasattr(aten, name)} == {"getitem"}


def test_pooling_and_resizing_have_a_number_of_positions() -> None:
    with_positions = {row.name for row in OPERATORS.values() if row.role in (Role.POOLING, Role.RESIZING)}
    assert {row.name for row in OPERATORS.values() if row.dims is not None} == with_positions


def test_every_row_with_a_claim_and_every_activation_has_a_sample() -> None:
    needed = {row.name for row in OPERATORS.values() if claims(row) or row.is_activation}
    assert needed <= {sample.name for sample in SAMPLES}
    assert {row.name for row in OPERATORS.values() if claims(row)} <= {sample.name for sample in CLAIMED}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sample", CLAIMED, ids=str)
def test_a_homogeneous_operation_passes_each_channels_power_of_two_on_bit_for_bit(
    sample: Sample, dtype: torch.dtype
) -> None:
    node = sample.node
    if not OPERATORS[sample.name].homogeneous(node):
        assert OPERATORS[sample.name].scale(node)  # it is here for another claim
        return
    x, scale = sample.inputs(dtype), torch.tensor([2.0**exponent for exponent in (-9, 0, 1, 7, -2, 20)])
    expected = sample.output(x)
    assert torch.equal(sample.output(x * per_channel(scale, x)), expected * per_channel(scale, expected))


@pytest.mark.parametrize("sample", CLAIMED, ids=str)
def test_an_operation_that_commutes_with_scale_or_shift_does(sample: Sample) -> None:
    operator, node = OPERATORS[sample.name], sample.node
    assert operator.scale(node) or not operator.shift(node)
    if not operator.scale(node):
        return
    x = sample.inputs()
    scale = torch.tensor([0.7, -3.0, 0.0, 5.1, -0.2, 1.0], dtype=torch.float64)
    scale = scale.abs() if operator.needs_order else scale
    shift = torch.linspace(-4, 9, CHANNELS, dtype=torch.float64) * operator.shift(node)
    expected = sample.output(x)
    torch.testing.assert_close(
        sample.output(x * per_channel(scale, x) + per_channel(shift, x)),
        expected * per_channel(scale, expected) + per_channel(shift, expected),
    )


@pytest.mark.parametrize("sample", [each for each in CLAIMED if OPERATORS[each.name].needs_order], ids=str)
def test_an_operation_that_needs_order_does_not_commute_with_a_negative_scale(sample: Sample) -> None:
    x = sample.inputs()
    assert not torch.allclose(sample.output(-x), -sample.output(x))


@pytest.mark.parametrize("sample", NOT_HOMOGENEOUS, ids=str)
def test_the_nearest_operations_that_are_not_homogeneous_make_no_claim(sample: Sample) -> None:
    operator, node, x = OPERATORS[sample.name], sample.node, sample.inputs()
    assert not any(claim(node) for claim in (operator.homogeneous, operator.scale, operator.shift))
    assert not torch.allclose(sample.output(4 * x), 4 * sample.output(x))


@pytest.mark.parametrize("sample", NOT_SHIFTED, ids=str)
def test_the_nearest_operations_that_do_not_commute_with_a_shift_make_no_claim(sample: Sample) -> None:
    x = sample.inputs()
    assert not OPERATORS[sample.name].shift(sample.node)
    assert not torch.allclose(sample.output(x + 3), sample.output(x) + 3)


@pytest.mark.parametrize("sample", [each for each in SAMPLES if OPERATORS[each.name].elementwise], ids=str)
def test_an_elementwise_operation_changes_one_value_for_one_value(sample: Sample) -> None:
    x = sample.inputs().transpose(2, 3) if sample.name == "contiguous" else sample.inputs()
    changed = x.clone()
    changed[1, 2, 3, 4] += 0.25
    call = (lambda each: each.contiguous()) if sample.name == "contiguous" else sample.output
    elsewhere = torch.ones_like(x, dtype=torch.bool)
    elsewhere[1, 2, 3, 4] = False
    before, after = call(x), call(changed)
    assert before.shape == x.shape
    assert torch.equal(before[elsewhere], after[elsewhere])


ON_POSITIONS = (Role.POOLING, Role.RESIZING, Role.PADDING, Role.REDUCTION)


@pytest.mark.parametrize("sample", [each for each in CLAIMED if OPERATORS[each.name].role in ON_POSITIONS], ids=str)
def test_an_operation_on_positions_keeps_images_and_channels_apart(sample: Sample) -> None:
    x = sample.inputs()
    changed = x.clone()
    changed[1, 2] = sample.inputs(seed=1)[1, 2]
    before, after = sample.output(x), sample.output(changed)
    assert before.shape[:2] == x.shape[:2]
    differs = (before != after).reshape(*x.shape[:2], -1).any(2)
    assert differs.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("sample", [each for each in CLAIMED if OPERATORS[each.name].role is Role.RESHAPE], ids=str)
def test_a_reshape_keeps_every_value_in_its_place_among_all(sample: Sample) -> None:
    x = sample.inputs()[..., :1] if sample.name == "squeeze" else sample.inputs()
    after = sample.output(x)
    assert torch.equal(after.flatten(), x.flatten())
    assert keeps_channels(tuple(x.shape), tuple(after.shape)) != flattens_channels(tuple(x.shape), tuple(after.shape))


@pytest.mark.parametrize("after", [(24, 5, 5), (4, 3, 2, 5, 5), (4, 30, 5), (600,), (1, 4, 150)], ids=str)
def test_a_reshape_that_mixes_channels_or_images_is_recognised(after: tuple[int, ...]) -> None:
    before = (4, CHANNELS, 5, 5)
    assert prod(before) == prod(after)
    assert not keeps_channels(before, after)
    assert not flattens_channels(before, after)


MODULES: dict[type[nn.Module], Callable[[], nn.Module]] = {
    nn.Conv2d: lambda: nn.Conv2d(CHANNELS, 4, 3),
    nn.Linear: lambda: nn.Linear(5, 4),
    nn.BatchNorm1d: lambda: nn.BatchNorm1d(CHANNELS),
    nn.BatchNorm2d: lambda: nn.BatchNorm2d(CHANNELS),
    nn.MaxPool2d: lambda: nn.MaxPool2d(2),
    nn.AvgPool2d: lambda: nn.AvgPool2d(2),
    nn.AdaptiveMaxPool2d: lambda: nn.AdaptiveMaxPool2d(3),
    nn.AdaptiveAvgPool2d: lambda: nn.AdaptiveAvgPool2d(3),
    nn.LocalResponseNorm: lambda: nn.LocalResponseNorm(3),
    nn.ZeroPad2d: lambda: nn.ZeroPad2d(1),
}


@pytest.mark.parametrize("kind", sorted(PER_IMAGE_MODULES, key=lambda kind: kind.__name__))
def test_a_module_that_runs_on_a_few_images_treats_each_by_itself(kind: type[nn.Module]) -> None:
    module = randomised(MODULES.get(kind, kind)()).double()
    x = Sample("", module, positions=1 if kind is nn.BatchNorm1d else 2).inputs()
    names = {row.name for row in OPERATORS.values() if kind in row.module_classes}
    traced = {operation(node) for node in Trace.of(module, x).nodes} - {"getitem"}
    assert names == traced or kind in (nn.Identity, nn.LocalResponseNorm)
    torch.testing.assert_close(torch.cat([module(image) for image in x.split(1)]), module(x), rtol=1e-12, atol=1e-12)
