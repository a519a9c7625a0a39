"""The dropouts whose values a BatchNorm normalizes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from ..graph.operator_rules import Role, has_role
from ..graph.trace import Trace
from .modes import uses_batch_statistics


def dropouts_before_batchnorm(model: nn.Module, example: Any) -> list[str]:
    """Return the names of the active dropout layers whose values a BatchNorm normalizes.

    In train mode, dropout makes the variance of the activations after it larger than in eval mode. A BatchNorm
    downstream then learns statistics that are wrong in eval mode, and normalizes by noisy statistics in train mode.
    Switch these dropouts off (`model.get_submodule(name).p = 0`); BatchNorm is itself a regularizer.

    A dropout counts if a path leads from it to a BatchNorm with no other normalization in between, whatever layers,
    activations and pooling layers are on that path. A BatchNorm in mode "freeze" or "freeze-statistics" normalizes by
    fixed statistics and does not count, nor does a dropout with p = 0, or one that is also on in eval mode. Calls to
    `F.dropout` are not listed, since they have no module to name.

    Args:
        model: The model; it is not changed.
        example: One batch, as for `insert_batchnorm`; only its shape matters.

    Raises:
        GraphError: The model cannot be traced.

    Source: Li, Chen, Hu and Yang, "Understanding the Disharmony between Dropout and Batch Normalization by Variance
    Shift", 2019, arXiv:1801.05134.

    Examples:
        >>> model = nn.Sequential(nn.Dropout(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
        >>> import torch
        >>> dropouts_before_batchnorm(model, torch.zeros(1, 4))
        ['0']
    """
    return dropouts_upstream(Trace.of(model, example))


def dropouts_upstream(trace: Trace, anchors: Collection[str] = ()) -> list[str]:
    """Return what `dropouts_before_batchnorm` returns, for a model that is already traced.

    Args:
        trace: The model.
        anchors: Names of modules that a BatchNorm is about to be inserted after.
    """
    found = dict.fromkeys(map(trace.owner, _upstream(trace, anchors)))
    return [name for name in found if isinstance(module := trace.modules.get(name), _DropoutNd) and module.p > 0]


def dropout_functions_upstream(trace: Trace, anchors: Collection[str] = ()) -> dict[str, float]:
    """Return the dropouts that a forward calls as functions, and whose values a BatchNorm normalizes.

    Args:
        trace: The model.
        anchors: Names of modules that a BatchNorm is about to be inserted after.

    Returns:
        The largest probability, by the name of the module whose forward calls them; the model's own name is empty.
    """
    found: dict[str, float] = {}
    for node in _upstream(trace, anchors):
        owner = trace.owner(node)
        probability = node.args[1] if len(node.args) > 1 else 0.0
        if not isinstance(trace.modules.get(owner), _DropoutNd) and isinstance(probability, float) and probability > 0:
            found[owner] = max(probability, found.get(owner, 0.0))
    return found


def _upstream(trace: Trace, anchors: Collection[str]) -> Iterator[fx.Node]:
    """Yield the calls to dropout from which a path leads to a BatchNorm with no other normalization on it."""

    def normalizes_by_batch(node: fx.Node) -> bool:
        owner = trace.owner(node)
        norm = has_role(node, Role.NORMALIZATION) and owner in trace.modules
        return owner in anchors or (norm and uses_batch_statistics(trace.modules[owner]))

    def passes(node: fx.Node) -> bool:
        return trace.owner(node) not in anchors and not has_role(node, Role.NORMALIZATION)

    for node in trace.nodes:
        # One that is on in eval mode too, as in Monte Carlo dropout, changes nothing between the modes.
        on_in_eval_mode = len(node.args) > 2 and node.args[2] is True
        if (
            has_role(node, Role.DROPOUT)
            and not on_in_eval_mode
            and any(map(normalizes_by_batch, trace.downstream(node, passes)))
        ):
            yield node
