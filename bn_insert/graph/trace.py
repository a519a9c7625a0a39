"""See the model: the graph of its operations, and which modules they happen in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import fx, nn

from ..errors import GraphError
from .copies import unwrapped, working_copy
from .inputs import Inputs
from .layers import layer_kind

_CONVS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"}
_DENSE = {"linear"}
_NORMS = {
    *("batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
    *("group_norm", "layer_norm", "native_layer_norm", "instance_norm", "rms_norm"),
}
_SQUASHERS = {"softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid", "tanh", "log_sigmoid"}
_ACTIVATIONS = {
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus"),
    *("hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink", "threshold", "clamp", "clamp_min", "glu"),
    *("sigmoid", "tanh", "log_sigmoid"),
}
# What may stand between a layer and the normalization that already belongs to it.
_TRANSPARENT = _ACTIVATIONS | {
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "max_pool2d",
    "avg_pool2d",
    "detach",
    "alias",
}


@dataclass(frozen=True)
class Trace:
    """A model's graph of operations, each of which knows the modules that it happens in.

    aliases: every name that a module is held under -> the first of them, which is the one in `modules`.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    aliases: dict[str, str]
    nodes: tuple[fx.Node, ...]
    outputs: frozenset[fx.Node]

    @classmethod
    def of(cls, model: nn.Module, example: Any) -> Trace:
        """Trace the model in eval mode; nothing heavy is computed, and the model is left alone.

        example: a batch, as `insert_batchnorm` takes it; only its shape matters.
        Raises GraphError with the cause when the model cannot run on it, or torch.export cannot see through the model.
        """
        model = unwrapped(model)
        inputs = Inputs.of(example, 0, model)
        try:
            with _quiet_export():
                program = torch.export.export(working_copy(model), inputs.args, dict(inputs.kwargs), strict=False)
        except Exception as error:  # whatever the user's forward or torch.export raises is one fact to us
            raise GraphError(_why_not_seen(model, inputs, error)) from error
        graph = program.graph
        output = next(node for node in graph.nodes if node.op == "output")
        nodes = tuple(node for node in graph.nodes if node.op == "call_function")
        first: dict[int, str] = {}
        held = model.named_modules(remove_duplicate=False)
        aliases = {name: first.setdefault(id(module), name) for name, module in held}
        return cls(model, dict(model.named_modules()), aliases, nodes, frozenset(output.all_input_nodes))

    def module_names(self, node: fx.Node) -> list[str]:
        """Return the qualified names of the modules around a node, outermost (the model, '') first."""
        return [self.aliases.get(name, name) for name, _ in node.meta.get("nn_module_stack", {}).values()]

    def owner(self, node: fx.Node) -> str:
        """Return the qualified name of the innermost module around a node."""
        names = self.module_names(node)
        return names[-1] if names else ""

    def layer_nodes(self) -> Iterator[tuple[str, fx.Node]]:
        """Yield (qualified name, node) of every call of a conv or dense module, in order."""
        for node in self.nodes:
            if operation(node) in _CONVS | _DENSE:
                name = self.owner(node)
                if name in self.modules and layer_kind(self.modules[name]):
                    yield name, node

    def layers_in_order(self) -> list[tuple[str, nn.Module]]:
        """Return conv and dense layers by their last call, then those that are never called."""
        last_first = dict.fromkeys(name for name, _ in reversed(list(self.layer_nodes())))
        called = list(reversed(last_first))
        never = [name for name, module in self.modules.items() if layer_kind(module) and name not in last_first]
        return [(name, self.modules[name]) for name in chain(called, never)]

    def calls_of(self, name: str) -> list[fx.Node]:
        """Return the conv or linear nodes of one layer, one a call."""
        return [node for owner, node in self.layer_nodes() if owner == name]

    def reaches_output(self, start: fx.Node) -> bool:
        """Say whether a path leads to the model's output without a hidden activation or another layer on it."""

        def passes(node: fx.Node) -> bool:
            return operation(node) not in _CONVS | _DENSE | (_ACTIVATIONS - _SQUASHERS)

        return any(node in self.outputs and (node is start or passes(node)) for node in self.reached(start, passes))

    def normalization_behind(self, start: fx.Node) -> str | None:
        """Return the name of the normalization that takes this node's values, maybe behind activations and pools."""
        for node in self.reached(start, lambda node: operation(node) in _TRANSPARENT):
            if operation(node) in _NORMS:
                return self.owner(node) or operation(node)
        return None

    def reached(self, start: fx.Node, passes: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
        """Yield start and every node that its values reach, going on behind a node only if it passes."""
        seen: set[fx.Node] = set()
        queue = [start]
        while queue:
            node = queue.pop()
            if node in seen:
                continue
            seen.add(node)
            yield node
            if node is start or passes(node):
                queue.extend(user for user in node.users if user.op == "call_function")

    def activation_module(self, start: fx.Node) -> str | None:
        """Return the name of the activation module that alone takes this node's values, and takes nothing else."""
        if len(start.users) != 1:
            return None
        (user,) = start.users
        name = self.owner(user)
        if operation(user) not in _ACTIVATIONS or name == self.owner(start) or name not in self.modules:
            return None
        module = self.modules[name]
        return name if isinstance(module, nn.Module) and not list(module.children()) else None

    def nodes_in(self, name: str) -> list[fx.Node]:
        """Return the nodes whose innermost module has this name."""
        return [node for node in self.nodes if self.owner(node) == name]

    def runs_in_sequence(self, name: str) -> bool:
        """Say whether the module's parent is an nn.Sequential whose own forward runs all its children.

        A slice (`features[:5](x)`) or a loop over the children would go wrong after renumbering.
        """
        parent = name.rpartition(".")[0]
        container = self.modules.get(parent)
        if name == "" or container is None or type(container).forward is not nn.Sequential.forward:
            return False
        prefix = parent + "." if parent else ""
        children = {prefix + child for child, _ in container.named_children()}
        inside = [names for names in map(self.module_names, self.nodes) if children & set(names)]
        return all(parent in names for names in inside)


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Keep torch.export from printing the traceback of what it raises anyway."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _why_not_seen(model: nn.Module, inputs: Inputs, error: Exception) -> str:
    name, cause = type(model).__name__, _first_line(error)
    try:
        with torch.random.fork_rng(devices=()), torch.inference_mode():
            inputs.run(working_copy(model))
    except Exception as own:  # noqa: BLE001 - the same as above, and clearer
        return (
            f"{name} cannot run on an input of shape {inputs.shapes}: {_first_line(own)}. Give inputs of the shape "
            "that it takes"
        )
    return (
        f"torch.export cannot see through {name} for an input of shape {inputs.shapes}: {cause}. Pass a submodule that "
        "holds the layers and has no such code in its forward"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def operation(node: fx.Node) -> str:
    """Return an operation's plain name: "conv2d", "relu" (also for the in-place form), ..."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.partition("::")[2].rstrip("_") if schema else getattr(node.target, "__name__", "")


def argument(node: fx.Node, name: str) -> Any:
    """Return what an operation was called with for the parameter of this name, be it only by default."""
    for position, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == name:
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, parameter.default_value)
    raise KeyError(f"{node.target} has no parameter {name}")


def is_activation(node: fx.Node) -> bool:
    """Say whether an operation is an activation function."""
    return operation(node) in _ACTIVATIONS


def writes_in_place(node: fx.Node) -> bool:
    """Say whether an operation changes its input in place, which others may read under another name."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
