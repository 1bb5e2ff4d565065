"""Flow files against OpenCV, and against flow that is computed when a clip is read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
import torch

from distinit.pipeline.clips.clip_options import ClipView, Crop
from distinit.pipeline.clips.read import count_frames, read_clip, read_clips
from distinit.pipeline.common.errors import StoreMismatchError, VideoError
from distinit.pipeline.prepared.flow_files import quantise, read_flow, read_flow_map
from distinit.pipeline.prepared.folders import VideoFile
from distinit.pipeline.prepared.make_copy import make_flow
from distinit.pipeline.prepared.prepare_options import FlowOptions
from distinit.pipeline.video.container import digest
from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.frames import read_frames
from distinit.pipeline.video.geometry import View

cv2 = pytest.importorskip("cv2")
SIZE = (40, 56)
BOUND = 6.0
STEP = BOUND / 127
WHOLE = ClipView(size=40, resize=(40, 40))  # no room to crop: the stored flow is that of the clip


def farneback(images: np.ndarray) -> np.ndarray:
    """Return the flow [L - 1, 2, H, W] of images [L, H, W, 3], with Caffe2's parameters."""
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images]
    flow = [cv2.calcOpticalFlowFarneback(a, b, None, 0.5**0.5, 5, 10, 2, 7, 1.5, cv2.OPTFLOW_FARNEBACK_GAUSSIAN)
            for a, b in pairwise(grey)]  # fmt: skip
    return np.stack(flow).transpose(0, 3, 1, 2)


