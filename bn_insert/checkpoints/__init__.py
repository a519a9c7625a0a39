"""Checkpoint files: from a file to a network and back."""
