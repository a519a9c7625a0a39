"""Compare the outputs of two networks, and of one network in train mode and in eval mode."""
