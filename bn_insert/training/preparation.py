"""The network as it is trained, and its optimizer."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..batchnorm.modes import set_batchnorm_mode
from ..errors import TrainingError
from ..support.processes import Ranks
from ..surgery.output_layer import output_layer, replace_output
from .parameter_groups import parameter_groups
from .settings import TrainingSettings


def prepared_network(
    model: nn.Module, settings: TrainingSettings, classes: int, device: torch.device, ranks: Ranks
) -> nn.Module:
    """Return a copy of a model on its device, with what the settings freeze or change.

    It has float32 in place of half precision, the memory format channels_last, and a new output layer if the model's
    does not have one output per class.

    Raises:
        TrainingError: For settings that the model cannot take.
    """
    network = copy.deepcopy(model)
    if next(network.parameters()).dtype in (torch.float16, torch.bfloat16):
        network.float()  # small steps would be rounded away
    if output_layer(network)[1].out_features != classes:
        replace_output(network, classes)
    network.to(device).to(memory_format=torch.channels_last)
    renorm = settings.batchnorm == "renorm"
    if settings.sync_bn and not renorm:
        if device.type != "cuda":
            raise TrainingError(
                "sync_bn (--sync-bn) works on GPUs only; leave it out, or use it with batchnorm renorm "
                "(--batchnorm renorm)"
            )
        if ranks.count > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    set_batchnorm_mode(network, settings.batchnorm, synchronize=renorm and settings.sync_bn)
    if settings.freeze_features:
        features = _part(network, "features")
        _part(network, "classifier")
        set_batchnorm_mode(features, "freeze")
        features.requires_grad_(requires_grad=False)
    return network


def make_optimizer(network: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return the optimizer of a prepared network."""
    groups = parameter_groups(network, settings.weight_decay, settings.norm_weight_decay)
    if settings.opt == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)


def _part(network: nn.Module, name: str) -> nn.Module:
    part = getattr(network, name, None)
    if not isinstance(part, nn.Module):
        raise TrainingError(
            f"freeze_features (--freeze-features) needs a network with the modules features and classifier, and "
            f"{type(network).__name__} has no {name}"
        )
    return part
