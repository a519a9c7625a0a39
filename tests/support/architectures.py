"""Implementations of VGG and related architectures that the tool supports, each small and with randomised weights.

`python -m benchmarks.architectures` prints a table of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models import VGG
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.models.vgg import make_layers

from . import idioms
from .networks import features, images, randomised, torchvision_vgg


@dataclass(frozen=True)
class Architecture:
    """How to build a network, and a batch of its input.

    folds_exactly: folding restores the original tensors.  note: why it does not, or another peculiarity.  randomise:
    replace the initial weights.  folds: False for a network that folding refuses.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Any] = lambda: images(4, 32)
    folds_exactly: bool = True
    note: str = ""
    randomise: bool = True
    folds: bool = True


class CifarVGG(nn.Module):
    """As in repositories that train VGGs on CIFAR: one dense layer after an average pool that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        convs = make_layers([8, "M", 16, "M", 16, 16, "M"])
        self.features = nn.Sequential(*convs, nn.AvgPool2d(kernel_size=1, stride=1))
        self.classifier = nn.Linear(16 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        return self.classifier(out.view(out.size(0), -1))


class VGGFace(nn.Module):
    """Layers as attributes and functions for everything else, as in VGG-Face."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1_1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv_1_2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv_2_1 = nn.Conv2d(8, 16, 3, padding=1)
        self.fc6 = nn.Linear(16 * 8 * 8, 24)
        self.fc7 = nn.Linear(24, 16)
        self.fc8 = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv_1_1(x))
        x = F.max_pool2d(F.relu(self.conv_1_2(x)), 2, 2)
        x = F.max_pool2d(F.relu(self.conv_2_1(x)), 2, 2)
        x = x.reshape(x.size(0), -1)
        x = F.dropout(F.relu(self.fc6(x)), 0.5, self.training)
        x = F.dropout(F.relu(self.fc7(x)), 0.5, self.training)
        return self.fc8(x)


class VGGFaceViewed(VGGFace):
    """The same, flattened by `x.view`, which channels_last activations do not allow."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv_1_1(x)), 2, 2)
        x = F.max_pool2d(F.relu(self.conv_2_1(F.relu(self.conv_1_2(x)))), 2, 2)
        x = x.view(x.size(0), -1)
        return self.fc8(F.relu(self.fc7(F.relu(self.fc6(x)))))


class LpipsSlices(nn.Module):
    """Slices of a VGG whose children keep their original indices, as in LPIPS, with one output per slice."""

    def __init__(self) -> None:
        super().__init__()
        features = make_layers([8, 8, "M", 16, 16, "M", 16])
        self.slice1, self.slice2, self.slice3 = nn.Sequential(), nn.Sequential(), nn.Sequential()
        for number, module in enumerate(features):
            part = self.slice1 if number < 4 else self.slice2 if number < 9 else self.slice3
            part.add_module(str(number), module)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first = self.slice1(x)
        second = self.slice2(first)
        return first, second, self.slice3(second)


class Encoder(nn.Module):
    """The features of a VGG, with outputs at several depths returned as a dict, a tuple or a list."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.stages = nn.ModuleList([make_layers([8, 8, "M"]), _stage(8, 16), _stage(16, 16)])

    def forward(self, x: Tensor) -> Any:
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return {f"level{n}": output for n, output in enumerate(outputs)} if self.kind is dict else self.kind(outputs)


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )


