"""Looks at a network and leaves it as it is: its graph of operations, its layers, and where a BatchNorm can go."""
