"""Stores exported from some videos and teachers of another hold the same bits, and nothing else."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from distinit.pipeline.common.config import load_config
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import StoreError, UsageError
from distinit.pipeline.store import subset
from distinit.pipeline.store.index import load_index
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import ExportConfig, MergeConfig
from distinit.pipeline.store.verify import verify
from distinit.stages.targets_export import targets_export
from distinit.stages.targets_merge import targets_merge
from distinit.tests.flips import flips

QUIET = Console(quiet=True)
Make = Callable[..., Any]


def same_videos(a: TargetStore, b: TargetStore, teachers: tuple[str, ...]) -> None:
    """Check that every video of `b` is in `a` with the same bits."""
    ids = {(a.video(v).corpus, a.video(v).path): v for v in range(a.n_videos)}
    for w in range(b.n_videos):
        record = b.video(w)
        v = ids[record.corpus, record.path]
        assert repr(record).replace(f"id={w}", "") == repr(a.video(v)).replace(f"id={v}", "")
        frames_a, frames_b = a.frames(v), b.frames(w)
        for x, y in zip(frames_a[:2], frames_b[:2], strict=True):
            np.testing.assert_array_equal(x, y)
        for t in teachers:
            np.testing.assert_array_equal(a.logits(t, frames_a[2]), b.logits(t, frames_b[2]))
            np.testing.assert_array_equal(a.entropy(t, frames_a[2]), b.entropy(t, frames_b[2]))


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_a_chosen_part_is_a_store_like_any_other(
    make_store: Make, tmp_path: Path, encoding: str
) -> None:
    recipe, root = make_store(teachers={"t": 9, "u": 4}, encoding=encoding)
    whole = TargetStore.open(root)
    numbers = [1, 3, 7, 8, 10, 30, 31, 39]
    names = [recipe.path(v).replace("%FF", "\udcff") for v in numbers]
    lines = [names[0], f"b={names[1]}", f"/data/b/{names[2]} 5", "# a comment", "", *names[3:]]
    (tmp_path / "list.txt").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    out = tmp_path / "some.zarr"
    result = targets_export(
        ExportConfig(
            store=str(root),
            out=str(out),
            teachers=["u"],
            corpora=["b"],
            videos_from=tmp_path / "list.txt",
        ),
        QUIET,
    )
    store = TargetStore.open(out)
    exported = [v for v in numbers if recipe.corpus(v) == 1]
    paths = [recipe.path(v).replace("%FF", "\udcff") for v in exported]
    assert [store.video(w).path for w in range(store.n_videos)] == paths
    assert (list(store.teachers), list(store.corpora)) == (["u"], ["b"])
    assert store.teachers["u"] == whole.teachers["u"]
    assert (result["videos"], result["rows"]) == (
        len(exported),
        sum(recipe.rows(v) for v in exported),
    )
    same_videos(whole, store, ("u",))
    assert list(verify(out, load_index(out))) == []
    assert (
        0 < store.encoding_error("u")["kl_mean"] <= store.encoding_error("u")["kl_p99"]
        or encoding == "float16"
    )
    record = "some.zarr.config.yaml"
    names = ["list.txt", "s.zarr", "some.zarr", record]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    used = load_config(ExportConfig, "targets-export", file=str(tmp_path / record))
    assert (used.store, used.teachers, used.corpora) == (str(root), ["u"], ["b"])
    everything = tmp_path / "all.zarr"
    targets_export(ExportConfig(store=str(root), out=str(everything), shard_rows=1024), QUIET)
    assert TargetStore.open(everything).index.shard_rows == 1024
    same_videos(whole, TargetStore.open(everything), ("t", "u"))
    same_videos(TargetStore.open(everything), whole, ("t", "u"))


@pytest.mark.slow
def test_an_exported_part_fits_a_merge_that_it_did_not(make_store: Make, tmp_path: Path) -> None:
    a = make_store("a.zarr", videos=range(10))[1]
    b = make_store("b.zarr", videos=range(10, 15), shard_rows=1024)[1]
    targets_export(ExportConfig(store=str(b), out=str(tmp_path / "b2.zarr"), shard_rows=512), QUIET)
    merged = targets_merge(
        MergeConfig(parts=[str(a), str(tmp_path / "b2.zarr")], out=str(tmp_path / "ab.zarr")),
        QUIET,
    )
    assert merged["videos"] == 15
    same_videos(TargetStore.open(b), TargetStore.open(tmp_path / "b2.zarr"), ("t",))


@pytest.mark.slow
def test_out_does_not_exist_until_it_is_whole(
    make_store: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    root = make_store(uncommitted=[1])[1]
    out = tmp_path / "out.zarr"

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subset.ShardCopy, "teacher", stop)
        with pytest.raises(KeyboardInterrupt):
            targets_export(ExportConfig(store=str(root), out=str(out)), QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]
    # A killed export leaves such a folder.
    shutil.copytree(root, tmp_path / ".out.zarr.part")
    shutil.rmtree(tmp_path / ".out.zarr.part" / "commits")
    whole = TargetStore.open(root)
    result = targets_export(ExportConfig(store=str(root), out=str(out)), QUIET)
    # Pending videos are not exported.
    assert result["videos"] == whole.n_videos - int((whole.video_state == 0).sum())
    assert list(verify(out, load_index(out))) == []
    damaged = root / "teachers/t/logits/c/0/0"
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    with pytest.raises(StoreError, match="crc32c"):
        targets_export(ExportConfig(store=str(root), out=str(tmp_path / "again.zarr")), QUIET)
    assert not (tmp_path / "again.zarr").exists()


@pytest.mark.parametrize("made_by_distinit", [True, False])
def test_a_config_next_to_a_result_replaces_one_of_distinit_alone(
    make_store: Make, tmp_path: Path, made_by_distinit: bool
) -> None:
    root, out = make_store()[1], tmp_path / "x.h5"
    record = tmp_path / "x.h5.config.yaml"
    record.write_text(
        "targets-export: {store: earlier.zarr, out: x.h5}" if made_by_distinit else "notes: 1"
    )
    before = record.read_bytes()
    options = ExportConfig(store=str(root), out=str(out))
    if made_by_distinit:
        targets_export(options, QUIET)
        assert load_config(ExportConfig, "targets-export", file=str(record)) == options
        return
    with pytest.raises(UsageError, match=r"--out .*x\.h5\.config\.yaml"):
        targets_export(options, QUIET)
    assert record.read_bytes() == before
    assert not out.exists()


def test_one_export_at_a_time_writes_a_file(make_store: Make, tmp_path: Path) -> None:
    root = make_store()[1]
    part = tmp_path / ".x.h5.part"
    part.write_bytes(b"of another export")
    descriptor = os.open(tmp_path / ".x.h5.export-lock", os.O_CREAT | os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StoreError, match="another export is writing it"):
        targets_export(ExportConfig(store=str(root), out=str(tmp_path / "x.h5")), QUIET)
    assert part.read_bytes() == b"of another export"
    # The other export is killed.
    os.close(descriptor)
    assert (
        targets_export(ExportConfig(store=str(root), out=str(tmp_path / "x.h5")), QUIET)["videos"]
        > 0
    )
    assert {path.name for path in tmp_path.iterdir()} == {"s.zarr", "x.h5", "x.h5.config.yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deep/x.zarr", "x.zarr"])
def test_of_two_exports_to_one_store_the_second_is_refused_and_the_first_continues(
    make_store: Make, tmp_path: Path, monkeypatch: Any, name: str
) -> None:
    root, out = make_store()[1], tmp_path / name
    copy, refused = subset.ShardCopy.teacher, []

    def meanwhile(*args: Any) -> Any:
        if not refused:
            with pytest.raises(StoreError) as busy:
                targets_export(ExportConfig(store=str(root), out=str(out)), QUIET)
            refused.append(str(busy.value))
        return copy(*args)

    monkeypatch.setattr(subset.ShardCopy, "teacher", meanwhile)
    assert targets_export(ExportConfig(store=str(root), out=str(out)), QUIET)["videos"] > 0
    assert str(out) in refused[0]
    names = {path.name for path in out.parent.iterdir()}
    assert names - {"s.zarr"} == {"x.zarr", "x.zarr.config.yaml"}
    assert list(verify(out, load_index(out))) == []


@pytest.mark.slow
def test_invalid_exports_are_refused(make_store: Make, tmp_path: Path) -> None:
    root = make_store()[1]
    (tmp_path / "list.txt").write_text("v00\nnothing.mp4\n")
    for pattern, changes in (
        (r"must end in .h5, .hdf5 \(one HDF5 file\) or .zarr", {"out": "x.csv"}),
        ("exists already", {"out": "s.zarr"}),
        ("expected a local folder", {"out": "s3://bucket/x.zarr"}),
        ("the store has a, b", {"corpora": ["c"]}),
        ("it has: t", {"teachers": ["x"]}),
        ("2 of 2 lines name no video of .*first: 'v00'", {"videos_from": tmp_path / "list.txt"}),
        ("--shard-rows must be a multiple of 256", {"shard_rows": 100}),
        ("only a store", {"out": "x.h5", "shard_rows": 512}),
    ):
        out = str(changes.pop("out", "out.zarr"))  # type: ignore[attr-defined]
        out = out if "://" in out else str(tmp_path / out)
        with pytest.raises((UsageError, StoreError), match=pattern):
            targets_export(ExportConfig(store=str(root), out=str(out), **changes), QUIET)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.zarr", "x.h5"])
def test_a_finished_export_is_recognized_and_a_different_one_is_refused(
    make_store: Make, tmp_path: Path, name: str
) -> None:
    root, out = make_store()[1], tmp_path / name
    result = targets_export(ExportConfig(store=str(root), out=str(out)), QUIET)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert targets_export(ExportConfig(store=str(root), out=str(out)), QUIET) == result
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    first = TargetStore.open(root).place(0)
    (tmp_path / "list.txt").write_bytes(os.fsencode(first[1]) + b"\n")
    changes: list[dict[str, Any]] = [{"videos_from": tmp_path / "list.txt"}]
    if name == "x.zarr":
        changes.append({"shard_rows": 2048})
    for change in changes:
        with pytest.raises(UsageError):
            targets_export(ExportConfig(store=str(root), out=str(out), **change), QUIET)
    other = make_store("other.zarr", identity=2)[1]
    with pytest.raises(UsageError):
        targets_export(ExportConfig(store=str(other), out=str(out)), QUIET)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    out.write_bytes(b"another file")
    with pytest.raises(UsageError):
        targets_export(ExportConfig(store=str(root), out=str(out)), QUIET)
    assert out.read_bytes() == b"another file"


def tables_of(path: Path) -> dict[str, bytes]:
    tables: dict[str, bytes] = {}

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            tables[name] = item[()].tobytes()

    with h5py.File(path) as file:
        file.visititems(add)
    return tables


@pytest.mark.slow
def test_hdf5_itself_finds_every_flipped_bit_of_an_exported_file(
    make_store: Make, tmp_path: Path
) -> None:
    out = tmp_path / "x.h5"
    targets_export(ExportConfig(store=str(make_store()[1]), out=str(out)), QUIET)
    expected, num_detected = tables_of(out), 0
    for flip in flips(out, tmp_path / "y.h5", seed=0, per_kind=150):
        try:
            tables = tables_of(flip.path)
        # h5py raises errors of many kinds.
        except Exception:
            num_detected += 1
        else:
            assert tables == expected, flip
    assert num_detected > 100
