"""Insert BatchNorm into a pretrained network without changing its outputs."""

from .batchnorm.identity import identity_batchnorm
from .batchnorm.modes import freeze_batchnorm
from .checkpoints.checkpoint import load_checkpoint, save_checkpoint
from .compare.outputs import Comparison, compare_outputs
from .compare.train_mode import TrainModeAgreement, smallest_agreeing, train_mode_agreement
from .errors import (
    BNInsertError,
    CalibrationError,
    CheckpointError,
    DivergenceError,
    GraphError,
    ImageError,
    TrainingError,
)
from .graph.sites import Layer, Site, find_sites, survey
from .statistics.calibrate import calibrate
from .statistics.moments import Moments
from .statistics.recalibrate import recalibrate
from .support.processes import Ranks, process_group
from .surgery.edges import Edge, find_edges
from .surgery.equalize import equalize
from .surgery.fold import fold_batchnorm
from .surgery.insert import insert_at, insert_batchnorm
from .surgery.output_layer import replace_output
from .training.finetune import FineTuning, finetune
from .training.metrics import EpochMetrics, StepMetrics
from .training.parameter_groups import parameter_groups
from .training.settings import TrainingSettings

__all__ = [
    "BNInsertError",
    "CalibrationError",
    "CheckpointError",
    "Comparison",
    "DivergenceError",
    "Edge",
    "EpochMetrics",
    "FineTuning",
    "GraphError",
    "ImageError",
    "Layer",
    "Moments",
    "Ranks",
    "Site",
    "StepMetrics",
    "TrainModeAgreement",
    "TrainingError",
    "TrainingSettings",
    "calibrate",
    "compare_outputs",
    "equalize",
    "find_edges",
    "find_sites",
    "finetune",
    "fold_batchnorm",
    "freeze_batchnorm",
    "identity_batchnorm",
    "insert_at",
    "insert_batchnorm",
    "load_checkpoint",
    "parameter_groups",
    "process_group",
    "recalibrate",
    "replace_output",
    "save_checkpoint",
    "smallest_agreeing",
    "survey",
    "train_mode_agreement",
]
