"""Rebuild a VGG from its state dict alone: keys and shapes determine the architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn
from torchvision.models.vgg import VGG

from ..errors import CheckpointError, as_passed
from .settings import Settings
from .state_dict import LAYER_KEY, is_plain

Kind = Literal["conv", "dense", "batchnorm"]
Role = Literal["batchnorm", "activation", "extra"]

_NEEDED = {
    "conv": {"weight"},
    "dense": {"weight"},
    "batchnorm": {"weight", "bias", "running_mean", "running_var"},
}
_POSSIBLE = {
    "conv": {"weight", "bias"},
    "dense": {"weight", "bias"},
    "batchnorm": _NEEDED["batchnorm"] | {"num_batches_tracked"},
}
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

# What follows a layer, by the distances of its BatchNorms from it.
_LAYOUTS: dict[tuple[int, ...], tuple[Role, ...]] = {
    (): ("activation",),
    (1,): ("batchnorm", "activation"),
    (2,): ("activation", "batchnorm"),
}


def vgg_from_state_dict(state_dict: Mapping[str, Tensor], settings: Settings | None = None) -> VGG:
    """Return the VGG with these tensors, in eval mode.

    Modules without parameters leave gaps in the numbering of torchvision's `features.N` and `classifier.N`, from which
    they are recovered: a conv is followed by ReLU, and by MaxPool if there is room for it; a dense layer by ReLU, and
    by Dropout if there is room; a BatchNorm comes before or after the ReLU. The first dense layer may have a Dropout
    before it. The last conv is always followed by ReLU and MaxPool, the last dense layer at most by a BatchNorm. Convs
    have stride 1 and keep the size of the image; pooling is 2x2 with stride 2. Without `classifier` keys the network
    returns the flattened features.

    Args:
        state_dict: Tensors by key. The network uses them without copying.
        settings: eps, momentum and dropout p; by default those of PyTorch, 1e-5, 0.1 and 0.5.

    Raises:
        CheckpointError: The tensors are not those of such a network; the message names the key and the reason.
    """
    layers = _layers(state_dict)
    convs = _blocks([layer for layer in layers if layer.section == "features"])
    dense = _blocks([layer for layer in layers if layer.section == "classifier"])
    _check_chain(convs, dense)
    _check_biases(convs)
    # On the meta device modules take no memory: the default dense layers of VGG, replaced at once, would take 400 MB.
    with torch.device("meta"):
        vgg = VGG(_features(convs), num_classes=1, init_weights=False)
        vgg.avgpool = nn.AdaptiveAvgPool2d(_pooled_size(convs, dense)) if dense else nn.Identity()
        vgg.classifier = _classifier(dense) if dense else nn.Identity()
    tensors = {key: tensor.detach() for key, tensor in state_dict.items()}
    for layer in layers:
        if layer.kind == "batchnorm":  # exists since PyTorch 0.4.1, and some tools cast it with the rest
            key = f"{layer.name}.num_batches_tracked"
            tensors[key] = tensors[key].to(torch.int64) if key in tensors else torch.tensor(0)
    vgg.load_state_dict(tensors, strict=True, assign=True)
    if settings is not None:
        settings.apply_to(vgg)
    return vgg.eval()


def layer_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of conv, dense and BatchNorm layers by their keys in torchvision's layout, without others."""
    return {key: tensor for key, tensor in state_dict.items() if LAYER_KEY.fullmatch(key)}


@dataclass(frozen=True)
class _Layer:
    """A layer with tensors, such as features.3: its section is "features", its index 3."""

    section: str
    index: int
    kind: Kind
    tensors: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        return f"{self.section}.{self.index}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight: output channels first, then input channels."""
        return tuple(self.tensors["weight"].shape)

    def described(self, tensor: str = "weight") -> str:
        return f"{self.name}.{tensor} {tuple(self.tensors[tensor].shape)}"


@dataclass(frozen=True)
class _Block:
    """A conv or dense layer, its BatchNorms, and the next conv or dense layer if there is one."""

    layer: _Layer
    norms: tuple[_Layer, ...]
    following: _Layer | None


