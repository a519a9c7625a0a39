"""The graph of what a network does in one run, for networks that torch.export cannot trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from .compiled import uncompiled
from .copies import deep_copy
from .inputs import Inputs
from .outputs import tensors_of


def recorded(model: nn.Module, inputs: Inputs, called: dict[str, bool]) -> tuple[fx.Graph, dict[fx.Node, str]]:
    """Run a copy of a model in eval mode, and return the graph of its operations and the names of its parameters.

    The operations are those of `torch.export`, with their names and shapes and the modules that they run in, but the
    tensors have values. A forward may therefore do anything with them, such as branch on them, format them or pass them
    to NumPy. Whatever reads values outside of PyTorch is not in the graph.

    Args:
        model: The model; it is not changed.
        inputs: The batch to run it on.
        called: The names of the modules that are called are added to it, see `note_call`.

    Returns:
        The graph, and the qualified name of each parameter or buffer by the nodes that stand for it.
    """
    network = deep_copy(model)  # the forward may change what it has
    network.eval()

    def run(*tensors: Tensor) -> list[Tensor]:
        remaining = iter(tensors)
        copies = inputs.mapped(lambda _: next(remaining))
        return tensors_of(network(*copies.args, **copies.kwargs))

    record = make_fx(run, pre_dispatch=True, _error_on_data_dependent_ops=False)
    with ExitStack() as hooks, uncompiled(), torch.random.fork_rng(devices=()), torch.no_grad():
        for name, module in network.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # they take no hooks
                before, after = _naming_hooks(name, module, called)
                hooks.callback(module.register_forward_pre_hook(before, prepend=True).remove)
                hooks.callback(module.register_forward_hook(after, always_call=True).remove)
        # Tensors of other classes, such as MONAI's MetaTensor, cannot be recorded.
        program = record(*(tensor.clone().as_subclass(Tensor) for tensor in inputs.tensors))
    # A forward may find layers of the original in a global variable.
    tensors = chain.from_iterable((*each.named_parameters(), *each.named_buffers()) for each in (network, model))
    names = {id(tensor): name for name, tensor in tensors}
    read = {node: id(getattr(program, str(node.target))) for node in program.graph.nodes if node.op == "get_attr"}
    return program.graph, {node: names[tensor] for node, tensor in read.items() if tensor in names}


def note_call(called: dict[str, bool], name: str) -> None:
    """Note that a module is called, and whether this, or an earlier call, is in `torch.vmap`."""
    transforms = get_interpreter_stack() or ()
    called[name] = called.get(name, False) or any(each.key() == TransformType.Vmap for each in transforms)


def _naming_hooks(
    name: str, module: nn.Module, called: dict[str, bool]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return hooks that write the name of a module to each node that is recorded while it runs.

    They do it as torch.export does: `nn_module_stack` has the modules around a node, the outermost first.
    """
    last_before: list[fx.Node] = []

    def before(*_: object) -> None:
        note_call(called, name)
        last_before.append(next(iter(reversed(_nodes()))))  # in torch 2.11, no iterator

    def after(*_: object) -> None:
        start = last_before.pop()
        for node in reversed(_nodes()):
            if node is start:
                return
            outer = {name: (name, type(module).__name__)}
            node.meta["nn_module_stack"] = outer | node.meta.get("nn_module_stack", {})

    return before, after


def _nodes() -> Any:
    """Return the nodes that are recorded so far."""
    mode: Any = get_proxy_mode()
    return mode.tracer.graph.nodes
