"""Small networks in the style of published ones, each with one structure of its own; see `architectures.py`."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.vgg import VGG, make_layers


class OwnCall(nn.Module):
    """A class with its own `__call__`, which runs no hooks of the module (HED in controlnet_aux)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Conv2d(8, 4, 1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


class ReadsAttributes(nn.Module):
    """A forward that reads attributes of its layers: kernel_size (encodec) and the dtype of the weight (CLIP)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        pad = (self.conv2.kernel_size[0] - self.conv2.stride[0]) // 2
        x = F.relu(self.conv1(x.type(self.conv1.weight.dtype)))
        x = F.relu(self.conv2(F.pad(x, (pad, pad))))
        return self.head(F.relu(self.fc(x.mean((2, 3)).to(self.fc.weight.device))))


class ReadsByNumber(nn.Module):
    """A forward that reads the weight of a child of an nn.Sequential by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) * self.features[2].weight.abs().amax()


class InContext(nn.Module):
    """Layers that run in a context such as `torch.no_grad()` (DeDoDe)."""

    def __init__(self, context: Callable[[], Any]) -> None:
        super().__init__()
        self.context = context
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            x = self.features(x)
        return self.head(x.float())


class FusedBlock(nn.Module):
    """A conv whose BatchNorm was fused away: `forward` is an attribute, and all blocks have one activation (YOLO)."""

    activation = nn.SiLU()

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.act = self.activation
        self.forward = self.forward_fuse  # type: ignore[method-assign]

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class FusedYolo(nn.Module):
    """Fused blocks, a residual connection and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = FusedBlock(3, 8)
        self.model = nn.Sequential(FusedBlock(8, 8), FusedBlock(8, 8))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.model(x))


class DecidesByValues(nn.Module):
    """A forward that selects positions by their values, and loops over images (SuperPoint, SSD)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.detector, self.descriptor = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        scores = self.detector(x)[:, 0]
        keypoints = [torch.nonzero(image > image.mean()) for image in scores]
        if any(len(each) == 0 for each in keypoints):
            return scores, scores
        return scores, self.descriptor(x)


class Residual(nn.Module):
    """Residual blocks without normalization, with scalar biases and a multiplier (Fixup)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.bias, self.scale = nn.Parameter(torch.full((1,), 0.1)), nn.Parameter(torch.full((1,), 0.5))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        out = self.conv2(F.relu(self.conv1(x + self.bias)) + self.bias)
        return self.head(F.relu(x + out * self.scale).mean((2, 3)))


class PreActivation(nn.Module):
    """Residual blocks that begin with an activation, and a shortcut conv."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.conv2, self.shortcut = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(8, 12, 1, stride=2)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.conv2(F.relu(self.conv1(F.relu(x))))
        return self.head(F.relu(out + self.shortcut(x)).mean((2, 3)))


class DenseBlock(nn.Module):
    """Every layer reads all earlier ones, concatenated in a list (DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8 + 4 * n, 4, 3, padding=1) for n in range(3))
        self.head = nn.Conv2d(20, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [F.relu(self.stem(x))]
        for layer in self.layers:
            found.append(F.relu(layer(torch.cat(found, 1))))
        return self.head(torch.cat(found, 1))


class Inception(nn.Module):
    """Parallel branches of other kernels, and a pool, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch1 = nn.Conv2d(8, 4, 1)
        self.branch2 = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1))
        self.branch3 = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 4, 1))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(torch.cat([self.branch1(x), self.branch2(x), self.branch3(x)], 1))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class SqueezeExcite(nn.Module):
    """Channels weighted by two convs on their means, whose outputs are N x C x 1 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        weights = torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.head(x * weights)


class InvertedResidual(nn.Module):
    """Pointwise, depthwise and linear convs with ReLU6 (MobileNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.block = nn.Sequential(
            *(nn.Conv2d(8, 16, 1), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(inplace=True), nn.Conv2d(16, 8, 1)),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        return self.head((x + self.block(x)).mean([2, 3]))


class ChannelShuffle(nn.Module):
    """Half of the channels pass by, and groups are mixed by a transposition (ShuffleNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, 1)
        x = torch.cat([left, F.relu(self.branch(right))], 1)
        n, c, h, w = x.shape
        return self.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class PixelShuffled(nn.Module):
    """Super-resolution whose last conv returns channels that become positions (ESPCN)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 5, padding=2), nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.up(torch.tanh(self.conv2(torch.tanh(self.conv1(x))))))


