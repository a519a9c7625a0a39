"""Reports: the data, and the page made from it."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from bn_insert import (
    CheckpointError,
    ClassAccuracy,
    PredictionComparison,
    StatisticsShift,
    TrainModeAgreement,
    insert,
    train_mode_agreement,
)
from bn_insert.compare.outputs import compare_outputs
from bn_insert.compare.train_mode import agreement_reading
from bn_insert.errors import messages_name_options
from bn_insert.report import check_report, insertion_report, read_run, run_report, runs_report, write_report
from bn_insert.report.adaptation import adaptation_report
from bn_insert.report.charts import run_charts
from bn_insert.report.insertion_verdicts import next_command, verdicts
from bn_insert.report.page import page
from bn_insert.report.run_verdicts import on_different_images, run_health, runs_verdict
from bn_insert.training.metrics import EpochMetrics
from bn_insert.training.settings import TrainingSettings
from support.networks import images, randomised, small_vgg

HOSTILE = "<script>alert(1)</script> & $x^2$ {{ 7 * 7 }}"


@pytest.mark.parametrize(
    ("stds", "factor"), [((0.49,), "of 0.49"), ((0.49, 0.9, 1.3), "between 0.49 and 1.30")], ids=["one", "several"]
)
def test_the_verdict_on_an_adaptation_has_the_range_of_the_factors(stds: tuple[float, ...], factor: str) -> None:
    unmeasured = PredictionComparison(0, 0, math.nan, math.nan, math.nan)
    (statistics,) = adaptation_report(shifts(0.2, *stds), asdict(unmeasured), {})["verdicts"]
    assert statistics["text"].endswith(f"the standard deviation of the median channel of a layer by a factor {factor}.")


def shifts(mean: float, *stds: float) -> list[dict[str, Any]]:
    """Return the shifts of layers with one channel each, all by the same mean."""
    return [
        StatisticsShift(f"features.{number}", torch.tensor([mean]), torch.tensor([std]), None).to_dict()
        for number, std in enumerate(stds)
    ]


@pytest.mark.parametrize(
    ("mean", "entropies", "wording", "state"),
    [
        (
            0.2,
            (0.1, 0.1),
            "30.0% of the predictions changed, but the entropy hardly did: it may be",
            "check",
        ),
        (
            0.2,
            (0.46, 0.025),
            "probably better than before, because the entropy fell from 0.46 to 0.025 nats, unless the target lacks",
            "open",
        ),
        (0.2, (0.01, 0.2), "perhaps worse than before, because the entropy rose from 0.01 to 0.2 nats", "check"),
        (0.2, (2.2, 2.1), "probably low, because the network is rarely certain of a class", "check"),
        (0.01, (0.46, 0.025), "probably as before, because the statistics hardly moved", "check"),
    ],
)
def test_without_labels_a_verdict_guesses_at_the_accuracy_and_says_how_to_measure_it(
    mean: float, entropies: tuple[float, float], wording: str, state: str
) -> None:
    predictions = PredictionComparison(256, 10, *entropies, 0.7)
    verdict = adaptation_report(shifts(mean, 1.0), asdict(predictions), {})["verdicts"][-1]
    assert (verdict["subject"], verdict["state"]) == ("Accuracy", state)
    assert f"Not measured; {wording}" in verdict["text"]
    assert verdict["text"].endswith("Only labels can tell: pass labels to compare_predictions.")
    with messages_name_options():
        verdict = adaptation_report(shifts(mean, 1.0), asdict(predictions), {})["verdicts"][-1]
    assert (
        "run bn-insert evaluate with the original and the adapted checkpoint on some target images, in one"
        in verdict["text"]
    )


@pytest.mark.parametrize(
    ("images", "entropies", "wording"),
    [
        (7, (1.1, 0.56), "7 target images cannot show whether it is better than before"),
        (8, (1.1, 0.56), "probably better than before"),
        (256, (3.5e-6, 8.9e-16), "probably as before, because neither the predictions nor the entropy changed much"),
        (256, (1e-6, 0.01), "probably as before, because neither the predictions nor the entropy changed much"),
    ],
)
def test_neither_few_images_nor_the_entropies_of_certain_predictions_tell_which_network_is_better(
    images: int, entropies: tuple[float, float], wording: str
) -> None:
    predictions = asdict(PredictionComparison(images, 10, *entropies, 1.0))
    verdict = adaptation_report(shifts(0.2, 1.0), predictions, {})["verdicts"][-1]
    assert f"Not measured; {wording}" in verdict["text"]


def test_predictions_that_stayed_the_same_are_probably_as_good() -> None:
    predictions = asdict(PredictionComparison(256, 10, 0.101, 0.1, 0.95))
    text = adaptation_report(shifts(0.2, 1.0), predictions, {})["verdicts"][-1]["text"]
    assert "Not measured; probably as before, because neither the predictions nor the entropy changed much." in text


@pytest.mark.parametrize(("source", "doubtful"), [(None, False), (0.5, True), (1.4, True), (1.6, False), (1.8, False)])
def test_uncertain_predictions_are_doubtful_unless_they_are_as_uncertain_on_source_images(
    source: float | None, doubtful: bool
) -> None:
    predictions = asdict(PredictionComparison(256, 10, 2.2, 1.9, 0.7))
    certainty, accuracy = adaptation_report(shifts(0.2, 1.0), predictions, {}, source_entropy=source)["verdicts"][1:]
    assert (certainty["state"], accuracy["state"]) == (("check", "check") if doubtful else ("good", "open"))
    assert ("may belong to a different task" in certainty["text"]) is doubtful
    assert ("On source images, the mean entropy of the original's predictions is 1.8." in certainty["text"]) is (
        source == 1.8
    )


def collapsed(**changes: Any) -> dict[str, Any]:
    """Return predictions as under noise: the original is certain of one class or two."""
    found = PredictionComparison(256, 10, 1.0, 1.8, 0.1, classes_before=1.2, classes_after=9.6)
    return asdict(replace(found, **changes))


def test_a_network_that_predicts_few_classes_with_certainty_may_be_better_once_it_predicts_more() -> None:
    verdicts = adaptation_report(shifts(0.2, 1.0), collapsed(), {}, source_entropy=1.7)["verdicts"]
    assert [verdict["subject"] for verdict in verdicts] == ["Statistics", "Predictions", "Accuracy"]
    assert verdicts[2]["state"] == "open"
    assert (
        "better than before if the target shows many of the classes, because the original effectively predicts "
        "1.2 classes, and the adapted network 9.6; worse if it shows only a few"
    ) in verdicts[2]["text"]
    verdicts = adaptation_report(shifts(0.2, 1.0), collapsed(classes_after=1.7), {}, source_entropy=1.7)["verdicts"]
    assert "are not swapped" in verdicts[2]["text"] and "perhaps worse than before" in verdicts[3]["text"]


def test_source_and_target_are_not_doubted_where_labels_show_that_adapting_helps() -> None:
    for after, doubted in ((0.34, False), (0.15, True)):
        per_class = (ClassAccuracy(0, 128, 0.15, after), ClassAccuracy(1, 128, 0.15, after))
        predictions = collapsed(classes_after=1.2, per_class=per_class)
        found = adaptation_report(shifts(0.2, 1.0), predictions, {}, source_entropy=1.7, classes=["a", "b"])
        assert any("are not swapped" in verdict["text"] for verdict in found["verdicts"]) is doubted


@pytest.mark.parametrize(("images", "changed"), [(3, True), (280, False)])
def test_few_labels_or_an_unchanged_network_lead_to_no_advice_on_the_accuracy(images: int, changed: bool) -> None:
    predictions = PredictionComparison(
        images, 2, 0.5, 0.5, 1.0, tuple(ClassAccuracy(label, images, 0.9, 0.9) for label in (0, 1))
    )
    found = adaptation_report(shifts(0.2, 1.0), asdict(predictions), {}, classes=["a", "b"], changed=changed)
    text = f"90.0% before and 90.0% after, on {2 * images} labeled target images." + (
        " So few cannot show whether it is better than before." if changed else ""
    )
    assert found["verdicts"][-1] == {"state": "open", "subject": "Accuracy", "text": text}


@pytest.mark.parametrize(("before", "swapped"), [(0.45, True), (0.5, False)])
def test_an_original_that_is_more_certain_on_the_target_than_on_the_source_is_doubted(
    before: float, swapped: bool
) -> None:
    predictions = asdict(PredictionComparison(256, 10, before, 0.2, 0.7))
    found = adaptation_report(shifts(0.2, 1.0), predictions, {}, source_entropy=0.6)["verdicts"]
    assert [verdict["state"] for verdict in found if "are not swapped" in verdict["text"]] == ["check"] * swapped


def test_without_source_images_only_predictions_that_are_almost_guesses_are_doubtful() -> None:
    predictions = asdict(PredictionComparison(256, 10, 2.25, 2.1, 0.7))
    certainty, accuracy = adaptation_report(shifts(0.2, 1.0), predictions, {})["verdicts"][1:]
    assert (certainty["state"], accuracy["state"]) == ("check", "check")
    assert "may belong to a different task" in certainty["text"]


def test_predictions_on_a_part_of_the_target_are_said_to_be_on_a_part() -> None:
    predictions = asdict(PredictionComparison(256, 10, 2.2, 1.9, 0.7))
    for count, wording in ((1282, "70.0% of 256 of the 1,282 target images"), (256, "70.0% of 256 target images")):
        found = adaptation_report(shifts(0.2, 1.0), predictions, {}, target_images=count)["verdicts"]
        assert wording in found[1]["text"]


@pytest.mark.parametrize(
    ("after", "state", "wording"),
    [
        (0.7, "bad", "made it worse"),
        (0.72, "check", "did not improve it"),
        (0.723, "check", "did not improve it"),
        (0.73, "good", "after, on 280 labeled target images."),
    ],
)
def test_an_accuracy_that_did_not_rise_is_said_not_to_be_improved(after: float, state: str, wording: str) -> None:
    accuracy = accuracy_verdict(0.723, after)
    assert accuracy["state"] == state
    assert wording in accuracy["text"]


@pytest.mark.parametrize(
    ("after", "state", "advice"), [(0.7, "bad", "keep the original, or use images of all classes."), (0.8, "check", "")]
)
def test_an_accuracy_on_some_of_the_classes_says_so(after: float, state: str, advice: str) -> None:
    accuracy = accuracy_verdict(0.723, after, labelled=3)
    assert accuracy["state"] == state
    assert "on 84 labeled target images. They cover only 3 of the 10 classes. Adapting assumes" in accuracy["text"]
    assert accuracy["text"].endswith(advice)


@pytest.mark.parametrize(("images", "found", "lacking"), [(1024, 641, False), (1024, 600, True), (30, 8, False)])
def test_a_sample_of_the_images_need_not_have_all_classes(images: int, found: int, lacking: bool) -> None:
    classes = 1000 if images > 1000 else 10
    counts = [images - (found - 1), *[1] * (found - 1)]
    labels = tuple(ClassAccuracy(number, count, 0.4, 0.6) for number, count in enumerate(counts))
    predictions = asdict(PredictionComparison(images, classes, 2.2, 1.9, 0.7, labels))
    text = adaptation_report(shifts(0.2, 1.0), predictions, {}, classes=[*map(str, range(classes))])["verdicts"][-1]
    assert ("classes. Adapting assumes" in text["text"]) is lacking


def accuracy_verdict(before: float, after: float, *, labelled: int = 10) -> dict[str, str]:
    """Return the verdict on the accuracy of a network of ten classes, some of which have labeled images."""
    labels = tuple(ClassAccuracy(number, 28, before, after) for number in range(labelled))
    predictions = asdict(PredictionComparison(28 * labelled, 10, 2.2, 1.9, 0.7, labels))
    found: dict[str, str] = adaptation_report(shifts(0.2, 1.0), predictions, {}, classes=list("0123456789"))[
        "verdicts"
    ][-1]
    return found


def test_more_images_are_not_advised_where_there_are_hundreds_or_source_and_target_are_in_doubt() -> None:
    labels = tuple(ClassAccuracy(number, 5, 0.9, 0.6) for number in range(10))
    predictions = asdict(PredictionComparison(50, 10, 0.4, 0.9, 0.7, labels))
    for source, count, advice in (
        (0.4, 50, "keep the original, or use more target images."),
        (0.4, 200, "keep the original."),
        (0.9, 50, "keep the original, or adapt it again once source, target and preprocessing are right (see above)."),
    ):
        found = adaptation_report(
            shifts(0.2, 1.0),
            predictions,
            {},
            classes=list("0123456789"),
            source_entropy=source,
            target_images=count,
        )
        assert found["verdicts"][-1]["text"].endswith(f"Adapting made it worse: {advice}")


def test_a_network_that_is_more_certain_on_the_target_may_also_get_other_preprocessing_than_in_training() -> None:
    predictions = asdict(PredictionComparison(256, 10, 0.1, 0.2, 0.7))
    found = adaptation_report(shifts(0.2, 1.0), predictions, {}, source_entropy=0.6)["verdicts"][2]
    assert "Another possible cause is the preprocessing (resize, crop, mean, std): check that it is" in found["text"]


@pytest.mark.parametrize("classes", [0, 10])
def test_a_network_that_was_adapted_before_is_a_verdict_and_makes_the_guess_depend_on_the_source(classes: int) -> None:
    predictions = asdict(PredictionComparison(256, classes, 0.46, 0.025, 0.7))
    found = adaptation_report(shifts(0.2, 1.0), predictions, {}, adapted_before="this was adapted")["verdicts"]
    assert {"state": "check", "subject": "Source", "text": "This was adapted."} in found
    if classes:
        assert "; provided that source, target and preprocessing are right (see above)." in found[-1]["text"]
        assert found[-1]["state"] == "check"


def test_labels_decide_instead_of_the_certainty_of_predictions() -> None:
    labels = tuple(ClassAccuracy(number, 25, 0.2, 0.6) for number in range(10))
    predictions = asdict(PredictionComparison(250, 10, 2.2, 1.9, 0.7, labels))
    found = adaptation_report(shifts(0.2, 1.0), predictions, {}, classes=list("0123456789"))["verdicts"][1:]
    assert [verdict["state"] for verdict in found] == ["good", "good"]
    assert "different task" not in found[0]["text"]


def insertion(*, equalize: bool = True, agreements: bool = True, name: str = "vgg.pth") -> dict[str, Any]:
    """Return the report of a real insertion; the caller may change it."""
    return copy.deepcopy(_insertion(equalize, agreements)) | {
        "checkpoint": {"path": name, "bytes": 12345, "sha256": "a" * 64},
        "calibration": {"source": f"photos of {name}", "images": 24, "batches": 8, "skipped": 1},
        "preprocessing": {"origin": "from the checkpoint", "tensors": False}
        | {"resize": None, "crop": 224, "mean": [0.5], "std": [0.25]},
        "output": {"path": name, "bytes": 12345, "sha256": "b" * 64},
        "options": {"layers": ["conv"], "skip": [name], "equalize": equalize, "transform": {"resize": None}},
        "command": f"bn-insert insert {name}",
        "date": "2026-01-02T03:04:05+00:00",
        "seconds": 1.5,
        "report_seconds": 0.5,
    }


@functools.cache
def _insertion(equalize: bool, agreements: bool) -> dict[str, Any]:
    model, x = randomised(small_vgg()), images(24)
    made = insert(model, x.split(8), equalize=equalize)
    found = train_mode_agreement(made.model, [x]) if agreements else []
    renorm = train_mode_agreement(made.model, [x], renorm=True) if agreements else []
    return insertion_report(
        made.layer_statistics(),
        [asdict(edge) for edge in made.edges],
        {"cpu": asdict(compare_outputs(model, made.model, [x]))},
        [agreement.to_dict() for agreement in found],
        renorm=[agreement.to_dict() for agreement in renorm],
        reading=agreement_reading(found, renorm=renorm)
        if found
        else "Train mode could not be measured: too few images",
    )


def run(name: str, accuracies: tuple[float, ...] = (0.5, 0.75, 0.7), **settings: Any) -> dict[str, Any]:
    """Return the record of a training run."""
    epochs = [
        EpochMetrics(number, 10 * number, 0.01 / number, 2 / number, value / 2, 1.5 / number, value, 3.25)
        for number, value in enumerate(accuracies, 1)
    ]
    facts = {"checkpoint": {"path": f"{name}.pth"}, "batchnorms": 0, "data": {"folder": "flowers", "classes": 3}}
    chosen = asdict(TrainingSettings(epochs=len(epochs) or 1, **settings))
    return run_report(name, chosen, [asdict(epoch) for epoch in epochs], facts)["runs"][0]


class Page(HTMLParser):
    """The references in a page, and its visible text."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.scripts = self.charts = 0
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []  # every element is closed

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        self.charts += tag == "figure"
        values = dict(attrs)
        self.addresses += [values[name] or "" for name in ("src", "href", "xlink:href") if name in values]
        self.ids += [values["id"] or ""] if "id" in values else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


