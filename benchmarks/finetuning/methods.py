"""The methods that are compared: what is done to a pretrained network before it is trained, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bn_insert import insert_batchnorm, recalibrate, set_batchnorm_mode
from bn_insert.surgery.replace_output import output_layer

Kind = Literal["conv", "dense"]


@dataclass(frozen=True)
class Method:
    """One method to fine-tune.

    Attributes:
        title: The method in words.
        layers: After which layers BatchNorm is inserted; none for plain training.
        start: Learning rate at which the search for the best one begins, as an index: 10 ** (start / 2).
        optimizer: "sgd" (momentum 0.9) or "adamw".
        fresh: gamma 1, beta 0 instead of the identity.
        source: Inserted on images of the network's own kind, then re-estimated on the case's.
        renorm: Batch Renormalization without limits in training.
        equalize: Channels scaled first.
        only_batchnorm: Train gamma, beta and the output layer alone.
        dropout: The network's own dropout stays on.
        norm_rate: Learning rate of gamma and beta, as a multiple of that of the weights.
        norm_decay: Weight decay of gamma and beta.
        momentum: Momentum of the running statistics.
        reestimate: Re-estimate the running statistics before each evaluation.
        fit: Fit the output layer to the features before training; otherwise it starts with zeros.
    """

    title: str
    layers: tuple[Kind, ...] = ("conv", "dense")
    start: int = -6
    optimizer: Literal["sgd", "adamw"] = "sgd"
    fresh: bool = False
    source: bool = False
    renorm: bool = False
    equalize: bool = False
    only_batchnorm: bool = False
    dropout: bool = False
    norm_rate: float = 1.0
    norm_decay: float = 0.0
    momentum: float = 0.1
    reestimate: bool = True
    fit: bool = False


PLAIN_SGD = Method("no BatchNorm, SGD", layers=(), start=-6)
PLAIN_ADAMW = Method("no BatchNorm, AdamW", layers=(), start=-8, optimizer="adamw")
IDENTITY = Method("identity BatchNorm", start=-5)
METHODS = {
    "plain SGD, fitted": replace(PLAIN_SGD, title="no BatchNorm, SGD, output layer fitted first", fit=True),
    "plain AdamW, fitted": replace(PLAIN_ADAMW, title="no BatchNorm, AdamW, output layer fitted first", fit=True),
    "identity, fitted": replace(IDENTITY, title="identity BatchNorm, output layer fitted first", fit=True),
    "identity AdamW, fitted": Method(
        "identity BatchNorm, AdamW, output layer fitted first", start=-7, optimizer="adamw", fit=True
    ),
    "plain SGD": PLAIN_SGD,
    "plain SGD, dropout": Method("no BatchNorm, SGD, dropout on", layers=(), start=-6, dropout=True),
    "plain AdamW": PLAIN_ADAMW,
    "plain AdamW, dropout": Method(
        "no BatchNorm, AdamW, dropout on", layers=(), start=-8, optimizer="adamw", dropout=True
    ),
    "fresh": Method("fresh BatchNorm (gamma 1, beta 0)", start=-4, fresh=True),
    "identity": IDENTITY,
    "identity, dropout": Method("identity BatchNorm, dropout on", start=-5, dropout=True),
    "identity AdamW": Method("identity BatchNorm, AdamW", start=-7, optimizer="adamw"),
    "conv alone": Method("identity BatchNorm after conv layers alone", layers=("conv",), start=-5),
    "dense alone": Method("identity BatchNorm after dense layers alone", layers=("dense",), start=-5),
    "renorm": Method("identity, Batch Renormalization", start=-6, renorm=True),
    "equalized": Method("equalized, identity BatchNorm", start=-5, equalize=True),
    "gamma, beta and head": Method(
        "identity; gamma, beta and output layer trained alone", start=-4, only_batchnorm=True
    ),
    "source": Method("inserted on source images, re-estimated on the new ones", start=-5, source=True),
    "source renorm": Method("the same, Batch Renormalization", start=-6, source=True, renorm=True),
    "source, gamma, beta and head": Method(
        "the same; gamma, beta and output layer trained alone", start=-4, source=True, only_batchnorm=True
    ),
    "gamma x0.1": Method("identity, gamma and beta at a tenth of the learning rate", start=-5, norm_rate=0.1),
    "gamma x10": Method("identity, gamma and beta at ten times the learning rate", start=-5, norm_rate=10),
    "gamma decay": Method("identity, weight decay on gamma and beta", start=-5, norm_decay=1e-4),
    "momentum 0.01": Method("identity, momentum 0.01, no re-estimation", start=-5, momentum=0.01, reestimate=False),
    "no re-estimation": Method("identity, no re-estimation", start=-5, reestimate=False),
}


def prepared(network: nn.Module, method: Method, images: Tensor, source: Tensor | None) -> nn.Module:
    """Return the network as its training starts.

    Args:
        network: The pretrained network; it may be changed.
        method: What to do.
        images: Training images to measure statistics on, as the network takes them.
        source: Images of the network's own kind, for methods that want them.
    """
    for module in network.modules():
        if isinstance(module, _DropoutNd) and not method.dropout:
            module.p = 0.0
    if not method.layers:
        return network.train()
    calibration = source if method.source and source is not None else images
    network = insert_batchnorm(
        network, calibration.split(64), layers=method.layers, equalize=method.equalize, momentum=method.momentum
    )
    if method.source:
        network = recalibrate(network, images.split(64))
    if method.fresh:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.reset_parameters()
    if method.renorm:
        set_batchnorm_mode(network, "renorm")
    if method.only_batchnorm:
        network.requires_grad_(False)
        network.get_submodule(output_layer(network).name or "").requires_grad_(True)
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(True)
    return network.train()


def optimizer(network: nn.Module, method: Method, rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return the optimizer; each group's own rate is in `initial_lr`."""
    norms = {id(p) for m in network.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    weights = [p for p in trained if id(p) not in norms and p.ndim > 1]
    biases = [p for p in trained if id(p) not in norms and p.ndim == 1]
    groups = [
        {"params": weights, "lr": rate, "weight_decay": weight_decay},
        {"params": biases, "lr": rate, "weight_decay": 0.0},
        {
            "params": [p for p in trained if id(p) in norms],
            "lr": rate * method.norm_rate,
            "weight_decay": method.norm_decay,
        },
    ]
    groups = [group | {"initial_lr": group["lr"]} for group in groups if group["params"]]
    if method.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, momentum=0.9)
