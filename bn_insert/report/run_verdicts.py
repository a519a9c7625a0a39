"""Whether a training run learned, and which of several runs is best, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..errors import as_passed
from ..support.text import counted
from .verdict import Verdict

EARLY_STOP = "Early stop"  # subject of the verdict on a run that ended because of its patience

# Times the loss of guessing, at which an output layer of zeros starts: above this, training has failed, and a
# falling loss does not mean that more epochs would help.
_TOO_HIGH = 2.0
_NEARLY_ALL = 0.98  # of the validation images: nothing is left to improve on
_LITTLE = 0.75  # of the loss of guessing: at this fraction two classes are told apart in three of four images
_EPOCHS_AFTER_BEST = 2  # after which the first epoch is said to be the best
_FALLING = (0.05, 0.01)  # smallest fall of the loss in one epoch: relative to it, and to that of guessing
_FLAT = 1.01  # times the lowest loss: a last loss up to this has not risen
_FAR_BELOW = 0.1 + 1e-9  # how far the accuracy may fall from the best epoch to the last
_FAR_LOWER = 0.2  # of the usual learning rate
_FAR_HIGHER = 100  # times the rate that the trials start with
FIRST_TRIED = {"adamw": 0.0003, "sgd": 0.003}  # learning rates at which trials start


def run_health(
    epochs: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    output_fit: Mapping[str, Any] | None = None,
) -> list[Verdict]:
    """Return what is wrong with a run, or one verdict that nothing is.

    Args:
        epochs: The metrics of each completed epoch.
        settings: The training settings.
        data: `classes`, the number of classes; `largest_class`, the share of validation images in the largest one;
            `output_replaced`, whether the run began with a new output layer; `output_kind`, "dense" or "conv";
            `epochs_for_trials`, how many epochs learning rate trials need if the run was too short for them. What
            depends on a missing one is not checked.
        output_fit: `fitted` and `accuracy`, as in `OutputFit`; None if there was no fit.
    """
    if not epochs:
        return [Verdict("check", "Epochs", "No epoch has been completed: the run is in progress, or was stopped.")]
    found = [*_end(epochs, settings), *_accuracy(epochs, data)]
    classes = data.get("classes", 0)
    new_output = bool(data.get("output_replaced") or (output_fit and output_fit["fitted"]))
    needed = data.get("epochs_for_trials")
    new_head = new_output and data.get("output_kind") != "conv"
    lower_rate = lower_rate_advice(settings, new_head=new_head, epochs_for_trials=needed)
    new_run = f"in a new run with {as_passed('epochs', needed)} or more" if needed else ""
    more_epochs = new_run or _more_epochs(epochs, settings)
    # After a run that may have learned too little at its rate, rather than lost what it had.
    slow = _too_slow(epochs, settings)
    other_rate = f"Train for more epochs ({more_epochs})." if slow else lower_rate
    if needed:
        other_rate = (
            f"Train for longer, in a new run with {as_passed('epochs', needed)} or more: trials then choose the "
            "learning rate, for which this run was too short."
        )
    if not new_output and settings.get("fit_output") is False:
        fit = as_passed("fit_output", False, "--no-fit-output")
        leave_out = f" If the checkpoint was trained on other classes, leave out {fit}."
        lower_rate, other_rate = lower_rate + leave_out, other_rate + leave_out
    if classes > 1:
        found += _loss(epochs, classes, more_epochs, lower_rate, other_rate)
    if worst(found) != "bad":
        advice = (lower_rate, other_rate, other_rate if slow else lower_rate)
        if any(given in verdict.text for verdict in found for given in (more_epochs, lower_rate)):
            advice = ("", "", "")  # another might contradict it
        found += _accuracies(epochs, output_fit, *advice)
    if worst(found) == "good":
        found.append(Verdict("good", "Training", "No sign of trouble in losses and accuracies."))
    return found


def lower_rate_advice(
    settings: Mapping[str, Any], *, new_head: bool, others: Sequence[str] = (), epochs_for_trials: int | None = None
) -> str:
    """Return what to try after a run whose learning rate was too high, as a sentence.

    Args:
        settings: The training settings.
        new_head: Whether a new head might help: the run began with a new or fitted output layer on the pretrained dense
            layers.
        others: What else might help, as phrases.
        epochs_for_trials: How many epochs learning rate trials need if the run was too short for them.
    """
    rate, lower = settings.get("lr"), f"a lower learning rate ({as_passed('lr')})"
    if isinstance(rate, float):
        lower = f"a third of this learning rate ({as_passed('lr', float(f'{rate / 3:.2g}'))})"
        if rate > _FAR_HIGHER * _first_tried(settings):
            lower = f"the usual learning rate ({as_passed('lr', _first_tried(settings))})"
    head = [f"a new head with BatchNorm ({as_passed('head', 512)})"] if new_head else []
    needed = as_passed("epochs", epochs_for_trials)
    longer = [f"a new run that is long enough for learning rate trials ({needed} or more)"] if epochs_for_trials else []
    *ways, last = [lower, *head, *others, *longer]
    return f"Try {', '.join(ways)} or {last}." if ways else f"Try {last}."


def worst(verdicts: Sequence[Verdict]) -> Literal["good", "check", "bad"]:
    """Return the worst state of several verdicts."""
    states = {verdict.state for verdict in verdicts}
    return "bad" if "bad" in states else "check" if "check" in states else "good"


def _end(epochs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Verdict]:
    """Return why a run did not complete all of its epochs."""
    planned = settings.get("epochs", len(epochs))
    if len(epochs) >= planned:
        return []
    if _out_of_patience(epochs, settings):
        best = _best(epochs)["epoch"]
        text = (
            f"Stopped early, after {len(epochs)} of {planned} epochs: {counted(len(epochs) - best, 'epoch')} without a "
            f"higher validation accuracy than in epoch {best} ({as_passed('patience', settings['patience'])})."
        )
        return [Verdict("good", EARLY_STOP, text)]
    text = f"{len(epochs)} of {planned} epochs were completed: the run is in progress, was stopped, or diverged."
    return [Verdict("check", "Epochs", text)]


def _out_of_patience(epochs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> bool:
    patience = settings.get("patience")
    return patience is not None and len(epochs) - _best(epochs)["epoch"] >= patience


def _accuracy(epochs: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> list[Verdict]:
    share, accuracy = data.get("largest_class"), _best(epochs)["val_accuracy"]
    if share is None or accuracy > share:
        return []
    text = (
        f"The best validation accuracy, {accuracy:.1%}, is not above {share:.1%}, the share of the largest class: "
        "always predicting this class would do as well."
    )
    return [Verdict("bad", "Accuracy", text)]


def _accuracies(
    epochs: Sequence[Mapping[str, Any]],
    output_fit: Mapping[str, Any] | None,
    lower_rate: str,
    not_better: str,
    best_at_first: str,
) -> list[Verdict]:
    """Return what is wrong with how the validation accuracy changed; the first verdict says what to do about it."""
    best, last = _best(epochs), epochs[-1]["val_accuracy"]
    highest, before = best["val_accuracy"], output_fit["accuracy"] if output_fit else None
    fell_far, below = highest - last > _FAR_BELOW, before is not None and last < before
    nothing_left = highest >= max(_NEARLY_ALL, before or 0)
    found = []
    if before is not None and highest <= before and not nothing_left:
        text = f"The best validation accuracy, {highest:.1%}, is not above that before training, {before:.1%}."
        found.append(("Accuracy", text, not_better))
    elif best["epoch"] == 1 and len(epochs) > _EPOCHS_AFTER_BEST and not nothing_left:
        lower = best_at_first and best_at_first == lower_rate
        why = ": a lower learning rate may preserve more of the pretrained network" if lower else ""
        found.append(("Epochs", f"No epoch was better than the first{why}.", best_at_first))
    if fell_far or (before is not None and last < before < highest):
        text = f"The validation accuracy fell from {highest:.1%} in epoch {best['epoch']} to {last:.1%} in the last one"
        text += f", below that before training, {before:.1%}" if below else ""
        found.append(("Accuracy", f"{text}; best.pth is from epoch {best['epoch']}.", lower_rate))
    if not found:
        return []
    (subject, text, advice), *others = found
    first = Verdict("check", subject, f"{text} {lower_rate if fell_far else advice}".strip())
    return [first, *(Verdict("check", subject, text) for subject, text, _ in others)]


def _too_slow(epochs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> bool:
    """Return whether a learning rate may be too low: far below the usual one, or not above it and the loss never rose.

    At a higher one, a loss that stays where it is may also be that of a network that was destroyed.
    """
    rate = settings.get("lr")
    return _far_too_low(settings) or (rate is not None and rate <= _first_tried(settings) and not _rose(epochs))


def _far_too_low(settings: Mapping[str, Any]) -> bool:
    rate = settings.get("lr")
    return rate is not None and rate <= _FAR_LOWER * _first_tried(settings)


def _first_tried(settings: Mapping[str, Any]) -> float:
    return FIRST_TRIED["sgd" if settings.get("opt") == "sgd" else "adamw"]


def _rose(epochs: Sequence[Mapping[str, Any]]) -> bool:
    return bool(epochs[-1]["val_loss"] > _FLAT * min(epoch["val_loss"] for epoch in epochs))


def _loss(
    epochs: Sequence[Mapping[str, Any]], classes: int, more_epochs: str, lower_rate: str, other_rate: str
) -> list[Verdict]:
    guessing, last = math.log(classes), epochs[-1]
    lowest = min(epoch["val_loss"] for epoch in epochs)
    falling = _still_falling(epochs, lowest, guessing)
    found = []
    guess = f"{guessing:.3f} = ln({classes}), the loss of guessing"
    if lowest > guessing:
        way_out = f"Train for more epochs ({more_epochs})." if falling else other_rate
        text = f"The validation loss, {lowest:.3f} at its lowest, is no lower than {guess}. {way_out}"
        found.append(Verdict("bad", "Loss", text))
    elif last["val_loss"] > guessing:
        text = (
            f"The validation loss rose from {lowest:.3f} to {last['val_loss']:.3f}, above {guess}: training diverged. "
            f"{lower_rate}"
        )
        found.append(Verdict("bad", "Loss", text))
    elif lowest > _LITTLE * guessing:
        text = f"The validation loss, {lowest:.3f} at its lowest, is only {1 - lowest / guessing:.1%} below {guess}"
        way_out = f": train for longer ({more_epochs}), or on more images."
        spoiled = _rose(epochs) or (other_rate == lower_rate and any(each["val_loss"] > guessing for each in epochs))
        found.append(Verdict("check", "Loss", text + (f". {lower_rate}" if spoiled else way_out)))
    if falling:
        text = (
            f"The validation loss was still falling, from {epochs[-2]['val_loss']:.3g} to {last['val_loss']:.3g} in "
            f"the last epoch: more epochs ({more_epochs}) may help."
        )
        found.append(Verdict("check", "Length", text))
    return found


def _more_epochs(epochs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Return the options that make a run longer, or learn more in the same time if its learning rate is very low."""
    larger = [as_passed("epochs")] if len(epochs) >= settings.get("epochs", 0) else []
    larger += [as_passed("patience")] if _out_of_patience(epochs, settings) else []
    options = as_passed("resume", True) + (f" with a larger {' and '.join(larger)}" if larger else "")
    if _far_too_low(settings):
        options += f"; or, in a new run, a higher learning rate: {as_passed('lr', _first_tried(settings))}"
    return options