class GlobalResidual(nn.Module):
    """A stack of convs whose output is added to the image (VDSR, DnCNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.last(self.layers(x))


class ResidualInResidual(nn.Module):
    """Dense blocks in scaled residual connections, with LeakyReLU and upsampling (ESRGAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * n, 4 if n < 2 else 8, 3, padding=1) for n in range(3))
        self.up, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.lrelu = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        one = self.lrelu(self.convs[0](first))
        two = self.lrelu(self.convs[1](torch.cat((first, one), 1)))
        body = first + self.convs[2](torch.cat((first, one, two), 1)) * 0.2
        return self.last(self.lrelu(self.up(F.interpolate(body, scale_factor=2, mode="nearest"))))


class Autoencoder(nn.Module):
    """Strided convs down, transposed convs up, a dense bottleneck between views."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.ELU(), nn.Conv2d(8, 8, 4, 2, 1), nn.ELU())
        self.code, self.decode = nn.Linear(128, 16), nn.Linear(16, 128)
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ELU(), nn.ConvTranspose2d(8, 3, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        code = F.elu(self.code(self.down(x).view(len(x), -1)))
        return torch.sigmoid(self.up(F.elu(self.decode(code)).view(-1, 8, 4, 4)))


class Variational(nn.Module):
    """An encoder with two heads, and noise that depends on PyTorch's random state."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.ReLU(), nn.Flatten())
        self.mean, self.log_var = nn.Linear(512, 4), nn.Linear(512, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(x)
        mean, log_var = self.mean(code), self.log_var(code)
        if self.training:
            mean = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        return self.decoder(mean), log_var


class NatureDQN(nn.Module):
    """Three strided convs and two dense layers on pixels that the forward scales (DQN)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 4, stride=2), nn.Conv2d(8, 8, 3)
        self.fc, self.q = nn.Linear(8 * 5 * 5, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x / 255.0))))
        return self.q(F.relu(self.fc(x.reshape(x.shape[0], -1))))


class Dueling(nn.Module):
    """Two streams of dense layers, joined with the mean of one subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.value = nn.Sequential(nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 1))
        self.advantage = nn.Sequential(nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).flatten(1)
        advantage = self.advantage(x)
        return self.value(x) + advantage - advantage.mean(1, keepdim=True)


ActorCriticOutput = namedtuple("ActorCriticOutput", ["policy", "value"])


class ActorCritic(nn.Module):
    """A policy and a value from one trunk, in a namedtuple."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Tanh(), nn.Flatten(), nn.Linear(128, 16), nn.Tanh())
        self.policy, self.value = nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> ActorCriticOutput:
        x = self.trunk(x)
        return ActorCriticOutput(self.policy(x).softmax(-1), self.value(x).squeeze(-1))


class LeNet(nn.Module):
    """LeNet-5: tanh and average pools."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c3 = nn.Conv2d(3, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.f5, self.f6, self.out = nn.Linear(64, 24), nn.Linear(24, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.tanh(self.c1(x)), 2)
        x = F.avg_pool2d(torch.tanh(self.c3(x)), 2)
        return F.log_softmax(self.out(torch.tanh(self.f6(torch.tanh(self.f5(x.view(-1, 64)))))), dim=1)