PAGES = {
    "insertion": insertion,
    "without equalization": lambda: insertion(equalize=False, agreements=False),
    "one run": lambda: runs_report([run("plain")]),
    "ten runs": lambda: runs_report([run(f"run {number}", lr=0.1 / (number + 1)) for number in range(10)]),
    "a run without epochs": lambda: runs_report([run("new", ())]),
}


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_refers_to_nothing_outside_itself(kind: str) -> None:
    text = page(PAGES[kind]())
    found = Page(text)
    assert [address for address in found.addresses if not address.startswith(("#", "data:,"))] == []
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert len(found.ids) == len(set(found.ids))
    assert {address[1:] for address in found.addresses if address.startswith("#")} <= set(found.ids)
    assert found.scripts == 1


def test_the_page_of_an_insertion_has_what_the_data_has() -> None:
    data = insertion()
    found = Page(page(data))
    for words in (
        "vgg.pth with BatchNorm",
        "a" * 64,
        "b" * 64,
        "Equal bit for bit to those of the original",
        "No resizing; crop 224; mean 0.5; std 0.25 (from the checkpoint).",
        "bn-insert finetune vgg.pth DATA --output-dir runs/first",
        "bn-insert insert vgg.pth",
        "This report: 2 Jan 2026, 03:04 UTC, by",
        data["train_mode"]["reading"],
        "Measured on 24 images",
        "top-1 with renorm",
        data["versions"]["torch"],
        "output layer",
        *(layer["name"] for layer in data["layers"]),
    ):
        assert words in found.text
    names = {name.removeprefix("chart-") for name in found.ids if name.startswith("chart-")}
    assert names == {"agreement", "mean", "std", "gamma", "constant", "error"}


