"""Insert BatchNorm into a pretrained network without changing its outputs."""

from .calibration import calibrate
from .checkpoint import load_checkpoint, save_checkpoint
from .equalization import Edge, equalize, find_edges
from .equivalence import Comparison, compare_outputs
from .errors import (
    BNInsertError,
    CalibrationError,
    CheckpointError,
    DivergenceError,
    GraphError,
    ImageError,
    TrainingError,
)
from .folding import fold_batchnorm
from .freezing import freeze_batchnorm
from .identity import identity_batchnorm
from .insertion import insert_at, insert_batchnorm
from .moments import Moments
from .output_layer import replace_output
from .parameter_groups import parameter_groups
from .recalibration import recalibrate
from .sites import Layer, Site, find_sites, survey
from .train_mode import TrainModeAgreement, smallest_agreeing, train_mode_agreement

__all__ = [
    "BNInsertError",
    "CalibrationError",
    "CheckpointError",
    "Comparison",
    "DivergenceError",
    "Edge",
    "GraphError",
    "ImageError",
    "Layer",
    "Moments",
    "Site",
    "TrainModeAgreement",
    "TrainingError",
    "calibrate",
    "compare_outputs",
    "equalize",
    "find_edges",
    "find_sites",
    "fold_batchnorm",
    "freeze_batchnorm",
    "identity_batchnorm",
    "insert_at",
    "insert_batchnorm",
    "load_checkpoint",
    "parameter_groups",
    "recalibrate",
    "replace_output",
    "save_checkpoint",
    "smallest_agreeing",
    "survey",
    "train_mode_agreement",
]
