# ruff: noqa: T201 - a script that prints its progress
"""Create the demo data: enlarge scikit-learn's digits, train a small VGG, and write it and the held-out images.

Run it with `python -m bn_insert.demo.training [--output FOLDER] [--force]`. It requires scikit-learn, which
`pip install "bn-insert[test]"` installs.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models.vgg import VGG, make_layers
from torchvision.transforms import ToTensor

from bn_insert.checkpoints.save import save_checkpoint
from bn_insert.errors import BNInsertError
from bn_insert.images import Transform

__all__ = ["Digits", "demo_network", "load_digits", "main", "measure_accuracy", "render", "split", "train"]

# Few channels keep the package small. The last pooling leaves 2x2 values per channel, so that flattening mixes channels
# and positions as it does in a full-size VGG.
CONVOLUTIONS: list[str | int] = [16, "M", 32, "M", 48, 48, "M", 64, 64, "M"]
POOLED_SIZE = 2
DENSE = 128
CLASSES = 10

HELD_OUT = 360
SEED = 0
# Sums over batches are split among threads, so only the same number of threads reproduces the same weights.
THREADS = 2
EPOCHS = 40
BATCH = 32
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-2
LARGEST_SHIFT = 3  # pixels; larger shifts would move strokes out of the image


@dataclass(frozen=True)
class Digits:
    """Enlarged digits: pixels, classes, and the row of each digit in scikit-learn's dataset."""

    pixels: UInt8[Tensor, "images 32 32"]
    labels: Int64[Tensor, " images"]
    numbers: Int64[Tensor, " images"]

    def select(self, rows: Int64[Tensor, " rows"]) -> "Digits":
        """Return the digits with these row indices, in this order."""
        return Digits(self.pixels[rows], self.labels[rows], self.numbers[rows])


def demo_network() -> VGG:
    """Return the demo's VGG with new weights: from 32x32 RGB images in [0, 1] to the logits of ten digits."""
    # The meta device avoids allocating VGG's default dense layers, 400 MB that are replaced immediately.
    with torch.device("meta"):
        network = VGG(nn.Identity(), num_classes=CLASSES, init_weights=False)
    network.features = make_layers(CONVOLUTIONS)
    channels = [width for width in CONVOLUTIONS if isinstance(width, int)]
    network.avgpool = nn.AdaptiveAvgPool2d((POOLED_SIZE, POOLED_SIZE))
    network.classifier = nn.Sequential(
        nn.Linear(channels[-1] * POOLED_SIZE**2, DENSE),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(DENSE, DENSE),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(DENSE, CLASSES),
    )
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            # Inputs are never negative, whether they are pixels or outputs of a ReLU. A channel whose weights sum to
            # much less than zero would never be active, receive no gradient and stay dead, so the sums start at zero.
            with torch.no_grad():
                layer.weight -= layer.weight.mean(tuple(range(1, layer.weight.dim())), keepdim=True)
    return network


def render(digits: Float64[Tensor, "images 8 8"]) -> UInt8[Tensor, "images 32 32"]:
    """Enlarge 8x8 digits with integer values from 0 to 16 bilinearly to gray pixels from 0 to 255."""
    # The interpolation weights are multiples of 1/64, which float64 represents exactly: all machines produce the same
    # pixels.
    enlarged = F.interpolate(digits.unsqueeze(1), scale_factor=4, mode="bilinear", align_corners=False).squeeze(1)
    return (enlarged * 255 / 16).round().to(torch.uint8)


def load_digits() -> Digits:
    """Return scikit-learn's 1,797 digits, enlarged.

    Raises:
        BNInsertError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # noqa: PLC0415 - an optional dependency that only this script needs
    except ImportError as error:
        raise BNInsertError(
            'the demo digits require scikit-learn, which is not installed: pip install "bn-insert[test]"'
        ) from error
    bunch = datasets.load_digits()
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    return Digits(render(torch.from_numpy(bunch.images)), labels, torch.arange(len(labels)))


def split(digits: Digits) -> tuple[Digits, Digits]:
    """Return the training digits and the held-out digits, stratified by class."""
    from sklearn.model_selection import train_test_split  # noqa: PLC0415 - as above

    training, held_out = train_test_split(
        digits.numbers.numpy(), test_size=HELD_OUT, stratify=digits.labels.numpy(), random_state=SEED
    )
    return digits.select(torch.from_numpy(training)), digits.select(torch.from_numpy(held_out))


def as_input(pixels: UInt8[Tensor, "images 32 32"]) -> Float[Tensor, "images 3 32 32"]:
    """Convert gray pixels to the network's input: float32 RGB in [0, 1] with three equal channels."""
    return (pixels.to(torch.float32) / 255).unsqueeze(1).expand(-1, 3, -1, -1)