class UNet(nn.Module):
    """A VGG encoder and a decoder of transposed convs, concatenated level by level."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = make_layers([8, 8]), _stage(8, 16)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ConvTranspose2d(16, 8, 4, stride=4)
        self.join = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(self.pool(first))
        return self.join(torch.cat([first, F.relu(self.up(second))], 1))


class Nested(nn.Module):
    """Nested Sequentials, and layers in a ModuleList and a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_stage(3, 8), nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3)), nn.ReLU()))
        self.more = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)])
        self.heads = nn.ModuleDict({"hidden": nn.Linear(8, 12), "logits": nn.Linear(12, 5)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        for module in self.more:
            x = module(x)
        return self.heads["logits"](F.relu(self.heads["hidden"](F.relu(x).mean((2, 3)))))


class Shared(nn.Module):
    """A conv and a ReLU that are both called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(self.relu(self.conv(self.relu(self.conv(x)))))


class OwnConv(nn.Conv2d):
    """A user's subclass that pads by reflection."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1), mode="reflect"))


class Tokens(nn.Module):
    """Dense layers on 3-D inputs, batch x tokens x channels, and one on the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.mix = nn.Linear(8, 8)
        self.hidden = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.relu(self.embed(x)).flatten(2).transpose(1, 2)
        return self.head(F.relu(self.hidden(F.relu(self.mix(tokens)).mean(1))))


class TakesDict(nn.Module):
    """A forward that takes one dict with all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.mask = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.head(F.relu(self.image(inputs["image"]) + self.mask(inputs["mask"])))}


class TakesTwo(TakesDict):
    """A forward that takes two inputs."""

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward({"image": image, "mask": mask})["logits"]


def _ssd_backbone() -> nn.Module:
    """The backbone of SSD300 on a VGG16 that is narrow except where SSD requires a width."""
    convs = [8, 8, "M", 8, 8, "M", 16, 16, 16, "M", 16, 16, 512, "M", 16, 16, 512, "M"]
    return SSDFeatureExtractorVGG(make_layers(convs), highres=False)


def _uninitialized(make: Callable[..., nn.Module], *arguments: Any, **options: Any) -> nn.Module:
    """A network without initial weights: drawing those of wide layers takes seconds, and others replace them."""
    with torch.device("meta"):
        model = make(*arguments, **options)
    return model.to_empty(device="cpu")


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: _uninitialized(timm.create_model, name, pretrained=False, **options)


def _alexnet() -> nn.Module:
    """torchvision's AlexNet with narrow dense layers, which would otherwise take most of the time."""
    model = _uninitialized(torchvision.models.alexnet, num_classes=10)
    for place, layer in ((1, nn.Linear(256 * 6 * 6, 48)), (4, nn.Linear(48, 32)), (6, nn.Linear(32, 10))):
        model.classifier[place] = layer
    return model


def _timm_vgg(name: str) -> nn.Module:
    """timm's network of this name with narrow dense layers, which would otherwise take nine tenths of the time."""
    model = _uninitialized(timm.create_model, name, pretrained=False, num_classes=10)
    head = model.pre_logits
    head.fc1, head.fc2 = nn.Conv2d(512, 48, 7), nn.Conv2d(48, 32, 1)
    model.head.fc = nn.Linear(32, 10)
    return model


def _dilated() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, dilation in ((3, 8, 1), (8, 16, 1), (16, 16, 2), (16, 16, 4)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(16, 24, 7, padding=3), nn.ReLU(), nn.Dropout2d(), nn.Conv2d(24, 5, 1))


def _convs(conv: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 8, 3, **options), nn.LeakyReLU(), conv(8, 4, 1))


def _weight_normalized() -> nn.Module:
    model = _convs(nn.Conv2d)()
    for module in model:
        if isinstance(module, nn.Conv2d):
            weight_norm(module)
    return model


def _half_normalized() -> nn.Module:
    features = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def _bias_free() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(), _head())


def _head() -> nn.Sequential:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 12, bias=False), nn.ReLU(), nn.Linear(12, 4)
    )


def _four_layer_vgg() -> VGG:
    with torch.device("meta"):  # the default dense layers, which are replaced, would take a second
        vgg = VGG(nn.Identity(), num_classes=1, init_weights=False)
    vgg.features = make_layers([8, "M", 12, "M"])
    vgg.avgpool = nn.AdaptiveAvgPool2d(2)
    vgg.classifier = nn.Sequential(nn.Linear(48, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 10))
    return vgg


def _in(dtype: torch.dtype) -> Architecture:
    return Architecture(
        lambda: _four_layer_vgg().to(dtype),
        lambda: images(4, 32).to(dtype),
    )


def _inputs() -> dict[str, Tensor]:
    return {"image": images(4, 16), "mask": images(4, 16, channels=1)}


