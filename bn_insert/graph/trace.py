"""The graph of a model's operations, and the modules that each operation runs in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CalibrationError, GraphError, out_of_memory
from ..support.text import listed, with_article
from .aliases import InPlaceWrites
from .copies import unchanged_attributes, unwrapped, working_copy
from .inputs import Inputs
from .layers import NormalizedLayer, is_sequence, layer_kind
from .operator_rules import MOVING_AXES, Role, argument, has_role, is_activation, is_layer, multiplies_values, operation
from .quiet_export import no_stack_traces, quiet_export
from .recording import note_call, recorded
from .trace_errors import why_not_traced

# What may be between a layer and the normalization that already belongs to it.
_TRANSPARENT = (Role.ACTIVATION, Role.SQUASHING, Role.GATING, Role.DROPOUT, Role.COPY, Role.POOLING)

# These move values as a whole: whatever normalizes them afterwards normalizes what the layer computed.
_MOVES = {"copy", *MOVING_AXES}

# Most images that a trace runs the network on: not 2 or 3, which could also be a number of channels.
MOST_TRACED = 7

# These place channels next to others, or take some of them, by their argument `dim`.
_SELECTING_CHANNELS = {"cat", "concat", "concatenate", "chunk", "split", "split_with_sizes"}

_NAMES_SHOWN = 5

_REPETITIONS = {"expand", "expand_as", "repeat", "tile"}

# Packages whose modules never cache tensors outside themselves.
_KEEP_NOTHING = ("torch", "torchvision", "bn_insert")
_EXPORTING = threading.RLock()  # torch.export keeps global state


@dataclass(frozen=True)
class Trace:
    """A model's graph of operations, each with the modules that it runs in.

    Attributes:
        model: The traced model, without a wrapper such as DataParallel.
        modules: Its modules by qualified name; of several names of one module, the first.
        aliases: Every qualified name of every module, with the name of that module in `modules`.
        nodes: The operations, in the order in which they run.
        outputs: The nodes whose values the model returns, and those that write to what it returns.
        obstacle: Why torch.export cannot trace the model. The graph then shows what it did with the values of the
            example, as far as PyTorch computed it; empty if the graph shows all that the model does with any values.
        owners: Names of the innermost modules of nodes for which torch.export has no name or a wrong one.
        parameters: Qualified names of the parameters and buffers that the nodes read, by the node that stands for each.
        called: Names of the layers that the forward calls, also of those that none of the nodes belongs to.
        vectorized: Names of those that it calls in `torch.vmap`.
        rereads: By node of an operation in place, the later operations that read what it wrote under any name.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    aliases: dict[str, str]
    nodes: tuple[fx.Node, ...]
    outputs: frozenset[fx.Node]
    obstacle: str = ""
    owners: Mapping[fx.Node, str] = field(default_factory=dict)
    parameters: Mapping[fx.Node, str] = field(default_factory=dict)
    called: frozenset[str] = frozenset()
    vectorized: frozenset[str] = frozenset()
    rereads: Mapping[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, example: Any, *, whole: bool = False) -> Trace:
        """Trace the model in eval mode, without changing it.

        It may also run on the example, see `_real_values_in_caches`.

        Args:
            model: The model to trace.
            example: One batch, as for `insert_batchnorm`; only its shape matters, unless the forward depends on values.
            whole: Trace it for all images of the example, even where a few would do.

        Raises:
            GraphError: The model cannot run on the example, or its operations cannot be recorded. The message states
                the cause.
            CalibrationError: The example is not a batch.
        """
        model = unwrapped(model)
        if not isinstance(example, Inputs | Tensor | Mapping | tuple | list):
            raise CalibrationError(
                f"the example is {with_article(example)}, not a batch; pass the first batch of a loader, "
                "next(iter(loader)), or a tensor such as torch.zeros(1, 3, 224, 224)"
            )
        inputs = Inputs.of(example, 0, model)
        if len(inputs) > MOST_TRACED and not whole:
            with suppress(GraphError):  # a forward may take only batches of one size
                trace = cls._of(model, inputs.rows(0, MOST_TRACED))
                if not trace.obstacle:
                    return trace
        if len(inputs) == 1:
            # Some networks mistake a batch of one for no batch, as with squeeze(): two images show what happens to
            # many.
            try:
                return cls._of(model, inputs.mapped(lambda tensor: torch.cat([tensor, tensor])))
            except Exception as error:
                if not isinstance(error, GraphError) and not out_of_memory(error):
                    raise
                return cls._of(model, inputs)
        return cls._of(model, inputs)

    @classmethod
    def _of(cls, model: nn.Module, inputs: Inputs) -> Trace:
        obstacle, called = "", dict[str, bool]()
        with (
            _EXPORTING,
            quiet_export(),
            no_stack_traces(),
            unchanged_attributes(model),
            _real_values_in_caches(model, inputs),
        ):
            network = working_copy(model, to_trace=True)
            _check_modules_of_eval_mode(model, network)
            try:
                graph, parameters = _flat_graph(_exported(network, inputs, called))
            except Exception as error:  # the user's forward and torch.export may raise anything
                if out_of_memory(error):
                    raise
                obstacle = why_not_traced(model, inputs, error)
                called.clear()
                try:
                    graph, parameters = recorded(model, inputs, called)
                except Exception:  # noqa: BLE001 - the first error is the clearest
                    raise GraphError(obstacle) from error
        output = next(node for node in graph.nodes if node.op == "output")
        nodes = tuple(node for node in graph.nodes if node.op == "call_function")
        first: dict[int, str] = {}
        named = model.named_modules(remove_duplicate=False)
        aliases = {name: first.setdefault(id(module), name) for name, module in named}
        vectorized = frozenset(aliases[name] for name in called if called[name])
        called_names = frozenset(aliases[name] for name in called)
        writes = InPlaceWrites.among(nodes, output.all_input_nodes)
        return cls(
            model,
            dict(model.named_modules()),
            aliases,
            nodes,
            writes.returned.union(output.all_input_nodes),
            obstacle,
            {} if obstacle else _owners_by_weight(model, aliases, nodes, parameters, called_names),
            parameters,
            called_names,
            vectorized,
            writes.readers,
        )

    def module_names(self, node: fx.Node) -> list[str]:
        """Return the qualified names of the modules around a node, outermost (the model, '') first."""
        names = [self.aliases.get(name, name) for name, _ in node.meta.get("nn_module_stack", {}).values()]
        return [*names[:-1], self.owners[node]] if node in self.owners else names

    def owner(self, node: fx.Node) -> str:
        """Return the qualified name of the innermost module around a node."""
        names = self.module_names(node)
        return names[-1] if names else ""

    def layer_nodes(self) -> Iterator[tuple[str, fx.Node]]:
        """Yield (qualified name, node) for every call of a conv or dense module, in order."""
        for node in self.nodes:
            if is_layer(node) and "val" in node.meta:  # what raised an exception has no value
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
        reached = self.downstream(start, _keeps_outputs)
        return any(node in self.outputs and (node is start or _keeps_outputs(node)) for node in reached)

    def leaves_recording(self, start: fx.Node) -> bool:
        """Return whether nothing in a recorded graph shows that this layer is a hidden layer.

        A recording does not show what happens to values outside of PyTorch, as in NumPy: they may become an output.
        """
        reached = self.downstream(start, _keeps_outputs)
        return bool(self.obstacle) and all(node is start or _keeps_outputs(node) for node in reached)

    def reads_weights_of(self, name: str) -> bool:
        """Return whether an operation other than a layer call reads the weight of a module."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        own = {id(each) for _, each in self.modules[name].named_parameters(recurse=False) if each.ndim > 1}
        layers = {node for _, node in self.layer_nodes()}
        return any(
            id(named.get(parameter)) in own and not layers.issuperset(node.users)
            for node, parameter in self.parameters.items()
        )

    def normalization_downstream(self, start: fx.Node) -> str | None:
        """Return the name of the normalization that reads this node's values, directly or after activations and pools.

        The axes may have another order by then, as for the LayerNorm of a ConvNeXt. Channels that are concatenated with
        those of other layers, or divided, belong to the normalizations afterwards if nothing else reads them, as in a
        DenseNet. A normalization that is not a module has the name of its operation.
        """
        found = [node for node in self.downstream(start, _leaves_to_normalization) if _normalizes(node)]
        if not found:
            reached = [node for node in self.downstream(start, _selects_to_normalization) if node is not start]
            if all((_selects_to_normalization(node) and node.users) or _normalizes(node) for node in reached):
                found = [] if self.outputs & {start, *reached} else [*filter(_normalizes, reached)]
        return self.owner(found[0]) or operation(found[0]) if found else None

    def is_gate(self, start: fx.Node) -> bool:
        """Return whether one value per channel of each image, computed from a node, multiplies values at all positions.

        That is so for the layers of a squeeze-and-excite block (Hu et al. 2018, arXiv:1709.01507).
        """

        def has_one_position(node: fx.Node) -> bool:
            value = node.meta.get("val")
            return isinstance(value, torch.Tensor) and all(extent == 1 for extent in value.shape[2:])

        def passes(node: fx.Node) -> bool:
            return has_one_position(node) or has_role(node, Role.RESIZING) or operation(node) in _REPETITIONS

        def multiplies_others(node: fx.Node) -> bool:
            # Multiplied by a constant, or by another value with one position, a value does not gate anything.
            others = (each for each in node.all_input_nodes if each not in reached and not has_one_position(each))
            return multiplies_values(node) and not has_one_position(node) and any(others)

        reached = set(self.downstream(start, passes))
        return has_one_position(start) and any(map(multiplies_others, reached))

    def downstream(self, start: fx.Node, passes: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
        """Yield start and every node that its values reach, continuing past a node only if `passes` allows it.

        Values written into a part of a tensor, as in `x[:, :8] = y`, reach what reads that tensor afterwards.
        """
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
                queue.extend(self.rereads.get(node, ()))

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
        if name == "" or container is None or not is_sequence(container):
            return False
        if isinstance(container, NormalizedLayer):
            return True
        prefix = parent + "." if parent else ""
        children = {prefix + child for child, _ in container.named_children()}
        inside = [names for names in map(self.module_names, self.nodes) if children & set(names)]
        # torch.fx leaves the model itself out of the names.
        return bool(inside) and all(parent in names or not parent for names in inside)


def _keeps_outputs(node: fx.Node) -> bool:
    """Return whether a layer before this operation may still be an output layer."""
    return not is_layer(node) and not has_role(node, Role.ACTIVATION, Role.GATING)


def _leaves_to_normalization(node: fx.Node) -> bool:
    """Return whether a normalization after this operation still belongs to the layer before it."""
    if operation(node) == "flatten":  # of positions, or of channels and positions, but not of images
        source = node.args[0].meta.get("val")  # type: ignore[union-attr]
        return isinstance(source, Tensor) and argument(node, "start_dim") not in (0, -source.ndim)
    return has_role(node, *_TRANSPARENT) or operation(node) in _MOVES


def _selects_to_normalization(node: fx.Node) -> bool:
    """Return whether a normalization after this operation still has all channels of the layer before it, or some."""
    if operation(node) in _SELECTING_CHANNELS:
        ndim = node.all_input_nodes[0].meta["val"].ndim
        return argument(node, "dim") in (1, 1 - ndim)
    return _leaves_to_normalization(node) or operation(node) == "getitem"


def _normalizes(node: fx.Node) -> bool:
    return has_role(node, Role.NORMALIZATION)


@contextmanager
def _real_values_in_caches(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Run a network on real images before a trace and, if it has hooks, after it.

    The tensors of a trace have no values. What a forward caches outside of its modules (in its class, in an
    `lru_cache`) is computed before the trace; what hooks store elsewhere than in the model is replaced after it. The
    modules of PyTorch and torchvision do neither. Caches may have an entry for each number of images, so it takes all.

    Raises:
        GraphError: The forward builds layers that the model does not have yet.
    """
    modules = list(model.modules())
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    if not hooked and all(type(module).__module__.partition(".")[0] in _KEEP_NOTHING for module in modules):
        yield
        return
    network = working_copy(model, to_trace=True)
    before = _names(network)

    def run() -> None:
        with suppress(Exception), torch.random.fork_rng(devices=()), torch.no_grad():  # a trace fails in clearer words
            inputs.run(network)

    run()
    _check_layers_of_first_run(network, before)
    try:
        yield
    finally:
        if hooked:
            run()


