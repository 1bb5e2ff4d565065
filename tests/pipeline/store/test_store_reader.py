"""Compare the reader with plain zarr and xarray, and damage stores on disk in many ways."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

import distinit
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import StoreError, StoreMismatchError, UsageError
from distinit.pipeline.common.numerics import entropy
from distinit.pipeline.store import layout as fmt
from distinit.pipeline.store.index import load_index
from distinit.pipeline.store.planning import FrameRange
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.staging import (
    FramesPart,
    ShardResult,
    TeacherPart,
    new_staging,
    stage_array,
)
from distinit.pipeline.store.store_options import VerifyConfig
from distinit.pipeline.store.verify import Finding, drop_commits, verify
from distinit.pipeline.store.writer import StoreWriter
from distinit.stages import targets_verify as verifying
from distinit.stages.targets_verify import targets_verify
from distinit.tests import warm
from distinit.tests.old_stores import without_digests

SAMPLING = {"every": 4, "fps": None, "keyframes": False}
R, K, V = 512, 10, 40
RUN = {"batch_size": 4, "precision": "fp32", "torch": "x", "device": "cpu"}


def rows_of(video: int) -> int:
    return 0 if video % 7 == 3 else 20 + video


def logits_of(video: int) -> np.ndarray:
    return np.random.default_rng(video).normal(0, 3, (rows_of(video), K)).astype(np.float32)


def list_videos(writer: StoreWriter) -> None:
    """Write the video table."""
    columns = {
        "corpus": [v % 2 for v in range(V)],
        "path": [f"v{v:02d} ü%FF.mp4" for v in range(V)],
        "size": [1000 + v for v in range(V)],
        "digest": [[v + 1] * 16 for v in range(V)],
        "duration": [1.5] * V, "fps": [25.0] * V, "rows_bound": [rows_of(v) for v in range(V)],
        "time_base_num": [1] * V, "time_base_den": [12800] * V, "width": [64] * V, "height": [48] * V,
    }  # fmt: skip
    writer.add_videos(columns, [{"name": "a", "root": "/data/a"}, {"name": "b", "root": "/data/b"}])


def stage(writer: StoreWriter, shard: int, teacher: str = "t") -> ShardResult:
    """Return a worker's result for one shard, made from known logits."""
    index = writer.index
    ids = [int(s) for s in np.flatnonzero(index.shard == shard)]
    folder = new_staging(writer.root, shard)
    part, teacher_part = FramesPart(), TeacherPart()
    video, frame, z = [], [], []
    first = 0
    for s in ids:
        v = int(index.video[s])
        n = rows_of(v)
        part.segment.append(s)
        part.first_row.append(first if n else 0)
        part.rows.append(n)
        part.frames.append(4 * n if n else -1)
        if not n:
            part.failed[s] = "no video stream (audio only)"
        video += [v] * n
        frame += [4 * i for i in range(n)]
        z.append(logits_of(v))
        first += n
    data = {"video": np.array(video), "index": np.array(frame), "pts": np.array(frame) * 512}
    for spec in fmt.frame_specs():
        part.files += stage_array(folder, spec, shard, data[spec.name], R)
    values = np.concatenate(z)
    teacher_part.rows = len(values)
    for spec, x in zip(
        fmt.teacher_specs(teacher, K), (values.astype(np.float16), entropy(values)), strict=True
    ):
        teacher_part.files += stage_array(folder, spec, shard, x, R)
    return ShardResult(shard, part, {teacher: teacher_part}, str(folder))


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A finished store of 40 videos, 5 of them failed, in several shards."""
    return shutil.copytree(finished, tmp_path / "s.zarr")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that `root` copies."""
    path = tmp_path_factory.mktemp("finished") / "s.zarr"
    with StoreWriter(path, sampling=SAMPLING, shard_rows=R) as writer:
        list_videos(writer)
        writer.add_segments([FrameRange(v, 0, -1, rows_of(v)) for v in range(V)])
        writer.add_teacher(
            "t", [f"class {k}" for k in range(K)], {"name": "t", "identity": {"w": 1}, "run": RUN}
        )
        for shard in range(writer.index.n_shards):
            writer.commit(stage(writer, shard), RUN)
    return path