def shift(pixels: UInt8[Tensor, "images 32 32"], generator: torch.Generator) -> UInt8[Tensor, "images 32 32"]:
    """Shift each image by up to LARGEST_SHIFT pixels along both axes, and fill the borders with black."""
    padded = F.pad(pixels, [LARGEST_SHIFT] * 4)
    down, right = torch.randint(0, 2 * LARGEST_SHIFT + 1, (2, len(pixels), 1), generator=generator)
    position = torch.arange(32)
    image = torch.arange(len(pixels)).reshape(-1, 1, 1)
    return padded[image, (down + position).unsqueeze(2), (right + position).unsqueeze(1)]


def train(digits: Digits, held_out: Digits) -> VGG:
    """Train a demo network on digits, and print its accuracy on the held-out digits after each epoch.

    The caller's RNG state is left unchanged.

    Returns:
        The network with the weights of the last epoch, not of the best one. On the same machine, with the same release
        of PyTorch and the same number of threads, they are reproducible.
    """
    generator = torch.Generator().manual_seed(SEED)
    batches = len(digits.labels) // BATCH
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = demo_network()
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=EPOCHS * batches, pct_start=0.1
        )
        for epoch in range(1, EPOCHS + 1):
            network.train()
            total_loss = 0.0
            order = torch.randperm(len(digits.labels), generator=generator)
            for rows in order[: batches * BATCH].reshape(batches, BATCH):
                logits = network(as_input(shift(digits.pixels[rows], generator)))
                loss = F.cross_entropy(logits, digits.labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total_loss += loss.item()
            network.eval()
            with torch.inference_mode():
                predicted = network(as_input(held_out.pixels)).argmax(1)
            accuracy = (predicted == held_out.labels).double().mean().item()
            print(
                f"epoch {epoch:2d} of {EPOCHS}: loss {total_loss / batches:.4f}, held-out accuracy {accuracy:.2%}",
                flush=True,
            )
    return network


def write(folder: Path, network: VGG, digits: Digits) -> None:
    """Write network.pth and images/<digit>/<number>.png, replacing those of earlier runs."""
    images = folder / "images"
    for stale in images.glob("[0-9]/*.png"):
        stale.unlink()
    for pixels, label, number in zip(
        digits.pixels.numpy(), digits.labels.tolist(), digits.numbers.tolist(), strict=True
    ):
        path = images / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, optimize=True)
    as_stored = Transform(resize=None, crop=None, mean=(0.0,), std=(1.0,))
    names = [str(digit) for digit in range(CLASSES)]
    save_checkpoint(network, folder / "network.pth", transform=as_stored.to_dict(), classes=names, overwrite=True)


def measure_accuracy(folder: Path) -> float:
    """Return the accuracy of the network written to a folder, read back, on the images written to it."""
    network = demo_network()
    network.load_state_dict(torch.load(folder / "network.pth", weights_only=True))
    network.eval()
    images = ImageFolder(folder / "images", transform=ToTensor())
    correct = 0
    with torch.inference_mode():
        for batch, labels in DataLoader(images, batch_size=128):
            correct += int((network(batch).argmax(1) == labels).sum())
    return correct / len(images)


def main(arguments: Sequence[str] | None = None) -> int:
    """Create the demo data; returns 0, or 2 if scikit-learn is missing or the output exists already."""
    parser = argparse.ArgumentParser(prog="python -m bn_insert.demo.training", description="Recreate the demo data.")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bn-insert-demo"),
        metavar="FOLDER",
        help="output folder (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing network and images")
    chosen = parser.parse_args(arguments)
    folder: Path = chosen.output
    try:
        training, held_out = split(load_digits())
        # Checked before training, so that no time is spent on a network that cannot be written.
        folder.mkdir(parents=True, exist_ok=True)
        if not chosen.force and any((folder / name).exists() for name in ("network.pth", "images")):
            raise BNInsertError(
                f"{folder} already contains a network or images: choose another --output, or pass --force"
            )
    except (BNInsertError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(THREADS)
    start = time.monotonic()
    network = train(training, held_out)
    write(folder, network, held_out)
    print(
        f"wrote {folder}: held-out accuracy {measure_accuracy(folder):.2%} on {len(held_out.labels)} images,"
        f" {time.monotonic() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