@pytest.mark.usefixtures("no_charts")
def test_a_page_without_figures_of_renorm_has_no_column_for_them() -> None:
    data = insertion()
    data["train_mode"]["renorm"] = []
    assert "top-1 with renorm" not in Page(page(data)).text


@pytest.mark.usefixtures("no_charts")
def test_a_page_says_when_nothing_was_written() -> None:
    assert "no checkpoint was written" in Page(page(insertion(agreements=False) | {"output": None})).text


def test_a_page_says_why_train_mode_was_not_measured_and_that_nothing_was_equalized() -> None:
    found = Page(page(insertion(equalize=False, agreements=False)))
    assert "could not be measured: too few images" in found.text
    assert "Equalization" not in found.text
    assert not {"chart-agreement", "chart-gamma"} & set(found.ids)


@pytest.mark.usefixtures("no_charts")
def test_a_page_says_in_how_many_layers_the_error_is_large() -> None:
    data = insertion(agreements=False)
    inserted = [layer["batchnorm"] for layer in data["layers"] if "batchnorm" in layer]
    for norm in inserted:
        norm["standard_error"] = [0.01] * norm["channels"]
    assert "It is above 0.1" not in Page(page(data)).text
    inserted[0]["standard_error"] = [0.04] * inserted[0]["channels"]
    assert f"It is above 0.1 in 1 of {len(inserted)} layers. This does not change the outputs" in Page(page(data)).text


