"""Parameters with and without weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import TrainingError
from ..graph.copies import check_module
from ..support.arguments import is_number

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, weight_decay: float, norm_weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer: weight decay on weights, none on biases and normalizations.

    After an insertion gamma carries the pretrained scale of a layer, and decay would shrink the layer's outputs.

    Every parameter that requires a gradient is in exactly one group, in the model's order; the others are in none, so
    freeze first. Groups without parameters are left out.

    Args:
        model: The model to be trained.
        weight_decay: Weight decay of weights, 0 or more.
        norm_weight_decay: Weight decay of gamma and beta of BatchNorm and of the other normalizations, 0 or more.

    Returns:
        Dicts with the keys "params" and "weight_decay".

    Raises:
        TrainingError: For a model without trainable parameters, and for a negative decay.
        GraphError: For a model that is not an nn.Module.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> [(len(group["params"]), group["weight_decay"]) for group in parameter_groups(model, 1e-4)]
        [(1, 0.0001), (2, 0.0), (1, 0.0)]
    """
    check_module(model)
    for name, value in (("weight_decay", weight_decay), ("norm_weight_decay", norm_weight_decay)):
        if not (is_number(value) and value >= 0):
            raise TrainingError(f"{name} is {value!r:.40}; use a number, 0 or more")
    weights: list[nn.Parameter] = []
    norms: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            group = norms if isinstance(module, NORMS) else biases if "bias" in name else weights
            group.append(parameter)
    groups = ((weights, weight_decay), (norms, norm_weight_decay), (biases, 0.0))
    result = [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]
    if not result:
        raise TrainingError(
            f"{type(model).__name__} has no parameter that requires a gradient, so there is nothing to train; set "
            "requires_grad on those to be trained"
        )
    return result
