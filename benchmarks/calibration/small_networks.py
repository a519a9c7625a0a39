"""Small networks of others, written from their publications, with random weights: speed does not depend on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SmallNetwork:
    """A network and the shape of its images.

    Attributes:
        make: Returns the network.
        shape: Channels, height and width of an image.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]


def lenet5() -> nn.Module:
    """Return LeNet-5 (LeCun et al. 1998), with ReLU."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def small_vgg() -> nn.Module:
    """Return a VGG of six conv layers for images of 32 x 32."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        channels = width
    head = [nn.Flatten(), nn.Linear(2048, 128), nn.ReLU(inplace=True), nn.Linear(128, 10)]
    return nn.Sequential(nn.Sequential(*layers), nn.Sequential(*head))


def tfeat() -> nn.Module:
    """Return TFeat (Balntas et al. 2016): descriptors of grey patches."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 7), nn.Tanh(), nn.MaxPool2d(2, 2), nn.Conv2d(32, 64, 6), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(4096, 128), nn.Tanh()),
    )


class CNNIQA(nn.Module):
    """The quality of a grey patch, from the largest and smallest responses (Kang et al. 2014)."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 50, 7)
        self.fc1, self.fc2, self.fc3 = nn.Linear(100, 800), nn.Linear(800, 800), nn.Linear(800, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return one score an image."""
        responses = self.conv1(images).flatten(2)
        features = torch.cat([responses.amax(2), responses.amin(2)], 1)
        return self.fc3(self.fc2(self.fc1(features).relu()).relu())  # type: ignore[no-any-return]


def nin() -> nn.Module:
    """Return Network in Network for CIFAR-10 (Lin et al. 2014)."""
    layers: list[nn.Module] = []
    channels = 3
    for kernel, widths, pool in (
        (5, (192, 160, 96), nn.MaxPool2d(3, 2, ceil_mode=True)),
        (5, (192, 192, 192), nn.AvgPool2d(3, 2, ceil_mode=True)),
        (3, (192, 192, 10), nn.AdaptiveAvgPool2d(1)),
    ):
        for size, width in zip((kernel, 1, 1), widths, strict=True):
            layers += [nn.Conv2d(channels, width, size, padding=size // 2), nn.ReLU(inplace=True)]
            channels = width
        layers.append(pool)
    return nn.Sequential(*layers, nn.Flatten())


def nature_cnn() -> nn.Module:
    """Return the network that learned to play Atari games (Mnih et al. 2015)."""
    return nn.Sequential(
        *(nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 18)),
    )


SMALL_NETWORKS = {
    "LeNet-5": SmallNetwork(lenet5, (1, 28, 28)),
    "VGG of six convs, 32 x 32": SmallNetwork(small_vgg, (3, 32, 32)),
    "TFeat": SmallNetwork(tfeat, (1, 32, 32)),
    "CNNIQA": SmallNetwork(CNNIQA, (1, 32, 32)),
    "Network in Network": SmallNetwork(nin, (3, 32, 32)),
    "Atari network, 84 x 84": SmallNetwork(nature_cnn, (4, 84, 84)),
}
