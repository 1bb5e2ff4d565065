"""Lines and progress on standard error, tables and one JSON object on standard output.

Stages write to a `Console`. All other code logs below `distinit`, where a message may be a `Table`,
and opens a `progress_bar`: a console shows both while it is entered, on a terminal, in a notebook
and in a log file.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table as RichTable
from rich.text import Text

from .progress_bar import ProgressBar, show_progress
from .streams import as_json, never_fail_to_encode, printable, raw_stream
from .tables import Table

PLAIN_INTERVAL_S, NOTEBOOK_INTERVAL_S = 10.0, 0.5
PLAIN_WIDTH = 120
LOGGER = "distinit"


class Console:
    """The output of a stage. As a context manager it also shows log records and progress.

    Args:
        json: Reserve standard output for the object given to `result`; everything else goes to
            standard error.
        quiet: Show warnings, but no other lines and no progress.

    Example:
        with Console(quiet=True) as console:
            extract_targets(config, console)
    """

    def __init__(
        self,
        *,
        json: bool = False,
        quiet: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        self.json = json
        self.quiet = quiet
        # Taken before a command with --json redirects sys.stdout to standard error, which it does
        # because libraries print.
        never_fail_to_encode(sys.stdout, sys.stderr)
        self._stdout = stdout or sys.stdout
        self._err = _console(stderr or sys.stderr)
        self._out = self._err if json else _console(self._stdout)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(_show_records(_Handler(self)))
        self._stack.enter_context(show_progress(self.progress))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def info(self, text: str) -> None:
        """Write a line on standard error."""
        if not self.quiet:
            self._line(text)

    def warn(self, text: str) -> None:
        """Write a line on standard error, also when quiet."""
        self._line(f"warning: {text}")

    def table(self, renderable: RenderableType) -> None:
        """Write a rich table or text on standard output (with json: on standard error)."""
        if isinstance(renderable, RichTable):
            # If long names were cut, two with the same beginning would look alike.
            for column in renderable.columns:
                column.overflow = "fold"
        self._out.print(renderable, highlight=False)

    def result(self, value: Mapping[str, Any]) -> None:
        """Write the one JSON object on standard output if `json` is set."""
        if self.json:
            self._stdout.write(as_json(plain(value)) + "\n")
            self._stdout.flush()

    @contextmanager
    def progress(
        self, description: str, total: float | None = None, unit: str = ""
    ) -> Iterator[ProgressBar]:
        """Show a bar with rate and ETA on a terminal, a line every ten seconds elsewhere.

        In a notebook the line is replaced in place. `info` and `warn` may be called in the block.
        `total` is None while it is not known.
        """
        if self.quiet:
            yield ProgressBar()
        elif self._err.is_terminal:
            with _bar(self._err) as bar:
                yield _Bar(bar, printable(description), total, unit)
        else:
            notebook = self._err.is_jupyter
            write, interval_s = (
                (_cell_line(), NOTEBOOK_INTERVAL_S) if notebook else (self.info, PLAIN_INTERVAL_S)
            )
            lines = _Lines(write, interval_s, description, total, unit)
            yield lines
            lines.close()

    def _line(self, text: str) -> None:
        self._err.print(Text(printable(text)), soft_wrap=True, highlight=False)


class _Handler(logging.Handler):
    """A log handler that shows records on a console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record: a table, a warning or a line."""
        if isinstance(record.msg, Table):
            self.console.table(record.msg.to_rich())
        elif record.levelno >= logging.WARNING:
            self.console.warn(record.getMessage())
        else:
            self.console.info(record.getMessage())


@contextmanager
def _show_records(handler: logging.Handler) -> Iterator[None]:
    """Show log records below `distinit` with this handler and those of the root logger alone."""
    logger = logging.getLogger(LOGGER)
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    logger.handlers = [*(h for h in handlers if not isinstance(h, _Handler)), handler]
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    # If nobody has set up the root logger, a library that calls `logging.warning` gives it a
    # handler, which would show everything a second time.
    logger.propagate = propagate and bool(logging.getLogger().handlers)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def _cell_line() -> Callable[[str], None]:
    """Return a function that replaces the line shown in the output of a notebook's cell."""
    from IPython.display import display

    line = display({"text/plain": ""}, raw=True, display_id=True)

    def show(text: str) -> None:
        line.update({"text/plain": printable(text)}, raw=True)

    return show


