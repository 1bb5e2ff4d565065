"""Clips by index: order, repeats, expectations of a store; the transforms against torchvision."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from distinit.pipeline.clips.clip_options import ClipView, Crop
from distinit.pipeline.clips.transforms import center_crop, crop_and_flip, normalize_clip
from distinit.pipeline.common.errors import StoreMismatchError, VideoError
from distinit.pipeline.video.container import digest
from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.frames import count_frames, read_frames
from distinit.pipeline.video.geometry import View, render

VIEW = View(resize=(32, 40))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clips") / "a.mp4"
    random = np.random.default_rng(0)
    write_video(
        path,
        random.integers(0, 255, (40, 6, 8, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8),
        gop=12,
    )
    return os.fspath(path)


def test_any_order_and_repeats(clip: str) -> None:
    with VideoReader(clip) as reader:
        truth = {index: (pts, render(frame, VIEW)) for index, pts, frame in reader.decode_plain()}
    wanted = np.array([39, 3, 3, 17, 0])
    for _ in range(2):  # the second time with the cached index of the first
        frames = read_frames(clip, wanted, VIEW)
        np.testing.assert_array_equal(frames.images, [truth[i][1] for i in wanted])
        assert frames.pts.tolist() == [truth[i][0] for i in wanted]
        assert (frames.total, frames.repeated, count_frames(clip)) == (40, 0, 40)
    assert read_frames(clip, wanted, None).images.shape == (5, 48, 64, 3)


def test_a_file_that_differs_from_the_store_is_refused(clip: str, tmp_path: Path) -> None:
    with VideoReader(clip) as reader:
        pts = reader.timeline().pts
    indices = np.array([4, 8])
    read_frames(clip, indices, VIEW, expect=(indices, pts[indices]), digest=digest(clip))
    with pytest.raises(
        StoreMismatchError, match=f"frame 8 has pts 7 in the store, in the file it is {pts[8]}"
    ):
        read_frames(clip, indices, VIEW, expect=(indices, np.array([pts[4], 7])))
    with pytest.raises(StoreMismatchError, match="it has 40 frames"):
        read_frames(clip, indices, VIEW, expect=(np.array([99]), np.array([7])))
    with pytest.raises(StoreMismatchError, match=digest(clip)):
        read_frames(clip, indices, VIEW, digest="0" * 32)
    with pytest.raises(VideoError, match="the video has 40"):
        read_frames(clip, np.array([40]), VIEW)
    with pytest.raises(VideoError, match="no such file"):
        read_frames(str(tmp_path / "gone.mp4"), indices, VIEW)


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    for frames in (10, 20):
        write_video(path, np.zeros((frames, 48, 64, 3), np.uint8))
        assert count_frames(str(path)) == frames


def test_a_damaged_frame_is_shown_by_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    shades = np.repeat(np.arange(20, 220, 10), 48 * 64 * 3).reshape(20, 48, 64, 3).astype(np.uint8)
    write_video(path, shades, codec="libx265", gop=1, extra={"x265-params": "log-level=none"})
    with av.open(str(path)) as container:
        position, size = next(
            (p.pos, p.size) for i, p in enumerate(container.demux(video=0)) if i == 5
        )
    with path.open("r+b") as file:
        file.seek(position)
        file.write(b"\xff" * size)
    with VideoReader(str(path)) as reader:
        decoded = [index for index, _, _ in reader.decode_plain()]
        pts = reader.timeline().pts
    assert decoded == [i for i in range(20) if i != 5]
    clip_frames = read_frames(str(path), np.arange(3, 11), VIEW)
    np.testing.assert_array_equal(clip_frames.images[2], clip_frames.images[1])
    assert (clip_frames.repeated, clip_frames.pts[2], clip_frames.total) == (1, pts[4], 20)
    for wanted, expect in ((np.array([5]), None), (np.arange(3, 11), (np.array([5]), pts[[5]]))):
        with pytest.raises(VideoError, match="frame 5 cannot be decoded"):
            read_frames(str(path), wanted, VIEW, expect=expect)


def test_crops_flips_and_statistics_are_torchvisions() -> None:
    images = np.random.default_rng(0).integers(0, 255, (4, 33, 47, 3), np.uint8)
    clip = torch.from_numpy(images).permute(0, 3, 1, 2)
    expected = v2.functional.horizontal_flip(v2.functional.crop(clip, 3, 5, 24, 24)).permute(
        1, 0, 2, 3
    )
    torch.testing.assert_close(crop_and_flip(images, 3, 5, 24, True), expected)
    torch.testing.assert_close(center_crop(images, 24), v2.CenterCrop(24)(clip).permute(1, 0, 2, 3))
    with pytest.raises(ValueError, match="does not fit into 33x47"):
        crop_and_flip(images, 10, 0, 24, False)
    mean, std = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
    scaled = v2.functional.normalize(
        v2.functional.to_dtype(clip, torch.float32, scale=True), list(mean), list(std)
    )
    torch.testing.assert_close(
        normalize_clip(clip.permute(1, 0, 2, 3)[None]), scaled.permute(1, 0, 2, 3)[None]
    )
    assert normalize_clip(clip.permute(1, 0, 2, 3)[None], torch.bfloat16).dtype == torch.bfloat16


def test_the_resize_follows_the_crop() -> None:
    assert ClipView().frame_view() == View(resize=(128, 171))
    assert ClipView(size=64).frame_view() == View(resize=(73, 98))
    assert ClipView(size=64, resize=(64, 80)).frame_view() == View(resize=(64, 80))
    with pytest.raises(ValueError, match="smaller than the crop"):
        ClipView(size=112, resize=(100, 200)).frame_view()


def test_a_scale_makes_the_picture_larger_that_the_crop_is_cut_from() -> None:
    view = ClipView(size=112, scale=(1.0, 1.25))
    sizes = [view.frame_view(Crop(0, 0, False, zoom)).resize for zoom in (0.0, 0.5, 0.999999)]
    assert sizes == [(128, 171), (144, 192), (160, 214)]
    assert view.frame_view() == view.frame_view(None) == View(resize=(128, 171))
    assert ClipView(size=112, scale=(0.875, 1)).frame_view(Crop(0, 0, False)).resize == (112, 150)
    assert ClipView().frame_view(Crop(0, 0, False, 0.7)) == View(
        resize=(128, 171)
    )  # off by default
    with pytest.raises(
        ValueError, match=r"resize 128x171 times scale 0\.8 is smaller than the crop of 112"
    ):
        ClipView(size=112, scale=(0.8, 1.2)).frame_view()
    for scale in ((1.2, 1.0), (0.0, 1.0), (1.0, 99.0)):
        with pytest.raises(ValueError, match="scale must be two factors, the smaller first"):
            ClipView(scale=scale)
