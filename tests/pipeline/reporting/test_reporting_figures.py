"""Figures of a report: numbers compared with NumPy and scikit-learn, missing data, a browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.neighbors import KernelDensity

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.evaluation.predictions import Predictions
from distinit.pipeline.reporting.ablation_results import (
    ablation_folders,
    cell_names,
    read_ablations,
)
from distinit.pipeline.reporting.figures.entropy import entropy_density, threshold_points
from distinit.pipeline.reporting.figures.features import embed
from distinit.pipeline.reporting.figures.filters import variation_over_time
from distinit.pipeline.reporting.report_contents import forwards_saved
from distinit.pipeline.reporting.run_folders import find_runs, read_run
from distinit.pipeline.students.student import build_student
from distinit.pipeline.students.student_files import save_student
from distinit.pipeline.students.student_options import StudentMeta, StudentOptions
from distinit.stages.options import ReportConfig
from distinit.stages.report import report

QUIET = Console(quiet=True)
CLASSES = ["run", "walk", "jump"]
ROWS = {"none": None, "2 nats": 2.0, "1 nat": 1.0}


def exported(path: Path, architecture: str, *, still: bool = False) -> None:
    """Export a student with random weights; `still` repeats its first kernel over time."""
    torch.manual_seed(1)
    options = StudentOptions.model_validate({"architecture": architecture, "width": 0.125})
    student = build_student(options, {"sure": 7, "unsure": 5})
    if still:
        stem = student.backbone.get_parameter("stem.0.weight")
        stem.data[:] = stem.data.mean(dim=2, keepdim=True)
    names = {"sure": [f"s{k}" for k in range(7)], "unsure": [f"u{k}" for k in range(5)]}
    save_student(path, student, StudentMeta(classes=names, clip_length=8, clip_size=56))


def student_run(folder: Path, store: Path, architecture: str, nats: float | None) -> None:
    folder.mkdir(parents=True)
    config = {"store": str(store), "targets": {"picks": "random:2"}, "loop": {"batch_size": 8}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"train-student": config}))
    result = {
        "seconds": 7200.0,
        "clips_per_second": 3.5,
        "max_entropy": {"sure": nats} if nats else {},
    }
    (folder / "result.json").write_text(json.dumps(result))
    history = [{"kind": "train", "step": s, "loss": 5 - s / 9} for s in (5, 10)] + [
        {"kind": "epoch", "step": 10}
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, history)))
    exported(folder / "student.safetensors", architecture)


def finetuned(folder: Path, init: str, seed: int) -> None:
    """Write a run with 24 videos, 8 per class; the features of the three classes are separated."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"finetune": {"init": init, "dataset": "hmdb51", "split": 1}})
    )
    rng = np.random.default_rng(seed)
    labels = [i % 3 for i in range(24)]
    predictions = Predictions.empty(
        CLASSES, [f"v{i}" for i in range(24)], labels, 2, protocol={}, identity={}, features=6
    )
    for i, label in enumerate(labels):
        scores = rng.random((2, 3)).astype(np.float32)
        scores[:, label] += 0.5 * seed
        features = rng.normal(0, 0.1, (2, 6)) + np.eye(6)[label]
        scores /= scores.sum(axis=1, keepdims=True)
        predictions.set_scores(i, scores, np.arange(2), 50, features=features.astype(np.float32))
    predictions.write(folder / "predictions.h5")
    (folder / "result.json").write_text(json.dumps({"seconds": 10.0}))


@pytest.fixture
def out(tmp_path: Path, tiny_store: Any) -> Path:
    """An ablation over the threshold with two seeds, and an inflated run."""
    folder, cells = tmp_path / "out", []
    for row, (name, nats) in enumerate(ROWS.items()):
        for seed in (0, 1):
            paths = {"student": f"students/{row}{seed}", "finetune": f"finetunes/{row}{seed}"}
            student_run(
                folder / paths["student"], tiny_store.path, "r3d_18" if row else "r2plus1d_18", nats
            )
            finetuned(folder / paths["finetune"], str(folder / paths["student"]), row + seed)
            cells.append(
                {
                    "row": name,
                    "seed": seed,
                    "dataset": "hmdb51",
                    "split": 1,
                    "status": "done",
                    **paths,
                }
            )
    (folder / "cells.json").write_text(
        json.dumps({"title": "Thresholds", "axes": ["threshold"], "cells": cells})
    )
    finetuned(folder / "inflated", "inflate:/weights/resnet18.pth", 0)
    exported(folder / "inflated" / "model.safetensors", "r3d_18")
    exported(folder / "inflated" / "start.safetensors", "r3d_18", still=True)
    return folder


