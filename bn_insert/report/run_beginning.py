"""What came before the first step of a training run, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def output_fit_text(fit: Mapping[str, Any]) -> str:
    """Return what the fit of the output layer came to, as a sentence.

    Args:
        fit: `new`, `fitted`, `accuracy` and `reason`, as of `OutputFit`.
    """
    before = f"validation accuracy {fit['accuracy']:.2%} before training" if fit["accuracy"] is not None else ""
    guesses = "The checkpoint's output layer is no better than guessing on these classes"
    if fit["new"]:
        if fit["fitted"]:
            return f"New output layer fitted to the features: {before}."
        return f"The new output layer starts from zeros; it was not fitted, because {fit['reason']}."
    if fit["fitted"]:
        return f"{guesses}, and was fitted anew: {before}."
    if not fit["reason"]:
        return f"Output layer kept: {before}."
    if not before:
        return f"Output layer kept; it could not be checked: {fit['reason']}."
    return f"{guesses}; it was not fitted anew, because {fit['reason']}."


def trials_text(trials: Sequence[Mapping[str, Any]]) -> str:
    """Return the results of learning rate trials as a phrase.

    Args:
        trials: Each with `lr` and `loss`, which is None for a trial that diverged.
    """

    def result(loss: float | None) -> str:
        return "diverged" if loss is None else f"loss {loss:.3g}"

    return ", ".join(f"{trial['lr']:g} ({result(trial['loss'])})" for trial in trials)
