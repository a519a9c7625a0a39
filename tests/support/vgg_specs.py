"""Small VGGs in torchvision's layout, described layer by layer, with BatchNorm in all places where it occurs."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.vgg import VGG

Norm = Literal["none", "before", "after"]


@dataclass(frozen=True)
class Conv:
    width: int = 4
    pool: bool = False
    norm: Norm = "none"
    kernel: int = 3
    bias: bool = True


@dataclass(frozen=True)
class Dense:
    width: int = 6
    dropout: bool = True
    norm: Norm = "none"
    bias: bool = True


@dataclass(frozen=True)
class Spec:
    convs: tuple[Conv, ...] = (Conv(), Conv(5, pool=True), Conv(6))
    dense: tuple[Dense, ...] = (Dense(), Dense(7))
    channels: int = 3
    classes: int = 3
    pooled: int = 2
    leading_dropout: bool = False
    output_norm: bool = False
    output_bias: bool = True


def vgg_of(spec: Spec = Spec(), seed: int = 0) -> VGG:
    """Return a VGG in eval mode, with random weights, BatchNorm statistics, eps, momentum and dropout probabilities."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        vgg = VGG(nn.Identity(), num_classes=1, init_weights=False)
    vgg.features = nn.Sequential(*_features(spec))
    vgg.avgpool = nn.AdaptiveAvgPool2d((spec.pooled, spec.pooled))
    vgg.classifier = nn.Sequential(*_classifier(spec))
    for module in vgg.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.num_batches_tracked += 7
            module.eps, module.momentum = torch.rand(2, generator=generator).double().tolist()
        if isinstance(module, nn.Dropout):
            module.p = torch.rand((), generator=generator).item()
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, generator=generator)
    return vgg.eval()


def images_for(spec: Spec = Spec()) -> Tensor:
    """Return images large enough for all poolings of a VGG."""
    pools = sum(conv.pool for conv in spec.convs[:-1]) + 1
    size = 2**pools * 2
    return torch.rand(2, spec.channels, size, size, generator=torch.Generator().manual_seed(1))


def _features(spec: Spec) -> list[nn.Module]:
    modules: list[nn.Module] = []
    inputs = spec.channels
    for conv in spec.convs:
        modules.append(nn.Conv2d(inputs, conv.width, conv.kernel, padding=conv.kernel // 2, bias=conv.bias))
        modules += _activation(conv.norm, nn.BatchNorm2d(conv.width))
        if conv.pool or conv is spec.convs[-1]:
            modules.append(nn.MaxPool2d(2, 2))
        inputs = conv.width
    return modules


def _classifier(spec: Spec) -> list[nn.Module]:
    modules: list[nn.Module] = [nn.Dropout()] if spec.leading_dropout else []
    inputs = spec.convs[-1].width * spec.pooled**2
    for dense in spec.dense:
        modules.append(nn.Linear(inputs, dense.width, bias=dense.bias))
        modules += _activation(dense.norm, nn.BatchNorm1d(dense.width))
        if dense.dropout:
            modules.append(nn.Dropout())
        inputs = dense.width
    modules.append(nn.Linear(inputs, spec.classes, bias=spec.output_bias))
    if spec.output_norm:
        modules.append(nn.BatchNorm1d(spec.classes))
    return modules


def _activation(norm: Norm, module: nn.Module) -> list[nn.Module]:
    activation = nn.ReLU(inplace=True)
    return {"none": [activation], "before": [module, activation], "after": [activation, module]}[norm]
