"""Check everything that can be checked of a store without its videos, and drop what is broken."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import StoreError
from ..common.files import fsync_path
from ..common.numerics import entropy, log_softmax, softmax
from ..teachers.fingerprint import Fingerprint
from . import layout as fmt
from .digests import check_document, digest_bytes, is_sealed, read_rows
from .encoding import Sums, row_arrays
from .index import OK, StoreIndex
from .reader import check_values, other_classes, read_teacher, runs
from .storage import LocalFiles, StoreFiles, inside

ENTROPY_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Finding:
    """One fault; `shard` is None if no shard can be named, `teacher` for frame tables."""

    what: str
    shard: int | None = None
    teacher: str | None = None

    def __str__(self) -> str:
        if self.shard is None:
            return f"store{f', {self.teacher}' if self.teacher else ''}: {self.what}"
        return f"shard {self.shard:06d}, {self.teacher or 'frames'}: {self.what}"


def verify(
    root: Path, index: StoreIndex, advance: Callable[[int], Any] = lambda n: None
) -> Iterator[Finding]:
    """Yield findings: structure and tables, then the shards in order.

    Of shards: missing commits, digests, crc, counts, finiteness, entropies.
    """
    files = LocalFiles(root)
    fmt.check_root(files)
    yield from (Finding(*broken) for broken in index.broken)
    reported = {(shard, teacher) for _, shard, teacher in index.broken if shard is not None}
    yield from _nodes(files, index)
    yield from _structure(files, index)
    yield from _videos(files, index)
    yield from _unplanned(root, index)
    yield from _teachers(files, index)
    for shard in range(index.n_shards):
        if (shard, None) in reported:
            continue
        if shard not in index.frame_commits:
            yield Finding(
                "planned, but not committed: extraction unfinished, or the commit was deleted",
                shard,
            )
        else:
            yield from _frames(files, index, shard)
        if shard in index.hashes and shard in index.frame_commits:
            yield from _hashes(files, index, shard)
        for name, teacher in index.teachers.items():
            if shard in teacher.shards:
                yield from _teacher(files, index, shard, name)
            elif shard in index.frame_commits and (shard, name) not in reported:
                yield Finding(
                    "no rows: extraction unfinished, or the commit was deleted", shard, name
                )
        advance(1)


def drop_commits(root: Path, findings: list[Finding]) -> int:
    """Remove the commits of broken shards, so that the next extraction fills them again.

    Rows of teachers depend on the frame tables, so a broken frame shard takes its teachers' commits
    along.

    Returns:
        How many were removed.
    """
    broken: set[str] = set()
    teachers = [p.name for p in inside(root, "commits/teachers").iterdir() if p.is_dir()]
    for f in findings:
        if f.shard is None:
            continue
        if f.teacher is None:
            broken.add(f"commits/frames/{f.shard:06d}")
            broken.add(f"commits/hashes/{f.shard:06d}")
            broken.update(f"commits/teachers/{name}/{f.shard:06d}" for name in teachers)
        elif f.teacher == fmt.HASHES:
            broken.add(f"commits/hashes/{f.shard:06d}")
        else:
            broken.add(f"commits/teachers/{f.teacher}/{f.shard:06d}")
    existing = [p for p in sorted(broken, reverse=True) if os.path.lexists(root / p)]
    for name in existing:  # teachers before the frames they hang on
        path = inside(root, name.rpartition("/")[0]) / name.rpartition("/")[2]
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
        fsync_path(path.parent)
    return len(existing)


def entropy_tolerance(
    logits: NDArray[np.float32], rounding: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return how far a row's entropy may be off that of its stored `logits` [n, K].

    The logits are off by at most `rounding` [n]. dH/dz_i = −p_i (log p_i + H), so that H is off by
    at most rounding · Σ p |log p + H| to first order; what is beyond is measured to be below 1e-6
    (docs/benchmarks.md). A wrong row is mostly off by far more.
    """
    p, log_p = softmax(logits), log_softmax(logits)
    spread = (p * np.abs(log_p - (p * log_p).sum(axis=1, keepdims=True))).sum(axis=1)
    return np.asarray(ENTROPY_TOLERANCE + rounding * spread + rounding**2, np.float32)


