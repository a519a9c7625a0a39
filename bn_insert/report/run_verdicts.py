"""Whether a training run learned, and which of several runs is best, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ..errors import as_passed
from ..support.text import counted
from .run_beginning import keep_statistics, lowered_by_reestimation
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
_FAR_BELOW = 0.1 + 1e-9  # how far the accuracy may fall from the best epoch to the last, or be below that in training
_FAR_LOWER = 0.2  # of the usual learning rate
_FAR_HIGHER = 100  # times the rate that the trials start with
_SAME_RATE = 1.5  # times another: trials are at rates three times apart
FIRST_TRIED = {"adamw": 0.0003, "sgd": 0.003}  # learning rates at which trials start


def run_health(
    epochs: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    output_fit: Mapping[str, Any] | None = None,
    trials: Mapping[float, float] | None = None,
) -> list[Verdict]:
    """Return what is wrong with a run, or one verdict that nothing is.

    What the run itself has measured to be worse is never advised.

    Args:
        epochs: The metrics of each completed epoch.
        settings: The training settings.
        data: `classes`, the number of classes; `largest_class`, the share of validation images in the largest one;
            `output_replaced`, whether the run began with a new output layer; `output_kind`, "dense" or "conv";
            `epochs_for_trials`, how many epochs learning rate trials need if the run was too short for them. What
            depends on a missing one is not checked.
        output_fit: `fitted`, `accuracy` and `reestimated_accuracy`, as in `OutputFit`; None if there was no fit.
        trials: The loss of each learning rate that the run has tried, infinite for one that diverged; None if it has
            tried none.
    """
    if not epochs:
        return [Verdict("check", "Epochs", "No epoch has been completed: the run is in progress, or was stopped.")]
    found = [*_end(epochs, settings), *_accuracy(epochs, data)]
    advice = _advice(epochs, settings, data, output_fit, trials or {})
    if data.get("classes", 0) > 1:
        found += _loss(epochs, data["classes"], advice)
    if worst(found) != "bad":
        given = any(way in verdict.text for verdict in found for way in advice.lasting if way)
        found += _accuracies(epochs, output_fit, _Advice() if given else advice)  # another might contradict it
    if worst(found) == "good":
        found.append(Verdict("good", "Training", "No sign of trouble in losses and accuracies."))
    return found


class _Advice(NamedTuple):
    """What to try next, as sentences; empty where nothing is known that might help.

    Args:
        spoiled: After a run that lost what it had.
        too_little: After one that may have learned too little.
        longer: How to train for longer, as a phrase.
        overfitting: After one that did much better on the training images; empty if this one did not.
        too_slow: Whether the learning rate may be too low.
        lower_rate: Whether `spoiled` names a lower learning rate.
    """

    spoiled: str = ""
    too_little: str = ""
    longer: str = ""
    overfitting: str = ""
    too_slow: bool = False
    lower_rate: bool = False

    @property
    def lasting(self) -> tuple[str, ...]:
        """What one verdict says for all."""
        return self.longer, self.spoiled, self.overfitting

    @property
    def best_at_first(self) -> str:
        """After a run whose first epoch was the best."""
        return self.too_little if self.too_slow else self.spoiled


def _advice(
    epochs: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    output_fit: Mapping[str, Any] | None,
    trials: Mapping[float, float],
) -> _Advice:
    new_output = bool(data.get("output_replaced") or (output_fit and output_fit["fitted"]))
    needed = data.get("epochs_for_trials")
    new_head = new_output and data.get("output_kind") != "conv"
    tried = _lower_rate_was_worse(settings, trials)
    shorter = _fewer_epochs(epochs) if tried else []
    spoiled = lower_rate_advice(
        settings, new_head=new_head, others=shorter, epochs_for_trials=needed, lower_rate=not tried
    )
    spoiling = _spoiled_by_reestimation(epochs, output_fit)
    slow, overfitting = _too_slow(epochs, settings, trials), _overfitting(epochs, settings)
    longer = f"in a new run with {as_passed('epochs', needed)} or more" if needed else ""
    longer = longer or _more_epochs(epochs, settings, trials)
    too_little = (overfitting or f"Train for more epochs ({longer}).") if slow else spoiled
    if tried and not slow:
        head = f", or try a new head with BatchNorm ({as_passed('head', 512)})" if new_head else ""
        too_little = overfitting or f"Check the labels and the preprocessing{head}."
    spoiled = spoiled or overfitting
    if needed:
        too_little = (
            f"Train for longer, in a new run with {as_passed('epochs', needed)} or more: trials then choose the "
            "learning rate, for which this run was too short."
        )
    if not new_output and settings.get("fit_output") is False:
        fit = as_passed("fit_output", False, "--no-fit-output")
        leave_out = f" If the checkpoint was trained on other classes, leave out {fit}."
        spoiled, too_little = spoiled + leave_out, too_little + leave_out
    if spoiling:
        return _Advice(spoiling, spoiling, longer)
    return _Advice(spoiled.strip(), too_little, longer, overfitting, too_slow=slow, lower_rate=not tried)


def _spoiled_by_reestimation(epochs: Sequence[Mapping[str, Any]], output_fit: Mapping[str, Any] | None) -> str:
    """Return what to do where re-estimated statistics spoiled a network and training did not make up for it."""
    if not output_fit or not lowered_by_reestimation(output_fit):
        return ""
    if _best(epochs)["val_accuracy"] > output_fit["accuracy"]:
        return ""
    before, after = output_fit["accuracy"], output_fit["reestimated_accuracy"]
    return (
        f"Re-estimating BatchNorm's running statistics on the training images alone lowered the validation accuracy "
        f"from {before:.1%} to {after:.1%}: keep the statistics as they are ({keep_statistics()}), or train on more "
        "images."
    )


def lower_rate_advice(
    settings: Mapping[str, Any],
    *,
    new_head: bool,
    others: Sequence[str] = (),
    epochs_for_trials: int | None = None,
    lower_rate: bool = True,
) -> str:
    """Return what to try after a run whose learning rate was too high, as a sentence; empty if there is nothing.

    Args:
        settings: The training settings.
        new_head: Whether a new head might help: the run began with a new or fitted output layer on the pretrained dense
            layers.
        others: What else might help, as phrases.
        epochs_for_trials: How many epochs learning rate trials need if the run was too short for them.
        lower_rate: Whether a lower learning rate might help.
    """
    rate, lower = settings.get("lr"), f"a lower learning rate ({as_passed('lr')})"
    if isinstance(rate, float):
        lower = f"a third of this learning rate ({as_passed('lr', _third(rate))})"
        if rate > _FAR_HIGHER * _first_tried(settings):
            lower = f"the usual learning rate ({as_passed('lr', _first_tried(settings))})"
    head = [f"a new head with BatchNorm ({as_passed('head', 512)})"] if new_head else []
    needed = as_passed("epochs", epochs_for_trials)
    longer = [f"a new run that is long enough for learning rate trials ({needed} or more)"] if epochs_for_trials else []
    *ways, last = [*[lower] * lower_rate, *head, *others, *longer] or [""]
    return f"Try {', '.join(ways)} or {last}." if ways else f"Try {last}." if last else ""


def _third(rate: float) -> float:
    return float(f"{rate / 3:.2g}")


def _lower_rate_was_worse(settings: Mapping[str, Any], trials: Mapping[float, float]) -> bool:
    """Return whether the run has tried the learning rate that would be advised, and found its loss to be higher."""
    rate = settings.get("lr")
    return rate is not None and rate in trials and _trial_loss(_third(rate), trials) > trials[rate]


def _trial_loss(rate: float, trials: Mapping[float, float]) -> float:
    """Return the loss of the trial of a learning rate, or of one next to it; NaN, which is not above any, without."""
    losses = (loss for tried, loss in trials.items() if 1 / _SAME_RATE < tried / rate < _SAME_RATE)
    return next(losses, math.nan)


def _fewer_epochs(epochs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the phrase that fewer epochs might help, if the run can be shortened to one epoch past its best."""
    enough = _best(epochs)["epoch"] + 1
    return [f"fewer epochs ({as_passed('epochs', enough)})"] if enough < len(epochs) else []


