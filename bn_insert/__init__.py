"""Insert BatchNorm into a pretrained network without changing its outputs.

The public names, grouped by purpose. `bn_insert.images` reads images, `bn_insert.report` writes reports, and
`bn_insert.demo` contains the network that ships with the package.

Names are imported on first use, and torch with them: Python imports this package before it runs `__main__.py`, which
handles signals and errors such as too little memory for torch.
"""
# ruff: noqa: I001 - grouped, everyday names first; `as` marks what is public for type checkers

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Load, insert, check, save
    from .checkpoints.load_network import build_network as build_network, load_checkpoint as load_checkpoint
    from .checkpoints.read_file import Checkpoint as Checkpoint, read_checkpoint as read_checkpoint
    from .checkpoints.settings import Settings as Settings
    from .checkpoints.save import check_output as check_output, save_checkpoint as save_checkpoint
    from .checkpoints.torchvision_weights import torchvision_checkpoint as torchvision_checkpoint
    from .checkpoints.vgg_assumptions import vgg_assumptions as vgg_assumptions
    from .compare.outputs import (
        Comparison as Comparison,
        compare_outputs as compare_outputs,
        finite_part as finite_part,
    )
    from .surgery.insert import Insertion as Insertion, insert as insert, insert_batchnorm as insert_batchnorm

    # Adapt to new images
    from .compare.predictions import (
        ClassAccuracy as ClassAccuracy,
        PredictionComparison as PredictionComparison,
        compare_predictions as compare_predictions,
    )
    from .surgery.adapt import (
        Adaptation as Adaptation,
        StatisticsShift as StatisticsShift,
        adapt as adapt,
        adapt_statistics as adapt_statistics,
    )

    # Evaluate a classifier
    from .compare.evaluation import (
        Evaluation as Evaluation,
        Prediction as Prediction,
        evaluate as evaluate,
        predict as predict,
    )

    # In a training script
    from .batchnorm.dropout_before_batchnorm import dropouts_before_batchnorm as dropouts_before_batchnorm
    from .batchnorm.modes import freeze_batchnorm as freeze_batchnorm, set_batchnorm_mode as set_batchnorm_mode
    from .batchnorm.batch_renorm import (
        BatchRenorm1d as BatchRenorm1d,
        BatchRenorm2d as BatchRenorm2d,
        BatchRenorm3d as BatchRenorm3d,
    )
    from .batchnorm.renorm_limits import RenormScheduler as RenormScheduler
    from .compare.train_mode import (
        TrainModeAgreement as TrainModeAgreement,
        agreement_reading as agreement_reading,
        smallest_agreeing as smallest_agreeing,
        train_mode_agreement as train_mode_agreement,
    )
    from .statistics.recalibrate import recalibrate as recalibrate
    from .surgery.replace_output import replace_head as replace_head, replace_output as replace_output
    from .training.output_fit import fit_output as fit_output
    from .training.parameter_groups import parameter_groups as parameter_groups

    # Fine-tune on class folders
    from .training.finetune import (
        FineTuning as FineTuning,
        check_output_dir as check_output_dir,
        finetune as finetune,
    )
    from .training.metrics import (
        EpochMetrics as EpochMetrics,
        LearningRateTrial as LearningRateTrial,
        OutputFit as OutputFit,
        StepMetrics as StepMetrics,
    )
    from .training.settings import TrainingSettings as TrainingSettings
    from .training.summary import RunSummary as RunSummary

    # Fold
    from .surgery.fold import FoldResult as FoldResult, fold as fold, fold_batchnorm as fold_batchnorm
    from .surgery.splice import inserted_batchnorms as inserted_batchnorms

    # Insert step by step
    from .graph.inputs import ForwardInputs as ForwardInputs, forward_inputs as forward_inputs
    from .batchnorm.identity_parameters import identity_batchnorm as identity_batchnorm
    from .graph.sites import Layer as Layer, Site as Site, find_sites as find_sites, survey as survey
    from .statistics.calibrate import calibrate as calibrate
    from .statistics.moments import Moments as Moments
    from .surgery.equalize import Edge as Edge, equalize as equalize, find_edges as find_edges
    from .surgery.insert import insert_at as insert_at

    # Several processes
    from .support.processes import Ranks as Ranks, process_group as process_group

    # Errors
    from .errors import (
        BNInsertError as BNInsertError,
        CalibrationError as CalibrationError,
        CheckpointError as CheckpointError,
        DivergenceError as DivergenceError,
        GraphError as GraphError,
        ImageError as ImageError,
        TrainingError as TrainingError,
    )

