"""What adapting to corrupted images gains, without labels and without training, by the number of target images.

    python -m benchmarks.adaptation CIFAR_FOLDER --network cifar-vgg.pth
    python -m benchmarks.adaptation CIFAR_FOLDER --network cifar-folded.pth --name folded
    python -m benchmarks.adaptation CIFAR_FOLDER --network cifar-deep.pth --name deep
    python -m benchmarks.adaptation CIFAR_FOLDER --network cifar-vgg.pth --name imagenet-c --package
    python -m benchmarks.adaptation CIFAR_FOLDER --network cifar-folded.pth --name imagenet-c-folded --package

A VGG without normalization is tested on corrupted CIFAR-10 images (`corruptions.py`), as it is and adapted by
`adapt_statistics` with 1 to 1,000 images of the same corruption. `python -m benchmarks.renorm.cifar_network` trains it
without BatchNorm, or with BatchNorm, which is folded afterwards: `--batchnorm --epochs 16`, continued with
`--epochs 34`, for `folded.md`, and `--batchnorm --deep --epochs 24`, continued with `--epochs 34`, for `deep.md`, whose
network has thirteen convs in place of six.
BatchNorm is inserted with 1,024 training images. The accuracy is that on 1,000 validation images; the images adapted to
are others of the validation images, drawn anew for each corruption and severity (for clean images, five times), and
their labels are not used. Another 1,000 validation images, with the corruptions that CIFAR-10-C sets apart for this
(speckle noise, Gaussian blur, saturate), and contrast, served to choose the defaults.

`imagenet-c.md` and `imagenet-c-folded.md` have the same for the 19 corruptions of ImageNet-C, by the package
imagecorruptions-imaug (`pip install imagecorruptions-imaug`), with its parameters: on images of this size they are far
stronger than those of CIFAR-10-C.

Every severity of a corruption is a line in `NAME.jsonl`: interrupted, the program continues where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any
from zlib import crc32

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from bn_insert import Insertion, load_checkpoint
from bn_insert.graph.layers import Kind
from bn_insert.graph.sites import SiteOptions
from bn_insert.statistics.pass_options import PassOptions
from bn_insert.surgery.adapt import adapt_inserted
from bn_insert.surgery.insert import insert_with

from ..machine import machine
from ..record import Record
from ..renorm.cifar_network import load_part, preprocess
from .corruptions import CORRUPTIONS, FOR_CHOOSING, SEVERITIES, corrupted
from .package_corruptions import package_corrupted

RESULTS = Path(__file__).parent / "results"
TARGETS = (1, 8, 32, 128, 1000)
SOURCE_IMAGES, TEST_IMAGES, BATCH = 1024, 1000, 32
CLEAN = "clean"
IN_PACKAGE_ALONE = ("frost", "spatter")


def main() -> None:
    """Run what is missing, and write the table and the figure of all cases that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with train/ and val/ of CIFAR-10")
    parser.add_argument("--network", type=Path, required=True, help="checkpoint of a VGG trained on it")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--name", default="adaptation", help="of the results: NAME.jsonl, NAME.md and NAME.png")
    parser.add_argument("--package", action="store_true", help="the stronger corruptions of imagecorruptions-imaug")
    parser.add_argument("--severities", type=int, nargs="+", default=list(SEVERITIES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.output / f"{options.name}.jsonl")
    lines = record.lines
    done = {(line["corruption"], line["severity"]) for line in lines}
    names = (CLEAN, *CORRUPTIONS, *(IN_PACKAGE_ALONE if options.package else ()))
    # Clean images have no severities: theirs are as many draws of the images adapted to.
    cases = [(name, severity) for severity in options.severities for name in names]
    missing = [case for case in cases if case not in done]
    if missing:
        network = load_checkpoint(options.network).eval()
        val, labels = load_part(options.folder, "val")
        insertion = inserted_on_source(network, source_batches(options.folder))
        order = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))
        test, pool = order[:TEST_IMAGES], order[TEST_IMAGES : TEST_IMAGES + max(TARGETS)]
        for name, severity in missing:
            if name == CLEAN:
                pixels = val
            elif options.package:
                pixels = package_corrupted(val, name, severity)
            else:
                pixels = corrupted(val, name, severity)
            images, wanted = preprocess(pixels[test]), labels[test]
            generator = torch.Generator().manual_seed(crc32(f"{name} {severity}".encode()))
            drawn = pool[torch.randperm(len(pool), generator=generator)]
            line = {"corruption": name, "severity": severity, "original": accuracy(network, images, wanted)}
            line["adapted"] = {}
            for count in TARGETS:
                target = preprocess(pixels[drawn[:count]]).split(BATCH)
                adapted = adapt_inserted(network, insertion, target).model
                line["adapted"][str(count)] = accuracy(adapted, images, wanted)
            line["machine"] = machine()
            record.add(line)
            print(name, severity, line["original"], line["adapted"], flush=True)
    (options.output / f"{options.name}.md").write_text(report(lines, options.name))
    figure(lines).savefig(options.output / f"{options.name}.png", dpi=150)


