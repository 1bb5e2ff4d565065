"""Merge finished stores: tables are concatenated, shard files are copied bit by bit.

Videos, segments and shards of each part keep their order, and their ids continue those of the parts
before. So the only change in a shard is the ids of its videos: `frames/video` is written again, and
every other file is copied and its digest checked. The result is planned as a whole before the first
shard is copied, and each shard has its commit, as in an extraction. An interrupted merge is a store
with pending videos, and the same command copies the missing shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import StoreError, StoreMismatchError, UsageError
from ..common.files import write_whole
from ..common.locks import locked
from ..corpus.sources import unescape_path
from . import layout as fmt
from .digests import digest_bytes
from .reader import TargetStore
from .staging import (
    FramesPart,
    HashPart,
    ShardResult,
    StagedFile,
    TeacherPart,
    new_staging,
    stage_array,
)
from .storage import LocalFiles
from .writer import StoreWriter, same_attributes


@dataclass(frozen=True)
class PlacedPart:
    """A part with the first video, segment and shard that it has in the result.

    `corpus` maps the part's corpora to those of the result.
    """

    store: TargetStore
    video: int
    segment: int
    shard: int
    corpus: np.ndarray


@contextmanager
def reading(store: TargetStore) -> Iterator[None]:
    """Lock a local store against writers; StoreError if one is active."""
    if not isinstance(store.files, LocalFiles):
        yield
        return
    busy = StoreError(f"{store.name}: another process is writing this store")
    with locked(store.files.root, busy, shared=True):
        yield


def check_parts(stores: Sequence[TargetStore], *, allow_different_numerics: bool = False) -> None:
    """Check that stores can be merged.

    Sampling, shard size and teachers must be equal, and for each teacher its identity, encoding,
    classes and, unless different numerics are allowed, run. No store and no video (a path in a
    corpus) may occur twice.

    Raises:
        StoreMismatchError: Two stores do not fit each other; the message names both.
        UsageError: A store occurs twice.
        StoreError: A store is unfinished.
    """
    first = stores[0]
    for i, store in enumerate(stores):
        if any(
            store.attributes["store_id"] == other.attributes["store_id"] for other in stores[:i]
        ):
            raise UsageError(f"{store.name}: is given twice, or is a copy of another part")
        _same(first, store, "sampling", first.attributes["sampling"], store.attributes["sampling"])
        rows, other = first.attributes["shard_rows"], store.attributes["shard_rows"]
        if rows != other:
            raise StoreMismatchError(
                f"the parts do not fit: shard_rows is {rows} in {first.name}, {other} in {store.name}; "
                f"`distinit targets export {store.name} --out NEW.zarr --shard-rows {rows}` makes one that does"
            )
        _same(first, store, "teachers", sorted(first.teachers), sorted(store.teachers))
        for name, a in first.teachers.items():
            b = store.teachers[name]
            for key in (
                "identity",
                "output",
                "encoding",
                "classes",
                "width",
                "basis_digests",
                *(() if allow_different_numerics else ("run",)),
            ):
                _same(first, store, f"teacher {name!r}: {key}", getattr(a, key), getattr(b, key))
        _check_finished(store)
    _check_disjoint(stores)


def place(stores: Sequence[TargetStore]) -> tuple[list[PlacedPart], list[dict[str, str]]]:
    """Return the parts with their positions in the result, and the result's corpora.

    A corpus that several parts share has the first part's folder.
    """
    corpora: list[dict[str, str]] = []
    placed: list[PlacedPart] = []
    video = segment = shard = 0
    for store in stores:
        index = store.index
        for entry in index.corpora:
            if entry["name"] not in [merged["name"] for merged in corpora]:
                corpora.append(entry)
        names = [merged["name"] for merged in corpora]
        corpus = np.array([names.index(entry["name"]) for entry in index.corpora], np.int32)
        placed.append(PlacedPart(store, video, segment, shard, corpus))
        video, segment, shard = (
            video + index.n_videos,
            segment + len(index.video),
            shard + index.n_shards,
        )
    return placed, corpora


def plan_merge(
    writer: StoreWriter,
    placed: Sequence[PlacedPart],
    corpora: list[dict[str, str]],
    fingerprints: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the tables and teachers of the result, unless an interrupted merge has written them."""
    if not writer.index.n_videos:
        columns: dict[str, Any] = {}
        for spec in fmt.video_specs():
            parts = [
                p.corpus[p.store.column("corpus")]
                if spec.name == "corpus" and len(p.corpus)
                else p.store.column(spec.name)
                for p in placed
            ]
            columns[spec.name] = np.concatenate(parts)
        if len(columns["path"]):
            writer.add_videos(columns, corpora)
    if not len(writer.index.video):
        tables = [_segments(p) for p in placed]
        segments = {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}
        last = placed[-1]
        if len(segments["video"]):
            writer.add_placed(segments, last.shard + last.store.index.n_shards)
    first = placed[0].store
    nodes = fmt.read_nodes(first.files, "teachers", first.teachers)
    for name, record in first.teachers.items():
        writer.add_teacher(name, record.classes, nodes[name], codec=record.codec, allow_different_numerics=True,
                           fingerprint=fingerprints.get(name))  # fmt: skip


def copy_shards(
    writer: StoreWriter,
    placed: Sequence[PlacedPart],
    advance: Callable[[int], Any] = lambda n: None,
) -> int:
    """Copy and commit every shard that the result lacks; return their number.

    Raises:
        StoreError: A file of a part differs from its commit; the message names it.
    """
    num_copied = 0
    for part in placed:
        for shard in range(part.store.index.n_shards):
            num_copied += _copy_shard(writer, part, shard)
            advance(1)
    return num_copied


