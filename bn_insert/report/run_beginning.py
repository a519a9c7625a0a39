"""What came before the first step of a training run, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import as_passed

_CLEARLY_LOWER = 0.05  # accuracy
# By the margins of the learning rate trials.
SMALL_DIFFERENCE = "a higher learning rate must lower the loss by 3%, a lower one by 10%"


def output_fit_text(fit: Mapping[str, Any]) -> str:
    """Return the outcome of the fit of the output layer, as a sentence.

    Args:
        fit: `new`, `fitted`, `accuracy`, `own_accuracy` and `reason`, as in `OutputFit`; `reestimated_accuracy` too, if
            it was measured.
    """
    lowered = ""
    if lowered_by_reestimation(fit):
        lowered = (
            " Re-estimating BatchNorm's running statistics on the training images alone lowers it to "
            f"{fit['reestimated_accuracy']:.2%}; {keep_statistics()} keeps them as they are."
        )
    return _fit_text(fit) + lowered


def lowered_by_reestimation(fit: Mapping[str, Any]) -> bool:
    """Return whether the re-estimation of running statistics on the training images spoils a network that was good."""
    before, after = fit.get("accuracy"), fit.get("reestimated_accuracy")
    return before is not None and after is not None and before - after > _CLEARLY_LOWER


def keep_statistics() -> str:
    """Return the argument that keeps the running statistics of BatchNorm.

    Without re-estimation, training would still move them to those of its images, only more slowly.
    """
    return as_passed("batchnorm", "freeze-statistics")


def _fit_text(fit: Mapping[str, Any]) -> str:
    before = ""
    if fit["accuracy"] is not None:
        before = f"validation accuracy {fit['accuracy']:.2%} before training"
    own = "The checkpoint's output layer is little better than guessing on these classes"
    if fit["own_accuracy"] is not None:
        own += f" (validation accuracy {fit['own_accuracy']:.2%})"
    if fit["new"]:
        if fit["fitted"]:
            return f"New output layer fitted to the features: {before}."
        return f"The new output layer was not fitted, because {fit['reason']}."
    if fit["fitted"]:
        return f"{own}, so it was fitted anew: {before}."
    if not fit["reason"]:
        return f"Output layer kept: {before}."
    if not before:
        return f"Output layer kept; it could not be checked: {fit['reason']}."
    return f"{own}, but was kept, because {fit['reason']}."


def choice_text(lr: float | None, trials: Mapping[float, float]) -> str:
    """Return which learning rate was given, or chosen by trials, as a phrase.

    Args:
        lr: The learning rate; None if it is not chosen yet.
        trials: The loss by the learning rate, infinite for a trial that diverged; empty if there were none.
    """
    results = ", ".join(f"{rate:g} ({_loss_text(loss)})" for rate, loss in trials.items())
    if lr is None:
        return "not chosen yet" + (f"; trials so far: {results}" if trials else "")
    if not trials:
        return f"{lr:g}"
    text = f"{lr:g}, chosen by trials of {results}"
    return text + (f"; {SMALL_DIFFERENCE}" if min(trials.values()) < trials[lr] else "")


def _loss_text(loss: float) -> str:
    return "diverged" if math.isinf(loss) else f"loss {loss:.3g}"