class NetworkInNetwork(nn.Module):
    """1x1 convs as layers, whose last one returns the classes, and a global average (NIN)."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            *(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True)),
            *(
                nn.AvgPool2d(3, 2, 1, ceil_mode=True),
                nn.Dropout(),
                nn.Conv2d(8, 8, 3, padding=1),
                nn.ReLU(inplace=True),
            ),
            *(nn.Conv2d(8, 10, 1), nn.ReLU(inplace=True), nn.AvgPool2d(8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.classifier(x)
        return x.view(x.size(0), 10)


class Siamese(nn.Module):
    """One branch, called for each of two inputs, whose outputs are subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 8)
        )
        self.head = nn.Linear(8, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.sigmoid(self.head((self.branch(first) - self.branch(second)).abs()))


class BatchedPair(nn.Module):
    """Two views of each image in one batch for the trunk, then apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.trunk(torch.cat([x, x.flip(-1)])).mean((2, 3)).chunk(2)
        return self.head(torch.cat([first, second], 1))


class Descriptor(nn.Module):
    """A local descriptor: normalized patches in, vectors of length 1 out (TFeat, HardNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Tanh())
        self.descr = nn.Sequential(nn.Linear(200, 16), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 1e-7)
        return F.normalize(self.descr(self.features(x).view(x.size(0), -1)), dim=1)


class FeaturePyramid(nn.Module):
    """Lateral convs and a path from the top down, added after interpolation (FPN)."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(n, 8, 3, 2, 1), nn.ReLU()) for n in (3, 8))
        self.lateral = nn.ModuleList(nn.Conv2d(8, 6, 1) for _ in range(2))
        self.smooth = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        low = self.stages[0](x)
        high = self.stages[1](low)
        top = self.lateral[1](high)
        merged = self.lateral[0](low) + F.interpolate(top, size=low.shape[-2:], mode="nearest")
        return [self.smooth[0](merged), self.smooth[1](top)]


class SideOutputs(nn.Module):
    """Edges from every stage, enlarged and fused by a conv (HED)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = make_layers([8, 8]), make_layers([8])
        self.two[0] = nn.Conv2d(8, 8, 3, padding=1)
        self.side1, self.side2, self.fuse = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 1, 1), nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        sides = self.side1(one), F.interpolate(self.side2(two), size=x.shape[2:], mode="bilinear", align_corners=False)
        return tuple(torch.sigmoid(each) for each in (*sides, self.fuse(torch.cat(sides, 1))))


class FullyConvolutional(nn.Module):
    """Scores of two depths, added after a transposed conv and a crop (FCN-16s)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=4), nn.Conv2d(8, 8, 3, padding=1)
        self.score1, self.score2 = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.upscore = nn.ConvTranspose2d(4, 4, 4, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.conv1(x))
        up = self.upscore(self.score2(F.relu(self.conv2(F.max_pool2d(first, 2, ceil_mode=True)))))
        return (up[:, :, 1:17, 1:17] + self.score1(first)[:, :, 3:19, 3:19]).contiguous()


class SpatialTransformer(nn.Module):
    """A network that predicts an affine map, by which grid_sample transforms the image."""

    def __init__(self) -> None:
        super().__init__()
        self.localization = nn.Sequential(nn.Conv2d(3, 8, 7), nn.MaxPool2d(2), nn.ReLU(True))
        self.fc_loc = nn.Sequential(nn.Linear(8 * 5 * 5, 12), nn.ReLU(True), nn.Linear(12, 6), nn.Tanh())
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.fc_loc(self.localization(x).view(-1, 200)).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.size()), align_corners=False), align_corners=False)
        return self.head(F.relu(self.conv(x)).amax((2, 3)))


class Maxout(nn.Module):
    """The larger of two halves of a conv's channels, as the activation (LightCNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 16, 3), nn.Linear(8, 16)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv1, self.conv2):
            x = torch.max(*layer(x).split(8, 1))
        return self.head(torch.max(*self.fc(x.mean((2, 3))).split(8, 1)))


class ConcatenatedReLU(nn.Module):
    """An activation that returns twice the channels (CReLU), and a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 8, 3)
        self.scale, self.head = nn.Parameter(torch.ones(1, 16, 1, 1) * 0.7), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.head(F.relu(self.conv2(torch.cat([F.relu(x), F.relu(-x)], 1) * self.scale)))


class Gated(nn.Module):
    """Convs gated by the sigmoid of another conv (gated convs for inpainting), and a GLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.glu = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.conv(x)) * torch.sigmoid(self.gate(x))
        return self.head(F.glu(self.glu(x), 1))