def _check_modules_of_eval_mode(model: nn.Module, network: nn.Module) -> None:
    """Raise GraphError if a copy of the model in eval mode has layers that the model does not have."""
    if added := sorted(_names(network) - _names(model)):
        raise GraphError(
            f"{type(model).__name__} builds modules when it is switched to eval mode ({listed(added, _NAMES_SHOWN)}), "
            "as networks do that merge their branches; call model.eval() first"
        )


def _check_layers_of_first_run(network: nn.Module, before: set[str]) -> None:
    """Raise GraphError if a network has conv or dense layers that it did not have before it ran."""
    if added := [name for name in sorted(_names(network) - before) if layer_kind(network.get_submodule(name))]:
        raise GraphError(
            f"{type(network).__name__} builds layers in its first forward pass ({listed(added, _NAMES_SHOWN)}); call "
            "it once on a batch first, also before you load its weights"
        )


def _names(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_modules(remove_duplicate=False)}


def _exported(network: nn.Module, inputs: Inputs, called: dict[str, bool]) -> Any:
    """Return the program of a network, and add the names of the layers and BatchNorms that its forward calls."""
    with ExitStack() as hooks, ExitStack() as attributes:
        # torch.export refuses a forward that keeps a tensor in an attribute, if it is still there afterwards.
        keep = lambda *_: attributes.enter_context(unchanged_attributes(network)) and None  # noqa: E731
        restore = lambda *_: attributes.close()  # noqa: E731
        hooks.callback(network.register_forward_pre_hook(keep).remove)
        hooks.callback(network.register_forward_hook(restore).remove)
        for name, module in network.named_modules():
            if _has_weights(module):
                note = lambda *_, name=name: note_call(called, name)  # noqa: E731
                hooks.callback(module.register_forward_pre_hook(note).remove)
        return torch.export.export(network, inputs.args, dict(inputs.kwargs), strict=False)


