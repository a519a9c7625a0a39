"""The errors that a caller can tell apart; each message has the fact, the place and the way out."""


class BNInsertError(Exception):
    """Base of every error that bn-insert raises for what a user can cause."""


class CheckpointError(BNInsertError):
    """A checkpoint file cannot be read, holds no network that can be rebuilt, or cannot be written."""


class GraphError(BNInsertError):
    """The model's graph cannot be seen, or a layer cannot take what was asked for."""


class CalibrationError(BNInsertError):
    """The calibration set gives no usable statistics: no data, too few values, or values that are not finite."""


class ImageError(BNInsertError):
    """A folder of images or a tensor file cannot be used as input."""


class TrainingError(BNInsertError):
    """A fine-tuning run cannot begin, go on or be resumed as it was asked for."""


class DivergenceError(TrainingError):
    """The loss, or what a BatchNorm is given, is no longer finite."""