def _refuse(reason: str) -> NoReturn:
    raise CheckpointError(
        f"this is not a VGG in torchvision's layout: {reason}; for other architectures pass "
        f"{as_passed('model', option='--model package.module:function')}"
    )


def _layers(state_dict: Mapping[str, Tensor]) -> list[_Layer]:
    """Return the layers in order, each checked on its own."""
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        match = LAYER_KEY.fullmatch(key)
        if match is None:
            _refuse(
                f"the key {key!r:.80} is not features.N or classifier.N with a tensor of a conv, dense or BatchNorm"
            )
        found.setdefault((match["section"], int(match["index"])), {})[match["tensor"]] = tensor
    if not any(section == "features" for section, _ in found):
        _refuse("there are no features.N keys")
    return [_layer(section, index, tensors) for (section, index), tensors in sorted(found.items())]


def _layer(section: str, index: int, tensors: Mapping[str, Tensor]) -> _Layer:
    name = f"{section}.{index}"
    dims = tensors["weight"].dim() if "weight" in tensors else 1
    statistics = not tensors.keys().isdisjoint({"running_mean", "running_var", "num_batches_tracked"})
    kind: Kind = "batchnorm" if statistics or dims == 1 else "conv" if section == "features" else "dense"
    layer = _Layer(section, index, kind, tensors)
    if missing := sorted(_NEEDED[kind] - tensors.keys()):
        has = ", ".join(sorted(tensors))
        _refuse(f"{name}.{missing[0]} is missing, and {name} has only {has}")
    if surplus := sorted(tensors.keys() - _POSSIBLE[kind]):
        _refuse(f"{name}.{surplus[0]} does not belong to a {kind} layer")
    wanted_dims = {"conv": 4, "dense": 2, "batchnorm": 1}[kind]
    if dims != wanted_dims:
        _refuse(f"{layer.described()} should have {wanted_dims} dimensions for a {kind} layer in {section}")
    if 0 in layer.shape:
        _refuse(f"{layer.described()} is empty")
    for tensor in tensors:
        _check_tensor(layer, tensor)
    return layer


def _check_tensor(layer: _Layer, name: str) -> None:
    tensor = layer.tensors[name]
    if not is_plain(tensor):
        _refuse(f"{layer.name}.{name} is sparse, quantized or without values")
    if name == "num_batches_tracked":
        if tensor.dim() != 0 or tensor.is_complex():
            _refuse(f"{layer.described(name)} should be a single integer")
        return
    if tensor.dtype not in _DTYPES:
        _refuse(f"{layer.name}.{name} is {tensor.dtype}; weights must be float16, bfloat16, float32 or float64")
    if name != "weight" and tensor.shape != layer.shape[:1]:
        _refuse(f"{layer.described(name)} does not fit {layer.described()}")
    if layer.kind != "batchnorm" and tensor.dtype != layer.tensors["weight"].dtype:
        _refuse(f"{layer.name}.{name} is {tensor.dtype}, but {layer.name}.weight is {layer.tensors['weight'].dtype}")


def _blocks(layers: Sequence[_Layer]) -> list[_Block]:
    """Return each conv or dense layer of one section with what follows it."""
    if not layers:
        return []
    if layers[0].kind == "batchnorm":
        _refuse(f"{layers[0].name} is a BatchNorm with no layer before it")
    starts = [place for place, layer in enumerate(layers) if layer.kind != "batchnorm"]
    ends = [*starts[1:], len(layers)]
    return [
        _Block(layers[start], tuple(layers[start + 1 : end]), layers[end] if end < len(layers) else None)
        for start, end in zip(starts, ends, strict=True)
    ]


def _check_biases(convs: Sequence[_Block]) -> None:
    """Refuse a conv without bias among convs that have one: the key got lost.

    Two kinds of convs without bias are common: all of a network, and those directly before a BatchNorm, which has one.
    """
    lost = [
        block.layer.name
        for block in convs
        if "bias" not in block.layer.tensors and 1 not in (norm.index - block.layer.index for norm in block.norms)
    ]
    if lost and any("bias" in block.layer.tensors for block in convs):
        _refuse(f"{lost[0]}.bias is missing, and other convs have a bias")


