"""The BatchNorm layer itself: identity BatchNorms, and modes that freeze its statistics or parameters."""
