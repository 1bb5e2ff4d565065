"""Record the videos that a run of `finetune` was trained on, and count test videos among them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..common.errors import CheckpointError, LabelsError
from ..common.run_dir import SEEN_VIDEOS
from ..corpus.sources import escape_path
from ..students.initialization import student_file
from ..students.student_files import read_meta
from ..training.seen_videos import SEEN_BY_INIT, SEEN_BY_RUN, SeenVideos
from .labels import Labels
from .predictions import require_classes
from .run_labels import RunLabels, labels_digest

log = logging.getLogger(__name__)


def record_and_compare(
    init: str, labels: Labels, run_dir: Path, *, resumed: bool
) -> dict[str, int]:
    """Write RUN/labels.json and RUN/seen_videos.npz, and count test videos that the run has seen.

    Args:
        init: The initialisation of the run.
        labels: Its data set.
        run_dir: Its folder.
        resumed: Whether the run is resumed; existing files are then not changed.

    Returns:
        Number of test videos for each way in which the run has seen them.
    """
    if unknown := unknown_videos(init):
        log.warning(unknown)
    seen_videos = SeenVideos.read(run_dir) if resumed else None
    if seen_videos is None:
        # Options and epochs are chosen by the validation side, so that its videos count as seen.
        videos = [*labels.train, *labels.val]
        trained = SeenVideos.from_digests(
            [labels.digest(v) for v in videos], [labels.absolute(v) for v in videos]
        )
        seen_videos = trained.with_init_videos(_seen_by(init))
        seen_videos.write(run_dir)
    if not resumed or RunLabels.read(run_dir) is None:
        RunLabels.from_labels(labels).write(run_dir)
    counts = overlap(
        seen_videos,
        labels,
        init_seen="the videos that the initialisation was trained on",
        training=False,
    )
    return {"test_videos_of_shared_sources": labels.shared_sources, **counts}


def refuse_overlap(init: str, labels: Labels) -> None:
    """Refuse labels whose test videos, or recordings of them, are among those trained on.

    Raises:
        LabelsError: A test video or its recording was trained on, or the initialisation has no
            record of its videos.
    """
    if unknown := unknown_videos(init):
        raise LabelsError(f"--strict: {unknown}")
    if labels.shared_sources:
        raise LabelsError(
            f"--strict: {labels.dataset}: {labels.shared_sources} of {len(labels.test)} test videos are cut from "
            "recordings of training videos"
        )
    seen_videos = _seen_by(init)
    if seen_videos is None:
        return
    rows = seen_videos.rows(
        [labels.digest(video) for video in labels.test],
        [labels.absolute(video) for video in labels.test],
    )
    shared = [video for video, matches in zip(labels.test, rows, strict=True) if matches]
    if shared:
        raise LabelsError(
            f"--strict: {len(shared)} of {len(labels.test)} test videos are among those that {init} was trained on, "
            f"the first: {escape_path(shared[0].path)}; "
            f"train it with --exclude {labels.dataset} --split {labels.split}"
        )


def unknown_videos(init: str) -> str:
    """Return a sentence about an initialisation without a record of its videos, else "".

    Third-party weights, such as those of torchvision, have no such record and return "".
    """
    file = student_file(init)
    if file is None or read_meta(file) is None or _seen_by(init) is not None:
        return ""
    return (
        f"{init} has no {SEEN_VIDEOS}, so it is unknown whether it was trained on test videos; give the run folder "
        "that train-student wrote"
    )


def overlap(
    seen_videos: SeenVideos, labels: Labels, *, init_seen: str, training: bool = True
) -> dict[str, int]:
    """Count test videos that a run or its initialisation has seen, and warn of them.

    Args:
        seen_videos: The videos that a run and its initialisation have seen.
        labels: The data set of the test.
        init_seen: Name of the videos of the initialisation in messages.
        training: Whether to count the run's own training videos too.

    Returns:
        `test_videos_seen_by_init`, and with `training` also `test_videos_trained_on`.
    """
    stages = {SEEN_BY_INIT: ("test_videos_seen_by_init", init_seen)}
    if training:
        stages[SEEN_BY_RUN] = ("test_videos_trained_on", "those that the run was trained on")
    digests = [labels.digest(video) for video in labels.test]
    stages_of_videos = seen_videos.stages(
        digests, [labels.absolute(video) for video in labels.test]
    )
    counts = {}
    for stage, (key, videos) in stages.items():
        shared = [
            escape_path(video.path)
            for video, video_stages in zip(labels.test, stages_of_videos, strict=True)
            if stage in video_stages
        ]
        counts[key] = len(shared)
        if shared:
            log.warning(
                f"{len(shared)} of {len(labels.test)} test videos are among {videos}, the first: {shared[0]}; "
                "accuracies are not those of unseen videos"
            )
    return counts


def require_same_labels(
    run: Path, saved: dict[str, Any] | None, labels: Labels, remedy: str
) -> None:
    """Check that labels are those that a run was trained on.

    Args:
        run: The folder of the run.
        saved: Identity of its checkpoint, if it has one.
        labels: The labels to check. They are accepted if the run has no record of its labels.
        remedy: What the user can do, for the message.

    Raises:
        CheckpointError: The labels differ.
    """
    if saved is not None:
        require_classes(
            labels.classes,
            saved["classes"],
            origin=labels.dataset,
            expected_origin=f"the checkpoint in {run}",
        )
    record = RunLabels.read(run)
    digest = record.digest if record is not None else saved["labels"] if saved is not None else None
    if digest is None or digest == labels_digest(labels):
        return
    difference = (
        "different videos, sides or labels" if record is None else record.difference(labels)
    )
    raise CheckpointError(
        f"{labels.dataset}, split {labels.split}: not the labels that {run} was trained on ({difference}); {remedy}"
    )


def _seen_by(init: str) -> SeenVideos | None:
    """Return the videos that an initialisation has seen; None if it has no record of them."""
    file = student_file(init)
    if file is None:
        return None
    path = Path(file)
    return SeenVideos.read(path if path.is_dir() else path.parent)
