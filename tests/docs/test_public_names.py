"""The public names: what has been there stays, with the parameters that callers pass, and all of it is documented."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest

import bn_insert

API = Path(__file__).parents[2] / "docs" / "api.md"

REQUIRED = inspect.Parameter.empty
SITE_OPTIONS = {
    "layers": ("conv", "dense"),
    "include_output": False,
    "skip": (),
    "placement": "before_activation",
}
INSERT_OPTIONS = {
    **SITE_OPTIONS,
    "equalize": False,
    "eps": 1e-5,
    "momentum": 0.1,
    "dropout_before_batchnorm": True,
    "device": None,
    "autocast": None,
    "tolerance": None,
    "progress": None,
}
ADAPT_OPTIONS = {
    **{name: value for name, value in INSERT_OPTIONS.items() if name not in ("equalize", "dropout_before_batchnorm")},
    "keep_batchnorm": False,
    "shrink": True,
}

# Of each function: names and defaults of its positional parameters and of its keyword-only ones.
FUNCTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "calibrate": (
        {"model": REQUIRED, "sites": REQUIRED, "batches": REQUIRED},
        {"device": None, "autocast": None, "tolerance": None, "progress": None},
    ),
    "compare_outputs": ({"reference": REQUIRED, "candidate": REQUIRED, "batches": REQUIRED}, {"progress": None}),
    "equalize": ({"model": REQUIRED, "edges": REQUIRED, "moments": REQUIRED}, {}),
    "find_edges": ({"model": REQUIRED, "example": REQUIRED, "sites": REQUIRED}, {}),
    "find_sites": ({"model": REQUIRED, "example": REQUIRED}, SITE_OPTIONS),
    "fold_batchnorm": ({"model": REQUIRED, "example": REQUIRED}, {}),
    "forward_inputs": ({"model": REQUIRED}, {}),
    "freeze_batchnorm": ({"model": REQUIRED, "mode": REQUIRED}, {}),
    "insert_at": (
        {"model": REQUIRED, "sites": REQUIRED, "moments": REQUIRED},
        {"edges": (), "eps": 1e-5, "momentum": 0.1},
    ),
    "insert_batchnorm": ({"model": REQUIRED, "batches": REQUIRED}, INSERT_OPTIONS),
    "load_checkpoint": (
        {"path": REQUIRED},
        {"model": None, "mmap": False, "key": None, "ignore_unexpected": False},
    ),
    "parameter_groups": ({"model": REQUIRED, "weight_decay": REQUIRED, "norm_weight_decay": 0.0}, {}),
    "recalibrate": (
        {"model": REQUIRED, "batches": REQUIRED},
        {"earlier": "batch", "device": None, "autocast": None, "progress": None},
    ),
    "replace_head": ({"model": REQUIRED, "width": REQUIRED, "classes": REQUIRED}, {}),
    "replace_output": ({"model": REQUIRED, "classes": REQUIRED}, {}),
    "fit_output": (
        {"model": REQUIRED, "train": REQUIRED, "validation": REQUIRED},
        {"autocast": None, "progress": None},
    ),
    "save_checkpoint": (
        {"model": REQUIRED, "path": REQUIRED},
        {"transform": None, "classes": (), "input_shape": (), "overwrite": False},
    ),
    "smallest_agreeing": ({"agreements": REQUIRED, "least": 0.95}, {}),
    "survey": ({"model": REQUIRED, "example": REQUIRED}, SITE_OPTIONS),
    "train_mode_agreement": (
        {"model": REQUIRED, "batches": REQUIRED, "batch_sizes": (4, 8, 16, 32, 64, 128)},
        {"device": None, "progress": None},
    ),
    # Added with one pipeline for the library and the command line.
    "adapt": ({"model": REQUIRED, "source": REQUIRED, "target": REQUIRED}, ADAPT_OPTIONS),
    "adapt_statistics": ({"model": REQUIRED, "source": REQUIRED, "target": REQUIRED}, ADAPT_OPTIONS),
    "agreement_reading": ({"agreements": REQUIRED, "least": 0.95}, {}),
    "dropouts_before_batchnorm": ({"model": REQUIRED, "example": REQUIRED}, {}),
    "compare_predictions": (
        {"original": REQUIRED, "changed": REQUIRED, "batches": REQUIRED},
        {"progress": None},
    ),
    "build_network": ({"checkpoint": REQUIRED, "model": None}, {"ignore_unexpected": False}),
    "check_output": ({"path": REQUIRED}, {"overwrite": False, "inputs": ()}),
    "check_output_dir": ({"output_dir": REQUIRED}, {"resume": False, "overwrite": False, "inputs": ()}),
    "finetune": (
        {"model": REQUIRED, "images": REQUIRED, "output_dir": REQUIRED, "settings": None},
        {
            "resume": False,
            "overwrite": False,
            "device": "cpu",
            "on_start": None,
            "on_step": None,
            "on_epoch": None,
            "stop": None,
            "facts": None,
            "tensorboard": False,
        },
    ),
    "evaluate": (
        {"model": REQUIRED, "batches": REQUIRED},
        {"classes": (), "device": None, "autocast": None, "progress": None},
    ),
    "predict": (
        {"model": REQUIRED, "batches": REQUIRED},
        {"top": 1, "classes": (), "device": None, "autocast": None, "progress": None},
    ),
    "finite_part": ({"model": REQUIRED}, {}),
    "fold": ({"model": REQUIRED, "example": REQUIRED}, {}),
    "inserted_batchnorms": ({"model": REQUIRED}, {}),
    "insert": ({"model": REQUIRED, "batches": REQUIRED}, INSERT_OPTIONS),
    "process_group": ({"device": REQUIRED}, {}),
    "read_checkpoint": ({"path": REQUIRED}, {"mmap": False, "key": None}),
    "set_batchnorm_mode": (
        {"model": REQUIRED, "mode": REQUIRED},
        {"r_max": math.inf, "d_max": math.inf, "synchronize": False},
    ),
    "torchvision_checkpoint": ({"name": REQUIRED}, {"progress": False}),
    "vgg_assumptions": ({"network": REQUIRED}, {}),
}

# `identity_batchnorm` has a dtype as a default, which only torch can write; the layers have the parameters of PyTorch's
# own.
OTHERS = {"identity_batchnorm", "BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d", "RenormScheduler"}

# Of each class of values: its first fields, in their order, and what else callers read or call.
CLASSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Comparison": (("images", "max_abs", "max_rel", "top1_agreement", "bit_identical"), ("within",)),
    "Edge": (("site", "consumers", "reason"), ()),
    "ForwardInputs": (("model", "names", "by_position", "by_name", "takes_dict"), ("several", "named", "ordered")),
    "Layer": (("name", "kind", "type_name", "shape", "parameters", "site", "reason"), ()),
    "Moments": (
        ("count", "mean", "m2", "standard_error"),
        ("channels", "var", "std", "constant_channels", "scaled", "error_of", "cpu"),
    ),
    "Site": (("name", "kind", "anchor", "channels", "dims", "calls", "in_sequence"), ()),
    "TrainModeAgreement": (
        ("batch_size", "images", "top1_agreement", "kl_divergence", "relative_logit_error"),
        (),
    ),
    "Adaptation": (
        ("model", "with_batchnorm", "insertion", "folded", "shifts", "target_images"),
        ("source_images",),
    ),
    "ClassAccuracy": (("label", "images", "before", "after"), ()),
    "PredictionComparison": (
        ("images", "classes", "entropy_before", "entropy_after", "agreement", "per_class"),
        ("labelled", "accuracy_before", "accuracy_after"),
    ),
    "StatisticsShift": (("layer", "mean", "std", "sampling_error"), ("size", "to_dict")),
    "Checkpoint": (("path", "kind", "tensors", "settings", "settings_place", "mapped"), ()),
    "EpochMetrics": (
        ("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds"),
        (),
    ),
    "FineTuning": (("epochs", "best", "interrupted", "health", "lr"), ()),
    "Evaluation": (("images", "accuracy", "loss", "classes", "class_accuracy", "confusion"), ()),
    "Prediction": (("path", "labels", "classes", "probabilities"), ()),
    "FoldResult": (("model", "folded", "left"), ()),
    "Insertion": (
        ("model", "layers", "moments", "norms", "edges", "images", "dropouts_before_batchnorm", "nothing", "fault"),
        ("sites", "layer_statistics"),
    ),
    "Ranks": (("rank", "count"), ("current", "first")),
    "RunSummary": (
        ("classes", "preprocessing", "device", "parameters", "trained_parameters", "batchnorms", "dropout", "output"),
        (),
    ),
    "LearningRateTrial": (("lr", "step", "steps", "loss", "chosen", "seconds_left"), ()),
    "OutputFit": (("seen", "images", "done", "accuracy", "fitted", "new", "own_accuracy", "reason"), ()),
    "StepMetrics": (("epoch", "step", "steps", "loss", "seconds_left"), ()),
    "Settings": (("batchnorm", "dropout", "transform", "history", "classes", "rebuilt_from_keys", "input_shape"), ()),
    "TrainingSettings": (("epochs", "batch_size", "lr", "lr_warmup_epochs", "lr_scheduler"), ()),
}

ERRORS = {
    "BNInsertError": Exception,
    "CalibrationError": bn_insert.BNInsertError,
    "CheckpointError": bn_insert.BNInsertError,
    "DivergenceError": bn_insert.TrainingError,
    "GraphError": bn_insert.BNInsertError,
    "ImageError": bn_insert.BNInsertError,
    "TrainingError": bn_insert.BNInsertError,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_keeps_its_parameters_and_their_defaults(name: str) -> None:
    parameters = inspect.signature(getattr(bn_insert, name)).parameters.values()
    positional = {each.name: each.default for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD}
    keyword_only = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    expected_positional, expected_keywords = FUNCTIONS[name]
    assert list(positional.items())[: len(expected_positional)] == list(expected_positional.items())
    assert expected_keywords.items() <= keyword_only.items()
    # A parameter that is added later needs a default, or calls that ran would fail.
    added = (positional.keys() - expected_positional.keys()) | (keyword_only.keys() - expected_keywords.keys())
    assert all((positional | keyword_only)[parameter] is not REQUIRED for parameter in added)


def test_identity_batchnorm_keeps_its_parameters() -> None:
    parameters = inspect.signature(bn_insert.identity_batchnorm).parameters
    assert list(parameters) == ["moments", "dims", "eps", "momentum", "dtype"]
    defaults = [str(parameter.default) for parameter in parameters.values() if parameter.kind is parameter.KEYWORD_ONLY]
    assert defaults == ["1e-05", "0.1", "torch.float32"]


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_of_values_keeps_its_fields_and_members(name: str) -> None:
    cls, (fields, members) = getattr(bn_insert, name), CLASSES[name]
    assert tuple(field.name for field in dataclasses.fields(cls))[: len(fields)] == fields
    assert all(hasattr(cls, member) for member in members)


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_keeps_its_base_class(name: str) -> None:
    assert getattr(bn_insert, name).__base__ is ERRORS[name]


def test_type_checkers_see_every_public_name_from_the_module_that_it_is_imported_from() -> None:
    tree = ast.parse(Path(bn_insert.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == bn_insert._MODULES


def test_every_public_name_is_listed_here() -> None:
    assert FUNCTIONS.keys() | OTHERS | CLASSES.keys() | ERRORS.keys() == set(bn_insert.__all__)


def test_the_documentation_has_every_public_name_once() -> None:
    documented = re.findall(r"^::: bn_insert\.(\w+)$", API.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(documented) == sorted(bn_insert.__all__)
