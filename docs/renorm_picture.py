"""Generate docs/renorm.png: how much of eval mode train mode keeps, by batch size, with and without renormalization.

python docs/renorm_picture.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from bn_insert import insert_batchnorm, load_checkpoint, train_mode_agreement
from bn_insert.demo import images_path, network_path
from bn_insert.images import Transform, open_batches

BATCH_SIZES = (2, 4, 8, 16, 32, 64)


def main() -> None:
    """Measure the demo network and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "renorm.png")
    picture().savefig(parser.parse_args().output, dpi=130)


def picture() -> Figure:
    """Return the share of top-1 classes that train mode keeps, over the batch size."""
    transform = Transform(resize=None, crop=None, mean=(0.0,), std=(1.0,))
    digits = torch.cat([batch.images for batch in open_batches(images_path(), transform, batch_size=32)])
    digits = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))]
    network = insert_batchnorm(load_checkpoint(network_path()).eval(), digits.split(32))
    result = Figure(figsize=(6, 3), layout="constrained")
    axes = result.subplots()
    for label, color, renorm in (("BatchNorm", "C0", False), ("Batch Renormalization", "C1", True)):
        found = train_mode_agreement(network, digits.split(64), BATCH_SIZES, renorm=renorm)
        agreement = [100 * each.top1_agreement for each in found]
        axes.plot([each.batch_size for each in found], agreement, marker="o", color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
    axes.set_xlabel("batch size")
    axes.set_ylabel("top-1 classes kept, %")
    axes.set_ylim(0, 105)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    return result


if __name__ == "__main__":
    main()