class AttentionGate(nn.Module):
    """A skip connection weighted by a map from two depths (attention U-Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 2, stride=2)
        self.theta, self.phi, self.psi = nn.Conv2d(8, 4, 2, stride=2), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 1, 1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.skip(x))
        down = F.relu(self.down(skip))
        weights = torch.sigmoid(self.psi(F.relu(self.theta(skip) + self.phi(down))))
        up = F.interpolate(torch.cat([down, down * weights], 1), scale_factor=2.0, mode="bilinear")
        return self.head(up)


class TiedWeights(nn.Module):
    """Two convs, each with its own bias and one weight for both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.second.weight = self.first.weight
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(F.relu(self.stem(x)))))))


class Unpooling(nn.Module):
    """Pooling that returns positions, to which the decoder returns the values (SegNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, places = self.pool(F.relu(self.encode(x)))
        return self.head(F.relu(self.decode(self.unpool(x, places))))


class StyleTransfer(nn.Module):
    """Reflection padding, strided convs, and upsampling before a conv (fast style transfer)."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            *(nn.ReflectionPad2d(2), nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Upsample(scale_factor=2)),
            *(nn.ReplicationPad2d(1), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class TextCNN(nn.Module):
    """Conv1d of several widths over embedded words, each with its maximum over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.convs = nn.ModuleList(nn.Conv1d(6, 8, width) for width in (2, 3, 4))
        self.fc = nn.Linear(24, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding((words.abs() * 5).long().clamp(max=19)).transpose(1, 2)
        found = [F.relu(conv(x)).amax(2) for conv in self.convs]
        return self.fc(torch.cat(found, 1))


class Causal(nn.Module):
    """Dilated Conv1d whose padding is cut off at one end, with residual connections (TCN, WaveNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 8, 1)
        self.filters = nn.ModuleList(nn.Conv1d(8, 8, 2, padding=2**n, dilation=2**n) for n in range(2))
        self.gates = nn.ModuleList(nn.Conv1d(8, 8, 2, padding=2**n, dilation=2**n) for n in range(2))
        self.head = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for n, (filters, gates) in enumerate(zip(self.filters, self.gates, strict=True)):
            x = x + (torch.tanh(filters(x)) * torch.sigmoid(gates(x)))[..., : -(2**n)]
        return self.head(F.relu(x))


class Volumes(nn.Module):
    """Conv3d with pools of unequal sides (C3D)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.pool1 = nn.Conv3d(3, 8, 3, padding=1), nn.MaxPool3d((1, 2, 2))
        self.conv2, self.pool2 = nn.Conv3d(8, 8, 3, padding=1), nn.AdaptiveAvgPool3d(1)
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool2(F.relu(self.conv2(self.pool1(F.relu(self.conv1(x))))))
        return self.out(F.dropout(F.relu(self.fc(x.flatten(1))), training=self.training))


class Checkpointed(nn.Module):
    """Blocks that are run again in the backward pass to save memory (torch.utils.checkpoint)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(n, 8, 3), nn.ReLU()) for n in (3, 8))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class ImagePyramid(nn.Module):
    """The same convs on the image at several sizes (MTCNN, multi-scale SRCNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 8, 3), nn.PReLU(8))
        self.score, self.box = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for size in (16, 12, 9):
            values = self.features(F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False))
            found += [self.score(values).softmax(1), self.box(values)]
        return found


class AuxiliaryHead(nn.Module):
    """A second classifier that runs in train mode alone (GoogLeNet), and a flag with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.aux, self.fc = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, return_features: bool = False) -> Any:
        x = F.relu(self.conv1(x))
        aux = self.aux(x.mean((2, 3))) if self.training else None
        x = F.relu(self.conv2(x)).mean((2, 3))
        if return_features:
            return x
        return (self.fc(x), aux) if self.training else self.fc(x)


