"""Check a store without its videos, and drop the commits of damaged shards."""

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
from .reader import check_values, classes_mismatch, read_teacher, runs
from .storage import LocalFiles, StoreFiles, inside

ENTROPY_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Finding:
    """One fault; `shard` is None for faults of the whole store, `teacher` for frame tables."""

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
    """Yield findings about structure and tables, then about the shards in order.

    The checks of a shard are: commits, digests, crc32c, counts, finiteness, entropies.
    """
    files = LocalFiles(root)
    fmt.check_root(files)
    yield from (Finding(*fault) for fault in index.faults)
    reported = {(shard, teacher) for _, shard, teacher in index.faults if shard is not None}
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
    """Remove the commits of damaged shards, so that the next extraction fills them again.

    Rows of teachers depend on the frame tables, so the commits of all teachers are removed with
    those of a damaged frame shard.

    Returns:
        Number of removed commits.
    """
    commits: set[str] = set()
    teachers = [p.name for p in inside(root, "commits/teachers").iterdir() if p.is_dir()]
    for finding in findings:
        if finding.shard is None:
            continue
        if finding.teacher is None:
            commits.add(f"commits/frames/{finding.shard:06d}")
            commits.add(f"commits/hashes/{finding.shard:06d}")
            commits.update(f"commits/teachers/{name}/{finding.shard:06d}" for name in teachers)
        elif finding.teacher == fmt.HASHES:
            commits.add(f"commits/hashes/{finding.shard:06d}")
        else:
            commits.add(f"commits/teachers/{finding.teacher}/{finding.shard:06d}")
    # In reverse order teachers come before the frames that they depend on.
    existing = [p for p in sorted(commits, reverse=True) if os.path.lexists(root / p)]
    for name in existing:
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
    """Return the allowed difference [n] between stored entropies and those of stored `logits`.

    The error of a logit [n, K] is at most `rounding` [n]. With dH/dz_i = −p_i (log p_i + H), the
    error of H is at most rounding · Σ p |log p + H| to first order; higher orders are measured to
    be below 1e-6 (docs/benchmarks.md). The entropy of a wrong row mostly differs by far more.
    """
    p, log_p = softmax(logits), log_softmax(logits)
    spread = (p * np.abs(log_p - (p * log_p).sum(axis=1, keepdims=True))).sum(axis=1)
    return np.asarray(ENTROPY_TOLERANCE + rounding * spread + rounding**2, np.float32)


def _nodes(files: LocalFiles, index: StoreIndex) -> Iterator[Finding]:
    """Yield nodes and array metadata that differ from their digests, including unused ones."""
    reported = [what for what, _, _ in index.faults]
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
        # Other checks report missing and unreadable files.
        with suppress(OSError):
            count += not is_sealed(files.read(path))
    return count


def _documents(index: StoreIndex) -> Iterator[str]:
    """Yield the paths of all zarr.json except those of commits, which every reader checks."""
    folders = ["", *fmt.GROUPS, *(f"plans/{i:06d}" for i in range(index.n_plans))]
    folders += [s.path for s in (*fmt.video_specs(), *fmt.segment_specs(), *fmt.frame_specs())]
    folders += ["commits/hashes", *(s.path for s in fmt.hash_specs())]
    for name, teacher in index.teachers.items():
        group = f"teachers/{name}"
        folders += [group, f"{group}/{fmt.FINGERPRINT}", f"{group}/class"]
        folders += [f"{group}/{fmt.STATISTICS}", f"{group}/basis", f"{group}/mean"]
        folders += [f"{group}/{fmt.STATISTICS}/{shard:06d}" for shard in sorted(teacher.shards)]
        specs = fmt.teacher_specs(name, 1, teacher.encoding, teacher.output)
        folders += [s.path for s in specs]
        folders += [f"commits/teachers/{name}"]
    yield from (f"{folder}/zarr.json".lstrip("/") for folder in folders)


