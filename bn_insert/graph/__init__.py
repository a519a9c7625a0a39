"""Inspects a network without changing it: its graph of operations, its layers, and where a BatchNorm can go."""
