"""The public names of `bn_insert`, grouped by what they are for."""
# ruff: noqa: I001, RUF022 - grouped, everyday names first

# Load, insert, check, save
from .checkpoints.load import build_network, load_checkpoint
from .checkpoints.read import Checkpoint, read_checkpoint
from .checkpoints.settings import Settings
from .checkpoints.save import check_output, save_checkpoint
from .checkpoints.torchvision_weights import torchvision_checkpoint
from .checkpoints.assumptions import vgg_assumptions
from .compare.outputs import Comparison, compare_outputs, finite_part
from .surgery.insert import Insertion, insert, insert_batchnorm

# Adapt to new images
from .compare.predictions import ClassAccuracy, PredictionComparison, compare_predictions
from .surgery.adapt import Adaptation, StatisticsShift, adapt, adapt_statistics

# Evaluate a classifier
from .compare.evaluation import Evaluation, Prediction, evaluate, predict

# In a training script
from .batchnorm.dropouts import dropouts_before_batchnorm
from .batchnorm.modes import freeze_batchnorm, set_batchnorm_mode
from .batchnorm.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .compare.train_mode import TrainModeAgreement, agreement_reading, smallest_agreeing, train_mode_agreement
from .statistics.recalibrate import recalibrate
from .surgery.output_layer import replace_head, replace_output
from .training.parameter_groups import parameter_groups

# Fine-tune on class folders
from .training.finetune import FineTuning, finetune
from .training.metrics import EpochMetrics, StepMetrics
from .training.settings import TrainingSettings
from .training.summary import RunSummary

# Fold
from .surgery.fold import FoldResult, fold, fold_batchnorm

# Insert step by step
from .batchnorm.identity import identity_batchnorm
from .graph.sites import Layer, Site, find_sites, survey
from .statistics.calibrate import calibrate
from .statistics.moments import Moments
from .surgery.edges import Edge, find_edges
from .surgery.equalize import equalize
from .surgery.insert import insert_at

# Several processes
from .support.processes import Ranks, process_group

# Errors
from .errors import (
    BNInsertError,
    CalibrationError,
    CheckpointError,
    DivergenceError,
    GraphError,
    ImageError,
    TrainingError,
)

__all__ = [
    # Load, insert, check, save
    "check_output",
    "read_checkpoint",
    "Checkpoint",
    "Settings",
    "build_network",
    "load_checkpoint",
    "save_checkpoint",
    "torchvision_checkpoint",
    "vgg_assumptions",
    "insert_batchnorm",
    "insert",
    "Insertion",
    "compare_outputs",
    "Comparison",
    "finite_part",
    # Adapt to new images
    "adapt_statistics",
    "adapt",
    "Adaptation",
    "StatisticsShift",
    "compare_predictions",
    "PredictionComparison",
    "ClassAccuracy",
    # Evaluate a classifier
    "evaluate",
    "Evaluation",
    "predict",
    "Prediction",
    # In a training script
    "replace_output",
    "replace_head",
    "parameter_groups",
    "dropouts_before_batchnorm",
    "set_batchnorm_mode",
    "freeze_batchnorm",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "recalibrate",
    "train_mode_agreement",
    "TrainModeAgreement",
    "smallest_agreeing",
    "agreement_reading",
    # Fine-tune on class folders
    "finetune",
    "TrainingSettings",
    "FineTuning",
    "RunSummary",
    "StepMetrics",
    "EpochMetrics",
    # Fold
    "fold_batchnorm",
    "fold",
    "FoldResult",
    # Insert step by step
    "find_sites",
    "survey",
    "Site",
    "Layer",
    "calibrate",
    "Moments",
    "identity_batchnorm",
    "find_edges",
    "Edge",
    "equalize",
    "insert_at",
    # Several processes
    "Ranks",
    "process_group",
    # Errors
    "BNInsertError",
    "CalibrationError",
    "CheckpointError",
    "DivergenceError",
    "GraphError",
    "ImageError",
    "TrainingError",
]