def test_an_error_is_shown_only_where_enough_batches_estimate_it() -> None:
    assert "0.1 or less is good" in Page(page(insertion())).text
    data = insertion()
    data["calibration"]["batches"] = 7
    found = Page(page(data))
    assert "not estimated from fewer than 8 batches" in found.text
    assert "chart-error" not in found.ids


@pytest.mark.usefixtures("no_charts")
def test_outputs_without_classes_have_no_column_for_the_top_class() -> None:
    data = insertion(agreements=False)
    assert "top-1 agreement" in Page(page(data)).text
    data["comparisons"]["cpu"]["top1_agreement"] = float("nan")
    found = Page(page(data)).text
    assert "top-1 agreement" not in found
    assert "nan" not in found


@pytest.mark.parametrize(
    ("preprocessing", "state", "wording"),
    [
        ({}, "good", "(from the checkpoint)."),
        ({"origin": "the default"}, "check", "Make sure that the network was trained with this preprocessing"),
        ({"mean": [123.68, 116.78, 103.94]}, "bad", "above 1"),
        ({"tensors": True}, "check", "the values of a tensor file are used unchanged"),
    ],
)
def test_the_preprocessing_has_a_verdict(preprocessing: dict[str, Any], state: str, wording: str) -> None:
    data = insertion(agreements=False)
    data["preprocessing"] |= preprocessing
    verdict = verdicts(data)[1]
    assert verdict.state == state
    assert wording in verdict.text


def test_train_mode_has_a_verdict_at_the_usual_batch_size() -> None:
    data = insertion()
    for top1, state in ((0.97, "good"), (0.5, "check")):
        data["train_mode"]["agreements"] = [
            TrainModeAgreement(size, 64, agreement, 0.1, 0.1).to_dict() for size, agreement in ((8, 0.1), (32, top1))
        ]
        verdict = verdicts(data)[2]
        assert verdict.state == state
        assert f"At a batch size of 32, the network in train mode keeps {100 * top1:.1f}% (± " in verdict.text
        assert ", measured on 64 images) of the top-1 classes" in verdict.text
        assert next_command(data) == "bn-insert finetune vgg.pth DATA --output-dir runs/first"
    data["options"]["model"] = "nets:make it"
    assert "--model 'nets:make it'" in next_command(data)
    assert next_command(data | {"output": None}) == ""


@pytest.mark.parametrize("kind", ["insertion", "runs"])
def test_names_of_files_layers_and_runs_are_text_whatever_is_in_them(kind: str) -> None:
    if kind == "insertion":
        data = insertion(name=HOSTILE)
        for layer in data["layers"]:
            layer["name"] += HOSTILE[:20]
        data["layers"][0]["name"] = "$\\frac{$ <b>"
        data["edges"][0]["reason"] = HOSTILE
    else:
        data = runs_report([run(HOSTILE), run("_plain", lr=0.5)])
    found = Page(page(data))
    assert found.scripts == 1
    assert "<script>alert(1)</script> & $x^2$ {{ 7 * 7 }}" in found.text


def test_gamma_before_and_after_equalization_are_in_the_data() -> None:
    for layer in insertion()["layers"]:
        if "batchnorm" in layer:
            norm = layer["batchnorm"]
            before, after = torch.tensor(norm["gamma_before_equalization"]), torch.tensor(norm["gamma"])
            torch.testing.assert_close(before, (torch.tensor(norm["std"]).square() + 1e-5).sqrt())
            scale = (before / after).log2()
            varying = torch.tensor(norm["std"]) > 0.1  # below it eps shows
            torch.testing.assert_close(scale[varying], scale[varying].round(), atol=1e-3, rtol=0)
            assert ((after[varying] > 0.7) & (after[varying] < 1.42)).all()
    assert "gamma_before_equalization" not in json.dumps(insertion(equalize=False))


def test_near_constant_channels_are_counted_beside_the_constant_ones() -> None:
    model, x = randomised(small_vgg()), images(8)
    with torch.no_grad():
        model.features[0].weight[0] *= 1e-4
    first = insert(model, [x]).layer_statistics()[0]["batchnorm"]
    assert (first["near_constant_channels"], first["constant_channels"]) == (1, first["std"].count(0.0))
    assert first["constant_channels"] >= 1


def test_runs_are_compared() -> None:
    found = Page(page(runs_report([run("plain"), run("batchnorm", (0.4, 0.9), lr=0.1)])))
    for words in (
        "2 fine-tuning runs",
        "batchnorm has the best validation accuracy, 90.00%: 15.0 points above plain (75.00%).",
        "Differences between the runs",
        "Epochs of plain",
    ):
        assert words in found.text
    differing = found.text.split("Differences between the runs")[1].split("Common settings")[0]
    assert "lr 0.1 not chosen yet" in re.sub(r"\s+", " ", differing)
    assert "momentum" not in differing
    assert found.charts == 5


def test_runs_are_ranked_and_the_best_is_marked() -> None:
    runs = [run("second"), run("none", ()), run("first", (0.4, 0.9)), run("third", (0.1,))]
    text = Page(page(runs_report(runs))).text
    results = text.split("Results")[1].split("Curves")[0]
    assert [name for name in results.split() if name in {"first", "second", "third", "none"}] == [
        "first",
        "second",
        "third",
        "none",
    ]
    assert results.count(" best ") == 2  # a heading, and the mark
    assert "first best 90.00%" in results


