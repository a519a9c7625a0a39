"""The BatchNorm layer itself: identity BatchNorms, Batch Renormalization, and modes for training."""
