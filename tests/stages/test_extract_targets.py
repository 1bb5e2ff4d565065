"""Stage one on real files: equal to an own full decode, whatever interrupts it, whatever lies in
the folder."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import SourceError, StoreMismatchError, UsageError
from distinit.pipeline.common.numerics import entropy
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.store.index import load_index
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.verify import verify
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.geometry import View, render
from distinit.pipeline.video.sampling import Sampling
from distinit.stages.extract_targets import extract_targets
from distinit.tests import warm

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
OPTIONS = {"name": "tiny", "input_size": "32", "resize": "32", "k": "6"}
SPEC = TeacherSpec(name="random_teachers:teacher", options=OPTIONS)


@pytest.fixture
def folder(tmp_path: Path, random_teachers: None) -> Path:
    """Twelve videos of odd lengths and names, an audio file, a text file named .mp4, a cut-off
    file."""
    videos = tmp_path / "videos"
    videos.mkdir()
    rng = np.random.default_rng(0)
    names = ["-dash.mp4", "sp ace.mkv", "ü.avi", *(f"v{i}.mp4" for i in range(9))]
    for i, name in enumerate(names):
        base = rng.integers(0, 256, (1, 6, 8, 3)).repeat(8, 1).repeat(8, 2)
        frames = (base + rng.integers(0, 60, (7 + 5 * i, 1, 1, 3))).clip(0, 255).astype(np.uint8)
        write_video(videos / name, frames, fps=25, gop=10)
    shutil.copy(videos / "v1.mp4", os.fsencode(str(videos)) + b"/\xe9.mp4")
    (videos / "playlist.mp4").write_text("ffconcat version 1.0\nfile v1.mp4\n")
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "cut.mp4").write_bytes((videos / "v8.mp4").read_bytes()[:700])
    return videos


def config(folder: Path, out: Path, **changes: Any) -> ExtractConfig:
    base = {
        "sources": [str(folder)],
        "out": out,
        "teachers": [SPEC],
        "batch_size": 8,
        "shard_rows": 256,
    }
    return ExtractConfig.model_validate(base | changes)


def arrays(root: Path) -> dict[str, np.ndarray]:
    group = zarr.open_group(root, mode="r")
    return {
        name: np.asarray(a[:])
        for name, a in group.members(max_depth=None)
        if isinstance(a, zarr.Array)
    }


def same(a: Path, b: Path) -> None:
    x, y = arrays(a), arrays(b)
    assert x.keys() == y.keys()
    for name in x:
        np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def test_every_row_is_the_teacher_on_the_plainly_decoded_frame(
    folder: Path, tmp_path: Path
) -> None:
    result = extract_targets(config(folder, tmp_path / "s.zarr", sampling=Sampling(every=3)), QUIET)
    assert (result["videos"], result["ok"], result["failed"]) == (16, 13, 3)
    store = TargetStore.open(tmp_path / "s.zarr")
    sys.modules.pop("random_teachers", None)
    import random_teachers

    module = random_teachers.teacher(6)
    view = View(resize=32, crop=32)
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    for v in store.usable():
        index, pts, rows = store.frames(int(v))
        with VideoReader(store.video_path(int(v))) as reader:
            plain = [(i, p, render(f, view)) for i, p, f in reader.decode_plain()]
        wanted = plain[::3]
        assert index.tolist() == [i for i, _, _ in wanted]
        assert pts.tolist() == [p for _, p, _ in wanted]
        assert store.frame_counts[v] == len(plain)
        images = torch.from_numpy(np.stack([x for _, _, x in wanted])).permute(0, 3, 1, 2) / 255
        with torch.inference_mode():
            expected = module((images - mean) / std).numpy()
        np.testing.assert_allclose(store.logits("tiny", rows), expected, atol=0.02)
        np.testing.assert_allclose(store.entropy("tiny", rows), entropy(expected), atol=1e-3)
    reasons = {
        store.video(v).path: store.video(v).reason
        for v in range(16)
        if store.video(v).status == "failed"
    }
    assert set(reasons) == {"playlist.mp4", "empty.mp4", "cut.mp4"}
    assert "playlist" in reasons["playlist.mp4"]
    assert "empty" in reasons["empty.mp4"]


def test_a_second_run_does_nothing_and_growth_touches_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    late = [folder / "v7.mp4", folder / "v8.mp4"]
    for p in late:
        p.rename(tmp_path / p.name)
    extract_targets(config(folder, out), QUIET)
    before = {
        p: p.read_bytes() for p in out.rglob("c/**/*") if p.is_file() and "videos" not in p.parts
    }
    assert extract_targets(config(folder, out), QUIET)["new_rows"] == 0
    for p in late:
        (tmp_path / p.name).rename(p)
    grown = extract_targets(config(folder, out), QUIET)
    assert (grown["videos"], grown["ok"]) == (16, 13)
    assert grown["new_rows"] > 0
    other = TeacherSpec(name=SPEC.name, options={**SPEC.options, "name": "second", "k": "4"})
    added = extract_targets(config(folder, out, teachers=[other]), QUIET)
    assert added["teachers"] == {"second": 13}
    index = load_index(out)
    assert list(verify(out, index)) == []
    segments = {p: d for p, d in before.items() if "segments" not in p.parts}
    assert all(p.read_bytes() == d for p, d in segments.items())
    together = tmp_path / "both.zarr"
    extract_targets(config(folder, together, teachers=[SPEC, other]), QUIET)
    a, b = TargetStore.open(out), TargetStore.open(together)
    video_of = {a.video(v).path: v for v in range(16)}
    for v in b.usable():
        rows_a, rows_b = a.frames(video_of[b.video(int(v)).path])[2], b.frames(int(v))[2]
        np.testing.assert_allclose(
            a.logits("second", rows_a), b.logits("second", rows_b), atol=0.02
        )


def test_killed_at_any_moment_the_store_becomes_that_of_an_undisturbed_run(
    folder: Path, tmp_path: Path
) -> None:
    for i in range(30):  # enough work to be hit in the midst of it
        shutil.copy(folder / f"v{i % 9}.mp4", folder / f"w{i:02d}.mp4")
    options = [
        "--teacher",
        SPEC.name,
        "--batch-size",
        "8",
        "--every",
        "1",
        "--set",
        "shard_rows=256",
    ]
    options += [x for k, v in SPEC.options.items() for x in ("--teacher-option", f"{k}={v}")]
    command = ["extract-targets", str(folder), *options, "--out"]
    began = time.monotonic()
    assert warm.run(*command, tmp_path / "whole.zarr").returncode == 0
    seconds = time.monotonic() - began
    broken = tmp_path / "broken.zarr"
    for share in (0.6, 0.85):
        process = warm.Process(*command, broken)
        time.sleep(share * seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert warm.run(*command, broken).returncode == 0
    same(tmp_path / "whole.zarr", broken)
    assert not (broken / "staging").exists()
    assert [p.name for p in tmp_path.glob(".*.new*")] == []


def test_failures_are_tried_again_on_request_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    whole = (folder / "v8.mp4").read_bytes()
    extract_targets(config(folder, out), QUIET)
    (folder / "cut.mp4").write_bytes(whole)
    assert extract_targets(config(folder, out), QUIET)["failed"] == 3
    again = extract_targets(config(folder, out, retry_failed=True), QUIET)
    assert (again["ok"], again["failed"]) == (14, 2)
    store = TargetStore.open(out)
    video_of = {store.video(v).path: v for v in range(16)}
    np.testing.assert_array_equal(
        store.frames(video_of["cut.mp4"])[0], store.frames(video_of["v8.mp4"])[0]
    )
    assert list(verify(out, load_index(out))) == []


def test_a_teacher_that_returns_nan_fails_that_video_alone(folder: Path, tmp_path: Path) -> None:
    spec = TeacherSpec(name=SPEC.name, options={**SPEC.options, "broken": "0.9"})
    result = extract_targets(config(folder, tmp_path / "s.zarr", teachers=[spec]), QUIET)
    store = TargetStore.open(tmp_path / "s.zarr")
    assert result["ok"] == 13
    assert 0 < result["teachers"]["tiny"] < 13
    reasons = store.index.video_reasons("tiny")
    assert any("not finite" in r for r in reasons.values())
    assert len(store.usable()) == result["teachers"]["tiny"]
    assert list(verify(store.path, store.index)) == []


def test_long_videos_are_cut_into_segments_that_read_as_one(folder: Path, tmp_path: Path) -> None:
    frames = np.random.default_rng(1).integers(0, 255, (700, 2, 2, 3)).repeat(16, 1).repeat(16, 2)
    (tmp_path / "long").mkdir()
    write_video(tmp_path / "long" / "long.mp4", frames.astype(np.uint8), fps=25, gop=50)
    cut = config(
        tmp_path / "long", tmp_path / "cut.zarr", sampling=Sampling(every=1), shard_rows=256
    )
    whole = config(
        tmp_path / "long", tmp_path / "whole.zarr", sampling=Sampling(every=1), shard_rows=1024
    )
    extract_targets(cut, QUIET)
    extract_targets(whole, QUIET)
    a, b = TargetStore.open(tmp_path / "cut.zarr"), TargetStore.open(tmp_path / "whole.zarr")
    assert len(a.index.video) > 2
    assert len(b.index.video) == 1
    for x, y in zip(a.frames(0)[:2], b.frames(0)[:2], strict=True):
        np.testing.assert_array_equal(x, y)
    assert a.frames(0)[0].tolist() == list(range(700))
    np.testing.assert_allclose(
        a.entropy("tiny", a.frames(0)[2]), b.entropy("tiny", b.frames(0)[2]), atol=1e-4
    )


def test_what_does_not_fit_a_store_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    extract_targets(config(folder, out), QUIET)
    with pytest.raises(StoreMismatchError, match="every"):
        extract_targets(config(folder, out, sampling=Sampling(every=2)), QUIET)
    changed = TeacherSpec(name=SPEC.name, options={**SPEC.options, "k": "7"})
    with pytest.raises(StoreMismatchError, match="tiny"):
        extract_targets(config(folder, out, teachers=[changed]), QUIET)
    with pytest.raises(StoreMismatchError, match="batch_size"):
        extract_targets(config(folder, out, batch_size=16), QUIET)
    with open(folder / "v3.mp4", "ab") as f:
        f.write(b"more")
    with pytest.raises(StoreMismatchError, match=r"v3.mp4.* \d+ bytes"):
        extract_targets(config(folder, out), QUIET)
    with pytest.raises(SourceError, match="nowhere"):
        extract_targets(config(tmp_path / "nowhere", out), QUIET)


@pytest.mark.cluster
@pytest.mark.usefixtures("forked_workers")
def test_dask_workers_fill_the_same_store(folder: Path, tmp_path: Path) -> None:
    extract_targets(config(folder, tmp_path / "one.zarr", sampling=Sampling(every=1)), QUIET)
    extract_targets(
        config(folder, tmp_path / "two.zarr", sampling=Sampling(every=1), workers=2), QUIET
    )
    same(tmp_path / "one.zarr", tmp_path / "two.zarr")


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    costs = extract_targets(config(folder, tmp_path / "s.zarr", dry_run=True), QUIET)["costs"]
    assert [
        p for p in sorted(tmp_path.rglob("*")) if p not in before and "__pycache__" not in str(p)
    ] == []
    by = {c["sampling"]: c for c in costs}
    extract_targets(config(folder, tmp_path / "s.zarr"), QUIET)
    assert by["every 4th frame"]["rows"] == TargetStore.open(tmp_path / "s.zarr").n_rows


def test_hours_above_the_limit_are_refused_before_a_row_is_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    limited = config(folder, tmp_path / "out/t.zarr", max_hours=1e-9)
    with pytest.raises(UsageError, match=r"--max-hours 1e-09.*--part I/N"):
        extract_targets(limited.model_copy(update={"dry_run": True}), QUIET)
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(UsageError, match=r"--max-hours 1e-09.*--part I/N"):
        extract_targets(limited, QUIET)
    assert load_index(tmp_path / "out/t.zarr").frame_commits == {}
    lines: list[str] = []
    monkeypatch.setattr(QUIET, "info", lines.append)
    result = extract_targets(limited.model_copy(update={"max_hours": 1.0}), QUIET)
    assert result["complete"]
    # Each unreadable video is named where the run ends, next to the reason.
    assert all(any(name in line for line in lines) for name in ("cut.mp4", "playlist.mp4"))
    assert result["new_rows"] > 0
    # Nothing is left to do, which takes no time.
    assert extract_targets(limited, QUIET)["new_rows"] == 0


def test_a_command_that_is_refused_lists_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    extract_targets(config(folder, out, encoding="float16"), QUIET)
    before = sorted(p.read_bytes() for p in out.rglob("*") if p.is_file())
    (tmp_path / "more").mkdir()
    shutil.copy(folder / "v1.mp4", tmp_path / "more" / "new.mp4")
    both = [str(folder), str(tmp_path / "more")]
    changed = TeacherSpec(name=SPEC.name, options={**SPEC.options, "k": "7"})
    other = TeacherSpec(name=SPEC.name, options={**SPEC.options, "name": "other"})
    refused: list[tuple[str, dict[str, Any]]] = [
        ("batch_size", {"batch_size": 16}), ("encoding", {"encoding": "int8"}),
        ("identity", {"teachers": [changed]}), ("identity", {"teachers": [other, changed]}),
    ]  # fmt: skip
    for what, options in refused:
        with pytest.raises(StoreMismatchError, match=what):
            extract_targets(config(folder, out, sources=both, **options), QUIET)
        assert sorted(p.read_bytes() for p in out.rglob("*") if p.is_file()) == before
    assert extract_targets(config(folder, out, sources=both), QUIET)["videos"] == 17


def test_a_corpus_may_move_and_grow_but_another_of_its_name_does_not_join_it(
    folder: Path, tmp_path: Path
) -> None:
    out, clips = tmp_path / "s.zarr", tmp_path / "p1" / "clips"
    other, moved = tmp_path / "p2" / "clips", tmp_path / "p3" / "clips"
    for place, name in ((clips, "v1.mp4"), (clips, "v2.mp4"), (other, "v3.mp4")):
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, place)
    extract_targets(config(clips, out), QUIET)
    joined = f"'clips'.*{clips}.* 2 of its 2 .*{other}.*new={other}"
    with pytest.raises(StoreMismatchError, match=joined):
        extract_targets(config(other, out), QUIET)
    assert TargetStore.open(out).n_videos == 2
    assert extract_targets(config(clips, out, sources=[f"new={other}"]), QUIET)["videos"] == 3
    moved.parent.mkdir()
    clips.rename(moved)
    assert extract_targets(config(moved, out), QUIET)["new_rows"] == 0
    shutil.copy(folder / "v4.mp4", moved)
    grown = extract_targets(config(moved, out), QUIET)
    assert (grown["videos"], grown["ok"]) == (4, 4)
    (moved / "v1.mp4").unlink()
    assert extract_targets(config(moved, out), QUIET)["videos"] == 4
    shutil.copy(folder / "v5.mp4", moved)
    with pytest.raises(StoreMismatchError, match="1 of its 3 "):
        extract_targets(config(moved, out), QUIET)


def test_a_list_may_move_away_from_what_it_names(folder: Path, tmp_path: Path) -> None:
    out, listed, lists = tmp_path / "s.zarr", tmp_path / "some.txt", tmp_path / "lists"
    listed.write_text("".join(f"{folder / name}\n" for name in ("v1.mp4", "v2.mp4", "gone.mp4")))
    extract_targets(config(listed, out), QUIET)
    lists.mkdir()
    listed = listed.rename(lists / "some.txt")
    assert extract_targets(config(listed, out), QUIET)["videos"] == 3
    with open(listed, "a") as f:
        f.write(f"{folder / 'v3.mp4'}\n")
    grown = extract_targets(config(listed, out), QUIET)
    assert (grown["videos"], grown["ok"]) == (4, 3)
    assert extract_targets(config(listed, out, sources=[]), QUIET)["new_rows"] == 0
    store = TargetStore.open(out)
    paths = sorted(store.video_path(v) for v in store.usable().tolist())
    assert paths == [str(folder / f"v{i}.mp4") for i in (1, 2, 3)]