def test_identical_runs_are_named_and_their_curves_told_apart() -> None:
    text = page(runs_report([run("a"), run("b"), run("c", (0.1, 0.2, 0.3))]))
    assert "a, b: identical in all epochs" in Page(text).text
    chart = text.split('id="chart-val_accuracy"')[1].split("</figure>")[0]
    assert chart.count("stroke-dasharray: ") == 1
    assert chart.count("stroke-width: 5") == 1


def test_runs_with_the_same_accuracy_share_the_first_place() -> None:
    assert runs_verdict([run("a"), run("b")]) == "2 runs share the best validation accuracy, 75.00%: a, b."
    assert runs_verdict([run("a")]) == ""


def test_one_run_has_curves_for_training_and_validation() -> None:
    found = Page(page(runs_report([run("plain")])))
    assert found.charts == 3
    assert "Best validation accuracy 75.00%, in epoch 2; 3 of 3 epochs completed." in found.text


def epochs(losses: tuple[float, ...], accuracies: tuple[float, ...]) -> list[dict[str, Any]]:
    return [
        asdict(EpochMetrics(number, number, 0.01, 1.0, 0.5, loss, accuracy, 1.0))
        for number, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), 1)
    ]


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize(
    ("losses", "accuracies", "state", "wording"),
    [
        ((0.9, 0.3, 0.3), (0.6, 0.9, 0.9), "good", "No sign of trouble"),
        ((1.0, 0.9, 0.9), (0.5, 0.5, 0.4), "bad", "50.0%, is not above 50.0%, the share of the largest class"),
        (
            (1.9, 1.5, 1.5),
            (0.6, 0.7, 0.7),
            "bad",
            "1.500 at its lowest, is no lower than 1.386 = ln(4), the loss of guessing. "
            "Try a third of this learning rate (lr=0",
        ),
        ((3.0, 2.0, 1.5), (0.6, 0.7, 0.7), "bad", "the loss of guessing. Train for more epochs"),
        ((20.0, 15.0, 9.0), (0.6, 0.7, 0.7), "bad", "the loss of guessing. Try a third of this learning rate"),
        (
            (0.9, 0.5, 9.0),
            (0.6, 0.7, 0.6),
            "bad",
            "rose from 0.500 to 9.000, above 1.386 = ln(4), the loss of guessing: training",
        ),
        ((1.3, 1.2, 1.2), (0.6, 0.7, 0.7), "check", "is only 13.4% below 1.386"),
        ((0.9, 0.8, 0.6), (0.6, 0.7, 0.8), "check", "still falling, from 0.8 to 0.6 in the last epoch"),
        ((0.9, 0.3), (0.6, 0.9), "check", "2 of 3 epochs were completed"),
        ((0.5, 0.6, 0.6), (0.9, 0.8, 0.9), "check", "No epoch was better than the first: a lower learning rate may"),
        ((0.5, 0.6, 0.6), (1.0, 0.8, 0.9), "good", "No sign of trouble"),
    ],
)
def test_the_health_of_a_run_is_said_in_words(
    losses: tuple[float, ...], accuracies: tuple[float, ...], state: str, wording: str
) -> None:
    data = {"folder": "flowers", "classes": 4, "largest_class": 0.5}
    report = run_report("a", {"epochs": 3, "lr": 0.01}, epochs(losses, accuracies), {"batchnorms": 0, "data": data})
    health = report["runs"][0]["health"]
    assert state in {verdict["state"] for verdict in health}
    assert any(wording in verdict["text"] for verdict in health)
    text = page(report)
    assert wording in Page(text).text
    assert ('class="verdict good"' in text) == (state == "good")


@pytest.mark.parametrize(
    ("before", "wording"), [(0.7, "70.0%, is not above that before training, 70.0%. Try"), (0.69, "")]
)
def test_a_run_without_an_epoch_above_the_accuracy_before_training_says_so(before: float, wording: str) -> None:
    data = {"classes": 4, "largest_class": 0.5}
    fit = {"fitted": False, "accuracy": before}
    (verdict,) = run_health(epochs((0.5, 0.5), (0.6, 0.7)), {"epochs": 2}, data, output_fit=fit)
    assert verdict.state == ("check" if wording else "good")
    assert wording in verdict.text


@pytest.mark.parametrize(("reestimated", "best", "named"), [(0.76, 0.8, True), (0.9, 0.8, False), (0.76, 0.95, False)])
def test_statistics_that_spoiled_the_network_are_to_be_kept_unless_training_made_up_for_them(
    reestimated: float, best: float, named: bool
) -> None:
    fit = {"fitted": True, "accuracy": 0.93, "reestimated_accuracy": reestimated}
    with messages_name_options():
        found = run_health(epochs((0.5, 0.5), (best, best)), {"epochs": 2}, {"classes": 4}, output_fit=fit)
    keep = "from 93.0% to 76.0%: keep the statistics as they are (--batchnorm freeze-statistics), or train on more"
    assert (keep in " ".join(verdict.text for verdict in found)) == named


def test_a_run_that_ruined_an_accurate_network_is_not_called_healthy() -> None:
    found = epochs((0.031, 0.3, 0.5, 0.7, 0.812), (0.99, 0.88, 0.77, 0.81, 0.78))
    settings, data = {"epochs": 5, "lr": 0.01}, {"classes": 10, "largest_class": 0.1}
    texts = [verdict.text for verdict in run_health(found, settings, data, output_fit={"fitted": False, "accuracy": 1})]
    assert texts == [
        "The best validation accuracy, 99.0%, is not above that before training, 100.0%. Try a third of this learning "
        "rate (lr=0.0033).",
        "The validation accuracy fell from 99.0% in epoch 1 to 78.0% in the last one, below that before training, "
        "100.0%; best.pth is from epoch 1.",
    ]
    (fell,) = run_health(found, settings, data)
    assert fell.text.startswith("The validation accuracy fell from 99.0% in epoch 1 to 78.0% in the last one; best.pth")
    assert fell.text.endswith("Try a third of this learning rate (lr=0.0033).")