def _small(make: Callable[[], nn.Module], **options: Any) -> Architecture:
    return Architecture(make, lambda: images(4, 16), **options)


_TIMM_NOTE = "in channels_last to 1e-6: dense layers are convs whose outputs are N x C x 1 x 1"

ARCHITECTURES: Mapping[str, Architecture] = {
    **{
        f"torchvision {name}": Architecture(lambda name=name: torchvision_vgg(name))
        for name in ("vgg11", "vgg16", "vgg19")
    },
    **{
        f"timm {name}": Architecture(lambda name=name: _timm_vgg(name), note=_TIMM_NOTE)
        for name in ("vgg11", "vgg13", "vgg16", "vgg19")
    },
    "timm vgg11, features only": Architecture(_timm("vgg11", features_only=True)),
    "VGG for CIFAR, one dense layer": Architecture(CifarVGG),
    "VGG-Face style, functions": Architecture(VGGFace),
    "VGG-Face style, x.view": Architecture(VGGFaceViewed),
    "LPIPS slices": Architecture(LpipsSlices),
    "encoder with outputs in a dict": Architecture(lambda: Encoder(dict)),
    "encoder with outputs in a tuple": Architecture(lambda: Encoder(tuple)),
    "encoder with outputs in a list": Architecture(lambda: Encoder(list)),
    "U-Net on a VGG encoder": Architecture(UNet),
    "torchvision alexnet": Architecture(_alexnet, lambda: images(4, 64)),
    "torchvision squeezenet1_1": Architecture(
        lambda: _uninitialized(torchvision.models.squeezenet1_1), lambda: images(4, 64)
    ),
    "torchvision ssd300_vgg16, backbone": Architecture(_ssd_backbone, lambda: images(2, 300)),
    "fully convolutional, dilated": Architecture(_dilated),
    "nested Sequential, ModuleList, ModuleDict": Architecture(Nested),
    "Conv1d": Architecture(_convs(nn.Conv1d), lambda: images(4, 32)[..., 0]),
    "Conv3d": Architecture(_convs(nn.Conv3d), lambda: images(4, 12)[:, :, None].repeat(1, 1, 8, 1, 1)),
    "ConvTranspose2d": Architecture(_convs(nn.ConvTranspose2d)),
    "grouped convs": Architecture(_convs(nn.Conv2d, groups=4)),
    "depthwise convs": Architecture(_convs(nn.Conv2d, groups=8)),
    "a conv called twice": Architecture(Shared),
    "a subclass of Conv2d": Architecture(_convs(OwnConv)),
    "weight_norm": Architecture(_weight_normalized, randomise=False),
    "dense layers on 3-D inputs": Architecture(Tokens),
    "some BatchNorm already": Architecture(
        _half_normalized, folds_exactly=False, note="folding takes the old BatchNorm too"
    ),
    "without biases": Architecture(_bias_free),
    "float64": _in(torch.float64),
    "float16": _in(torch.float16),
    "bfloat16": _in(torch.bfloat16),
    "DataParallel": Architecture(
        lambda: nn.DataParallel(randomised(_four_layer_vgg())), note="result: the module in it"
    ),
    "torch.compile": Architecture(
        lambda: torch.compile(randomised(_four_layer_vgg())), note="result: the module in it"
    ),
    "forward takes a dict": Architecture(TakesDict, _inputs),
    "forward takes two inputs": Architecture(TakesTwo, lambda: tuple(_inputs().values())),
    "a class with its own __call__": _small(idioms.OwnCall),
    "reads attributes of its layers": _small(idioms.ReadsAttributes),
    "reads a child of a Sequential by number": _small(idioms.ReadsByNumber),
    "layers under no_grad": _small(lambda: idioms.InContext(torch.no_grad)),
    "layers under set_grad_enabled": _small(lambda: idioms.InContext(partial(torch.set_grad_enabled, False))),
    "layers under autocast": _small(lambda: idioms.InContext(partial(torch.autocast, "cpu", torch.bfloat16))),
    "fused YOLO: forward as an attribute": _small(idioms.FusedYolo),
    "decides by values": _small(
        idioms.DecidesByValues, folds=False, note="traced with the values of the first batch; fold and equalize refuse"
    ),
    "traced by torch.fx": _small(idioms.traced_by_fx),
    "torchvision create_feature_extractor": _small(idioms.extracted),
    "residual blocks with scalars (Fixup)": _small(idioms.Residual),
    "pre-activation residual blocks": _small(idioms.PreActivation),
    "dense block, concatenated list": _small(idioms.DenseBlock),
    "Inception branches": _small(idioms.Inception),
    "squeeze and excite": _small(idioms.SqueezeExcite),
    "inverted residual, ReLU6 (MobileNet)": _small(idioms.InvertedResidual),
    "channel shuffle (ShuffleNet)": _small(idioms.ChannelShuffle),
    "pixel shuffle (ESPCN)": _small(idioms.PixelShuffled),
    "global residual (VDSR, DnCNN)": _small(idioms.GlobalResidual),
    "residual in residual dense block (ESRGAN)": _small(idioms.ResidualInResidual),
    "autoencoder with a dense code": _small(idioms.Autoencoder),
    "variational encoder": _small(idioms.Variational),
    "NatureCNN (DQN)": _small(idioms.NatureDQN),
    "dueling DQN": _small(idioms.Dueling),
    "actor and critic in a namedtuple": _small(idioms.ActorCritic),
    "LeNet-5": _small(idioms.LeNet),
    "NIN: classes from a conv": _small(idioms.NetworkInNetwork),
    "Siamese network": Architecture(idioms.Siamese, lambda: (images(4, 12), images(4, 12, seed=5))),
    "two views in one batch": _small(idioms.BatchedPair),
    "local descriptors (TFeat)": _small(idioms.Descriptor),
    "feature pyramid (FPN)": _small(idioms.FeaturePyramid),
    "side outputs (HED)": _small(idioms.SideOutputs),
    "scores of two depths (FCN)": _small(idioms.FullyConvolutional),
    "spatial transformer": _small(idioms.SpatialTransformer),
    "maxout (LightCNN)": _small(idioms.Maxout),
    "CReLU": _small(idioms.ConcatenatedReLU),
    "gated convs, GLU": _small(idioms.Gated),
    "attention gate": _small(idioms.AttentionGate),
    "one weight for two convs": _small(idioms.TiedWeights),
    "unpooling by positions (SegNet)": _small(idioms.Unpooling),
    "reflection padding, upsampling (style transfer)": _small(idioms.StyleTransfer),
    "convs over words (TextCNN)": Architecture(idioms.TextCNN, lambda: features(4, 9)),
    "causal Conv1d (TCN)": Architecture(idioms.Causal, lambda: images(4, 16)[..., 0]),
    "volumes (C3D)": Architecture(idioms.Volumes, lambda: images(4, 8)[:, :, None].repeat(1, 1, 4, 1, 1)),
    "torch.utils.checkpoint": _small(idioms.Checkpointed),
    "image pyramid (MTCNN)": _small(idioms.ImagePyramid),
    "auxiliary head in train mode": _small(idioms.AuxiliaryHead),
    "preprocessing in the forward": _small(idioms.NormalizesInput),
    "outputs collected by hooks": _small(idioms.CollectsByHooks),
    "recurrent refinement": _small(idioms.Recurrent),
    "heads by name, LocalResponseNorm": _small(idioms.MultiHead),
    "GELU, Softplus, Mish, Hardswish, SELU": _small(idioms.Mixed),
    "dense layers with skips (DeepSDF)": Architecture(idioms.VectorInput, lambda: features(8, 6)),
    "hourglass": _small(idioms.hourglass),
    "a subclass of Sequential": _small(idioms.NamedSubclass),
    "padding modes of convs": _small(idioms.conv_classes),
    "discriminator of DCGAN": _small(idioms.discriminator),
}


def made(name: str) -> nn.Module:
    """Return the network in eval mode, with weights drawn from a fixed seed."""
    architecture = ARCHITECTURES[name]
    model = architecture.make()
    return randomised(model) if architecture.randomise else model.eval()
