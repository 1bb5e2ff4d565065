"""The report: its numbers compared with the predictions, runs shown as missing, nothing fetched or
executed."""

from __future__ import annotations

import base64
import csv
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import SourceError
from distinit.pipeline.common.tables import Column, Table
from distinit.pipeline.evaluation.metrics import Estimate
from distinit.pipeline.evaluation.predictions import Predictions
from distinit.pipeline.reporting.accuracy_tables import accuracy_table
from distinit.pipeline.reporting.charts import (
    Line,
    entropy_curves,
    entropy_histogram,
    tick_labels,
    ticks,
)
from distinit.pipeline.reporting.report_contents import make_report, student_table
from distinit.pipeline.reporting.report_page import to_markdown
from distinit.pipeline.reporting.run_folders import find_runs
from distinit.pipeline.reporting.teacher_baselines import TeacherProbe
from distinit.stages.options import ReportConfig
from distinit.stages.report import report

CLASSES = [f"class {k}" for k in range(7)]
VIDEOS = [f"v{i}.mp4" for i in range(35)]


def finetuned(
    folder: Path, init: str, right: int, *, unreadable: int = 0, finished: bool = True
) -> None:
    """Write a run folder as finetune does; `right` of its 35 test videos are right."""
    folder.mkdir(parents=True)
    config = {
        "init": init,
        "dataset": "csv:/data/har7/labels.csv",
        "split": 1,
        "loop": {"lr": 0.002},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"finetune": config}))
    history = [{"kind": "train", "step": s, "loss": 2 / (1 + s / 40)} for s in range(0, 200, 5)]
    history.append({"kind": "epoch", "step": 200, "loss": 0.3, "epoch": 2})
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in history) + '{"torn": '
    )
    if not finished:
        return
    labels = [i % 7 for i in range(35)]
    predictions = Predictions.empty(
        CLASSES, VIDEOS, labels, 10, protocol={"clips": 10}, identity={"weights": init}
    )
    for i in range(35):
        guess = labels[i] if i < right else (labels[i] + 1) % 7
        scores = np.full((10, 7), 0.05, dtype=np.float32)
        scores[:, guess] = 0.7
        if i < 35 - unreadable:
            predictions.set_scores(i, scores, np.arange(10), 50)
        else:
            predictions.fail(i, "<b>no video stream</b> (audio only)")
    predictions.write(folder / "predictions.h5")
    (folder / "result.json").write_text(
        json.dumps({"run": str(folder), "split": 1, "metrics": {"top1": "not read"}})
    )


