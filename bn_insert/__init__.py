"""Insert BatchNorm into a pretrained network without changing its outputs."""

from .calibration import calibrate
from .equivalence import Comparison, compare_outputs
from .errors import BNInsertError, CalibrationError, CheckpointError, GraphError, ImageError
from .folding import fold_batchnorm
from .identity import identity_batchnorm
from .insertion import insert_at, insert_batchnorm
from .moments import Moments
from .recalibration import recalibrate
from .sites import Layer, Site, find_sites, survey

__all__ = [
    "BNInsertError",
    "CalibrationError",
    "CheckpointError",
    "Comparison",
    "GraphError",
    "ImageError",
    "Layer",
    "Moments",
    "Site",
    "calibrate",
    "compare_outputs",
    "find_sites",
    "fold_batchnorm",
    "identity_batchnorm",
    "insert_at",
    "insert_batchnorm",
    "recalibrate",
    "survey",
]
