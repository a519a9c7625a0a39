"""The cost of calibration: against a plain forward loop, against other tools' methods, and as part of `insert`.

    python -m benchmarks.calibration --output benchmarks/calibration/results

Each table is a separate measurement; `--tables` selects them. The compared methods take turns within one run, so that
other load on the machine affects all of them: read the ratios, not the seconds.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.transforms import v2

from bn_insert import calibrate, find_sites

from ..machine import machine
from .commands import around_calibration, end_to_end, processes, start_up
from .methods import METHODS, OTHER_TOOLS, error, plain, read_once, reference
from .small_networks import SMALL_NETWORKS

MIB = 2**20


def network_of(name: str, device: torch.device) -> nn.Module:
    """Return torchvision's network with its initial weights, always the same ones: speed does not depend on them."""
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None).eval().to(device)


def batches_of(images: int, batch_size: int, device: torch.device) -> list[Tensor]:
    """Return cuttings of scikit-learn's two photographs, 224 x 224, at many scales, normalized as for ImageNet."""
    normalize = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pictures = [torch.tensor(picture).movedim(-1, 0) / 255 for picture in load_sample_images().images]
    generator = torch.Generator().manual_seed(1)
    cuttings = []
    for number in range(images):
        picture = pictures[number % len(pictures)]
        side, top, left = torch.rand(3, generator=generator).tolist()
        size = int(60 + 300 * side)
        rows, columns = (int(share * (room - size)) for share, room in zip((top, left), picture.shape[1:], strict=True))
        cutting = picture[None, :, rows : rows + size, columns : columns + size]
        cuttings.append(normalize(F.interpolate(cutting, (224, 224), mode="bilinear")))
    return list(torch.cat(cuttings).to(device).split(batch_size))


def layers_of(network: nn.Module, batch: Tensor) -> list[str]:
    """Return the names of the conv and dense layers that are measured: all but the output layer."""
    return [site.name for site in find_sites(network, batch[:1])]


