"""mkdocs hook that inserts the reference of all commands, generated from the options, into command-line.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from typer.main import get_command

PLACEHOLDER = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with its placeholder replaced by the commands and their options."""
    return markdown.replace(PLACEHOLDER, reference()) if PLACEHOLDER in markdown else markdown


def reference() -> str:
    """Return a section for each command: description, usage, arguments, and options by group as in its help page."""
    from bn_insert_cli.app import app  # noqa: PLC0415 - mkdocs imports hooks in any case

    group: Any = get_command(app)
    with typer.Context(group, info_name="bn-insert", **group.context_settings) as parent:
        return "\n".join(line for name in group.list_commands(parent) for line in _section(group, parent, name))


def _section(group: Any, parent: Any, name: str) -> Iterator[str]:
    command = group.get_command(parent, name)
    with typer.Context(command, info_name=name, parent=parent) as context:
        yield f"## `bn-insert {name}`\n\n{command.help}\n"
        yield f"```console\n$ bn-insert {name} {' '.join(command.collect_usage_pieces(context))}\n```\n"
        panels: dict[str, list[str]] = {"Arguments": []}
        for param in command.get_params(context):
            is_argument = param.param_type_name == "argument"
            panel = "Arguments" if is_argument else getattr(param, "rich_help_panel", None) or "Options"
            record = param.get_help_record(context)
            if record:
                panels.setdefault(panel, []).append(f"* `{record[0]}`: {record[1]}")
        for panel, lines in panels.items():
            if lines:
                yield f"**{panel}**\n\n" + "\n".join(lines) + "\n"
