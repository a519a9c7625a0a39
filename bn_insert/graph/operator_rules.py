"""What each operation of a graph does to channels: one table, read by tracing, equalization, folding, micro-batches.

Adding an operation is one row in `OPERATORS` and one sample in `tests/graph/test_operator_rules.py`, which checks every
claim of the row on numbers. An operation without a row is an obstacle wherever it matters, which is safe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import fx, nn

Condition = Callable[[fx.Node], bool]
"""Whether a claim is true for one call of an operation, which may depend on the arguments of the call."""


class Role(Enum):
    """What an operation does to the channels of its input, which are on axis 1 of a batch."""

    CONV = "mixes all channels by its weights; channels on axis 1"
    DENSE = "mixes all channels by its weights; channels on the last axis"
    NORMALIZATION = "normalizes by statistics"
    ACTIVATION = "each value by itself; a layer before it is a hidden layer"
    SQUASHING = "each value by itself; often the last step of a model, after its output layer"
    GATING = "an activation that multiplies some channels by others"
    DROPOUT = "each value by itself, multiplied by 0 or a constant in train mode, unchanged in eval mode"
    COPY = "each value by itself, unchanged"
    ITEM = "takes one result of an operation that returns several"
    RESHAPE = "the same values in the same order, under another shape"
    POOLING = "combines neighboring positions of a channel; the last `dims` axes are positions"
    RESIZING = "interpolates between positions of a channel; the last `dims` axes are positions"
    PADDING = "adds positions around the last axes"
    REDUCTION = "combines all values along the axes of its argument `dim`"
    CONCATENATION = "places several tensors one after the other along its argument `dim`"
    ARITHMETIC = "combines two tensors value by value"


_ACTIVATIONS = {Role.ACTIVATION, Role.SQUASHING, Role.GATING}
_ELEMENTWISE = {Role.ACTIVATION, Role.SQUASHING, Role.DROPOUT, Role.COPY}


# Operations that give the axes of a tensor another order.
MOVING_AXES = {"permute", "transpose", "mT", "movedim", "moveaxis", "swapaxes", "swapdims"}


def operation(node: fx.Node) -> str:
    """Return an operation's plain name: "conv2d", "relu" (also for the in-place form), ..."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.partition("::")[2].rstrip("_") if schema else getattr(node.target, "__name__", "")


def argument(node: fx.Node, name: str) -> Any:
    """Return the value of an operation's parameter in this call, which may be the parameter's default."""
    for position, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == name:
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, parameter.default_value)
    raise KeyError(f"{node.target} has no parameter {name}")