def seconds_of(
    work: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return how long work takes, what it left running on a GPU included."""
    gc.collect()
    _wait(device)
    began = clock()
    work()
    _wait(device)
    return clock() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def against_plain_loop(options: argparse.Namespace) -> Iterator[str]:
    """Time, peak memory and error of every method of taking statistics, as ratios to the plain loop."""
    yield from (
        f"Networks at 224 x 224 on {options.device}"
        + (f" under {options.autocast} autocast" if options.autocast else "")
        + f", {torch.get_num_threads()} threads, median of {options.repeats} rounds of {options.images} images or one "
        "batch.",
        "Error: the largest over all channels and layers (mean: relative to std; variance: relative), compared with",
        "float64 sums of the same float32 activations. Memory: peak of the process, relative to the plain loop.",
        "",
        "| network | batch | implementation | seconds | / plain loop | / channels_last loop | peak memory | error |",
        "|---|---|---|---|---|---|---|---|",
    )
    for name in options.networks:
        for batch_size in options.batch_sizes:
            yield from _one_network(name, batch_size, options)


def _one_network(name: str, batch_size: int, options: argparse.Namespace) -> Iterator[str]:
    device, autocast = options.device, options.autocast
    batches = batches_of(max(options.images, batch_size), batch_size, device)
    networks = {method: network_of(name, device) for method in METHODS}
    layers = layers_of(networks["bn-insert"], batches[0])
    formats = {method: torch.channels_last if method == "bn-insert" else torch.contiguous_format for method in METHODS}
    truths = {
        memory_format: reference(network_of(name, device), layers, batches, memory_format)
        for memory_format in set(formats.values())
    }
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    errors: dict[str, float] = {}
    for turn in range(options.repeats + 1):  # the first turn warms up, and is looked at for its error
        for method, take in METHODS.items():
            network = networks[method]
            if turn == 0:
                found = take(network, layers, batches, autocast)
                errors[method] = error(found, truths[formats[method]]) if found else float("nan")
                continue
            times[method].append(seconds_of(lambda: take(network, layers, batches, autocast), device))  # noqa: B023
    median = {method: statistics.median(taken) for method, taken in times.items()}
    memory = {method: _peak_memory(name, batch_size, method, options) for method in METHODS}
    for method in METHODS:
        to_plain = _ratio(times[method], times["plain loop"])
        to_channels_last = _ratio(times[method], times["plain loop, channels_last"])
        wrong = "" if method.startswith("plain") else f"{errors[method]:.0e}"
        yield (
            f"| {name} | {batch_size} | {method} | {median[method]:.2f} | {to_plain:.2f} | {to_channels_last:.2f} "
            f"| {memory[method] / memory['plain loop']:.2f} | {wrong} |"
        )
    fastest = min(OTHER_TOOLS, key=lambda method: median[method])
    weights = sum(p.numel() * p.element_size() for p in networks["bn-insert"].parameters())
    extra = (memory["bn-insert"] - 1.05 * memory["plain loop"]) / weights
    yield (
        f"| {name} | {batch_size} | *the fastest alternative, {fastest}, takes "
        f"{_ratio(times[fastest], times['bn-insert']):.2f} times as long as bn-insert; memory of bn-insert in excess "
        f"of 1.05 plain loops: {extra:.2f} copies of the weights* | | | | | |"
    )


def _ratio(times: list[float], others: list[float]) -> float:
    """Return the median of the ratios turn by turn: a slow moment of the machine meets both sides."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def _peak_memory(name: str, batch_size: int, method: str, options: argparse.Namespace) -> float:
    """Return the peak memory of one method in a process of its own, in bytes: the GPU's where it runs there."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        images = max(options.images, batch_size)
        return pool.submit(_measured_peak, name, batch_size, method, images, options.device, options.autocast).result()


def _measured_peak(  # noqa: PLR0917 - one measurement has that many settings
    name: str, batch_size: int, method: str, images: int, device: torch.device, autocast: torch.dtype | None
) -> float:
    network = network_of(name, device)
    batches = batches_of(images, batch_size, device)
    layers = layers_of(network, batches[0]) if method == "bn-insert" else _layer_names(network)
    METHODS[method](network, layers, batches, autocast)
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return _peak_of_this_process()


def _peak_of_this_process() -> float:
    """Return the peak of resident memory in bytes; getrusage's would count the parent's before exec too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _layer_names(network: nn.Module) -> list[str]:
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return names[:-1]


def small_networks(options: argparse.Namespace) -> Iterator[str]:
    """Time of a calibration of small networks, as a ratio to the plain loop over the same batches."""
    batch_sizes = (4, 32, 256)
    device = options.device
    seconds = partial(
        seconds_of, device=device, clock=time.perf_counter if device.type == "cuda" else time.process_time
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield from (
        f"One thread on {device}, median of {options.repeats} rounds: time of `calibrate`, relative to a plain forward",
        "loop over the same batches; on a CPU, that of the processor, so that other processes hardly matter. The",
        "sites are found beforehand; copying the network and the passes in which `calibrate` tests whether batches can",
        "run together are included. The images are cuttings of two photographs. There are as many batches as the loop",
        "takes half a second for, from 2 to 1,024: many of 4 images, two of 256 for the largest network. The second",
        "figure is the plain loop with a hook behind each layer that adds up its outputs once and keeps nothing: what",
        "has to read every output takes about as long, unless the network itself runs faster in `calibrate`.",
        "",
        f"| network | {' | '.join(f'batches of {size}' for size in batch_sizes)} |",
        f"|---|{'---|' * len(batch_sizes)}",
    )
    photographs = torch.cat(batches_of(2 * max(batch_sizes), 64, device))
    for name, network in SMALL_NETWORKS.items():
        torch.manual_seed(0)
        model = network.make().eval().to(device)
        images = _resized(photographs, network.shape)
        sites = find_sites(model, images[:1])
        cells = []
        for size in batch_sizes:
            batches = list(images.split(size))
            plain(model, [], batches[:2], None)
            of_two = seconds(partial(plain, model, [], batches[:2], None))
            count = round(min(max(2 * 0.5 / of_two, 2), 1024))
            batches = list(islice(cycle(batches), count))
            works = (
                partial(plain, model, [], batches, None),
                partial(calibrate, model, sites, batches),
                partial(read_once, model, [site.name for site in sites], batches, None),
            )
            rounds = [[seconds(work) for work in works] for _ in range(options.repeats + 1)]
            ratios = [[each / loop for each in others] for loop, *others in rounds[1:]]  # the first round warms up
            ours, once = (statistics.median(each) for each in zip(*ratios, strict=True))
            cells.append(f"{ours:.2f}, {once:.2f} ({count:,} batches)")
        yield f"| {name} | {' | '.join(cells)} |"
    torch.set_num_threads(threads)


def _resized(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return color images of another size, in grey for one channel, and with grey as a fourth channel."""
    resized = F.interpolate(images, shape[1:], mode="area")
    with_grey = torch.cat([resized, resized.mean(1, keepdim=True)], 1)
    return with_grey[:, 3:] if shape[0] == 1 else with_grey[:, : shape[0]]


def growth(options: argparse.Namespace) -> Iterator[str]:
    """Time and peak memory of a calibration over more and more images, VGG16, made as they are read."""
    yield from ("| images | seconds | images per second | peak memory, MiB |", "|---|---|---|---|")
    for images in (64, 128, 256, 512):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            seconds, peak = pool.submit(_measured_growth, images, options.device).result()
        yield f"| {images} | {seconds:.1f} | {images / seconds:.1f} | {peak / MIB:.0f} |"


def _measured_growth(images: int, device: torch.device) -> tuple[float, float]:
    network = network_of("vgg16", device)
    stream = (torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(n)) for n in range(images // 16))
    sites = find_sites(network, torch.rand(1, 3, 224, 224))
    seconds = seconds_of(lambda: calibrate(network, sites, stream), device)
    return seconds, _peak_of_this_process()


def profile(options: argparse.Namespace) -> Iterator[str]:
    """Where the time of a calibration of VGG16 goes, operation by operation."""
    device = options.device
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    network = network_of("vgg16", device)
    batches = batches_of(options.images, max(options.batch_sizes), device)
    sites = find_sites(network, batches[0][:1])
    calibrate(network, sites, batches, autocast=options.autocast)  # a first one warms up
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if on_gpu else [])]) as profiler:
        whole = seconds_of(lambda: calibrate(network, sites, batches, autocast=options.autocast), device)
    seconds = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        for event in profiler.key_averages()
    }
    largest = sorted(seconds.items(), key=lambda item: -item[1])[:8]
    yield from ("| operation | share of the time |", "|---|---|")
    for name, taken in largest:
        yield f"| `{name}` | {taken / whole:.1%} |"
    yield f"| other operations | {(sum(seconds.values()) - sum(taken for _, taken in largest)) / whole:.1%} |"
    rest = "waiting for the processor" if on_gpu else "Python, between operations"
    yield f"| {rest} | {1 - sum(seconds.values()) / whole:.1%} |"
    yield ""
    yield f"VGG16, {options.images} images in batches of {max(options.batch_sizes)}, on {device}."


TABLES: dict[str, tuple[str, Callable[[argparse.Namespace], Iterator[str]]]] = {
    "methods": ("Calibration compared with a plain loop and with other implementations", against_plain_loop),
    "small-networks": ("Small networks compared with a plain loop", small_networks),
    "profile": ("Where the time goes", profile),
    "growth": ("Time and memory by number of images", growth),
    "end-to-end": ("1,000 JPEGs of 500 x 375, end to end", end_to_end),
    "start-up": ("Start-up time", start_up),
    "around": ("What `insert` spends outside of calibration", around_calibration),
    "processes": ("Two processes compared with one", processes),
}


def main() -> None:
    """Measure the selected tables; each is written, with the machine and versions, as soon as it is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="directory for TABLE.md, one file per table")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=tuple(TABLES))
    parser.add_argument("--networks", nargs="+", default=("vgg11", "vgg16", "vgg19"))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=(8, 32))
    parser.add_argument("--images", type=int, default=32, help="images per turn in the first table")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--command-repeats", type=int, default=3, help="repeats in the tables that time whole commands")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--autocast", type=lambda name: getattr(torch, name), help="such as bfloat16")
    options = parser.parse_args()
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    for table in options.tables:
        title, measure = TABLES[table]
        lines = [f"# {title}", ""]
        print(lines[0], flush=True)
        for line in measure(options):
            lines.append(line)
            print(line, flush=True)
        lines += ["", machine(), ""]
        if options.output:
            name = table + (f"-{options.device.type}" if options.device.type != "cpu" else "")
            (options.output / f"{name}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
