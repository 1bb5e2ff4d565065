"""`targets verify --frames`: a store as 0.1 wrote it, with frames in the decode order and uncropped
pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from distinit.pipeline.common.console import Console
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.store.digests import digest_bytes, seal
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import VerifyConfig
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.encode import transcode, write_video
from distinit.pipeline.video.sampling import Sampling
from distinit.stages.extract_targets import extract_targets
from distinit.stages.targets_verify import targets_verify
from distinit.tests.old_stores import without_digests

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three videos: one as it should be, one with decode times for pts, one of another size."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, size in (("good.mp4", 48), ("copied.avi", 48), ("small.mp4", 40)):
        shades = np.random.default_rng(len(name)).integers(0, 255, (30, 6, 8, 3), np.uint8)
        images = shades.repeat(8, 1).repeat(8, 2)[:, :size]
        write_video(folder / name, images, gop=10, bframes=2, extra={"x264-params": "b-adapt=0"})
    transcode(
        folder / "copied.avi", folder / "copied.mp4", codec="copy", extra={"fps_mode": "auto"}
    )
    (folder / "copied.avi").unlink()
    return folder


def extract(videos: Path, store: Path) -> None:
    spec = TeacherSpec(
        name="random_teachers:teacher", options={"name": "t", "k": "4", "input_size": "32"}
    )
    config = ExtractConfig(
        sources=[str(videos)], out=store, teachers=[spec], sampling=Sampling(every=1)
    )
    extract_targets(config, QUIET)


def spoil(store: Path) -> None:
    """Put decode times where 0.1 believed them, and the size that it saw."""
    without_digests(store)
    record = TargetStore.open(store)
    paths = [record.place(video)[1] for video in range(record.n_videos)]
    copied, small = paths.index("copied.mp4"), paths.index("small.mp4")
    pts = zarr.open_array(store / "frames" / "pts", mode="r+")
    rows = np.concatenate([np.arange(record.index.row[s], record.index.row[s] + record.index.rows[s])
                           for s in record.segments(copied).tolist()])  # fmt: skip
    whole = pts[:]
    whole[rows] = 512 * np.arange(len(rows))
    pts[:] = whole
    for node in (store / "commits" / "frames").glob(
        "*/zarr.json"
    ):  # as if they had been written so
        document = json.loads(node.read_text())
        for name, file in document["attributes"]["distinit"]["files"].items():
            data = (store / name).read_bytes()
            file.update(size=len(data), blake2b=digest_bytes(data))
        node.write_bytes(seal(document))
    height = zarr.open_array(store / "videos" / "height", mode="r+")
    height[small : small + 1] = 56


@pytest.mark.usefixtures("random_teachers")
def test_frames_that_the_files_do_not_have_are_found_and_made_again(
    videos: Path, tmp_path: Path
) -> None:
    extract(videos, tmp_path / "fresh.zarr")
    assert targets_verify(VerifyConfig(store=str(tmp_path / "fresh.zarr"), frames=True), QUIET)[
        "ok"
    ]
    shutil.copytree(tmp_path / "fresh.zarr", tmp_path / "old.zarr")
    spoil(tmp_path / "old.zarr")
    assert targets_verify(VerifyConfig(store=str(tmp_path / "old.zarr")), QUIET)["ok"]
    result = targets_verify(
        VerifyConfig(store=str(tmp_path / "old.zarr"), frames=True, repair=True), QUIET
    )
    named = {Path(finding["what"].split(":")[0]).name for finding in result["findings"]}
    assert named == {"copied.mp4", "small.mp4"}
    assert result["dropped"] > 0
    extract(videos, tmp_path / "old.zarr")
    assert targets_verify(VerifyConfig(store=str(tmp_path / "old.zarr"), frames=True), QUIET)["ok"]
    old, fresh = TargetStore.open(tmp_path / "old.zarr"), TargetStore.open(tmp_path / "fresh.zarr")
    for video in range(fresh.n_videos):
        for one, other in zip(old.frames(video), fresh.frames(video), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(
            old.logits("t", old.frames(video)[2]), fresh.logits("t", fresh.frames(video)[2])
        )
        assert old.video(video) == fresh.video(video)


@pytest.mark.usefixtures("random_teachers")
def test_videos_that_are_gone_or_changed_are_named(videos: Path, tmp_path: Path) -> None:
    extract(videos, tmp_path / "t.zarr")
    (videos / "small.mp4").unlink()
    with (videos / "good.mp4").open("ab") as file:
        file.write(b"\0" * 10)
    result = targets_verify(VerifyConfig(store=str(tmp_path / "t.zarr"), frames=True), QUIET)
    assert not result["ok"]
    assert {Path(f["what"].split(":")[0]).name for f in result["findings"]} == {
        "small.mp4",
        "good.mp4",
    }
