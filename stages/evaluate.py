"""Test a finetuned student: ten clips a video, predictions of each, and the numbers recomputed from them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field

from ..pipeline.config import Options
from ..pipeline.devices import resolve_device
from ..pipeline.errors import CheckpointError, UsageError
from ..pipeline.evaluation.classification import HEAD
from ..pipeline.evaluation.dataset import EvaluationClips
from ..pipeline.evaluation.labels import Labels, load_labels
from ..pipeline.evaluation.predict import predict
from ..pipeline.evaluation.predictions import Predictions, PredictionsError, metrics_from_file, require_classes
from ..pipeline.reporting.accuracy import MEASURES
from ..pipeline.reporting.runs import short_dataset
from ..pipeline.reporting.tables import Column, Table
from ..pipeline.students.export import load_student
from ..pipeline.students.student import Student
from ..pipeline.training.checkpoint import write_atomically
from ..pipeline.training.device import pick_workers, torch_threads
from ..pipeline.video.transforms import ClipView
from ..pipeline.weights import state_sha256
from .screen import Screen

PREDICTIONS = "predictions.h5"
RESULT = "result.json"


class EvaluationOptions(Options):
    """How videos are tested. None of it changes a score by more than rounding, `clips` aside."""

    clips: int = Field(default=10, ge=1, description="clips a test video, evenly spread")
    batch_size: int = Field(default=32, ge=1, description="clips a forward pass")
    workers: int | None = Field(default=None, ge=0, description="loader processes; default by the machine")


class EvaluateConfig(Options):
    """Everything that `distinit evaluate` can be told. What is left out is that of the run."""

    run: str = Field(description="a folder written by distinit finetune")
    dataset: str | None = Field(default=None, description="csv:FILE or folder:DIR; default the run's")
    split: int | None = Field(default=None, ge=1, description="default the run's")
    videos: str | None = Field(default=None, description="folder of copies; default the run's; null: the videos")
    out: str | None = Field(default=None, description="folder to write; default the run's own")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    test: EvaluationOptions | None = None


def evaluate(config: EvaluateConfig, screen: Screen) -> dict[str, Any]:
    """Tests a finished run again and writes predictions.h5 and the metrics in result.json.

    Raises UsageError (not a finetuned run; another data set without `out`), CheckpointError (another class
    list, no model), LabelsError, PredictionsError.
    """
    run = Path(config.run)
    used = _run_config(run)
    if (config.dataset is not None or config.split is not None) and config.out is None:
        raise UsageError("another --dataset or --split needs --out, for the run keeps the predictions of its own")
    options = config.test or EvaluationOptions.model_validate(used.get("test", {}))
    if options.clips != used.get("test", {}).get("clips", options.clips) and config.out is None:
        raise UsageError(
            f"test.clips={options.clips} needs --out, for the run keeps the predictions of its own protocol"
        )
    videos = config.videos if "videos" in config.model_fields_set else used.get("videos")
    labels = load_labels(config.dataset or used["dataset"], config.split or used.get("split"), videos)
    student = load_student(run / "model.safetensors")
    require_classes(labels.classes, student.meta.classes.get(HEAD, []), here=labels.dataset, there=str(run))
    view = ClipView.model_validate(
        {key: used["clips"].get(key) for key in ClipView.model_fields if key in used["clips"]}
    )
    out = Path(config.out or run)
    metrics = evaluate_student(
        student,
        labels,
        view=view,
        length=student.meta.clip_length,
        options=options,
        device=resolve_device(config.device),
        out=out,
        screen=screen,
        fresh=True,
    )
    before = json.loads((out / RESULT).read_text(encoding="utf-8")) if (out / RESULT).exists() else {}
    found = {"run": str(run), "dataset": labels.dataset, "split": labels.split, "predictions": str(out / PREDICTIONS)}
    write_result(out, {**before, **found, "metrics": metrics})
    return {**found, "metrics": metrics}


def evaluate_student(
    student: Student,
    labels: Labels,
    *,
    view: ClipView,
    length: int,
    options: EvaluationOptions,
    device: torch.device,
    out: Path,
    screen: Screen,
    fresh: bool = False,
) -> dict[str, Any]:
    """Writes `out`/predictions.h5 and returns metrics_from_file of it; shows the table and the unread videos.

    What an earlier call, interrupted or not, has predicted with the same weights is kept unless `fresh`.
    """
    predictions = Predictions.empty(
        labels.classes,
        [video.path for video in labels.test],
        [video.label for video in labels.test],
        options.clips,
        protocol=_protocol(view, length, options.clips) | _read_from(labels),
        identity={
            "dataset": labels.dataset,
            "split": labels.split,
            "labels": labels_digest(labels),
            "weights": state_sha256(student.state_dict()),
            "student": student.options.model_dump(mode="json"),
        },
    )
    final, partial = out / PREDICTIONS, out / "predictions.partial.h5"
    kept = 0 if fresh else _adopt(predictions, final) or _adopt(predictions, partial)
    workers = pick_workers(options.workers, device)
    channels = student.options.channels
    dataset = EvaluationClips(labels, labels.test, view, length=length, clips=options.clips, channels=channels)
    with torch_threads(None, workers, device), screen.progress("testing", len(predictions.videos), "video") as bar:
        if kept:
            bar.advance(kept)
        predict(
            student,
            dataset,
            predictions,
            batch_size=options.batch_size,
            workers=workers,
            device=device,
            done=bar.advance,
            save=lambda: predictions.write(partial),
        )
    if kept < len(predictions.videos) or not final.exists():
        out.mkdir(parents=True, exist_ok=True)
        predictions.write(final)
    partial.unlink(missing_ok=True)
    metrics = metrics_from_file(final)
    _show(labels, metrics, screen)
    return metrics


def write_result(out: Path, result: dict[str, Any]) -> None:
    """RUN/result.json, whole or not at all."""
    write_atomically(out / RESULT, json.dumps(result, indent=1, allow_nan=False).encode())


def labels_digest(labels: Labels) -> str:
    """sha256 of classes and of both lists, in hex: the same labels wherever the files lie."""
    content = [list(labels.classes), [list(v) for v in labels.train], [list(v) for v in labels.test]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _protocol(view: ClipView, length: int, clips: int) -> dict[str, Any]:
    frame = view.frame_view()
    return {
        "clips": clips,
        "starts": f"floor(i * (n - {length}) / {max(clips - 1, 1)})",
        "frames": length,
        "stride": 1,
        "short_videos": "last frame repeated",
        "resize": frame.resize,
        "interpolation": frame.interpolation,
        "crop": f"center {view.size}",
        "scores": "mean over clips of the softmax",
        "precision": "fp32",
        "unread_videos": "wrong",
    }


def _read_from(labels: Labels) -> dict[str, Any]:
    """What the test clips are decoded from, where that is not the videos themselves."""
    return {} if labels.copies is None else {"copies": dict(labels.copies.options)}


def _adopt(predictions: Predictions, path: Path) -> int:
    """How many videos an earlier file of the same weights and labels has already; a damaged one has none."""
    try:
        return predictions.adopt(Predictions.read(path)) if path.exists() else 0
    except PredictionsError:
        return 0


def _run_config(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{run} is not a run of distinit finetune: no readable config.yaml") from error
    if not isinstance(content, dict) or not isinstance(content.get("finetune"), dict):
        raise UsageError(f"{run} is not a run of distinit finetune: its config.yaml has no section 'finetune'")
    if not (run / "model.safetensors").exists():
        raise CheckpointError(f"{run} holds no model.safetensors: the training is not finished")
    return dict(content["finetune"])


def _show(labels: Labels, metrics: dict[str, Any], screen: Screen) -> None:
    title = f"{short_dataset(labels.dataset)}, split {labels.split}: {metrics['videos']} test videos"
    table = Table(title, [Column("accuracy, %"), Column("value", True), Column("95 % interval", True)])
    for name, shown in MEASURES.items():
        value, low, high = (100 * metrics[name][end] for end in ("value", "low", "high"))
        table.add(shown, f"{value:.1f}", f"{low:.1f} – {high:.1f}")
    if len(labels.classes) <= 5:
        table.notes.append(f"Top 5 of {len(labels.classes)} classes is always right where the video could be read.")
    screen.table(table.to_rich())
    for found in metrics["failed"]:
        screen.warn(f"counted as wrong, could not be read: {found['video']}: {found['reason']}")
    for found in metrics["damaged"]:
        screen.warn(f"tested, but damaged: {found['video']}: {found['reason']}")