@pytest.mark.slow
def test_rows_equal_what_plain_zarr_and_xarray_read(root: Path) -> None:
    store = TargetStore.open(root)
    group = zarr.open_group(root, mode="r")
    frames = xr.open_zarr(root, group="frames", consolidated=False)
    teacher = xr.open_zarr(root, group="teachers/t", consolidated=False)
    assert frames["pts"].dims == ("frame",)
    assert teacher["logits"].dims == ("frame", "class")
    assert [str(c) for c in teacher["class"].values] == [f"class {k}" for k in range(K)]
    for v in range(V):
        index, pts, rows = store.frames(v)
        assert len(index) == rows_of(v)
        if not len(index):
            continue
        expected = logits_of(v)
        np.testing.assert_array_equal(
            store.logits("t", rows), expected.astype(np.float16).astype(np.float32)
        )
        np.testing.assert_array_equal(
            group["teachers/t/logits"][rows[0] : rows[-1] + 1], expected.astype(np.float16)
        )
        np.testing.assert_array_equal(teacher["entropy"].values[rows], store.entropy("t", rows))
        p = np.exp(expected - expected.max(1, keepdims=True), dtype=np.float64)
        p /= p.sum(1, keepdims=True)
        np.testing.assert_allclose(store.entropy("t", rows), -(p * np.log(p)).sum(1), atol=1e-5)
        assert (frames["video"].values[rows] == v).all()
        assert (frames["pts"].values[rows] == pts).all()
    used = np.concatenate([store.frames(v)[2] for v in range(V)])
    fill = np.setdiff1d(np.arange(store.index.n_shards * R), used)
    assert (frames["video"].values[fill] == -1).all()
    assert np.isnan(teacher["logits"].values[fill]).all()


def test_records_statuses_and_paths(root: Path) -> None:
    store = TargetStore.open(root)
    assert store.usable().tolist() == [v for v in range(V) if rows_of(v)]
    record = store.video(3)
    assert (record.status, record.reason, record.rows) == (
        "failed",
        "no video stream (audio only)",
        0,
    )
    record = store.video(5)
    assert (record.status, record.frames, record.rows, record.corpus) == ("ok", 100, 25, "b")
    assert record.path == "v05 ü\udcff.mp4"
    assert store.video_path(5, {"b": "/new"}) == f"/new/{record.path}"
    with pytest.raises(UsageError, match="it has: t"):
        store.usable(["x"])


def test_a_store_can_be_passed_to_workers(root: Path) -> None:
    store = TargetStore.open(root)
    rows = store.frames(5)[2]
    expected = store.logits("t", rows)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).logits("t", rows), expected)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if (store.logits("t", rows) == expected).all() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    np.testing.assert_array_equal(store.logits("t", rows), expected)


@pytest.mark.slow
def test_uncommitted_rows_do_not_exist(root: Path) -> None:
    index = load_index(root)
    videos = sorted({int(v) for v in index.video[index.shard == 1]})
    drop_commits(root, [Finding("damaged", 1)])
    store = TargetStore.open(root)
    assert {store.video(v).status for v in videos} == {"pending"}
    assert not set(store.usable()) & set(videos)
    # A second run writes the same bytes again.
    with StoreWriter(root, sampling=SAMPLING) as writer:
        before = {p: p.read_bytes() for p in root.glob("*/**/c/1/**/*") if p.is_file()}
        writer.commit(stage(writer, 1), RUN)
    assert before
    assert all(p.read_bytes() == data for p, data in before.items())
    assert TargetStore.open(root).video(videos[0]).status in ("ok", "failed")


def test_a_superseded_attempt_changes_nothing(root: Path) -> None:
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    with StoreWriter(root, sampling=SAMPLING) as writer:
        attempt = stage(writer, 0)
        Path(attempt.frames.files[0].staged).write_bytes(b"other")  # type: ignore[union-attr]
        writer.commit(attempt, RUN)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_verify_names_every_kind_of_damage(root: Path, tmp_path: Path) -> None:
    assert list(verify(root, load_index(root))) == []
    logits = root / "teachers/t/logits/c/0/0"
    intact = logits.read_bytes()
    flipped = bytearray(intact)
    flipped[37] ^= 4
    cases = {
        "digest": lambda: logits.write_bytes(bytes(flipped)),
        "were committed": lambda: logits.write_bytes(intact[:-9]),
        "is missing": lambda: logits.unlink(),
        "differs from what was committed": lambda: logits.write_bytes(
            (root / "teachers/t/logits/c/1/0").read_bytes()
        ),
    }
    for text, damage in cases.items():
        damage()
        findings = list(verify(root, load_index(root)))
        assert [(f.shard, f.teacher) for f in findings] == [(0, "t")]
        assert text in findings[0].what or "bytes" in findings[0].what
        logits.write_bytes(intact)
    node = root / "commits/teachers/t/000001/zarr.json"
    node.rename(tmp_path / "away")
    node.parent.rmdir()
    assert [(f.shard, f.teacher) for f in verify(root, load_index(root))] == [(1, "t")]


