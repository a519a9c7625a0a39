"""One run of the fine-tuning benchmark: a method, a learning rate, a seed, and what came out."""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from bn_insert import insert_batchnorm
from bn_insert.checkpoints.load import load_checkpoint
from bn_insert.statistics.recalibrate import recalibrate

from .data import CLASSES, Split, load_split

METHODS = {
    "none": "no BatchNorm",
    "head": "BatchNorm in the new head alone",
    "fresh": "fresh BatchNorm (gamma 1, beta 0)",
    "identity": "identity BatchNorm",
    "equalized": "equalized + identity BatchNorm",
}
BATCH = 32
MOMENTUM = 0.9
HIDDEN = 256
CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Setting:
    """What determines a run: equal settings give equal runs."""

    dataset: str
    input_range: str
    method: str
    learning_rate: float
    seed: int
    steps: int
    precision: str


@dataclass(frozen=True)
class Measurement:
    """Validation accuracy after so many steps, with the running and with re-estimated statistics."""

    step: int
    train_loss: float
    accuracy: float
    recalibrated_accuracy: float


@dataclass(frozen=True)
class Result:
    """The measurements of a run; `failed_at` is the step whose loss was not finite, or None."""

    setting: Setting
    measurements: tuple[Measurement, ...]
    failed_at: int | None
    seconds: float
    environment: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return the result as plain values; `from_json` is the way back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Result:
        """Return the result that `as_json` gave these values for."""
        return cls(
            Setting(**values["setting"]),
            tuple(Measurement(**measurement) for measurement in values["measurements"]),
            values["failed_at"],
            values["seconds"],
            values["environment"],
        )


def run(setting: Setting, checkpoint: Path) -> Result:
    """Fine-tune as the setting says; stop at the first loss that is not finite."""
    began = time.monotonic()
    split = _split(setting.dataset, setting.input_range)
    model = _model(setting, checkpoint)
    due = _evaluation_steps(setting.steps)
    measurements: list[Measurement] = []
    failed_at = None
    for step, loss in enumerate(_train(model, split, setting), 1):
        if not math.isfinite(loss):
            failed_at = step
            break
        if step in due:
            measurements.append(_measure(model, split, setting, step, loss))
    seconds = round(time.monotonic() - began, 1)
    return Result(setting, tuple(measurements), failed_at, seconds, environment())


def environment() -> dict[str, str]:
    """Return what the figures may depend on beside the setting."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": _processor(),
        "torch": torch.__version__.split("+")[0],
        "torchvision": torchvision.__version__.split("+")[0],
    }


def _evaluation_steps(steps: int) -> set[int]:
    return {max(1, round(steps * share)) for share in (0.16, 0.32, 0.64, 1)}


def _train(model: nn.Module, split: Split, setting: Setting) -> Iterator[float]:
    """Take the setting's steps one by one, giving each one's loss; a loss that is not finite changes nothing."""
    optimizer = torch.optim.SGD(model.parameters(), setting.learning_rate, momentum=MOMENTUM, fused=True)
    for indices in _batches(len(split.train_images), setting.steps, setting.seed):
        model.train()
        with _autocast(setting):
            logits = model(split.train_images[indices])
        loss = F.cross_entropy(logits.float(), split.train_classes[indices])
        if loss.isfinite():
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield loss.item()


def _batches(images: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * BATCH / images)
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(epochs)])
    yield from order[: steps * BATCH].split(BATCH)


def _model(setting: Setting, checkpoint: Path) -> nn.Module:
    """The pretrained features as the method prepares them, and on top of what they give the new head."""
    features = copy.deepcopy(_features(setting.method, checkpoint, setting.dataset, setting.input_range))
    model = nn.Sequential(features, _head(setting.seed, normalized=setting.method != "none"))
    return model.to(memory_format=torch.channels_last)


@lru_cache(maxsize=2)
def _features(method: str, checkpoint: Path, dataset: str, input_range: str) -> nn.Module:
    vgg = load_checkpoint(checkpoint).requires_grad_(True)
    if method in ("none", "head"):
        return vgg.get_submodule("features")
    images = _split(dataset, input_range).train_images[:CALIBRATION_IMAGES]
    inserted = insert_batchnorm(vgg, images.split(BATCH), layers=["conv"], equalize=method == "equalized")
    features = inserted.get_submodule("features")
    if method == "fresh":
        for norm in _norms(features):
            norm.reset_parameters()
    return features


def _head(seed: int, *, normalized: bool) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden, output = nn.Linear(512, HIDDEN), nn.Linear(HIDDEN, CLASSES)
    norm = [nn.BatchNorm1d(HIDDEN)] if normalized else []
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), hidden, *norm, nn.ReLU(), output)


def _measure(model: nn.Module, split: Split, setting: Setting, step: int, loss: float) -> Measurement:
    accuracy = _accuracy(model, split, setting)
    if not _norms(model):
        return Measurement(step, loss, accuracy, accuracy)
    autocast = torch.bfloat16 if setting.precision == "bfloat16" else None
    recalibrated = recalibrate(model, split.train_images[:CALIBRATION_IMAGES].split(BATCH), autocast=autocast)
    return Measurement(step, loss, accuracy, _accuracy(recalibrated, split, setting))


@torch.no_grad()
def _accuracy(model: nn.Module, split: Split, setting: Setting) -> float:
    model.eval()
    with _autocast(setting):
        logits = torch.cat([model(images) for images in split.validation_images.split(100)])
    return (logits.float().argmax(1) == split.validation_classes).double().mean().item()


def _norms(model: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]


def _autocast(setting: Setting) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bfloat16")


@lru_cache(maxsize=2)
def _split(dataset: str, input_range: str) -> Split:
    return load_split(dataset, input_range)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