def _nodes(files: LocalFiles, index: StoreIndex) -> Iterator[Finding]:
    """Yield nodes and array metadata that differ from their digests, also those no reader uses."""
    reported = [what for what, _, _ in index.broken]
    for path in _documents(index):
        try:
            check_document(path, files.read(path), required=files.sealed)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except StoreError as error:
            if not any(path in what for what in reported):
                yield Finding(str(error))


def without_digest(files: StoreFiles, index: StoreIndex) -> int:
    """Count nodes and array metadata files without a digest: version 0.1 wrote none."""
    count = 0
    for path in _documents(index):
        with suppress(OSError):  # what is missing, or is found to be damaged elsewhere
            count += not is_sealed(files.read(path))
    return count


def _documents(index: StoreIndex) -> Iterator[str]:
    """Return the paths of all zarr.json except those of commits, which every reader reads."""
    folders = ["", *fmt.GROUPS, *(f"plans/{i:06d}" for i in range(index.n_plans))]
    folders += [s.path for s in (*fmt.video_specs(), *fmt.segment_specs(), *fmt.frame_specs())]
    folders += ["commits/hashes", *(s.path for s in fmt.hash_specs())]
    for name, of in index.teachers.items():
        group = f"teachers/{name}"
        folders += [group, f"{group}/{fmt.FINGERPRINT}", f"{group}/class"]
        folders += [f"{group}/{fmt.STATISTICS}", f"{group}/basis", f"{group}/mean"]
        folders += [f"{group}/{fmt.STATISTICS}/{shard:06d}" for shard in sorted(of.shards)]
        folders += [s.path for s in fmt.teacher_specs(name, 1, of.encoding, of.output)]
        folders += [f"commits/teachers/{name}"]
    yield from (f"{folder}/zarr.json".lstrip("/") for folder in folders)


def _structure(files: LocalFiles, index: StoreIndex) -> Iterator[Finding]:
    rows = index.n_shards * index.shard_rows
    specs: list[tuple[fmt.ArraySpec, int, str | None]]
    specs = [(s, index.n_videos, None) for s in fmt.video_specs()]
    specs += [(s, len(index.video), None) for s in fmt.segment_specs()]
    specs += [(s, rows, None) for s in fmt.frame_specs()] if rows else []
    specs += [(s, rows, None) for s in fmt.hash_specs()] if rows and index.version >= 2 else []
    for name, of in index.teachers.items() if rows else ():
        specs += [(s, rows, name) for s in fmt.teacher_specs(name, 1, of.encoding, of.output)]
    for spec, length, teacher in specs:
        try:
            meta = files.metadata(spec.path)
        except StoreError as error:
            yield Finding(f"array {spec.path} cannot be opened ({error})", None, teacher)
            continue
        if (actual := meta["shape"][0]) < length:
            yield Finding(
                f"array {spec.path} has {actual} rows, {length} are planned", None, teacher
            )
        dimensions: Any = meta.get("dimension_names")
        if dimensions != list(spec.dims):
            yield Finding(f"array {spec.path} has dimensions {dimensions}", None, teacher)


def _videos(files: LocalFiles, index: StoreIndex) -> Iterator[Finding]:
    """Yield what is impossible in the video table, in rows that the plans name."""
    columns: dict[str, NDArray[Any]] = {}
    for spec in fmt.video_specs():
        try:
            values = read_rows(files, spec.path, 0, index.n_videos, index.ranges)
        except StoreError as error:
            yield Finding(str(error))
            continue
        if spec.name in ("corpus", "path", "size", "digest"):
            columns[spec.name] = values
    if len(columns) < 4:
        return
    corpus, path, size, digest = (columns[name] for name in ("corpus", "path", "size", "digest"))
    ok = index.video_state() == OK
    for what, bad in (
        ("videos/path: {} videos have no path", path == ""),
        (
            "videos/corpus: {} videos are in no corpus that the plans name",
            ~np.isin(corpus, range(len(index.corpora))),
        ),
        ("videos/size: {} videos have frames, but no size", ok & (size < 0)),
        ("videos/digest: {} videos have frames, but no digest", ok & ~digest.any(axis=1)),
    ):
        if bad.any():
            yield Finding(what.format(int(bad.sum())))
    listed = Counter((c, p) for c, p in zip(corpus.tolist(), path.tolist(), strict=True) if p)
    if twice := [p for (_, p), count in listed.items() if count > 1]:
        yield Finding(
            f"videos/path: {len(twice)} videos are listed more than once, the first is {twice[0]}"
        )
    s = index.order()
    overlap = (index.end[s[:-1]] < 0) | (index.end[s[:-1]] > index.first[s[1:]])
    if count := int((overlap & (index.video[s[:-1]] == index.video[s[1:]])).sum()):
        yield Finding(f"segments: {count} overlap the one before them of the same video")


