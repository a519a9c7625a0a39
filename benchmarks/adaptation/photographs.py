"""What adapting gains on photographs that are darker, blurred or noisy.

    bn-insert finetune cifar-vgg.pth CLOTHING --output-dir clothing/ --resize 32 --crop 32 --epochs 10 \\
        --mean 0.4914,0.4822,0.4465 --std 0.247,0.2435,0.2616 --opt sgd --lr 0.003 --hflip 0.5
    python -m benchmarks.adaptation.photographs CLOTHING --network clothing/last.pth --output results/

A VGG without normalization, fine-tuned on photographs of clothing of ten kinds at 32 x 32, is tested on the photographs
of `val/`, changed and unchanged, as it is and adapted by `adapt_statistics` with 8 to 1,000 photographs with the same
change. These, and the 1,024 that BatchNorm is inserted with, are different photographs of `train/`, without labels.
Noise, blur and contrast are those of CIFAR-10-C (`corruptions.py`); a darker photograph has its pixel values multiplied
by 0.6, 0.4, 0.25, 0.15 and 0.1. No setting was chosen on these images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from zlib import crc32

import torch
from torch import Tensor

from bn_insert import load_checkpoint
from bn_insert.surgery.adapt import adapt_inserted

from ..finetuning.images import clothing
from ..machine import machine
from ..renorm.cifar_network import preprocess
from .__main__ import BATCH, SOURCE_IMAGES, accuracy, inserted_on_source
from .corruptions import SEVERITIES, corrupted

TARGETS = (8, 32, 128, 1000)


def _darker(pixels: Tensor, severity: int) -> Tensor:
    factor = (0.6, 0.4, 0.25, 0.15, 0.1)[severity - 1]
    return (pixels * factor).round().to(torch.uint8)


def _by_name(name: str) -> Callable[[Tensor, int], Tensor]:
    return lambda pixels, severity: corrupted(pixels, name, severity)


CHANGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "unchanged": lambda pixels, _: pixels,
    "darker": _darker,
    **{name: _by_name(name) for name in ("contrast", "gaussian blur", "defocus blur", "gaussian noise", "shot noise")},
}


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with train/ and val/ of the photographs")
    parser.add_argument("--network", type=Path, required=True, help="checkpoint of a VGG fine-tuned on them")
    parser.add_argument("--output", type=Path, required=True, help="folder for photographs.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    network = load_checkpoint(options.network).eval()
    split = clothing(options.folder, 32)
    pool = torch.cat([split.train.pixels, split.validation.pixels])
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))]
    insertion = inserted_on_source(network, preprocess(pool[:SOURCE_IMAGES]).split(BATCH))
    table = [
        ["photographs", "original", *(f"adapted, {count:,}" for count in TARGETS)],
        ["---", *["---:"] * (len(TARGETS) + 1)],
    ]
    for name, change in CHANGES.items():
        rows = []
        for severity in SEVERITIES:
            images = preprocess(change(split.test.pixels, severity))
            generator = torch.Generator().manual_seed(crc32(f"{name} {severity}".encode()))
            drawn = pool[SOURCE_IMAGES + torch.randperm(len(pool) - SOURCE_IMAGES, generator=generator)]
            row = [accuracy(network, images, split.test.classes)]
            for count in TARGETS:
                target = preprocess(change(drawn[:count], severity)).split(BATCH)
                adapted = adapt_inserted(network, insertion, target).model
                row.append(accuracy(adapted, images, split.test.classes))
            rows.append(row)
            print(name, severity, row, flush=True)
        table.append([name, *(f"{mean(column):.1f}" for column in zip(*rows, strict=True))])
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    (options.output / "photographs.md").write_text(
        f"# Adapting to darker, blurred and noisy photographs\n\n{about}\n\n"
        "Accuracy in percent, means over five severities (unchanged: over five draws of the photographs adapted to); "
        f"the number is that of the target photographs.\n\n{text}\n\n{machine()}\n"
    )


if __name__ == "__main__":
    main()
