"""The test protocol of `finetune` and `evaluate`: predict every test video, compute metrics."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from ..clips.clip_options import ClipView
from ..common.distributed import SINGLE_PROCESS, Ranks
from ..common.documents import Form, read_json
from ..common.errors import SourceError, UsageError
from ..common.files import write_whole
from ..common.progress_bar import progress_bar
from ..common.run_dir import PARTIAL_PREDICTIONS, PREDICTIONS, RESULT
from ..common.streams import printable
from ..common.tables import Column, Table
from ..common.weights import state_sha256
from ..students.student import Student
from ..training.hardware import pick_workers, torch_threads
from .evaluation_options import EvaluationOptions
from .labelled_clips import EvaluationClips
from .labels import Labels
from .listing import short_dataset
from .metrics import MEASURES, brackets
from .predictions import Predictions, PredictionsError, metrics_from_file
from .predictor import predict
from .run_labels import labels_digest

log = logging.getLogger(__name__)


def evaluate_student(
    student: Student,
    labels: Labels,
    *,
    view: ClipView,
    clip_frames: int,
    options: EvaluationOptions,
    device: torch.device,
    out: Path,
    threads: int | None = None,
    fresh: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Test a student, write OUT/predictions.h5, and show the metrics and the unreadable videos.

    Each rank tests a share of the videos; rank 0 writes the files.

    Args:
        student: The model to test.
        labels: Data set; its test side is used.
        view: Resizing and cropping of clips.
        clip_frames: Frames per clip.
        options: The protocol.
        device: Where to compute.
        out: The folder to write. Predictions of an interrupted call with the same weights and
            protocol are reused.
        threads: Number of threads of torch on a CPU, which affects the last bits of scores; by
            default depending on the machine.
        fresh: Whether to repeat a finished test.
        ranks: The processes of a distributed test.

    Returns:
        The metrics, on every rank; see `metrics_from_file`.
    """
    predictions = _pending_predictions(student, labels, view, clip_frames, options)
    final, partial = out / PREDICTIONS, out / PARTIAL_PREDICTIONS

    def start() -> list[int]:
        out.mkdir(parents=True, exist_ok=True)
        if fresh or not _resume(predictions, final):
            _resume(predictions, partial)
        return predictions.pending

    pending = ranks.on_main(start)
    workers = pick_workers(options.workers, device)
    share = pending[ranks.rank :: ranks.world]
    dataset = _test_clips(student, labels, view, clip_frames, options)

    def score() -> None:
        with (
            torch_threads(threads, workers, device),
            progress_bar("testing", len(share), "videos") as bar,
        ):
            predict(
                student,
                dataset,
                predictions,
                videos=share,
                batch_size=options.batch_size,
                workers=workers,
                device=device,
                advance=bar.advance,
                save=lambda: predictions.write(partial) if ranks.is_main else None,
            )

    ranks.on_all_ranks(score)
    for rows in ranks.gather(predictions.export_rows(share)) if ranks.world > 1 else ():
        predictions.merge_rows(rows)

    def finish() -> dict[str, Any]:
        if pending or fresh or not final.exists():
            predictions.write(final)
        partial.unlink(missing_ok=True)
        metrics = metrics_from_file(final)
        title = f"{short_dataset(labels.dataset)}, split {labels.split}"
        show_metrics(title, len(labels.classes), metrics)
        return metrics

    return ranks.on_main(finish)


def _test_clips(
    student: Student, labels: Labels, view: ClipView, clip_frames: int, options: EvaluationOptions
) -> EvaluationClips:
    """Return the dataset of the clips of the test side."""
    return EvaluationClips(
        labels,
        labels.test,
        view,
        clip_frames=clip_frames,
        clips=options.clips,
        crops=options.crops,
        channels=student.options.channels,
        order=options.frames,
    )


def _pending_predictions(
    student: Student, labels: Labels, view: ClipView, clip_frames: int, options: EvaluationOptions
) -> Predictions:
    """Create tables in which every test video is pending, with the protocol and the identity."""
    return Predictions.empty(
        labels.classes,
        [video.path for video in labels.test],
        [video.label for video in labels.test],
        options.clips * options.crops,
        protocol=_protocol(labels, view, clip_frames, options),
        identity={
            "dataset": labels.dataset,
            "split": labels.split,
            "labels": labels_digest(labels),
            "weights": state_sha256(student.state_dict()),
            "student": student.options.model_dump(mode="json"),
        },
        sources=[video.source for video in labels.test],
        features=student.feature_size,
    )


def write_result(out: Path, result: dict[str, Any]) -> None:
    """Write OUT/result.json atomically."""
    write_whole(out / RESULT, json.dumps(result, indent=1, allow_nan=False).encode())


