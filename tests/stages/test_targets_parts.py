"""Two machines that share nothing, and their parts merged, on real videos: the store of one
machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import StoreMismatchError
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.store.index import load_index
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import MergeConfig
from distinit.pipeline.store.verify import verify
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.encode import write_video
from distinit.stages.extract_targets import extract_targets
from distinit.stages.targets_merge import targets_merge

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
MODULE = """
import torch

def teacher(k):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, k))
"""


def test_parts_of_two_machines_make_the_store_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts_teacher.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(7):
        frames = (
            np.random.default_rng(i).integers(0, 255, (6 + i, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
        )
        write_video(videos / f"v{i}.mp4", frames.astype(np.uint8), fps=10, gop=4)
    (videos / "broken.mp4").write_bytes(b"x" * 100)
    (tmp_path / "elsewhere").symlink_to(videos)
    spec = TeacherSpec(
        name="parts_teacher:teacher", options={"name": "t", "k": "5", "input_size": "16"}
    )

    def run(out: str, part: str | None = None, place: str = "videos") -> Path:
        config = ExtractConfig(sources=[f"c={tmp_path / place}"], out=tmp_path / out, teachers=[spec],
                               part=part, encoding="int8", batch_size=4)  # fmt: skip
        extract_targets(config, QUIET)
        return tmp_path / out

    whole = TargetStore.open(run("whole.zarr"))
    parts = [run("1.zarr", "1/3"), run("2.zarr", "2/3", "elsewhere"), run("3.zarr", "3/3")]
    result = targets_merge(
        MergeConfig(parts=[str(each) for each in parts], out=str(tmp_path / "all.zarr")), QUIET
    )
    assert (result["videos"], result["ok"], result["failed"]) == (8, 7, 1)
    merged = TargetStore.open(tmp_path / "all.zarr")
    assert list(verify(merged.path, load_index(merged.path))) == []
    video_of = {whole.video(v).path: v for v in range(8)}
    for v in range(8):
        w = video_of[merged.video(v).path]
        assert merged.video(v).status == whole.video(w).status
        for a, b in zip(merged.frames(v)[:2], whole.frames(w)[:2], strict=True):
            np.testing.assert_array_equal(a, b)
        merged_rows, whole_rows = merged.frames(v)[2], whole.frames(w)[2]
        # Batches fall otherwise, so the last bit of a teacher may too: a step of the encoding.
        np.testing.assert_allclose(
            merged.logits("t", merged_rows), whole.logits("t", whole_rows), atol=0.02
        )
        np.testing.assert_allclose(
            merged.entropy("t", merged_rows), whole.entropy("t", whole_rows), atol=1e-4
        )
    with pytest.raises(
        StoreMismatchError, match=r'1.zarr: part is "1/3" in the store, "2/3" in this command'
    ):
        run("1.zarr", "2/3")
    with pytest.raises(
        StoreMismatchError, match=r'1.zarr: part is "1/3" in the store, null in this command'
    ):
        run("1.zarr")
    write_video(videos / "new.mp4", frames.astype(np.uint8), fps=10)
    grown = extract_targets(
        ExtractConfig(sources=[f"c={videos}"], out=merged.path, teachers=[spec], batch_size=4),
        QUIET,
    )
    assert (grown["videos"], grown["ok"]) == (9, 8)  # a merged store grows like any other
