"""Put finished stores into one: tables one behind the other, shard files copied bit by bit.

Videos, segments and shards of each part keep their order and are counted on from those of the parts
before, so all that changes in a shard is the number of its videos: `frames/video` is written anew,
every other file is copied and its digest checked on the way. The result is planned as a whole
before the first shard is copied and each shard has its commit, as in an extraction: an interrupted
merge is a store with pending videos, and the same command copies what is missing.
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
class Placed:
    """A part, the first of its numbers in the result, and its corpora there.

    `corpus` maps the part's corpora to those of the result.
    """

    store: TargetStore
    video: int
    segment: int
    shard: int
    corpus: np.ndarray


@contextmanager
def reading(store: TargetStore) -> Iterator[None]:
    """Keep writers away from a local store; StoreError if one is at work."""
    if not isinstance(store.files, LocalFiles):
        yield
        return
    busy = StoreError(f"{store.name}: another process is writing this store")
    with locked(store.files.root, busy, shared=True):
        yield


def check_parts(stores: Sequence[TargetStore], *, allow_different_numerics: bool = False) -> None:
    """Raise StoreMismatchError naming both sides if two stores do not fit each other.

    These must be equal: sampling, shard size, teachers and for each its identity, encoding, classes
    and, unless accepted, run. These must differ: the stores themselves, and all videos (a path in a
    corpus).

    Raises:
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


def place(stores: Sequence[TargetStore]) -> tuple[list[Placed], list[dict[str, str]]]:
    """Return where each part begins in the result, and the result's corpora.

    A corpus of several parts has the first part's folder.
    """
    corpora: list[dict[str, str]] = []
    placed: list[Placed] = []
    video = segment = shard = 0
    for store in stores:
        index = store.index
        for c in index.corpora:
            if c["name"] not in [entry["name"] for entry in corpora]:
                corpora.append(c)
        names = [entry["name"] for entry in corpora]
        corpus = np.array([names.index(c["name"]) for c in index.corpora], np.int32)
        placed.append(Placed(store, video, segment, shard, corpus))
        video, segment, shard = (
            video + index.n_videos,
            segment + len(index.video),
            shard + index.n_shards,
        )
    return placed, corpora


def plan_merge(
    writer: StoreWriter,
    placed: Sequence[Placed],
    corpora: list[dict[str, str]],
    fingerprints: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the tables and teachers of the result that a killed merge has not written yet."""
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
    writer: StoreWriter, placed: Sequence[Placed], advance: Callable[[int], Any] = lambda n: None
) -> int:
    """Copy and commit every shard that the result lacks; returns how many.

    StoreError names a file of a part that differs from what was committed.
    """
    copied = 0
    for part in placed:
        for shard in range(part.store.index.n_shards):
            copied += _copy_shard(writer, part, shard)
            advance(1)
    return copied


def _copy_shard(writer: StoreWriter, part: Placed, shard: int) -> bool:
    index, target = part.store.index, part.shard + shard
    new = target not in writer.index.frame_commits
    if new:
        folder, node = new_staging(writer.root, target), index.frame_commits[shard]
        files = _copy_files(folder, part, node, shard, target)
        if part.video:  # videos have other numbers there
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
            failed=_moved(node["failed"], part.segment),
            notes=_moved(node["notes"], part.segment),
            overflow=_moved(node["overflow"], part.segment),
            counted=[s + part.segment for s in node["counted"]],
            files=files,
        )
        writer.commit(ShardResult(target, frames, {}, str(folder)), node["run"])
    if shard in index.hashes and target not in writer.index.hashes:
        folder, node = new_staging(writer.root, target), index.hashes[shard]
        files = _copy_files(folder, part, node, shard, target)
        hashes = HashPart(node["rows"], _moved(node["failed"], part.segment), files)
        writer.commit(ShardResult(target, None, {}, str(folder), hashes), {})
    for teacher, of in index.teachers.items():
        if target in writer.index.teachers[teacher].shards:
            continue
        new = True
        folder, node = new_staging(writer.root, target), of.commits[shard]
        files = _copy_files(folder, part, node, shard, target)
        failed = _moved(node["failed"], part.segment)
        rows_of = TeacherPart(node["rows"], node["error"], failed, files)
        if of.output == "features":
            (rows_of.sums,) = part.store.sums(teacher, [shard])
        writer.commit(ShardResult(target, None, {teacher: rows_of}, str(folder)), node["run"])
    return new


def _copy_files(
    folder: Path, part: Placed, node: Mapping[str, Any], shard: int, target: int
) -> list[StagedFile]:
    """Stage the files of a commit of a part, to become those of the shard `target`."""
    files = []
    for name, record in node["files"].items():
        data, (array, _, rest) = _checked(part.store, name, record), name.partition(f"/c/{shard}")
        file = folder / name.replace("/", "-")
        write_whole(file, data, StoreError)
        final = f"{array}/c/{target}{rest}"
        files.append(StagedFile(str(file), final, record["size"], record["blake2b"]))
    return files


def _segments(part: Placed) -> dict[str, np.ndarray]:
    index = part.store.index
    return {
        "video": index.video + part.video,
        "shard": index.shard + part.shard,
        "first": index.first,
        "end": index.end,
        "bound": index.bound,
        "replaces": np.where(index.replaces >= 0, index.replaces + part.segment, -1),
    }


def _checked(store: TargetStore, name: str, record: dict[str, Any]) -> bytes:
    """Return a shard file of a part, compared with its commit."""
    try:
        data = store.files.read(name)
    except FileNotFoundError as error:
        raise StoreError(f"{store.name}/{name}: a committed shard is missing") from error
    if len(data) != record["size"] or digest_bytes(data) != record["blake2b"]:
        raise StoreError(
            f"{store.name}/{name}: differs from what was committed; see `distinit targets verify {store.name}`"
        )
    return data


def _moved(values: dict[str, Any], by: int) -> dict[int, Any]:
    return {int(s) + by: value for s, value in values.items()}


def _same(a: TargetStore, b: TargetStore, what: str, first: Any, other: Any) -> None:
    same_attributes("the parts do not fit", what, first, other, f"in {a.name}", f"in {b.name}")


def _check_finished(store: TargetStore) -> None:
    pending = store.pending(list(store.teachers))
    if pending.any():
        raise StoreError(
            f"{store.name}: {int(pending.sum())} of {len(pending)} videos are pending; finish it first"
        )
    lacking = store.index.n_shards - len(store.index.frame_commits)
    lacking += sum(store.index.n_shards - len(t.shards) for t in store.index.teachers.values())
    if lacking:
        raise StoreError(f"{store.name}: {lacking} shards are not committed; finish it first")


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
