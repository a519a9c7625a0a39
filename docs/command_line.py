"""A hook of mkdocs: puts the reference of all commands, from the command line's own help, into command-line.md."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

PLACE = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with the commands and their options in the place that is marked for them."""
    return markdown.replace(PLACE, _commands()) if PLACE in markdown else markdown


def _commands() -> str:
    """Return what typer writes about every command, one heading level deeper, without the part on the whole program."""
    command = [sys.executable, "-m", "typer", "bn_insert_cli.app", "utils", "docs", "--name", "bn-insert"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text[text.index("## `bn-insert insert`") :]