def _unplanned(root: Path, index: StoreIndex) -> Iterator[Finding]:
    """Yield commits that no plan names: a plan is lost."""
    broken = {teacher for _, _, teacher in index.broken}
    for folder in sorted((root / "commits/teachers").glob("*/")):
        if folder.name not in index.teachers and folder.name not in broken:
            yield Finding(f"commits/teachers/{folder.name}: no plan names this teacher")
    for folder in sorted((root / "commits/frames").glob("*/")):
        if folder.name.isdecimal() and int(folder.name) >= index.n_shards:
            yield Finding(f"commits/frames/{folder.name}: no plan speaks of this shard")


def _teachers(files: LocalFiles, index: StoreIndex) -> Iterator[Finding]:
    """Yield class names and fingerprints that are unreadable or contradict an identity."""
    for name, of in index.teachers.items():
        try:
            node = fmt.read_nodes(files, "teachers", [name])[name]
            codec, classes = read_teacher(files, name, node, index.teachers)
            if of.output == "logits" and (wrong := other_classes(classes, node["identity"])):
                yield Finding(f"teachers/{name}/class: {wrong}", None, name)
            fingerprint = fmt.read_fingerprint(files, name)
            if fingerprint is None:
                continue
            count = Fingerprint.parse(
                fingerprint, f"teachers/{name}/{fmt.FINGERPRINT}"
            ).values.shape[1]
        except StoreError as error:
            yield Finding(str(error), None, name)
            continue
        if count != codec.width:
            yield Finding(f"its fingerprint is of {count} values, it has {codec.width}", None, name)


def _frames(files: LocalFiles, index: StoreIndex, shard: int) -> Iterator[Finding]:
    commit = index.frame_commits[shard]
    bad = list(_files(files, commit, shard, None))
    yield from bad
    rows, first = commit["rows"], commit["first_row"]
    if (
        rows.sum() > index.shard_rows
        or (first[rows > 0] != (np.cumsum(rows) - rows)[rows > 0]).any()
    ):
        yield Finding("its commit's rows overlap or do not fit the shard", shard)
        return
    if bad:
        return
    total = int(rows.sum())
    base = shard * index.shard_rows
    try:
        video, frame, pts = (_rows(files, spec, base, total) for spec in fmt.frame_specs())
    except StoreError as error:
        yield Finding(str(error), shard)
        return
    owner = np.repeat(index.video[commit["segment"]], rows)
    if (video != owner).any():
        yield Finding(
            f"{int((video != owner).sum())} rows name another video than their segment", shard
        )
    same = np.diff(np.repeat(np.arange(len(rows)), rows)) == 0
    if (np.diff(frame)[same] <= 0).any() or (np.diff(pts)[same] <= 0).any():
        yield Finding("frame indices or pts do not ascend inside a segment", shard)


def _hashes(files: LocalFiles, index: StoreIndex, shard: int) -> Iterator[Finding]:
    """Yield what is wrong with the hashes of a shard's frames."""
    node, commit = index.hashes[shard], index.frame_commits[shard]
    bad = list(_files(files, node, shard, fmt.HASHES))
    yield from bad
    total = int(commit["rows"].sum())
    failed = np.isin(commit["segment"], [int(s) for s in node["failed"]])
    expected = int(commit["rows"][~failed].sum())
    if expected != node["rows"]:
        what = f"holds hashes of {expected} frames, its commit says {node['rows']}"
        yield Finding(what, shard, fmt.HASHES)
    elif not bad and expected:
        try:
            arrays = [_rows(files, s, shard * index.shard_rows, total) for s in fmt.hash_specs()]
        except StoreError as error:
            yield Finding(str(error), shard, fmt.HASHES)
            return
        if not np.isfinite(arrays[2][np.repeat(~failed, commit["rows"])]).all():
            yield Finding("a root mean square is not finite", shard, fmt.HASHES)


