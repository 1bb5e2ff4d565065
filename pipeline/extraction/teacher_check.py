"""Before a store grows: are the teachers those whose rows it holds?

A store knows a teacher by its identity and by its fingerprint. One that was made without a
fingerprint gets it once a sample of its rows was computed again from the videos and came out as
stored.
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
from ..teachers.probes import examine, says_probabilities
from ..teachers.teacher import Teacher, TeacherOutput
from ..video.geometry import View
from ..video.pool.decode_pool import DecodePool
from .planner import StorePlan
from .replay import Replay, Rerun, other_file, replay_segment

log = logging.getLogger(__name__)

VIDEOS, ROWS = 8, 32  # of a sample: videos, and rows of each


def examine_teachers(teachers: Sequence[Teacher]) -> dict[str, Fingerprint]:
    """Return the fingerprints by name in the store; warn of a teacher that outputs probabilities.

    Raises:
        TeacherError: See `probes.examine`.
    """
    fingerprints = {}
    for teacher in teachers:
        found = examine(teacher)
        fingerprints.update({teacher.store_names[output]: f for output, f in found.items()})
        if "logits" in found and says_probabilities(found["logits"].values):
            log.warning(
                f"teacher {teacher.name!r} seems to give probabilities, not logits (none is negative, and rows have "
                f"one sum or none is above 1): their softmax is nearly uniform over the {len(teacher.classes)} "
                f"classes, and a student learns next to nothing; let it return what goes into its softmax or sigmoid"
            )
    return fingerprints


def check_fingerprints(writer: StoreWriter, found: Mapping[str, Fingerprint]) -> list[str]:
    """Raise StoreMismatchError for a teacher that is not the store's.

    Returns the names of those for which the store has no fingerprint.
    """
    without = []
    for name, fingerprint in found.items():
        if name not in writer.index.teachers:
            continue
        node = read_fingerprint(LocalFiles(writer.root), name)
        if node is None:
            without.append(name)
        else:
            where = str(writer.root)
            Fingerprint.parse(node, f"{where}/teachers/{name}").check(fingerprint, name, where)
    return without


def prove_teachers(
    plan: StorePlan,
    without: Sequence[str],
    teachers: Mapping[str, TeacherOutput],
    found: Mapping[str, Fingerprint],
    accepted: Sequence[str],
    pool: DecodePool,
    views: Sequence[View],
) -> None:
    """Add fingerprints for the teachers `without`, after computing a sample of their rows again.

    Raises:
        StoreMismatchError: Rows differ, or no video is left to compute one from, unless the teacher
            is among the `accepted`.
    """
    if not without:
        return
    store = TargetStore.open(plan.writer.root)
    for name in without:
        if not len(store.committed_rows(name)):
            basis: dict[str, Any] = {"kind": "new"}
        else:
            replay = Replay(store, name, teachers[name])
            videos, why = _replay_sample(
                plan, replay, pool, views.index(teachers[name].teacher.view)
            )
            if videos:
                basis = {"kind": "rows", "rows": replay.rows, "videos": videos}
                log.info(
                    f"{name}: {replay.rows} rows of {videos} videos computed again as stored; fingerprint added"
                )
            elif name in accepted:
                basis = {"kind": "accepted"}
                log.warning(
                    f"teacher {name!r}: accepted as the store's without a check ({why}); fingerprint added"
                )
            else:
                raise StoreMismatchError(
                    f"{store.name}: teacher {name!r} has no fingerprint there, and none of its rows can be computed "
                    f"again to see that it is the same ({why}); give its videos as a SOURCE, or --accept-teacher {name}"
                )
        plan.writer.add_fingerprint(name, replace(found[name], basis=basis).record())


def _replay_sample(plan: StorePlan, replay: Replay, pool: DecodePool, view: int) -> tuple[int, str]:
    """Compute some rows of some videos again.

    Returns the number of videos, and why the last one could not be used.

    Raises:
        StoreMismatchError: A row differs from the stored one.
    """
    store, used, why = replay.store, 0, "no video has rows"
    index = store.index
    stored = [
        s
        for s in np.flatnonzero(index.live & (index.state == OK) & (index.rows > 0)).tolist()
        if replay.has(s)
    ]
    first = {int(index.video[s]): s for s in reversed(stored)}  # one segment of each video
    rerun = Rerun(replay.teacher, [replay])
    for video in np.random.default_rng(0).permutation(list(first)).tolist():
        path = plan.path(video)
        unusable = other_file(store, video, path) or replay_segment(
            store, first[video], path, pool, {rerun: view}, ROWS
        )
        rerun.run()
        if wrong := replay.findings(path):
            raise StoreMismatchError(
                f"{store.name}: teacher {replay.name!r} has no fingerprint there, and its stored rows are not what it "
                f"computes now: {wrong[0].what}; the teacher or the reading of that video has changed "
                f"(`distinit targets verify --frames` compares the frames of all)"
            )
        if unusable:
            why = f"{len(first) - used} of its videos cannot be used, such as {path}: {unusable}"
        else:
            used += 1
        if used == VIDEOS:
            break
    return used, why
