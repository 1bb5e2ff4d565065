"""A table that can be shown on a terminal, as Markdown and as CSV.

HTML pages show it with the macro `table` of reporting/templates.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from .streams import printable

# In tables wider than NARROW characters, titles of numbers are wrapped to TITLE_WIDTH or more.
NARROW, TITLE_WIDTH = 80, 9


@dataclass(frozen=True)
class Column:
    """A column's heading, and whether it holds numbers, which are aligned to the right."""

    title: str
    number: bool = False


def columns(*titles: str) -> list[Column]:
    """Return columns with these titles; `>` before a title marks numbers, as in a format string.

    Example:
        >>> columns("run", ">clips")
        [Column(title='run', number=False), Column(title='clips', number=True)]
    """
    return [Column(title.removeprefix(">"), title.startswith(">")) for title in titles]


@dataclass
class Table:
    """A table of strings, formatted for people.

    Args:
        title: The line above the table.
        columns: The headings.
        rows: Cells, a list per row.
        notes: Lines below the table.
        headings: Index of a row → the heading above it, which a CSV does not have.
    """

    title: str
    columns: Sequence[Column]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    headings: dict[int, str] = field(default_factory=dict)

    def add(self, *cells: str) -> None:
        """Add a row."""
        if len(cells) != len(self.columns):
            raise ValueError(
                f"table {self.title!r} has {len(self.columns)} columns, got {len(cells)} cells"
            )
        self.rows.append(list(cells))

    def head(self, text: str) -> None:
        """Add a heading above the rows that follow."""
        self.headings[len(self.rows)] = text

    def __str__(self) -> str:
        return self.to_markdown()

    def to_rich(self) -> Group:
        """Return title, table and notes for a terminal.

        Rich's own title and caption would be wrapped to the width of a narrow table.
        """
        table = RichTable()
        widths = [
            max((len(row[index]) for row in self.rows), default=0)
            for index in range(len(self.columns))
        ]
        outer_widths = (
            max(len(column.title), width) + 3
            for column, width in zip(self.columns, widths, strict=True)
        )
        # Numbers are never cut or wrapped. In a wide table their titles are wrapped, since names
        # would otherwise be squeezed to nothing.
        wide = sum(outer_widths) >= NARROW
        for column, width in zip(self.columns, widths, strict=True):
            title = column.title
            if wide and column.number:
                title = textwrap.fill(title, max(width, TITLE_WIDTH), break_long_words=False)
            table.add_column(
                _text(title),
                justify="right" if column.number else "left",
                no_wrap=column.number,
                overflow="fold",
            )
        for index, row in enumerate(self.rows):
            if index in self.headings:
                table.add_section()
                table.add_row(_text(self.headings[index], style="bold"))
            table.add_row(*(_text(cell) for cell in row))
        return Group(Text(self.title, style="bold"), table, *(Text(note) for note in self.notes))

    def to_markdown(self) -> str:
        """Return title, table and notes as Markdown."""
        lines = [
            _markdown_row([column.title for column in self.columns]),
            "|" + "|".join("---:" if column.number else "---" for column in self.columns) + "|",
        ]
        for index, row in enumerate(self.rows):
            if index in self.headings:
                lines.append(
                    f"| **{markdown_cell(self.headings[index])}** |"
                    + " |" * (len(self.columns) - 1)
                )
            lines.append(_markdown_row(row))
        notes = [f"\n{markdown_text(note)}" for note in self.notes]
        return f"### {self.title}\n\n" + "\n".join(lines + notes) + "\n"

    def to_csv(self) -> str:
        """Return headings and rows as CSV."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([column.title for column in self.columns])
        writer.writerows(self.rows)
        return out.getvalue()

    def records(self) -> list[dict[str, str]]:
        """Return a dict per row, from column titles to cells."""
        return [
            dict(zip((column.title for column in self.columns), row, strict=True))
            for row in self.rows
        ]


def _text(text: str, style: str = "") -> Text:
    """Return a cell, escaped before its width is measured, so that columns stay aligned."""
    return Text(printable(text, lines=True), style=style)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(markdown_cell, cells)) + " |"


def markdown_cell(text: str) -> str:
    """Return the text for a cell of a Markdown table."""
    return markdown_text(text).replace("|", "\\|")


def markdown_text(text: str) -> str:
    """Return the text on one line, escaped so that Markdown shows it unchanged."""
    return text.replace("\\", "\\\\").replace("<", "&lt;").replace("\n", " ")
