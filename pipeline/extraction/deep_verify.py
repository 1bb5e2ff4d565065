"""Verify a store against its videos and teachers: decode a sample and run the teachers again.

Frames must be the same, by index and pts; outputs are compared as in `replay`. Teachers of the
store that are outputs of one model are computed in one forward pass, as they were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..common.devices import resolve_device
from ..common.errors import DistInitError, UsageError, VideoError
from ..common.processes import cores
from ..common.progress_bar import progress_bar
from ..store import layout as fmt
from ..store.frame_views import check_views, output_keys
from ..store.index import OK
from ..store.reader import TargetStore, check_video_roots
from ..store.verify import Finding
from ..teachers.engines import use_engine
from ..teachers.fingerprint import Fingerprint
from ..teachers.probes import fingerprints
from ..teachers.recorded import load_spec, recorded_spec
from ..teachers.teacher import TeacherOutput
from ..teachers.teacher_options import OUTPUTS, TeacherSpec
from ..video.container import digest
from ..video.pool.decode_pool import DecodeJob, DecodePool, Done, Failed
from .replay import Replay, Rerun
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
    videos = np.flatnonzero((store.video_state == OK) & (store.row_counts > 0))
    chosen = np.sort(np.random.default_rng(seed).permutation(videos)[:count])
    views = list(dict.fromkeys(replay.teacher.view for replay in replays))
    with (
        DecodePool(processes=1, views=views) as pool,
        # With the threads of an extraction, on which the last bits depend.
        batch_threads(place, cores()) as threads,
        ThreadPoolExecutor(threads if place.type == "cpu" else 1) as runners,
        progress_bar("decoding again", len(chosen), "videos") as bar,
    ):
        reruns = [Rerun(outputs[0].teacher, outputs, runners, threads + 1) for outputs in models]
        for video in chosen.tolist():
            path = store.video_path(video, video_roots)
            findings += _check_video(
                store, video, path, pool, {r: views.index(r.teacher.view) for r in reruns}
            )
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


def _check_video(
    store: TargetStore, video: int, path: str, pool: DecodePool, view_of: Mapping[Rerun, int]
) -> Iterator[Finding]:
    """Decode a video again; feeds the teachers."""
    try:
        here = digest(path)
    except VideoError as error:
        yield Finding(f"{path}: {error}")
        return
    if here != store.digest(video):
        yield Finding(
            f"{path}: changed, its digest is {here}, the teachers saw {store.digest(video)}"
        )
        return
    for s in store.segments(video).tolist():
        shard, row, count = (
            int(x[s]) for x in (store.index.shard, store.index.row, store.index.rows)
        )
        rows = np.arange(row, row + count)
        stored = store.read_table("index", rows), store.read_table("pts", rows)
        end = int(store.index.end[s])
        job = DecodeJob(
            s, path, store.sampling, int(store.index.first[s]), None if end < 0 else end
        )
        done, differs = 0, False
        for event in pool.stream([job]):
            if isinstance(event, Failed):
                yield Finding(f"{path}: {event.reason}", shard)
            elif isinstance(event, Done):
                if done != count and not differs:
                    yield Finding(f"{path}: {done} frames are sampled, {count} are stored", shard)
            elif not differs:
                at = slice(done, done + len(event.index))
                differs = not (
                    np.array_equal(stored[0][at], event.index)
                    and np.array_equal(stored[1][at], event.pts)
                )
                if differs:
                    yield Finding(
                        f"{path}: other frames (index or pts) are sampled than are stored", shard
                    )
                    continue
                done = at.stop
                for rerun, view in view_of.items():
                    rerun.feed(event.images[view], rows[at], s)