def student(folder: Path) -> None:
    folder.mkdir(parents=True)
    config = {"student": {"architecture": "r2plus1d_18", "width": 0.25}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"train-student": config}))
    (folder / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step": 20, "loss": 6.0}) + "\n"
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    student(tmp_path / "runs" / "student")
    finetuned(tmp_path / "runs" / "distinit", "/x/runs/student", 20, unreadable=2)
    finetuned(tmp_path / "runs" / "scratch", "scratch", 9)
    finetuned(tmp_path / "runs" / "unfinished", "scratch", 0, finished=False)
    return tmp_path / "runs"


@pytest.mark.slow
def test_numbers_are_those_of_the_predictions(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = report(ReportConfig(folders=[str(runs)], out=str(tmp_path / "out")), Console())
    with open(tmp_path / "out" / "accuracy.csv", encoding="utf-8") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    with h5py.File(runs / "distinit" / "predictions.h5") as file:
        scores, labels = file["clip_scores"][:], file["labels"][:]
    readable = np.isfinite(scores).all(axis=(1, 2))
    top1 = (np.nan_to_num(scores).mean(axis=1).argmax(axis=1) == labels) & readable
    assert float(rows["distinit"]["top1"]) == pytest.approx(top1.mean()) == pytest.approx(20 / 35)
    assert float(rows["distinit"]["top1_low"]) < 20 / 35 < float(rows["distinit"]["top1_high"])
    assert rows["distinit"]["unreadable_videos"] == "2"
    assert rows["unfinished"]["top1"] == ""
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    shown = capsys.readouterr().out
    for text in (page, markdown, shown):
        assert "57.1 [" in text
        assert "missing" in text
    assert "35 (2 unreadable)" in page
    assert "35 (2 unreadable)" in markdown
    assert "distinit: 2 unreadable" in shown
    assert "labels.csv, split 1, 35 test videos" in shown
    assert [r["name"] for r in result["runs"]] == ["distinit", "scratch", "student", "unfinished"]


@pytest.mark.slow
def test_a_difference_is_paired_and_described(runs: Path) -> None:
    content = make_report(find_runs([runs]))
    (difference,) = content.differences
    assert (difference.run.name, difference.base.name, difference.videos) == (
        "distinit",
        "scratch",
        35,
    )
    assert difference.estimate.value == pytest.approx(11 / 35)
    # Nine videos are right in both runs. Eleven of the 35 differences are 1, the others 0.
    rng = np.random.default_rng(5)
    means = rng.binomial(35, 11 / 35, size=20000) / 35
    assert difference.estimate.low == pytest.approx(np.quantile(means, 0.025), abs=0.03)
    assert "does not contain 0" in content.findings[0]
    assert "+31.4 points" in content.findings[0]
    assert "one video is worth 2.9 points" in content.findings[-1]


@pytest.mark.slow
def test_many_differences_are_a_table(tmp_path: Path) -> None:
    finetuned(tmp_path / "scratch", "scratch", 15)
    right = {f"run {n}": n for n in (0, 12, 13, 14, 16, 17, 35)}
    for name, n in right.items():
        finetuned(tmp_path / name, "/x/student", n)
    content = make_report(find_runs([tmp_path]))
    assert content.comparisons is not None
    rows = {row[0]: row for row in content.comparisons.rows}
    assert rows.keys() == right.keys()
    for name, n in right.items():
        value = float(rows[name][3].split(" [")[0].replace("−", "-"))
        assert value == pytest.approx(100 * (n - 15) / 35, abs=0.06)
    assert (rows["run 35"][4], rows["run 0"][4]) == ("that it is better", "that it is worse")
    assert rows["run 16"][4] == "no order"
    assert len(content.sentences) == len(content.findings) - len(right) > 0


def test_a_tie_is_called_undecided(tmp_path: Path) -> None:
    finetuned(tmp_path / "a", "/x/student", 12)
    finetuned(tmp_path / "b", "scratch", 11)
    content = make_report(find_runs([tmp_path / "a", tmp_path / "b"]))
    assert (
        "which contains 0: these videos do not show which of the two is better"
        in content.findings[0]
    )


@pytest.mark.slow
def test_page_needs_nothing_but_itself_and_escapes_what_it_shows(
    runs: Path, tmp_path: Path
) -> None:
    report(ReportConfig(folders=[str(runs)], out=str(tmp_path / "out")), Console(quiet=True))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "a name space that is never fetched"
    assert not re.search(r"<(script|link|iframe)|@import|url\(", page)
    assert set(re.findall(r'<img src="([^,]*),', page)) == {"data:image/svg+xml;base64"}
    assert "<b>no video stream" not in page
    assert "&lt;b&gt;no video stream" in page
    pictures = [
        base64.b64decode(text) for text in re.findall(r'<img src="data:[^,]*,([^"]*)"', page)
    ]
    files = {path.stem: path for path in (tmp_path / "out" / "figures").glob("*.svg")}
    assert set(files) == {
        "accuracy",
        "differences",
        "curves-student",
        "curves-finetune",
        "figure-7-classes",
    }
    assert sorted(pictures) == sorted(path.read_bytes() for path in files.values())
    for name, path in files.items():
        ElementTree.fromstring(path.read_bytes())
        assert min(Image.open(path.with_suffix(".png")).size) > 150, name
    for address in re.findall(r'href="([^"#]+)"', page):
        assert (tmp_path / "out" / address).is_file()
    for anchor in re.findall(r'href="#([^"]+)"', page):
        assert page.count(f'id="{anchor}"') == 1
    assert len(re.findall(r"<details><summary>[^<]*</summary>\n<p class=note id=\"run-", page)) == 4
    contents = re.search(r"<nav.*?</nav>", page, re.S)
    assert contents is not None
    listed = re.findall(r'<a href="#([^"]+)">([^<]+)</a>', contents[0])
    assert listed == re.findall(r'<h2 id="([^"]+)">([^<]+)</h2>', page)
    assert len(listed) == page.count("<h2") >= 5
    before = page
    report(ReportConfig(folders=[str(runs)], out=str(tmp_path / "out")), Console(quiet=True))
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == before, (
        "the same runs, the same page"
    )


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder of runs"):
        find_runs([tmp_path / "none"])
    with pytest.raises(SourceError, match="train-student or finetune"):
        find_runs([tmp_path])


def test_runs_of_equal_names_are_distinguished(tmp_path: Path) -> None:
    finetuned(tmp_path / "one" / "scratch", "scratch", 9)
    finetuned(tmp_path / "two" / "scratch", "scratch", 9)
    assert [run.name for run in find_runs([tmp_path])] == ["one/scratch", "two/scratch"]


def test_tables_escape_in_their_forms() -> None:
    table = Table("t", [Column("na|me"), Column("n", True)], notes=["a < b"])
    table.add("<i>|x", "1,5")
    assert "| &lt;i>\\|x | 1,5 |" in table.to_markdown()
    assert list(csv.reader(table.to_csv().splitlines())) == [["na|me", "n"], ["<i>|x", "1,5"]]
    with pytest.raises(ValueError, match="has 2 columns, got 1 cells"):
        table.add("one")


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.1, 0.1), (-3, 7000), (6.1, 6.9), (0, 0), (1e-9, 2e-9)]
)
def test_ticks_span_the_values(low: float, high: float) -> None:
    values = ticks(low, high)
    assert values[0] <= low + 1e-12
    assert values[-1] >= high - 1e-12
    assert 2 <= len(values) <= 9


