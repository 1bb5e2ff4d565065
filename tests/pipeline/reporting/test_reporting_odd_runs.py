"""Runs of other people: whatever their files contain, a report is made or one error names the
file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from distinit.pipeline.ablation.steps import Step
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import CheckpointError, DistInitError, SourceError, UsageError
from distinit.pipeline.evaluation.compare import compare
from distinit.pipeline.evaluation.predictions import Predictions, PredictionsError
from distinit.pipeline.evaluation.run_labels import RunLabels
from distinit.pipeline.reporting.ablation_results import cell_names
from distinit.pipeline.reporting.run_folders import find_runs
from distinit.pipeline.students.student import build_student
from distinit.pipeline.students.student_files import save_start
from distinit.pipeline.students.student_options import StudentOptions
from distinit.stages.options import ReportConfig
from distinit.stages.report import report

DEEP = "[" * 100_000 + "]" * 100_000
LESS_DEEP = "[" * 300 + "]" * 300
"""Nesting that a parser accepts and a writer of YAML does not."""
BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
BOMB += "finetune: {x: *a11}\n"
"""Twelve lines that expand to 10^10 values."""
QUIET = Console(quiet=True)
CLASSES, VIDEOS = [f"class {k}" for k in range(3)], [f"v{i}.mp4" for i in range(15)]


def predictions(*, odd: float = 0.0) -> Predictions:
    labels = [i % 3 for i in range(15)]
    result = Predictions.empty(
        CLASSES, VIDEOS, labels, 2, protocol={"clips": 2}, identity={"w": "x"}, features=4
    )
    for i in range(15):
        scores = np.full((2, 3), 0.1, np.float32)
        scores[:, labels[i]] = 0.8
        result.set_scores(
            i, scores, np.arange(2), 50, features=np.full((2, 4), odd or i, np.float32)
        )
    return result


def run_folder(folder: Path, config: Any = None, *, command: str = "finetune") -> Path:
    folder.mkdir(parents=True)
    default = {
        "init": "scratch",
        "dataset": "csv:/x/labels.csv",
        "split": 1,
        "loop": {"batch_size": 4},
    }
    (folder / "config.yaml").write_text(
        yaml.safe_dump({command: default if config is None else config})
    )
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    (folder / "result.json").write_text('{"split": 1, "seconds": 3.5}')
    if command == "finetune":
        predictions().write(folder / "predictions.h5")
    return folder


def refused(folder: Path, *named: str, kind: type[DistInitError] = SourceError) -> None:
    with pytest.raises(kind) as caught:
        find_runs([folder])
    assert "\n" not in str(caught.value)
    for text in named:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ([1], "finetune"),
        ("words", "finetune"),
        ({"init": 5}, "init"),
        ({"store": ["a"]}, "store"),
        ({"dataset": {"a": 1}}, "dataset"),
        ({"split": [1]}, "split"),
        ({"student": 3}, "student"),
        ({"student": {"width": "wide"}}, "width"),
        ({"student": {"width": float("inf")}}, "width"),
        ({"student": {"architecture": ["r"]}}, "architecture"),
        ({"loop": [1]}, "loop"),
        ({"loop": {"batch_size": -4}}, "batch_size"),
        ({"loop": {"batch_size": 2**60}}, "batch_size"),
        ({"targets": {"picks": "random:0"}}, "picks"),
        ({"targets": "random"}, "targets"),
    ],
)
def test_a_config_of_another_form_is_named(tmp_path: Path, config: Any, place: str) -> None:
    run_folder(tmp_path / "run", config)
    refused(tmp_path, str(tmp_path / "run" / "config.yaml"), place)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def link_out(path: Path) -> None:
    """Replace a file by a link to it in a folder outside of the runs."""
    outside = path.parent.parent.parent / f"outside-{path.name}"
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text("secret")
    path.symlink_to(outside)


def link_loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def content(text: str | bytes) -> Callable[[Path], None]:
    return lambda path: (
        path.write_bytes(text if isinstance(text, bytes) else text.encode()) and None
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil",
    [
        content(DEEP),
        content(f"finetune: {LESS_DEEP}"),
        content("finetune: &a {x: *a}"),
        content("finetune: {x: 0x" + "f" * 9000 + "}"),
        content("finetune: {x: " + "9" * 9000 + "}"),
        content("finetune: !!python/object/apply:os.system [touch owned]"),
        content(b"finetune: \xff\xfe"),
        content("finetune: {a: 1"),
        content(BOMB),
        content(BOMB.replace("[", "{<<: [").replace("]", "]}")),
        content("- a"),
        pipe,
        folder,
        link_out,
        link_loop,
    ],
)
def test_a_config_that_is_none_makes_no_run(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    run_folder(tmp_path / "runs" / "good")
    spoil(run_folder(tmp_path / "runs" / "odd") / "config.yaml")
    assert [run.name for run in find_runs([tmp_path / "runs"])] == ["good"]
    with pytest.raises(SourceError):
        find_runs([tmp_path / "runs" / "odd"])


NO_FILES = [pipe, folder, link_out, link_loop]
NO_OBJECTS = [
    content(text)
    for text in ("[1]", "3", '"x"', "{", DEEP, '{"x": ' + LESS_DEEP + "}", b'{"x": "\xff"}')
]


@pytest.mark.parametrize(
    "spoil",
    [
        *NO_FILES,
        *NO_OBJECTS,
        *(
            content(f"{{{text}}}")
            for text in (
                '"seconds": "long"', '"seconds": 1e999', '"seconds": NaN', f'"seconds": {10**400}',
                '"learned": [1]', '"explained_fraction": [1]',
                '"split": {}', '"clips_per_second": "x"', '"thresholds_nats": [1]', '"thresholds_nats": {"t": "x"}',
                f'"x": {"9" * 9000}',
            )
        ),
    ],
)  # fmt: skip
def test_a_result_of_another_form_is_named(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(run_folder(tmp_path / "runs" / "run") / "result.json")
    refused(tmp_path / "runs", "result.json")


@pytest.mark.parametrize(
    "spoil",
    [
        *NO_FILES,
        *(
            content('{"kind": "train", "step": 1}\n' + line)
            for line in (
                "[1]", "3", "null", '{"step": 3}', '{"kind": 3, "step": 3}', '{"kind": "train"}',
                '{"kind": "train", "step": "x"}', '{"kind": "train", "step": -1}', '{"kind": "train", "step": 1e999}',
                '{"kind": "train", "step": ' + "9" * 25 + "0}",
            )
        ),
    ],
)  # fmt: skip
def test_metrics_of_another_form_are_named(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(run_folder(tmp_path / "runs" / "run") / "metrics.jsonl")
    if (
        spoil in NO_FILES
        or "9" * 25 not in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text()
    ):
        refused(tmp_path / "runs", "metrics.jsonl")
    # A number that is too large for this program ends the history, as an incomplete line does.
    else:
        assert len(find_runs([tmp_path / "runs"])[0].history) == 1


CELL = {
    "row": "r",
    "seed": 0,
    "dataset": "d",
    "split": 1,
    "finetune": "finetunes/a",
    "status": "done",
}


@pytest.mark.parametrize(
    "cells",
    [
        [1],
        {"title": "t"},
        {"title": "t", "cells": {"a": 1}},
        {"title": 3, "cells": []},
        *(
            {"title": "t", "cells": [CELL | change]}
            for change in (
                {"finetune": "../../victim"}, {"finetune": "/etc"}, {"student": "a/../../b"}, {"student": "x\0y"},
                {"finetune": 3}, {"row": None}, {"seed": "x"}, {"split": 2**70}, {"seconds": float("inf")},
                {"status": "owned"}, {"axes": [1]}, {"reason": 3},
            )
        ),
        {"title": "t", "cells": [CELL], "paper": {"table": "2", "rows": {"r": {"d": 900}}}},
    ],
)  # fmt: skip
def test_cells_of_another_form_are_named(tmp_path: Path, cells: Any) -> None:
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    with pytest.raises(SourceError, match=r"cells\.json"):
        cell_names([tmp_path])


@pytest.mark.parametrize("spoil", [*NO_FILES, *NO_OBJECTS, content("")])
def test_cells_that_are_no_json_are_named(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "a" / "b" / "cells.json"
    path.parent.mkdir(parents=True)
    spoil(path)
    with pytest.raises(SourceError, match=r"cells\.json"):
        cell_names([path.parent])


def test_splits_far_apart_are_not_counted(tmp_path: Path) -> None:
    """The splits span 10^18 numbers, of which two exist."""
    run_folder(tmp_path / "ablation" / "finetunes" / "a")
    cells = [CELL, CELL | {"split": 10**18}]
    (tmp_path / "ablation" / "cells.json").write_text(json.dumps({"title": "t", "cells": cells}))
    report(ReportConfig(folders=[str(tmp_path / "ablation")], out=str(tmp_path / "out")), QUIET)
    assert f"1, {10**18}" in (tmp_path / "out" / "report.md").read_text()


def replaced(name: str, values: Any, **how: Any) -> Callable[[h5py.File], None]:
    def replace(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, data=values, **how)

    return replace


def attribute(name: str, value: Any) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__setitem__(name, value)


TEXT = {"dtype": h5py.string_dtype()}


@pytest.mark.parametrize(
    "spoil",
    [
        replaced("labels", np.full(15, 3, np.int32)),
        replaced("labels", np.full(15, -1, np.int32)),
        replaced("labels", np.zeros(14, np.int32)),
        replaced("labels", np.zeros((15, 2), np.int32)),
        replaced("labels", np.full(15, np.nan, np.float32)),
        replaced("starts", np.zeros((15, 3), np.int64)),
        replaced("frames", np.zeros(3, np.int64)),
        replaced("status", ["fine"] * 15, **TEXT),
        replaced("status", ["ok"] * 3, **TEXT),
        replaced("reasons", ["ok"] * 3, **TEXT),
        replaced("sources", ["ok"] * 3, **TEXT),
        replaced("classes", ["a", "a", "b"], **TEXT),
        replaced("classes", np.arange(3)),
        replaced("videos", ["v"] * 15, **TEXT),
        replaced("features", np.zeros((3, 2, 4), np.float32)),
        attribute("protocol", "[1]"),
        attribute("protocol", '{"fused": 5}'),
        attribute("protocol", '{"fused": [5]}'),
        attribute("protocol", '{"x": ' + LESS_DEEP + "}"),
        attribute("identity", "3"),
        attribute("identity", 3),
        attribute("format_version", "two"),
    ],
)
def test_predictions_of_another_form_are_named(
    tmp_path: Path, spoil: Callable[[h5py.File], None]
) -> None:
    run = run_folder(tmp_path / "run")
    with h5py.File(run / "predictions.h5", "r+") as file:
        spoil(file)
    refused(tmp_path, "predictions.h5", kind=PredictionsError)
    with pytest.raises(PredictionsError, match=r"predictions\.h5"):
        compare(str(run), str(run), None)


@pytest.mark.parametrize(
    "name", ["predictions.h5", "model.safetensors", "start.safetensors", "metrics.jsonl"]
)
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    """Links out of the folder of runs are refused; links within it are followed."""
    run = run_folder(tmp_path / "runs" / "run")
    if name.endswith(".safetensors"):
        save_file({"x": np.zeros(1, np.float32)}, run / name)
    link_out(run / name)
    refused(tmp_path / "runs", name)
    if name == "predictions.h5":
        with pytest.raises(SourceError, match=r"predictions\.h5"):
            compare(str(run), str(run), None)
    target = tmp_path / "runs" / f"kept-{name}"
    os.replace((run / name).resolve(), target)
    (run / name).unlink()
    (run / name).symlink_to(f"../kept-{name}")
    assert [linked.name for linked in find_runs([tmp_path / "runs"])] == ["run"]
    if name != "metrics.jsonl":
        refused(run, name)


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        "[1]",
        '{"heads": 5}',
        '{"heads": ["a"]}',
        '{"meta": [1]}',
        '{"options": {"x": ' + LESS_DEEP + "}}",
        "x",
    ],
)
def test_a_model_whose_header_has_another_form_is_named(tmp_path: Path, text: str) -> None:
    run = run_folder(tmp_path / "run", {"store": "/nowhere"}, command="train-student")
    save_file(
        {"x": np.zeros(1, np.float32)}, run / "student.safetensors", metadata={"distinit": text}
    )
    with pytest.raises(CheckpointError, match=r"student\.safetensors"):
        report(ReportConfig(folders=[str(run)], out=str(tmp_path / "out")), QUIET)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_odd_numbers_make_a_report(tmp_path: Path) -> None:
    """Losses that diverged, filters of any shape, features that overflow, formulas in names."""
    for number, (loss, odd, shape) in enumerate(
        [
            ("NaN", np.nan, (4, 3, 3, 7, 7)),
            ("1e308", 1e38, (4,)),
            ("-Infinity", 0, (4, 3, 900, 1, 1)),
            ("1", 0, (0,) * 5),
        ]
    ):
        run = run_folder(
            tmp_path / "runs" / f"$x_{{{number}}}$", {"init": f"run {number}", "dataset": "d"}
        )
        lines = [f'{{"kind": "train", "step": {step}, "loss": {loss}}}\n' for step in (1, 2)]
        lines += [f'{{"kind": "epoch", "step": {2**53 - 1}, "loss": {loss}}}\n']
        (run / "metrics.jsonl").write_text("".join(lines))
        predictions(odd=odd).write(run / "predictions.h5")
        save_file({"stem.0.weight": np.full(shape, np.nan, np.float32)}, run / "model.safetensors")
    with np.errstate(all="ignore"):
        report(ReportConfig(folders=[str(tmp_path / "runs")], out=str(tmp_path / "out")), QUIET)
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
def test_what_a_report_writes_stays_in_its_folder(tmp_path: Path) -> None:
    """--out is a report of another person, which lists files to remove and has links."""
    run_folder(tmp_path / "runs" / "run")
    out, victim = tmp_path / "out", tmp_path / "victim.html"
    report(ReportConfig(folders=[str(tmp_path / "runs")], out=str(out)), QUIET)
    victim.write_text("precious")
    (out / "notes.txt").write_text("precious")
    (out / "old.svg").write_text("earlier")
    names = [
        "../victim.html",
        str(victim),
        "figures/../../victim.html",
        "notes.txt",
        "old.svg",
        3,
        ".",
        "figures",
    ]
    (out / "report-files.json").write_text(json.dumps(names))
    (out / f".report.html.{os.getpid()}.partial").symlink_to(victim)
    report(ReportConfig(folders=[str(tmp_path / "runs")], out=str(out)), QUIET)
    assert victim.read_text() == (out / "notes.txt").read_text() == "precious"
    assert not (out / "old.svg").exists()
    for record in (DEEP, "3", '{"a": 1}'):
        (out / "report-files.json").write_text(record)
        report(ReportConfig(folders=[str(tmp_path / "runs")], out=str(out)), QUIET)
    (out / "figures").rename(tmp_path / "elsewhere")
    (out / "figures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="figures"):
        report(ReportConfig(folders=[str(tmp_path / "runs")], out=str(out)), QUIET)


@pytest.mark.parametrize(
    "text", [DEEP, "[1]", "3", "null", "{}", '{"train": 3}', '{"train": [3], "test": []}']
)
def test_other_records_of_a_run(tmp_path: Path, text: str) -> None:
    """labels.json is refused by name; an ablation ignores a result.json that is no result."""
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(DistInitError, match=r"labels\.json"):
        RunLabels.read(tmp_path)
    step = Step(kind="finetune", key="k", config={}, clips=0, network={})
    (tmp_path / step.folder).mkdir(parents=True)
    (tmp_path / step.folder / "result.json").write_text(text)
    assert step.result(tmp_path) in (None, {}, {"train": 3}, {"train": [3], "test": []})


def flip(path: Path) -> None:
    """Flip a bit in the header of a file."""
    content = bytearray(path.read_bytes())
    content[12] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("harm", [flip, link_out, folder])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "start.safetensors", "predictions.h5", "metrics.jsonl"]
)
def test_a_damaged_file_costs_one_run_of_the_report(
    tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    whole, harmed = (run_folder(tmp_path / "runs" / run) for run in ("whole", "harmed"))
    if name.endswith(".safetensors"):
        save_start(harmed / name, build_student(StudentOptions(width=0.125), {"label": 2}))
    if name == "metrics.jsonl" and harm is flip:
        (harmed / name).write_text('[" no object "]\n')
    else:
        harm(harmed / name)
    result = report(
        ReportConfig(folders=[str(tmp_path / "runs")], out=str(tmp_path / "out")), QUIET
    )
    assert not result["ok"]
    assert [run["path"] for run in result["runs"]] == [str(whole.resolve())]
    (line,) = result["skipped"]
    assert str(harmed / name) in line
    for page in ("report.html", "report.md"):
        assert name.split(".")[0] in (tmp_path / "out" / page).read_text()
