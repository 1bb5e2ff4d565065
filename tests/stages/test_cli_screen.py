"""Progress and results as a log file, a terminal and a program see them."""

from __future__ import annotations

import io
import json

import pytest
from rich.table import Table

from distinit.pipeline.common import console as module
from distinit.pipeline.common.console import Screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_plain_lines_with_rate_and_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 5))  # five seconds pass between any two looks at the clock
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    err = io.StringIO()
    with Screen(stdout=io.StringIO(), stderr=err).progress("extracting", total=40, unit="videos") as bar:
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
    screen = Screen(stdout=io.StringIO(), stderr=err)
    with screen.progress("testing", total=2, unit="video") as bar:
        bar.advance(1)
        screen.say("a line [not markup] :smile:")
        bar.set_total(1)
    assert "a line [not markup] :smile:" in err.getvalue()
    assert "1/1 video" in err.getvalue()


def test_json_keeps_standard_output_for_one_object() -> None:
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(json=True, stdout=out, stderr=err)
    screen.say("a line")
    table = Table("name")
    table.add_row("a row")
    screen.table(table)
    screen.result({"value": float("inf")})
    assert json.loads(out.getvalue()) == {"value": None}
    assert "a line" in err.getvalue()
    assert "a row" in err.getvalue()


def test_quiet_shows_warnings_and_results_only() -> None:
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(quiet=True, stdout=out, stderr=err)
    screen.say("a line")
    with screen.progress("working", total=1) as bar:
        bar.advance(1)
    screen.warn("name\nwith a newline")
    screen.result({"value": 1})
    assert err.getvalue() == "warning: name\\nwith a newline\n"
    assert out.getvalue() == ""
