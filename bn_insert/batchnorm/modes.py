"""Modes of BatchNorm in training: normalize by the batch, renormalize, or freeze statistics or parameters."""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import TrainingError
from ..graph.copies import check_module
from ..support.arguments import check_flags
from .batch_renorm import BATCH_RENORMS, PLAIN_BATCHNORMS, SETTINGS, BatchRenorm, check_can_renormalize, check_limits
from .lag_meter import LagMeter
from .renorm_limits import set_renorm_limits

BatchNormMode = Literal["train", "renorm", "freeze-statistics", "freeze"]


def set_batchnorm_mode(
    model: nn.Module,
    mode: BatchNormMode,
    *,
    r_max: float = math.inf,
    d_max: float = math.inf,
    synchronize: bool = False,
) -> None:
    """Set, in place, how the BatchNorms of a model behave in training, until the next call.

    Eval mode is not affected, and modules, parameters, buffers, the keys of the state dict, hooks and optimizers remain
    valid: only the class of a module changes, from nn.BatchNorm2d to `BatchRenorm2d` and back, or a hook puts a frozen
    BatchNorm back in eval mode before each forward pass. Therefore `model.train()` in a training loop does not undo the
    mode, and copies of the model have it too. Call this function before creating the optimizer, so that frozen gamma
    and beta get no weight decay, and after `SyncBatchNorm.convert_sync_batchnorm`, which creates new modules.

    Args:
        model: The network to change. It need not come from bn-insert: torchvision's vgg16_bn works as well.
        mode: "train": normalize by the batch, update running statistics, train gamma and beta, like any BatchNorm;
            this undoes the other modes.
            "renorm": the same with Batch Renormalization, so that without limits the outputs in train mode are those of
            eval mode for batches of any size, while running statistics are updated, and gamma and beta are trained.
            "freeze-statistics": normalize by the running statistics without updating them, train gamma and beta.
            "freeze": as "freeze-statistics", with gamma and beta frozen too.
        r_max: For "renorm", the limit of r, as for `BatchRenorm2d`.
        d_max: For "renorm", the limit of d, as for `BatchRenorm2d`.
        synchronize: For "renorm", whether to take the statistics over the batches of all processes, as for
            `BatchRenorm2d`.

    Raises:
        TrainingError: If the mode is unknown, a limit is out of range, or a BatchNorm does not support the mode: one
            without running statistics supports only "train", and an nn.SyncBatchNorm or a subclass of nn.BatchNorm
            cannot renormalize. Nothing is changed in that case.
        GraphError: If the model is not a module.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> x = torch.rand(2, 4)
        >>> expected = model.eval()(x)
        >>> set_batchnorm_mode(model, "renorm")
        >>> torch.equal(model.train()(x), expected)
        True
        >>> set_batchnorm_mode(model, "train")
        >>> torch.equal(model.train()(x), expected)
        False
    """
    if mode not in get_args(BatchNormMode):
        raise TrainingError(f"the mode of BatchNorm must be one of {', '.join(get_args(BatchNormMode))}, not {mode!r}")
    check_limits(r_max, d_max)
    check_flags(TrainingError, synchronize=synchronize)
    check_module(model)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, norm in norms.items():
        if mode == "renorm":
            check_can_renormalize(norm, name)
        elif mode != "train" and norm.running_mean is None:
            raise TrainingError(f"BatchNorm {name} keeps no running statistics, so it cannot be frozen")
    for norm in norms.values():
        _undo_mode(norm)
        if mode == "renorm":
            norm.__class__ = BATCH_RENORMS[type(norm)]
            cast(BatchRenorm, norm).synchronize = synchronize
        elif mode != "train":
            norm.eval()
            norm.register_forward_pre_hook(_hold_in_eval_mode)
        for parameter in norm.parameters():
            parameter.requires_grad_(mode != "freeze")
    set_renorm_limits(model, r_max, d_max)


def freeze_batchnorm(model: nn.Module, mode: BatchNormMode) -> None:
    """Call `set_batchnorm_mode`, which used to have this name.

    Args:
        model: The network to change.
        mode: As for `set_batchnorm_mode`.

    Raises:
        TrainingError: As for `set_batchnorm_mode`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> freeze_batchnorm(model, "freeze-statistics")
        >>> before = model[1].running_mean.clone()
        >>> _ = model.train()(torch.rand(16, 4))
        >>> torch.equal(model[1].running_mean, before), model[1].weight.requires_grad
        (True, True)
    """
    set_batchnorm_mode(model, mode)


def uses_batch_statistics(module: nn.Module) -> bool:
    """Return whether a module is a BatchNorm that takes statistics from batches in train mode: one not frozen."""
    return isinstance(module, _BatchNorm) and _hold_in_eval_mode not in module._forward_pre_hooks.values()


def needs_several_values(module: nn.Module) -> bool:
    """Return whether a module needs more than one value per channel in train mode: a BatchNorm in mode "train"."""
    return uses_batch_statistics(module) and not isinstance(module, BatchRenorm)


def _undo_mode(norm: _BatchNorm) -> None:
    for key in [key for key, hook in norm._forward_pre_hooks.items() if hook is _hold_in_eval_mode]:
        del norm._forward_pre_hooks[key]
    if type(norm) in PLAIN_BATCHNORMS:
        norm.__class__ = PLAIN_BATCHNORMS[type(norm)]
        for setting in SETTINGS:
            norm.__dict__.pop(setting, None)


def has_own_pre_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward pre-hooks other than those of a frozen mode and of a RenormScheduler."""
    return any(
        hook is not _hold_in_eval_mode and not isinstance(getattr(hook, "__self__", None), LagMeter)
        for hook in module._forward_pre_hooks.values()
    )


# A module-level function, not a closure: hooks are copied and pickled with a model.
def _hold_in_eval_mode(norm: nn.Module, _inputs: tuple[Any, ...]) -> None:
    norm.training = False
