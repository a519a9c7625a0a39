"""The finished runs of a benchmark, as JSON lines in a file: interrupted, a program continues where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Record:
    """Lines that are there, and those that are added.

    Attributes:
        lines: All of them, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        """Read the lines of a file, if it is there, and make its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines()]

    def add(self, line: dict[str, Any]) -> None:
        """Append a line, to the file too."""
        self.lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
