"""Verify a store against its videos, and against its teachers.

`deep_check` decodes a sample of videos and runs the teachers again. Frames must be the same, by
index and pts; outputs are compared as in `replay`. Teachers of the store that are outputs of one
model are computed in one forward pass, as they were.

`frame_check` compares the frames of all videos, without a teacher: it finds those that version 0.1
read in a different order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..common.devices import resolve_device
from ..common.errors import DistInitError, UsageError
from ..common.processes import cores
from ..common.progress_bar import progress_bar
from ..store import layout as fmt
from ..store.frame_views import check_views, output_keys
from ..store.reader import TargetStore, check_video_roots
from ..store.verify import Finding
from ..store.writer import StoreWriter
from ..teachers.engines import use_engine
from ..teachers.fingerprint import Fingerprint
from ..teachers.probes import fingerprints
from ..teachers.recorded import load_spec, recorded_spec
from ..teachers.teacher import TeacherOutput
from ..teachers.teacher_options import OUTPUTS, TeacherSpec
from ..video.geometry import View
from ..video.packets import Timeline
from ..video.pool.decode_pool import DecodePool, Failed
from .planner import video_columns
from .replay import Replay, Rerun, other_file, replay_segment
from .teacher_runner import batch_threads


def deep_check(
    store: TargetStore,
    count: int,
    *,
    seed: int = 0,
    video_roots: Mapping[str, str] | None = None,
    weights: Mapping[str, str] | None = None,
    allow_teachers: Collection[str] = (),
    device: str = "auto",
) -> tuple[list[Finding], dict[str, Any]]:
    """Check `count` random videos; return the findings and what was compared.

    Args:
        store: The store.
        count: Number of videos.
        seed: Of the choice of videos.
        video_roots: Corpus → its current folder.
        weights: Teacher in the store → its weights file, which is also that of other outputs of
            its model that are not named.
        allow_teachers: Teachers whose code may run and whose weights may be downloaded although the
            store names them (`load_spec`).
        device: Where teachers run.

    Raises:
        UsageError: The store does not have a corpus or teacher that is named.
        DeviceError: There is no such device.
    """
    check_video_roots(store, video_roots or {})
    for name in weights or {}:
        store.teacher(name)
    findings: list[Finding] = []
    place = resolve_device(device)
    models = [
        loaded
        for model in _models(store, weights or {}, findings)
        for loaded in _load(store, model, allow_teachers, place, findings)
    ]
    order = list(store.teachers).index
    findings.sort(key=lambda finding: order(str(finding.teacher)))
    replays = sorted((x for outputs in models for x in outputs), key=lambda x: order(x.name))
    chosen = np.sort(np.random.default_rng(seed).permutation(store.usable([]))[:count])
    views = list(dict.fromkeys(replay.teacher.view for replay in replays))
    with (
        DecodePool(processes=1, views=views) as pool,
        # With the threads of an extraction, on which the last bits depend.
        batch_threads(place, cores()) as threads,
        ThreadPoolExecutor(threads if place.type == "cpu" else 1) as runners,
        progress_bar("decoding again", len(chosen), "videos") as bar,
    ):
        reruns = [Rerun(outputs[0].teacher, outputs, runners, threads + 1) for outputs in models]
        view_of = {rerun: views.index(rerun.teacher.view) for rerun in reruns}
        for video in chosen.tolist():
            path = store.video_path(video, video_roots)
            if other := other_file(store, video, path):
                findings.append(Finding(f"{path}: {other}"))
            for segment in () if other else store.segments(video).tolist():
                if wrong := replay_segment(store, segment, path, pool, view_of):
                    findings.append(Finding(f"{path}: {wrong}", int(store.index.shard[segment])))
            for rerun in reruns:
                rerun.run()
            for replay in replays:
                findings += replay.findings(path)
            bar.advance(1)
    return findings, {
        "videos": len(chosen),
        "seed": seed,
        "teachers": {r.name: r.summary() for r in replays},
    }


@dataclass(frozen=True)
class _Model:
    """A model by its outputs' names in the store, and its weights file if one was given."""

    specs: Mapping[str, TeacherSpec]
    precision: str
    engine: str
    file: str | None

    @property
    def spec(self) -> TeacherSpec:
        """How all of its outputs are asked for at once."""
        specs = list(self.specs.values())
        views = dict.fromkeys(view for spec in specs for view in spec.views)
        asked = {output for spec in specs for output in spec.outputs}
        outputs = tuple(output for output in OUTPUTS if output in asked)
        return specs[0].model_copy(update={"outputs": outputs, "views": check_views(views)})


def _models(
    store: TargetStore, weights: Mapping[str, str], findings: list[Finding]
) -> list[_Model]:
    """Return the models of which the store's teachers are outputs.

    findings: receives the teachers of which the store does not say how they were asked for.
    """
    groups: dict[tuple[str, ...], dict[str, TeacherSpec]] = {}
    for name, record in store.teachers.items():
        where = f"{store.name}/teachers/{name}/zarr.json"
        node = fmt.read_nodes(store.files, "teachers", [name])[name]
        try:
            spec = recorded_spec(node.get("provenance", {}), where)
        except DistInitError as error:
            findings.append(Finding(str(error), None, name))
            continue
        run = str(record.run.get("precision")), str(record.run.get("engine", "torch"))
        key = (*run, spec.model_dump_json(exclude={"outputs", "views"}))
        groups.setdefault(key, {})[name] = spec
    models = []
    for (precision, engine, _), specs in groups.items():
        given = next((weights[name] for name in specs if name in weights), None)
        files = {name: weights.get(name, given) for name in specs}
        for file in dict.fromkeys(files.values()):
            of_file = {name: spec for name, spec in specs.items() if files[name] == file}
            models.append(_Model(of_file, precision, engine, file))
    return models


