"""The test of stage three, shared by `finetune` and `evaluate`: predictions of every test video,
then the numbers, recomputed from the file."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from ..clips.clip_options import ClipView
from ..common.distributed import SINGLE_PROCESS, Ranks
from ..common.errors import UsageError
from ..common.files import write_whole
from ..common.progress_bar import progress_bar
from ..common.run_dir import PARTIAL_PREDICTIONS, PREDICTIONS, RESULT
from ..common.tables import Column, Table
from ..common.weights import state_sha256
from ..students.student import Student
from ..training.precision import pick_workers, torch_threads
from .evaluation_options import EvaluationOptions
from .labelled_clips import EvaluationClips
from .labels import Labels
from .listing import short_dataset
from .metrics import MEASURES
from .predictions import Predictions, PredictionsError, metrics_from_file
from .predictor import predict
from .run_labels import labels_digest

log = logging.getLogger(__name__)


def evaluate_student(
    student: Student,
    labels: Labels,
    *,
    view: ClipView,
    length: int,
    options: EvaluationOptions,
    device: torch.device,
    out: Path,
    threads: int | None = None,
    fresh: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Writes `out`/predictions.h5 and returns metrics_from_file of it; shows the table and the
    unread videos.

    threads: of torch on a CPU, on which the last bits of scores depend; default by the machine.
    What an interrupted call has predicted with the same weights is kept, and what a finished one
    has unless `fresh`. Of several ranks each tests its share of the videos; rank 0 writes, and all
    return the metrics.
    """
    predictions = _nothing_yet(student, labels, view, length, options)
    final, partial = out / PREDICTIONS, out / PARTIAL_PREDICTIONS

    def begin() -> list[int]:
        out.mkdir(parents=True, exist_ok=True)
        if fresh or not _adopt(predictions, final):
            _adopt(predictions, partial)
        return predictions.pending

    pending = ranks.on_main(begin)
    mine = pending[ranks.rank :: ranks.world]
    workers = pick_workers(options.workers, device)
    channels = student.options.channels
    dataset = EvaluationClips(
        labels,
        labels.test,
        view,
        length=length,
        clips=options.clips,
        crops=options.crops,
        channels=channels,
        order=options.frames,
    )
    with (
        torch_threads(threads, workers, device),
        progress_bar("testing", len(mine), "video") as bar,
    ):
        ranks.on_all_ranks(
            lambda: predict(
                student,
                dataset,
                predictions,
                videos=mine,
                batch_size=options.batch_size,
                workers=workers,
                device=device,
                done=bar.advance,
                save=lambda: predictions.write(partial) if ranks.is_main else None,
            )
        )
    for rows in ranks.gather(predictions.rows(mine)) if ranks.world > 1 else ():
        predictions.take(rows)

    def finish() -> dict[str, Any]:
        if pending or fresh or not final.exists():
            predictions.write(final)
        partial.unlink(missing_ok=True)
        metrics = metrics_from_file(final)
        title = f"{short_dataset(labels.dataset)}, split {labels.split}"
        show_metrics(title, len(labels.classes), metrics)
        return metrics

    return ranks.on_main(finish)


def _nothing_yet(
    student: Student, labels: Labels, view: ClipView, length: int, options: EvaluationOptions
) -> Predictions:
    """Predictions of all test videos, pending, with what they are held against: protocol, labels
    and weights."""
    return Predictions.empty(
        labels.classes,
        [video.path for video in labels.test],
        [video.label for video in labels.test],
        options.clips * options.crops,
        protocol=_protocol(view, length, options) | _read_from(labels),
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
    """RUN/result.json, whole or not at all."""
    write_whole(out / RESULT, json.dumps(result, indent=1, allow_nan=False).encode())


def refuse_other(out: Path, mine: dict[str, str | list[str]]) -> None:
    """UsageError where `out` has a result.json that is not of these runs and of this kind: `run`,
    `fused`, or `a` and `b`. Or where it has none, but predictions that no test of ours wrote before
    it was interrupted."""
    try:
        held = json.loads((out / RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        _refuse_foreign_predictions(out)
        return
    except (OSError, ValueError, RecursionError):
        held = None

    def places(found: Any) -> list[str]:
        return [
            os.path.realpath(str(path)) for path in (found if isinstance(found, list) else [found])
        ]

    theirs = (
        {key: held[key] for key in ("run", "fused", "a", "b") if key in held}
        if isinstance(held, dict)
        else {}
    )
    if {key: places(found) for key, found in theirs.items()} != {
        key: places(found) for key, found in mine.items()
    }:
        what = ", ".join(f"{key}={found}" for key, found in theirs.items())
        raise UsageError(
            f"--out {out} holds another result, of {what or 'something else'}; choose another --out"
        )


def _refuse_foreign_predictions(out: Path) -> None:
    for path in (out / PREDICTIONS, out / PARTIAL_PREDICTIONS):
        try:
            if path.exists():
                Predictions.read(path)
        except PredictionsError as error:
            raise UsageError(
                f"--out {out}: its {path.name} is no file of distinit; choose another --out"
            ) from error


def _protocol(view: ClipView, length: int, options: EvaluationOptions) -> dict[str, Any]:
    frame = view.frame_view()
    return {
        **options.protocol(),
        "starts": f"floor(i * (n - {length}) / {max(options.clips - 1, 1)})",
        "frames": length,
        "stride": 1,
        "short_videos": "last frame repeated",
        "resize": frame.resize,
        "interpolation": frame.interpolation,
        "crop": f"{'center' if options.crops == 1 else 'begin, middle and end of the longer side'} {view.size}",
        "precision": "fp32",
        "unread_videos": "wrong",
    }


def _read_from(labels: Labels) -> dict[str, Any]:
    """What the test clips are decoded from, where that is not the videos themselves."""
    return {} if labels.copies is None else {"copies": dict(labels.copies.options)}


def _adopt(predictions: Predictions, path: Path) -> int:
    """How many videos an earlier file of the same weights and labels has already; a damaged one has
    none."""
    try:
        return predictions.adopt(Predictions.read(path)) if path.exists() else 0
    except PredictionsError:
        return 0


def show_metrics(title: str, classes: int, metrics: dict[str, Any]) -> None:
    """The table of accuracies, what its intervals rest on, and the videos that were not read."""
    title = f"{title}: {metrics['videos']} test videos"
    table = Table(
        title, [Column("accuracy, %"), Column("value", True), Column("95 % interval", True)]
    )
    for name, shown in MEASURES.items():
        if name not in metrics:
            continue
        value, low, high = (100 * metrics[name][end] for end in ("value", "low", "high"))
        table.add(shown, f"{value:.1f}", f"{low:.1f} – {high:.1f}")
    table.notes.append(intervals_note(metrics["intervals"]))
    if classes <= 5:
        table.notes.append(
            f"Top 5 of {classes} classes is always right where the video could be read."
        )
    log.info(table)
    for found in metrics["failed"]:
        log.warning(f"counted as wrong, could not be read: {found['video']}: {found['reason']}")
    for found in metrics["damaged"]:
        log.warning(f"tested, but damaged: {found['video']}: {found['reason']}")


def intervals_note(intervals: dict[str, Any]) -> str:
    """What the bootstrap resampled, as a sentence."""
    if intervals["resampled"] == "sources":
        return f"Intervals: bootstrap over the {intervals['units']} sources that the videos were cut from."
    return "Intervals: bootstrap over videos; too narrow where several show the same recording (no column `source`)."
