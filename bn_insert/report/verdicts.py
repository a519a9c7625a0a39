"""What a report concludes from its figures, in words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

_LEAST_AGREEMENT = 0.95
_USUAL_BATCH = 32  # the default of `finetune`


class Verdict(NamedTuple):
    """A conclusion: whether it is good, to be checked, or bad; what it is about; one or two sentences."""

    state: Literal["good", "check", "bad"]
    subject: str
    text: str


def verdicts(data: Mapping[str, Any]) -> list[Verdict]:
    """Return what the report of an insertion says of the outputs, the preprocessing and train mode."""
    return [_outputs(data), _preprocessing(data["preprocessing"]), _train_mode(data["train_mode"])]


def next_command(data: Mapping[str, Any]) -> str:
    """Return the command that fine-tunes the result of an insertion; empty if nothing was written."""
    if not data["output"]:
        return ""
    output, model = data["output"]["path"], data["options"].get("model")
    words = ["bn-insert", "finetune", shlex.quote(output), "DATA", "--output-dir", "runs/first"]
    if model:
        words += ["--model", shlex.quote(model)]
    usual = _usual(data["train_mode"]["agreements"])
    if usual and usual["top1_agreement"] < _LEAST_AGREEMENT and data["train_mode"]["renorm"]:
        words += ["--batchnorm", "renorm"]
    return " ".join(words)


def _outputs(data: Mapping[str, Any]) -> Verdict:
    comparisons = data["comparisons"]
    images = max(comparison["images"] for comparison in comparisons.values())
    measured = f"Compared on {images} images, on {' and '.join(comparisons)}."
    if not data["output"]:
        return Verdict(
            "bad", "Outputs", f"They differ by more than the tolerance: no checkpoint was written. {measured}"
        )
    if all(comparison["bit_identical"] for comparison in comparisons.values()):
        return Verdict("good", "Outputs", f"Equal bit for bit to those of the original. {measured}")
    largest = max(comparison["max_rel"] for comparison in comparisons.values())
    text = f"Equal to those of the original up to rounding (largest relative difference {largest:.2g}). {measured}"
    return Verdict("good", "Outputs", text)


def _preprocessing(preprocessing: Mapping[str, Any]) -> Verdict:
    if preprocessing["tensors"]:
        return Verdict(
            "check",
            "Preprocessing",
            "None: the values of a tensor file are used unchanged. They must be preprocessed "
            "as in the training of the network.",
        )
    mean, std = preprocessing["mean"], preprocessing["std"]
    steps = [
        f"resize {preprocessing['resize']}" if preprocessing["resize"] else "no resizing",
        f"crop {preprocessing['crop']}" if preprocessing["crop"] else "no crop",
        f"mean {_listed(mean)}",
        f"std {_listed(std)}",
    ]
    text = f"{'; '.join(steps)} ({preprocessing['origin']})."
    text = text[0].upper() + text[1:]
    if max(mean) > 1:
        text += " This mean is above 1, but it is subtracted from pixels in 0..1: the statistics are of no use."
        return Verdict("bad", "Preprocessing", text)
    if preprocessing["origin"] == "from the checkpoint":
        return Verdict("good", "Preprocessing", text)
    text += " It must be that of the network's training, which the comparison of the outputs cannot check."
    return Verdict("check", "Preprocessing", text)


def _train_mode(train_mode: Mapping[str, Any]) -> Verdict:
    usual = _usual(train_mode["agreements"])
    if usual is None:
        return Verdict("check", "Train mode", train_mode["reading"])
    text = (
        f"At a batch size of {usual['batch_size']}, the network in train mode keeps "
        f"{100 * usual['top1_agreement']:.1f} % of the top-1 classes of eval mode."
    )
    if usual["top1_agreement"] >= _LEAST_AGREEMENT:
        return Verdict("good", "Train mode", f"{text} Training starts close to the pretrained network.")
    text += " Training starts from a different function than the pretrained network's: use larger batches"
    renorm = " or Batch Renormalization" if train_mode["renorm"] else ""
    return Verdict("check", "Train mode", f"{text}{renorm}.")


def _usual(agreements: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the figures of the batch size that is closest to the usual one."""
    return min(agreements, key=lambda agreement: abs(agreement["batch_size"] - _USUAL_BATCH), default=None)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


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
        return f"{len(tied)} runs share the best validation accuracy, {100 * highest:.2f} %: {', '.join(tied)}."
    return (
        f"{first} has the best validation accuracy, {100 * highest:.2f} %: {100 * (highest - other):.1f} points above "
        f"{second} ({100 * other:.2f} %)."
    )


def identical_runs(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the names of runs whose metrics are the same in all epochs, as one list for each such group."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        metrics = [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in run["epochs"]]
        if metrics:
            groups.setdefault(repr(metrics), []).append(run["name"])
    return [names for names in groups.values() if len(names) > 1]
