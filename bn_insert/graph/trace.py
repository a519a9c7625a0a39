"""The graph of a model's operations, and the modules that each operation runs in."""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TextIO, cast

import torch
import torch.fx.config as fx_config
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import CalibrationError, GraphError, as_passed, gradients_advice, out_of_memory
from ..support.text import first_line, listed, with_article
from .copies import check_values, unchanged_attributes, unwrapped, working_copy
from .inputs import Inputs
from .layers import NormalizedLayer, is_sequence, layer_kind
from .operator_rules import Role, has_role, is_activation, is_layer, multiplies_values, operation
from .recording import recorded

# What may be between a layer and the normalization that already belongs to it.
_TRANSPARENT = (Role.ACTIVATION, Role.SQUASHING, Role.GATING, Role.DROPOUT, Role.COPY, Role.POOLING)

_REPETITIONS = {"expand", "expand_as", "repeat", "tile"}
_CHILDREN_SHOWN = 5

# Packages whose modules keep no tensors elsewhere than in themselves.
_KEEP_NOTHING = ("torch", "torchvision", "bn_insert")
_EXPORTING = threading.RLock()  # torch.export keeps global state
# In messages of PyTorch and torchvision on inputs of a height and width that a network cannot take.
_ABOUT_SIZE = re.compile(
    "too small|greater than actual input size|shapes cannot be multiplied|sizes? of tensors? .*must match"
    "|invalid for input of size|less than the corresponding input dimension|(image|input) (height|width|size)",
    re.IGNORECASE,
)
# In messages of PyTorch on a forward that reads values of tensors on the meta device, which have none.
_ON_VALUES = re.compile(r"meta|Tensor\.__format__", re.IGNORECASE)

# What messages of torch.export mean, and what to do about it, in place of the default. Each matches a whole first line,
# with the place in the user's own code if there is one: there, an AttributeError on `meta` is not torch.export's.
_CAUSES = (
    (
        r"Could not (guard on|extract specialized integer from) data-dependent expression .*"
        r"|\.numpy\(\) is not supported for tensor subclasses\..*"
        r"|unsupported format string passed to FakeTensor\.__format__.*",
        "its forward reads values of a tensor, which a trace does not have",
        "",
    ),
    (
        r"Found <class '(?:.*\.)?(?P<name>\w+)'> in output, which is not a known type\..*"
        r"|'(?P<other>\w+)' object has no attribute 'meta'",
        "its forward returns an object of the class {}",
        "Let it return tensors, alone or in a tuple, list or dict; dataclasses need torch.export.register_dataclass",
    ),
    (
        r"State dict entry for parameter (?P<name>\S+) is not an instance of torch\.nn\.Parameter\..*",
        "its parameter {} is not an nn.Parameter, as in TorchScript modules",
        "Replace TorchScript modules with the torch.nn modules they were made from",
    ),
)
# What follows is about PyTorch's internals.
_FOR_PYTORCH = re.compile(
    r"[.;]\s+(see |please |if you |for more |you may have run into |this error ).*|[\s,:;(]*(\bsee:? )?https?://.*",
    re.I,
)


