"""Hold statistics, or statistics and parameters, of BatchNorms still while a network is trained."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import TrainingError

BatchNormMode = Literal["train", "freeze-statistics", "freeze"]


def freeze_batchnorm(model: nn.Module, mode: BatchNormMode) -> None:
    """Say, in place, what training changes in a model's BatchNorms; it holds until the next call.

    mode: "train": normalize by the batch, keep running statistics, train gamma and beta: an ordinary BatchNorm, and the
    way back from the other two. "freeze-statistics": normalize by the running statistics, which stay as they are, and
    train gamma and beta. "freeze": the same, and gamma and beta stay too.

    `model.train()` in a training loop does not undo it: a hook puts a frozen BatchNorm back into eval mode before each
    forward pass. Copies of the model stay frozen. Call it before the optimizer is made, so that gamma and beta which
    are frozen get no weight decay, and after `SyncBatchNorm.convert_sync_batchnorm`, which makes new modules.
    Raises TrainingError for another mode, and for a BatchNorm without running statistics, which cannot be frozen.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    >>> freeze_batchnorm(model, "freeze-statistics")
    >>> before = model[1].running_mean.clone()
    >>> _ = model.train()(torch.rand(16, 4))
    >>> torch.equal(model[1].running_mean, before), model[1].weight.requires_grad
    (True, True)
    """
    if mode not in get_args(BatchNormMode):
        raise TrainingError(f"the mode of BatchNorm is one of {', '.join(get_args(BatchNormMode))}, not {mode!r}")
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, norm in norms.items():
        if mode != "train" and norm.running_mean is None:
            raise TrainingError(f"BatchNorm {name} keeps no running statistics, so that it cannot be frozen")
    for norm in norms.values():
        for key in [key for key, hook in norm._forward_pre_hooks.items() if hook is _hold_in_eval_mode]:
            del norm._forward_pre_hooks[key]
        if mode != "train":
            norm.eval()
            norm.register_forward_pre_hook(_hold_in_eval_mode)
        for parameter in norm.parameters():
            parameter.requires_grad_(mode != "freeze")


def trains_on_batches(module: nn.Module) -> bool:
    """Say whether a module is a BatchNorm that training mode normalizes by the batch: one that is not frozen."""
    return isinstance(module, _BatchNorm) and _hold_in_eval_mode not in module._forward_pre_hooks.values()


# A function of the module, not of an object: hooks are copied and pickled with a model.
def _hold_in_eval_mode(norm: nn.Module, _inputs: tuple[Any, ...]) -> None:
    norm.training = False
