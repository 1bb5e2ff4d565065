"""Progress and results in a log file, on a terminal and as JSON."""

from __future__ import annotations

import io
import json
import logging

import pytest
from rich.table import Table

from distinit.pipeline.common import console as module
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.progress_bar import progress_bar
from distinit.pipeline.common.tables import Column
from distinit.pipeline.common.tables import Table as ResultTable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_plain_lines_with_rate_and_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    # Five seconds pass between two reads of the clock.
    clock = iter(range(0, 1000, 5))
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
        console.info("a line [not markup] :smile:")
        bar.set_total(1)
    assert "a line [not markup] :smile:" in err.getvalue()
    assert "1/1 video" in err.getvalue()


def test_json_keeps_standard_output_for_one_object() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(json=True, stdout=out, stderr=err)
    console.info("a line")
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
    console.info("a line")
    with console.progress("working", total=1) as bar:
        bar.advance(1)
    console.warn("name\nwith a newline")
    console.result({"value": 1})
    assert err.getvalue() == "warning: name\\nwith a newline\n"
    assert out.getvalue() == ""


def test_records_and_progress_of_the_library_are_shown_while_a_console_is_entered(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = logging.getLogger("distinit.pipeline.anything")

    def work() -> None:
        log.info("a line of %d words", 5)
        log.warning("a warning")
        table = ResultTable("title", [Column("name")])
        table.add("a cell")
        log.info(table)
        with progress_bar("probing", 2, "videos") as bar:
            bar.advance(2)

    # Without a console there is no progress, and logging itself shows warnings.
    work()
    assert "probing" not in capsys.readouterr().err
    outer, inner = (io.StringIO(), io.StringIO()), (io.StringIO(), io.StringIO())
    with Console(stdout=outer[0], stderr=outer[1]):
        with Console(quiet=True, stdout=inner[0], stderr=inner[1]):
            work()
        assert outer[1].getvalue() == ""
        work()
    assert inner[1].getvalue() == "warning: a warning\n"
    assert "a cell" in inner[0].getvalue()
    lines = outer[1].getvalue().splitlines()
    assert lines[:2] == ["a line of 5 words", "warning: a warning"]
    assert lines[2].startswith("probing: 2/2 videos")
    assert "a cell" in outer[0].getvalue()
    work()
    assert outer[1].getvalue().splitlines() == lines
    assert logging.getLogger("distinit").handlers == []


def test_a_line_is_shown_once_if_a_library_sets_up_the_root_logger(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    err = io.StringIO()
    with Console(stdout=io.StringIO(), stderr=err):
        logging.warning("a library that logs by the module")
        logging.getLogger("distinit.pipeline").warning("ours")
    assert err.getvalue() == "warning: ours\n"
    assert "ours" not in capsys.readouterr().err


def test_progress_in_a_notebook_is_one_line_that_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Record the messages of a kernel where IPython publishes them."""
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    messages: list[tuple[str, bool]] = []

    def publish(data: dict[str, str], *, update: bool = False, **_: object) -> None:
        messages.append((data["text/plain"], update))

    monkeypatch.setattr(shell.display_pub, "publish", publish)
    monkeypatch.setattr(module, "NOTEBOOK_INTERVAL_S", 0.0)
    try:
        console = Console(stdout=io.StringIO(), stderr=io.StringIO())
        console._err.is_jupyter = True
        with console, progress_bar("probing", 2, "videos") as bar:
            bar.advance()
            bar.advance()
    finally:
        InteractiveShell.clear_instance()
    assert [update for _, update in messages] == [False, True, True]
    assert messages[1][0].startswith("probing: 1/2 videos")
    assert messages[2][0].startswith("probing: 2/2 videos")


@pytest.mark.parametrize("columns", [80, 120])
def test_names_next_to_many_numbers_are_shown_whole(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    titles = [
        "same best class, %",
        "correlation of entropies",
        "first more confident, %",
        "linear CKA",
    ]
    table = ResultTable("Pairs", [Column("teachers"), *(Column(t, number=True) for t in titles)])
    names = "efficientnet_lite0,efficientnet_lite0.features"
    table.add(names, *["12.25"] * len(titles))
    out = Terminal()
    Console(stdout=out, stderr=out).table(table.to_rich())
    rows = [line.split("│") for line in out.getvalue().splitlines() if "│" in line]
    assert "".join(row[1].strip() for row in rows) == names
    assert [cell.strip() for cell in rows[0][2:-1]] == ["12.25"] * len(titles)
