"""Draws, picks, the entropy filter and decoded clips on a real store, against plain zarr and
NumPy."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from distinit.pipeline.clips import read as reading
from distinit.pipeline.clips.clip_options import ClipView
from distinit.pipeline.common import worker_status
from distinit.pipeline.common.errors import TrainingError, UsageError, VideoError, WorkerDied
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.targets.dataset import StudentClips
from distinit.pipeline.targets.picks import PickRule
from distinit.pipeline.targets.sampler import ClipSample, TargetSampler, measure_entropies
from distinit.pipeline.training.loader import EpochBatchSampler, read_batches
from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.frames import read_frames
from distinit.pipeline.video.geometry import View, render
from distinit.tests import warm
from distinit.tests.signals import die_by

T = 8
VIEW = ClipView(size=32, resize=(40, 60))
TEACHERS = ("sure", "unsure")


@pytest.fixture(scope="module")
def store(tiny_store) -> TargetStore:
    return TargetStore.open(tiny_store.path)


def make(store: TargetStore, **changes: Any) -> TargetSampler:
    arguments = {
        "teachers": TEACHERS, "picks": PickRule.parse("random"), "clip_frames": T, "videos": store.usable(),
        "seed": 5, "epoch_clips": 24, **changes,
    }  # fmt: skip
    return TargetSampler(store, **arguments)


def some(sampler: TargetSampler, epochs: int = 10) -> list[ClipSample]:
    return [sampler.draw(epoch, sample) for epoch in range(epochs) for sample in range(24)]


@pytest.mark.parametrize("picks", ["center", "random", "random:2", "uniform:1"])
@pytest.mark.parametrize("ahead", [0, 1])
def test_every_valid_start_of_a_short_video_can_be_picked(
    store: TargetStore, picks: str, ahead: int
) -> None:
    """Clips longer than the videos, with and without the frame that flow reads ahead: start and
    picks count the same frames."""
    sampler = make(store, picks=PickRule.parse(picks), ahead=ahead, clip_frames=64)
    videos = [int(video) for video in store.usable() if sampler.has_window(int(video))]
    assert min(int(store.frame_counts[video]) for video in videos) < 64
    for sample in range(100):
        draw = sampler.draw(0, sample)
        assert set(draw.picked) <= set(draw.indices)


def nats(logits: np.ndarray) -> float:
    p = np.exp(logits.astype(float) - logits.max())
    p /= p.sum()
    return float(-(p * np.log(p)).sum())


def same(a: ClipSample, b: ClipSample) -> bool:
    return pickle.dumps(a) == pickle.dumps(b)


@pytest.mark.parametrize("rule", ["center", "random", "random:2", "uniform:2"])
def test_draws_against_the_rules_and_plain_zarr(store, rule):
    group = zarr.open_group(store.path, mode="r")
    rows = {
        "video": group["frames/video"][:],
        "index": group["frames/index"][:],
        "pts": group["frames/pts"][:],
    }
    logits = {name: group[f"teachers/{name}/logits"][:].astype(np.float32) for name in TEACHERS}
    sampler = make(store, picks=PickRule.parse(rule))
    drawn = some(sampler)
    for draw in drawn:
        frames = int(store.frame_counts[draw.video])
        assert 0 <= draw.start <= max(0, frames - T)
        assert list(draw.indices) == [min(draw.start + t, frames - 1) for t in range(T)]
        cached = rows["index"][rows["video"] == draw.video]
        assert set(draw.picked) <= set(cached) & set(draw.indices)
        assert len(set(draw.picked)) == sampler.picks.n
        if rule == "center":
            assert list(draw.picked) == [draw.start + min(T, frames) // 2]
        at = [
            np.flatnonzero((rows["video"] == draw.video) & (rows["index"] == i))[0]
            for i in draw.picked
        ]
        assert list(draw.picked_pts) == list(rows["pts"][at])
        for name in TEACHERS:
            np.testing.assert_allclose(draw.targets[name], logits[name][at].mean(axis=0), rtol=1e-6)
        assert draw.weight == {"sure": 1.0, "unsure": 1.0}
        assert 0 <= draw.top < 1
    if rule == "random":
        counts = Counter(draw.video for draw in drawn)
        assert len(counts) == 12
        assert max(counts.values()) == min(counts.values())  # 20 permutations of 12 videos
        starts = {draw.start for draw in drawn if draw.video == 5}  # 64 frames, so 57 starts
        assert len(starts) > 10
        assert min(starts) < 15 < 40 < max(starts)
        assert 80 < sum(draw.flip for draw in drawn) < 160
    again = make(store, picks=sampler.picks)
    assert all(same(drawn[i], again.draw(i // 24, i % 24)) for i in range(len(drawn) - 1, -1, -7))


@pytest.mark.parametrize("rule", ["random", "random:2"])
def test_zero_weight_masks_each_head_by_the_entropy_of_the_mean_picked_logits(store, rule):
    free = some(make(store, picks=PickRule.parse(rule)))
    limits = {
        name: float(np.median([nats(draw.targets[name]) for draw in free])) for name in TEACHERS
    }
    masked = some(
        make(store, picks=PickRule.parse(rule), max_entropy=limits, filter_mode="zero-weight")
    )
    near = 0.006  # logits are stored as float16, entropies of single frames come from float32
    for before, after in zip(free, masked, strict=True):
        assert (before.video, before.start, list(before.picked)) == (
            after.video,
            after.start,
            list(after.picked),
        )
        for name in TEACHERS:
            entropy = nats(before.targets[name])
            if abs(entropy - limits[name]) > near:
                assert after.weight[name] == (1.0 if entropy <= limits[name] else 0.0)
    patterns = {tuple(draw.weight.values()) for draw in masked}
    assert patterns == {(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)}


def test_skip_draws_another_video_until_one_head_keeps_the_clip(store):
    free = some(make(store))
    limits = {
        name: float(np.quantile([nats(draw.targets[name]) for draw in free], 0.2))
        for name in TEACHERS
    }
    sampler = make(store, max_entropy=limits)
    kept = some(sampler)
    assert all(draw.counts for draw in kept)
    zero = some(make(store, max_entropy=limits, filter_mode="zero-weight"))
    for first, draw in zip(zero, kept, strict=True):
        assert draw.rejected == draw.attempt
        assert (draw.rejected == 0) == first.counts
        if first.counts:
            assert same(first, draw)
        else:
            assert draw.video != first.video
    epoch, sample = next((i // 24, i % 24) for i, draw in enumerate(kept) if draw.attempt > 1)
    again = sampler.draw(epoch, sample, 1)
    assert again.attempt == kept[epoch * 24 + sample].attempt
    assert not same(again, sampler.draw(epoch, sample, again.attempt + 1))


def test_a_filter_that_keeps_nothing_gives_up_after_100_redraws(store):
    draw = make(store, max_entropy=dict.fromkeys(TEACHERS, -1.0)).draw(0, 0)
    assert (draw.rejected, draw.counts) == (100, False)


def test_a_quantile_of_measured_entropies_keeps_the_share_it_promises(store):
    sampler = make(store, teachers=("unsure",))
    measured = np.stack(list(measure_entropies(sampler, 600)))
    assert measured.shape == (600, 1)
    limit = float(np.quantile(measured, 0.3))
    others = make(
        store,
        teachers=("unsure",),
        max_entropy={"unsure": limit},
        filter_mode="zero-weight",
        seed=77,
    )
    share = np.mean([draw.counts for draw in some(others, epochs=25)])
    assert share == pytest.approx(0.3, abs=0.07)
    expected = [nats(sampler.draw(i // 24, i % 24).targets["unsure"]) for i in range(50)]
    np.testing.assert_allclose(measured[:50, 0], expected, atol=0.006)


def test_no_window_with_enough_picks_names_spacing_and_clip_length(store):
    sampler = make(store, picks=PickRule.parse("random:4"))
    message = "the store holds every 4th frame; an 8-frame clip holds 2; asked for 4 picks"
    with pytest.raises(UsageError, match=message):
        sampler.check_windows()
    with pytest.raises(TrainingError, match=message):
        sampler.draw(0, 0)
    make(store, picks=PickRule.parse("random:4"), clip_frames=16).check_windows()


def test_held_out_samples_are_each_video_once_and_always_the_same(store):
    sampler = make(store, fixed=True, max_entropy={"sure": 0.0, "unsure": 0.0})
    drawn = [sampler.draw(0, i) for i in range(12)]
    assert [draw.video for draw in drawn] == list(store.usable())
    assert all(
        (draw.top, draw.left, draw.flip, draw.rejected) == (0.5, 0.5, False, 0) for draw in drawn
    )


def test_a_clip_is_the_frames_of_a_plain_decode_cropped_and_mirrored(store):
    sampler = make(store)
    clips = StudentClips(sampler, VIEW)
    checked = set()
    for sample in range(24):
        draw, example = sampler.draw(1, sample), clips[1, sample]
        assert example["video"] == draw.video
        with VideoReader(store.video_path(draw.video)) as reader:
            frames = {
                i: render(f, VIEW.frame_view())
                for i, _, f in reader.decode_plain()
                if i in set(draw.indices)
            }
        images = np.stack([frames[i] for i in draw.indices])
        assert images.shape == (T, 40, 60, 3)
        top, left = int(draw.top * 9), int(draw.left * 29)
        expected = images[:, top : top + 32, left : left + 32].transpose(3, 0, 1, 2)
        expected = expected[..., ::-1] if draw.flip else expected
        np.testing.assert_array_equal(example["clip"].numpy(), expected)
        np.testing.assert_array_equal(example["targets"]["sure"].numpy(), draw.targets["sure"])
        checked.add((draw.flip, len(frames) < T))
    assert (
        checked == {(False, False), (True, False), (False, True), (True, True)} or len(checked) >= 3
    )


def test_a_scale_is_drawn_like_the_crop_and_changes_nothing_else(store):
    sampler, view = make(store), ClipView(size=32, resize=(40, 60), scale=(0.8, 1.5))
    clips, plain = StudentClips(sampler, view), StudentClips(sampler, VIEW)
    heights = set()
    for sample in range(12):
        draw, example = sampler.draw(3, sample), clips[3, sample]
        factor = 0.8 + sampler.zoom(3, sample, draw.attempt) * 0.7
        height, width = round(40 * factor), round(60 * factor)
        images = read_frames(
            store.video_path(draw.video), draw.indices, View(resize=(height, width))
        ).images
        top, left = int(draw.top * (height - 31)), int(draw.left * (width - 31))
        expected = images[:, top : top + 32, left : left + 32].transpose(3, 0, 1, 2)
        np.testing.assert_array_equal(
            example["clip"], expected[..., ::-1] if draw.flip else expected
        )
        without = plain[3, sample]
        assert (example["video"], example["start"]) == (without["video"], without["start"])
        heights.add(height)
    assert len(heights) > 6
    assert 32 <= min(heights) < 40 < max(heights) <= 60


@pytest.mark.slow
def test_clips_are_the_same_for_any_number_of_workers_and_any_way_to_start_them(store, tmp_path):
    clips = StudentClips(make(store, max_entropy={"sure": 0.4, "unsure": 1.2}), VIEW)

    def stream(workers: int, start: int) -> list[tuple[list[int], list[int], str]]:
        keys = EpochBatchSampler(batch_size=6, steps_per_epoch=4, epochs=2, start=start)
        batches = list(read_batches(clips, keys, workers=workers, device=torch.device("cpu")))
        # A read that failed on its own account would be drawn again: then say so, not that batches
        # differ.
        assert [each for batch in batches for each in batch["unreadable"] if each] == []
        return [(b["video"].tolist(), b["start"].tolist(), digest(b["clip"])) for b in batches]

    def digest(clip: torch.Tensor) -> str:
        return hashlib.blake2b(clip.numpy().tobytes(), digest_size=16).hexdigest()

    everything = stream(0, 0)
    assert len(everything) == 8
    assert (
        digest(torch.stack([clips[0, sample]["clip"] for sample in range(6)])) == everything[0][2]
    )
    for start in range(1, 9):  # stopped after any batch
        assert stream(0, start) == everything[start:]
    for workers, start in [(1, 0), (2, 3), (4, 5)]:
        assert stream(workers, start) == everything[start:]
    # What spawn and forkserver do with it: a fresh process gets the pickle and opens the store
    # itself.
    program = (
        "import pickle, sys; f = open(sys.argv[1], 'rb'); "
        "print(pickle.load(f)[0, 0]['clip'].long().sum().item())"
    )
    (tmp_path / "clips.pickle").write_bytes(pickle.dumps(clips))
    elsewhere = warm.run(tmp_path / "clips.pickle", code=program)
    assert int(elsewhere.stdout) == int(clips[0, 0]["clip"].long().sum())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["crash", "hang", "memory"])
def test_a_video_that_ends_a_worker_is_named_and_another_is_drawn_once_it_is_refused(
    store, monkeypatch, how
):
    """The batches are then those of a run in which the video is simply unreadable."""
    bad = store.video_path(int(store.usable()[4]))

    def reader(path: str, *arguments: Any, **options: Any) -> Any:
        if path == bad:
            if multiprocessing.parent_process() is None:
                raise VideoError("unreadable")
            if how == "hang":
                time.sleep(100)
            die_by(signal.SIGSEGV if how == "crash" else signal.SIGKILL)
        return read_frames(path, *arguments, **options)

    monkeypatch.setitem(reading._READERS, "video", reader)

    def stream(workers: int) -> tuple[list[Any], dict[str, str]]:
        keys = EpochBatchSampler(batch_size=6, steps_per_epoch=4, epochs=1)
        clips = StudentClips(make(store), VIEW)
        device = torch.device("cpu")
        # As long as a worker needs on a machine with other work, where it does hang.
        timeout_s = 3.0 if how == "hang" else 100.0
        read = read_batches(clips, keys, workers=workers, device=device, timeout_s=timeout_s)
        batches = list(read)
        broken = {
            name: why for batch in batches for each in batch["unreadable"] for name, why in each
        }
        return [
            (b["video"].tolist(), b["start"].tolist(), int(b["clip"].long().sum())) for b in batches
        ], broken

    expected, _ = stream(0)
    with pytest.raises(WorkerDied) as died:
        stream(2)
    assert died.value.path == bad
    assert bool(died.value.reason) == (how != "memory")
    with worker_status.refusing({bad: how}):
        batches, broken = stream(2)
    assert batches == expected
    assert broken == {bad: how}


def test_broken_and_exchanged_videos_are_drawn_again_and_named(store, own_store):
    names = sorted(own_store.videos.iterdir())
    names[0].write_bytes(names[0].read_bytes()[:900])
    names[1].write_bytes(names[4].read_bytes())
    names[3].unlink()
    video_roots = {"videos": str(own_store.videos)}
    whole, harmed = StudentClips(make(store), VIEW), StudentClips(make(store), VIEW, video_roots)
    broken: dict[str, str] = {}
    for sample in range(24):
        before, after = whole[0, sample], harmed[0, sample]
        assert before["unreadable"] == []
        broken.update(after["unreadable"])
        if before["video"] in (0, 1, 3):
            assert after["unreadable"][0][0] == str(names[before["video"]])
            assert after["video"] not in (0, 1, 3)
        else:
            assert after["unreadable"] == []
            assert torch.equal(before["clip"], after["clip"])
    assert set(broken) == {str(names[i]) for i in (0, 1, 3)}
    assert "digest" in broken[str(names[1])]
    assert "no such file" in broken[str(names[3])].lower()
    # A second look at the same sample comes to the same, from memory.
    assert torch.equal(
        harmed[0, 0]["clip"], StudentClips(make(store), VIEW, video_roots)[0, 0]["clip"]
    )


def test_a_corpus_that_moved_away_ends_at_the_first_batch(store, tmp_path):
    clips = StudentClips(make(store), VIEW, {"videos": str(tmp_path)})
    with pytest.raises(TrainingError, match=r"20 videos in a row.*\.mp4: .*--videos CORPUS=DIR"):
        clips[0, 0]
    assert StudentClips(make(store, fixed=True), VIEW, {"videos": str(tmp_path)})[0, 0] is None


def test_a_clip_that_counts_for_no_head_costs_no_decode(store, tmp_path):
    nothing = dict.fromkeys(TEACHERS, -1.0)
    sampler = make(store, max_entropy=nothing, filter_mode="zero-weight")
    example = StudentClips(sampler, VIEW, {"videos": str(Path(tmp_path) / "not there")})[0, 0]
    assert example["weight"] == {"sure": 0.0, "unsure": 0.0}
    assert example["unreadable"] == []
    assert example["clip"].shape == (3, T, 32, 32)