def test_tick_labels_have_equal_decimals() -> None:
    assert tick_labels(np.array([4.5, 4.75, 5.0])) == ["4.50", "4.75", "5.00"]
    assert tick_labels(np.array([-5000.0, 0.0, 5000.0, 10000.0])) == [
        "−5\u202f000",
        "0",
        "5\u202f000",
        "10\u202f000",
    ]


def test_long_curves_with_gaps_are_thinned_and_finite() -> None:
    x = np.arange(5000.0)
    y = np.where(x % 7 == 0, np.nan, x)
    chart = entropy_curves([Line("a", x, y), Line("empty", x[:0], y[:0])], 5.0, legend=True)
    assert chart is not None
    (curve,) = chart.curves
    points = np.array([point.split(",") for point in curve.points.split()], dtype=float)
    assert len(points) == 400
    assert np.isfinite(points).all()
    assert (points >= (chart.left, chart.top)).all()
    assert (points <= (chart.right, chart.bottom)).all()
    assert entropy_curves([Line("empty", x[:0], y[:0])], 5.0, legend=True) is None


def test_a_histogram_has_a_bar_of_its_height_for_each_count() -> None:
    chart = entropy_histogram(np.array([0, 4, 2]), np.arange(4.0))
    assert chart is not None
    heights = [height for _, _, _, height in chart.bars]
    assert heights == pytest.approx([0, 188, 94])  # the axis ends at 4
    assert entropy_histogram(np.zeros(3, int), np.arange(4.0)) is None


def test_curves_of_a_chart_differ_in_colour_and_dash() -> None:
    x = np.arange(3.0)
    names = ["<a>", "b", "c"]
    chart = entropy_curves([Line(name, x, x) for name in names], 2.0, legend=True)
    assert chart is not None
    assert len({curve.colour for curve in chart.curves}) == 3
    assert len({curve.dashes for curve in chart.curves}) == 3


@pytest.mark.slow
def test_markdown_lists_unreadable_videos(runs: Path) -> None:
    text = to_markdown(make_report(find_runs([runs])))
    assert any("distinit" in line and "v34.mp4" in line for line in text.splitlines())


@pytest.mark.parametrize(
    ("result", "shown", "clips"),
    [
        ({"explained_fraction": 0.123, "explained_by": "held-out"}, "12", "held-out clips"),
        ({"explained_fraction": 0.123, "explained_by": "training"}, "12", "training clips"),
        ({"explained_fraction": None}, "–", "–"),
        # Runs of version 0.1.
        ({"learned": 0.123, "learned_by": "held-out"}, "12", "held-out clips"),
        ({"learned": -40.0}, "below 0", "training clips"),
        ({}, "–", "–"),
    ],
)
def test_the_report_shows_explained_fractions(
    runs: Path, result: dict[str, object], shown: str, clips: str
) -> None:
    (runs / "student" / "result.json").write_text(json.dumps(result))
    (runs / "student" / "student.safetensors").write_bytes(save({}))
    table = student_table(find_runs([runs]))
    assert table is not None
    column = [c.title for c in table.columns].index("explained, %")
    assert table.rows[0][column] == shown
    assert table.rows[0][column + 1] == clips


def test_a_run_has_the_explained_fraction_of_its_student_and_teachers_have_rows(
    runs: Path,
) -> None:
    (runs / "student" / "result.json").write_text(json.dumps({"explained_fraction": 0.276}))
    config = {"init": str((runs / "student").resolve()), "dataset": "csv:/d/a.csv", "split": 2}
    (runs / "distinit" / "config.yaml").write_text(yaml.safe_dump({"finetune": config}))
    result = {"split": 2, "overlap": {"test_videos_seen_by_init": 35}}
    (runs / "distinit" / "result.json").write_text(json.dumps(result))
    all_runs = find_runs([runs])
    probe = TeacherProbe("csv:/d/a.csv", "2", "lite<0>", "features", 33, Estimate(0.7, 0.6, 0.8))
    table = accuracy_table([run for run in all_runs if run.kind == "finetune"], all_runs, [probe])
    columns = [column.title for column in table.columns]
    rows = {row[0]: dict(zip(columns, row, strict=True)) for row in table.rows}
    assert rows["distinit"]["init explained, %"] == "28"
    assert rows["distinit"]["test videos"] == "35 (2 unreadable, 35 seen)"
    assert rows["scratch"]["init explained, %"] == "–"
    assert rows["unfinished"]["top 1"] == "missing"
    baseline = rows["lite<0> (features)"]
    assert (baseline["data set"], baseline["split"], baseline["top 1"]) == (
        "d/a.csv", "2", "70.0 [60.0, 80.0]",
    )  # fmt: skip
    assert list(table.headings) == [table.rows.index(list(baseline.values()))]