def blocks(frames: int, speed: float) -> np.ndarray:
    """Smooth noise uint8 [frames, 80, 112, 3] that moves right by `speed` pixels per frame."""
    noise = np.random.default_rng(1).normal(0, 1, (80, 300, 3))
    noise = cv2.GaussianBlur(noise, (0, 0), 4)
    noise = (noise / noise.std() * 40 + 128).clip(0, 255).astype(np.uint8)
    return np.stack([noise[:, 150 - round(speed * t) :][:, :112] for t in range(frames)])


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A video whose second half moves faster than the bound, and its flow."""
    root = tmp_path_factory.mktemp("flow")
    images = np.concatenate([blocks(16, 1.5), blocks(8, 17.0)])
    write_video(root / "v.mp4", images, gop=7)
    flow_map = make_flow(
        str(root / "v.mp4"), str(root / "part"), str(root / "f" / "v.h5"), options(SIZE)
    )
    assert flow_map.clipped > 0
    make_flow(str(root / "v.mp4"), str(root / "part"), str(root / "w.h5"), options((40, 40)))
    return str(root / "v.mp4"), str(root / "f" / "v.h5")


def options(size: tuple[int, int]) -> FlowOptions:
    return FlowOptions(size=size, bound=BOUND)


def test_stored_values_are_those_of_opencv_up_to_the_step(video: tuple[str, str]) -> None:
    source, path = video
    truth = farneback(read_frames(source, np.arange(24), View(resize=SIZE)).images)
    with h5py.File(path) as file:
        stored, attributes = file["flow"][:], dict(file["flow"].attrs)
        assert file["index"][:].tolist() == list(range(24))
        with VideoReader(source) as reader:
            assert file["pts"][:].tolist() == reader.timeline().pts.tolist()
    assert (stored.shape, stored.dtype) == ((23, 2, *SIZE), np.uint8)
    value = (stored.astype(float) - attributes["still"]) * attributes["bound"] / attributes["steps"]
    np.testing.assert_allclose(value, truth.clip(-BOUND, BOUND), atol=STEP / 2 + 1e-4)
    assert attributes["clipped"] == pytest.approx((np.abs(truth) > BOUND).mean(), abs=1e-9)
    assert 0.01 < attributes["clipped"] < 0.5
    assert read_flow_map(path).source.digest == digest(source)


def test_no_motion_is_exactly_zero_and_mirrors_are_exact() -> None:
    flow = np.array([0.0, -0.0, 1e-4, 3.0, -3.0, 99.0, -99.0], np.float32)
    stored, num_clipped = quantise(flow, BOUND)
    assert stored.tolist() == [128, 128, 128, 192, 64, 255, 1]
    assert num_clipped == 2
    assert quantise(-flow, BOUND)[0].tolist() == (256 - stored.astype(int)).tolist()


@pytest.mark.parametrize("crop", [None, Crop(0.5, 0.5, False)])
def test_clips_from_the_file_are_those_computed_when_read(
    video: tuple[str, str], crop: Crop | None
) -> None:
    source, path = video
    whole = VideoFile(str(Path(path).parent.parent / "w.h5"), "flow", source)
    assert count_frames(whole) == 24
    for first in (0, 5, 9):
        frames = np.arange(first, first + 6)
        from_file = read_clip(whole, frames, WHOLE, channels=2, crop=crop)
        computed = read_clip(VideoFile(source), frames, WHOLE, channels=2, crop=crop)
        assert from_file.shape == computed.shape == (2, 5, 40, 40)
        assert from_file.dtype == computed.dtype == torch.float32
        torch.testing.assert_close(
            from_file, computed.clamp(-BOUND, BOUND), atol=STEP / 2 + 1e-4, rtol=0
        )
    repeated = np.array([21, 22, 23, 23, 23])
    from_file = read_clip(whole, repeated, WHOLE, channels=2)
    assert not from_file[:, 2:].any()
    computed = read_clip(VideoFile(source), repeated, WHOLE, channels=2)
    torch.testing.assert_close(
        from_file, computed.clamp(-BOUND, BOUND), atol=STEP / 2 + 1e-4, rtol=0
    )
    other = VideoFile(path, "flow", source)
    for read in (
        lambda: read_clip(other, frames, WHOLE, channels=2),
        lambda: read_clips(other, frames[None], WHOLE),
    ):
        with pytest.raises(VideoError, match=r"frames of 40x56, not \(40, 40\): prepare it again"):
            read()
    several = read_clips(whole, np.stack([frames, frames - 4]), WHOLE, channels=2)
    assert torch.equal(several.clips[0], read_clip(whole, frames, WHOLE, channels=2))
    assert torch.equal(several.clips[1], read_clip(whole, frames - 4, WHOLE, channels=2))


def test_crops_are_cut_out_and_mirrored_ones_move_the_other_way(video: tuple[str, str]) -> None:
    view, frames = ClipView(size=32, resize=SIZE), np.arange(2, 7)
    stored, bound, damaged = read_flow(video[1], frames)
    assert (bound, damaged) == (BOUND, 0)
    file = VideoFile(video[1], "flow")
    plain = read_clip(file, frames, view, channels=2, crop=Crop(0.99, 0.5, False))
    expected = (stored[:, :, 8:40, 12:44].transpose(1, 0, 2, 3).astype(float) - 128) * STEP
    np.testing.assert_allclose(plain, expected, atol=1e-6)
    mirrored = read_clip(file, frames, view, channels=2, crop=Crop(0.99, 0.5, True))
    assert torch.equal(mirrored, plain.flip(3) * torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1))
    assert plain[0].mean() > 0.4  # 1.5 pixels of the source to the right, at half the size
    assert mirrored[0].mean() < -0.4


def test_a_damaged_frame_does_not_move_and_a_required_one_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "v.mp4"
    write_video(
        source, blocks(20, 2.0), codec="libx265", gop=1, extra={"x265-params": "log-level=none"}
    )
    with av.open(str(source)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    with source.open("r+b") as file:
        for position, size in packets[9:11]:
            file.seek(position)
            file.write(b"\xff" * size)
    flow_map = make_flow(
        str(source), str(tmp_path / "p"), str(tmp_path / "v.h5"), options((40, 40))
    )
    assert flow_map.index.tolist() == [*range(9), *range(11, 20)]
    file = VideoFile(str(tmp_path / "v.h5"), "flow")
    for first in (6, 9, 10):  # damage inside, and at the beginning
        frames = np.arange(first, first + 6)
        from_file = read_clip(file, frames, WHOLE, channels=2)
        computed = read_clip(VideoFile(str(source)), frames, WHOLE, channels=2)
        torch.testing.assert_close(
            from_file, computed.clamp(-BOUND, BOUND), atol=STEP / 2 + 1e-3, rtol=0
        )
    assert read_clips(file, np.arange(6, 12)[None], WHOLE, channels=2).repeated == 2
    indices = np.array([9])
    with VideoReader(str(source)) as reader:
        pts = reader.timeline().pts[indices]
    for video_file in (file, VideoFile(str(source))):
        with pytest.raises(VideoError, match="frame 9 cannot be decoded"):
            read_clip(video_file, np.arange(6, 12), WHOLE, channels=2, expect=(indices, pts))


def test_damaged_files_and_files_of_other_videos_are_refused(
    video: tuple[str, str], tmp_path: Path
) -> None:
    frames = np.arange(2, 7)
    pts = read_flow_map(video[1]).pts
    read_flow(video[1], frames, expect=(frames[:2], pts[2:4]), digest=digest(video[0]))
    with pytest.raises(StoreMismatchError, match="a copy of another file"):
        read_flow(video[1], frames, digest="00ff")
    with pytest.raises(
        StoreMismatchError, match=r"frame 3 has pts \d+ in the store, in the file that was copied"
    ):
        read_flow(video[1], frames, expect=(np.array([3]), pts[3:4] + 1))
    with pytest.raises(VideoError, match="frames 20–24 wanted, the video has 24"):
        read_flow(video[1], np.arange(20, 25))
    with pytest.raises(VideoError, match="no flow file"):
        read_flow(str(tmp_path / "gone.h5"), frames)
    data = bytearray(Path(video[1]).read_bytes())
    with h5py.File(video[1]) as file:
        chunk = file["flow"].id.get_chunk_info_by_coord((4, 0, 0, 0))
    data[chunk.byte_offset + chunk.size // 2] ^= 1
    (tmp_path / "bit.h5").write_bytes(data)
    with pytest.raises(VideoError, match="the flow is damaged"):
        read_flow(str(tmp_path / "bit.h5"), frames)
    (tmp_path / "cut.h5").write_bytes(data[:3000])
    with pytest.raises(VideoError, match="the flow is damaged"):
        read_flow(str(tmp_path / "cut.h5"), frames)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["flow"] = np.zeros((1, 2, 40, 56), np.uint8)
    with pytest.raises(VideoError, match="not a file of format 'distinit optical flow', version 1"):
        read_flow_map(str(tmp_path / "other.h5"))
