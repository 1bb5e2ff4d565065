"""Clips that are longer than the videos they are cut from are told of before they are trained
on."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from distinit.pipeline.common.console import Console
from distinit.pipeline.evaluation.labelled_clips import count_sampled_frames, warn_of_short_videos
from distinit.pipeline.evaluation.labels import load_labels
from distinit.pipeline.video.encode import write_video


@pytest.mark.parametrize(
    ("counts", "length", "channels", "words"),
    [
        ([24, 24, 20], 64, 3, ["--frames 64", "3 of 3 videos", "20 to 24"]),
        ([24, 24, 200, 0], 64, 3, ["2 of 3 videos", "4"]),
        ([24, 24], 24, 2, ["--frames 24"]),  # flow takes a frame more
        ([24, 24], 24, 3, []),
        ([24, 64, 64, 64], 64, 3, []),
        ([0, 0], 64, 3, []),
        ([], 64, 3, []),
    ],
)
def test_what_is_told(counts: list[int], length: int, channels: int, words: list[str]) -> None:
    err = io.StringIO()
    with Console(quiet=True, stderr=err):
        warn_of_short_videos(counts, len(counts), length, channels)
    assert err.getvalue().count("\n") == bool(words)
    assert all(word in err.getvalue() for word in words)


@pytest.mark.slow
def test_frames_are_counted_of_some_of_the_videos_that_can_be_read(tmp_path: Path) -> None:
    for seed, folder in enumerate(("train/a", "train/b", "test/a", "test/b")):
        (tmp_path / folder).mkdir(parents=True)
        frames = np.random.default_rng(seed).integers(0, 255, (7, 32, 32, 3), np.uint8)
        write_video(tmp_path / folder / f"{seed}.mp4", frames, fps=10)
    (tmp_path / "train" / "a" / "broken.mp4").write_bytes(b"x" * 99)
    labels = load_labels(f"folder:{tmp_path}", 1)
    assert count_sampled_frames(labels, [*labels.train, *labels.test]) == [7] * 4