def _load(
    store: TargetStore,
    model: _Model,
    allowed: Collection[str],
    device: torch.device,
    findings: list[Finding],
) -> list[list[Replay]]:
    """Load a model and return its outputs as one group.

    Load each output by itself if all together are refused.

    findings: receives teachers that cannot be loaded, or are others than those of the store.
    """
    try:
        teacher = load_spec(model.spec, weights=model.file, trusted=allowed)
        teacher.to(device, model.precision)
        use_engine(teacher, "auto", model.engine)
    except DistInitError as error:
        if len(model.specs) == 1:
            findings.append(Finding(str(error), None, *model.specs))
            return []
        return [
            outputs
            for name, spec in model.specs.items()
            for outputs in _load(
                store, replace(model, specs={name: spec}), allowed, device, findings
            )
        ]
    replays = []
    for name, spec in model.specs.items():
        of = TeacherOutput(teacher, output_keys(spec.outputs, spec.views)[-1])
        try:
            _check_identity(store, of, name)
            replays.append(Replay(store, name, of))
            if (node := store.fingerprint(name)) is not None:
                found = fingerprints(teacher)[of.key]
                Fingerprint.parse(node, f"teachers/{name}").check(found, name, store.name)
        except DistInitError as error:
            findings.append(Finding(str(error), None, name))
    return [replays] if replays else []


def _check_identity(store: TargetStore, of: TeacherOutput, name: str) -> None:
    """Raise UsageError if an output is another one than that of the store's teacher."""
    record = store.teachers[name]
    if record.classes and len(of.teacher.classes) == len(record.classes):
        of.teacher.classes = list(record.classes)  # their names may have come from a file
    here = of.identity()
    for key, recorded in record.identity.items():
        if here.get(key) != recorded:
            raise UsageError(
                f"not the teacher that was extracted: its {key} is {here.get(key)}, was {recorded}"
            )


def frame_check(
    store: TargetStore, video_roots: Mapping[str, str] | None = None
) -> dict[int, list[Finding]]:
    """Return findings for each video whose file lacks the frames, or the size, of the store.

    video_roots: corpus → its current folder. Most files are only read, not decoded.

    Raises:
        UsageError: The store does not have a corpus.
    """
    check_video_roots(store, video_roots or {})
    findings: dict[int, list[Finding]] = {}
    readable: list[int] = []
    for video in store.usable([]).tolist():
        path = store.video_path(video, video_roots)
        if other := other_file(store, video, path):
            findings[video] = [Finding(f"{path}: {other}")]
        else:
            readable.append(video)
    view = View(resize=(16, 16))  # nothing is rendered
    with (
        DecodePool(processes=cores(), views=[view]) as pool,
        progress_bar("reading videos", len(readable), "videos") as bar,
    ):
        paths = [store.video_path(video, video_roots) for video in readable]
        for video, path, read in zip(readable, paths, pool.timelines(paths), strict=True):
            if isinstance(read, Failed):
                findings[video] = [Finding(f"{path}: {read.reason}")]
            elif off := list(_compare(store, video, path, *read)):
                findings[video] = off
            bar.advance(1)
    return findings


def _compare(
    store: TargetStore, video: int, path: str, timeline: Timeline, size: tuple[int, int]
) -> Iterator[Finding]:
    """Return one finding per shard that holds frames which the file does not have."""
    segments = store.segments(video).tolist()
    stored_size = int(store.column("width")[video]), int(store.column("height")[video])
    if size != stored_size:
        seen = f"shown at {size[0]}x{size[1]} pixels, the teachers saw {stored_size[0]}x{stored_size[1]}"
        yield from (Finding(f"{path}: {seen}", int(store.index.shard[s])) for s in segments)
        return
    record = store.video(video)
    if record.time_base not in (None, timeline.time_base):
        yield Finding(
            f"{path}: its clock ticks every {timeline.time_base} s, stored is {record.time_base} s"
        )
    chosen = store.sampling.select(timeline.pts, timeline.key, timeline.time_base)
    for s in segments:
        first, end = int(store.index.first[s]), int(store.index.end[s])
        here = chosen[(chosen >= first) & (chosen < (len(timeline) if end < 0 else end))]
        rows = store.rows_of_segments(np.array([s]))
        index, pts = store.read_table("index", rows), store.read_table("pts", rows)
        # A damaged frame has no row.
        in_file = np.isin(index, here)
        if not in_file.all() or not np.array_equal(timeline.pts[index], pts):
            yield Finding(
                f"{path}: other frames (index or pts) than are stored", int(store.index.shard[s])
            )
        elif len(index) < len(here) and s not in store.index.note:
            yield Finding(
                f"{path}: {len(here)} frames are sampled, {len(index)} are stored",
                int(store.index.shard[s]),
            )


def identify_again(
    store: TargetStore,
    writer: StoreWriter,
    videos: list[int],
    video_roots: Mapping[str, str] | None = None,
) -> None:
    """Write the identity of the files of `videos` again, if the teachers saw the same files."""
    paths = [store.video_path(video, video_roots) for video in videos]
    with DecodePool(processes=1, views=[View(resize=(16, 16))]) as pool:
        probes = dict(zip(videos, pool.probe(paths), strict=True))
    same = {
        v: probe
        for v, probe in probes.items()
        if probe.error is None and probe.digest == store.digest(v)
    }
    if same:
        writer.identify(list(same), video_columns(list(same.values()), store.sampling))
