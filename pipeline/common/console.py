"""The screen: lines and progress on standard error, tables and one JSON object on standard output.

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

PLAIN_EVERY_S, NOTEBOOK_EVERY_S = 10.0, 0.5
PLAIN_WIDTH = 120
LOGGER = "distinit"


class Console:
    """Where a stage writes; as a context manager, also where log records and progress are shown.

    Args:
        json: Keep standard output for the one object given to `result`; everything else goes to
            standard error.
        quiet: Show no lines and no progress, warnings only.

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
        # Kept from the start: while --json runs, sys.stdout is pointed at standard error, because
        # libraries print.
        never_fail_to_encode(sys.stdout, sys.stderr)
        self._stdout = stdout or sys.stdout
        self._err = _console(stderr or sys.stderr)
        self._out = self._err if json else _console(self._stdout)
        self._shown = ExitStack()

    def __enter__(self) -> Self:
        self._shown.enter_context(_show_records(_Handler(self)))
        self._shown.enter_context(show_progress(self.progress))
        return self

    def __exit__(self, *exception: object) -> None:
        self._shown.close()

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
            # Two long names that are cut to the same beginning cannot be told apart.
            for column in renderable.columns:
                column.overflow = "fold"
        self._out.print(renderable, highlight=False)

    def result(self, value: Mapping[str, Any]) -> None:
        """Write the one JSON object on standard output; without json nothing."""
        if self.json:
            self._stdout.write(as_json(plain(value)) + "\n")
            self._stdout.flush()

    @contextmanager
    def progress(
        self, description: str, total: float | None = None, unit: str = ""
    ) -> Iterator[ProgressBar]:
        """Show a bar with rate and ETA on a terminal, a line every ten seconds elsewhere.

        In a notebook the line is replaced in place. `info` and `warn` may be called meanwhile.
        `total` None: not known (yet).
        """
        if self.quiet:
            yield ProgressBar()
        elif self._err.is_terminal:
            with _bar(self._err) as bar:
                yield _Bar(bar, printable(description), total, unit)
        else:
            notebook = self._err.is_jupyter
            write, every_s = (
                (_cell_line(), NOTEBOOK_EVERY_S) if notebook else (self.info, PLAIN_EVERY_S)
            )
            lines = _Lines(write, every_s, description, total, unit)
            yield lines
            lines.close()

    def _line(self, text: str) -> None:
        self._err.print(Text(printable(text)), soft_wrap=True, highlight=False)


class _Handler(logging.Handler):
    """Shows the records of a logger on a console."""

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
    """Show what is logged below `distinit` by this handler alone, and by those of the root."""
    logger = logging.getLogger(LOGGER)
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers = [*(h for h in before[0] if not isinstance(h, _Handler)), handler]
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    # Where nobody has set up the root, a library that calls `logging.warning` gives it a handler,
    # which would show everything a second time.
    logger.propagate = before[2] and bool(logging.getLogger().handlers)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])


def _cell_line() -> Callable[[str], None]:
    """Return a function that shows a line in the output of a cell, in place of the one before."""
    from IPython.display import display

    line = display({"text/plain": ""}, raw=True, display_id=True)

    def show(text: str) -> None:
        line.update({"text/plain": printable(text)}, raw=True)

    return show


def plain(value: Any) -> Any:
    """Return the value in JSON's own types.

    NumPy scalars and arrays are unpacked, NaN and infinity become null.
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
    """A rich console on which no text commands the terminal.

    Its own escape codes (colours, the bar) do.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as rich does, and escape what is not printable, whatever its renderable."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, lines=True), style, control)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a `Text` of a cell."""
        # Escaped before its width is measured, so that columns stay aligned.
        return super().render_str(printable(text, lines=True), **options)


def _console(file: TextIO) -> RichConsole:
    console = CleanConsole(file=raw_stream(file), markup=False, emoji=False, highlight=False)
    if not console.is_terminal and console.width == 80:
        console.width = PLAIN_WIDTH  # rich's guess where there is no terminal cuts file names
    return console


class _Rate(ProgressColumn):
    """Units done of all, and units per second."""

    def render(self, task: Task) -> Text:
        unit, speed = task.fields["unit"], task.finished_speed or task.speed
        done = _done(task.completed, task.total, unit)
        return Text(done + (f" {_rate(speed)} {unit}/s" if speed and unit else ""))


def _bar(console: RichConsole) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),  # leaves 80 columns to the rest
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
            self._progress.update(self._task, text=_words(fields))
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
        every_s: float,
        description: str,
        total: float | None,
        unit: str,
    ) -> None:
        self._write, self._every_s = write, every_s
        self._description, self._total, self._unit = description, total, unit
        self._done = 0.0
        self._text = ""
        self._began = self._written = time.monotonic()
        self._shown = 0.0

    def advance(self, n: float = 1, **fields: object) -> None:
        self._done += n
        self.update(_words(fields) if fields else self._text)

    def update(self, text: str) -> None:
        self._text = text
        if time.monotonic() - self._written >= self._every_s:
            self._report()

    def set_total(self, total: float | None) -> None:
        self._total = total

    def close(self) -> None:
        if self._done != self._shown:
            self._report()

    def _report(self) -> None:
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        parts = [f"{self._description}: {_done(self._done, self._total, self._unit)}"]
        if self._done:
            parts.append(f"{_rate(rate)} {self._unit}/s")
        if self._total is not None and 0 < self._done < self._total:
            parts.append(f"ETA {clock((self._total - self._done) / rate)}")
        if self._text:
            parts.append(self._text)
        self._write(", ".join(parts))
        self._written, self._shown = now, self._done


def _words(fields: Mapping[str, object]) -> str:
    shown = (
        f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in fields.items()
    )
    return printable(" ".join(shown))


def _done(done: float, total: float | None, unit: str) -> str:
    """Return units done of all, as in `3/8 videos`."""
    return f"{done:.0f}{'' if total is None else f'/{total:.0f}'} {unit}".rstrip()


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss, or m:ss below an hour."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
