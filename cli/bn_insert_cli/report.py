"""`bn-insert report`: the runs of `finetune`, held against each other on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from .console import print_result


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Output folders of `finetune`.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where to write: .html, or .json for machines.", show_default=False)
    ],
    force: opt.Force = False,
) -> None:
    """Compare fine-tuning runs on one page: results, curves, and what the runs differ in.

    Example: `bn-insert report runs/plain runs/batchnorm -o comparison.html`
    """
    from bn_insert.report.report import check_suffix, read_run, runs_report, write_report  # noqa: PLC0415
    from bn_insert.support.files import check_writable  # noqa: PLC0415 - torch only when work begins

    check_suffix(output)
    check_writable(output, overwrite=force)
    # Under the names that the user knows them by; a folder says "." of itself, or what it was once called.
    found = [read_run(run / "report.json") | {"name": str(run)} for run in runs]
    write_report(output, runs_report(found), overwrite=force)
    print_result(f"Wrote {output}: {len(found)} {'run' if len(found) == 1 else 'runs'}.")
