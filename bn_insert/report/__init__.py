"""Reports on insertions and training runs: plain data in, JSON or one HTML page out."""

from .report import (
    check_report,
    check_suffix,
    file_facts,
    insertion_report,
    read_run,
    run_report,
    runs_report,
    versions,
    write_report,
)

__all__ = [
    "check_report",
    "check_suffix",
    "file_facts",
    "insertion_report",
    "read_run",
    "run_report",
    "runs_report",
    "versions",
    "write_report",
]
