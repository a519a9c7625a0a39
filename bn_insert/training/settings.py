"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import numpy as np

from ..batchnorm.modes import BatchNormMode
from ..errors import TrainingError, as_passed
from ..support.schema import SchemaError, checked
from ..surgery.history import WIDEST_HEAD

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["constant", "cosine", "step"]
Trained = Literal["all", "batchnorm", "head"]

_LEAST = {
    "epochs": 1,
    "batch_size": 1,
    "lr_step_size": 1,
    "recalibration_images": 2,
    "accumulate": 1,
    "patience": 1,
    "head": 1,
}
_KINDS = {int: "a whole number", float: "a number", bool: "True or False", type(None): "None"}


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a training run; their names are those of torchvision's classification reference.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per step and process.
        lr: Peak learning rate; with None, `finetune` chooses it in short trials.
        lr_warmup_epochs: Epochs over which the learning rate rises from 1% of `lr`; 0.5 is half an epoch.
        lr_scheduler: Schedule after warm-up: "constant"; "cosine" falls to 0 at the last step; "step" multiplies by
            `lr_gamma` every `lr_step_size` epochs.
        lr_step_size: Epochs between steps of the schedule "step".
        lr_gamma: Factor of each step of the schedule "step".
        opt: "adamw" or "sgd".
        momentum: SGD momentum, below 1.
        weight_decay: Weight decay of weights.
        norm_weight_decay: Weight decay of gamma and beta; see `parameter_groups`.
        label_smoothing: Label smoothing of the training loss, from 0 to below 1.
        amp: Train under bfloat16 autocast.
        sync_bn: Take the statistics of BatchNorms over the batches of all processes; with `batchnorm` "renorm" on any
            device, otherwise on GPUs only.
        batchnorm: How BatchNorm layers behave in training; see `set_batchnorm_mode`. With None, `finetune` uses
            "renorm" for batches of fewer than 8 images, which are too few to normalize by, and "train" for others, for
            a new head and for BatchNorms without running statistics.
        renorm_r_max: With `batchnorm` "renorm", the limit of r in every step, see `BatchRenorm2d`; `math.inf` for no
            limit. With None for this and for `renorm_d_max`, a `RenormScheduler` sets both.
        renorm_d_max: The same for d.
        train: Parameters to train: "all"; "batchnorm", gamma and beta of every BatchNorm and the head, for which no
            gradients of other weights are computed (Frankle et al., 2021, arXiv:2003.00152); or "head", only the head,
            while BatchNorm outside of it is frozen. The head is the output layer, or the new head of `head`.
        head: Width of a new head that replaces the dense layers, see `replace_head`; None keeps them, and replaces only
            the output layer if the number of classes differs. BatchNorm in a new head is trained even where `batchnorm`
            freezes the others.
        fit_output: Before anything is trained, fit the output layer if it is new or little better than guessing, unless
            it is part of a new head; see `fit_output`.
        freeze_features: Train only `model.classifier`.
        dropout: Probability of every dropout layer; None switches all off in a network with a BatchNorm that
            normalizes by the batch, and leaves them unchanged in others.
        recalibrate: Re-estimate running statistics on training images before each validation.
        recalibration_images: Number of training images for it.
        hflip: Probability of mirroring a training image from left to right.
        crop_scale: Smallest fraction of the area that a random resized crop of a training image keeps, as
            torchvision's `RandomResizedCrop` does; 1 crops none.
        seed: Seed for the order of the images, for mirroring, cropping and dropout, and for a new head.
        accumulate: Batches whose gradients are accumulated for each step. BatchNorm still normalizes each batch on its
            own: its statistics are those of `batch_size` images.
        patience: Stop after this many epochs without an improvement in validation accuracy; None trains for all epochs.

    Raises:
        TrainingError: If a value has the wrong type, is out of range, or would be left unused by another setting.
    """

    epochs: int = 10
    batch_size: int = 32
    lr: float | None = None
    lr_warmup_epochs: float = 0.5
    lr_scheduler: Schedule = "cosine"
    lr_step_size: int = 30
    lr_gamma: float = 0.1
    opt: Optimizer = "adamw"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_weight_decay: float = 0.0
    label_smoothing: float = 0.0
    amp: bool = False
    sync_bn: bool = False
    batchnorm: BatchNormMode | None = None
    renorm_r_max: float | None = None
    renorm_d_max: float | None = None
    train: Trained = "all"
    head: int | None = None
    fit_output: bool = True
    freeze_features: bool = False
    dropout: float | None = None
    recalibrate: bool = True
    recalibration_images: int = 1024
    hflip: float = 0.0
    crop_scale: float = 1.0
    seed: int = 0
    accumulate: int = 1
    patience: int | None = None

    def __post_init__(self) -> None:
        """Check each value before anything is read."""
        self._check_kinds()
        self._check_counts()
        if not 0 < self.crop_scale <= 1:
            raise TrainingError(
                f"{as_passed('crop_scale')} is {self.crop_scale}; use a fraction of the area above 0, up to 1"
            )
        if not 0 <= self.seed < 1 << 32:
            raise TrainingError(f"{as_passed('seed')} is {self.seed}; use 0 to {(1 << 32) - 1}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise TrainingError(f"{as_passed('lr')} is {self.lr}; use a finite learning rate above 0")
        for name in ("weight_decay", "norm_weight_decay", "lr_gamma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise TrainingError(f"{as_passed(name)} is {getattr(self, name)}; use 0 or more")
        for name in ("momentum", "label_smoothing", "dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise TrainingError(f"{as_passed(name)} is {value}; use 0 or more, but less than 1")
        if not 0 <= self.hflip <= 1:
            raise TrainingError(f"{as_passed('hflip')} is {self.hflip}; use 0 to 1")
        if not 0 <= self.lr_warmup_epochs <= self.epochs:
            raise TrainingError(
                f"{as_passed('lr_warmup_epochs')} is {self.lr_warmup_epochs}; use 0 to {self.epochs}, the number of "
                "epochs"
            )
        self._check_used()
        self._check_renorm()
        self._check_trained()

    def _check_kinds(self) -> None:
        """Check the kind of each value, and turn those of NumPy into Python's, which can be saved."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            try:
                plain = checked(value.item() if isinstance(value, np.generic) else value, kind)
            except SchemaError:
                *others, last = (_KINDS.get(each, repr(each)) for each in get_args(kind) or (kind,))
                usable = f"{', '.join(others)} or {last}" if others else last
                raise TrainingError(f"{as_passed(name)} is {value!r:.60}; use {usable}") from None
            object.__setattr__(self, name, plain)  # the fields are frozen

    def _check_counts(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise TrainingError(f"{as_passed(name)} is {value}; use {least} or more")
        if self.head is not None and self.head > WIDEST_HEAD:
            raise TrainingError(f"{as_passed('head')} is {self.head}; use at most {WIDEST_HEAD}")

    def _check_used(self) -> None:
        """Refuse values that nothing reads."""
        for name, chooser, reader in (
            ("momentum", "opt", "sgd"),
            ("lr_gamma", "lr_scheduler", "step"),
            ("lr_step_size", "lr_scheduler", "step"),
        ):
            if getattr(self, name) != getattr(type(self), name) and getattr(self, chooser) != reader:
                choice = as_passed(chooser, getattr(self, chooser))
                raise TrainingError(
                    f"{choice} does not use {as_passed(name)}; leave it out, or use it with "
                    f"{as_passed(chooser, reader)}"
                )

    def _check_renorm(self) -> None:
        for name, least in (("renorm_r_max", 1), ("renorm_d_max", 0)):
            limit = getattr(self, name)
            if limit is not None and self.batchnorm != "renorm":
                raise TrainingError(
                    f"{as_passed(name)} is a limit of Batch Renormalization; leave it out, or use it with "
                    f"{as_passed('batchnorm', 'renorm')}"
                )
            if limit is not None and not limit >= least:
                raise TrainingError(f"{as_passed(name)} is {limit}; use {least} or more")

    def _check_trained(self) -> None:
        if self.train != "all" and self.freeze_features:
            raise TrainingError(
                f"{as_passed('freeze_features')} and {as_passed('train', self.train)} both select what is trained; "
                "leave out one of them"
            )
        if self.train == "batchnorm" and self.batchnorm == "freeze":
            raise TrainingError(
                f"{as_passed('train', 'batchnorm')} trains gamma and beta, and {as_passed('batchnorm', 'freeze')} "
                f"does not; use {as_passed('train', 'head')}, or another mode"
            )

    @property
    def renorm_limits(self) -> tuple[float, float] | None:
        """The limits of Batch Renormalization, r_max and d_max; None if a `RenormScheduler` sets them."""
        if self.renorm_r_max is None and self.renorm_d_max is None:
            return None
        r_max, d_max = (math.inf if limit is None else limit for limit in (self.renorm_r_max, self.renorm_d_max))
        return r_max, d_max