def _copy_shard(writer: StoreWriter, part: PlacedPart, shard: int) -> bool:
    """Copy and commit the tables of a shard that the result lacks; return whether it lacked any."""
    index, target = part.store.index, part.shard + shard
    is_new = target not in writer.index.frame_commits
    if is_new:
        folder, node = new_staging(writer.root, target), index.frame_commits[shard]
        files = _copy_files(folder, part, node, shard, target)
        # In the result the videos of all parts but the first have other ids.
        if part.video:
            rows = shard * index.shard_rows + np.arange(node["rows"].sum())
            video = part.store.read_table("video", rows) + part.video
            spec = fmt.frame_specs()[0]
            files = [file for file in files if not file.final.startswith(spec.path)]
            files = stage_array(folder, spec, target, video, index.shard_rows) + files
        frames = FramesPart(
            segment=(node["segment"] + part.segment).tolist(),
            first_row=node["first_row"].tolist(),
            rows=node["rows"].tolist(),
            frames=node["frames"].tolist(),
            failed=_shifted(node["failed"], part.segment),
            notes=_shifted(node["notes"], part.segment),
            overflow=_shifted(node["overflow"], part.segment),
            counted=[s + part.segment for s in node["counted"]],
            files=files,
        )
        writer.commit(ShardResult(target, frames, {}, str(folder)), node["run"])
    if shard in index.hashes and target not in writer.index.hashes:
        folder, node = new_staging(writer.root, target), index.hashes[shard]
        files = _copy_files(folder, part, node, shard, target)
        hashes = HashPart(node["rows"], _shifted(node["failed"], part.segment), files)
        writer.commit(ShardResult(target, None, {}, str(folder), hashes), {})
    for name, teacher in index.teachers.items():
        if target in writer.index.teachers[name].shards:
            continue
        is_new = True
        folder, node = new_staging(writer.root, target), teacher.commits[shard]
        files = _copy_files(folder, part, node, shard, target)
        failed = _shifted(node["failed"], part.segment)
        teacher_part = TeacherPart(node["rows"], node["error"], failed, files)
        if teacher.output == "features":
            (teacher_part.sums,) = part.store.sums(name, [shard])
        writer.commit(ShardResult(target, None, {name: teacher_part}, str(folder)), node["run"])
    return is_new


def _copy_files(
    folder: Path, part: PlacedPart, node: Mapping[str, Any], shard: int, target: int
) -> list[StagedFile]:
    """Stage copies of the files of a part's commit, for the shard `target` of the result."""
    files = []
    for name, record in node["files"].items():
        data = _read_checked(part.store, name, record)
        array, _, suffix = name.partition(f"/c/{shard}")
        file = folder / name.replace("/", "-")
        write_whole(file, data, StoreError)
        final = f"{array}/c/{target}{suffix}"
        files.append(StagedFile(str(file), final, record["size"], record["blake2b"]))
    return files


def _segments(part: PlacedPart) -> dict[str, np.ndarray]:
    index = part.store.index
    return {
        "video": index.video + part.video,
        "shard": index.shard + part.shard,
        "first": index.first,
        "end": index.end,
        "bound": index.bound,
        "replaces": np.where(index.replaces >= 0, index.replaces + part.segment, -1),
    }


def _read_checked(store: TargetStore, name: str, record: dict[str, Any]) -> bytes:
    """Return a shard file of a part; StoreError if it differs from its commit."""
    try:
        data = store.files.read(name)
    except FileNotFoundError as error:
        raise StoreError(f"{store.name}/{name}: a committed shard is missing") from error
    if len(data) != record["size"] or digest_bytes(data) != record["blake2b"]:
        raise StoreError(
            f"{store.name}/{name}: differs from what was committed; see `distinit targets verify {store.name}`"
        )
    return data


def _shifted(values: dict[str, Any], offset: int) -> dict[int, Any]:
    """Return values by segment with `offset` added to the segments' ids."""
    return {int(s) + offset: value for s, value in values.items()}


def _same(a: TargetStore, b: TargetStore, what: str, first: Any, other: Any) -> None:
    same_attributes("the parts do not fit", what, first, other, f"in {a.name}", f"in {b.name}")


def _check_finished(store: TargetStore) -> None:
    pending = store.pending(list(store.teachers))
    if pending.any():
        raise StoreError(
            f"{store.name}: {int(pending.sum())} of {len(pending)} videos are pending; finish it first"
        )
    num_missing = store.index.n_shards - len(store.index.frame_commits)
    num_missing += sum(store.index.n_shards - len(t.shards) for t in store.index.teachers.values())
    if num_missing:
        raise StoreError(f"{store.name}: {num_missing} shards are not committed; finish it first")


def _check_disjoint(stores: Sequence[TargetStore]) -> None:
    owner: dict[tuple[str, str], str] = {}
    for store in stores:
        names = [c["name"] for c in store.index.corpora]
        for corpus, path in zip(
            store.column("corpus").tolist(), store.column("path").tolist(), strict=True
        ):
            other = owner.setdefault((names[corpus], str(path)), store.name)
            if other is not store.name:
                raise StoreMismatchError(
                    f"{names[corpus]}={unescape_path(str(path))}: is in {other} and in {store.name}"
                )
