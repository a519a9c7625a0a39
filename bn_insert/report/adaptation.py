"""The data of an adaptation's report, and what it concludes from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import as_passed
from ..support.text import counted
from .provenance import versions
from .verdict import Verdict

FORMAT = "bn-insert adaptation report"

_HARDLY = 0.1  # standard deviations, and relative difference of standard deviations and entropies
_MORE_CERTAIN = 0.05  # of the entropy of a guess: by so much lower than on source images
_LITTLE = 0.01  # of the entropy of a guess: the entropies of two sets of certain predictions differ by less
_FEW_IMAGES = 8  # whose predictions say nothing about others
_MANY_IMAGES = 200  # more of them hardly change the statistics
_MORE_CLASSES = 1.5  # times as many as before
_MOSTLY = 0.9  # of the predictions
_RIGHT = "source, target and preprocessing are right (see above)"
_HARDLY_ABOVE_GUESSING = 1.5  # times the accuracy of a guess
# Of the entropy of a guess among all classes.
_UNDECIDED = 0.5
_GUESSING = 0.9  # where it is not known how certain the network is on source images


def adaptation_report(
    shifts: Sequence[Mapping[str, Any]],
    predictions: Mapping[str, Any],
    comparisons: Mapping[str, Mapping[str, Any]],
    *,
    classes: Sequence[str] = (),
    source_entropy: float | None = None,
    target_images: int = 0,
    changed: bool = True,
    adapted_before: str = "",
) -> dict[str, Any]:
    """Return the findings of an adaptation as one JSON-ready dictionary.

    The page also shows what the caller adds to it: `checkpoint` and `output` (see `file_facts`; `output` is None if
    no checkpoint was written), `source` (None without one) and `target` (each with `source`, `images` and `skipped`),
    `preprocessing`, `options`, `command`, `date` and `seconds`, as for `insertion_report`.

    Args:
        shifts: For each layer what `StatisticsShift.to_dict` returns.
        predictions: The fields of a `PredictionComparison` of original and adapted network on the target.
        comparisons: The fields of a `Comparison` that checks the result, by device.
        classes: Names of the classes that the labels number; empty without labels.
        source_entropy: Mean entropy of the original's predictions on source images, in nats; None if it is not known.
        target_images: Number of images that the network was adapted to, if the predictions may be on fewer of them.
        changed: Whether any statistics were changed; if not, the network is the original.
        adapted_before: As in `Adaptation`.
    """
    predictions = {name: _finite(value) for name, value in predictions.items()} | {"entropy_source": source_entropy}
    per_class = [dict(each) for each in predictions["per_class"]]
    for each in per_class:
        each["name"] = classes[each["label"]]
    data = {
        "format": FORMAT,
        "version": 1,
        "shifts": [dict(shift) for shift in shifts],
        "predictions": {**predictions, "per_class": per_class},
        "comparisons": dict(comparisons),
        "changed": changed,
        "versions": versions(),
    }
    found = _verdicts(data, target_images, changed=changed, adapted_before=adapted_before)
    return data | {"verdicts": [verdict._asdict() for verdict in found]}


def _finite(value: Any) -> Any:
    """Return a value, None for NaN, which JSON lacks."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _verdicts(data: Mapping[str, Any], target_images: int, *, changed: bool, adapted_before: str) -> list[Verdict]:
    shifts, predictions = data["shifts"], data["predictions"]
    found = [_moved(shifts) if changed else _unchanged(shifts, target_images)]
    doubts = [Verdict("check", "Source", f"{adapted_before[0].upper()}{adapted_before[1:]}.")] if adapted_before else []
    if predictions["classes"]:
        found.append(_certainty(predictions, target_images))
        doubts += _swapped(predictions)
        found += doubts
        if predictions["per_class"]:
            found.append(_accuracy(predictions, target_images, changed=changed, doubtful=bool(doubts)))
        elif changed:
            found.append(_unmeasured(shifts, predictions, doubtful=bool(doubts)))
    else:
        found += doubts
    return found


def _moved(shifts: Sequence[Mapping[str, Any]]) -> Verdict:
    farthest = max(shifts, key=lambda shift: shift["mean_size"])
    smallest, largest = _factors(shifts)
    factor = f"between {smallest:.2f} and {largest:.2f}" if smallest < largest else f"of {largest:.2f}"
    text = (
        f"The means of a layer differ from those on the source by up to {farthest['mean_size']:.2g} standard "
        f"deviations ({farthest['layer']}), and the standard deviation of the median channel of a layer by a factor "
        f"{factor}."
    )
    if _hardly_moved(shifts):
        return Verdict("check", "Statistics", f"{text} They hardly differ: there is little to gain from adapting.")
    return Verdict("good", "Statistics", text)


