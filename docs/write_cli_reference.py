"""Write docs/cli.md from the `--help` of every command: `python docs/write_cli_reference.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from distinit.cli import cli

PAGE = Path(__file__).parent / "cli.md"
HEAD = """\
# Command line

<!-- Written by docs/write_cli_reference.py from `--help`. Do not edit. -->

This page is the `--help` of every command. Exit status: 0 when the job is done, 2 on wrong use, 1 on failure.
"""
WIDTH = 100
SETTINGS: dict[str, Any] = {"terminal_width": WIDTH, "max_content_width": WIDTH}


def contexts(context: click.Context) -> Iterator[click.Context]:
    """Yield the context of a command, then those of its subcommands at all levels, in order."""
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            if command is not None and not command.hidden:
                child = click.Context(command, info_name=name, parent=context, **SETTINGS)
                yield from contexts(child)


def reference() -> str:
    """Return the whole page as Markdown."""
    top = click.Context(cli, info_name="distinit", **(cli.context_settings | SETTINGS))
    parts = [HEAD]
    for context in contexts(top):
        path = context.command_path
        text = context.get_help().rstrip()
        parts.append(f"## {path}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
