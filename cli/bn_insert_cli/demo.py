"""`bn-insert demo`: runs `insert` on the network and the images that ship with the package."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from . import shared_options as opt
from .console import print_note, print_result
from .insert import insert
from .interruption import signals


def demo(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the result to this file.", show_default=False)
    ] = None,
    force: opt.Force = False,
) -> None:
    """Insert BatchNorm into a small VGG that ships with the package.

    The network recognizes handwritten digits. Its images ship with the package too, so nothing is downloaded.

    Example: `bn-insert demo`
    """
    from bn_insert.demo import images_path, network_path  # noqa: PLC0415 - keeps torch out of --help

    if output is None:
        signals.keep(lambda: "nothing was written")
    with tempfile.TemporaryDirectory() as folder, signals.cleaning(lambda: shutil.rmtree(folder, ignore_errors=True)):
        target = output or Path(folder) / "digits-bn.pth"
        print_note(
            f"bn-insert insert {network_path().name} {images_path().name}/ -o {output or target.name}, with the "
            "network and the images that ship with bn-insert:"
        )
        written = insert(str(network_path()), images_path(), target, force=force)
    print_result(written if output else "The result was not saved. To save it, pass --output digits-bn.pth.")