def test_variation_over_time_has_known_ends() -> None:
    rng = np.random.default_rng(0)
    picture = rng.normal(size=(4, 3, 1, 7, 7))
    assert variation_over_time(picture.repeat(3, axis=2)) == pytest.approx(0, abs=1e-12)
    assert variation_over_time(np.concatenate([picture, -picture], axis=2)) == pytest.approx(1)
    # With a mean w and a change of ±w around it, half of the squared norm changes.
    assert variation_over_time(np.concatenate([2 * picture, 0 * picture], axis=2)) == pytest.approx(
        1 / np.sqrt(2)
    )
    assert variation_over_time(np.zeros((2, 3, 3, 7, 7))) == 0
    noise = rng.normal(size=(64, 3, 3, 7, 7))
    # Three independent steps.
    assert variation_over_time(noise) == pytest.approx(np.sqrt(2 / 3), abs=0.01)
    assert variation_over_time(5 * noise) == pytest.approx(variation_over_time(noise))


def test_entropy_density_is_that_of_a_kernel_estimate() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(2, 0.3, 3000), rng.normal(4.5, 0.5, 2000)]).astype(
        np.float32
    )
    x, density = entropy_density(values, 6.9)
    assert (x[0], x[-1]) == (0, 6.9)
    assert np.trapezoid(density, x) == pytest.approx(1, abs=0.01)
    width = (
        0.9
        * min(values.std(), np.subtract(*np.quantile(values, (0.75, 0.25))) / 1.34)
        * len(values) ** -0.2
    )
    independent = np.exp(
        KernelDensity(bandwidth=width).fit(values[:, None]).score_samples(x[:, None])
    )
    assert density == pytest.approx(independent, abs=0.01)
    x, density = entropy_density(np.abs(rng.normal(0, 0.2, 5000)).astype(np.float32), 2.0)
    assert density[0] == pytest.approx(density.max(), rel=0.05), "folded back at 0, not halved"


def test_a_map_keeps_neighbours_and_is_repeatable() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = rng.normal(0, 0.2, (60, 16)) + 3 * np.eye(16)[labels]
    positions = embed(features)
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=2) + 1e9 * np.eye(60)
    assert (labels[distance.argmin(axis=1)] == labels).all()
    assert np.array_equal(positions, embed(features))


def test_threshold_points_are_nats_and_accuracies_of_the_rows(out: Path, tiny_store: Any) -> None:
    folders = ablation_folders([out])
    runs = find_runs([out], cell_names(folders))
    (ablation,) = read_ablations(folders, runs)
    assert threshold_points(ablation, "another.zarr") == []
    points = threshold_points(ablation, str(tiny_store.path))
    assert [point.row for point in points] == list(ROWS)
    assert [point.nats for point in points] == [None, {"sure": 2.0}, {"sure": 1.0}]
    for row, point in enumerate(points):
        accuracies = []
        for seed in (0, 1):
            predictions = Predictions.read(out / "finetunes" / f"{row}{seed}" / "predictions.h5")
            accuracies.append(
                100
                * (predictions.clip_scores.mean(axis=1).argmax(axis=1) == predictions.labels).mean()
            )
        assert point.mean == pytest.approx(np.mean(accuracies))
        assert point.deviation == pytest.approx(np.std(accuracies, ddof=1))
    assert [run.name for run in runs][:3] == [
        "inflated",
        "student of none, seed 0",
        "none, hmdb51, split 1, seed 0",
    ]
    student = next(run for run in runs if run.kind == "student")
    assert forwards_saved(student) == 10 * 8 * 2 * 2  # steps, clips per step, picks, teachers


