"""Modes of BatchNorm in training: freeze its statistics, or its statistics and parameters."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import TrainingError

BatchNormMode = Literal["train", "freeze-statistics", "freeze"]


def freeze_batchnorm(model: nn.Module, mode: BatchNormMode) -> None:
    """Set, in place, what training changes in a model's BatchNorms; it applies until the next call.

    `model.train()` in a training loop does not undo it: a hook puts a frozen BatchNorm back in eval mode before each
    forward pass. Copies of the model stay frozen. Call it before creating the optimizer, so that frozen gamma and beta
    get no weight decay, and after `SyncBatchNorm.convert_sync_batchnorm`, which creates new modules.

    Args:
        model: The network to change.
        mode: "train": normalize by the batch, update running statistics, train gamma and beta, like any BatchNorm;
            this undoes the other two.
            "freeze-statistics": normalize by the running statistics without updating them, train gamma and beta.
            "freeze": the same with gamma and beta frozen too.

    Raises:
        TrainingError: If the mode is unknown, or a BatchNorm to be frozen has no running statistics.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> freeze_batchnorm(model, "freeze-statistics")
        >>> before = model[1].running_mean.clone()
        >>> _ = model.train()(torch.rand(16, 4))
        >>> torch.equal(model[1].running_mean, before), model[1].weight.requires_grad
        (True, True)
    """
    if mode not in get_args(BatchNormMode):
        raise TrainingError(f"the mode of BatchNorm must be one of {', '.join(get_args(BatchNormMode))}, not {mode!r}")
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, norm in norms.items():
        if mode != "train" and norm.running_mean is None:
            raise TrainingError(f"BatchNorm {name} keeps no running statistics, so it cannot be frozen")
    for norm in norms.values():
        for key in [key for key, hook in norm._forward_pre_hooks.items() if hook is _hold_in_eval_mode]:
            del norm._forward_pre_hooks[key]
        if mode != "train":
            norm.eval()
            norm.register_forward_pre_hook(_hold_in_eval_mode)
        for parameter in norm.parameters():
            parameter.requires_grad_(mode != "freeze")


def trains_on_batches(module: nn.Module) -> bool:
    """Return whether a module is a BatchNorm that is not frozen, and so normalizes by the batch in train mode."""
    return isinstance(module, _BatchNorm) and _hold_in_eval_mode not in module._forward_pre_hooks.values()


# A module-level function, not a closure: hooks are copied and pickled with a model.
def _hold_in_eval_mode(norm: nn.Module, _inputs: tuple[Any, ...]) -> None:
    norm.training = False
