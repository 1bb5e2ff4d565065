"""One table, four ways to show it: on a terminal, as Markdown, as CSV and as HTML."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from .streams import printable


@dataclass(frozen=True)
class Column:
    """A heading; numbers stand to the right."""

    title: str
    number: bool = False


@dataclass
class Table:
    """Cells are text as a person reads it; `notes` stand below, a line each. headings: index of a
    row → the heading above it, which a CSV does without."""

    title: str
    columns: Sequence[Column]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    headings: dict[int, str] = field(default_factory=dict)

    def add(self, *cells: str) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(
                f"table {self.title!r} has {len(self.columns)} columns, got {len(cells)} cells"
            )
        self.rows.append(list(cells))

    def head(self, text: str) -> None:
        """A heading above the rows that are still to come."""
        self.headings[len(self.rows)] = text

    def to_rich(self) -> Group:
        """Title, table and notes; rich's own title and caption would be wrapped to the width of a
        narrow table."""
        table = RichTable()
        for column in self.columns:
            # Numbers are never cut or wrapped; names give way.
            table.add_column(
                _text(column.title),
                justify="right" if column.number else "left",
                no_wrap=column.number,
                overflow="fold",
            )
        for at, row in enumerate(self.rows):
            if at in self.headings:
                table.add_section()
                table.add_row(_text(self.headings[at], style="bold"))
            table.add_row(*(_text(cell) for cell in row))
        return Group(Text(self.title, style="bold"), table, *(Text(note) for note in self.notes))

    def to_markdown(self) -> str:
        lines = [
            _markdown_row([column.title for column in self.columns]),
            "|" + "|".join("---:" if column.number else "---" for column in self.columns) + "|",
        ]
        for at, row in enumerate(self.rows):
            if at in self.headings:
                lines.append(
                    f"| **{markdown_cell(self.headings[at])}** |" + " |" * (len(self.columns) - 1)
                )
            lines.append(_markdown_row(row))
        notes = [f"\n{markdown_text(note)}" for note in self.notes]
        return f"### {self.title}\n\n" + "\n".join(lines + notes) + "\n"

    def to_csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([column.title for column in self.columns])
        writer.writerows(self.rows)
        return out.getvalue()

    def records(self) -> list[dict[str, str]]:
        """A dict a row, by the columns' titles."""
        return [
            dict(zip((column.title for column in self.columns), row, strict=True))
            for row in self.rows
        ]

    def to_html(self, links: Mapping[str, str] | None = None) -> str:
        """A <table> with every cell escaped; the notes as paragraphs below. links: texts of the
        first column that lead somewhere, with the address."""
        classes = [' class="number"' if column.number else "" for column in self.columns]
        head = "".join(
            f"<th{c} scope=col>{_two_lines(html.escape(column.title))}</th>"
            for c, column in zip(classes, self.columns, strict=True)
        )
        body = "\n".join(
            self._heading(number)
            + "<tr>"
            + "".join(
                f"<td{c}>{_linked(cell, links or {}) if at == 0 else html.escape(cell)}</td>"
                for at, (c, cell) in enumerate(zip(classes, row, strict=True))
            )
            + "</tr>"
            for number, row in enumerate(self.rows)
        )
        notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<table><caption>{html.escape(self.title)}</caption>"
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>\n{notes}"
        )

    def _heading(self, number: int) -> str:
        if number not in self.headings:
            return ""
        text = html.escape(self.headings[number])
        return f'<tr class="heading"><th colspan="{len(self.columns)}" scope="rowgroup">{text}</th></tr>\n'


def _text(text: str, style: str = "") -> Text:
    """Return a cell, escaped before its width is measured, so that columns stay aligned."""
    return Text(printable(text, lines=True), style=style)


def _two_lines(title: str) -> str:
    """A heading in HTML breaks after a comma, and nowhere else: `top 1, splits 1–3, %` before
    `splits`."""
    return re.sub(", (?!%)", ", <br>", title)


def _linked(text: str, links: Mapping[str, str]) -> str:
    inside = html.escape(text)
    return f'<a href="{html.escape(links[text])}">{inside}</a>' if text in links else inside


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(markdown_cell, cells)) + " |"


def markdown_cell(text: str) -> str:
    """Text as it is, inside a table."""
    return markdown_text(text).replace("|", "\\|")


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: on one line, no HTML in it."""
    return text.replace("\\", "\\\\").replace("<", "&lt;").replace("\n", " ")
