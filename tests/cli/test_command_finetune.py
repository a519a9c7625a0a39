"""`bn-insert finetune`, as a user types it."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bn_insert import StepMetrics
from bn_insert.checkpoints.load_network import load_checkpoint
from bn_insert.demo import network_path
from bn_insert.report import SMALL_DIFFERENCE, read_run
from bn_insert.training import lr_trials
from bn_insert.training.state import load_state
from bn_insert_cli import console
from bn_insert_cli.finetune_display import FinetuneDisplay
from bn_insert_cli.interruption import StopRequest, signals, stop_on_signals
from support.charts import leave_out_charts
from support.commands import AS_STORED, Run, assert_refused, forked_ranks, start_forked, text_of
from support.digits import copy_labelled_digits

pytestmark = pytest.mark.usefixtures("one_thread")

BRIEF = (*AS_STORED, "--device", "cpu", "-b", "8", "--lr", "0.003")
FILES = {"metrics.csv", "curves.png", "best.pth", "last.pth", "classes.txt", "state.pth"}
FILES |= {"report.html", "report.json"}
HEADER = "epoch,step,lr,train_loss,train_accuracy,val_loss,val_accuracy,seconds"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_labelled_digits(tmp_path_factory.mktemp("digits"))


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = load_checkpoint(a).state_dict(), load_checkpoint(b).state_dict()
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_insert_finetune_fold_compare(run: Run, digits: Path) -> None:
    inserted = run("insert", network_path(), digits / "train", "-o", "bn.pth", "--equalize", *AS_STORED)
    assert inserted.exit_code == 0, inserted.output
    assert "Dropout before BatchNorm: classifier.3 (classifier.2 in network.pth)." in inserted.stderr
    # Preprocessing comes from the checkpoint.
    trained = run("finetune", "bn.pth", digits, "--output-dir", "run", "--epochs", 2, "-b", 8, "-j", 0)
    assert trained.exit_code == 0, trained.output
    assert {path.name for path in Path("run").iterdir()} == FILES
    assert len(re.findall(r"^epoch [12] of 2: lr .* accuracy .*%; .* s$", trained.stdout, re.MULTILINE)) == 2
    assert "Wrote run: best validation accuracy" in trained.stdout
    shown = text_of(trained.stderr)
    assert "40 for training and 20 for validation, 10 classes" in shown
    assert "none (switched off: 0.5 (classifier.3), 0.5 (classifier.7))" in shown
    assert "classifier.8, with 10 classes as in the checkpoint" in shown
    assert "Estimated time left: " in trained.stderr
    assert "Next: bn-insert evaluate run/best.pth DATA, with class folders of images that were not" in trained.stderr
    assert "To remove its BatchNorm: bn-insert fold run/best.pth -o OUTPUT." in trained.stderr
    told = json.loads(Path("run/report.json").read_text())["runs"][0]
    assert (told["name"], told["batchnorms"], told["checkpoint"]["path"]) == ("run", 8, "bn.pth")
    with Path("run/metrics.csv").open() as file:
        assert [float(row["val_loss"]) for row in csv.DictReader(file)] == [each["val_loss"] for each in told["epochs"]]
    evaluated = json.loads(run("evaluate", "run/last.pth", digits, "--json").stdout)
    assert (evaluated["folder"], evaluated["classes_stored"]) == (str(digits / "val"), True)
    assert evaluated["accuracy"] == told["epochs"][-1]["val_accuracy"]
    assert evaluated["loss"] == pytest.approx(told["epochs"][-1]["val_loss"], rel=1e-4)
    assert Path("run/report.html").read_text().count("<figure") == 3
    folded = run("fold", "run/best.pth", "-o", "plain.pth")
    assert folded.exit_code == 0, folded.output
    assert load_checkpoint("plain.pth").state_dict().keys() == load_checkpoint(network_path()).state_dict().keys()
    compared = run("compare", "run/best.pth", "plain.pth", digits / "val", "--rtol", "1e-5", *AS_STORED)
    assert compared.exit_code == 0, compared.output
    assert "100.00%" in compared.stdout


@pytest.mark.usefixtures("no_charts")
def test_options_that_change_the_normalization_of_a_batchnorm_are_warned_of(run: Run, digits: Path) -> None:
    run("insert", network_path(), digits, "-o", "bn.pth", "-q")
    options = (digits, "--epochs", 1, "--lr", 1e-4, *BRIEF, "-q", "--force", "-o", "run")
    warning = "warning: the BatchNorm statistics in bn.pth were measured with mean 0, std 1; with other values, the"
    assert warning in text_of(run("finetune", "bn.pth", *options, "--mean", 0.5).stderr)
    assert "were measured" not in run("finetune", "bn.pth", *options, "--mean", 0).stderr
    assert "were measured" not in run("finetune", network_path(), *options, "--mean", 0.5).stderr


@pytest.mark.usefixtures("no_charts")
def test_a_class_without_validation_images_is_warned_of(run: Run, tmp_path: Path) -> None:
    data = copy_labelled_digits(tmp_path / "digits")
    shutil.rmtree(data / "val" / "3")
    trained = run("finetune", network_path(), data, "-o", "run", "--epochs", 1, "-j", 0, *BRIEF)
    assert trained.exit_code == 0, trained.output
    assert "warning: No validation images of 3: the validation accuracy says nothing about this class." in text_of(
        trained.stderr
    )


@pytest.mark.usefixtures("no_charts")
def test_sigterm_in_mid_epoch_then_resume_loses_nothing(run: Run, digits: Path) -> None:
    command = ("finetune", network_path(), digits, "--epochs", 3, *BRIEF, "-b", 2, "--output-dir")
    uninterrupted = run(*command, "whole")
    assert uninterrupted.exit_code == 0, uninterrupted.output
    process = start_forked("-m", "bn_insert", *command, "parts", folder=Path.cwd())
    assert process.stdout.readline().startswith("epoch 1 of 3")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "the same command with --resume" in text_of(errors)
    state = load_state(Path("parts/state.pth"))
    assert 1 <= state.progress.epoch < 3
    assert state.progress.step > 0
    assert len(Path("parts/metrics.csv").read_text().splitlines()) == 1 + state.progress.epoch
    resumed = run(*command, "parts", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "epoch 3 of 3" in resumed.stdout
    assert_same_weights(Path("whole/last.pth"), Path("parts/last.pth"))
    assert_same_weights(Path("whole/best.pth"), Path("parts/best.pth"))


def test_two_processes_write_the_same_files_and_finish(run: Run, digits: Path) -> None:
    run("insert", network_path(), digits / "train", "-o", "bn.pth", *AS_STORED)
    # Of the 20 images of each process a last batch would hold a single one.
    command = ("finetune", "bn.pth", digits, "--output-dir", "run", "--epochs", 2, *BRIEF, "-b", 19)
    result = forked_ranks(2, "-m", "bn_insert", *command, folder=Path.cwd())
    assert result.returncode == 0, result.stderr
    assert len(re.findall("^epoch . of 2", result.stdout, re.MULTILINE)) == 2
    assert {path.name for path in Path("run").iterdir()} == FILES
    lines = Path("run/metrics.csv").read_text().splitlines()
    assert lines[0] == HEADER
    assert [(row["epoch"], row["step"]) for row in csv.DictReader(lines)] == [("1", "1"), ("2", "2")]
    # All 20 validation images count once, whoever saw them.
    assert all((float(row["val_accuracy"]) * 20).is_integer() for row in csv.DictReader(lines))
    assert len(load_state(Path("run/state.pth")).random) == 2
    assert load_checkpoint("run/best.pth").state_dict().keys() == load_checkpoint("bn.pth").state_dict().keys()


@pytest.mark.usefixtures("no_charts")
def test_trials_and_the_learning_rate_that_they_choose_are_printed(
    run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lr_trials, "TRIAL_STEPS", 2)
    monkeypatch.setattr(lr_trials, "STEPS_BEFORE_ESTIMATE", 2)
    command = ("finetune", network_path(), digits, *AS_STORED, "--device", "cpu", "--output-dir")
    result = run(*command, "run", "--epochs", 1, "-b", 20)
    assert result.exit_code == 0, result.output
    assert "Learning rate: to be chosen in short trials (--lr sets it)." in text_of(result.stderr)
    trials = re.findall(r"^Trial with learning rate (\S+): loss .* after 2 steps\.$", result.stderr, re.M)
    assert len(trials) >= 3
    chosen = load_state(Path("run/state.pth")).settings["lr"]
    assert chosen in map(float, trials)
    reason = rf"( \({SMALL_DIFFERENCE}\))?"
    assert re.search(rf"^Learning rate: {chosen:g}{reason}\.$", result.stderr, re.MULTILINE)
    assert len(re.findall(r"^Estimated time left: .*, trials included\.$", result.stderr, re.M)) == 1
    assert result.stderr.index("Estimated time left: ") > result.stderr.index("Output layer kept: validation accuracy ")
    short = run(*command, "short", "--epochs", 1, "-b", 40)
    assert re.findall(r"(?:Trial|Learning rate).*", short.stderr) == [
        "Learning rate: 0.0003 (the run is too short for trials; --lr sets it)."
    ]
    needed = {name: read_run(Path(name, "report.json"))["data"].get("epochs_for_trials") for name in ("run", "short")}
    assert needed == {"run": None, "short": 2}


@pytest.mark.usefixtures("no_charts")
def test_a_run_is_resumed_with_its_own_epochs_unless_others_are_given(run: Run, digits: Path) -> None:
    command = ("finetune", network_path(), digits, *AS_STORED, "--device", "cpu", "--output-dir", "run", "-b", 40)
    assert run(*command, "--epochs", 1).exit_code == 0
    resumed = run(*command, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "Steps: 1 (1 epoch of 1)." in resumed.stderr
    assert "run was already complete: best validation accuracy" in resumed.stdout
    assert len(Path("run/metrics.csv").read_text().splitlines()) == 2
    assert "Steps: 2 (2 epochs of 1)." in run(*command, "--resume", "--epochs", 2).stderr
    assert "Steps: 10 (10 epochs of 1)." in run(*command[:-3], "new", "-b", 40, "--resume", "--lr", 1e-9).stderr


@pytest.mark.usefixtures("no_charts")
def test_a_run_is_resumed_with_a_warm_up_that_is_longer_than_the_default_number_of_epochs(
    run: Run, digits: Path
) -> None:
    command = ("finetune", network_path(), digits, *AS_STORED, "--device", "cpu", "--output-dir", "run", "-b", 40)
    command += ("--lr", 1e-9, "--lr-warmup-epochs")
    assert run(*command, 11, "--epochs", 12).exit_code == 0
    resumed = run(*command, 11, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "Steps: 12 (12 epochs of 1)." in resumed.stderr
    assert_refused(run(*command, 13, "--resume"), "--lr-warmup-epochs was 11.0 and is now 13.0")


def test_a_loss_that_is_nan_ends_with_what_to_try(run: Run, digits: Path) -> None:
    result = run("finetune", network_path(), digits, "--output-dir", "run", *BRIEF, "--lr", "1e6")
    assert_refused(result, "--lr-warmup-epochs", "bn-insert insert", "nothing was written", code=1)


@pytest.mark.parametrize(
    ("arguments", "wording"),
    [
        (("nowhere",), "nowhere does not exist; the layout is train/CLASS/IMAGE and val/CLASS/IMAGE"),
        (("DIGITS", "--lr", "-1"), "lr is -1.0; use a finite learning rate above 0"),
        (("DIGITS", "--lr-warmup-epochs", "99"), "--lr-warmup-epochs is 99.0"),
        (("DIGITS", "--sync-bn"), "--sync-bn works on GPUs only; leave it out, or use it with --batchnorm renorm"),
        (
            ("DIGITS", "--renorm-r-max", "2"),
            "--renorm-r-max is a limit of Batch Renormalization; leave it out, or use it",
        ),
        (("DIGITS", "--opt", "lion"), "Invalid value for '--opt'"),
        (("DIGITS", "--head", "wide"), "'wide' is neither keep nor a width, such as 512"),
        (("DIGITS", "--train", "batchnorm"), "has no BatchNorm to train; insert it first (bn-insert insert)"),
        (
            ("DIGITS", "--batchnorm", "renorm"),
            "has no BatchNorm for --batchnorm renorm; insert it first (bn-insert insert)",
        ),
        (("DIGITS", "--crop-scale", "0"), "--crop-scale is 0.0; use a fraction of the area"),
        (("DIGITS/train",), "train has no folder train/ (did you mean DIGITS?)"),
    ],
)
def test_what_cannot_be_trained_is_one_message(
    run: Run, digits: Path, arguments: tuple[str, ...], wording: str
) -> None:
    given = [argument.replace("DIGITS", str(digits)) for argument in arguments]
    result = run("finetune", network_path(), *given, "--output-dir", "run", *AS_STORED, "--device", "cpu")
    assert_refused(result)
    assert wording.replace("DIGITS", str(digits)) in text_of(result.stderr)
    assert not Path("run").exists()


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize("batch_size", [1, 10])
def test_unreadable_images_are_not_counted_in_the_end_and_refused_with_strict(
    run: Run, tmp_path: Path, batch_size: int
) -> None:
    data = copy_labelled_digits(tmp_path / "digits")
    for part in ("train", "val"):
        next((data / part / "3").glob("*.png")).write_bytes(b"no image")
    command = ("finetune", network_path(), data, "--epochs", 1, *BRIEF, "--batch-size", batch_size)
    trained = run(*command, "-o", "run")
    assert trained.exit_code == 0, trained.output
    assert "Skipped 2 unreadable files: " in text_of(trained.stderr)
    assert "Images without them: 39 for training and 19 for validation." in text_of(trained.stderr)
    assert "No training image" not in trained.stderr
    overview = read_run(Path("run/report.json"))["overview"]
    assert overview["Images"] == "39 for training and 19 for validation, 10 classes; 2 unreadable files skipped"
    assert_refused(run(*command, "-o", "strict", "--strict"), "error: cannot read", "leave out --strict")


@pytest.mark.usefixtures("no_charts")
def test_classes_without_a_training_image_that_can_be_read_are_named(run: Run, tmp_path: Path) -> None:
    data = copy_labelled_digits(tmp_path / "digits")
    for path in (data / "train" / "3").glob("*.png"):
        path.write_bytes(b"")
    command = ("finetune", network_path(), data, "--epochs", 1, *BRIEF)
    stderr = text_of(run(*command, "-o", "run").stderr)
    assert "Skipped 4 unreadable files: " in stderr and stderr.count("the file is empty; ") == 3
    assert "No training image of 3 can be read, so the network was not trained on this class." in stderr
    for path in (data / "train" / "7").glob("*.png"):
        path.write_bytes(b"")
    stderr = text_of(run(*command, "-o", "again").stderr)
    assert "the file is empty; and 3 more" in stderr
    assert "No training image of 3, 7 can be read, so the network was not trained on these classes." in stderr


@pytest.mark.usefixtures("no_charts")
def test_unreadable_validation_images_count_neither_in_verdicts_nor_for_their_class(run: Run, tmp_path: Path) -> None:
    data = copy_labelled_digits(tmp_path / "digits", train=1, val=2, classes=3)
    for name in "12":
        for path in list((data / "val" / name).glob("*.png"))[int(name) - 1 :]:
            path.write_bytes(b"no image")
    command = ("finetune", network_path(), data, "--epochs", 1, *BRIEF, "--no-fit-output", "-o", "run")
    trained = run(*command)
    assert trained.exit_code == 0, trained.output
    warning = "No validation image of 1 can be read: the validation accuracy says nothing about this class."
    assert warning in text_of(trained.stderr)
    found = read_run(Path("run/report.json"))
    assert found["data"]["largest_class"] == pytest.approx(2 / 3)
    assert (found["data"]["validation_images"], found["data"]["skipped_files"]) == (3, 3)
    assert (found["epochs"][0]["val_accuracy"] > 2 / 3) != ("the share of the largest class" in text_of(trained.stderr))
    assert run(*command, "--resume").exit_code == 0
    assert read_run(Path("run/report.json")) == found


def test_resuming_a_complete_run_writes_its_results_again_but_cannot_restore_the_best_network(
    run: Run, digits: Path
) -> None:
    command = ("finetune", network_path(), digits, "-o", "run", "--epochs", 2, *BRIEF, "--lr", 1)
    assert "bn-insert evaluate run/best.pth" not in run(*command).stderr, "an epoch after the best, which is the first"
    before = read_run(Path("run/report.json"))
    Path("run/report.json").write_text("damaged")
    advice = "run finetune again, with --resume to rewrite the reports"
    assert_refused(run("report", "run", "-o", "page.html"), advice)
    metrics = Path("run/metrics.csv").read_text()
    for name in FILES - {"state.pth"}:
        Path("run", name).unlink()
    assert_refused(run("report", "run", "-o", "page.html"), advice)
    again = run(*command, "--resume", "--epochs", 1)
    assert again.exit_code == 0, again.output
    assert {path.name for path in Path("run").iterdir()} == FILES - {"best.pth"}
    assert read_run(Path("run/report.json")) == before
    assert Path("run/metrics.csv").read_text() == metrics
    stderr = text_of(again.stderr)
    assert "run/best.pth is missing, and state.pth has only the network after the last epoch" in stderr
    assert "Next: " not in stderr


def test_an_empty_output_directory_is_not_the_current_folder(run: Run, digits: Path) -> None:
    before = sorted(Path().iterdir())
    refused = run("finetune", network_path(), digits, "-o", "", *BRIEF)
    assert_refused(refused, "the path is empty; pass a folder, or . for the current one")
    assert sorted(Path().iterdir()) == before


@pytest.mark.usefixtures("no_charts")
def test_a_run_that_stopped_early_says_so_and_why(run: Run, digits: Path) -> None:
    command = ("finetune", network_path(), digits, "-o", "run", *BRIEF, "--lr", 1e-30, "--no-fit-output")
    trained = run(*command, "--epochs", 9, "--patience", 1)
    text = "after 2 of 9 epochs: 1 epoch without a higher validation accuracy than in epoch 1 (--patience 1)."
    assert f"Stopped early, {text}" in text_of(trained.stderr)
    assert f"Stopped early, {text}" in [verdict["text"] for verdict in read_run(Path("run/report.json"))["health"]]


@pytest.mark.usefixtures("no_charts")
def test_resuming_is_offered_where_there_is_a_state_to_resume_from(run: Run, digits: Path) -> None:
    Path("run").mkdir()
    Path("run/last.pth").write_bytes(b"")
    refused = run("finetune", network_path(), digits, "-o", "run", *BRIEF)
    assert_refused(refused, "run already contains results (last.pth): replace them with --force, or choose another")
    Path("run/state.pth").write_bytes(b"")
    assert_refused(run("finetune", network_path(), digits, "-o", "run", *BRIEF), "continue with --resume, replace")


def test_images_that_are_too_small_for_the_network_are_one_message(run: Run, digits: Path) -> None:
    result = run("finetune", network_path(), digits, "-o", "run", *BRIEF, "--crop", 8, "--resize", 8)
    assert_refused(
        result,
        "error: images of 8 x 8 pixels are too small for VGG (Given input size: (64x1x1). Calculated output size: "
        "(64x0x0). Output size is too small); use larger ones (--resize, --crop)",
    )
    assert "Images: " not in result.stderr  # said at once


@pytest.mark.usefixtures("no_charts")
def test_results_are_kept_unless_force_is_given_and_options_reach_the_run(run: Run, digits: Path) -> None:
    command = ("finetune", network_path(), digits, "--output-dir", "run", "--epochs", 1, *BRIEF, "-b", 20)
    assert run(*command).exit_code == 0
    assert_refused(run(*command), "run already contains results", "--resume", "--force")
    assert_refused(run(*command, "--force", "--resume"), "--resume continues", "--force replaces", "leave out one")
    options: tuple[object, ...] = ("--patience", 3, "--accumulate", 2, "--crop-scale", 0.5, "--train", "head")
    options = (
        *options,
        "--opt",
        "adamw",
        "--weight-decay",
        0.1,
        "--dropout",
        0.25,
        "--no-recalibrate",
        "--batchnorm",
        "freeze",
    )
    result = run(*command, "--force", *options, "--lr-scheduler", "step", "--label-smoothing", 0.1, "--seed", 3)
    assert result.exit_code == 0, result.output
    unused = ("--patience 3 has no effect: the run has 1 epoch.", "before its first step (--lr-step-size 30).")
    assert all(text in text_of(result.stderr) for text in unused)
    settings = load_state(Path("run/state.pth")).settings
    assert (settings["opt"], settings["weight_decay"], settings["dropout"]) == ("adamw", 0.1, 0.25)
    assert (settings["recalibrate"], settings["batchnorm"], settings["seed"]) == (False, "freeze", 3)
    assert (settings["lr_scheduler"], settings["label_smoothing"]) == ("step", 0.1)
    assert [settings[name] for name in ("patience", "accumulate", "crop_scale", "train")] == [3, 2, 0.5, "head"]


def test_the_first_signal_asks_to_stop_and_the_second_stops_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)  # the process that ends is the one that runs the tests
    monkeypatch.setattr(signals, "number", None)
    before = signal.getsignal(signal.SIGINT)
    for second in (signal.SIGINT, signal.SIGTERM):
        heard: list[int] = []
        with stop_on_signals(heard.append) as stop:
            assert not stop()
            signal.raise_signal(signal.SIGINT)
            assert stop()
            assert heard == [signal.SIGINT]
            assert stop.signal_number == signal.SIGINT
            with pytest.raises(SystemExit) as ended:
                signal.raise_signal(second)
            assert ended.value.code == 128 + second
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("number", "again"), [(signal.SIGINT, "press Ctrl-C again"), (signal.SIGTERM, "send the signal again")]
)
def test_the_first_signal_is_acknowledged(capfd: pytest.CaptureFixture[str], number: int, again: str) -> None:
    display = FinetuneDisplay(40, 8)
    display.stopping(number)
    assert capfd.readouterr().err == f"Stopping after the current step; {again} to stop immediately.\n"
    console.set_quiet(True)
    try:
        display.stopping(number)
    finally:
        console.set_quiet(False)
    assert capfd.readouterr().err == ""


def test_the_bar_of_an_epoch_says_about_how_long_the_run_still_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    @contextmanager
    def bar(_total: int) -> Iterator[Callable[[str, int], None]]:
        yield lambda text, _done: shown.append(text)

    monkeypatch.setattr("bn_insert_cli.finetune_display.run_progress", bar)
    with FinetuneDisplay(40, 8) as display:
        display.step(StepMetrics(1, 1, 5, 2.3))
        display.step(StepMetrics(1, 2, 5, 2.3, seconds_left=0.4))
    assert shown == ["epoch 1 of 0", "epoch 1 of 0, about 1 s left"]


def test_a_child_process_takes_no_notice_of_signals_that_are_the_parent_s() -> None:
    stop = StopRequest()
    stop._process = -1
    stop.receive(signal.SIGTERM, None)
    assert not stop()


@pytest.mark.usefixtures("no_charts")
def test_report_warns_of_runs_that_were_validated_on_different_images(run: Run, tmp_path: Path) -> None:
    data = copy_labelled_digits(tmp_path / "digits", train=2, val=2)
    for name in ("one", "other"):
        trained = run("finetune", network_path(), data, "-o", name, "--epochs", 1, *BRIEF, "--lr", 0.003)
        assert trained.exit_code == 0, trained.output
        image = next((data / "val" / "3").iterdir())
        image.rename(image.with_name("another.png"))
    result = run("report", "one", "other", "-o", "both.html")
    assert result.exit_code == 0, result.output
    assert "warning: These runs were validated on different images: their accuracies cannot be compared." in text_of(
        result.stderr
    )


def test_report_holds_runs_together(run: Run, digits: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        leave_out_charts(patch)
        for name, rate in (("plain", "0.003"), ("higher <b>", "0.01")):
            command = ("finetune", network_path(), digits, "--output-dir", name, "--epochs", 1, *BRIEF, "--lr", rate)
            trained = run(*command, "-b", 20)
            assert trained.exit_code == 0, trained.output
    result = run("report", "plain", "higher <b>", "-o", "both.html")
    assert result.exit_code == 0, result.output
    assert "Wrote both.html: 2 runs." in result.stdout
    assert "different images" not in result.stderr
    text = Path("both.html").read_text()
    assert text.count("<figure") == 5
    assert "higher &lt;b&gt;" in text
    assert "higher <b>" not in text
    run("report", "plain", "higher <b>", "-o", "both.json")
    assert [each["name"] for each in json.loads(Path("both.json").read_text())["runs"]] == ["plain", "higher <b>"]
    assert_refused(run("report", "plain", "-o", "both.html"), "both.html already exists", "--force")
    assert_refused(run("report", "plain", "none", "-o", "x.html"), "error: none does not exist", "output directory")
    assert_refused(run("report", "plain", "./plain/", "-o", "x.html"), "a run is named twice; name each once")
    assert_refused(
        run("report", Path.cwd(), "-o", "x.html"), f"{Path.cwd()} contains 2 runs; pass {Path.cwd()}/* to compare"
    )
    assert_refused(run("report", "plain", "-o", "x.txt"), "ends in .html or .json")
    assert not Path("x.html").exists()
