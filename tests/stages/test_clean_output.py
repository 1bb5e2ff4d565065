"""No output has characters that control a terminal or reorder text, whatever names contain."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from distinit.cli import cli, run
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.streams import CleanStream, as_json, printable
from distinit.pipeline.common.tables import Column, Table
from distinit.pipeline.evaluation.predictions import Predictions
from distinit.pipeline.prepared.status import COLUMNS, StatusFile
from distinit.pipeline.training.metric_logger import Metrics
from distinit.tests import warm
from distinit.tests.commands import command_that_raises
from distinit.tests.old_stores import without_digests
from distinit.tests.store_recipe import Recipe

UNSAFE = "".join(
    map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F)])
)
UNSAFE += "".join(map(chr, [*range(0x2066, 0x2070), 0xDCFF]))
TITLE = "\x1b]0;owned\x07\x9b31m\u202e\u2066\x7f$\\frac{1"
"""Sets the title of a terminal, colours it, reorders text; and matplotlib reads it as a formula."""
RICH_CODES = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[[0-9]*[AK]|\r")
"""Rich's escape codes: style, cursor, the bar that is redrawn."""


def unsafe_in(text: str | bytes, allowed: str = "\n") -> set[str]:
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    return set(text) & set(UNSAFE) - set(allowed)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_unsafe_characters_are_escaped_and_text_of_all_scripts_stays() -> None:
    assert unsafe_in(printable(UNSAFE), allowed="") == set()
    assert printable("\x1b\n\x9b\u202e\udcff") == "\\x1b\\n\\x9b\\u202e\\udcff"
    assert printable("a\nb\tc", lines=True) == "a\nb\\tc"
    # With joiners and non-breaking spaces.
    text = "naïve 東京 हिन्दी می‌خواهم 👩‍💻 1\u00a0000\u202f000 \\x1b"
    assert printable(text) == text


def renderables(name: str) -> list[Any]:
    """Return arguments of `Console.table`: those of stages, and others that rich can show."""
    table = Table(name, [Column(name), Column("n", number=True)], notes=[name])
    table.head(name)
    table.add(name, "1")
    rich_table = RichTable(name, title=name, caption=name)
    rich_table.add_row(name)
    return [
        table.to_rich(),
        rich_table,
        Text(name),
        name,
        Panel(name, title=name),
        Panel(Text(name)),
    ]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_every_method_of_a_console(stream: type[io.StringIO]) -> None:
    out, err = stream(), stream()
    name = f"x{UNSAFE}{TITLE}y"
    for as_object in (False, True):
        console = Console(json=as_object, stdout=out, stderr=err)
        console.info(name)
        console.warn(name)
        for each in renderables(name):
            console.table(each)
        for total in (2, None):
            with console.progress(name, total=total, unit=name) as bar:
                bar.advance(1, **{name: name})
                bar.update(name)
        console.result({name: [name]})
    for text in (out.getvalue(), err.getvalue()):
        assert unsafe_in(RICH_CODES.sub("", text) if stream is Terminal else text) == set()
        assert "owned" in text
    assert json.loads(out.getvalue().splitlines()[-1]) == {name: [name]}


def test_columns_of_escaped_cells_are_aligned() -> None:
    for each in renderables("a\x1b\x1b\u202e")[:2]:
        out = io.StringIO()
        Console(stdout=out, stderr=io.StringIO()).table(each)
        widths = {len(line) for line in out.getvalue().splitlines() if line[:1] in "┃│┏└"}
        assert len(widths) == 1