@pytest.mark.parametrize(("last", "wording"), [(0.69, "to 69.0% in the last one, below that before"), (0.7, "No sign")])
def test_a_last_epoch_below_the_accuracy_before_training_is_named(last: float, wording: str) -> None:
    found, fit = epochs((0.5, 0.5, 0.5), (0.6, 0.75, last)), {"fitted": False, "accuracy": 0.7}
    (verdict,) = run_health(found, {"epochs": 3}, {"classes": 4}, output_fit=fit)
    assert wording in verdict.text


@pytest.mark.parametrize("before", [0.985, 1.0])
def test_an_accuracy_of_nearly_all_images_is_enough_unless_it_was_higher_before(before: float) -> None:
    fit = {"fitted": False, "accuracy": before}
    (verdict,) = run_health(epochs((0.1, 0.1, 0.1), (0.985,) * 3), {"epochs": 3}, {"classes": 4}, output_fit=fit)
    assert ("is not above that before training" in verdict.text) == (before == 1)


def test_nothing_is_said_of_a_loss_that_still_falls_where_all_images_are_right() -> None:
    (verdict,) = run_health(epochs((0.06, 0.03), (1.0, 1.0)), {"epochs": 2}, {"classes": 10})
    assert verdict.state == "good"


@pytest.mark.parametrize(
    ("losses", "settings", "advice"),
    [
        (
            (1.40, 1.399, 1.398),
            {"lr": 1e-7},
            "Train for more epochs (--resume with a larger --epochs; or, in a new run",
        ),
        ((1.40, 1.39, 1.389), {"lr": 0.0003}, "Train for more epochs (--resume with a larger --epochs)."),
        ((1.38, 1.379, 1.378), {"lr": 1e-4, "opt": "sgd"}, "in a new run, a higher learning rate: --lr 0.003), or on"),
        ((0.5, 0.49, 0.48), {"lr": 1e-5}, "Train for more epochs (--resume with a larger --epochs; or, in a new run"),
        ((1.3, 1.2, 1.0), {"lr": 0.01}, "more epochs (--resume with a larger --epochs) may help."),
    ],
)
def test_a_run_that_learned_too_little_is_not_advised_of_a_lower_learning_rate(
    losses: tuple[float, ...], settings: dict[str, Any], advice: str
) -> None:
    fit = {"fitted": False, "accuracy": 0.6}
    with messages_name_options():
        found = run_health(epochs(losses, (0.6,) * 3), settings | {"epochs": 3}, {"classes": 4}, output_fit=fit)
    text = " ".join(verdict.text for verdict in found)
    assert advice in text
    assert "third" not in text
    assert "a lower learning rate" not in text


def test_a_learning_rate_that_the_run_has_tried_and_found_worse_is_not_advised() -> None:
    settings, data = {"epochs": 5, "lr": 0.0003}, {"classes": 4, "output_replaced": True}
    found = epochs((0.5, 0.6, 0.6, 0.6, 0.7), (0.9, 0.8, 0.8, 0.8, 0.7))
    for loss, advice in (
        (0.9, "better than the first. Try a new head with BatchNorm (head=512) or fewer epochs (epochs=2)."),
        (0.79, "pretrained network. Try a third of this learning rate (lr=0.0001) or a new head"),
        (math.inf, "Try a new head with BatchNorm (head=512) or fewer epochs (epochs=2)."),
    ):
        trials = {0.0003: 0.8, 0.001: 0.9, 0.0001: loss}
        texts = " ".join(verdict.text for verdict in run_health(found, settings, data, trials=trials))
        assert advice in texts
        assert ("a third" in texts) == ("a lower learning rate" in texts) == (loss == 0.79)
    rising = epochs((0.9, 2.0), (0.6, 0.6))
    trials = {0.003: 0.8, 0.001: 0.9, 0.01: 0.9}
    (verdict,) = run_health(rising, {"epochs": 2, "lr": 0.003}, {"classes": 4}, trials=trials)
    assert verdict.text.endswith("the loss of guessing: training diverged.")
    failed = epochs((1.9, 1.9), (0.6, 0.6))
    (verdict,) = run_health(failed, {"epochs": 2, "lr": 0.003}, {"classes": 4}, trials=trials)
    assert verdict.text.endswith("the loss of guessing. Check the labels and the preprocessing.")


def test_the_usual_learning_rate_is_not_advised_where_trials_moved_away_from_it() -> None:
    found, settings = epochs((1.38, 1.379, 1.378), (0.6, 0.6, 0.6)), {"epochs": 3, "lr": 3e-5}
    for trials, advised in (({0.0003: 2.0, 0.0001: 1.8, 3e-5: 1.5}, False), ({}, True)):
        texts = " ".join(verdict.text for verdict in run_health(found, settings, {"classes": 4}, trials=trials))
        assert ("a higher learning rate: lr=0.0003" in texts) == advised


@pytest.mark.parametrize(
    ("losses", "accuracies"), [((0.7,) * 3, (0.6,) * 3), ((1.5,) * 3, (0.6,) * 3), ((0.9, 1.2, 1.6), (0.6, 0.62, 0.61))]
)
def test_more_images_are_advised_instead_of_more_training_where_the_training_accuracy_is_far_higher(
    losses: tuple[float, ...], accuracies: tuple[float, ...]
) -> None:
    found = [epoch | {"train_accuracy": 0.99} for epoch in epochs(losses, accuracies)]
    settings, fit = {"epochs": 3, "lr": 0.0003}, {"fitted": False, "accuracy": 0.65}
    text = " ".join(verdict.text for verdict in run_health(found, settings, {"classes": 4}, output_fit=fit))
    assert "more epochs" not in text
    assert "diverged" not in text
    assert text.count("The training accuracy, 99.0%, is above that in validation, ") == 1
    assert ": train on more images, or with random crops (crop_scale=0.35)." in text
    cropped = run_health(found, settings | {"crop_scale": 0.5}, {"classes": 4}, output_fit=fit)
    assert ": train on more images." in " ".join(verdict.text for verdict in cropped)


def test_more_training_is_not_advised_where_the_loss_rose() -> None:
    found = run_health(epochs((1.2, 1.3, 1.3), (0.6, 0.5, 0.4)), {"epochs": 3, "lr": 0.01}, {"classes": 4})
    text = " ".join(verdict.text for verdict in found)
    assert text.count("Try a third of this learning rate") == 1
    assert "longer" not in text


