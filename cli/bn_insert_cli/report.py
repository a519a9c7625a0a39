"""`bn-insert report`: fine-tuning runs compared on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bn_insert.support.text import counted

from . import shared_options as opt
from .console import print_result, print_warning
from .interruption import signals


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Output directories of `finetune`.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Output file: an .html page, or .json data.", show_default=False)
    ],
    force: opt.Force = False,
) -> None:
    """Compare fine-tuning runs on one page: results, curves, and the settings in which the runs differ.

    Example: `bn-insert report runs/plain runs/batchnorm -o comparison.html`
    """
    from bn_insert.report import (  # noqa: PLC0415 - imports torch
        check_report,
        on_different_images,
        read_run,
        runs_report,
        write_report,
    )

    signals.begin(str(output))
    if len({run.resolve() for run in runs}) < len(runs):
        raise typer.BadParameter("a run is named twice; name each once", param_hint="RUN")
    check_report(output, overwrite=force, inputs=[run / "report.json" for run in runs])
    # Named as on the command line: the name in a report is that of the directory at the time, which may have moved.
    found = [read_run(run / "report.json") | {"name": str(run)} for run in runs]
    with signals.saving(str(output)):
        write_report(output, runs_report(found), overwrite=force)
    print_result(f"Wrote {output}: {counted(len(found), 'run')}.")
    if on_different_images(found):
        print_warning("These runs were validated on different images: their accuracies cannot be compared.")
