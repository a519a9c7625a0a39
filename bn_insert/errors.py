"""Exceptions raised by bn-insert; each message says what is wrong, where, and what to do."""


class BNInsertError(Exception):
    """Base class of all errors that a user can cause."""


class CheckpointError(BNInsertError):
    """A checkpoint cannot be read or written, or does not contain a network that can be rebuilt."""


class GraphError(BNInsertError):
    """The model cannot be traced, or a change that was requested is not possible in its graph."""


class CalibrationError(BNInsertError):
    """Batches yield no usable statistics: no data, too few values, or values that are not finite."""


class ImageError(BNInsertError):
    """A folder of images or a tensor file cannot be used as input."""


class TrainingError(BNInsertError):
    """A fine-tuning run cannot be started, continued or resumed as requested."""


class DivergenceError(TrainingError):
    """The loss, or the input of a BatchNorm, is no longer finite."""
