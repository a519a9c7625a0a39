"""The demo data: a small trained VGG without BatchNorm, and handwritten digits that it has not been trained on."""

from pathlib import Path

__all__ = ["images_path", "network_path"]


def network_path() -> Path:
    """Path of the demo network: a plain float32 state dict in torchvision's VGG layout, for RGB in [0, 1] at 32x32."""
    return Path(__file__).parent / "network.pth"


def images_path() -> Path:
    """Path of the demo images: a folder with one folder a digit, "0" to "9", of 32x32 PNG files."""
    return Path(__file__).parent / "images"