def _teacher(files: LocalFiles, index: StoreIndex, shard: int, name: str) -> Iterator[Finding]:
    teacher = index.teachers[name]
    bad = list(_files(files, teacher.commits[shard], shard, name))
    yield from bad
    if bad or shard not in index.frame_commits:
        return
    commit = index.frame_commits[shard]
    segments = commit["segment"]
    good = (index.state[segments] == OK) & ~np.isin(segments, list(teacher.failed))
    rows = runs(shard * index.shard_rows + commit["first_row"][good], commit["rows"][good])
    if len(rows) != (recorded := teacher.commits[shard]["rows"]):
        yield Finding(f"has rows of {len(rows)} frames, its commit has {recorded}", shard, name)
    try:
        codec = fmt.read_codec(files, name, fmt.read_nodes(files, "teachers", [name])[name])
        arrays = row_arrays(codec.encoding, codec.output)
        stored = {a: files.rows(f"teachers/{name}/{a}", index.file_record) for a in arrays}
        where = f"{files.name}/teachers/{name}/{codec.output}/zarr.json"
        check_values(where, codec, stored[codec.output])
        step = max(16, min(2048, (1 << 22) // codec.width))  # memory does not grow with classes
        sums = Sums(0, np.zeros(codec.width), 0.0)
        for at in range(0, len(rows), step):
            some = {a: array.read(rows[at : at + step]) for a, array in stored.items()}
            z = codec.decode(some)
            if not (np.isfinite(z).all() and np.isfinite(some.get("entropy", 0)).all()):
                yield Finding("rows are not finite", shard, name)
                return
            if codec.output == "features":
                sums += Sums.of(codec, some)
                continue
            h = some["entropy"]
            off = np.abs(entropy(z) - h)
            if (bad_rows := np.flatnonzero(off > entropy_tolerance(z, codec.rounding(some)))).size:
                yield Finding(
                    f"an entropy is {off[bad_rows].max():.3f} nats off its logits", shard, name
                )
                return
        if codec.output == "features" and (wrong := _other_sums(files, shard, name, sums)):
            yield Finding(wrong, shard, name)
    except StoreError as error:
        yield Finding(str(error), shard, name)


def _other_sums(files: LocalFiles, shard: int, name: str, sums: Sums) -> str | None:
    """Return how the sums that a store has of a shard's rows differ from those of its rows."""
    group, key = f"teachers/{name}/{fmt.STATISTICS}", f"{shard:06d}"
    node = fmt.read_nodes(files, group, [key]).get(key)
    if node is None:
        return None
    same = (
        (node["rows"], len(node["sum"])) == (sums.rows, len(sums.total))
        # What rounding leaves grows with the size of the terms, not with that of their sum.
        and np.abs(sums.total - node["sum"]).max() <= 1e-9 * np.sqrt(sums.rows * sums.square)
        and abs(sums.square - node["square"]) <= 1e-9 * sums.square
    )
    return None if same else f"{group}/{key} holds other sums than those of its rows"


def _files(
    store: LocalFiles, commit: dict[str, Any], shard: int, teacher: str | None
) -> Iterator[Finding]:
    for name, record in {**commit["files"], **commit["other_files"]}.items():
        try:
            data = store.read(name)
        except (FileNotFoundError, NotADirectoryError) as error:
            yield Finding(f"{name} is missing ({error.strerror})", shard, teacher)
            continue
        except StoreError as error:
            yield Finding(str(error), shard, teacher)
            continue
        if len(data) != record["size"]:
            yield Finding(
                f"{name} has {len(data)} bytes, committed were {record['size']}", shard, teacher
            )
        elif digest_bytes(data) != record["blake2b"]:
            yield Finding(f"{name} differs from what was committed (digest)", shard, teacher)


def _rows(files: LocalFiles, spec: fmt.ArraySpec, first: int, count: int) -> NDArray[Any]:
    return files.rows(spec.path, lambda path, shard: None).read(np.arange(first, first + count))
