"""Tables of an ablation: numbers compared with the predictions, missing cells shown as missing."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from distinit.pipeline.common.config import CONF
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import SourceError, UsageError
from distinit.pipeline.evaluation.metrics import Estimate
from distinit.pipeline.evaluation.predictions import Predictions
from distinit.pipeline.reporting.ablation_results import (
    ablation_folders,
    cell_names,
    read_ablations,
)
from distinit.pipeline.reporting.ablation_tables import (
    ablation_numbers,
    ablation_tables,
    screen_table,
)
from distinit.pipeline.reporting.published_results import Accuracies, PaperNumbers
from distinit.pipeline.reporting.run_folders import find_runs
from distinit.pipeline.reporting.run_pairs import largest_gain, named_pair
from distinit.pipeline.reporting.teacher_baselines import TeacherProbe
from distinit.stages.options import ReportConfig
from distinit.stages.report import report

CLASSES = [f"class {k}" for k in range(6)]
ROWS = {"center": 0.35, "random": 0.6, "2 random": 0.4}
DATASETS = ["csv:/data/har7/labels.csv", "hmdb51"]


def predictions(folder: Path, seed: int, right: float, split: int, dataset: str) -> None:
    """Write a finetuned run with the 40 test videos of a split, in an order that depends on the
    seed."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"finetune": {"dataset": dataset, "split": split}})
    )
    rng = np.random.default_rng(seed)
    order = rng.permutation(40)
    labels = [int(i) % 6 for i in order]
    result = Predictions.empty(
        CLASSES,
        [f"s{split}/v{i:02d}.mp4" for i in order],
        labels,
        3,
        protocol={"clips": 3},
        identity={"seed": seed},
    )
    for i in range(39):
        scores = rng.random((3, 6)).astype(np.float32)
        scores[:, labels[i]] += rng.random() < right
        result.set_scores(i, scores / scores.sum(axis=1, keepdims=True), np.arange(3), 50)
    result.fail(39, "no video stream")
    result.write(folder / "predictions.h5")
    (folder / "result.json").write_text(
        json.dumps({"seconds": 36.0, "metrics": {"top1": "not read"}})
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An ablation with three rows, two data sets, two splits and two seeds; one cell failed, one is
    missing, one has no predictions."""
    folder, cells = tmp_path / "out", []
    for row, (name, right) in enumerate(ROWS.items()):
        for d, dataset in enumerate(DATASETS):
            for split in (1, 2):
                for seed in (0, 1):
                    key = f"{row}{d}{split}{seed}"
                    predictions(folder / "finetunes" / key, int(key), right, split, dataset)
                    cells.append({
                        "row": name, "axes": {"picks": name}, "seed": seed, "dataset": dataset, "split": split,
                        "student": None, "finetune": f"finetunes/{key}", "status": "done", "reason": None,
                        "seconds": 72.0, "for others": 1,
                    })  # fmt: skip
    removed = {
        "2021": ("failed", "out of <memory>"),
        "2120": ("missing", None),
        "2121": ("done", None),
    }
    for key, (status, reason) in removed.items():
        shutil.rmtree(folder / "finetunes" / key)
        cell = next(cell for cell in cells if cell["finetune"] == f"finetunes/{key}")
        cell.update(status=status, reason=reason)
    center = {"top1": 40.3, "per_clip": 37.8, "split1": 39.5}
    published = [
        {
            "name": "C3D",
            "network": "of | its own",
            "frames": 16,
            "numbers": {"hmdb51": {"split1": 24.3}},
        },
        {"name": "Misra", "frames": 1, "pretraining": "ImageNet", "numbers": {"hmdb51": 28.5}},
    ]
    rows = {"random": {"hmdb51": 43.2}, "center": {"hmdb51": center}}
    paper = {"table": "2", "rows": rows, "published": published, "splits": [1, 2]}
    content = {"title": "Table 2: picks", "paper": paper, "axes": ["picks"], "cells": cells}
    (folder / "cells.json").write_text(json.dumps(content))
    return folder


def measured(folder: Path) -> dict[str, np.ndarray]:
    """Return name, top 1, top 5 and share of right clips of each test video [V]."""
    with h5py.File(folder / "predictions.h5") as file:
        scores, labels, videos = (
            file["clip_scores"][:],
            file["labels"][:],
            file["videos"].asstr()[:],
        )
    readable = np.isfinite(scores).all(axis=(1, 2))
    scores = np.nan_to_num(scores)
    order = np.argsort(-scores.mean(axis=1), axis=1)
    return {
        "videos": videos,
        "top1": (order[:, 0] == labels) & readable,
        "top5": (order[:, :5] == labels[:, None]).any(axis=1) & readable,
        "per_clip": (scores.argmax(axis=2) == labels[:, None]).mean(axis=1) * readable,
    }


def top1(folder: Path) -> dict[str, float]:
    measures = measured(folder)
    return dict(zip(measures["videos"], measures["top1"].astype(float), strict=True))


@pytest.mark.slow
def test_numbers_are_those_of_the_predictions(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = report(ReportConfig(folders=[str(out)], out=str(tmp_path / "report")), Console())
    with open(tmp_path / "report" / "ablation-1.csv", encoding="utf-8") as file:
        rows = {(row["row"], row["dataset"]): row for row in csv.DictReader(file)}
    assert len(rows) == 8
    for r, name in enumerate(ROWS):
        for d, dataset in enumerate(DATASETS):
            row = rows[name, dataset]
            runs = [
                p
                for s in (1, 2)
                for k in (0, 1)
                if (p := out / "finetunes" / f"{r}{d}{s}{k}").exists()
            ]
            assert int(row["runs"]) == len(runs)
            assert (row["planned"], row["source"]) == ("4", "ours")
            values = {
                key: [measured(run)[key].mean() for run in runs]
                for key in ("top1", "per_clip", "top5")
            }
            values["split1"] = [measured(run)["top1"].mean() for run in runs if run.name[2] == "1"]
            for key, each in values.items():
                assert float(row[f"{key}_mean"]) == pytest.approx(np.mean(each)), key
                assert float(row[f"{key}_deviation"]) == pytest.approx(np.std(each, ddof=1)), key
    random, paired = rows["random", "hmdb51"], []
    for split in (1, 2):
        sides = [
            [top1(out / "finetunes" / f"{row}1{split}{seed}") for seed in (0, 1)] for row in (1, 0)
        ]
        for video in sides[0][0]:
            accuracy, base_accuracy = (
                np.mean([values[video] for values in side]) for side in sides
            )
            paired.append(accuracy - base_accuracy)
    assert float(random["difference"]) == pytest.approx(np.mean(paired))
    draws = np.random.default_rng(7).choice(paired, (4000, len(paired))).mean(axis=1)
    assert float(random["difference_low"]) == pytest.approx(np.quantile(draws, 0.025), abs=0.02)
    assert float(random["difference_high"]) == pytest.approx(np.quantile(draws, 0.975), abs=0.02)
    assert float(random["p"]) < 0.05
    assert rows["center", "hmdb51"]["difference"] == ""
    assert (random["paper_top1"], rows["random", DATASETS[0]]["paper_top1"]) == ("0.432", "")
    center = [
        rows["center", "hmdb51"][f"paper_{key}"] for key in ("top1", "per_clip", "top5", "split1")
    ]
    assert center == ["0.403", "0.378", "", "0.395"]
    c3d = rows["C3D, of | its own, 16 frames", "hmdb51"]
    assert (c3d["source"], c3d["paper_split1"], c3d["paper_top1"], c3d["runs"]) == (
        "published",
        "0.243",
        "",
        "",
    )
    assert [a["title"] for a in result["ablations"]] == ["Table 2: picks"]
    assert "Table 2: picks" in capsys.readouterr().out


@pytest.mark.slow
def test_missing_cells_are_shown_with_their_reasons(out: Path, tmp_path: Path) -> None:
    report(ReportConfig(folders=[str(out)], out=str(tmp_path / "report")), Console(quiet=True))
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    for text in (page, markdown):
        assert "2 random, har7/labels.csv, split 2 seed 1: failed: out of &lt;memory" in text
        assert "2 random, hmdb51, split 2 seed 0: missing" in text
        assert (
            "2 random, hmdb51, split 2 seed 1: missing: no finished predictions in its folder"
            in text
        )
        assert "3 of 4" in text
        assert "43.2" in text
    assert "<h2>Accuracy" not in page  # all runs are cells
    for path in (out / "finetunes").iterdir():
        shutil.rmtree(path)
    report(ReportConfig(folders=[str(out)], out=str(tmp_path / "report")), Console(quiet=True))
    (ablation,) = read_ablations(ablation_folders([out]), [])
    for table in ablation_tables(ablation):
        for row in table.rows[:3]:
            assert row[1] == "missing"
            assert "0 of 4" in row


def cells_of(table: str, kind: str) -> list[list[str]]:
    """Return the texts of a table in Markdown or HTML by line, the titles of columns first."""
    if kind == "md":
        lines = [line for line in table.splitlines() if line.startswith("|") and "---" not in line]
        return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    lines = re.findall(r"<tr.*?</tr>", table, re.S)
    return [
        [
            " ".join(re.sub("<[^>]*>", "", cell).split())
            for cell in re.findall(r"<t[hd].*?</t[hd]>", line, re.S)
        ]
        for line in lines
    ]


@pytest.mark.slow
def test_the_papers_numbers_are_next_to_each_measure_and_published_results_below(
    out: Path, tmp_path: Path
) -> None:
    report(ReportConfig(folders=[str(out)], out=str(tmp_path / "report")), Console(quiet=True))
    with open(tmp_path / "report" / "ablation-1.csv", encoding="utf-8") as file:
        plain = {(row["row"], row["dataset"]): row for row in csv.DictReader(file)}
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    tables = {
        "html": re.findall(r"<table>.*?</table>", page, re.S)[1],
        "md": markdown.split("### Table 2: picks: hmdb51")[1].split("###")[0],
    }
    measures = ("per_clip", "split1", "top1")
    for kind, table in tables.items():
        head, *rows = cells_of(table, kind)
        assert head == [
            "row", "per clip, %", "paper", "top 1, split 1, %", "paper", "top 1, splits 1–2, %", "paper", "top 5, %",
            "runs", "difference", "p",
        ]  # fmt: skip
        assert [row[0].strip("*").replace("\\", "") for row in rows] == [
            "center", "random", "2 random", "Published results, as the paper lists them",
            "C3D, of | its own, 16 frames", "Misra, 1 frame, ImageNet",
        ]  # fmt: skip
        center = plain["center", "hmdb51"]
        ours = [
            f"{100 * float(center[f'{key}_mean']):.1f} ± {100 * float(center[f'{key}_deviation']):.1f}"
            for key in measures
        ]
        assert rows[0][1:7] == [ours[0], "37.8", ours[1], "39.5", ours[2], "40.3"]
        assert rows[1][2::2][:3] == ["–", "–", "43.2"]
        assert rows[4][1:] == ["", "–", "", "24.3", "", "–", "", "", "", ""]
        assert rows[5][1:7] == ["", "–", "", "–", "", "28.5"]
    assert "paper" not in cells_of(re.findall(r"<table>.*?</table>", page, re.S)[0], "html")[0], (
        "not this data set's"
    )


@pytest.mark.parametrize(
    ("paper_splits", "our_splits", "expected"),
    [
        ([1, 2, 3], {1, 2, 3}, {"top1": 54.8, "split1": 54.9, "top5": 80.0}),
        ([1, 2, 3], {1}, {"top1": 54.9, "split1": 54.9}),
        ([1, 2, 3], {2}, {"split1": 54.9}),
        (None, {1, 2}, {"top1": 54.8, "split1": 54.9, "top5": 80.0}),
    ],
)
def test_only_numbers_of_the_same_splits_are_compared(
    paper_splits: Any, our_splits: set[int], expected: Any
) -> None:
    paper = PaperNumbers(table="6", splits=paper_splits)
    assert paper.for_splits(Accuracies(top1=54.8, split1=54.9, top5=80.0), our_splits) == expected
    one = PaperNumbers.model_validate({"table": "2", "splits": [1], "rows": {"a": {"hmdb51": 40}}})
    assert one.for_splits(one.rows["a"]["hmdb51"], {1, 2, 3}) == {"split1": 40.0}


def test_one_split_has_no_column_and_runs_of_an_earlier_plan_are_left_out(
    out: Path,
) -> None:
    content = json.loads((out / "cells.json").read_text())
    content["cells"] = [
        cell for cell in content["cells"] if (cell["dataset"], cell["split"]) == ("hmdb51", 2)
    ]
    (out / "cells.json").write_text(json.dumps(content))
    folders = ablation_folders([out.parent])
    runs = find_runs([out], cell_names(folders), folders)
    (ablation,) = read_ablations(folders, runs)
    (table,) = ablation_tables(ablation)
    assert [c.title for c in table.columns] == [
        "row",
        "per clip, %",
        "top 1, %",
        "top 5, %",
        "runs",
        "difference",
        "p",
    ]
    assert any(note.startswith("2 ") for note in table.notes)
    names = {run.path.name: run.name for run in runs}
    assert names["1121"] == "random, hmdb51, split 2, seed 1"
    assert (out / "finetunes" / "0011").exists()
    assert "0011" not in names, "a run of an earlier plan"


def test_students_of_a_row_are_named_by_split_if_each_split_has_its_own(out: Path) -> None:
    content = json.loads((out / "cells.json").read_text())
    for cell in content["cells"]:
        cell["student"] = f"students/{cell['row']}-{cell['seed']}" + (
            f"-{cell['split']}" if cell["seed"] else ""
        )
    (out / "cells.json").write_text(json.dumps(content))
    names = {
        path.name: name
        for path, name in cell_names([out.resolve()]).items()
        if path.parent.name == "students"
    }
    assert names["random-0"] == "student of random, seed 0"
    assert {names[f"random-1-{split}"] for split in (1, 2)} == {
        f"student of random, split {k}, seed 1" for k in (1, 2)
    }
    assert len(set(names.values())) == len(names)


@pytest.mark.slow
def test_the_pair_of_the_figures_is_never_two_seeds_of_a_row(out: Path) -> None:
    folders = ablation_folders([out])
    runs = find_runs([out], cell_names(folders))
    (ablation,) = read_ablations(folders, runs)
    rows = {cell.run.path: cell.record.row for cell in ablation.cells if cell.run is not None}
    pair = largest_gain(runs, rows)
    assert pair is not None
    run, base = pair
    assert rows[run.path] != rows[base.path]
    gains = {}
    # The runs of all cells that were tested on the videos of the base.
    for other in runs:
        accuracies, base_accuracies = top1(other.path), top1(base.path)
        if accuracies.keys() == base_accuracies.keys() and rows[other.path] != rows[base.path]:
            gains[other.path] = np.mean(list(accuracies.values())) - np.mean(
                list(base_accuracies.values())
            )
    assert gains[run.path] == max(gains.values())
    assert largest_gain(runs, dict.fromkeys(rows, "one row")) is None


@pytest.mark.slow
def test_a_named_pair_is_of_runs_or_rows_on_the_same_videos(out: Path) -> None:
    folders = ablation_folders([out])
    runs = find_runs([out], cell_names(folders))
    ablations = read_ablations(folders, runs)

    def pair(a: str, b: str) -> list[str]:
        return [run.path.name for run in named_pair((a, b), runs, ablations)]

    assert pair("2 random", "random") == ["2010", "1010"], (
        "the first runs of the rows with equal data set, split and seed"
    )
    assert pair("random, hmdb51, split 2, seed 1", "center") == ["1121", "0120"]
    assert pair("random, hmdb51, split 2, seed 1", "random, hmdb51, split 2, seed 0") == [
        "1121",
        "1120",
    ]
    for a, b, message in [
        (
            "rnd",
            "center",
            r"--pair 'rnd': .*center; random; 2 ",
        ),
        (
            "random, hmdb51, split 2, seed 1",
            "random, hmdb51, split 1, seed 1",
            "on the same videos and labels",
        ),
        ("2 random, hmdb51, split 2, seed 1", "center", "--pair '2 random, hmdb51"),
        (
            "random, hmdb51, split 2, seed 1",
            "random, hmdb51, split 2, seed 1",
            "no two runs of these names",
        ),
    ]:
        with pytest.raises(UsageError, match=message) as error:
            pair(a, b)
        assert "\n" not in str(error.value)
    shutil.rmtree(out / "finetunes" / "2120", ignore_errors=True)
    for path in (out / "finetunes").glob("2*"):
        (path / "predictions.h5").unlink()
    runs = find_runs([out], cell_names(folders))
    with pytest.raises(UsageError, match="--pair '2 random': has no finished predictions"):
        named_pair(("2 random", "center"), runs, read_ablations(folders, runs))


def test_a_damaged_file_is_named(out: Path) -> None:
    (out / "cells.json").write_text('{"title": "x", "cells": [{"row": "a"}]}')
    with pytest.raises(
        SourceError, match=r"cells\.json: not the cells of an ablation \(cells\.0\.seed"
    ):
        read_ablations(ablation_folders([out]), [])
    (out / "cells.json").write_text("{")
    with pytest.raises(SourceError, match="not JSON"):
        read_ablations(ablation_folders([out]), [])


@pytest.mark.slow
def test_ablation_tables_show_explained_fractions(out: Path) -> None:
    content = json.loads((out / "cells.json").read_text())
    for cell in content["cells"]:
        cell["student"] = f"students/{cell['row']}-{cell['seed']}"
        folder = out / cell["student"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text("train-student: {}")
        fraction = 0.5 + cell["seed"] / 10 if cell["row"] == "random" else 0.02
        (folder / "result.json").write_text(json.dumps({"explained_fraction": fraction}))
    (out / "cells.json").write_text(json.dumps(content))
    (ablation,) = read_ablations(
        [out.resolve()], find_runs([out], cell_names([out.resolve()]), [out.resolve()])
    )
    table = ablation_tables(ablation)[0]
    column = [c.title for c in table.columns].index("explained, %")
    assert {row[0]: row[column] for row in table.rows if row[column]}["random"] == "55.0 ± 7.1"
    low = [
        note.partition(":")[0] for note in screen_table(ablation).notes if "next to nothing" in note
    ]
    assert sorted(low) == sorted(name for name in ROWS if name != "random")
    explained = {
        r["row"]: r["explained_fraction"]
        for r in ablation_numbers(ablation).records()
        if r["source"] == "ours"
    }
    assert float(explained["random"]) == pytest.approx(0.55)


def test_results_that_the_paper_does_not_quote_have_source_and_year(out: Path) -> None:
    plan = yaml.safe_load((CONF / "ablations" / "table6-32-frames.yaml").read_text())
    paper = PaperNumbers.model_validate(plan["paper"])
    sourced = [each for each in paper.published if each.source is not None]
    assert len(sourced) > 15
    for each in sourced:
        assert each.year is not None
        assert each.label.endswith(f"{each.year}, {each.source}")
        assert ("splits not stated" in each.label) != each.splits_stated
    folder = out
    content = json.loads((folder / "cells.json").read_text())
    content["paper"]["published"] = [
        {"name": "B", "source": "s.org", "year": 2021, "numbers": {"hmdb51": 65.1}},
        {"name": "A", "numbers": {"hmdb51": 43.2}},
    ]
    (folder / "cells.json").write_text(json.dumps(content))
    (ablation,) = read_ablations([folder.resolve()], find_runs([folder]))
    table = next(each for each in ablation_tables(ablation) if "hmdb51" in each.title)
    row_numbers = {row[0]: number for number, row in enumerate(table.rows)}
    first, second = sorted(table.headings)
    assert (row_numbers["A"], row_numbers["B, 2021, s.org"]) == (first, second)
    assert table.rows[second][1:].count("65.1") == 1
    with pytest.raises(ValidationError, match="year"):
        PaperNumbers.model_validate(
            {"table": "6", "published": [{"name": "B", "source": "s", "numbers": {"ucf101": 1}}]}
        )


def test_a_teacher_that_is_probed_on_every_split_has_a_row(out: Path) -> None:
    (ablation,) = read_ablations([out.resolve()], find_runs([out]))
    dataset = ablation.datasets[0]

    def probe(teacher: str, split: int, top1: float) -> TeacherProbe:
        return TeacherProbe(dataset, str(split), teacher, "logits", 9, Estimate(top1, 0.1, 0.9))

    probes = [probe("lite", 1, 0.5), probe("lite", 2, 0.6), probe("half", 1, 0.5)]
    first, second = ablation_tables(ablation, probes)
    columns = [column.title for column in first.columns]
    row = dict(zip(columns, first.rows[-1], strict=True))
    assert row["row"] == "lite (logits)"
    assert row["top 1, split 1, %"] == "50.0"
    assert row["top 1, splits 1–2, %"] == f"55.0 ± {100 * np.std([0.5, 0.6], ddof=1):.1f}"
    assert row["per clip, %"] == "–"
    assert list(first.headings) == [len(first.rows) - 1]
    assert all("lite" not in row[0] for row in second.rows)
