"""What a stage shows: lines and progress on standard error, tables and one JSON object on standard
output.

Stages talk to a `Console` only, so that they run alike from the command line, a notebook and a
test.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

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
from rich.text import Text

from .streams import as_json, never_fail_to_encode, printable, raw_stream

PLAIN_EVERY_S = 10.0
PLAIN_WIDTH = 120


class ProgressBar(Protocol):
    """What `Console.progress` yields."""

    def advance(self, n: float = 1, **fields: object) -> None:
        """Count n more units; `fields` replace what stands behind the bar, as in loss=0.52."""

    def update(self, text: str) -> None:
        """Replace the words behind the bar."""

    def set_total(self, total: float | None) -> None:
        """Correct the total once it is known."""


class Console:
    """Where a stage writes.

    json: standard output is kept for the one object given to `result`; everything else goes to
    standard error. quiet: no lines and no progress, warnings only.
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

    def say(self, text: str) -> None:
        """One line on standard error."""
        if not self.quiet:
            self._line(text)

    def warn(self, text: str) -> None:
        """One line on standard error that also a quiet screen shows."""
        self._line(f"warning: {text}")

    def table(self, renderable: RenderableType) -> None:
        """A rich table or text on standard output (with json: on standard error)."""
        self._out.print(renderable, highlight=False)

    def result(self, value: Mapping[str, Any]) -> None:
        """The one JSON object on standard output; without json nothing."""
        if self.json:
            self._stdout.write(as_json(plain(value)) + "\n")
            self._stdout.flush()

    @contextmanager
    def progress(
        self, description: str, total: float | None = None, unit: str = ""
    ) -> Iterator[ProgressBar]:
        """A bar with rate and ETA on a terminal, a line every ten seconds elsewhere.

        `say` and `warn` may be called meanwhile. `total` None: not known (yet).
        """
        if self.quiet:
            yield _Silent()
        elif self._err.is_terminal:
            with _bar(self._err) as bar:
                yield _Bar(bar, printable(description), total, unit)
        else:
            lines = _Lines(self, description, total, unit)
            yield lines
            lines.close()

    def _line(self, text: str) -> None:
        self._err.print(Text(printable(text)), soft_wrap=True, highlight=False)


def plain(value: Any) -> Any:
    """The value in JSON's own types: NumPy scalars and arrays unpacked, NaN and infinity as
    null."""
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
    """A rich console on which no text commands the terminal; its own escape codes (colours, the
    bar) do."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as rich does, and escape what is not printable, whatever kind of renderable it
        came from."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, lines=True), style, control)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a `Text` of a cell: escaped before its width is measured, so that columns stay
        aligned."""
        return super().render_str(printable(text, lines=True), **options)


def _console(file: TextIO) -> RichConsole:
    console = CleanConsole(file=raw_stream(file), markup=False, emoji=False, highlight=False)
    if not console.is_terminal and console.width == 80:
        console.width = PLAIN_WIDTH  # rich's guess where there is no terminal cuts file names
    return console


class _Rate(ProgressColumn):
    """Units done of all, and units a second."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        done = (
            _count(task.completed)
            if task.total is None
            else f"{_count(task.completed)}/{_count(task.total)}"
        )
        speed = task.finished_speed or task.speed
        return Text(
            f"{done} {unit}".rstrip() + (f" {_rate(speed)} {unit}/s" if speed and unit else "")
        )


def _bar(console: RichConsole) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        _Rate(),
        TextColumn("ETA", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
        refresh_per_second=4,
        speed_estimate_period=60,
    )


class _Bar:
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


class _Lines:
    """Progress as plain lines, for logs."""

    def __init__(self, console: Console, description: str, total: float | None, unit: str) -> None:
        self._screen, self._description, self._total, self._unit = console, description, total, unit
        self._done = 0.0
        self._text = ""
        self._began = self._said = time.monotonic()
        self._shown = 0.0

    def advance(self, n: float = 1, **fields: object) -> None:
        self._done += n
        if fields:
            self._text = _words(fields)
        if time.monotonic() - self._said >= PLAIN_EVERY_S:
            self._say()

    def update(self, text: str) -> None:
        self._text = text
        if time.monotonic() - self._said >= PLAIN_EVERY_S:
            self._say()

    def set_total(self, total: float | None) -> None:
        self._total = total

    def close(self) -> None:
        if self._done != self._shown:
            self._say()

    def _say(self) -> None:
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        done = (
            _count(self._done)
            if self._total is None
            else f"{_count(self._done)}/{_count(self._total)}"
        )
        parts = [f"{self._description}: {done} {self._unit}".rstrip()]
        if self._done:
            parts.append(f"{_rate(rate)} {self._unit}/s")
        if self._total is not None and 0 < self._done < self._total:
            parts.append(f"ETA {clock((self._total - self._done) / rate)}")
        if self._text:
            parts.append(self._text)
        self._screen.say(", ".join(parts))
        self._said, self._shown = now, self._done


class _Silent:
    def advance(self, n: float = 1, **fields: object) -> None:
        """Nothing is shown."""

    def update(self, text: str) -> None:
        """Nothing is shown."""

    def set_total(self, total: float | None) -> None:
        """Nothing is shown."""


def _words(fields: Mapping[str, object]) -> str:
    shown = (
        f"{value:.4g}" if isinstance(value, float) else str(value) for value in fields.values()
    )
    return printable(
        " ".join(
            f"{name.replace('_', ' ')} {value}" for name, value in zip(fields, shown, strict=True)
        )
    )


def _count(n: float) -> str:
    return f"{n:.0f}"


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss, or m:ss below an hour."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