# Contexts such as torch.no_grad(): torch.export places what runs in them in a graph of its own. The arguments after
# that graph are its inputs.
_CONTEXTS = {"wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint", "wrap"}


def _flat_graph(program: Any) -> tuple[fx.Graph, dict[fx.Node, str]]:
    """Return a program's graph with the operations of inner graphs in it, and the names of its parameters by node."""
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    flat = fx.Graph()
    values: dict[fx.Node, Any] = {}
    parameters: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            flat.output(fx.node.map_arg(node.args[0], values.__getitem__))
        else:
            _copy_node(node, program.graph_module, flat, values)
        if node.name in names:
            parameters[values[node]] = names[node.name]
    return flat, parameters


def _copy_node(node: fx.Node, owner: nn.Module, flat: fx.Graph, values: dict[fx.Node, Any]) -> None:
    """Append a node to a flat graph; `values` has what stands for each node that came before it."""
    if node.op == "call_function" and operation(node) in _CONTEXTS:
        places = [place for place, each in enumerate(node.args) if isinstance(each, fx.Node) and each.op == "get_attr"]
        if len(places) == 1:
            inner = getattr(owner, str(node.args[places[0]].target))  # type: ignore[union-attr]
            inputs = fx.node.map_arg(node.args[places[0] + 1 :], values.__getitem__)
            placeholders = [each for each in inner.graph.nodes if each.op == "placeholder"]
            if len(placeholders) == len(inputs):
                own = dict(zip(placeholders, inputs, strict=True))
                for each in inner.graph.nodes:
                    if each.op == "output":
                        values[node] = fx.node.map_arg(each.args[0], own.__getitem__)
                    elif each.op != "placeholder":
                        _copy_node(each, inner, flat, own)
                return
    if operation(node) == "getitem" and isinstance(results := values.get(node.args[0]), tuple | list):  # type: ignore[arg-type]
        values[node] = results[node.args[1]]  # type: ignore[index]
        return
    values[node] = flat.node_copy(node, values.__getitem__)


