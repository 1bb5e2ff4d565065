"""`distinit prepare` as users run it: whole folders, odd names, kills, changes; and training on its
copies."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distinit.pipeline.clips.clip_options import ClipView
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import TrainingError, UsageError
from distinit.pipeline.prepared.copies import read_copy
from distinit.pipeline.prepared.frame_map import read_map
from distinit.pipeline.prepared.prepare_options import PrepareConfig
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.targets.dataset import StudentClips, student_clips
from distinit.pipeline.targets.picks import PickRule
from distinit.pipeline.targets.sampler import TargetSampler
from distinit.pipeline.video.encode import write_video
from distinit.stages.prepare import prepare
from distinit.tests import warm

pytestmark = pytest.mark.slow

OPTIONS = {"copies": {"short_side": 48, "crf": 14}, "workers": 2}


def run(*sources: Path | str, out: Path, **changes: Any) -> dict[str, Any]:
    config = PrepareConfig.model_validate(
        {"sources": list(map(os.fspath, sources)), "out": out, **OPTIONS, **changes}
    )
    return prepare(config, Console(quiet=True))


def table(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "status.csv", newline="", encoding="utf-8") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def stamps(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*.mp4")}


@pytest.fixture(scope="module")
def copies(tiny_store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "small"
    assert run(tiny_store.videos, out=out)["ok"] == 12
    return out


def test_training_on_copies_sees_the_same_clips_with_the_same_targets(
    tiny_store, copies: Path
) -> None:
    originals = student_clips(tiny_store.path, frames=8, size=32, seed=3)
    moved = student_clips(
        tiny_store.path, frames=8, size=32, seed=3, video_roots={"videos": os.fspath(copies)}
    )
    read = []
    for sample in range(12):
        a, b = originals[2, sample], moved[2, sample]
        assert (a["video"], a["start"], a["unreadable"], a["rejected"]) == (
            b["video"],
            b["start"],
            [],
            b["rejected"],
        )
        for name in a["targets"]:
            np.testing.assert_array_equal(a["targets"][name], b["targets"][name])
        assert a["clip"].shape == b["clip"].shape == (3, 8, 32, 32)
        difference = (a["clip"].int() - b["clip"].int()).abs().float()
        assert difference.mean() < 5, b["name"]
        # Nearer than the same clip one frame on, where there is one: the frames are the right ones.
        draw = originals.sampler.draw(2, sample)
        if draw.frame_count > draw.start + 8:
            plan = moved._plan((2, sample))
            later = moved._clip(
                plan._replace(draw=replace(draw, indices=draw.indices + 1), expect=None)
            )
            assert difference.mean() < (a["clip"].int() - later.int()).abs().float().mean()
        read.append(b["name"])
    assert all(
        name.startswith(str(copies / "videos")) and name.endswith(".mp4.mp4") for name in read
    )


def test_copies_of_other_files_are_not_trained_on(own_store, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(own_store.videos.iterdir())):
        write_video(path, np.full((30, 48, 64, 3), number, np.uint8))  # other content, same names
    out = tmp_path / "small"
    assert run(own_store.videos, out=out)["ok"] == 12
    clips = student_clips(own_store.path, frames=8, size=32, video_roots={"videos": os.fspath(out)})
    with pytest.raises(TrainingError, match="digest"):
        clips[0, 0]


def test_a_second_run_does_nothing_and_other_options_are_refused_by_name(
    tiny_store, copies: Path
) -> None:
    before, status = stamps(copies), (copies / "status.csv").read_bytes()
    result = run(tiny_store.videos, out=copies)
    assert (result["new"], result["ok"], result["failed"]) == (0, 12, 0)
    assert (stamps(copies), (copies / "status.csv").read_bytes()) == (before, status)
    with pytest.raises(UsageError, match=r"short_side=48.*short_side=64.*--replace"):
        run(tiny_store.videos, out=copies, copies={"short_side": 64, "crf": 14})
    assert result["copy_bytes"] == sum(path.stat().st_size for path in copies.rglob("*.mp4"))
    assert result["psnr"]["mean"] > 30
    assert 0.8 < result["ssim"]["worst_5_percent"] <= 1
    assert result["frames"] == sum(int(row["frames"]) for row in table(copies).values())


def test_odd_names_failures_changes_and_replacements(tmp_path: Path) -> None:
    source, out = tmp_path / "clips", tmp_path / "small"
    (source / "-dash").mkdir(parents=True)
    noise = (
        np.random.default_rng(0)
        .integers(0, 255, (20, 6, 8, 3))
        .repeat(8, 1)
        .repeat(8, 2)
        .astype(np.uint8)
    )
    good = [b"-dash/ a,b.avi", b"line\nbreak.mkv", b"\xff\xfe.mp4", b"x.mp4"]
    for name in good:
        write_video(os.fsdecode(os.path.join(os.fsencode(source), name)), noise, gop=7)
    (source / "broken.mp4").write_bytes(b"\0" * 300)
    (tmp_path / "list.txt").write_text("clips/x.mp4 3\ngone.mp4\n")

    result = run(source, tmp_path / "list.txt", out=out)
    assert (result["videos"], result["ok"], result["failed"]) == (7, 5, 2)
    assert result["failures"] == {"not a video container FFmpeg knows": 1, "no such file": 1}
    rows = table(out)
    assert {path for path, row in rows.items() if row["status"] == "ok"} == {
        "-dash/ a,b.avi", "line%0Abreak.mkv", "%FF%FE.mp4", "x.mp4", "clips/x.mp4",
    }  # fmt: skip
    assert rows["gone.mp4"]["reason"] == "no such file"
    for name in good:
        path = os.fsdecode(os.path.join(os.fsencode(out / "clips"), name + b".mp4"))
        assert len(read_copy(path, np.arange(20), None).images) == 20

    # A changed source is copied anew, the others are left; one that became unreadable loses its
    # copy.
    before = stamps(out)
    write_video(source / "x.mp4", noise[:11], gop=7)
    (source / "-dash" / " a,b.avi").write_bytes(b"")
    (source / "broken.mp4").touch()
    result = run(source, out=out)
    after = stamps(out)
    assert (result["new"], result["ok"], result["failed"]) == (3, 3, 2)
    assert {name for name, time in after.items() if before.get(name) != time} == {"clips/x.mp4.mp4"}
    assert before.keys() - after.keys() == {"clips/-dash/ a,b.avi.mp4"}
    assert len(read_map(str(out / "clips" / "x.mp4.mp4"))) == 11
    assert (
        table(out)["clips/x.mp4"]["frames"] == "20"
    )  # of the list, which this run was not asked about
    assert run(source, out=out)["new"] == 0
    assert run(source, out=out, retry_failed=True)["new"] == 2

    # A touched source is the same; a damaged copy is not there.
    os.utime(source / "x.mp4")
    (out / "clips" / "line\nbreak.mkv.mp4").write_bytes(b"damaged")
    assert run(source, out=out)["new"] == 1
    with pytest.raises(
        UsageError,
        match=r"short_side=48.*short_side=16.* list.*--replace",
    ):
        run(source, out=out, replace=True, copies={"short_side": 16})
    assert (
        run(source, tmp_path / "list.txt", out=out, replace=True, copies={"short_side": 16})["ok"]
        == 4
    )
    assert read_map(str(out / "clips" / "x.mp4.mp4")).height == 16
    assert not [path for path in (out / ".partial").iterdir() if path.name != "lock"]


def test_names_that_are_no_text_and_a_table_that_was_cut(tmp_path: Path) -> None:
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/vid\xe9os"))
    source.mkdir()
    for name in ("a.mp4", "ü.mp4"):
        write_video(source / name, np.zeros((3, 32, 32, 3), np.uint8))
    out = tmp_path / "out"
    assert run(source, out=out)["ok"] == 2
    assert run(source, out=out)["new"] == 0
    whole = (out / "status.csv").read_bytes()
    assert b"vid%E9os,\xc3\xbc.mp4,ok" in whole
    (out / "status.csv").write_bytes(whole[: whole.index(b"\xbc")])  # in the middle of the letter
    assert run(source, out=out)["ok"] == 2
    assert (out / "status.csv").read_bytes() == whole


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a" / "x").mkdir(parents=True)
    write_video(tmp_path / "a" / "x" / "v.mp4", np.zeros((3, 32, 32, 3), np.uint8))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    run(tmp_path / "a" / "x", out=tmp_path / "out")
    with pytest.raises(UsageError, match="'x'"):
        run(tmp_path / "b" / "x", out=tmp_path / "out")
    with pytest.raises(UsageError, match="--out"):
        run(tmp_path / "b" / "x", out=tmp_path / "a")
    with pytest.raises(UsageError, match="--out"):
        run(tmp_path / "out", out=tmp_path / "out")
    # Copies inside of the source folder are not taken for sources.
    inside = tmp_path / "b" / "small"
    assert run(tmp_path / "b", out=inside)["ok"] == 1
    assert run(tmp_path / "b", out=inside)["videos"] == 1


@pytest.mark.parametrize("after", [1, 4])
def test_killed_at_any_moment_and_run_again(
    tiny_store, copies: Path, tmp_path: Path, after: int
) -> None:
    out = tmp_path / "small"
    words = ("prepare", tiny_store.videos, "--out", out, "--short-side", 48, "--crf", 14)
    words += ("--workers", 2, "--json")
    process = warm.Process(*words)
    try:
        while len(list(out.rglob("*.mp4"))) < after and process.poll() is None:
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    stamps_before = stamps(out)
    for name in stamps_before:  # what is there is whole
        frames = len(read_map(str(out / name)))
        assert len(read_copy(str(out / name), np.arange(frames), None).images) == frames
    command = warm.run(*words)
    result = json.loads(command.stdout)
    assert (result["ok"], result["failed"]) == (12, 0)
    assert result["new"] <= 12 - len(stamps_before)
    assert stamps_before.items() <= stamps(out).items()
    assert not [path for path in (out / ".partial").iterdir() if path.name != "lock"]
    for name in stamps(
        copies
    ):  # and equal to what an undisturbed run makes, byte for byte but for times
        ours, theirs = (read_map(str(root / name)) for root in (out, copies))
        assert (ours.source.digest, ours.index.tolist(), ours.pts.tolist(), ours.crc.tolist()) == (
            theirs.source.digest, theirs.index.tolist(), theirs.pts.tolist(), theirs.crc.tolist()
        )  # fmt: skip
    assert list(table(out)) == list(table(copies))


def test_held_out_clips_come_from_copies_too(tiny_store, copies: Path) -> None:
    store = TargetStore.open(tiny_store.path)
    sampler = TargetSampler(
        store, teachers=("sure",), picks=PickRule.parse("random"), clip_frames=8, videos=store.usable(), seed=1,
        epoch_clips=12, fixed=True,
    )  # fmt: skip
    view = ClipView(size=32, resize=(40, 60))
    ours = StudentClips(sampler, view, {"videos": os.fspath(copies / "videos")})
    original_clips = StudentClips(sampler, view)
    for sample in range(12):
        a, b = ours[0, sample], original_clips[0, sample]
        assert (a["video"], a["start"]) == (b["video"], b["start"])
        assert (a["clip"].int() - b["clip"].int()).abs().float().mean() < 5


@pytest.mark.parametrize("flow", [False, True], ids=["copies", "flow"])
def test_damaged_copies_are_made_again(flow: bool, tmp_path: Path) -> None:
    """One flipped bit anywhere in the copy of each of 32 videos; those of two others are whole."""
    if flow:
        pytest.importorskip("cv2")
    videos, out, rng = tmp_path / "videos", tmp_path / "out", np.random.default_rng(0)
    videos.mkdir()
    frames = rng.integers(0, 256, (3, 48, 64, 3), np.uint8)
    write_video(videos / "v00.mp4", frames)
    for number in range(1, 34):
        shutil.copyfile(videos / "v00.mp4", videos / f"v{number:02d}.mp4")
    changes: dict[str, Any] = {"flow": True, "copies": {"size": (32, 48)}} if flow else {}
    assert run(videos, out=out, **changes)["ok"] == 34
    outputs = sorted(path for path in out.rglob("v*") if path.suffix in (".mp4", ".h5"))
    whole = {path: path.read_bytes() for path in outputs}
    for number, path in enumerate(outputs[2:]):
        data = bytearray(whole[path])
        position = (0, -1, *rng.integers(0, len(data), 40).tolist())[number]
        data[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
    again = run(videos, out=out, **changes)
    assert (again["new"], again["ok"], again["failed"]) == (32, 34, 0)
    assert [path for path in outputs if path.read_bytes() != whole[path]] == []
    assert run(videos, out=out, **changes)["new"] == 0


def test_a_damaged_copy_without_its_source_is_kept(tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_video(videos / name, np.zeros((3, 48, 64, 3), np.uint8))
    (tmp_path / "list.txt").write_text("videos/a.mp4\nvideos/b.mp4\n")
    assert run(tmp_path / "list.txt", out=out)["ok"] == 2
    copy = next(out.rglob("b.mp4.mp4"))
    data = bytearray(copy.read_bytes())
    data[10] ^= 1
    copy.write_bytes(data)
    (videos / "b.mp4").unlink()
    result = run(tmp_path / "list.txt", out=out)
    assert (result["ok"], result["failed"], result["new"]) == (1, 1, 0)
    assert copy.read_bytes() == data


@pytest.mark.parametrize("kind", [[], ["--flow"]], ids=["copies", "flow"])
def test_a_limit_of_the_size_of_files_is_no_fault_of_a_video(
    kind: list[str], tmp_path: Path
) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (20, 96, 128, 3), np.uint8)
    write_video(videos / "a.mp4", np.full_like(noise, 9))
    write_video(videos / "b.mp4", noise)
    words = ["prepare", str(videos), "--out", str(out), "--size", "96x128", *kind]
    ended = warm.run(*words, limits={"RLIMIT_FSIZE": (100_000, 100_000)})
    assert ended.returncode == 1
    assert str(out) in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "failed" not in {row["status"] for row in table(out).values()}
    assert warm.run(*words).returncode == 0
    assert {path: row["status"] for path, row in table(out).items()} == {
        "a.mp4": "ok",
        "b.mp4": "ok",
    }