def _check_chain(convs: Sequence[_Block], dense: Sequence[_Block]) -> None:
    for block in (*convs, *dense):
        layer = block.layer
        for norm in block.norms:
            if norm.shape[0] != layer.shape[0]:
                _refuse(f"{norm.described()} does not fit the {layer.shape[0]} channels of {layer.described()}")
        following = block.following
        if following is not None and following.shape[1] != layer.shape[0]:
            _refuse(
                f"{following.described()} takes {following.shape[1]} channels, but {layer.described()} returns "
                f"{layer.shape[0]}"
            )
    for block in convs:
        if block.layer.shape[2:] not in ((3, 3), (1, 1)):
            # Stride and padding of larger kernels are unknown: AlexNet's keys would fit, and its outputs would not.
            _refuse(f"{block.layer.described()} is not a 3x3 or 1x1 kernel")


def _features(blocks: Sequence[_Block]) -> nn.Sequential:
    if blocks[0].layer.index != 0:
        _refuse(f"the first conv is {blocks[0].layer.name}, not features.0")

    def conv(layer: _Layer) -> nn.Conv2d:
        outputs, inputs, size, _ = layer.shape
        return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias="bias" in layer.tensors)

    return nn.Sequential(*_modules(blocks, conv, nn.BatchNorm2d, partial(nn.MaxPool2d, kernel_size=2, stride=2)))


def _classifier(blocks: Sequence[_Block]) -> nn.Sequential:
    first = blocks[0].layer
    if first.index > 1:
        _refuse(f"the first dense layer is {first.name}, but only one Dropout can come before it")

    def dense(layer: _Layer) -> nn.Linear:
        outputs, inputs = layer.shape
        return nn.Linear(inputs, outputs, bias="bias" in layer.tensors)

    leading = [nn.Dropout() for _ in range(first.index)]
    return nn.Sequential(*leading, *_modules(blocks, dense, nn.BatchNorm1d, nn.Dropout))


def _modules(
    blocks: Sequence[_Block],
    layer: Callable[[_Layer], nn.Module],
    batchnorm: Callable[[int], nn.Module],
    extra: Callable[[], nn.Module],
) -> Iterator[nn.Module]:
    for block in blocks:
        yield layer(block.layer)
        for role in _modules_after(block):
            if role == "batchnorm":
                yield batchnorm(block.layer.shape[0])
            elif role == "activation":
                yield nn.ReLU(inplace=True)
            else:
                yield extra()


def _modules_after(block: _Block) -> tuple[Role, ...]:
    """Return the roles of the modules after a layer; "extra" is MaxPool in features, Dropout in classifier."""
    layer, following = block.layer, block.following
    roles = _LAYOUTS.get(tuple(norm.index - layer.index for norm in block.norms))
    if roles is None:
        names = " and ".join(norm.name for norm in block.norms)
        _refuse(f"BatchNorm {names} comes neither directly after {layer.name} nor after its activation")
    if following is not None:
        room = following.index - layer.index - 1 - len(roles)
        if room not in (0, 1):
            extra = "MaxPool" if layer.kind == "conv" else "Dropout"
            _refuse(
                f"there must be an activation and at most one {extra} between {layer.name} and {following.name}, which "
                "does not agree with their numbers"
            )
        return (*roles, "extra") if room else roles
    if layer.kind == "conv":
        return (*roles, "extra")
    if roles[-1] != "activation":
        _refuse(f"BatchNorm {block.norms[0].name} comes after an activation of the last layer {layer.name}")
    return roles[:-1]


def _pooled_size(convs: Sequence[_Block], dense: Sequence[_Block]) -> tuple[int, int]:
    """Return the height and width that each channel must have for the first dense layer."""
    last, first = convs[-1].layer, dense[0].layer
    size = isqrt(first.shape[1] // last.shape[0])
    if size == 0 or size * size * last.shape[0] != first.shape[1]:
        _refuse(
            f"{first.described()} takes {first.shape[1]} values, which is not a square number for each of the "
            f"{last.shape[0]} channels of {last.described()}"
        )
    return size, size
