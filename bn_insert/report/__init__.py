"""Reports on insertions and training runs: JSON-ready data, written as JSON or as one self-contained HTML page."""

from .adaptation import adaptation_report
from .insertion import insertion_report
from .output import check_report, write_report
from .provenance import file_facts, versions
from .runs import read_run, run_report, runs_report

__all__ = [
    "adaptation_report",
    "check_report",
    "file_facts",
    "insertion_report",
    "read_run",
    "run_report",
    "runs_report",
    "versions",
    "write_report",
]
