"""Progress and results as a log file, a terminal and a program see them."""

from __future__ import annotations

import io
import json

import pytest
from rich.table import Table

from distinit.pipeline.common import console as module
from distinit.pipeline.common.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_plain_lines_with_rate_and_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 5))  # five seconds pass between any two looks at the clock
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    err = io.StringIO()
    with Console(stdout=io.StringIO(), stderr=err).progress(
        "extracting", total=40, unit="videos"
    ) as bar:
        for _ in range(8):
            bar.advance(5, loss=0.12345)
    lines = err.getvalue().splitlines()
    assert len(lines) >= 3
    assert lines[0].startswith("extracting: 10/40 videos, ")
    assert "videos/s, ETA 0:" in lines[0]
    assert lines[0].endswith("loss 0.1235")
    assert lines[-1].startswith("extracting: 40/40 videos, ")
    assert "ETA" not in lines[-1]


def test_a_terminal_gets_a_bar_and_lines_above_it() -> None:
    err = Terminal()
    console = Console(stdout=io.StringIO(), stderr=err)
    with console.progress("testing", total=2, unit="video") as bar:
        bar.advance(1)
        console.say("a line [not markup] :smile:")
        bar.set_total(1)
    assert "a line [not markup] :smile:" in err.getvalue()
    assert "1/1 video" in err.getvalue()


def test_json_keeps_standard_output_for_one_object() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(json=True, stdout=out, stderr=err)
    console.say("a line")
    table = Table("name")
    table.add_row("a row")
    console.table(table)
    console.result({"value": float("inf")})
    assert json.loads(out.getvalue()) == {"value": None}
    assert "a line" in err.getvalue()
    assert "a row" in err.getvalue()


def test_quiet_shows_warnings_and_results_only() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(quiet=True, stdout=out, stderr=err)
    console.say("a line")
    with console.progress("working", total=1) as bar:
        bar.advance(1)
    console.warn("name\nwith a newline")
    console.result({"value": 1})
    assert err.getvalue() == "warning: name\\nwith a newline\n"
    assert out.getvalue() == ""
