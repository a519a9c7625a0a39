"""The measurements that the defaults of `adapt_statistics` were chosen by.

    python -m benchmarks.adaptation.choosing CIFAR_FOLDER --network cifar-vgg.pth

The gain in accuracy, in points, on 500 validation images that the benchmark itself does not use, adapting to 500 others
that it does not use either, with the corruptions that CIFAR-10-C sets apart for choosing, and contrast, each at
severities 1 and 3; clean images with twelve draws of the images adapted to. Every method adapts to the same images.
Statistics of few images are moved from those of the source by 1 - (cE / D)^p, at least 0, of the difference
(`bn_insert/statistics/shrinkage.py`). Unless a row says otherwise, D is the smallest that is left when any one of up to
128 images is left out. Accuracies are those under bfloat16 autocast, before and after.

Every method is a line in `choosing.jsonl`: interrupted, the program continues where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from bn_insert import Insertion, insert, load_checkpoint
from bn_insert.graph.layers import Kind
from bn_insert.statistics import recorder, shrinkage
from bn_insert.statistics.moments import MOST_BY_IMAGE, moments_by_image
from bn_insert.statistics.shrinkage import Prior, caution
from bn_insert.surgery.adapt import adapt_inserted

from ..machine import machine
from ..record import Record
from ..renorm.cifar_network import load_part, preprocess
from .__main__ import BATCH, CLEAN, RESULTS, accuracy, inserted_on_source, source_batches
from .corruptions import FOR_CHOOSING, corrupted

CLEAN_DRAWS = 12
CHANCE_DRAWS = 200
MILD = 1  # severity
CASES = [(CLEAN, draw) for draw in range(CLEAN_DRAWS)]
CASES += [(name, severity) for name in (*FOR_CHOOSING, "contrast") for severity in (MILD, 3)]
LAST = 1000  # validation images, which the benchmark does not use
# Weight of chance (c) and power (p) in the shrinkage, by the number of images. The first of each is an earlier default,
# c = 1.75 + 16 / images without regard to single images, and the second is the default (with one image, the first).
GRID = {
    32: ((2.25, 4), (2.06, 4), (1.0, 2), (2.0, 2), (1.5, 4), (1.75, 4), (2.5, 4), (3.0, 4), (0.0, 1)),
    8: ((3.75, 4), (3.0, 4), (3.0, 2), (2.0, 4), (2.5, 4), (3.5, 4), (4.0, 4)),
    128: ((1.88, 4), (1.83, 4), (1.5, 4), (2.5, 4)),
    4: ((5.75, 4), (4.25, 4), (3.25, 4), (6.0, 4)),
    2: ((9.75, 4), (6.75, 4), (4.0, 4), (8.5, 4)),
    1: ((17.8, 4), (8.0, 4), (11.8, 4), (14.0, 4)),
    500: ((1.5, 2), (1.78, 4)),
}


@dataclass(frozen=True)
class Method:
    """One method to adapt: number of target images, shrinkage, layers, images per batch.

    Attributes:
        images: Number of target images.
        chance: Weight of chance in the shrinkage.
        power: Power in the shrinkage.
        layers: Layers that are adapted.
        batch: Images per batch.
        single: Whether the difference is the smallest that is left when any one image is left out.
    """

    images: int
    chance: float
    power: int = shrinkage.POWER
    layers: str = "all"
    batch: int = BATCH
    single: bool = True

    @property
    def rule(self) -> str:
        """Name of the method apart from the number of images."""
        layers = "" if self.layers == "all" else f", {self.layers} layers"
        batch = "" if self.batch == BATCH else f", batches of {self.batch}"
        single = "" if self.single else ", no image left out"
        return f"c = {self.chance:g}, p = {self.power}{layers}{batch}{single}"


def methods() -> Iterator[Method]:
    """Yield the methods, the most telling first."""
    for images, rules in GRID.items():
        yield from (Method(images, *rule, single=rule != rules[0]) for rule in rules)
    yield from (Method(images, default(images), layers="conv") for images in (32, 8, 500))
    yield from (Method(500, default(500), layers=layers) for layers in ("first 2", "first 4"))
    yield from (Method(500, default(500), batch=batch) for batch in (128, 8))


def default(images: int) -> float:
    """Return the weight of chance that `adapt_statistics` uses for so many images."""
    return caution(images, leave_one_out=1 < images <= MOST_BY_IMAGE)


def main() -> None:
    """Run what is missing, and write the table of all methods that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for choosing.jsonl and .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.output / "choosing.jsonl")
    network = load_checkpoint(options.network).eval()
    val, labels = load_part(options.folder, "val")
    source = source_batches(options.folder)
    test, pool = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))[-LAST:].split(LAST // 2)
    sets = {case: val if case[0] == CLEAN else corrupted(val, *case) for case in CASES}
    tests = {case: preprocess(pixels[test]) for case, pixels in sets.items()}
    pools = {case: preprocess(pixels[pool]) for case, pixels in sets.items()}

    @cache
    def inserted(layers: str) -> Insertion[Any]:
        names = [site.name for site in insert(network, source[:1]).sites]
        first = int(layers.removeprefix("first ")) if layers.startswith("first") else len(names)
        kinds: tuple[Kind, ...] = ("conv",) if layers == "conv" else ("conv", "dense")
        return inserted_on_source(network, source, layers=kinds, skip=names[first:])

    with torch.autocast("cpu", torch.bfloat16):
        before = {case: accuracy(network, images, labels[test]) for case, images in tests.items()}
    for method in methods():
        if asdict(method) in [line["method"] for line in record.lines]:
            continue
        shrinkage.caution, shrinkage.POWER = partial(_constant, method.chance), method.power
        recorder.moments_by_image = moments_by_image if method.single else _unknown
        gains = {}
        for (name, severity), images in pools.items():
            generator = torch.Generator().manual_seed(crc32(f"{name} {severity}".encode()))
            target = images[torch.randperm(len(images), generator=generator)[: method.images]].split(method.batch)
            adapted = adapt_inserted(network, inserted(method.layers), target, keep_batchnorm=True).model
            with torch.autocast("cpu", torch.bfloat16):
                after = accuracy(adapted, tests[name, severity], labels[test])
            gains[f"{name} {severity}"] = after - before[name, severity]
        record.add({"method": asdict(method), "gains": gains, "machine": machine()})
        print(" | ".join(row(method, gains)), flush=True)
    chance = chance_ratios(inserted("all"), preprocess(val[pool]))
    (options.output / "choosing.md").write_text(report(record.lines, chance))


def _constant(chance: float, _images: int, *, leave_one_out: bool) -> float:  # noqa: ARG001
    return chance


def _unknown(_values: Tensor) -> None:
    return None


@torch.inference_mode()
def chance_ratios(insertion: Insertion[Any], images: Tensor) -> list[list[str]]:
    """Return a table of D / E for images like those of the source: how far chance exceeds its expectation.

    For each number of images, the range over the layers of the median and of the 90th percentile of many draws.
    """
    moments: dict[str, tuple[Tensor, Tensor]] = {}

    def record(layer: str, _norm: nn.Module, args: tuple[Tensor]) -> None:
        values = args[0].double().flatten(2) if args[0].ndim > 2 else args[0].double()[..., None]
        moments[layer] = values.mean(2), values.square().mean(2)

    hooks = [norm.register_forward_pre_hook(partial(record, layer)) for layer, norm in insertion.norms.items()]
    insertion.model(images)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(0)
    table = [["images", "means: median", "90th percentile", "standard deviations: median", "90th percentile"]]
    table += [["---:"] * 5]
    for count in (2, 8, 32, 128):
        draws = torch.stack([torch.randperm(len(images), generator=generator)[:count] for _ in range(CHANCE_DRAWS)])
        ratios: list[list[Tensor]] = [[], []]
        for layer, (mean_of, square_of) in moments.items():
            norm, error = insertion.norms[layer], insertion.moments[layer].standard_error
            prior = Prior.of(norm.running_mean, norm.running_var, standard_error=error, images=insertion.images)
            known = prior.var > 0
            mean_, square = (each[draws].mean(1)[:, known] for each in (mean_of, square_of))
            expected = prior.image_variance[known].sum() / count
            std = prior.var[known].double().sqrt()
            ratios[0].append(((mean_ - prior.mean[known]) / std).square().sum(1) / expected)
            logarithm = ((square - mean_.square()).clamp_min(0).sqrt() / std).clamp_min(1e-3).log()
            ratios[1].append(logarithm.square().sum(1) / expected)
        cells = [
            torch.stack([ratio.quantile(fraction) for ratio in kind]) for kind in ratios for fraction in (0.5, 0.9)
        ]
        table.append([str(count), *(f"{cell.min():.1f} to {cell.max():.1f}" for cell in cells)])
    return table


def row(method: Method, gains: Mapping[str, float]) -> list[str]:
    """Return the cells of a method in the table."""
    clean = [gain for case, gain in gains.items() if case.startswith(CLEAN)]
    corrupt = {case: gain for case, gain in gains.items() if not case.startswith(CLEAN)}
    mild = [gain for case, gain in corrupt.items() if case.endswith(f" {MILD}")]
    worst = min(corrupt, key=corrupt.__getitem__)
    return [
        str(method.images),
        method.rule,
        f"{mean(clean):+.2f}",
        f"{min(clean):+.1f}",
        f"{mean(corrupt.values()):+.2f}",
        f"{mean(mild):+.2f}",
        f"{corrupt[worst]:+.1f} ({worst})",
    ]


def report(lines: Sequence[Mapping[str, Any]], chance: Sequence[Sequence[str]]) -> str:
    """Return the page with both tables."""
    table = [["images", "method", "clean", "worst draw", "mean of corruptions", f"severity {MILD}", "worst"]]
    table += [["---:", "---", *["---:"] * 4, "---"]]
    for line in lines:
        table.append(row(Method(**line["method"]), line["gains"]))
    grid, ratios = ("\n".join(f"| {' | '.join(cells)} |" for cells in each) for each in (table, chance))
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    where = lines[-1]["machine"] if lines else machine()
    return (
        f"# Choosing the defaults of adapting\n\n{about}\n\n{grid}\n\nD / E for clean images, the range over the "
        f"layers: what chance amounts to, over {CHANCE_DRAWS} draws of the images.\n\n{ratios}\n\n{where}\n"
    )


if __name__ == "__main__":
    main()