def show_everywhere(error: BaseException) -> None:
    """Show an error in every way that does not use a console."""
    warnings.warn(str(error), stacklevel=1)
    logging.getLogger("a library").error("%s", error)
    print(error, file=sys.stderr)
    print(error)
    click.echo(str(error))


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize(
    "args", [["go"], [f"go{TITLE}"], ["go", "--number", TITLE], ["go", f"--no{TITLE}"]]
)
def test_errors_warnings_logging_and_prints(
    args: list[str],
    debug: list[str],
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check click's errors, which quote the command line, exceptions and prints of libraries."""
    monkeypatch.setattr(logging.root, "handlers", [])
    streams = sys.stdout, sys.stderr
    with pytest.raises(SystemExit), pytest.warns() if args == ["go"] else warnings.catch_warnings():
        run(command_that_raises(ValueError(f"{TITLE} é"), show_everywhere), [*args, *debug])
    assert (sys.stdout, sys.stderr) == streams
    shown = capfdbinary.readouterr()
    assert unsafe_in(shown.out) == unsafe_in(shown.err) == set()
    assert b"\\x1b]0;owned\\x07\\x9b31m\\u202e" in shown.err


def test_a_clean_stream_passes_the_characters_of_progress_bars() -> None:
    raw = io.StringIO()
    stream = CleanStream(raw)
    assert stream.write("\r 50%|#####\x1b[2J \t\n") == 18
    assert raw.getvalue() == "\r 50%|#####\\x1b[2J \t\n"
    assert not stream.isatty()


@dataclass(frozen=True)
class Dirty(Recipe):
    """A store with unsafe characters in the names of videos and classes and in reasons."""

    @staticmethod
    def path(video: int) -> str:
        return "".join(f"%{byte:02X}" for byte in f"v{video}{TITLE}\n.mp4".encode())


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make s.zarr, runs/a and runs/b (finetuned), and runs/student."""
    root = tmp_path_factory.mktemp("dirty")
    store = without_digests(Dirty(videos=range(12)).make(root / "s.zarr"))
    for node in [*store.glob("commits/**/zarr.json")]:
        node.write_text(
            node.read_text().replace(
                "no video stream (audio only)", json.dumps(f"no {TITLE}")[1:-1]
            )
        )
    import zarr

    classes = zarr.open_array(store / "teachers" / "t" / "class", mode="r+")
    classes[:] = np.array([f"class {k} {TITLE}" for k in range(10)], dtype=object)
    for name, num_correct in (("a", 20), ("b", 9)):
        make_finetuned(root / "runs" / f"{name} {TITLE}", num_correct)
    folder = root / "runs" / f"student {TITLE}"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"train-student": {"store": str(store), "student": {}}})
    )
    (folder / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step": 20, "loss": 6.0}) + "\n"
    )
    return root


def make_finetuned(folder: Path, num_correct: int) -> None:
    folder.mkdir(parents=True)
    config = {"init": TITLE, "dataset": f"csv:/x/{TITLE}.csv", "split": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump({"finetune": config}))
    labels = [i % 3 for i in range(30)]
    classes, videos = [f"class {k} {TITLE}" for k in range(3)], [f"v{i}.mp4" for i in range(30)]
    predictions = Predictions.empty(
        classes, videos, labels, 1, protocol={TITLE: TITLE}, identity={TITLE: TITLE}
    )
    for i in range(29):
        scores = np.full((1, 3), 0.1, np.float32)
        scores[:, labels[i] if i < num_correct else (labels[i] + 1) % 3] = 0.8
        predictions.set_scores(i, scores, np.arange(1), 50, note=TITLE)
    predictions.fail(29, TITLE)
    predictions.write(folder / "predictions.h5")
    (folder / "result.json").write_text(json.dumps({"split": 1, TITLE: TITLE}))


def commands(root: Path, out: Path) -> dict[str, list[str]]:
    runs = [str(root / "runs" / f"{name} {TITLE}") for name in ("a", "b")]
    store = str(root / "s.zarr")
    return {
        "info": ["targets", "info", store, "--failed"],
        "browse": ["targets", "browse", store, "--out", str(out / "browse")],
        "verify": ["targets", "verify", store],
        "report": ["report", str(root / "runs"), "--out", str(out / "report")],
        "compare": ["evaluate", "--compare", runs[0], runs[1], "--out", str(out / "compared")],
        "fuse": ["evaluate", "--fuse", runs[0], runs[1], "--out", str(out / "fused")],
        "none": ["targets", "info", f"{store}{TITLE}"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", list(commands(Path("/"), Path("/"))))
@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_output_and_files_of_commands(
    name: str,
    extra: list[str],
    dirty: Path,
    tmp_path: Path,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    with pytest.raises(SystemExit):
        run(cli, [*commands(dirty, tmp_path)[name], *extra])
    shown = capfdbinary.readouterr()
    assert unsafe_in(shown.out) == unsafe_in(shown.err) == set()
    if name in ("info", "compare", "none"):
        assert b"owned" in shown.out + shown.err
    pages = [
        path
        for path in tmp_path.rglob("*")
        if path.suffix in (".html", ".md", ".csv", ".svg", ".json")
    ]
    assert bool(pages) == (name in ("browse", "report", "compare", "fuse"))
    for page in pages:
        assert (
            unsafe_in(page.read_bytes(), allowed="\n\x7f" if page.suffix == ".json" else "\n")
            == set()
        ), page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["info", "report", "none"])
def test_a_terminal_gets_no_escape_codes_but_those_of_rich(
    name: str, dirty: Path, tmp_path: Path
) -> None:
    """Run a command in a pseudo-terminal."""
    reader, terminal = pty.openpty()
    args = commands(dirty, tmp_path)[name]
    process = warm.Process(*args, env={"TERM": "xterm-256color"}, terminal=terminal)
    os.close(terminal)
    shown = b""
    while block := read(reader):
        shown += block
    process.wait()
    text = RICH_CODES.sub("", shown.decode())
    assert "owned" in text
    assert unsafe_in(text) == set()


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 2**16)
    # All writers have closed it.
    except OSError:
        return b""


def test_other_files_that_people_read(tmp_path: Path) -> None:
    """Check status.csv, tags of TensorBoard, and JSON, which is read back unchanged."""
    status = StatusFile(tmp_path / "status.csv")
    status.begin()
    status.add(("c", "v.mp4"), {"status": "failed", "reason": f"no\n{TITLE}"})
    status.finish([("c", "v.mp4")])
    assert unsafe_in((tmp_path / "status.csv").read_bytes()) == set()
    row = StatusFile(tmp_path / "status.csv").row(("c", "v.mp4"))
    assert row is not None
    assert list(row) == list(COLUMNS)
    assert "owned" in row["reason"]
    with Metrics(tmp_path, 0) as metrics:
        metrics.write("train", 1, {TITLE: 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    # The file is binary: a byte of a length or a checksum may be that of ESC.
    written = events.read_bytes()
    assert TITLE.encode() not in written
    assert b"\x1b]" not in written
    assert b"\\x1b]0;owned" in events.read_bytes()
    assert unsafe_in(as_json({UNSAFE: TITLE}), allowed="") == set()
    assert json.loads(as_json({UNSAFE: TITLE})) == {UNSAFE: TITLE}
