"""The learning rate of each step."""

from __future__ import annotations

import math

from .settings import TrainingSettings

_WARMUP_START = 0.01  # fraction of the peak, as in torchvision's reference


def learning_rate(settings: TrainingSettings, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step.

    A closed form, unlike the recursions of `torch.optim.lr_scheduler`: a resumed run needs no state of the schedule,
    and the warm-up may last a fraction of an epoch.

    Args:
        settings: Peak (not None), warm-up and schedule.
        step: Steps since the start of the run, from 0.
        steps_per_epoch: Steps in one epoch.

    Examples:
        >>> settings = TrainingSettings(epochs=2, lr=1.0, lr_warmup_epochs=0)
        >>> [round(learning_rate(settings, step, 2), 3) for step in range(4)]
        [1.0, 0.854, 0.5, 0.146]
    """
    if settings.lr is None:
        raise ValueError("the learning rate has not been chosen")
    epoch = step / steps_per_epoch
    if epoch < settings.lr_warmup_epochs:
        return settings.lr * (_WARMUP_START + (1 - _WARMUP_START) * epoch / settings.lr_warmup_epochs)
    after_warmup = epoch - settings.lr_warmup_epochs
    if settings.lr_scheduler == "cosine":
        length = settings.epochs - settings.lr_warmup_epochs
        return settings.lr * (1 + math.cos(math.pi * after_warmup / length)) / 2
    if settings.lr_scheduler == "step":
        return settings.lr * settings.lr_gamma ** int(after_warmup // settings.lr_step_size)
    return settings.lr