def test_a_rate_that_destroyed_the_network_is_not_answered_by_more_training() -> None:
    losses = (4.28, 1.37, 1.36)  # above guessing at first, and then just below it, falling
    (found, *_) = run_health(epochs(losses, (0.3,) * 3), {"epochs": 3, "lr": 0.01}, {"classes": 4})
    assert found.text.endswith("the loss of guessing. Try a third of this learning rate (lr=0.0033).")
    (found, *_) = run_health(epochs(losses, (0.3,) * 3), {"epochs": 3, "lr": 0.3}, {"classes": 4})
    assert found.text.endswith("the loss of guessing. Try the usual learning rate (lr=0.0003).")


def test_settings_without_effect_are_not_on_the_page() -> None:
    settings = asdict(TrainingSettings(opt="adamw"))
    text = Page(page(run_report("a", settings, [], {"batchnorms": 3}))).text
    assert "lr scheduler" in text
    assert [name for name in ("momentum", "lr step size", "lr gamma", "renorm r max") if name in text] == []


def test_after_a_failed_run_a_rate_is_named_and_a_new_head_where_the_output_layer_was_replaced() -> None:
    found, settings = epochs((1.9, 1.9), (0.6, 0.6)), {"epochs": 2, "lr": 0.01}
    (kept,) = run_health(found, settings, {"classes": 4, "output_replaced": False})
    assert kept.text.endswith("the loss of guessing. Try a third of this learning rate (lr=0.0033).")
    with messages_name_options():
        (replaced,) = run_health(found, settings, {"classes": 4, "output_replaced": True})
    advice = "Try a third of this learning rate (--lr 0.0033) or a new head with BatchNorm (--head 512)."
    assert replaced.text.endswith(advice)
    (conv,) = run_health(found, settings, {"classes": 4, "output_replaced": True, "output_kind": "conv"})
    assert conv.text == kept.text, "a new head takes the place of dense layers"
    (unknown,) = run_health(found, {"epochs": 2}, {"classes": 4})
    assert unknown.text.endswith("Try a lower learning rate (lr).")


def test_a_run_too_short_for_learning_rate_trials_is_advised_to_train_for_longer_not_at_a_third_of_the_rate() -> None:
    found, data = epochs((1.9,), (0.6,)), {"classes": 4, "output_replaced": True}
    with messages_name_options():
        (short,) = run_health(found, {"epochs": 1, "lr": 0.003}, data | {"epochs_for_trials": 5})
    advice = "Train for longer, in a new run with --epochs 5 or more: trials then choose the learning rate"
    assert f"the loss of guessing. {advice}" in short.text
    assert "third" not in short.text
    fit = {"fitted": True, "accuracy": 0.6}
    (no_better,) = run_health(epochs((0.9,), (0.6,)), {"epochs": 1}, data | {"epochs_for_trials": 5}, output_fit=fit)
    assert "is not above that before training, 60.0%. Train for longer, in a new run with epochs=5" in no_better.text


@pytest.mark.parametrize(
    ("losses", "wording"), [((0.9, 0.8, 9.0), "training diverged."), ((0.5, 0.6, 0.6), "of the pretrained network.")]
)
def test_a_short_run_that_lost_what_it_had_learned_is_advised_of_a_lower_rate_and_of_trials(
    losses: tuple[float, ...], wording: str
) -> None:
    data = {"classes": 4, "epochs_for_trials": 5}
    (verdict,) = run_health(epochs(losses, (0.8, 0.7, 0.7)), {"epochs": 3, "lr": 0.003}, data)
    assert verdict.text.endswith(
        f"{wording} Try a third of this learning rate (lr=0.001) or a new run that is long enough for learning rate "
        "trials (epochs=5 or more)."
    )


@pytest.mark.usefixtures("no_charts")
def test_a_run_that_failed_is_never_shown_as_good_among_others() -> None:
    data = {"data": {"classes": 4, "largest_class": 0.5}, "batchnorms": 0}
    reports = [run_report(name, {"epochs": 2}, epochs((1.9, 1.9), (0.3, 0.2)), data)["runs"][0] for name in "ab"]
    text = page(runs_report(reports))
    assert '"verdict good"' not in text
    assert '<span class="good">best' not in text
    assert Page(text).text.count("is not above 50.0%") == 2


def test_runs_on_different_images_are_not_compared() -> None:
    runs = [run("a"), run("b", (0.5, 0.9))]
    assert not on_different_images(runs)
    for each, digest in zip(runs, "ab", strict=True):
        each["data"] = {"validation_images": 100, "classes": 4, "largest_class": 0.5, "validation_digest": digest}
    assert on_different_images(runs)
    del runs[0]["data"]["validation_digest"]
    assert not on_different_images(runs), "the numbers are all that an older report has"
    runs[0]["data"]["validation_images"] = 200
    text = Page(page(runs_report(runs))).text
    assert "These runs were validated on different images: their accuracies cannot be compared." in text
    assert "has the best validation accuracy" not in text
    assert " best " not in text.split("Curves")[0].split("seconds in epochs")[1]


def test_a_run_that_stopped_early_is_complete() -> None:
    found = epochs((0.9, 0.3, 0.4), (0.6, 0.9, 0.8))
    assert run_health(found, {"epochs": 9, "patience": 1}, {})[0].state == "good"
    assert run_health(found, {"epochs": 9, "patience": 2}, {})[0].state == "check"
    assert run_health(found, {"epochs": 3, "patience": 1}, {})[0].text.startswith("No sign of trouble")


def test_the_page_says_that_a_run_stopped_early_and_why() -> None:
    report = run_report("a", {"epochs": 9, "patience": 1}, epochs((0.9, 0.3, 0.4), (0.6, 0.9, 0.8)), {"batchnorms": 0})
    text = Page(page(report)).text
    assert (
        "Stopped early, after 3 of 9 epochs: 1 epoch without a higher validation accuracy than in epoch 2 (patience=1)."
    ) in text
    assert "No sign of trouble" in text


def test_a_loss_a_little_above_guessing_is_not_called_above_an_equal_number() -> None:
    (verdict,) = run_health(epochs((math.log(3) + 1e-5,), (0.6,)), {"epochs": 1}, {"classes": 3})
    assert "1.099 at its lowest, is no lower than 1.099 = ln(3)" in verdict.text