def count_looks(run_dir: Path, *, is_new_test: bool = True) -> int:
    """Return the number of tests of a run, including the one that the next result is for.

    Args:
        run_dir: The folder of the run, whose last result has the number until then.
        is_new_test: False if the next result repeats the test of the last one, as when a finished
            run is resumed.
    """
    try:
        recorded = read_json(run_dir / RESULT, Form).get("test_looks", 0)
    except SourceError:
        # A damaged result is about to be replaced.
        recorded = 0
    looks = recorded if isinstance(recorded, int) else 0
    return looks + 1 if is_new_test or not looks else looks


def check_result_dir(out: Path, runs: dict[str, str | list[str]]) -> None:
    """Check that a command overwrites no result of other runs, and no third-party predictions.

    Args:
        out: The folder to write.
        runs: The tested runs under their keys in result.json: `run`, `fused`, or `a` and `b`.

    Raises:
        UsageError: OUT/result.json records other runs or another command; or it does not exist,
            and a predictions file was not written by distinit.
    """
    try:
        stored = json.loads((out / RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        _check_predictions(out)
        return
    except (OSError, ValueError, RecursionError):
        stored = None
    stored = stored if isinstance(stored, dict) else {}
    stored = {key: stored[key] for key in ("run", "fused", "a", "b") if key in stored}

    def real_paths(runs: dict[str, Any]) -> dict[str, list[str]]:
        lists = {key: each if isinstance(each, list) else [each] for key, each in runs.items()}
        return {key: [os.path.realpath(str(p)) for p in paths] for key, paths in lists.items()}

    if real_paths(stored) != real_paths(runs):
        owner = ", ".join(f"{key}={value}" for key, value in stored.items())
        raise UsageError(
            f"--out {out}: its {RESULT} is that of {owner or 'another program'}; choose another --out"
        )


def _check_predictions(out: Path) -> None:
    for path in (out / PREDICTIONS, out / PARTIAL_PREDICTIONS):
        try:
            if path.exists():
                Predictions.read(path)
        except PredictionsError as error:
            raise UsageError(
                f"--out {out}: its {path.name} was not written by distinit; choose another --out"
            ) from error


def _protocol(
    labels: Labels, view: ClipView, clip_frames: int, options: EvaluationOptions
) -> dict[str, Any]:
    """Describe the test. The keys and texts are stored, and compared when a test is resumed."""
    frame = view.frame_view()
    return {
        **options.protocol(),
        "starts": f"floor(i * (n - {clip_frames}) / {max(options.clips - 1, 1)})",
        "frames": clip_frames,
        "stride": 1,
        "short_videos": "last frame repeated",
        "resize": frame.resize,
        "interpolation": frame.interpolation,
        "crop": f"{'center' if options.crops == 1 else 'begin, middle and end of the longer side'} {view.size}",
        "precision": "fp32",
        "unread_videos": "wrong",
        # Version 0.1 stored no order. Without one for ordered frames, its protocols stay equal.
        **({} if options.frames == "ordered" else {"frame_order": options.frames}),
        **({} if labels.copies is None else {"copies": dict(labels.copies.options)}),
    }


def _resume(predictions: Predictions, path: Path) -> int:
    """Copy the results of an earlier file, and return their number; 0 if the file is damaged."""
    try:
        return predictions.resume_from(Predictions.read(path)) if path.exists() else 0
    except PredictionsError:
        return 0


def show_metrics(title: str, classes: int, metrics: dict[str, Any]) -> None:
    """Show the accuracies, the unit of their intervals, and the unreadable and truncated videos."""
    title = printable(f"{title}: {metrics['videos']} test videos")
    table = Table(
        title, [Column("accuracy, %"), Column("value", True), Column("95 % interval", True)]
    )
    for name, label in MEASURES.items():
        if name not in metrics:
            continue
        value, low, high = (metrics[name][end] for end in ("value", "low", "high"))
        table.add(label, f"{100 * value:.1f}", brackets(low, high))
    table.notes.append(intervals_note(metrics["intervals"]))
    if classes <= 5:
        table.notes.append(f"With {classes} classes, top 5 is correct for every readable video.")
    log.info(table)
    for row in metrics["failed"]:
        log.warning(f"unreadable, counted as wrong: {row['video']}: {row['reason']}")
    for row in metrics["damaged"]:
        log.warning(f"truncated, tested as far as it can be read: {row['video']}: {row['reason']}")


def intervals_note(intervals: dict[str, Any]) -> str:
    """Describe what the bootstrap resampled, in one sentence."""
    if intervals["resampled"] == "sources":
        return f"Intervals: bootstrap over the {intervals['units']} recordings that the videos were cut from."
    return "Intervals: bootstrap over videos; too narrow if several show one recording (no column `source`)."