def _overfitting(epochs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Return what to do about a network that knows the training images much better than others; empty for no such."""
    train, val = epochs[-1]["train_accuracy"], epochs[-1]["val_accuracy"]
    if not (train - val > _FAR_BELOW or train >= _NEARLY_ALL > val):
        return ""
    augmentation = f", or with random crops ({as_passed('crop_scale', 0.35)})" * (settings.get("crop_scale", 1.0) == 1)
    return (
        f"The training accuracy, {train:.1%}, is above that in validation, {val:.1%}: train on more images"
        f"{augmentation}."
    )


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
    epochs: Sequence[Mapping[str, Any]], output_fit: Mapping[str, Any] | None, advice: _Advice
) -> list[Verdict]:
    """Return what is wrong with how the validation accuracy changed; the first verdict says what to do about it."""
    best, last = _best(epochs), epochs[-1]["val_accuracy"]
    highest, before = best["val_accuracy"], output_fit["accuracy"] if output_fit else None
    fell_far, below = highest - last > _FAR_BELOW, before is not None and last < before
    nothing_left = highest >= max(_NEARLY_ALL, before or 0)
    found = []
    if before is not None and highest <= before and not nothing_left:
        text = f"The best validation accuracy, {highest:.1%}, is not above that before training, {before:.1%}."
        found.append(("Accuracy", text, advice.too_little))
    elif best["epoch"] == 1 and len(epochs) > _EPOCHS_AFTER_BEST and not nothing_left:
        lower = advice.lower_rate and advice.best_at_first == advice.spoiled
        why = ": a lower learning rate may preserve more of the pretrained network" if lower else ""
        found.append(("Epochs", f"No epoch was better than the first{why}.", advice.best_at_first))
    if fell_far or (before is not None and last < before < highest):
        text = f"The validation accuracy fell from {highest:.1%} in epoch {best['epoch']} to {last:.1%} in the last one"
        text += f", below that before training, {before:.1%}" if below else ""
        found.append(("Accuracy", f"{text}; best.pth is from epoch {best['epoch']}.", advice.spoiled))
    if not found:
        return []
    (subject, text, way), *others = found
    first = Verdict("check", subject, f"{text} {advice.spoiled if fell_far else way}".strip())
    return [first, *(Verdict("check", subject, text) for subject, text, _ in others)]


def _too_slow(epochs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], trials: Mapping[float, float]) -> bool:
    """Return whether a learning rate may be too low: far below the usual one, or not above it and the loss never rose.

    At a higher one, a loss that stays where it is may also be that of a network that was destroyed.
    """
    rate = settings.get("lr")
    usual = rate is not None and rate <= _first_tried(settings) and not _rose(epochs)
    return usual or _far_too_low(settings, trials)


def _far_too_low(settings: Mapping[str, Any], trials: Mapping[float, float]) -> bool:
    rate, usual = settings.get("lr"), _first_tried(settings)
    if rate is None or rate > _FAR_LOWER * usual:
        return False
    return not _trial_loss(usual, trials) > trials.get(rate, math.inf)  # trials chose it


def _first_tried(settings: Mapping[str, Any]) -> float:
    return FIRST_TRIED["sgd" if settings.get("opt") == "sgd" else "adamw"]


def _rose(epochs: Sequence[Mapping[str, Any]]) -> bool:
    return bool(epochs[-1]["val_loss"] > _FLAT * min(epoch["val_loss"] for epoch in epochs))


def _loss(epochs: Sequence[Mapping[str, Any]], classes: int, advice: _Advice) -> list[Verdict]:
    guessing, last = math.log(classes), epochs[-1]
    lowest = min(epoch["val_loss"] for epoch in epochs)
    falling = _still_falling(epochs, lowest, guessing)
    found = []
    guess = f"{guessing:.3f} = ln({classes}), the loss of guessing"
    if lowest > guessing:
        way_out = f"Train for more epochs ({advice.longer})." if falling else advice.too_little
        text = f"The validation loss, {lowest:.3f} at its lowest, is no lower than {guess}. {way_out}"
        found.append(Verdict("bad", "Loss", text))
    elif last["val_loss"] > guessing:
        # A network that is right about the training images has not diverged; it is too certain of the others.
        why = f". {advice.overfitting}" if advice.overfitting else f": training diverged. {advice.spoiled}".rstrip()
        text = f"The validation loss rose from {lowest:.3f} to {last['val_loss']:.3f}, above {guess}{why}"
        found.append(Verdict("bad", "Loss", text))
    elif lowest > _LITTLE * guessing:
        text = f"The validation loss, {lowest:.3f} at its lowest, is only {1 - lowest / guessing:.1%} below {guess}"
        at_first = advice.too_little == advice.spoiled and any(each["val_loss"] > guessing for each in epochs)
        if _rose(epochs) or at_first:
            way_out = f". {advice.spoiled}".rstrip()
        elif advice.overfitting and not falling:
            way_out = f". {advice.overfitting}"
        else:
            way_out = f": train for longer ({advice.longer}), or on more images."
        found.append(Verdict("check", "Loss", text + way_out))
    if falling:
        text = (
            f"The validation loss was still falling, from {epochs[-2]['val_loss']:.3g} to {last['val_loss']:.3g} in "
            f"the last epoch: more epochs ({advice.longer}) may help."
        )
        found.append(Verdict("check", "Length", text))
    return found


def _more_epochs(
    epochs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], trials: Mapping[float, float]
) -> str:
    """Return the options that make a run longer, or learn more in the same time if its learning rate is very low."""
    larger = [as_passed("epochs")] if len(epochs) >= settings.get("epochs", 0) else []
    larger += [as_passed("patience")] if _out_of_patience(epochs, settings) else []
    options = as_passed("resume", True) + (f" with a larger {' and '.join(larger)}" if larger else "")
    if _far_too_low(settings, trials):
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
    """Return whether runs were validated on different images, by their names and the numbers of images and classes.

    Args:
        runs: The single run of each `run_report`. One whose report has no `validation_digest`, because an earlier
            version wrote it, is compared by the numbers alone.
    """
    kept = ("validation_images", "classes", "largest_class")
    data = [run["data"] for run in runs if isinstance(run.get("data"), Mapping)]
    digests = {repr(each["validation_digest"]) for each in data if "validation_digest" in each}
    return len({repr([each.get(name) for name in kept]) for each in data}) > 1 or len(digests) > 1


def identical_runs(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the names of runs whose metrics are the same in all epochs, as one list for each such group."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        metrics = [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in run["epochs"]]
        if metrics:
            groups.setdefault(repr(metrics), []).append(run["name"])
    return [names for names in groups.values() if len(names) > 1]
