"""`bn-insert demo`: the main job on the network and the images that come with the package."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .console import print_note
from .insert import insert


def demo(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Keep the result here.", show_default=False)
    ] = None,
) -> None:
    """Insert BatchNorm into the small VGG that comes with the package, start to finish.

    The network reads handwritten digits; its images come with it, so nothing is downloaded.

    Example: `bn-insert demo`
    """
    from bn_insert.demo import images_path, network_path  # noqa: PLC0415 - torch only when work begins

    with tempfile.TemporaryDirectory() as folder:
        target = output or Path(folder) / "digits-bn.pth"
        command = f"bn-insert insert {network_path().name} {images_path().name}/ -o {target.name}"
        print_note(f"{command} --resize 0 --crop 0 --mean 0 --std 1")
        insert(str(network_path()), images_path(), target, resize=0, crop=0, mean="0", std="1")
    if output is None:
        print_note("The result was thrown away; keep it with --output digits-bn.pth")
