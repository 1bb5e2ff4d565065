"""Verify a store against its videos and its teachers.

`deep_check` decodes a sample of videos and runs the teachers again. Frames must be equal by index
and pts; outputs are compared as in `replay`. Teachers of the store that are outputs of one model
are computed in one forward pass, as in the extraction.

`frame_check` compares the frames of all videos without running a teacher. It finds videos that
version 0.1 read in a different order.
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
from .machine import views_of
from .planner import video_columns
from .replay import Replay, Rerun, file_difference, replay_segment
from .teacher_runner import batch_threads

# A pool needs a view, also where no frame is rendered.
UNUSED_VIEW = View(resize=(16, 16))


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
    """Check `count` random videos; return the findings and a summary of the comparison.

    Args:
        store: The store.
        count: Number of videos.
        seed: Seed of the choice of videos.
        video_roots: Corpus → its current folder.
        weights: Teacher in the store → its weights file, which is also used for those outputs of
            its model that are not named.
        allow_teachers: Teachers of the store whose code may run and whose weights may be downloaded
            (`load_spec`).
        device: The device of the teachers.

    Raises:
        UsageError: The store does not have one of the named corpora or teachers.
        DeviceError: There is no such device.
    """
    check_video_roots(store, video_roots or {})
    for name in weights or {}:
        store.teacher(name)
    findings: list[Finding] = []
    torch_device = resolve_device(device)
    models = [
        loaded
        for model in _models(store, weights or {}, findings)
        for loaded in _load(store, model, allow_teachers, torch_device, findings)
    ]
    position = list(store.teachers).index
    findings.sort(key=lambda finding: position(str(finding.teacher)))
    replays = sorted(
        (replay for outputs in models for replay in outputs),
        key=lambda replay: position(replay.name),
    )
    videos = np.sort(np.random.default_rng(seed).permutation(store.usable([]))[:count])
    views = views_of([replay.teacher for replay in replays])
    with (
        DecodePool(processes=1, views=views) as pool,
        # As many threads as in an extraction, since the last bits depend on their number.
        batch_threads(torch_device, cores()) as num_threads,
        ThreadPoolExecutor(num_threads if torch_device.type == "cpu" else 1) as executor,
        progress_bar("decoding again", len(videos), "videos") as bar,
    ):
        reruns = [
            Rerun(outputs[0].teacher, outputs, executor, num_threads + 1) for outputs in models
        ]
        view_of = {rerun: views.index(rerun.teacher.view) for rerun in reruns}
        for video in videos.tolist():
            path = store.video_path(video, video_roots)
            if problem := file_difference(store, video, path):
                findings.append(Finding(f"{path}: {problem}"))
            for segment in () if problem else store.segments(video).tolist():
                if difference := replay_segment(store, segment, path, pool, view_of):
                    shard = int(store.index.shard[segment])
                    findings.append(Finding(f"{path}: {difference}", shard))
            for rerun in reruns:
                rerun.run()
            for replay in replays:
                findings += replay.findings(path)
            bar.advance(1)
    return findings, {
        "videos": len(videos),
        "seed": seed,
        "teachers": {replay.name: replay.summary() for replay in replays},
    }


@dataclass(frozen=True)
class _Model:
    """A model of which teachers of the store are outputs.

    Args:
        specs: The specs of the teachers by their names in the store.
        precision: The recorded precision.
        engine: The recorded engine.
        weights_file: The weights file of the command line, if it names one.
    """

    specs: Mapping[str, TeacherSpec]
    precision: str
    engine: str
    weights_file: str | None

    @property
    def spec(self) -> TeacherSpec:
        """The spec of all of its outputs together."""
        specs = list(self.specs.values())
        views = dict.fromkeys(view for spec in specs for view in spec.views)
        stored = {output for spec in specs for output in spec.outputs}
        outputs = tuple(output for output in OUTPUTS if output in stored)
        return specs[0].model_copy(update={"outputs": outputs, "views": check_views(views)})


def _models(
    store: TargetStore, weights: Mapping[str, str], findings: list[Finding]
) -> list[_Model]:
    """Return the models of which the store's teachers are outputs.

    Args:
        store: The store.
        weights: Teacher in the store → its weights file.
        findings: Receives the teachers whose spec the store does not record.
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
        key = (
            str(record.run.get("precision")),
            str(record.run.get("engine", "torch")),
            spec.model_dump_json(exclude={"outputs", "views"}),
        )
        groups.setdefault(key, {})[name] = spec
    models = []
    for (precision, engine, _), specs in groups.items():
        default_file = next((weights[name] for name in specs if name in weights), None)
        files = {name: weights.get(name, default_file) for name in specs}
        for file in dict.fromkeys(files.values()):
            file_specs = {name: spec for name, spec in specs.items() if files[name] == file}
            models.append(_Model(file_specs, precision, engine, file))
    return models