def _structure(files: LocalFiles, index: StoreIndex) -> Iterator[Finding]:
    rows = index.n_shards * index.shard_rows
    specs: list[tuple[fmt.ArraySpec, int, str | None]]
    specs = [(s, index.n_videos, None) for s in fmt.video_specs()]
    specs += [(s, len(index.video), None) for s in fmt.segment_specs()]
    specs += [(s, rows, None) for s in fmt.frame_specs()] if rows else []
    specs += [(s, rows, None) for s in fmt.hash_specs()] if rows and index.version >= 2 else []
    for name, teacher in index.teachers.items() if rows else ():
        teacher_specs = fmt.teacher_specs(name, 1, teacher.encoding, teacher.output)
        specs += [(spec, rows, name) for spec in teacher_specs]
    for spec, length, owner in specs:
        try:
            meta = files.metadata(spec.path)
        except StoreError as error:
            yield Finding(f"array {spec.path} cannot be opened ({error})", None, owner)
            continue
        if (actual := meta["shape"][0]) < length:
            yield Finding(f"array {spec.path} has {actual} rows, {length} are planned", None, owner)
        dimensions: Any = meta.get("dimension_names")
        if dimensions != list(spec.dims):
            yield Finding(f"array {spec.path} has dimensions {dimensions}", None, owner)


def _videos(files: LocalFiles, index: StoreIndex) -> Iterator[Finding]:
    """Yield impossible values in the planned rows of the video table, and overlapping segments."""
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
    for what, is_bad in (
        ("videos/path: {} videos have no path", path == ""),
        (
            "videos/corpus: {} videos are in no corpus that the plans name",
            ~np.isin(corpus, range(len(index.corpora))),
        ),
        ("videos/size: {} videos have frames, but no size", ok & (size < 0)),
        ("videos/digest: {} videos have frames, but no digest", ok & ~digest.any(axis=1)),
    ):
        if is_bad.any():
            yield Finding(what.format(int(is_bad.sum())))
    listed = Counter((c, p) for c, p in zip(corpus.tolist(), path.tolist(), strict=True) if p)
    if repeated := [p for (_, p), count in listed.items() if count > 1]:
        yield Finding(
            f"videos/path: {len(repeated)} videos are listed more than once, the first is {repeated[0]}"
        )
    segments = index.order()
    previous, following = segments[:-1], segments[1:]
    overlap = (index.end[previous] < 0) | (index.end[previous] > index.first[following])
    if count := int((overlap & (index.video[previous] == index.video[following])).sum()):
        yield Finding(f"segments: {count} overlap the previous segment of the same video")


def _unplanned(root: Path, index: StoreIndex) -> Iterator[Finding]:
    """Yield commits that no plan names, because a plan is lost."""
    reported = {teacher for _, _, teacher in index.faults}
    for folder in sorted((root / "commits/teachers").glob("*/")):
        if folder.name not in index.teachers and folder.name not in reported:
            yield Finding(f"commits/teachers/{folder.name}: no plan names this teacher")
    for folder in sorted((root / "commits/frames").glob("*/")):
        if folder.name.isdecimal() and int(folder.name) >= index.n_shards:
            yield Finding(f"commits/frames/{folder.name}: no plan names this shard")


def _teachers(files: LocalFiles, index: StoreIndex) -> Iterator[Finding]:
    """Yield class names and fingerprints that are unreadable or contradict an identity."""
    for name, teacher in index.teachers.items():
        try:
            node = fmt.read_nodes(files, "teachers", [name])[name]
            codec, classes = read_teacher(files, name, node, index.teachers)
            if teacher.output == "logits" and (
                mismatch := classes_mismatch(classes, node["identity"])
            ):
                yield Finding(f"teachers/{name}/class: {mismatch}", None, name)
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
            yield Finding(
                f"its fingerprint has {count} values, the teacher {codec.width}", None, name
            )


