"""The plain script that `insert` is compared with: decode a folder of images and run a VGG16 on them.

python benchmarks/calibration/plain_script.py both|decode|forward CHECKPOINT FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.transforms import v2

WORKERS = 2


def main() -> None:
    """Decode, forward, or both."""
    part, checkpoint, folder = sys.argv[1:]
    transform = v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = torchvision.datasets.ImageFolder(folder, transform)
    model = torchvision.models.vgg16(weights=None)
    model.load_state_dict(torch.load(Path(checkpoint)))
    model.eval()
    with torch.inference_mode():
        if part == "forward":
            batch = torch.stack([images[number][0] for number in range(32)])
            for start in range(0, len(images), 32):
                model(batch[: len(images) - start])
            return
        for batch, _ in DataLoader(images, batch_size=32, num_workers=WORKERS):
            if part == "both":
                model(batch)


if __name__ == "__main__":
    main()
