"""--retry-failed: what failed is tried again, and what is stored stays, whatever became of the
files meanwhile."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distinit.pipeline.common.console import Console
from distinit.pipeline.extraction import extraction as stage
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.extraction.retry import MIXED
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.subset import write_subset
from distinit.pipeline.store.verify import verify
from distinit.pipeline.store.writer import StoreWriter
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.sampling import Sampling
from distinit.stages.extract_targets import extract_targets

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
A, B = (
    TeacherSpec(
        name="random_teachers:teacher",
        options={"name": n, "input_size": "32", "resize": "32", "k": k},
    )
    for n, k in (("a", "6"), ("b", "4"))
)


@pytest.fixture
def videos(tmp_path: Path, random_teachers: None) -> Path:
    """Five short videos, the last a bright one."""
    (tmp_path / "videos").mkdir()
    for i in range(5):
        film(tmp_path / "videos" / f"v{i}.mp4", i, 30 + 7 * i, shade=200 if i == 4 else 20)
    return tmp_path / "videos"


def film(path: Path, seed: int, frames: int, *, shade: int = 20) -> None:
    rng = np.random.default_rng(seed)
    images = shade + rng.integers(0, 40, (1, 4, 6, 3)) + rng.integers(0, 15, (frames, 1, 1, 3))
    write_video(path, images.repeat(8, 1).repeat(8, 2).astype(np.uint8), fps=25, gop=50)


def config(out: Path, *sources: Any, **changes: Any) -> ExtractConfig:
    base = {
        "sources": [str(s) for s in sources],
        "out": out,
        "teachers": [A],
        "batch_size": 8,
        "decoders": 1,
    }
    return ExtractConfig.model_validate(
        {**base, "shard_rows": 256, "sampling": Sampling(every=1), **changes}
    )


def said(of: ExtractConfig) -> tuple[dict[str, Any], str]:
    stderr = io.StringIO()
    with Console(stderr=stderr) as console:
        return extract_targets(of, console), stderr.getvalue()


def content(path: Path, teacher: str) -> dict[str, tuple[Any, ...]]:
    """Return the identity, frames and exact teacher outputs of each video."""
    store = TargetStore.open(path)
    records = {}
    for v in store.usable([teacher]).tolist():
        index, pts, rows = store.frames(v)
        logits = (
            store.read_stored(teacher, "logits", rows).tobytes(),
            store.entropy(teacher, rows).tobytes(),
        )
        records[store.video(v).path] = (
            store.video(v).size,
            store.digest(v),
            index.tolist(),
            pts.tolist(),
            *logits,
        )
    return records


def sound(path: Path) -> bool:
    return list(verify(path, TargetStore.open(path).index)) == []


def test_a_teacher_that_failed_is_tried_again_and_the_others_rows_stay(
    videos: Path, tmp_path: Path
) -> None:
    out, away = tmp_path / "s.zarr", tmp_path / "away"
    extract_targets(config(out, videos), QUIET)
    before = content(out, "a")
    assert len(before) == 5
    videos.rename(away)
    result, lines = said(config(out, teachers=[B]))
    assert (result["ok"], result["teachers"]) == (5, {"b": 0})
    assert result["teacher_failures"] == {"b": {"no such file": 5}}
    assert "5 videos" in lines
    assert "5  no such file" in lines
    assert "nothing to do" not in lines
    write_subset(
        TargetStore.open(out), tmp_path / "some.zarr", np.arange(5), ["a", "b"]
    )  # a shard of no row of b
    assert content(tmp_path / "some.zarr", "a") == before
    planned = len(TargetStore.open(out).index.video)
    result, lines = said(config(out, teachers=[B], retry_failed=True))
    assert "0 failed" in lines
    assert "5 are left" in lines
    assert len(TargetStore.open(out).index.video) == planned
    assert content(out, "a") == before
    result = extract_targets(config(out, f"videos={away}", teachers=[B], retry_failed=True), QUIET)
    assert (result["ok"], result["teachers"], result["teacher_failures"]) == (
        5,
        {"b": 5},
        {"b": {}},
    )
    assert content(out, "a") == before
    assert sound(out)
    both = tmp_path / "both.zarr"
    extract_targets(config(both, away, teachers=[A, B]), QUIET)
    assert [content(out, t) for t in "ab"] == [content(both, t) for t in "ab"]


def test_killed_between_plan_and_copy_a_retry_loses_nothing(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, away = tmp_path / "s.zarr", tmp_path / "away"
    extract_targets(config(out, videos), QUIET)
    before = content(out, "a")
    videos.rename(away)
    extract_targets(config(out, teachers=[B]), QUIET)
    away.rename(videos)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "copy_stored", killed)
        with pytest.raises(KeyboardInterrupt):
            extract_targets(config(out, teachers=[B], retry_failed=True), QUIET)
    shutil.move(videos, away)  # and no file to compute anything from
    assert extract_targets(config(out), QUIET)["teachers"] == {"a": 5}
    assert content(out, "a") == before
    assert sound(out)
    shutil.move(away, videos)
    assert extract_targets(config(out, teachers=[B], retry_failed=True), QUIET)["teachers"] == {
        "b": 5
    }
    assert content(out, "a") == before
    assert sound(out)


def test_a_retry_of_several_teachers_copies_what_each_has(videos: Path, tmp_path: Path) -> None:
    """`a` fails under one video for good, `b` under two others whose files were away: named
    together."""
    out = tmp_path / "s.zarr"
    broken = A.model_copy(update={"options": {**A.options, "broken": "0.9"}})
    assert extract_targets(config(out, videos, teachers=[broken]), QUIET)["teachers"] == {"a": 4}
    before = content(out, "a")
    for name in ("v1.mp4", "v4.mp4"):
        (videos / name).rename(tmp_path / name)
    assert extract_targets(config(out, teachers=[B]), QUIET)["teachers"] == {"b": 3}
    for name in ("v1.mp4", "v4.mp4"):
        (tmp_path / name).rename(videos / name)
    result = extract_targets(config(out, teachers=[broken, B], retry_failed=True), QUIET)
    assert result["teachers"] == {"a": 4, "b": 5}
    ((reason, count),) = result["teacher_failures"]["a"].items()
    assert ("not finite" in reason, count) == (True, 1)
    assert content(out, "a") == before
    assert sound(out)


def test_a_file_that_cannot_be_read_again_keeps_its_identity(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    whole = (videos / "v3.mp4").read_bytes()
    (videos / "v3.mp4").write_bytes(whole[:500])
    assert extract_targets(config(out, videos), QUIET)["failed"] == 1
    store = TargetStore.open(out)
    number = next(v for v in range(5) if store.video(v).path == "v3.mp4")
    (videos / "v3.mp4").unlink()
    result = extract_targets(config(out, retry_failed=True), QUIET)
    assert result["failures"] == {"no such file": 1}
    assert TargetStore.open(out).video(number).size == 500
    (videos / "v3.mp4").write_bytes(
        whole
    )  # nothing is stored of it: this is what it is from now on
    assert extract_targets(config(out, retry_failed=True), QUIET)["ok"] == 5
    assert TargetStore.open(out).video(number).size == len(whole)
    assert sound(out)


def test_two_versions_of_a_file_never_make_one_video(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, out = tmp_path / "long", tmp_path / "s.zarr"
    long.mkdir()
    film(tmp_path / "first.mp4", 10, 700)
    film(tmp_path / "other.mp4", 11, 700)
    shutil.copy(tmp_path / "first.mp4", long / "long.mp4")
    extract_targets(config(tmp_path / "whole.zarr", long), QUIET)
    commit = StoreWriter.commit

    def killed_after_one(self: StoreWriter, *of: Any) -> None:
        commit(self, *of)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "commit", killed_after_one)
        with pytest.raises(KeyboardInterrupt):
            extract_targets(config(out, long), QUIET)
    digest = TargetStore.open(out).digest(0)
    shutil.copy(tmp_path / "other.mp4", long / "long.mp4")
    assert extract_targets(config(out), QUIET)["failures"] == {
        "the file changed after it was listed": 1
    }
    for _ in range(2):
        result, lines = said(config(out, retry_failed=True))
        assert (result["failed"], result["failures"]) == (1, {MIXED: 1})
        assert "are left" in lines
        store = TargetStore.open(out)
        assert store.digest(0) == digest
        assert store.frames(0)[0].tolist() == list(range(250))
        assert len(store.usable()) == 0
        assert sound(out)
    shutil.copy(tmp_path / "first.mp4", long / "long.mp4")
    assert extract_targets(config(out, retry_failed=True), QUIET)["ok"] == 1
    assert content(out, "a") == content(tmp_path / "whole.zarr", "a")
    assert sound(out)