def _frames(files: LocalFiles, index: StoreIndex, shard: int) -> Iterator[Finding]:
    commit = index.frame_commits[shard]
    file_findings = list(_files(files, commit, shard, None))
    yield from file_findings
    rows, first = commit["rows"], commit["first_row"]
    if (
        rows.sum() > index.shard_rows
        or (first[rows > 0] != (np.cumsum(rows) - rows)[rows > 0]).any()
    ):
        yield Finding("the rows of its commit overlap or do not fit the shard", shard)
        return
    if file_findings:
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
    """Yield faults of the hashes of a shard's frames."""
    node, commit = index.hashes[shard], index.frame_commits[shard]
    file_findings = list(_files(files, node, shard, fmt.HASHES))
    yield from file_findings
    total = int(commit["rows"].sum())
    failed = np.isin(commit["segment"], [int(s) for s in node["failed"]])
    expected = int(commit["rows"][~failed].sum())
    if expected != node["rows"]:
        what = f"holds hashes of {expected} frames, its commit records {node['rows']}"
        yield Finding(what, shard, fmt.HASHES)
    elif not file_findings and expected:
        try:
            arrays = [_rows(files, s, shard * index.shard_rows, total) for s in fmt.hash_specs()]
        except StoreError as error:
            yield Finding(str(error), shard, fmt.HASHES)
            return
        if not np.isfinite(arrays[2][np.repeat(~failed, commit["rows"])]).all():
            yield Finding("a root mean square is not finite", shard, fmt.HASHES)


def _teacher(files: LocalFiles, index: StoreIndex, shard: int, name: str) -> Iterator[Finding]:
    teacher = index.teachers[name]
    file_findings = list(_files(files, teacher.commits[shard], shard, name))
    yield from file_findings
    if file_findings or shard not in index.frame_commits:
        return
    commit = index.frame_commits[shard]
    segments = commit["segment"]
    ok = (index.state[segments] == OK) & ~np.isin(segments, list(teacher.failed))
    rows = runs(shard * index.shard_rows + commit["first_row"][ok], commit["rows"][ok])
    if len(rows) != (recorded := teacher.commits[shard]["rows"]):
        yield Finding(f"has rows of {len(rows)} frames, its commit records {recorded}", shard, name)
    try:
        codec = fmt.read_codec(files, name, fmt.read_nodes(files, "teachers", [name])[name])
        arrays = row_arrays(codec.encoding, codec.output)
        stored = {a: files.rows(f"teachers/{name}/{a}", index.file_record) for a in arrays}
        where = f"{files.name}/teachers/{name}/{codec.output}/zarr.json"
        check_values(where, codec, stored[codec.output])
        # Memory does not grow with the number of classes.
        step = max(16, min(2048, (1 << 22) // codec.width))
        sums = Sums(0, np.zeros(codec.width), 0.0)
        for start in range(0, len(rows), step):
            block = {a: array.read(rows[start : start + step]) for a, array in stored.items()}
            values = codec.decode(block)
            if not (np.isfinite(values).all() and np.isfinite(block.get("entropy", 0)).all()):
                yield Finding("rows are not finite", shard, name)
                return
            if codec.output == "features":
                sums += Sums.of(codec, block)
                continue
            error = np.abs(entropy(values) - block["entropy"])
            is_wrong = error > entropy_tolerance(values, codec.rounding(block))
            if is_wrong.any():
                yield Finding(
                    f"an entropy is {error[is_wrong].max():.3f} nats off its logits", shard, name
                )
                return
        if codec.output == "features" and (mismatch := _sums_mismatch(files, shard, name, sums)):
            yield Finding(mismatch, shard, name)
    except StoreError as read_error:
        yield Finding(str(read_error), shard, name)


def _sums_mismatch(files: LocalFiles, shard: int, name: str, sums: Sums) -> str | None:
    """Describe how stored sums differ from those of a shard's rows, None if they agree."""
    group, key = f"teachers/{name}/{fmt.STATISTICS}", f"{shard:06d}"
    node = fmt.read_nodes(files, group, [key]).get(key)
    if node is None:
        return None
    same = (
        (node["rows"], len(node["sum"])) == (sums.rows, len(sums.total))
        # The rounding error grows with the size of the terms, not with that of their sum.
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
                f"{name} has {len(data)} bytes, {record['size']} were committed", shard, teacher
            )
        elif digest_bytes(data) != record["blake2b"]:
            yield Finding(f"{name} differs from what was committed (digest)", shard, teacher)


def _rows(files: LocalFiles, spec: fmt.ArraySpec, first: int, count: int) -> NDArray[Any]:
    return files.rows(spec.path, lambda path, shard: None).read(np.arange(first, first + count))
