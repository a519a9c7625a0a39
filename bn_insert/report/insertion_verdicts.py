"""What the report of an insertion concludes from its figures, in words, and the command that it suggests next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import as_passed
from .preprocessing import preprocessing_text
from .verdict import Verdict

_LEAST_AGREEMENT = 0.95
_USUAL_BATCH = 32  # the default of `finetune`


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
    return " ".join(words)


def _outputs(data: Mapping[str, Any]) -> Verdict:
    comparisons = data["comparisons"]
    images = max(comparison["images"] for comparison in comparisons.values())
    measured = f"Compared on {images} images, on {' and '.join(comparisons)}."
    if not data["output"]:
        limits = f"{as_passed('atol')} or {as_passed('rtol')}"
        return Verdict(
            "bad", "Outputs", f"They differ by more than {limits} allows: no checkpoint was written. {measured}"
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
    text = f"{preprocessing_text(preprocessing)} ({preprocessing['origin']})."
    text = text[0].upper() + text[1:]
    if max(preprocessing["mean"]) > 1:
        text += " This mean is above 1, but it is subtracted from pixels in 0..1: the statistics are of no use."
        return Verdict("bad", "Preprocessing", text)
    if preprocessing["origin"] == "from the checkpoint":
        return Verdict("good", "Preprocessing", text)
    text += " Make sure that the network was trained with this preprocessing: comparing the outputs cannot show that."
    return Verdict("check", "Preprocessing", text)


def _train_mode(train_mode: Mapping[str, Any]) -> Verdict:
    usual = _usual(train_mode["agreements"])
    if usual is None:
        return Verdict("check", "Train mode", train_mode["reading"])
    text = (
        f"At a batch size of {usual['batch_size']}, the network in train mode keeps "
        f"{100 * usual['top1_agreement']:.1f}% (± {100 * usual['top1_margin']:.1f}, measured on {usual['images']:,} "
        "images) of the top-1 classes of eval mode."
    )
    if usual["top1_agreement"] >= _LEAST_AGREEMENT:
        return Verdict("good", "Train mode", f"{text} Training starts close to the pretrained network.")
    text += " Training therefore starts from outputs that differ from the pretrained network's. If you keep the"
    text += " output layer, use larger batches"
    renorm = " or Batch Renormalization" if train_mode["renorm"] else ""
    return Verdict("check", "Train mode", f"{text}{renorm}. If it is replaced, nothing needs to be done.")


def _usual(agreements: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the figures of the batch size that is closest to the usual one."""
    return min(agreements, key=lambda agreement: abs(agreement["batch_size"] - _USUAL_BATCH), default=None)
