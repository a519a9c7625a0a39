"""The demo data: a small trained VGG without BatchNorm, and handwritten digits that it was not trained on."""

from pathlib import Path

__all__ = ["images_path", "network_path"]


def network_path() -> Path:
    """Return the path of the demo network, a checkpoint in torchvision's VGG layout.

    The network takes 32x32 RGB images with values in [0, 1]. Its checkpoint stores this preprocessing, which the
    commands use, and the names of its classes, "0" to "9".
    """
    return Path(__file__).parent / "network.pth"


def images_path() -> Path:
    """Return the path of the demo images: a folder with one subfolder of 32x32 PNG files per digit, "0" to "9"."""
    return Path(__file__).parent / "images"