class NormalizesInput(nn.Module):
    """The preprocessing in the forward, with mean and std as buffers; features by name (perceptual losses)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.vgg = make_layers([8, 8, "M", 8])
        self.names = {"1": "relu1_1", "6": "relu2_1"}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, found = (x - self.mean) / self.std, {}
        for key, layer in self.vgg._modules.items():
            x = layer(x)
            if key in self.names:
                found[self.names[key]] = x.clone()
        return found


class CollectsByHooks(nn.Module):
    """Outputs of inner layers, collected by hooks that refer to the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.features = make_layers([8, 8])
        self.head = nn.Conv2d(8, 4, 1)
        self.activations: list[Tensor] = []
        self.features[1].register_forward_hook(self.collect)

    def collect(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.activations.append(output)

    def forward(self, x: Tensor) -> Tensor:
        self.activations = []
        x = self.head(self.features(x))
        return x + self.activations[0].mean()


class Recurrent(nn.Module):
    """One cell of convs applied several times to its own state (recurrent refinement)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.update = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.encode(x))
        state = torch.zeros_like(x)
        for _ in range(3):
            state = torch.tanh(self.update(torch.cat([x, state], 1)))
        return self.head(state)


class MultiHead(nn.Module):
    """A dict of heads, one for each task, on a trunk with local response normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.LocalResponseNorm(3), nn.Conv2d(8, 8, 3))
        self.heads = nn.ModuleDict({name: nn.Linear(8, n) for name, n in (("age", 1), ("gender", 2))})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.trunk(x)).flatten(2).mean(-1)
        return {name: head(x) for name, head in self.heads.items()}


class Mixed(nn.Module):
    """Activations of several kinds by name, some of them functions in a dict."""

    def __init__(self, names: Sequence[str] = ("gelu", "softplus", "mish", "hardswish", "selu")) -> None:
        super().__init__()
        self.names = names
        self.convs = nn.ModuleList(nn.Conv2d(3 if n == 0 else 8, 8, 1) for n in range(len(names)))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for name, conv in zip(self.names, self.convs, strict=True):
            x = getattr(F, name)(conv(x))
        return self.head(x)


class VectorInput(nn.Module):
    """Dense layers alone, with a skip connection to every one (DeepSDF, tabular networks)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 12), nn.Linear(12 + 6, 12), nn.Linear(12 + 6, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.softplus(self.first(x), beta=100)
        for layer in (self.second, self.third):
            out = F.softplus(layer(torch.cat([out, x], -1)), beta=100)
        return self.head(out).squeeze(-1)


class StackedHourglass(nn.Module):
    """A module that contains itself at half the size, with skips that are added (hourglass)."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.skip, self.low = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.inner = StackedHourglass(depth - 1) if depth > 1 else nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.inner(F.relu(self.low(F.max_pool2d(x, 2))))
        return F.relu(self.skip(x)) + F.interpolate(low, scale_factor=2, mode="nearest")


class NamedSubclass(nn.Sequential):
    """A subclass of nn.Sequential with its own forward and named children."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("conv0", nn.Conv2d(3, 8, 3, padding=1))
        self.add_module("relu0", nn.ReLU(inplace=True))
        self.add_module("conv1", nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.relu(super().forward(x))], 1)


def conv_classes() -> nn.Module:
    """Convs with reflected, circular and "same" padding, from a partial."""
    conv = partial(nn.Conv2d, kernel_size=3)
    return nn.Sequential(
        *(conv(3, 8, padding=1, padding_mode="reflect"), nn.ReLU(), conv(8, 8, padding=1, padding_mode="circular")),
        *(nn.Hardtanh(), conv(8, 8, padding="same", dilation=2), nn.Softplus(), nn.Conv2d(8, 4, 1)),
    )


def hourglass() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), StackedHourglass(), nn.Conv2d(8, 4, 1))


def discriminator() -> nn.Module:
    """The discriminator of DCGAN without normalization."""
    layers = [nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(8, 8, 4, 2, 1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(8, 1, 4), nn.Flatten(), nn.Sigmoid())


def traced_by_fx() -> nn.Module:
    """A network that torch.fx traced, whose containers are plain modules."""
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    return fx.symbolic_trace(nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))


def extracted() -> nn.Module:
    """Features of a VGG, as torchvision's `create_feature_extractor` makes them."""
    with torch.device("meta"):  # the default dense layers, which are replaced, would take a second
        vgg = VGG(nn.Identity(), num_classes=1, init_weights=False)
    vgg.features = make_layers([8, 8, "M", 8])
    vgg.classifier = nn.Sequential(nn.Linear(8 * 49, 4))
    return create_feature_extractor(vgg.eval(), {"features.1": "low", "features.6": "high"})