@pytest.mark.slow
def test_every_figure_is_drawn_and_the_page_holds_in_a_browser(
    out: Path, tmp_path: Path, open_page: Callable[..., Any]
) -> None:
    exported(tmp_path / "kinetics.safetensors", "r2plus1d_18")
    kinetics = str(tmp_path / "kinetics.safetensors")
    result = report(
        ReportConfig(
            folders=[str(out)],
            out=str(tmp_path / "report"),
            kinetics=kinetics,
            pair=("none", "2 nats"),
        ),
        QUIET,
    )
    assert result["figures"] == [
        "accuracy", "ablation-1", "figure-3-filters", "figure-4-filters", "figure-5-features", "figure-6-entropy",
        "figure-7-classes", "curves-student",
    ]  # fmt: skip
    page = tmp_path / "report" / "report.html"
    text = page.read_text(encoding="utf-8")
    row = (
        r"<tr><td><a[^>]*>([^<]*)</a></td><td>([^<]*)</td><td class=\"number\">(\d\.\d+)</td></tr>"
    )
    rows = {(name, state): float(number) for name, state, number in re.findall(row, text)}
    assert rows["inflated", "inflated, before finetuning"] == 0
    assert rows["inflated", "inflated, after finetuning"] > 0.5
    assert rows["student of 2 nats, seed 0", "distilled"] > 0.5
    assert (
        "From top to bottom: a distilled student before any finetuning; an inflated network before its finetuning; "
        "the same after its finetuning." in text
    )
    assert "<td>inflate:resnet18.pth</td>" in text
    pair = "none, hmdb51, split 1, seed 0", "2 nats, hmdb51, split 1, seed 0"
    assert f"{pair[0]} on the left, {pair[1]} on the right" in text
    assert f"Top 1 of {pair[0]} minus that of {pair[1]}, by class" in text
    anchors = re.findall(r'href="#([^"]+)"', text)
    assert all(len(re.findall(rf'id="?{anchor}"?[ >]', text)) == 1 for anchor in anchors)
    assert len(re.findall(r'Initialised from <a href="#run-\d+">student of', text)) == 6
    assert len(re.findall(r'Trained on <a href="#store-1">', text)) == 6
    for width in (1280, 400):
        opened = open_page(page, width)
        assert opened.holds()
        assert opened.images == len(result["figures"])


@pytest.mark.slow
def test_a_report_is_made_without_torch(out: Path, tmp_path: Path) -> None:
    """The import of torch takes seconds; only weights of Kinetics require it."""
    words = (
        "import sys; from distinit.stages.report import report; from distinit.pipeline.common.console import Console; "
        "from distinit.stages.options import ReportConfig; "
        "report(ReportConfig(folders=sys.argv[1:2], out=sys.argv[2]), Console(quiet=True)); "
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", words, str(out), str(tmp_path / "report")]
    subprocess.run(command, check=True, timeout=300)
    drawn = {path.stem for path in (tmp_path / "report" / "figures").glob("*.svg")}
    assert {"figure-3-filters", "figure-5-features", "figure-6-entropy"} <= drawn


@pytest.mark.slow
def test_missing_data_are_reported_and_not_drawn(out: Path, tmp_path: Path) -> None:
    alone = out / "students" / "10"
    config = yaml.safe_load((alone / "config.yaml").read_text())
    config["train-student"]["store"] = str(tmp_path / "gone.zarr")
    (alone / "config.yaml").write_text(yaml.safe_dump(config))
    assert report(ReportConfig(folders=[str(alone)], out=str(tmp_path / "report")), QUIET)[
        "figures"
    ] == [
        "figure-3-filters",
        "curves-student",
    ]
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "gone.zarr" in text
    assert "No other network of this kind is among the runs" in text
    assert read_run(alone, "x").hours == 2.0
    flow = torch.zeros(45, 2, 1, 7, 7)
    for weights in ({"fc.weight": torch.zeros(2)}, {"stem.0.weight": flow}):
        torch.save(weights, tmp_path / "other.pt")
        with pytest.raises(UsageError, match=r"other\.pt: has no stem\.0\.weight"):
            report(
                ReportConfig(
                    folders=[str(alone)],
                    out=str(tmp_path / "report"),
                    kinetics=str(tmp_path / "other.pt"),
                ),
                QUIET,
            )