def _unchanged(shifts: Sequence[Mapping[str, Any]], target_images: int) -> Verdict:
    if _hardly_moved(shifts):
        text = (
            "Nothing was adapted: the statistics of the target differ from those of the source (of the network's own "
            "BatchNorm, if it has any) by no more than sampling error, so there is nothing to gain."
        )
        return Verdict("check", "Statistics", text)
    farthest = max(shifts, key=lambda shift: shift["mean_size"])
    several = target_images > 1
    text = (
        f"Nothing was adapted: the means of a layer differ by {farthest['mean_size']:.2g} standard deviations "
        f"({farthest['layer']}), which may be due to chance{' or to one unusual image' * several} with "
        f"{counted(target_images, 'target image')}. If the target is of the kind that the network knows, there is "
        "nothing to gain; if not, use more images"
    )
    if several:  # one alone has no variance after dense layers
        text += f", or {as_passed('shrink', False, '--no-shrink')} to take their statistics as they are"
    text += "."
    return Verdict("bad", "Statistics", text)


def _factors(shifts: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the smallest and the largest factor by which the standard deviation of a layer's median channel moved."""
    medians = [shift["std_median"] for shift in shifts if shift["std_median"] is not None] or [1.0]
    return min(medians), max(medians)


def _hardly_moved(shifts: Sequence[Mapping[str, Any]]) -> bool:
    means = max(shift["mean_size"] for shift in shifts)
    return means < _HARDLY and max(abs(factor - 1) for factor in _factors(shifts)) < _HARDLY


def _certainty(predictions: Mapping[str, Any], target_images: int) -> Verdict:
    before, after = predictions["entropy_before"], predictions["entropy_after"]
    images = f"{predictions['images']:,} target image{'s' * (predictions['images'] != 1)}"
    if predictions["images"] < target_images:
        images = f"{predictions['images']:,} of the {target_images:,} target images"
    text = (
        f"The adapted network agrees with the original on {predictions['agreement']:.1%} of {images}; "
        f"the mean entropy of the predictions {_went(before, after)} nats."
    )
    source = predictions["entropy_source"]
    if source is not None:
        text += f" On source images, the mean entropy of the original's predictions is {source:.2g}."
    if _undecided(predictions) and not predictions["per_class"]:
        text += (
            f" It is rarely certain of a class (guessing among {predictions['classes']} classes "
            f"has {math.log(predictions['classes']):.2g} nats): the target images may belong to a different task, or "
            "need different preprocessing. Check that they show the "
            f"network's classes, and check {_preprocessing()}."
        )
        return Verdict("check", "Predictions", text)
    doubtful = not predictions["per_class"] and after > (1 + _HARDLY) * before and not _spreads(predictions)
    return Verdict("check" if doubtful else "good", "Predictions", text)


def _swapped(predictions: Mapping[str, Any]) -> list[Verdict]:
    """Return a doubt about source and target if the original is much more certain on target images."""
    source, before = predictions["entropy_source"], predictions["entropy_before"]
    _, accuracy_before, accuracy_after = total(predictions["per_class"]).values()
    if source is None or before > source - _MORE_CERTAIN * math.log(predictions["classes"]):
        return []
    if predictions["images"] < _FEW_IMAGES or _spreads(predictions) or accuracy_after > accuracy_before:
        return []  # under noise, for example, many networks predict few classes with certainty
    text = (
        f"The original is more certain on target images than on source images (mean entropy {before:.2g} and "
        f"{source:.2g} nats). The source should be images of the kind that it was trained on, the target images of the "
        f"new kind: check that the two are not swapped. Another possible cause is {_preprocessing()}: check that it is "
        "that of the training."
    )
    return [Verdict("check", "Source and target", text)]


def _undecided(predictions: Mapping[str, Any]) -> bool:
    """Return whether the predictions are more like guesses than like those on source images, as far as it is known."""
    guess, source = math.log(predictions["classes"]), predictions["entropy_source"]
    limit = _GUESSING * guess if source is None else max((source + guess) / 2, _UNDECIDED * guess)
    return bool(predictions["entropy_after"] > limit)


def _spreads(predictions: Mapping[str, Any]) -> bool:
    """Return whether the adapted network predicts clearly more classes than the original."""
    before, after = predictions.get("classes_before"), predictions.get("classes_after")
    return before is not None and after is not None and after > _MORE_CLASSES * before


def _unmeasured(shifts: Sequence[Mapping[str, Any]], predictions: Mapping[str, Any], *, doubtful: bool) -> Verdict:
    """Return whether the adapted network is probably better, as far as that can be known without labels."""
    before, after = predictions["entropy_before"], predictions["entropy_after"]
    because = f"because the entropy {_went(before, after)} nats"
    hardly = max(_HARDLY * before, _LITTLE * math.log(predictions["classes"]))
    good = False
    if predictions["images"] < _FEW_IMAGES:
        guess = f"{counted(predictions['images'], 'target image')} cannot show whether it is better than before"
    elif _hardly_moved(shifts):
        guess = "probably as before, because the statistics hardly moved"
    elif _undecided(predictions):
        guess = "probably low, because the network is rarely certain of a class"
    elif _spreads(predictions):
        guess = (
            f"better than before if the target shows many of the classes, because the original effectively predicts "
            f"{predictions['classes_before']:.2g} classes, and the adapted network "
            f"{predictions['classes_after']:.2g}; worse if it shows only a few"
        )
        good = True
    elif after < before - hardly:
        unless = "unless the target lacks some of the classes or shows something else"
        guess, good = f"probably better than before, {because}, {unless}", True
    elif after > before + hardly:
        guess = f"perhaps worse than before, {because}, as also happens if the target lacks some of the classes"
    elif predictions["agreement"] < _MOSTLY:
        changed = 1 - predictions["agreement"]
        guess = f"{changed:.1%} of the predictions changed, but the entropy hardly did: it may be better or worse"
    else:
        guess = "probably as before, because neither the predictions nor the entropy changed much"
    labels = as_passed(
        "pass labels to compare_predictions",
        option="run bn-insert evaluate with the original and the adapted checkpoint on some target images, in one "
        "folder for each of the network's classes",
    )
    if good and doubtful:
        guess += f"; provided that {_RIGHT}"
    text = f"Not measured; {guess}. Only labels can tell: {labels}."
    return Verdict("open" if good and not doubtful else "check", "Accuracy", text)


def _went(before: float, after: float) -> str:
    if f"{before:.2g}" == f"{after:.2g}":
        return f"stayed at {after:.2g}"
    return f"{'fell' if after < before else 'rose'} from {before:.2g} to {after:.2g}"


def total(per_class: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return `images`, and the accuracies `before` and `after`, of all classes together; 0 without images."""
    images = sum(each["images"] for each in per_class)
    accuracies = {
        name: sum(each[name] * each["images"] for each in per_class) / max(images, 1) for name in ("before", "after")
    }
    return {"images": images, **accuracies}


def _accuracy(predictions: Mapping[str, Any], target_images: int, *, changed: bool, doubtful: bool) -> Verdict:
    per_class, classes = predictions["per_class"], predictions["classes"]
    images, before, after = total(per_class).values()
    text = f"{before:.1%} before and {after:.1%} after, on {counted(images, 'labeled target image')}."
    guess = 1 / classes
    if max(before, after) < _HARDLY_ABOVE_GUESSING * guess:
        text += (
            f" Neither is much better than guessing among {classes} classes ({guess:.1%}). Check {_preprocessing()}, "
            "and that the folders are the network's classes."
        )
        return Verdict("bad", "Accuracy", text)
    lacking = len(per_class) < _fewest_classes(images, classes)
    if lacking:
        text += (
            f" They cover only {len(per_class)} of the {classes} classes. Adapting assumes that the target has all of "
            "them, as the source has."
        )
    if not changed:
        return Verdict("open", "Accuracy", text)
    if images < _FEW_IMAGES:
        return Verdict("open", "Accuracy", f"{text} So few cannot show whether it is better than before.")
    advice = ""
    if doubtful:
        advice = f", or adapt it again once {_RIGHT}"
    elif lacking:
        advice = ", or use images of all classes"
    elif max(images, target_images) < _MANY_IMAGES:
        advice = ", or use more target images"
    if after < before - 0.01:
        text += f" Adapting made it worse: keep the original{advice}."
        return Verdict("bad", "Accuracy", text)
    if after <= before and after < 1:
        text += f" Adapting did not improve it: keep the original{advice}."
        return Verdict("check", "Accuracy", text)
    return Verdict("check" if lacking else "good", "Accuracy", text)


def _fewest_classes(images: int, classes: int) -> float:
    """Return how many classes occur at least among images drawn from all of them: three deviations below the mean.

    Source: the mean and variance of the number of occupied boxes; Feller, "An Introduction to Probability Theory and
    Its Applications", chapter IV.2, for Poisson numbers of images.
    """
    absent = math.exp(-images / classes)
    variance = classes * (absent - (1 + images / classes) * absent**2)
    return classes * (1 - absent) - 3 * math.sqrt(variance)


def _preprocessing() -> str:
    return f"the preprocessing ({', '.join(map(as_passed, ('resize', 'crop', 'mean', 'std')))})"
