"""Insert BatchNorm into a pretrained network without changing its outputs."""