def test_a_loss_above_guessing_with_a_kept_output_layer_that_was_not_fitted_names_the_option() -> None:
    found = epochs((4.0, 3.9, 3.8), (0.2, 0.2, 0.2))
    data = {"classes": 4, "largest_class": 0.1, "output_replaced": False}
    with messages_name_options():
        for fit_output, named in ((False, True), (True, False)):
            text = run_health(found, {"fit_output": fit_output}, data)[0].text
            assert ("If the checkpoint was trained on other classes, leave out --no-fit-output." in text) is named


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"epochs": 3}, "resume=True with a larger epochs"),
        ({"epochs": 9, "patience": 1}, "resume=True with a larger patience"),
        ({"epochs": 3, "patience": 1}, "resume=True with a larger epochs and patience"),
        ({"epochs": 9}, "resume=True"),
    ],
)
def test_more_training_is_advised_by_what_ended_the_run(settings: dict[str, int], options: str) -> None:
    found = epochs((0.68, 0.66, 0.65), (0.6, 0.7, 0.7))
    texts = [verdict.text for verdict in run_health(found, settings, {"classes": 2})]
    assert f"train for longer ({options}), or on more images." in " ".join(texts)


@pytest.mark.usefixtures("no_charts")
def test_a_run_without_a_complete_epoch_says_so_and_has_not_failed() -> None:
    text = page(runs_report([run("new", ())]))
    assert "No epoch has been completed" in Page(text).text
    assert '<div class="check">' in text
    assert '<div class="bad">' not in text


def test_the_axis_of_accuracies_ends_at_100_percent() -> None:
    for runs in ([run("a", (1.0, 1.0))], [run("a", (1.0, 1.0)), run("b", (1.0, 1.0))]):
        (svg,) = [chart.svg for chart in run_charts(runs) if chart.name in {"accuracy", "val_accuracy"}]
        assert max(float(label) for label in re.findall(r">([0-9.]+)</text>", svg)) == 100


@pytest.mark.usefixtures("no_charts")
def test_accuracies_among_the_facts_of_runs_are_percentages() -> None:
    runs = [run("a") | {"output_fit": {"accuracy": 1.0}}, run("b") | {"output_fit": {"accuracy": 0.990654}}]
    text = Page(page(runs_report(runs))).text
    assert "output fit: accuracy 100.00% 99.07%" in text


@pytest.mark.usefixtures("no_charts")
def test_commands_and_options_in_verdicts_do_not_break_at_their_hyphens() -> None:
    with messages_name_options():
        report = run_report("a", {"epochs": 2, "lr": 0.01}, epochs((1.9, 1.9), (0.6, 0.6)), {"batchnorms": 0})
    verdict = "<b> Try --lr 0.0033, bn-insert compare-modes or pre-trained ones (-b)."
    report["runs"][0]["health"] = [{"state": "bad", "subject": "Loss", "text": verdict}]
    begin, end = '<code class="nowrap">', "</code>"
    assert (
        f"&lt;b&gt; Try {begin}--lr 0.0033{end}, {begin}bn-insert compare-modes{end} or pre-trained ones "
        f"({begin}-b{end})."
    ) in page(report)


@pytest.mark.usefixtures("no_charts")
def test_the_suffix_says_which_kind_is_written_and_both_have_the_same_data(tmp_path: Path) -> None:
    data = insertion(agreements=False)
    write_report(tmp_path / "a.json", data)
    write_report(tmp_path / "a.HTML", data)
    again = json.loads((tmp_path / "a.json").read_text())
    assert again == json.loads(json.dumps(data))
    assert (tmp_path / "a.HTML").read_text() == page(again)


@pytest.mark.parametrize("name", ["report", "report.pdf", "report.htm"])
def test_another_suffix_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"use a name that ends in \.html or \.json"):
        check_report(str(tmp_path / name), tmp_path / "out.pth", overwrite=True)


@pytest.mark.usefixtures("no_charts")
def test_a_page_that_cannot_be_made_leaves_no_file_and_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "old.html"
    path.write_text("old")
    broken = {**insertion(agreements=False), "seconds": "a word"}
    with pytest.raises(CheckpointError, match="cannot write"):
        write_report(path, broken, overwrite=True)
    with pytest.raises(CheckpointError, match="already exists"):
        write_report(path, insertion(agreements=False))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    written = run("plain")
    write_report(tmp_path / "report.json", runs_report([written]))
    assert read_run(tmp_path / "report.json") == json.loads(json.dumps(written))


@pytest.mark.parametrize(
    ("content", "wording"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not valid JSON"),
        ("[]", "is not the report of one training run"),
        ('{"format": "bn-insert report"}', "is not the report of one training run"),
        ('{"format": "bn-insert runs", "runs": []}', "is not the report of one training run"),
    ],
)
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, content: str | None, wording: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(CheckpointError, match=wording):
        read_run(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 3),
        ("settings", []),
        ("epochs", {}),
        ("batchnorms", "x"),
        ("batchnorms", -1),
        ("best_epoch", "x"),
        ("best_epoch", 10**30),
        ("epochs", [3]),
        ("epochs", [{"epoch": 1}]),
        ("val_loss", float("nan")),
        ("val_accuracy", 7),
        ("epoch", 10**30),
    ],
)
def test_a_wrong_field_of_a_run_is_named_with_its_file(tmp_path: Path, key: str, value: object) -> None:
    data = json.loads(json.dumps(runs_report([run("plain")])))
    target = data["runs"][0] if key in data["runs"][0] else data["runs"][0]["epochs"][0]
    target[key] = value
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=rf"report.json is damaged: the field .*{key}"):
        read_run(tmp_path / "report.json")


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"runs": 3, "format": "bn-insert runs"}', '{"a":' * 900 + "1" + "}" * 900]
)
def test_a_deep_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"report.json is not"):
        read_run(tmp_path / "report.json")


def test_a_layer_without_varying_channels_has_a_page_too() -> None:
    data = insertion()
    norm = next(layer["batchnorm"] for layer in data["layers"] if "batchnorm" in layer)
    norm |= {"std": [0.0] * norm["channels"], "mean": [0.0] * norm["channels"], "standard_error": None}
    assert Page(page(data)).charts == 6


@pytest.mark.usefixtures("no_charts")
def test_settings_of_a_run_are_those_of_the_run() -> None:
    settings = TrainingSettings(dropout=0.25, amp=True)
    text = Page(page(run_report("a", asdict(settings), [], {"batchnorms": 3}))).text
    assert "dropout 0.25" in text
    assert "head kept" in text
    unknown = Page(page(run_report("a", {"dropout": None, "patience": None}, [], {"batchnorms": 3}))).text
    assert "dropout as in the checkpoint" in unknown
    assert "patience none" in unknown
    assert "amp yes" in text