def _owners_by_weight(
    model: nn.Module,
    aliases: Mapping[str, str],
    nodes: tuple[fx.Node, ...],
    parameters: Mapping[fx.Node, str],
    called: frozenset[str],
) -> dict[fx.Node, str]:
    """Return the layers and BatchNorms of operations whose module torch.export names wrongly, known by their weight.

    It does so below a module whose `forward` is an attribute, as after fusing layers. The weight alone does not tell
    whether the module was called, or a function with its weight: that is what `called` is for.
    """
    found: dict[fx.Node, str] = {}
    for node in nodes:
        if not (is_layer(node) or has_role(node, Role.NORMALIZATION)) or len(node.args) < 2:
            continue
        weight = next((each for each in node.args[1:] if isinstance(each, fx.Node) and each in parameters), None)
        if weight is None:
            continue
        by_weight = aliases.get(parameters[weight].rpartition(".")[0])
        stack = list(node.meta.get("nn_module_stack", {}).values())
        by_stack = aliases.get(stack[-1][0]) if stack else None
        if by_weight is None or by_weight not in called or by_weight == by_stack:
            continue
        if by_stack is not None:
            named = model.get_submodule(by_stack)
            tensor = getattr(model.get_submodule(by_weight), parameters[weight].rpartition(".")[2])
            several = any(own is tensor for _, own in named.named_parameters(recurse=False))  # with the same weight
            # torch.fx does not name the children of a Sequential. Any other module may call a function by itself.
            if several or not (_has_weights(named) or is_sequence(named)):
                continue
        found[node] = by_weight
    return found


def _has_weights(module: nn.Module) -> bool:
    """Return whether a module is a layer or a BatchNorm."""
    return layer_kind(module) is not None or isinstance(module, _BatchNorm)