def source_batches(folder: Path) -> Sequence[Tensor]:
    """Return batches of the training images that BatchNorm is inserted with."""
    train, _ = load_part(folder, "train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:SOURCE_IMAGES]
    return preprocess(train[order]).split(BATCH)


def inserted_on_source(
    network: nn.Module,
    source: Sequence[Tensor],
    *,
    layers: Sequence[Kind] = ("conv", "dense"),
    skip: Sequence[str] = (),
    spread_by_image: bool = True,
) -> Insertion[Any]:
    """Return what `adapt` inserts for batches of the source: one insertion serves several targets."""
    sites = SiteOptions.checked(layers, include_output=False, skip=skip, placement="before_activation")
    options = PassOptions(spread_by_image=spread_by_image)
    return insert_with(network, source, sites, options, eps=1e-5, momentum=0.1)


@torch.inference_mode()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy in percent."""
    network.eval()
    parts = zip(images.split(250), labels.split(250), strict=True)
    correct = sum(
        int((network(part.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum()) for part, y in parts
    )
    return 100 * correct / len(labels)


def by_corruption(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the accuracies of each corruption, as means over its severities."""
    result = {}
    for name in (CLEAN, *CORRUPTIONS, *IN_PACKAGE_ALONE):
        cases = [line for line in lines if line["corruption"] == name]
        if cases:
            result[name] = {"original": mean(case["original"] for case in cases)} | {
                str(count): mean(case["adapted"][str(count)] for case in cases) for count in TARGETS
            }
    return result


def report(lines: Sequence[Mapping[str, Any]], results: str) -> str:
    """Return the page with the table and the figures that the table amounts to."""
    rows = by_corruption(lines)
    corruptions = {name: row for name, row in rows.items() if name != CLEAN}
    unseen = [row for name, row in corruptions.items() if name not in (*FOR_CHOOSING, "contrast")]
    header = ["images", "original", *(f"adapted, {count:,}" for count in TARGETS)]
    table = [header, ["---", *["---:"] * (len(header) - 1)]]
    columns = ("original", *map(str, TARGETS))
    for name, row in rows.items():
        table.append([name, *(f"{row[column]:.1f}" for column in columns)])
    for name, group in (
        ("**mean of corruptions**", [*corruptions.values()]),
        ("mean without those used for choosing", unseen),
    ):
        if group:
            table.append([name, *(f"{mean(row[column] for row in group):.1f}" for column in columns)])
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return "\n\n".join(
        [
            "# Adapting to corrupted images",
            (__doc__ or "").split("\n\n", 2)[2].strip(),
            "Accuracy in percent, means over the severities; the number is that of the target images.",
            text,
            "Gains over the original, in points. A case is one severity of one corruption.",
            gains(lines),
            "The mean gain at each severity, in points, by the number of target images.",
            gains_by_severity(lines),
            f"![Accuracy of the original and the adapted network for each corruption]({results}.png)",
            lines[-1]["machine"] if lines else machine(),
            "",
        ]
    )


def gains(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of what the accuracies amount to, one row for each number of target images."""
    rows = by_corruption(lines)
    clean = rows.pop(CLEAN, None)
    table = [
        [
            "target images",
            "clean",
            "mean",
            "share of the mean with 1,000",
            "worst corruption",
            "worst case",
            "cases worse by more than 1",
        ],
        ["---:"] * 7,
    ]
    if not rows:
        return ""
    whole = mean(row["1000"] - row["original"] for row in rows.values())
    for count in map(str, TARGETS):
        gain = {name: row[count] - row["original"] for name, row in rows.items()}
        cases = {
            f"{line['corruption']} {line['severity']}": line["adapted"][count] - line["original"]
            for line in lines
            if line["corruption"] != CLEAN
        }
        average, worst, worst_case = (
            mean(gain.values()),
            min(gain, key=gain.__getitem__),
            min(cases, key=cases.__getitem__),
        )
        table.append(
            [
                f"{int(count):,}",
                f"{clean[count] - clean['original']:+.1f}" if clean else "-",
                f"{average:+.2f}",
                f"{average / whole:.0%}" if whole > 0 else "-",
                f"{gain[worst]:+.1f} ({worst})",
                f"{cases[worst_case]:+.1f} ({worst_case})",
                f"{sum(value < -1 for value in cases.values())} of {len(cases)}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def gains_by_severity(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the mean over the corruptions at each severity: of the original, and of what it gains."""
    table = [["severity", "original", *(f"{count:,}" for count in TARGETS)], ["---:"] * (2 + len(TARGETS))]
    for severity in SEVERITIES:
        cases = [line for line in lines if line["severity"] == severity and line["corruption"] != CLEAN]
        if cases:
            gain = {count: mean(each["adapted"][str(count)] - each["original"] for each in cases) for count in TARGETS}
            original = f"{mean(each['original'] for each in cases):.1f}"
            table.append([str(severity), original, *(f"{gain[count]:+.2f}" for count in TARGETS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Return a chart of the accuracy for each corruption: original, and adapted with 32 and 1,000 images."""
    rows = dict(sorted(by_corruption(lines).items(), key=lambda item: item[1]["1000"] - item[1]["original"]))
    result = Figure(figsize=(7, 0.9 + 0.27 * len(rows)), layout="constrained")
    axes = result.subplots()
    for position, row in enumerate(rows.values()):
        axes.plot([row["original"], row["1000"]], [position] * 2, color="0.75", linewidth=2, zorder=1)
    series = (
        ("original", "original", "0.35", "o"),
        ("32", "adapted, 32 images", "C0", "|"),
        ("1000", "adapted, 1,000 images", "C0", "o"),
    )
    for column, label, color, marker in series:
        values = [row[column] for row in rows.values()]
        axes.scatter(values, range(len(rows)), color=color, marker=marker, s=36, label=label, zorder=2)
    axes.set_yticks(range(len(rows)), [*rows])
    axes.set_xlabel("accuracy, %, mean over the severities")
    axes.spines[["top", "right"]].set_visible(False)
    result.legend(loc="outside upper center", ncols=len(series), frameon=False)
    return result


if __name__ == "__main__":
    main()
