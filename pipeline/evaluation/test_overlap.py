"""What a run of `finetune` was trained on, recorded in the run, and how much of it is among the
test videos."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..common.errors import CheckpointError
from ..corpus.sources import escape_path
from ..students.initialization import student_file
from ..training.seen_videos import INIT, OWN, SeenVideos
from .labels import Labels
from .predictions import require_classes
from .run_labels import RunLabels, labels_digest

log = logging.getLogger(__name__)


def record_and_compare(init: str, labels: Labels, run_dir: Path, *, again: bool) -> dict[str, int]:
    """Write RUN/labels.json and RUN/seen_videos.npz, unless a resume finds them; returns the test
    videos that the run knows in another way, and warns of each."""
    seen = SeenVideos.read(run_dir) if again else None
    if seen is None:
        own = SeenVideos.of(
            [labels.digest(v) for v in labels.train], [labels.absolute(v) for v in labels.train]
        )
        seen = own.after(_seen_by(init))
        seen.write(run_dir)
    if not again or RunLabels.read(run_dir) is None:
        RunLabels.of(labels).write(run_dir)
    found = overlap(
        seen,
        labels,
        init_seen="the videos that the initialisation was trained on",
        own=False,
    )
    return {"test_videos_of_shared_sources": labels.shared_sources, **found}


def overlap(
    seen: SeenVideos, labels: Labels, *, init_seen: str, own: bool = True
) -> dict[str, int]:
    """How many test videos the initialisation has seen, and with `own` the run's own training; a
    warning for each that is not 0. init_seen: what messages call the videos of the
    initialisation."""
    wanted = {INIT: ("test_videos_seen_by_init", init_seen)}
    if own:
        wanted[OWN] = ("test_videos_trained_on", "those that the run was trained on")
    places = [labels.absolute(video) for video in labels.test]
    stages = seen.stages([labels.digest(video) for video in labels.test], places)
    found = {}
    for stage, (name, what) in wanted.items():
        known = [
            escape_path(v.path) for v, by in zip(labels.test, stages, strict=True) if stage in by
        ]
        found[name] = len(known)
        if known:
            log.warning(
                f"{len(known)} of {len(labels.test)} test videos are among {what}, the first: {known[0]}; "
                f"accuracies are not those of unseen videos"
            )
    return found


def require_own_labels(
    run: Path, saved: dict[str, Any] | None, labels: Labels, remedy: str
) -> None:
    """CheckpointError where labels are not those that a run was trained on, which its folder or its
    checkpoint's identity (`saved`) says; of a run that says neither nothing is known."""
    if saved is not None:
        require_classes(
            labels.classes, saved["classes"], here=labels.dataset, there=f"the checkpoint in {run}"
        )
    record = RunLabels.read(run)
    theirs = record.digest if record is not None else saved["labels"] if saved is not None else None
    if theirs is None or theirs == labels_digest(labels):
        return
    how = record.difference(labels) if record is not None else "other videos, sides or labels"
    raise CheckpointError(
        f"{labels.dataset}, split {labels.split}: not the labels that {run} was trained on ({how}); {remedy}"
    )


def _seen_by(init: str) -> SeenVideos | None:
    """What the run of an initialisation saw; None where it is no run or has no record."""
    file = student_file(init)
    if file is None:
        return None
    path = Path(file)
    return SeenVideos.read(path if path.is_dir() else path.parent)