def damaged(
    root: Path, *, lost: str = "", column: str = "", row: int = 0, value: object = None
) -> list[str]:
    """Return the findings in a store without digests that lost a folder or has a changed value."""
    without_digests(root)
    if lost:
        shutil.rmtree(root / lost)
    else:
        zarr.open_array(root / column, mode="r+")[row : row + 1] = np.array([value])
    result = targets_verify(VerifyConfig(store=str(root)), Console(quiet=True))
    assert result["ok"] is False
    return [f["what"] for f in result["findings"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("videos/path/c", "videos/path/c/0 is missing"),
        ("videos/corpus/c", "videos/corpus/c/0 is missing"),
        ("plans/000000", "plans/000000 is missing"),
        ("plans/000001", "plans/000001 is missing"),
    ],
)
def test_a_lost_plan_or_video_table_is_detected_and_never_extended(
    root: Path, lost: str, message: str
) -> None:
    assert message in damaged(root, lost=lost)
    for opened in (lambda: StoreWriter(root, sampling=SAMPLING), lambda: TargetStore.open(root)):
        with pytest.raises(StoreError, match=f"{message}; `distinit targets verify {root}`"):
            opened()


@pytest.mark.slow
@pytest.mark.parametrize("column", ["segments/video", "segments/shard"])
def test_a_lost_segment_table_is_reported(root: Path, column: str) -> None:
    commits = sorted(root.glob("commits/*/*/zarr.json"))
    shutil.copytree(root, root.with_name("sealed.zarr"))
    shutil.rmtree(root.with_name("sealed.zarr") / column / "c")
    result = targets_verify(
        VerifyConfig(store=str(root.with_name("sealed.zarr"))), Console(quiet=True)
    )
    assert any(column in finding["what"] for finding in result["findings"])
    assert any(column in what for what in damaged(root, lost=f"{column}/c"))
    assert (
        targets_verify(VerifyConfig(store=str(root), repair=True), Console(quiet=True))["dropped"]
        == 0
    )
    assert sorted(root.glob("commits/*/*/zarr.json")) == commits
    with pytest.raises(StoreError, match=column):
        TargetStore.open(root)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lost": "videos/path/c"}, f"videos/path: {V} videos have no path"),
        ({"lost": "videos/corpus/c"}, f"videos/corpus: {V} videos are in no corpus that the plans name"),
        ({"lost": "videos/digest/c"}, f"videos/digest: {V - 6} videos have frames, but no digest"),
        ({"lost": "videos/size/c"}, f"videos/size: {V - 6} videos have frames, but no size"),
        ({"lost": "plans/000001"}, "commits/frames/000002: no plan names this shard"),
        ({"lost": "plans/000002"}, "commits/teachers/t: no plan names this teacher"),
        ({"column": "videos/path", "row": 7, "value": ""}, "videos/path: 1 videos have no path"),
        ({"column": "videos/path", "row": 7, "value": "v05 ü%FF.mp4"}, "listed more than once, the first is v05"),
        ({"column": "videos/corpus", "row": 7, "value": 2}, "videos/corpus: 1 videos are in no corpus"),
        ({"column": "segments/video", "row": 7, "value": 6}, "segments: 1 overlap the previous segment"),
    ],
)  # fmt: skip
def test_verify_reads_the_tables(root: Path, change: dict[str, Any], message: str) -> None:
    assert any(message in what for what in damaged(root, **change))


@pytest.mark.slow
def test_a_table_that_is_too_short_or_cannot_be_decoded_is_reported(root: Path) -> None:
    zarr.open_array(without_digests(root) / "videos/size", mode="r+").resize((3,))
    assert f"array videos/size has 3 rows, {V} are planned" in damaged(root, lost="videos/digest/c")
    (root / "videos/path/c/0").write_bytes(b"cut")
    assert any(
        "videos/path/c/0: cannot be decoded" in what
        for what in damaged(root, column="videos/fps", value=1.0)
    )


def test_a_lost_teacher_plan_is_not_repaired_and_nothing_else_is_dropped(root: Path) -> None:
    shutil.rmtree(root / "plans/000002")
    assert (
        targets_verify(VerifyConfig(store=str(root), repair=True), Console(quiet=True))["dropped"]
        == 0
    )
    assert (root / "commits/teachers/t/000000").exists()