def _load(
    store: TargetStore,
    model: _Model,
    allow_teachers: Collection[str],
    device: torch.device,
    findings: list[Finding],
) -> list[list[Replay]]:
    """Load a model and return its outputs as one group.

    If the model cannot be loaded with all outputs, load each output by itself, as a group of its
    own.

    Args:
        store: The store.
        model: The model.
        allow_teachers: See `deep_check`.
        device: The device of the teachers.
        findings: Receives teachers that cannot be loaded, or differ from those of the store.
    """
    try:
        teacher = load_spec(model.spec, weights=model.weights_file, trusted=allow_teachers)
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
                store, replace(model, specs={name: spec}), allow_teachers, device, findings
            )
        ]
    replays = []
    for name, spec in model.specs.items():
        output = TeacherOutput(teacher, output_keys(spec.outputs, spec.views)[-1])
        try:
            _check_identity(store, output, name)
            replays.append(Replay(store, name, output))
            if (node := store.fingerprint(name)) is not None:
                fingerprint = fingerprints(teacher)[output.key]
                Fingerprint.parse(node, f"teachers/{name}").check(fingerprint, name, store.name)
        except DistInitError as error:
            findings.append(Finding(str(error), None, name))
    return [replays] if replays else []


def _check_identity(store: TargetStore, output: TeacherOutput, name: str) -> None:
    """Raise UsageError if the identity of an output is not that of the store's teacher."""
    record = store.teachers[name]
    # The class names may come from a file that is not read here.
    if record.classes and len(output.teacher.classes) == len(record.classes):
        output.teacher.classes = list(record.classes)
    identity = output.identity()
    for key, recorded in record.identity.items():
        if identity.get(key) != recorded:
            raise UsageError(
                f"not the teacher that was extracted: its {key} is {identity.get(key)}, was {recorded}"
            )


def frame_check(
    store: TargetStore, video_roots: Mapping[str, str] | None = None
) -> dict[int, list[Finding]]:
    """Return findings for each video whose file differs in frames or size from the store.

    Most files are only read, not decoded.

    Args:
        store: The store.
        video_roots: Corpus → its current folder.

    Raises:
        UsageError: The store does not have one of the named corpora.
    """
    check_video_roots(store, video_roots or {})
    findings: dict[int, list[Finding]] = {}
    readable: list[int] = []
    for video in store.usable([]).tolist():
        path = store.video_path(video, video_roots)
        if problem := file_difference(store, video, path):
            findings[video] = [Finding(f"{path}: {problem}")]
        else:
            readable.append(video)
    with (
        DecodePool(processes=cores(), views=[UNUSED_VIEW]) as pool,
        progress_bar("reading videos", len(readable), "videos") as bar,
    ):
        paths = [store.video_path(video, video_roots) for video in readable]
        for video, path, result in zip(readable, paths, pool.timelines(paths), strict=True):
            if isinstance(result, Failed):
                findings[video] = [Finding(f"{path}: {result.reason}")]
            elif differences := list(_compare(store, video, path, *result)):
                findings[video] = differences
            bar.advance(1)
    return findings


def _compare(
    store: TargetStore, video: int, path: str, timeline: Timeline, size: tuple[int, int]
) -> Iterator[Finding]:
    """Yield a finding for each shard with frames that the file does not have."""
    segments = store.segments(video).tolist()
    stored_size = int(store.column("width")[video]), int(store.column("height")[video])
    if size != stored_size:
        text = f"shown at {size[0]}x{size[1]} pixels, the teachers saw {stored_size[0]}x{stored_size[1]}"
        yield from (Finding(f"{path}: {text}", int(store.index.shard[s])) for s in segments)
        return
    record = store.video(video)
    if record.time_base not in (None, timeline.time_base):
        yield Finding(
            f"{path}: its clock ticks every {timeline.time_base} s, stored is {record.time_base} s"
        )
    sampled = store.sampling.select(timeline.pts, timeline.key, timeline.time_base)
    for s in segments:
        first, end = int(store.index.first[s]), int(store.index.end[s])
        expected = sampled[(sampled >= first) & (sampled < (len(timeline) if end < 0 else end))]
        rows = store.rows_of_segments(np.array([s]))
        index, pts = store.read_table("index", rows), store.read_table("pts", rows)
        # A sampled frame that cannot be decoded has no row, so that rows may be fewer.
        in_file = np.isin(index, expected)
        if not in_file.all() or not np.array_equal(timeline.pts[index], pts):
            yield Finding(
                f"{path}: other frames (index or pts) than are stored", int(store.index.shard[s])
            )
        elif len(index) < len(expected) and s not in store.index.note:
            yield Finding(
                f"{path}: {len(expected)} frames are sampled, {len(index)} are stored",
                int(store.index.shard[s]),
            )


def identify_again(
    store: TargetStore,
    writer: StoreWriter,
    videos: list[int],
    video_roots: Mapping[str, str] | None = None,
) -> None:
    """Probe `videos` again, and write the identities of files that the teachers saw."""
    paths = [store.video_path(video, video_roots) for video in videos]
    with DecodePool(processes=1, views=[UNUSED_VIEW]) as pool:
        probes = dict(zip(videos, pool.probe(paths), strict=True))
    unchanged = {
        video: probe
        for video, probe in probes.items()
        if probe.error is None and probe.digest == store.digest(video)
    }
    if unchanged:
        writer.identify(list(unchanged), video_columns(list(unchanged.values()), store.sampling))
