"""One run of the study: a case, a method, a learning rate and a seed, and the accuracies that came out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_insert import fit_output, recalibrate

from .cases import Case, Places
from .images import Part, Split
from .methods import Method, optimizer, prepared

CALIBRATION_IMAGES, WEIGHT_DECAY, WARM_UP = 512, 1e-4, 0.1
FITTED_TO, FITTED_BY = 1024, 256  # images that an output layer is fitted to, and validation images for its penalty
EVALUATED_AT = (0.25, 1.0)  # fractions of the steps


_before: dict[tuple[str, Method, int], tuple[float, float]] = {}


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on the validation images after `step` steps."""

    step: int
    validation: float


@dataclass(frozen=True)
class Run:
    """The accuracies of a run, on validation images during it and on test images at its end.

    Where the network already knows the classes, the first is before any step. A run ends where the loss is not finite.
    """

    accuracies: tuple[Accuracy, ...]
    test_before: float | None
    test: float
    finite: bool
    seconds: float

    @property
    def validation(self) -> float:
        """The validation accuracy at the end, 0 where the loss was not finite."""
        return self.accuracies[-1].validation if self.finite else 0.0


def run(case: Case, method: Method, rate: float, seed: int, places: Places) -> Run:
    """Fine-tune and return the accuracies: warm-up over a tenth of the steps, then cosine."""
    began = time.monotonic()
    split = case.images(places, seed)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    calibration = _sample(case, split, generator)
    source = None if case.source is None else _chosen(case, case.source(places), CALIBRATION_IMAGES, generator)
    network = prepared(case.load(places), method, calibration, source)
    if method.fit:
        train, validation = (
            _batches(case, part, count, generator)
            for part, count in ((split.train, FITTED_TO), (split.validation, FITTED_BY))
        )
        fit_output(network, train, validation)
    network = network.to(memory_format=torch.channels_last)
    steps = optimizer(network, method, rate, WEIGHT_DECAY)
    evaluated, accuracies, test_before = network, [], None
    if case.knows_classes:
        validation_before, test_before = before(network, case, method, seed, split)
        accuracies.append(Accuracy(0, validation_before))
    finite = True
    due = {round(case.steps * fraction) for fraction in EVALUATED_AT}
    for step, rows in enumerate(_rows(len(split.train), case, generator)):
        for group in steps.param_groups:
            group["lr"] = group["initial_lr"] * _schedule(step, case.steps)
        images = case.preprocess(
            _mirrored(split.train.pixels[rows], generator) if case.mirror else split.train.pixels[rows]
        )
        network.train()
        loss = F.cross_entropy(network(images.contiguous(memory_format=torch.channels_last)), split.train.classes[rows])
        if not loss.isfinite():
            finite = False
            break
        steps.zero_grad()
        loss.backward()
        steps.step()
        if step + 1 in due:
            evaluated = reestimated(network, method, calibration)
            accuracies.append(Accuracy(step + 1, accuracy(evaluated, case, split.validation)))
    if not finite:
        return Run(
            (*accuracies, Accuracy(case.steps, 0.0)), test_before, 0.0, finite, round(time.monotonic() - began, 1)
        )
    test = accuracy(evaluated, case, split.test)
    return Run(tuple(accuracies), test_before, test, finite, round(time.monotonic() - began, 1))


def _schedule(step: int, steps: int) -> float:
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def _rows(images: int, case: Case, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the rows of each batch: every image once an epoch, in random order; batches may span two epochs."""
    epochs = math.ceil(case.steps * case.batch / images)
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(epochs)])
    yield from order[: case.steps * case.batch].split(case.batch)


def _mirrored(pixels: Tensor, generator: torch.Generator) -> Tensor:
    mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)


def _chosen(case: Case, part: Part, count: int, generator: torch.Generator) -> Tensor:
    rows = torch.randperm(len(part), generator=generator)[:count]
    return case.preprocess(part.pixels[rows])


def _batches(case: Case, part: Part, count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in torch.randperm(len(part), generator=generator)[:count].split(64):
        yield case.preprocess(part.pixels[rows]), part.classes[rows]


def _sample(case: Case, split: Split, generator: torch.Generator) -> Tensor:
    return _chosen(case, split.train, CALIBRATION_IMAGES, generator)


def reestimated(network: nn.Module, method: Method, calibration: Tensor) -> nn.Module:
    """Return a network to evaluate, its running statistics re-estimated on training images where the method says so."""
    normalized = any(isinstance(module, _BatchNorm) for module in network.modules())
    return recalibrate(network, calibration.split(64)) if normalized and method.reestimate else network


def before(network: nn.Module, case: Case, method: Method, seed: int, split: Split) -> tuple[float, float]:
    """Return the validation and test accuracy before training: once for all learning rates."""
    key = (case.title, method, seed)
    if key not in _before:
        _before[key] = accuracy(network, case, split.validation), accuracy(network, case, split.test)
    return _before[key]


@torch.inference_mode()
def accuracy(network: nn.Module, case: Case, part: Part) -> float:
    """Return the accuracy in eval mode."""
    network.eval()
    correct = 0
    for pixels, classes in zip(part.pixels.split(100), part.classes.split(100), strict=True):
        images = case.preprocess(pixels).contiguous(memory_format=torch.channels_last)
        correct += int((network(images).argmax(1) == classes).sum())
    return correct / len(part)