_MODULES = {
    # Load, insert, check, save
    "check_output": "checkpoints.save",
    "read_checkpoint": "checkpoints.read_file",
    "Checkpoint": "checkpoints.read_file",
    "Settings": "checkpoints.settings",
    "build_network": "checkpoints.load_network",
    "load_checkpoint": "checkpoints.load_network",
    "save_checkpoint": "checkpoints.save",
    "torchvision_checkpoint": "checkpoints.torchvision_weights",
    "vgg_assumptions": "checkpoints.vgg_assumptions",
    "insert_batchnorm": "surgery.insert",
    "insert": "surgery.insert",
    "Insertion": "surgery.insert",
    "compare_outputs": "compare.outputs",
    "Comparison": "compare.outputs",
    "finite_part": "compare.outputs",
    # Adapt to new images
    "adapt_statistics": "surgery.adapt",
    "adapt": "surgery.adapt",
    "Adaptation": "surgery.adapt",
    "StatisticsShift": "surgery.adapt",
    "compare_predictions": "compare.predictions",
    "PredictionComparison": "compare.predictions",
    "ClassAccuracy": "compare.predictions",
    # Evaluate a classifier
    "evaluate": "compare.evaluation",
    "Evaluation": "compare.evaluation",
    "predict": "compare.evaluation",
    "Prediction": "compare.evaluation",
    # In a training script
    "replace_output": "surgery.replace_output",
    "replace_head": "surgery.replace_output",
    "fit_output": "training.output_fit",
    "parameter_groups": "training.parameter_groups",
    "dropouts_before_batchnorm": "batchnorm.dropout_before_batchnorm",
    "set_batchnorm_mode": "batchnorm.modes",
    "freeze_batchnorm": "batchnorm.modes",
    "BatchRenorm1d": "batchnorm.batch_renorm",
    "BatchRenorm2d": "batchnorm.batch_renorm",
    "BatchRenorm3d": "batchnorm.batch_renorm",
    "RenormScheduler": "batchnorm.renorm_limits",
    "recalibrate": "statistics.recalibrate",
    "train_mode_agreement": "compare.train_mode",
    "TrainModeAgreement": "compare.train_mode",
    "smallest_agreeing": "compare.train_mode",
    "agreement_reading": "compare.train_mode",
    # Fine-tune on class folders
    "check_output_dir": "training.finetune",
    "finetune": "training.finetune",
    "TrainingSettings": "training.settings",
    "FineTuning": "training.finetune",
    "RunSummary": "training.summary",
    "StepMetrics": "training.metrics",
    "LearningRateTrial": "training.metrics",
    "OutputFit": "training.metrics",
    "EpochMetrics": "training.metrics",
    # Fold
    "fold_batchnorm": "surgery.fold",
    "fold": "surgery.fold",
    "FoldResult": "surgery.fold",
    "inserted_batchnorms": "surgery.splice",
    # Insert step by step
    "forward_inputs": "graph.inputs",
    "ForwardInputs": "graph.inputs",
    "find_sites": "graph.sites",
    "survey": "graph.sites",
    "Site": "graph.sites",
    "Layer": "graph.sites",
    "calibrate": "statistics.calibrate",
    "Moments": "statistics.moments",
    "identity_batchnorm": "batchnorm.identity_parameters",
    "find_edges": "surgery.equalize",
    "Edge": "surgery.equalize",
    "equalize": "surgery.equalize",
    "insert_at": "surgery.insert",
    # Several processes
    "Ranks": "support.processes",
    "process_group": "support.processes",
    # Errors
    "BNInsertError": "errors",
    "CalibrationError": "errors",
    "CheckpointError": "errors",
    "DivergenceError": "errors",
    "GraphError": "errors",
    "ImageError": "errors",
    "TrainingError": "errors",
}
"""The public names with the modules that define them."""

__all__ = [*_MODULES]  # noqa: PLE0604 - they are strings

_PACKAGES = ("demo", "errors", "images", "report")


def __getattr__(name: str) -> Any:
    """Import a public name, or one of the packages named above, on first use."""
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return only the public names, for completion in an interactive session."""
    return sorted(__all__)
