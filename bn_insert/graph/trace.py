"""The graph of a model's operations, and the modules that each operation runs in."""

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
from ..support.text import first_line
from .copies import unwrapped, working_copy
from .inputs import Inputs
from .layers import layer_kind
from .operators import Role, has_role, is_activation, is_layer, operation

# What may be between a layer and the normalization that already belongs to it.
_TRANSPARENT = (Role.ACTIVATION, Role.SQUASHING, Role.GATING, Role.DROPOUT, Role.COPY, Role.POOLING)


@dataclass(frozen=True)
class Trace:
    """A model's graph of operations, each with the modules that it runs in.

    Attributes:
        model: The traced model, without a wrapper such as DataParallel.
        modules: Its modules by qualified name; of several names of one module, the first.
        aliases: Every qualified name of every module, with the name of that module in `modules`.
        nodes: The operations, in the order in which they run.
        outputs: The nodes whose values the model returns.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    aliases: dict[str, str]
    nodes: tuple[fx.Node, ...]
    outputs: frozenset[fx.Node]

    @classmethod
    def of(cls, model: nn.Module, example: Any) -> Trace:
        """Trace the model in eval mode, without computing any values and without changing the model.

        Args:
            model: The model to trace.
            example: One batch, as for `insert_batchnorm`; only its shape matters.

        Raises:
            GraphError: The model cannot run on the example, or torch.export cannot trace it. The message has the cause.
        """
        model = unwrapped(model)
        inputs = Inputs.of(example, 0, model)
        try:
            with _quiet_export():
                program = torch.export.export(working_copy(model), inputs.args, dict(inputs.kwargs), strict=False)
        except Exception as error:  # the user's forward and torch.export may raise anything
            raise GraphError(_why_not_traced(model, inputs, error)) from error
        graph = program.graph
        output = next(node for node in graph.nodes if node.op == "output")
        nodes = tuple(node for node in graph.nodes if node.op == "call_function")
        first: dict[int, str] = {}
        named = model.named_modules(remove_duplicate=False)
        aliases = {name: first.setdefault(id(module), name) for name, module in named}
        return cls(model, dict(model.named_modules()), aliases, nodes, frozenset(output.all_input_nodes))

    def module_names(self, node: fx.Node) -> list[str]:
        """Return the qualified names of the modules around a node, outermost (the model, '') first."""
        return [self.aliases.get(name, name) for name, _ in node.meta.get("nn_module_stack", {}).values()]

    def owner(self, node: fx.Node) -> str:
        """Return the qualified name of the innermost module around a node."""
        names = self.module_names(node)
        return names[-1] if names else ""

    def layer_nodes(self) -> Iterator[tuple[str, fx.Node]]:
        """Yield (qualified name, node) for every call of a conv or dense module, in order."""
        for node in self.nodes:
            if is_layer(node):
                name = self.owner(node)
                if name in self.modules and layer_kind(self.modules[name]):
                    yield name, node

    def layers_in_order(self) -> list[tuple[str, nn.Module]]:
        """Return (qualified name, module) of conv and dense layers by their last call, then of those never called."""
        last_first = dict.fromkeys(name for name, _ in reversed(list(self.layer_nodes())))
        called = list(reversed(last_first))
        never = [name for name, module in self.modules.items() if layer_kind(module) and name not in last_first]
        return [(name, self.modules[name]) for name in chain(called, never)]

    def calls_of(self, name: str) -> list[fx.Node]:
        """Return the conv or dense nodes of one layer, one for each call."""
        return [node for owner, node in self.layer_nodes() if owner == name]

    def reaches_output(self, start: fx.Node) -> bool:
        """Return whether a path leads to the model's output with no hidden activation and no other layer on it."""

        def passes(node: fx.Node) -> bool:
            return not is_layer(node) and not has_role(node, Role.ACTIVATION, Role.GATING)

        return any(node in self.outputs and (node is start or passes(node)) for node in self.downstream(start, passes))

    def normalization_downstream(self, start: fx.Node) -> str | None:
        """Return the name of the normalization that reads this node's values, directly or after activations and pools.

        A normalization that is no module has the name of its operation.
        """
        for node in self.downstream(start, lambda node: has_role(node, *_TRANSPARENT)):
            if has_role(node, Role.NORMALIZATION):
                return self.owner(node) or operation(node)
        return None

    def downstream(self, start: fx.Node, passes: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
        """Yield start and every node that its values reach, continuing past a node only if `passes` allows it."""
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
        """Return the name of the activation module that is the only reader of this node's values, if there is one."""
        if len(start.users) != 1:
            return None
        (user,) = start.users
        name = self.owner(user)
        if not is_activation(user) or name == self.owner(start) or name not in self.modules:
            return None
        module = self.modules[name]
        return name if isinstance(module, nn.Module) and not list(module.children()) else None

    def nodes_in(self, name: str) -> list[fx.Node]:
        """Return the nodes whose innermost module has this name."""
        return [node for node in self.nodes if self.owner(node) == name]

    def runs_in_sequence(self, name: str) -> bool:
        """Return whether the module's parent is an nn.Sequential whose own forward runs all its children.

        A slice (`features[:5](x)`) or a loop over the children would select other modules after renumbering.
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
    """Keep torch.export from also printing the traceback of the exception that it raises."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _why_not_traced(model: nn.Module, inputs: Inputs, error: Exception) -> str:
    name, cause = type(model).__name__, first_line(error).rstrip(".")
    try:
        with torch.random.fork_rng(devices=()), torch.inference_mode():
            inputs.run(working_copy(model))
    except Exception as own:  # noqa: BLE001 - usually the same cause, in clearer words than torch.export's
        return (
            f"{name} cannot run on an input of shape {inputs.shapes}: {first_line(own).rstrip('.')}. Pass inputs of "
            "the shape that it expects"
        )
    return (
        f"torch.export cannot trace {name} for an input of shape {inputs.shapes}: {cause}. Pass a submodule that "
        "contains the layers and has no such code in its forward"
    )
