"""Check, before a store grows, that the teachers are those that computed its rows.

A store identifies a teacher by its identity and its fingerprint. For a teacher without a stored
fingerprint, a sample of its rows is computed again from the videos; if they are equal to the stored
rows, the fingerprint is added.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..common.errors import StoreMismatchError
from ..store.index import OK
from ..store.layout import read_fingerprint
from ..store.reader import TargetStore
from ..store.storage import LocalFiles
from ..store.writer import StoreWriter
from ..teachers.fingerprint import Fingerprint
from ..teachers.probes import examine, look_like_probabilities
from ..teachers.teacher import Teacher, TeacherOutput
from ..video.geometry import View
from ..video.pool.decode_pool import DecodePool
from .planner import StorePlan
from .replay import Replay, Rerun, file_difference, replay_segment

log = logging.getLogger(__name__)

SAMPLE_VIDEOS, SAMPLE_ROWS = 8, 32
"""Size of a sample: number of videos, and of rows per video."""


def examine_teachers(teachers: Sequence[Teacher]) -> dict[str, Fingerprint]:
    """Return the fingerprints by name in the store; warn about a teacher of probabilities.

    Raises:
        TeacherError: The outputs of a teacher cannot be cached; see `probes.examine`.
    """
    fingerprints = {}
    for teacher in teachers:
        by_output = examine(teacher)
        for output, fingerprint in by_output.items():
            fingerprints[teacher.store_names[output]] = fingerprint
        if "logits" in by_output and look_like_probabilities(by_output["logits"].values):
            log.warning(
                f"teacher {teacher.name!r} seems to return probabilities instead of logits (none is negative, and "
                f"all rows have the same sum or none is above 1); their softmax is nearly uniform over the "
                f"{len(teacher.classes)} classes, and a student learns next to nothing from it; let the teacher "
                f"return the input of its softmax or sigmoid"
            )
    return fingerprints


def check_fingerprints(writer: StoreWriter, fingerprints: Mapping[str, Fingerprint]) -> list[str]:
    """Return the names of the teachers for which the store has no fingerprint.

    Raises:
        StoreMismatchError: A fingerprint differs from that of the store.
    """
    unproved = []
    for name, fingerprint in fingerprints.items():
        if name not in writer.index.teachers:
            continue
        node = read_fingerprint(LocalFiles(writer.root), name)
        if node is None:
            unproved.append(name)
        else:
            root = str(writer.root)
            Fingerprint.parse(node, f"{root}/teachers/{name}").check(fingerprint, name, root)
    return unproved


def prove_teachers(
    plan: StorePlan,
    unproved: Sequence[str],
    outputs: Mapping[str, TeacherOutput],
    fingerprints: Mapping[str, Fingerprint],
    accept_teachers: Sequence[str],
    pool: DecodePool,
    views: Sequence[View],
) -> None:
    """Add the fingerprints of teachers after computing a sample of their rows again.

    Args:
        plan: The store and its videos.
        unproved: The names of the teachers for which the store has no fingerprint.
        outputs: The outputs of the teachers, by name in the store.
        fingerprints: The current fingerprints, by name in the store.
        accept_teachers: Teachers that the user accepts if no video is left to check them with.
        pool: Decodes the videos.
        views: The views of `pool`.

    Raises:
        StoreMismatchError: Rows differ, or no video is left to compute one from and the teacher is
            not accepted.
    """
    if not unproved:
        return
    store = TargetStore.open(plan.writer.root)
    for name in unproved:
        if not len(store.committed_rows(name)):
            basis: dict[str, Any] = {"kind": "new"}
        else:
            replay = Replay(store, name, outputs[name])
            num_videos, reason = _replay_sample(
                plan, replay, pool, views.index(outputs[name].teacher.view)
            )
            if num_videos:
                basis = {"kind": "rows", "rows": replay.num_rows, "videos": num_videos}
                log.info(
                    f"{name}: {replay.num_rows} rows of {num_videos} videos computed again are equal to those "
                    f"stored; fingerprint added"
                )
            elif name in accept_teachers:
                basis = {"kind": "accepted"}
                log.warning(
                    f"teacher {name!r}: accepted as the store's without a check ({reason}); fingerprint added"
                )
            else:
                raise StoreMismatchError(
                    f"{store.name}: the store has no fingerprint of teacher {name!r}, and none of its rows can be "
                    f"computed again to check that it is the same ({reason}); give its videos as a SOURCE, or "
                    f"--accept-teacher {name}"
                )
        plan.writer.add_fingerprint(name, replace(fingerprints[name], basis=basis).record())


def _replay_sample(plan: StorePlan, replay: Replay, pool: DecodePool, view: int) -> tuple[int, str]:
    """Compute a sample of a teacher's rows again.

    Args:
        plan: The store and its videos.
        replay: The teacher.
        pool: Decodes the videos.
        view: The index of the teacher's view among those of `pool`.

    Returns:
        The number of videos that could be used, and the reason why others could not.

    Raises:
        StoreMismatchError: A row differs from the stored one.
    """
    store, num_used, reason = replay.store, 0, "no video has rows"
    index = store.index
    segments = [
        s
        for s in np.flatnonzero(index.live & (index.state == OK) & (index.rows > 0)).tolist()
        if replay.has(s)
    ]
    # One segment per video is enough: the first.
    segment_of = {int(index.video[s]): s for s in reversed(segments)}
    rerun = Rerun(replay.teacher, [replay])
    for video in np.random.default_rng(0).permutation(list(segment_of)).tolist():
        path = plan.path(video)
        problem = file_difference(store, video, path) or replay_segment(
            store, segment_of[video], path, pool, {rerun: view}, SAMPLE_ROWS
        )
        rerun.run()
        if findings := replay.findings(path):
            raise StoreMismatchError(
                f"{store.name}: the store has no fingerprint of teacher {replay.name!r}, and its stored rows differ "
                f"from those that it computes now: {findings[0].what}; the teacher or the reading of that video has "
                f"changed (`distinit targets verify --frames` compares the frames of all)"
            )
        if problem:
            num_unusable = len(segment_of) - num_used
            reason = f"{num_unusable} of its videos cannot be used, such as {path}: {problem}"
        else:
            num_used += 1
        if num_used == SAMPLE_VIDEOS:
            break
    return num_used, reason
