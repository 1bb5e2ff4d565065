"""Colours, rotation, pixel shape and crops, against ffmpeg's own filters and torchvision."""

from __future__ import annotations

import subprocess
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from torchvision.transforms import v2

from distinit.pipeline.common.errors import VideoError
from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.encode import transcode, write_video
from distinit.pipeline.video.geometry import Orientation, View, render


def picture(height: int = 96, width: int = 128) -> np.ndarray:
    """A picture without symmetry, in strong colours, that reveals a wrong turn, matrix or range."""
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * (y < height // 3)
    green = 255 * x / width
    blue = 200 * ((x + y) // 24 % 2)
    return np.stack([red, green, blue], -1).astype(np.uint8)


def ffmpeg_rgb(path: Path, height: int, width: int, filters: str, *before: str) -> np.ndarray:
    binary = imageio_ffmpeg.get_ffmpeg_exe()
    command = [binary, "-v", "error", *before, "-i", str(path), "-frames:v", "1", "-vf", filters]
    completed = subprocess.run(
        [*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True
    )
    return np.frombuffer(completed.stdout, np.uint8).reshape(height, width, 3)


def rendered(path: Path, view: View | None) -> np.ndarray:
    with VideoReader(str(path)) as reader:
        _, _, frame = next(reader.decode_plain())
        return reader.info.renderer().render(frame, view)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt2020"])
@pytest.mark.parametrize("level", ["limited", "full"])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_colour_matrix_and_range(matrix: str, level: str, pix_fmt: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    tags = {"bt601": "smpte170m", "bt709": "bt709", "bt2020": "bt2020nc"}[matrix]
    write_video(
        path, [picture()], pix_fmt=pix_fmt, crf=1,
        extra={
            "vf": f"scale=out_color_matrix={matrix}:out_range={level}",
            "colorspace": tags,
            "color_range": "tv" if level == "limited" else "pc",
        },
    )  # fmt: skip
    # The chroma position of ffmpeg's filter is center by default; the stream has left, like all
    # H.264.
    expected = ffmpeg_rgb(path, 48, 64, "scale=64:48:flags=bilinear:in_chroma_loc=left")
    assert difference(rendered(path, View(resize=(48, 64))), expected) < 0.5
    area = View(resize=(48, 64), interpolation="area")
    assert difference(rendered(path, area), picture().reshape(48, 2, 64, 2, 3).mean((1, 3))) < 8


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("mirror", [(), ("-display_hflip",), ("-display_vflip",)])
def test_rotation_and_mirroring(turn: int, mirror: tuple[str, ...], tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", [picture()], crf=1)
    binary = imageio_ffmpeg.get_ffmpeg_exe()
    command = [
        binary,
        "-v",
        "error",
        "-display_rotation",
        str(turn),
        *mirror,
        "-i",
        str(tmp_path / "a.mp4"),
    ]
    subprocess.run([*command, "-c", "copy", str(tmp_path / "b.mp4")], check=True)
    height, width = (96, 128) if turn in (0, 180) else (128, 96)
    expected = ffmpeg_rgb(
        tmp_path / "b.mp4", height, width, "scale=in_chroma_loc=left"
    )  # ffmpeg applies the rotation
    assert difference(rendered(tmp_path / "b.mp4", None), expected) < 2
    with VideoReader(str(tmp_path / "b.mp4")) as reader:
        assert (reader.info.height, reader.info.width) == (height, width)


class UnknownSideData:
    """A frame with side data of a kind that PyAV does not know, as in Apple's spatial video."""

    def __init__(self, frame: av.VideoFrame) -> None:
        self.rotation = frame.rotation

    @property
    def side_data(self) -> object:
        raise ValueError("29 is not a valid Type")


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_unknown_side_data_leaves_the_rotation(turn: int, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", [picture()], crf=1)
    transcode(
        tmp_path / "a.mp4",
        tmp_path / "b.mp4",
        codec="copy",
        input_options={"display_rotation": turn},
    )
    with VideoReader(str(tmp_path / "b.mp4")) as reader:
        _, _, frame = next(reader.decode_plain())
        assert frame.rotation % 360 in (turn, -turn % 360)
        assert Orientation.from_frame(UnknownSideData(frame)) == Orientation.from_frame(frame)


def test_pixels_become_square(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", [picture()], extra={"vf": "setsar=3/2"})
    assert rendered(tmp_path / "a.mp4", None).shape == (96, 192, 3)
    assert rendered(tmp_path / "a.mp4", View(resize=48)).shape == (48, 96, 3)
    # A header with an absurd ratio is invalid.
    write_video(tmp_path / "b.mp4", [picture()], extra={"vf": "setsar=1000/1"})
    assert rendered(tmp_path / "b.mp4", None).shape == (96, 128, 3)


def test_interlaced_pictures_are_scaled_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    fields = picture()
    fields[1::2] = 255 - fields[1::2]
    write_video(path, [fields], crf=1, extra={"flags": "+ilme+ildct"})
    with VideoReader(str(path)) as reader:
        assert next(reader.decode_plain())[2].interlaced_frame
    expected = ffmpeg_rgb(path, 48, 64, "scale=64:48:flags=bilinear:in_chroma_loc=center")
    assert difference(rendered(path, View(resize=(48, 64))), expected) < 2


@pytest.mark.parametrize(
    ("height", "width"), [(256, 340), (340, 256), (97, 333), (480, 480), (719, 1279)]
)
def test_sizes_and_crops_are_torchvisions(height: int, width: int) -> None:
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    view = View(resize=256, crop=224)
    resized = v2.Resize(256, antialias=True)(image)
    assert view.scaled(height, width) == tuple(resized.shape[1:])
    frame = av.VideoFrame.from_ndarray(
        np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    )
    whole, cropped = render(frame, View(resize=256)), render(frame, view)
    expected = v2.CenterCrop(224)(torch.from_numpy(whole).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(cropped, expected)


def test_bilinear_is_close_to_torchvisions(tmp_path: Path) -> None:
    frame = av.VideoFrame.from_ndarray(picture(240, 320))
    expected = v2.Resize((60, 80), antialias=True)(
        torch.from_numpy(picture(240, 320)).permute(2, 0, 1)
    )
    assert difference(render(frame, View(resize=(60, 80))), expected.permute(1, 2, 0).numpy()) < 2.6


FORMATS = ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv420p10le", "yuva420p", "nv12", "gray"]


@pytest.mark.parametrize("pix_fmt", [*FORMATS, "rgb24", "gbrp", "bgra"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "area"])
def test_pictures_are_those_of_swscales_packed_rgb(interpolation: str, pix_fmt: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 122, 3), np.uint8)
    frame = av.VideoFrame.from_ndarray(noise, "rgb24").reformat(format=pix_fmt)
    for height, width in (
        (45, 61),
        (64, 33),
        (90, 121),
        (89, 121),
        (90, 122),
        (133, 201),
        (48, 64),
    ):
        packed = VideoReformatter().reformat(
            frame, width=width, height=height, format="rgb24", dst_color_range="JPEG", threads=1,
            interpolation=Interpolation[interpolation.upper()],
        )  # fmt: skip
        view = View(resize=(height, width), interpolation=interpolation)
        np.testing.assert_array_equal(render(frame, view), packed.to_ndarray())


def test_pictures_that_cannot_be_rendered() -> None:
    frame = av.VideoFrame.from_ndarray(np.zeros((2, 16384, 3), np.uint8))
    with pytest.raises(VideoError, match="too long and thin"):
        render(frame, View(resize=256, crop=224))
    tiny = av.VideoFrame.from_ndarray(np.full((1, 1, 3), 200, np.uint8))
    assert np.all(render(tiny, View(resize=32, crop=32)) == 200)


def test_transcode_keeps_even_sizes_and_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", [picture(96, 128)] * 5)
    transcode(tmp_path / "a.mp4", tmp_path / "b.mp4", short_side=48, gop=2)
    with VideoReader(str(tmp_path / "b.mp4")) as reader:
        assert (reader.info.height, reader.info.width) == (48, 64)
        assert reader.timeline().key.tolist() == [True, False, True, False, True]