def writes_in_place(node: fx.Node) -> bool:
    """Return whether an operation overwrites its input, which others may read under another name."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def always(_node: fx.Node) -> bool:
    """The claim is true for every call."""
    return True


def unclaimed(_node: fx.Node) -> bool:
    """Nothing is claimed: the claim is false, or nothing needs it yet."""
    return False


def _in_eval_mode(node: fx.Node) -> bool:
    return not argument(node, "train")


def _bounded_at_zero_by(*parameters: str) -> Condition:
    """Return whether these parameters cut values off at zero or not at all, as in ReLU."""

    def bounded_at_zero(node: fx.Node) -> bool:
        bounds = [argument(node, parameter) for parameter in parameters]
        return all(bound is None or bound in (0, math.inf, -math.inf) for bound in bounds)

    return bounded_at_zero


def _pads_with_values_of_the_input(node: fx.Node) -> bool:
    return operation(node) == "pad" and argument(node, "mode") != "constant"


def _pads_with_zeros_or_values_of_the_input(node: fx.Node) -> bool:
    return _pads_with_values_of_the_input(node) or not argument(node, "value")


def _averages_values_of_the_input(node: fx.Node) -> bool:
    """Return whether each mean is over values of the input only, divided by their number."""
    if operation(node) != "avg_pool1d" and argument(node, "divisor_override") is not None:
        return False
    return not (any(argument(node, "padding")) and argument(node, "count_include_pad"))


def _takes_the_first(node: fx.Node) -> bool:
    return bool(node.args[1] == 0)  # of a pooling that returns values and their positions


@dataclass(frozen=True)
class Operator:
    """One row of the table; the columns are explained above `OPERATORS`."""

    name: str
    role: Role
    homogeneous: Condition = unclaimed
    scale: Condition = unclaimed
    shift: Condition = unclaimed
    needs_order: bool = False
    dims: int | None = None
    per_image: type[nn.Module] | tuple[type[nn.Module], ...] = ()

    @property
    def is_activation(self) -> bool:
        """Whether the operation is an activation function."""
        return self.role in _ACTIVATIONS

    @property
    def elementwise(self) -> bool:
        """Whether each value of the result depends on the value at the same place, and on no other."""
        return self.role in _ELEMENTWISE

    @property
    def module_classes(self) -> tuple[type[nn.Module], ...]:
        """The classes in the column `per_image`."""
        return self.per_image if isinstance(self.per_image, tuple) else (self.per_image,)


# The columns. A claim that is not made counts as false, so that a row with name and role alone is always safe.
#
# name         as torch.export writes it, without the underscore of an in-place form: `operation(node)`.
# role         what the operation does to channels: see `Role`.
# homogeneous  f(s * x) = s * f(x) for each channel's own power of two s, bit for bit. Equalization passes it.
#              No constant other than zero is added, compared with, or cut off at.
# scale        f(a * x) = a * f(x) up to rounding for each channel's own a, negative ones included. Folding needs it.
# shift        f(x + b) = f(x) + b up to rounding for each channel's own b. Folding of a BatchNorm that shifts needs it.
# needs_order  True if `scale` is true only for a >= 0, which preserves the order of values, as for a maximum.
# dims         number of axes that are positions, of a pooling or resizing. With one axis fewer than batch, channels and
#              positions, torch takes the channels for positions.
# per_image    module classes that do no more than this operation and, in eval mode, treat each image by itself:
#              they may run on a few images at a time. Their subclasses may not.
#
# fmt: off
_ROWS = (
    # Layers.
    Operator("conv1d",                     Role.CONV),
    Operator("conv2d",                     Role.CONV, per_image=nn.Conv2d),
    Operator("conv3d",                     Role.CONV),
    Operator("conv_transpose1d",           Role.CONV),
    Operator("conv_transpose2d",           Role.CONV),
    Operator("conv_transpose3d",           Role.CONV),
    Operator("convolution",                Role.CONV),
    Operator("_convolution",               Role.CONV),  # of torch.jit.trace
    Operator("linear",                     Role.DENSE, per_image=nn.Linear),

    # Normalizations.
    Operator("batch_norm",                 Role.NORMALIZATION, per_image=(nn.BatchNorm1d, nn.BatchNorm2d)),
    Operator("_native_batch_norm_legit",   Role.NORMALIZATION),
    Operator("_native_batch_norm_legit_no_training", Role.NORMALIZATION),
    Operator("native_batch_norm",          Role.NORMALIZATION),
    Operator("cudnn_batch_norm",           Role.NORMALIZATION),
    Operator("group_norm",                 Role.NORMALIZATION),
    Operator("instance_norm",              Role.NORMALIZATION),
    Operator("layer_norm",                 Role.NORMALIZATION),
    Operator("native_layer_norm",          Role.NORMALIZATION),
    Operator("rms_norm",                   Role.NORMALIZATION),

    # Activations. nn.ReLU6 is a hardtanh; relu6 is what F.relu6 runs.
    #        name                          role             homogeneous
    Operator("relu",                       Role.ACTIVATION, always, per_image=nn.ReLU),
    Operator("leaky_relu",                 Role.ACTIVATION, always, per_image=nn.LeakyReLU),
    Operator("prelu",                      Role.ACTIVATION, always, per_image=nn.PReLU),
    Operator("rrelu",                      Role.ACTIVATION, always),
    Operator("clamp",                      Role.ACTIVATION, _bounded_at_zero_by("min", "max")),
    Operator("clip",                       Role.ACTIVATION, _bounded_at_zero_by("min", "max")),
    Operator("clamp_min",                  Role.ACTIVATION, _bounded_at_zero_by("min")),
    Operator("clamp_max",                  Role.ACTIVATION, _bounded_at_zero_by("max")),
    Operator("hardtanh",                   Role.ACTIVATION, _bounded_at_zero_by("min_val", "max_val"),
             per_image=(nn.Hardtanh, nn.ReLU6)),
    Operator("threshold",                  Role.ACTIVATION, _bounded_at_zero_by("threshold", "value")),
    Operator("relu6",                      Role.ACTIVATION),
    Operator("elu",                        Role.ACTIVATION, per_image=nn.ELU),
    Operator("selu",                       Role.ACTIVATION, per_image=nn.SELU),
    Operator("celu",                       Role.ACTIVATION),
    Operator("gelu",                       Role.ACTIVATION, per_image=nn.GELU),
    Operator("silu",                       Role.ACTIVATION, per_image=nn.SiLU),
    Operator("mish",                       Role.ACTIVATION),
    Operator("softplus",                   Role.ACTIVATION),
    Operator("hardswish",                  Role.ACTIVATION),
    Operator("hardsigmoid",                Role.ACTIVATION),
    Operator("hardshrink",                 Role.ACTIVATION),
    Operator("softshrink",                 Role.ACTIVATION),
    Operator("sigmoid",                    Role.SQUASHING, per_image=nn.Sigmoid),
    Operator("tanh",                       Role.SQUASHING, per_image=nn.Tanh),
    Operator("log_sigmoid",                Role.SQUASHING),
    Operator("glu",                        Role.GATING),

    # Dropouts. An alpha dropout replaces what it drops by another value than zero.
    #        name                          role          homogeneous    scale          shift
    Operator("dropout",                    Role.DROPOUT, always,        _in_eval_mode, _in_eval_mode,
             per_image=nn.Dropout),
    Operator("feature_dropout",            Role.DROPOUT, always,        _in_eval_mode, _in_eval_mode,
             per_image=nn.Dropout2d),
    Operator("alpha_dropout",              Role.DROPOUT, _in_eval_mode, _in_eval_mode, _in_eval_mode),
    Operator("feature_alpha_dropout",      Role.DROPOUT, _in_eval_mode, _in_eval_mode, _in_eval_mode),

    # Copies and views.
    #        name                          role          homogeneous    scale          shift
    Operator("alias",                      Role.COPY,    always,        always,        always),
    Operator("clone",                      Role.COPY,    always,        always,        always),
    Operator("contiguous",                 Role.COPY,    always,        always,        always),
    Operator("detach",                     Role.COPY,    always,        always,        always),
    Operator("lift_fresh_copy",            Role.COPY,    always,        always,        always),
    Operator("getitem",                    Role.ITEM,    _takes_the_first),
    Operator("flatten",                    Role.RESHAPE, always,        always,        always, per_image=nn.Flatten),
    Operator("unflatten",                  Role.RESHAPE, always,        always,        always),
    Operator("reshape",                    Role.RESHAPE, always,        always,        always),
    Operator("view",                       Role.RESHAPE, always,        always,        always),
    Operator("squeeze",                    Role.RESHAPE, always,        always,        always),
    Operator("unsqueeze",                  Role.RESHAPE, always,        always,        always),

    # Pooling. An adaptive maximum returns values and positions; folding does not follow two results.
    #        name                          role          homogeneous    scale          shift
    Operator("max_pool1d",                 Role.POOLING, always,        always,        always,
             needs_order=True, dims=1),
    Operator("max_pool2d",                 Role.POOLING, always,        always,        always,
             needs_order=True, dims=2, per_image=nn.MaxPool2d),
    Operator("max_pool3d",                 Role.POOLING, always,        always,        always,
             needs_order=True, dims=3),
    Operator("adaptive_max_pool1d",        Role.POOLING, always, dims=1),
    Operator("adaptive_max_pool2d",        Role.POOLING, always, dims=2, per_image=nn.AdaptiveMaxPool2d),
    Operator("adaptive_max_pool3d",        Role.POOLING, always, dims=3),
    Operator("avg_pool1d",                 Role.POOLING, always,        always,        _averages_values_of_the_input,
             dims=1),
    Operator("avg_pool2d",                 Role.POOLING, always,        always,        _averages_values_of_the_input,
             dims=2, per_image=nn.AvgPool2d),
    Operator("avg_pool3d",                 Role.POOLING, always,        always,        _averages_values_of_the_input,
             dims=3),
    Operator("adaptive_avg_pool1d",        Role.POOLING, always,        always,        always, dims=1),
    Operator("adaptive_avg_pool2d",        Role.POOLING, always,        always,        always, dims=2,
             per_image=nn.AdaptiveAvgPool2d),
    Operator("adaptive_avg_pool3d",        Role.POOLING, always,        always,        always, dims=3),

    # Other operations on positions. Folding has not needed resizing and reductions so far.
    Operator("pad",                        Role.PADDING, _pads_with_zeros_or_values_of_the_input,
             _pads_with_zeros_or_values_of_the_input, _pads_with_values_of_the_input, per_image=nn.ZeroPad2d),
    Operator("constant_pad_nd",            Role.PADDING, _pads_with_zeros_or_values_of_the_input,
             _pads_with_zeros_or_values_of_the_input),
    Operator("upsample_nearest1d",         Role.RESIZING, always, dims=1),
    Operator("upsample_nearest2d",         Role.RESIZING, always, dims=2),
    Operator("upsample_nearest3d",         Role.RESIZING, always, dims=3),
    Operator("_upsample_nearest_exact1d",  Role.RESIZING, always, dims=1),
    Operator("_upsample_nearest_exact2d",  Role.RESIZING, always, dims=2),
    Operator("_upsample_nearest_exact3d",  Role.RESIZING, always, dims=3),
    Operator("upsample_linear1d",          Role.RESIZING, always, dims=1),
    Operator("upsample_bilinear2d",        Role.RESIZING, always, dims=2),
    Operator("upsample_bicubic2d",         Role.RESIZING, always, dims=2),
    Operator("upsample_trilinear3d",       Role.RESIZING, always, dims=3),
    Operator("mean",                       Role.REDUCTION, always),
    Operator("sum",                        Role.REDUCTION, always),
    Operator("amax",                       Role.REDUCTION, always),

    # Several tensors. A concatenation is homogeneous in each of them.
    Operator("cat",                        Role.CONCATENATION, always),
    Operator("concat",                     Role.CONCATENATION, always),
    Operator("concatenate",                Role.CONCATENATION, always),
    Operator("add",                        Role.ARITHMETIC),
    Operator("sub",                        Role.ARITHMETIC),
    Operator("mul",                        Role.ARITHMETIC),
    Operator("div",                        Role.ARITHMETIC),
)
# fmt: on

OPERATORS = {row.name: row for row in _ROWS}

PER_IMAGE_MODULES = frozenset(each for row in _ROWS for each in row.module_classes) | {
    nn.Identity,  # no operation at all
    nn.LocalResponseNorm,  # several, each of which treats images by themselves
}
"""Classes of modules that, in eval mode, treat each image of a batch by itself."""


def operator_of(node: fx.Node) -> Operator | None:
    """Return an operation's row, or None for an operation that the table does not have."""
    return OPERATORS.get(operation(node))


