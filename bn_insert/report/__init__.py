"""Reports on insertions and training runs: plain data in, JSON or one HTML page out."""

from .report import file_facts

__all__ = ["file_facts"]
