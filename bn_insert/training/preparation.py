"""The network as it is trained, and its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..batchnorm.batch_renorm import BatchRenorm, can_renormalize
from ..batchnorm.modes import BatchNormMode, set_batchnorm_mode
from ..batchnorm.renorm_limits import RenormScheduler, set_renorm_limits
from ..errors import TrainingError, as_passed
from ..graph.copies import deep_copy
from ..support.processes import Ranks
from ..surgery.replace_output import OutputLayer, replace_dense_layers, replace_output_layer
from .parameter_groups import parameter_groups
from .settings import Trained, TrainingSettings

# With batches of 4, a network with 14 BatchNorms lost in training what it knew, and kept it with Batch Renormalization;
# with batches of 16, the two were equal (benchmarks/finetuning).
_SMALLEST_TO_NORMALIZE_BY = 8


def batchnorm_mode(model: nn.Module, settings: TrainingSettings) -> BatchNormMode:
    """Return what BatchNorms do in training: the mode of the settings or, if they have none, that for the batch size.

    Batch Renormalization corrects towards the running statistics, which a BatchNorm that is new does not have yet.

    Raises:
        TrainingError: For Batch Renormalization where there is no BatchNorm.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if settings.batchnorm is not None:
        if settings.batchnorm == "renorm" and not norms and settings.head is None:
            raise TrainingError(
                f"{type(model).__name__} has no BatchNorm for {as_passed('batchnorm', 'renorm')}; insert it first "
                "(bn-insert insert), or leave that out"
            )
        return settings.batchnorm
    small = settings.batch_size < _SMALLEST_TO_NORMALIZE_BY and settings.head is None and not settings.sync_bn
    return "renorm" if small and norms and all(map(_has_statistics, norms)) else "train"


def _has_statistics(norm: _BatchNorm) -> bool:
    """Return whether Batch Renormalization can correct towards the running statistics of a BatchNorm."""
    if not can_renormalize(norm):
        return False
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    return bool((mean != 0).any() or (var != 1).any())


def prepared_network(
    model: nn.Module,
    output: OutputLayer,
    settings: TrainingSettings,
    classes: int,
    *,
    device: torch.device,
    ranks: Ranks,
) -> tuple[nn.Module, str | None]:
    """Return a copy of a model on its device, with what the settings freeze or change.

    It is in float32 instead of half precision, and has the new head of the settings, or a new output layer if the
    model's does not have one output per class.

    Args:
        model: The model, not wrapped.
        output: Its output layer.
        settings: The settings, with what BatchNorms do.
        classes: Number of classes.
        device: Where the copy is trained.
        ranks: The processes that train it.

    Returns:
        The copy, and the name of its output layer; None if it has none, see `OutputLayer`.

    Raises:
        TrainingError: For settings that the model cannot take.
    """
    network = deep_copy(model)
    if next(network.parameters()).dtype in (torch.float16, torch.bfloat16):
        network.float()  # small steps would be rounded away
    head = _head(network, output, settings, classes)
    network.to(device)
    mode = cast(BatchNormMode, settings.batchnorm)
    renorm = mode == "renorm"
    if settings.sync_bn and not renorm:
        if device.type != "cuda":
            raise TrainingError(
                f"{as_passed('sync_bn')} works on GPUs only; leave it out, or use it with "
                f"{as_passed('batchnorm', 'renorm')}"
            )
        if ranks.count > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    set_batchnorm_mode(network, mode, synchronize=renorm and settings.sync_bn)
    if settings.renorm_limits:
        set_renorm_limits(network, *settings.renorm_limits)
    if settings.head is not None and mode.startswith("freeze"):
        for name in head:
            set_batchnorm_mode(network.get_submodule(name), "train")  # nothing is known yet that could be frozen
    if settings.train != "all":
        _freeze_but(network, head, settings.train)
    if settings.freeze_features:
        features = _part(network, "features")
        _part(network, "classifier")
        set_batchnorm_mode(features, "freeze")
        features.requires_grad_(requires_grad=False)
    return network, head[-1] if head else None


def replaces_output(output: OutputLayer, settings: TrainingSettings, classes: int) -> bool:
    """Return whether a run gives a model a new output layer on its own other layers."""
    return settings.head is None and output.outputs != classes


def _head(network: nn.Module, output: OutputLayer, settings: TrainingSettings, classes: int) -> list[str]:
    """Give a network its head, in place, and return the names of the head's modules; the last is the output layer.

    There are none if the network has no output layer, see `OutputLayer`.
    """
    if settings.head is not None:
        return replace_dense_layers(network, output, settings.head, classes)
    if replaces_output(output, settings, classes):
        return [replace_output_layer(network, output, classes)]
    if settings.train == "head":
        output.found(network, f"there is no head to train; leave out {as_passed('train', 'head')}")
    return [output.name] if output.name else []


def _freeze_but(network: nn.Module, head: Sequence[str], trained: Trained) -> None:
    """Freeze all parameters but those of the head and, for "batchnorm", gamma and beta."""
    kept = {id(parameter) for name in head for parameter in network.get_submodule(name).parameters()}
    norms = {name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)}
    if trained == "batchnorm":
        if not norms:
            raise TrainingError(
                f"{type(network).__name__} has no BatchNorm to train; insert it first (bn-insert insert), or use "
                f"{as_passed('train', 'head')}"
            )
        kept |= {id(parameter) for norm in norms.values() for parameter in norm.parameters()}
    else:
        for name, norm in norms.items():
            if name not in head:
                set_batchnorm_mode(norm, "freeze")
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)


def make_renorm_scheduler(network: nn.Module, settings: TrainingSettings) -> RenormScheduler | None:
    """Return what sets the limits of a prepared network's Batch Renormalization; None if nothing has to."""
    renormalizes = any(isinstance(module, BatchRenorm) for module in network.modules())
    return RenormScheduler(network) if renormalizes and not settings.renorm_limits else None


def make_optimizer(network: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return the optimizer of a prepared network; each step sets the learning rate."""
    groups = parameter_groups(network, settings.weight_decay, settings.norm_weight_decay)
    if settings.opt == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, momentum=settings.momentum)


def _part(network: nn.Module, name: str) -> nn.Module:
    part = getattr(network, name, None)
    if not isinstance(part, nn.Module):
        raise TrainingError(
            f"{as_passed('freeze_features')} needs a network with the modules features and "
            f"classifier, and {type(network).__name__} has no {name}"
        )
    return part