@dataclass(frozen=True)
class Trace:
    """A model's graph of operations, each with the modules that it runs in.

    Attributes:
        model: The traced model, without a wrapper such as DataParallel.
        modules: Its modules by qualified name; of several names of one module, the first.
        aliases: Every qualified name of every module, with the name of that module in `modules`.
        nodes: The operations, in the order in which they run.
        outputs: The nodes whose values the model returns.
        obstacle: Why torch.export cannot trace the model. The graph then shows what it did with the values of the
            example, as far as PyTorch computed it; empty if the graph shows all that the model does with any values.
        owners: Names of the innermost modules of nodes for which torch.export has no name or a wrong one.
        parameters: Qualified names of the parameters and buffers that the nodes read, by the node that stands for each.
        called: Names of the layers that the forward calls, also of those that none of the nodes belongs to.
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

    @classmethod
    def of(cls, model: nn.Module, example: Any) -> Trace:
        """Trace the model in eval mode, without changing it.

        It may also run on two of the images, see `_values_in_what_is_kept`.

        Args:
            model: The model to trace.
            example: One batch, as for `insert_batchnorm`; only its shape matters, unless the forward depends on values.

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
        obstacle, called = "", set[str]()
        with (
            _EXPORTING,
            _quiet_export(),
            _no_stack_traces(),
            unchanged_attributes(model),
            _values_in_what_is_kept(model, inputs),
        ):
            try:
                graph, parameters = _flat_graph(_exported(working_copy(model, to_trace=True), inputs, called))
            except Exception as error:  # the user's forward and torch.export may raise anything
                if out_of_memory(error):
                    raise
                obstacle = _why_not_traced(model, inputs, error)
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
        called = {aliases[name] for name in called}
        return cls(
            model,
            dict(model.named_modules()),
            aliases,
            nodes,
            frozenset(output.all_input_nodes),
            obstacle,
            {} if obstacle else _owners_by_weight(model, aliases, nodes, parameters, called),
            parameters,
            frozenset(called),
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
        """Return whether nothing is known to read a node's values that makes its layer a hidden one.

        A recording does not show what happens to values outside of PyTorch, as in NumPy: they may become an output.
        """
        reached = self.downstream(start, _keeps_outputs)
        return bool(self.obstacle) and all(node is start or _keeps_outputs(node) for node in reached)

    def reads_weights_of(self, name: str) -> bool:
        """Return whether an operation that is no call of a layer reads the weight of a module."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        own = {id(each) for each in self.modules[name].parameters(recurse=False) if each.ndim > 1}
        layers = {node for _, node in self.layer_nodes()}
        return any(
            id(named.get(parameter)) in own and not layers.issuperset(node.users)
            for node, parameter in self.parameters.items()
        )

    def normalization_downstream(self, start: fx.Node) -> str | None:
        """Return the name of the normalization that reads this node's values, directly or after activations and pools.

        A normalization that is no module has the name of its operation.
        """
        for node in self.downstream(start, lambda node: has_role(node, *_TRANSPARENT)):
            if has_role(node, Role.NORMALIZATION):
                return self.owner(node) or operation(node)
        return None

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


@contextmanager
def _values_in_what_is_kept(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Run a network on two images before a trace and, if it has hooks, after it.

    The tensors of a trace have no values. What a forward caches outside of its modules (in its class, in an
    `lru_cache`) is computed before the trace; what hooks store elsewhere than in the model is replaced after it. The
    modules of PyTorch and torchvision do neither.
    """
    modules = list(model.modules())
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    if not hooked and all(type(module).__module__.partition(".")[0] in _KEEP_NOTHING for module in modules):
        yield
        return
    network, images = working_copy(model, to_trace=True), inputs.rows(0, 2)

    def run() -> None:
        with suppress(Exception), torch.random.fork_rng(devices=()), torch.no_grad():  # a trace fails in clearer words
            images.run(network)

    run()
    try:
        yield
    finally:
        if hooked:
            run()


def _exported(network: nn.Module, inputs: Inputs, called: set[str]) -> Any:
    """Return the program of a network, and add the names of the layers and BatchNorms that its forward calls."""
    with ExitStack() as hooks, ExitStack() as attributes:
        # torch.export refuses a forward that keeps a tensor in an attribute, if it is still there afterwards.
        keep = lambda *_: attributes.enter_context(unchanged_attributes(network)) and None  # noqa: E731
        restore = lambda *_: attributes.close()  # noqa: E731
        hooks.callback(network.register_forward_pre_hook(keep).remove)
        hooks.callback(network.register_forward_hook(restore).remove)
        for name, module in network.named_modules():
            if _has_weights(module):
                note = lambda *_, name=name: called.add(name)  # noqa: E731
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
    called: set[str],
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
            several = any(own is tensor for own in named.parameters(recurse=False))  # layers with the same weight
            # torch.fx does not name the children of a Sequential. Any other module may call a function by itself.
            if several or not (_has_weights(named) or is_sequence(named)):
                continue
        found[node] = by_weight
    return found


def _has_weights(module: nn.Module) -> bool:
    """Return whether a module is a layer or a BatchNorm."""
    return layer_kind(module) is not None or isinstance(module, _BatchNorm)


class _SilentInThisThread:
    """A stream that drops what the thread that created it writes; other threads may be showing their progress."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Keep torch.export from also printing the graph and the traceback of an exception that it raises, and warnings."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with redirect_stderr(cast(TextIO, _SilentInThisThread(sys.stderr))):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _no_stack_traces() -> Iterator[None]:
    """Keep torch.export from recording where in the source each node comes from: a seventh of the time, and unused."""
    before = getattr(fx_config, "do_not_emit_stack_traces", False)  # torch 2.11 records them in any case
    fx_config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = before


_LOGGERS = (
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.export",
    "torch._export.non_strict_utils",
)


def _why_not_traced(model: nn.Module, inputs: Inputs, error: Exception) -> str:
    name = type(model).__name__
    try:
        _run_once(model, inputs)
    except GraphError as own:
        return str(own)
    except Exception as own:  # usually the same cause, in clearer words than torch.export's
        if out_of_memory(own):
            raise
        if isinstance(own, NotImplementedError) and 'required "forward"' in str(own):
            inside = [f"model.{child} ({type(module).__name__})" for child, module in model.named_children()]
            return f"{name} has no forward, as a Lightning module that only trains a network; pass that network" + (
                f": {listed(inside, _CHILDREN_SHOWN)}" if inside else ""
            )
        advice = gradients_advice(own) or inputs.conversion or "Pass inputs of the shape that it expects"
        if "too many indices" in str(own) and inputs.only_tensor is not None:  # as PyTorch says for tensor["image"]
            advice += (
                ", and if its forward takes a dict, annotate that parameter as one (batch: dict) to get all values"
            )
        if _ABOUT_SIZE.search(str(own)):
            advice = as_passed(advice, option=f"{advice} (--resize and --crop for image files, --size for inspect)")
        if _lacks_batch_axis(model, inputs):
            advice += ". If this is a single image without a batch axis, add one: image.unsqueeze(0)"
        return f"{name} cannot run on an input of shape {inputs.shapes}: {first_line(own).rstrip('.')}. {advice}"
    place = _place(error)
    cause, advice = _cause(error, place)
    return f"torch.export cannot trace {name} for an input of shape {inputs.shapes}: {cause}{place}. {advice}"


def _run_once(model: nn.Module, inputs: Inputs) -> None:
    """Run a model without torch.export; raises what its forward raises, or GraphError for a lack of values."""
    network = working_copy(model, to_trace=True)
    try:
        with torch.random.fork_rng(devices=()), torch.no_grad():
            inputs.run(network)
    except Exception as error:
        if _ON_VALUES.search(str(error)):
            check_values(model)
        raise


def _cause(error: Exception, place: str) -> tuple[str, str]:
    """Return why torch.export cannot trace a model, and what to do, in plain words where its message is known."""
    advice = "Pass a submodule that contains the layers and has no such code in its forward"
    for pattern, cause, own_advice in _CAUSES:
        if found := re.fullmatch(pattern, first_line(error) + place):
            name = next(filter(None, found.groupdict().values()), "")
            return cause.format(name), own_advice or advice
    return _FOR_PYTORCH.sub("", first_line(error)).rstrip(".:"), advice


def _lacks_batch_axis(model: nn.Module, inputs: Inputs) -> bool:
    """Return whether the first conv of a model takes inputs with one axis more."""
    tensor, conv = inputs.only_tensor, next((each for each in model.modules() if isinstance(each, _ConvNd)), None)
    return tensor is not None and conv is not None and tensor.ndim == len(conv.kernel_size) + 1


def _place(error: Exception) -> str:
    """Return where in the user's own code an exception was raised, for a message; empty if nowhere."""
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(libraries)]
    if not frames or not frames[-1].line:
        return ""
    return f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})"
