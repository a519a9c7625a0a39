"""Checkpoint files: read a file, rebuild its network, save a network."""
