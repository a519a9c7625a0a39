"""Generate docs/adaptation.png: the demo's digits, faded, and what its network reads before and after adapting.

python docs/adaptation_picture.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from bn_insert import adapt_statistics, load_checkpoint
from bn_insert.demo import images_path, network_path
from bn_insert.images import Transform, folder_classes, open_batches, with_labels

COLUMNS = 10


def main() -> None:
    """Adapt the network and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "adaptation.png")
    picture().savefig(parser.parse_args().output, dpi=130)


def picture() -> Figure:
    """Return one digit of each class, as it was and faded, with what the network reads."""
    folder = images_path()
    transform = Transform(resize=None, crop=None, mean=(0.0,), std=(1.0,))
    parts = list(with_labels(open_batches(folder, transform, batch_size=32), folder, folder_classes(folder)))
    digits, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    faded = 0.24 + 0.2 * digits
    model = load_checkpoint(network_path()).eval()
    adapted = adapt_statistics(model, digits.split(32), faded.split(32))
    with torch.inference_mode():
        read = [network(images).argmax(1) for network, images in ((model, digits), (model, faded), (adapted, faded))]
    titles = ("original", "faded", "faded, adapted")
    result = Figure(figsize=(8, 3.3), layout="constrained")
    rows = result.subplots(3, COLUMNS)
    shown = [int((labels == number).nonzero()[0]) for number in range(COLUMNS)]
    for axes, images, classes, title in zip(rows, (digits, faded, faded), read, titles, strict=True):
        for each, number in zip(axes, shown, strict=True):
            each.imshow(images[number].permute(1, 2, 0), vmin=0, vmax=1)
            right = classes[number] == labels[number]
            each.set_title(f"{int(classes[number])}", color="tab:green" if right else "tab:red", fontsize=12, pad=2)
            each.set_xticks([])
            each.set_yticks([])
        accuracy = float((classes == labels).double().mean())
        axes[0].set_ylabel(f"{title}\n{accuracy:.1%}", rotation=0, ha="right", va="center", fontsize=10)
    return result


if __name__ == "__main__":
    main()