def has_role(node: fx.Node, *roles: Role) -> bool:
    """Return whether an operation has one of these roles; an operation without a row has none."""
    operator = operator_of(node)
    return operator is not None and operator.role in roles


def multiplies_values(node: fx.Node) -> bool:
    """Return whether an operation multiplies tensors value by value, also as an einsum that sums over nothing."""
    if operation(node) != "einsum":
        return operation(node) == "mul"
    factors, _, product = argument(node, "equation").partition("->")
    return {letter for letter in factors if letter.isalpha()} <= set(product)


def is_layer(node: fx.Node) -> bool:
    """Return whether an operation is that of a conv or dense layer."""
    return has_role(node, Role.CONV, Role.DENSE)


def layer_parameters(layer: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """Yield ("weight", node) and, if it has a bias, ("bias", node) for a call of a conv or dense layer."""
    for name in ("weight", "bias"):
        if isinstance(tensor := argument(layer, name), fx.Node):
            yield name, tensor


def is_activation(node: fx.Node) -> bool:
    """Return whether an operation is an activation function."""
    return (operator := operator_of(node)) is not None and operator.is_activation


def fits_positions(node: fx.Node, shape: tuple[int, ...]) -> bool:
    """Return whether a pooling, resizing or padding of a tensor of this shape leaves batch and channels alone."""
    operator = operator_of(node)
    if operator is None:
        return False
    if operator.role is Role.PADDING:
        return len(argument(node, "pad")) <= 2 * (len(shape) - 2)
    return operator.dims is not None and len(shape) == 2 + operator.dims


def keeps_channels(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Return whether a reshape changes only positions, and leaves batch and channels on axes 0 and 1."""
    return before[:2] == after[:2]


def flattens_channels(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Return whether a reshape places the positions of each channel one after the other on axis 1."""
    return len(before) >= 2 and after == (before[0], math.prod(before[1:]))