def _still_falling(epochs: Sequence[Mapping[str, Any]], lowest: float, guessing: float) -> bool:
    if len(epochs) < 2 or epochs[-1]["val_loss"] != lowest or lowest > _TOO_HIGH * guessing:
        return False
    if epochs[-1]["val_accuracy"] == 1:  # more epochs cannot raise it
        return False
    return bool(epochs[-2]["val_loss"] - lowest > max(_FALLING[0] * lowest, _FALLING[1] * guessing))


def _best(epochs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(epochs, key=lambda epoch: epoch["val_accuracy"])


def ranked(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return runs by their best validation accuracy, the highest first; of equal ones, that with the lower loss."""

    def key(run: Mapping[str, Any]) -> tuple[float, float]:
        best = best_epoch(run)
        return (-best["val_accuracy"], best["val_loss"]) if best else (1.0, 0.0)

    return sorted(runs, key=key)


def best_epoch(run: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the metrics of a run's best epoch."""
    return next((epoch for epoch in run["epochs"] if epoch["epoch"] == run["best_epoch"]), None)


def runs_verdict(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return which of the ranked runs is the best and by how much; empty for less than two complete ones."""
    accuracies = [(run["name"], best["val_accuracy"]) for run in runs if (best := best_epoch(run))]
    if len(accuracies) < 2:
        return ""
    (first, highest), (second, other), *_ = accuracies
    tied = [name for name, accuracy in accuracies if accuracy == highest]
    if len(tied) > 1:
        return f"{len(tied)} runs share the best validation accuracy, {100 * highest:.2f}%: {', '.join(tied)}."
    return (
        f"{first} has the best validation accuracy, {100 * highest:.2f}%: {100 * (highest - other):.1f} points above "
        f"{second} ({100 * other:.2f}%)."
    )


def on_different_images(runs: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether runs were validated on different images, by the numbers of images and classes."""
    kept = ("validation_images", "classes", "largest_class")
    data = [run["data"] for run in runs if isinstance(run.get("data"), Mapping)]
    return len({repr([each.get(name) for name in kept]) for each in data}) > 1


def identical_runs(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the names of runs whose metrics are the same in all epochs, as one list for each such group."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        metrics = [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in run["epochs"]]
        if metrics:
            groups.setdefault(repr(metrics), []).append(run["name"])
    return [names for names in groups.values() if len(names) > 1]
