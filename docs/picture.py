"""Generate docs/demo.svg, a picture of a terminal with the output of `bn-insert demo`, from a real run.

    python docs/picture.py

rich's own template loads a font from another site; the template below uses the reader's fonts instead.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from bn_insert_cli import console
from bn_insert_cli.demo import demo

WIDTH = 96  # columns

# rich fills in the {fields}. It sets the textLength of each piece of text, so that any monospaced font fits.
TEMPLATE = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<title>bn-insert demo in a terminal</title>
<style>
.{unique_id}-matrix {{
    font: {char_height}px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
    line-height: {line_height}px;
}}
.{unique_id}-title {{ font: 18px system-ui, sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


class _Screen(Console):
    """A console that wraps long lines, as a terminal does; notes leave that to the terminal."""

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:  # noqa: ARG002
        super().print(*objects, **options)


def main() -> None:
    """Run the demo and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "demo.svg")
    output = parser.parse_args().output
    output.write_text(picture_of_demo(), encoding="utf-8")


def picture_of_demo() -> str:
    """Return an SVG of the terminal with the command and its output."""
    screen = _Screen(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    screen.print(Text.assemble(("$ ", "bold green"), "bn-insert demo --output digits-bn.pth"))
    # The commands create their consoles at each use, by these two functions.
    console.stdout = console.stderr = lambda: screen
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        demo(Path("digits-bn.pth"))
    screen.print()  # without it, the picture would end at the baseline of the last line
    return screen.export_svg(title="bn-insert", theme=MONOKAI, code_format=TEMPLATE, unique_id="demo")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in bn_insert_cli.app
    main()