def test_a_store_is_locked_while_a_repair_looks_for_damage(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify_locked(*args: Any) -> Iterator[Finding]:
        with pytest.raises(StoreError, match="another process is writing"):
            StoreWriter(root, sampling=TargetStore.open(root).attributes["sampling"])
        return verify(*args)

    monkeypatch.setattr(verifying, "verify", verify_locked)
    shutil.rmtree(root / "teachers/t/logits/c/0")
    assert (
        targets_verify(VerifyConfig(store=str(root), repair=True), Console(quiet=True))["dropped"]
        == 1
    )


def test_a_flipped_bit_or_a_missing_shard_is_not_read_as_data(root: Path) -> None:
    store = TargetStore.open(root)
    rows = store.frames(0)[2]
    path = root / "teachers/t/logits/c/0/0"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="crc32c"):
        TargetStore.open(root).logits("t", rows)
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        TargetStore.open(root).logits("t", rows)


def test_third_party_corrupt_and_different_stores_are_refused_by_name(
    root: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="no such target store"):
        TargetStore.open(tmp_path / "nowhere")
    zarr.open_group(tmp_path / "other", mode="w")
    with pytest.raises(StoreError, match="not a target store"):
        TargetStore.open(tmp_path / "other")
    (tmp_path / "file").write_text("no store")
    with pytest.raises(
        StoreError, match="file: is a file, expected a target store, which is a folder"
    ):
        TargetStore.open(tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(StoreError, match=r"no zarr\.json"):
        StoreWriter(tmp_path / "full", sampling=SAMPLING)
    with pytest.raises(StoreMismatchError, match=r'"every": 4.*"every": 2'):
        StoreWriter(root, sampling={**SAMPLING, "every": 2})
    with StoreWriter(root, sampling=SAMPLING) as writer:
        with pytest.raises(
            StoreMismatchError, match=r"teacher 't'.*identity.w is 1 in the store, 2"
        ):
            writer.add_teacher("t", ["c"] * K, {"name": "t", "identity": {"w": 2}, "run": RUN})
        with pytest.raises(StoreError, match="another process"):
            StoreWriter(root, sampling=SAMPLING)
    document = json.loads((root / "zarr.json").read_text())
    document["attributes"]["distinit"]["version"] = 3
    (root / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(StoreError, match="version 3"):
        TargetStore.open(root)
    (root / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="corrupt"):
        TargetStore.open(root)


def test_unfinished_stores_of_killed_processes_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    unfinished, other_store, running = (
        tmp_path / f".{name}" for name in (f"t.new-{ended.pid}", f"u.new-{ended.pid}", "t.new-1")
    )
    for folder in (unfinished, other_store, running):
        folder.mkdir()
    with StoreWriter(tmp_path / "t", sampling=SAMPLING):
        pass
    assert [folder.exists() for folder in (unfinished, other_store, running)] == [False, True, True]


@pytest.mark.slow
def test_zarr_opens_all_members_without_warnings(root: Path) -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('error'); import zarr;"
        "g = zarr.open_group(sys.argv[1], mode='r'); print(len(list(g.members(max_depth=None))))"
    )
    process = warm.run(root, code=code)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 20


def test_the_example_of_the_documentation_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(distinit.__file__).parent / "docs" / "store-format.md"
    (example,) = re.findall(
        r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "targets.zarr").symlink_to(root)
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(example.replace("efficientnet_lite0", "t"), {})
    best, nats = out.getvalue().split()
    assert int(best) == logits_of(0)[0].argmax()
    assert float(nats) == pytest.approx(float(entropy(logits_of(0)[:1])[0]), abs=1e-4)


def test_a_video_is_read_without_searching_all_segments(
    make_store: Callable[..., tuple[Any, Path]],
) -> None:
    """Compare the record of each video with a search through all segments."""
    _, root = make_store(videos=range(40))
    store = TargetStore.open(root)
    index = store.index
    index.note[int(np.flatnonzero(index.video == 5)[0])] = "cut off"
    for i in range(store.n_videos):
        live = np.flatnonzero(index.live & (index.video == i)).tolist()
        record = store.video(i)
        assert record.reason == next((index.reason[s] for s in live if s in index.reason), None)
        assert record.note == next((index.note[s] for s in live if s in index.note), None)
        assert record.rows == index.rows[live].sum()
    order = np.array([7, 3, 0, 39, 5])
    assert (
        store.rows_of(order).tolist()
        == np.concatenate([store.frames(int(i))[2] for i in order]).tolist()
    )
    assert store.rows_of(np.empty(0, np.int64)).tolist() == []
    # The record is read without these arrays.
    index.video = index.replaces = np.empty(0)
    assert store.video(5).note == "cut off"
