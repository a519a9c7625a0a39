"""Reports on insertions and training runs: JSON-ready data, written as JSON or as one self-contained HTML page."""

from .adaptation import adaptation_report
from .confusion import check_confusion_matrix, write_confusion_matrix
from .insertion import insertion_report
from .output import check_report, write_report
from .preprocessing import preprocessing_text
from .provenance import file_facts, versions
from .run_beginning import SMALL_DIFFERENCE, choice_text, output_fit_text
from .run_verdicts import EARLY_STOP, on_different_images, run_health, worst
from .runs import read_run, run_report, runs_report
from .verdict import Verdict

__all__ = [
    "EARLY_STOP",
    "SMALL_DIFFERENCE",
    "Verdict",
    "adaptation_report",
    "check_confusion_matrix",
    "check_report",
    "choice_text",
    "file_facts",
    "insertion_report",
    "on_different_images",
    "output_fit_text",
    "preprocessing_text",
    "read_run",
    "run_health",
    "run_report",
    "runs_report",
    "versions",
    "worst",
    "write_confusion_matrix",
    "write_report",
]