def plain(value: Any) -> Any:
    """Return the value in JSON's types.

    NumPy scalars and arrays become numbers and lists, NaN and infinity become null.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value)


class CleanConsole(RichConsole):
    """A rich console that escapes control characters in text.

    Its own escape codes (colours, the bar) reach the terminal.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as rich does, and escape the unprintable characters of all renderables."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, lines=True), style, control)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text of a cell, escaped."""
        # Escaped before its width is measured, so that columns stay aligned.
        return super().render_str(printable(text, lines=True), **options)


def _console(file: TextIO) -> RichConsole:
    console = CleanConsole(file=raw_stream(file), markup=False, emoji=False, highlight=False)
    # Rich's guess where there is no terminal, which cuts file names.
    if not console.is_terminal and console.width == 80:
        console.width = PLAIN_WIDTH
    return console


class _Rate(ProgressColumn):
    """A column of progress: completed and total units, and units per second."""

    def render(self, task: Task) -> Text:
        unit, speed = task.fields["unit"], task.finished_speed or task.speed
        completed = _completed(task.completed, task.total, unit)
        return Text(completed + (f" {_rate(speed)} {unit}/s" if speed and unit else ""))


def _bar(console: RichConsole) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        # Narrow, so that a line fits 80 columns.
        BarColumn(bar_width=16),
        _Rate(),
        TextColumn("ETA", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
        refresh_per_second=4,
        speed_estimate_period=60,
    )


class _Bar(ProgressBar):
    def __init__(self, bar: Progress, description: str, total: float | None, unit: str) -> None:
        self._progress = bar
        self._task = bar.add_task(description, total=total, unit=unit, text="")

    def advance(self, n: float = 1, **fields: object) -> None:
        if fields:
            self._progress.update(self._task, text=_field_text(fields))
        self._progress.advance(self._task, n)

    def update(self, text: str) -> None:
        self._progress.update(self._task, text=printable(text))

    def set_total(self, total: float | None) -> None:
        self._progress.update(self._task, total=total)


class _Lines(ProgressBar):
    """Progress as plain lines, for logs and notebooks."""

    def __init__(
        self,
        write: Callable[[str], None],
        interval_s: float,
        description: str,
        total: float | None,
        unit: str,
    ) -> None:
        self._write, self._interval_s = write, interval_s
        self._description, self._total, self._unit = description, total, unit
        self._count = 0.0
        self._text = ""
        self._start = self._written = time.monotonic()
        self._reported_count = 0.0

    def advance(self, n: float = 1, **fields: object) -> None:
        self._count += n
        self.update(_field_text(fields) if fields else self._text)

    def update(self, text: str) -> None:
        self._text = text
        if time.monotonic() - self._written >= self._interval_s:
            self._report()

    def set_total(self, total: float | None) -> None:
        self._total = total

    def close(self) -> None:
        if self._count != self._reported_count:
            self._report()

    def _report(self) -> None:
        now = time.monotonic()
        rate = self._count / max(now - self._start, 1e-9)
        parts = [f"{self._description}: {_completed(self._count, self._total, self._unit)}"]
        if self._count:
            parts.append(f"{_rate(rate)} {self._unit}/s")
        if self._total is not None and 0 < self._count < self._total:
            parts.append(f"ETA {clock((self._total - self._count) / rate)}")
        if self._text:
            parts.append(self._text)
        self._write(", ".join(parts))
        self._written, self._reported_count = now, self._count


def _field_text(fields: Mapping[str, object]) -> str:
    parts = (
        f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in fields.items()
    )
    return printable(" ".join(parts))


def _completed(count: float, total: float | None, unit: str) -> str:
    """Return completed and total units, as in `3/8 videos`."""
    return f"{count:.0f}{'' if total is None else f'/{total:.0f}'} {unit}".rstrip()


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss, or m:ss below an hour."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
