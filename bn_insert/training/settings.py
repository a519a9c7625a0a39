"""How a network is fine-tuned: the numbers and choices of a training run, and the learning rate that they give."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..batchnorm.modes import BatchNormMode
from ..errors import TrainingError

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["constant", "cosine", "step"]

_WARMUP_START = 0.01  # of the learning rate, as in torchvision's reference


@dataclass(frozen=True)
class TrainingSettings:
    """What makes a training run what it is; the names are those of torchvision's classification reference.

    epochs: passes over the training images. batch_size: images a step and process. lr: learning rate at its highest.
    lr_warmup_epochs: it rises from 1 % of `lr` for so long; 0.5 is half an epoch.
    lr_scheduler: what it does then: "constant"; "cosine": falls to 0 at the last step; "step": is multiplied by
        lr_gamma every lr_step_size epochs.
    opt: "sgd" with `momentum`, or "adamw". norm_weight_decay: for gamma and beta, see `parameter_groups`.
    amp: bfloat16 autocast. sync_bn: normalize by the batches of all processes; GPUs alone.
    batchnorm: see `freeze_batchnorm`. freeze_features: train `model.classifier` alone.
    dropout: p of every dropout layer; None leaves them as they are.
    recalibrate: before each validation, make the running statistics those of `recalibration_images` training images.
    hflip: probability of mirroring a training image from left to right.
    seed: of the order of the images, of mirroring and of dropout.
    Raises TrainingError for a value out of its range.
    """

    epochs: int = 10
    batch_size: int = 32
    lr: float = 0.01
    lr_warmup_epochs: float = 0.0
    lr_scheduler: Schedule = "cosine"
    lr_step_size: int = 30
    lr_gamma: float = 0.1
    opt: Optimizer = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_weight_decay: float = 0.0
    label_smoothing: float = 0.0
    amp: bool = False
    sync_bn: bool = False
    batchnorm: BatchNormMode = "train"
    freeze_features: bool = False
    dropout: float | None = None
    recalibrate: bool = True
    recalibration_images: int = 1024
    hflip: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check each value, so that a mistake shows before anything is read."""
        for name, least in (("epochs", 1), ("batch_size", 1), ("lr_step_size", 1), ("recalibration_images", 2)):
            if getattr(self, name) < least:
                raise TrainingError(f"{name} is {getattr(self, name)}; give {least} or more")
        if not 0 <= self.seed < 1 << 32:
            raise TrainingError(f"seed is {self.seed}; give 0 to {(1 << 32) - 1}")
        if not 0 < self.lr < math.inf:
            raise TrainingError(f"lr is {self.lr}; give a learning rate above 0")
        for name in ("weight_decay", "norm_weight_decay", "lr_gamma", "momentum"):
            if not 0 <= getattr(self, name) < math.inf:
                raise TrainingError(f"{name} is {getattr(self, name)}; give 0 or more")
        for name, value in (
            ("label_smoothing", self.label_smoothing),
            ("dropout", self.dropout),
            ("hflip", self.hflip),
        ):
            if value is not None and not 0 <= value <= 1:
                raise TrainingError(f"{name} is {value}; give 0 to 1")
        if not 0 <= self.lr_warmup_epochs <= self.epochs:
            raise TrainingError(f"lr_warmup_epochs is {self.lr_warmup_epochs}; give 0 to the {self.epochs} of epochs")
        for name, choices in (("opt", Optimizer), ("lr_scheduler", Schedule), ("batchnorm", BatchNormMode)):
            if getattr(self, name) not in get_args(choices):
                raise TrainingError(f"{name} is one of {', '.join(get_args(choices))}, not {getattr(self, name)!r}")

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step; steps are counted from 0 over the whole run.

        >>> settings = TrainingSettings(epochs=2, lr=1.0)
        >>> [round(settings.learning_rate(step, 2), 3) for step in range(4)]
        [1.0, 0.854, 0.5, 0.146]
        """
        epoch = step / steps_per_epoch
        if epoch < self.lr_warmup_epochs:
            return self.lr * (_WARMUP_START + (1 - _WARMUP_START) * epoch / self.lr_warmup_epochs)
        after_warmup = epoch - self.lr_warmup_epochs
        if self.lr_scheduler == "cosine":
            return self.lr * (1 + math.cos(math.pi * after_warmup / (self.epochs - self.lr_warmup_epochs))) / 2
        if self.lr_scheduler == "step":
            return self.lr * self.lr_gamma ** int(after_warmup // self.lr_step_size)
        return self.lr
