"""Random legal remuxes and random damage, frame by frame against a plain linear decode.

`--hypothesis-profile=many` runs thousands of files in place of a few (tests/conftest.py).
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from distinit.pipeline.common.errors import VideoError
from distinit.pipeline.video.bitstream import INTRA_ONLY
from distinit.pipeline.video.decoder import OTHER_ORDER, Rows, VideoReader
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.frames import read_frames
from distinit.pipeline.video.geometry import View
from distinit.pipeline.video.probe import probe
from distinit.pipeline.video.sampling import Sampling
from distinit.tests.thorough import is_thorough

FRAMES, SIZE = 40, (48, 64)
VIEW = View(resize=(32, 40))  # one size, even if the header is damaged
X264 = "x264-params"
# The sources, each encoded once: codec, first container, options. Appended files are made of other
# pictures.
SOURCES = {
    "h264": ("libx264", "mp4", {"g": 12, "bf": 3}),
    "h264 avi": ("libx264", "avi", {"g": 12, "bf": 2}),
    "h264 raw": ("libx264", "h264", {"g": 15, "bf": 3}),
    "h264 no b": ("libx264", "mp4", {"g": 12, "bf": 0}),
    "h264 open": ("libx264", "mkv", {"g": 10, "bf": 3, X264: "open-gop=1:b-adapt=0"}),
    "h264 pyramid": ("libx264", "avi", {"g": 40, "bf": 5, X264: "b-pyramid=normal:b-adapt=0"}),
    "h264 one group": ("libx264", "ts", {"g": 250, "bf": 2}),
    "hevc": ("libx265", "mp4", {"g": 12, "x265-params": "log-level=none:bframes=3"}),
    "hevc raw": ("libx265", "hevc", {"g": 12, "x265-params": "log-level=none:bframes=3:b-adapt=0"}),
    "hevc open": ("libx265", "mkv", {"g": 9, "x265-params": "log-level=none:open-gop=1"}),
    "xvid avi": ("libxvid", "avi", {"g": 12, "bf": 2}),
    "mpeg4 avi": ("mpeg4", "avi", {"g": 12, "bf": 2, "mbd": "rd"}),
    "mpeg4": ("mpeg4", "mp4", {"g": 12, "bf": 0}),
    "mpeg2": ("mpeg2video", "mpg", {"g": 9, "bf": 2}),
    "mpeg2 raw": ("mpeg2video", "m2v", {"g": 9, "bf": 2}),
    "mpeg1": ("mpeg1video", "mpg", {"g": 9, "bf": 2}),
    "vp8": ("libvpx", "webm", {"g": 12, "auto-alt-ref": 1, "lag-in-frames": 8, "cpu-used": 5}),
    "vp9": ("libvpx-vp9", "webm", {"g": 12, "cpu-used": 8, "lag-in-frames": 8}),
    "av1": ("libsvtav1", "mp4", {"g": 12, "preset": 12}),
    "mjpeg": ("mjpeg", "avi", {}),
    "wmv2": ("wmv2", "asf", {"g": 12}),
    "flv1": ("flv", "flv", {"g": 12}),
    "theora": ("libtheora", "ogg", {"g": 12}),
    "prores": ("prores", "mov", {}),
    "huffyuv": ("ffvhuff", "avi", {}),
    "png": ("png", "mov", {}),
}
TARGETS = [
    "mp4",
    "mov",
    "mkv",
    "webm",
    "avi",
    "ts",
    "m2ts",
    "mpg",
    "flv",
    "3gp",
    "nut",
    "asf",
    "ogg",
    "ivf",
    "mxf",
]
BEFORE = [
    [],
    [],
    ["-fflags", "+genpts"],
    ["-fflags", "+igndts"],
    ["-ss", "0.5"],
    ["-ss", "0.3", "-t", "0.8"],
]
BEFORE += [["-itsoffset", "3"], ["-itsoffset", "-0.3"], ["-copyts", "-ss", "0.7"]]
AFTER = [
    [],
    [],
    [],
    ["-t", "1.1"],
    ["-output_ts_offset", "5"],
    ["-avoid_negative_ts", "disabled"],
    ["-frames:v", "23"],
]
AFTER += [
    ["-movflags", flags]
    for flags in ("frag_keyframe+empty_moov", "negative_cts_offsets", "faststart")
]
AFTER += [
    ["-video_track_timescale", "25"],
    ["-bsf:v", "setts=pts=DTS"],
    ["-use_editlist", "0"],
    ["-bsf:v", "dts2pts"],
]
AFTER += [
    ["-bsf:v", "noise=drop=not(mod(n\\,11))"],
    ["-bsf:v", "setts=pts=PTS+mod(N\\,2):dts=DTS"],
    ["-muxdelay", "2"],
]


@dataclass(frozen=True)
class Frame:
    """One frame of a linear decode."""

    pts: int | None
    pixels: str


def pictures(seed: int) -> np.ndarray:
    """Different pictures uint8 [FRAMES, h, w, 3] with motion and cuts."""
    random = np.random.default_rng(seed)
    scenes = random.integers(0, 255, (3, SIZE[0] // 8, SIZE[1] // 8, 3)).repeat(8, 1).repeat(8, 2)
    frames = [
        np.roll(scenes[t // 17], (t, 2 * t), (0, 1)) + random.integers(0, 6, (*SIZE, 3))
        for t in range(FRAMES)
    ]
    return np.stack(frames).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two files of different pictures per source, made on first use."""
    return _Sources(tmp_path_factory.mktemp("sources"))


class _Sources(dict[str, list[Path]]):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> list[Path]:
        codec, ending, options = SOURCES[name]
        formats = {"mjpeg": "yuvj420p", "prores": "yuv422p10le", "png": "rgb24"}
        self[name] = [self.folder / f"{name.replace(' ', '-')}-{seed}.{ending}" for seed in (0, 1)]
        for seed, path in enumerate(self[name]):
            extra = {key: value for key, value in options.items() if key not in ("g", "bf")}
            write_video(
                path, pictures(seed), codec=codec, gop=options.get("g"), bframes=options.get("bf"), crf=None,
                pix_fmt=formats.get(codec, "yuv420p"), extra=extra,
            )  # fmt: skip
        return self[name]


def ffmpeg(*arguments: object) -> bool:
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-hide_banner",
        "-loglevel",
        "error",
        "-y",
        *map(str, arguments),
    ]
    return (
        subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False
        ).returncode
        == 0
    )


def linear(path: Path) -> list[Frame] | None:
    """Every frame of a linear decode by PyAV without packets that fail; None if it cannot open."""
    frames = []
    try:
        container = av.open(str(path))
    except (av.FFmpegError, ValueError):
        return None
    with container:
        if not container.streams.video:
            return None
        stream = container.streams.video[0]
        if stream.codec_context is None:
            return None
        context = stream.codec_context
        context.thread_type, context.thread_count = "NONE", 1
        intra = context.codec.canonical_name in INTRA_ONLY
        if intra:  # the content of a damaged picture is not a property of the file
            context.options = {"err_detect": "explode"}
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                packet = None
            if packet is not None and not packet.size:
                continue
            try:
                decoded = [
                    (f.pts, digest(f))
                    for f in context.decode(packet)
                    if not (f.is_corrupt and intra)
                ]
                frames += [Frame(*frame) for frame in decoded]
            except av.FFmpegError:  # damage: a linear decode skips the packet, as players do
                pass
            except ValueError:  # no decoder for what the header claims
                return None
            if packet is None:
                return frames


def digest(frame: av.VideoFrame) -> str:
    return hashlib.md5(
        b"".join(bytes(plane) for plane in frame.reformat(format="yuv444p").planes)
    ).hexdigest()


def digests(frames: Rows) -> Iterator[tuple[int, int, str]]:
    """Yield (index, pts, digest); hold no frame while the next is decoded, see VideoReader."""
    for index, pts, frame in frames:
        row = index, pts, digest(frame)
        del frame
        yield row


def compare(path: Path, *, damaged: bool) -> str:
    """Compare the reader's frames with the linear decode, and samplings and clips with the reader.

    Return the outcome in words.
    """
    truth, refused = linear(path), ""
    try:
        with VideoReader(str(path)) as reader:
            line = reader.timeline()
            rows = list(digests(reader.decode_plain()))
            note = reader.truncated
    except VideoError as error:
        refused = str(error)
    if refused:
        assert not truth or damaged or OTHER_ORDER in refused, refused
        return f"refused: {refused}"
    if truth is None:  # a damaged header names a codec that cannot be opened
        assert damaged
        assert not rows
        with VideoReader(str(path)) as reader, pytest.raises(VideoError):
            _ = reader.info
        return "refused: no frame decodes"
    counted = probe(str(path))
    assert (counted.error, counted.frames) == (None, len(line))
    with VideoReader(str(path)) as reader:
        assert (counted.width, counted.height) == (reader.info.width, reader.info.height)
    shown = [frame.pixels for frame in truth]
    assert [index for index, _, _ in rows] == sorted({index for index, _, _ in rows})
    if (
        damaged and line.clock == "pts"
    ):  # a decoder that lost its thread shows frames late: their pts decide
        assert {(pts, pixels) for _, pts, pixels in rows} <= {
            (frame.pts, frame.pixels) for frame in truth
        }
        assert note is not None or len(rows) == len(shown)
    else:
        assert [pixels for _, _, pixels in rows] == shown
        # A note reports packets that did not decode; the other frames keep the index of their time.
        assert note is not None or [index for index, _, _ in rows] == list(range(len(shown)))
    if line.clock == "pts" and not damaged:
        assert [pts for _, pts, _ in rows] == [frame.pts for frame in truth]
    by_index = {index: (index, pts, pixels) for index, pts, pixels in rows}
    for sampling in (Sampling(every=4), Sampling(fps=3), Sampling(keyframes=True)):
        with VideoReader(str(path)) as reader:
            chosen = sampling.select(line.pts, line.key, line.time_base).tolist()
            expected = [by_index[index] for index in chosen if index in by_index]
            assert list(digests(reader.sample(sampling))) == expected, sampling
    clips(path, by_index, len(line))
    return line.clock + (", noted" if note else "")


def clips(path: Path, by_index: dict[int, tuple[int, int, str]], total: int) -> None:
    """Compare clips as training reads them, if possible with a reader of the header alone."""
    whole: dict[int, np.ndarray] = {}
    for start in (0, total // 3, max(0, total - 8)):
        wanted = np.arange(start, min(start + 8, total))
        try:
            frames = read_frames(str(path), wanted, VIEW)
        except VideoError:
            assert sum(int(i) in by_index for i in wanted) * 2 < len(wanted)
            continue
        for index, image in zip(wanted.tolist(), frames.images, strict=True):
            if index in by_index:
                whole.setdefault(index, image)
                np.testing.assert_array_equal(image, whole[index])
    with VideoReader(str(path)) as reader:
        for index, _, frame in reader.frames_at(np.array(sorted(whole), np.int64)):
            image = reader.info.renderer().render(frame, VIEW)
            del frame
            np.testing.assert_array_equal(image, whole[index])


def examples(share: float) -> int:
    """Return a share of the profile's number of examples, which a quick run takes a third of."""
    return max(1, int(settings.default.max_examples * share / (1 if is_thorough() else 3)))


@st.composite
def remux(draw: st.DrawFn, sources: dict[str, list[Path]], folder: Path) -> tuple[Path, str]:
    """A file that ffmpeg remuxed from one or two sources, and a description of the steps."""
    name = draw(st.sampled_from(sorted(SOURCES)))
    step = st.tuples(st.sampled_from(TARGETS), st.sampled_from(BEFORE), st.sampled_from(AFTER))
    steps = draw(st.lists(step, max_size=2))
    paths = list(sources[name])
    for number, (ending, before, after) in enumerate(steps):
        outputs = [folder / f"{part}-{number}.{ending}" for part in (0, 1)]
        for source, target in zip(paths, outputs, strict=True):
            assume(ffmpeg(*before, "-i", source, "-map", "0:v:0", "-c", "copy", *after, target))
        paths = outputs
    appended = draw(st.sampled_from(["no", "no", "no", "cat", "concat"]))
    path = paths[0]
    if appended == "cat":
        path = folder / f"both{path.suffix}"
        path.write_bytes(b"".join(part.read_bytes() for part in paths))
    if appended == "concat":
        path = folder / f"joined{draw(st.sampled_from(['.mp4', '.mkv', '.ts']))}"
        listed = folder / "list.txt"
        listed.write_text("".join(f"file '{part}'\n" for part in paths))
        assume(ffmpeg("-f", "concat", "-safe", "0", "-i", listed, "-c", "copy", path))
    return path, f"{name}: {steps}, {appended}"


@st.composite
def damage(draw: st.DrawFn, path: Path) -> str:
    """Damage a file in place: bits, cuts, zeros, or lost, doubled or swapped pieces."""
    data = bytearray(path.read_bytes())
    assume(len(data) > 2)
    kind = draw(
        st.sampled_from(["bit", "bit", "cut", "zeros", "hole", "lost", "doubled", "swapped"])
    )
    position = draw(st.integers(0, max(0, len(data) - 2)))
    size = 188 if path.suffix in (".ts", ".m2ts") else draw(st.sampled_from([1, 16, 300, 2000]))
    position = position - position % 188 if size == 188 else position
    if kind == "bit":
        data[position] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del data[position:]
    elif kind == "zeros":
        data[position : position + size] = bytes(min(size, len(data) - position))
    elif kind == "hole" or kind == "lost":
        del data[position : position + size]
    elif kind == "doubled":
        data[position:position] = data[position : position + size]
    else:
        data[position : position + 2 * size] = (
            data[position + size : position + 2 * size] + data[position : position + size]
        )
    path.write_bytes(data)
    return f"{kind} of {size} at {position}"


OFTEN = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]


@pytest.mark.slow
@settings(
    max_examples=examples(0.4),
    derandomize=examples(1) <= 100,
    deadline=None,
    suppress_health_check=OFTEN,
)
@given(data=st.data())
def test_remuxes_show_the_frames_of_a_linear_decode(
    data: st.DataObject, sources: dict[str, list[Path]], tmp_path: Path
) -> None:
    path, how = data.draw(remux(sources, tmp_path))
    outcome = compare(path, damaged="noise=drop" in how)
    print(f"{outcome:24s} {how}")


@pytest.mark.slow
@settings(
    max_examples=examples(0.4),
    derandomize=examples(1) <= 100,
    deadline=None,
    suppress_health_check=OFTEN,
)
@given(data=st.data())
def test_damage_shows_frames_of_a_linear_decode_or_a_reason(
    data: st.DataObject, sources: dict[str, list[Path]], tmp_path: Path
) -> None:
    path, how = data.draw(remux(sources, tmp_path))
    copy = tmp_path / f"damaged{path.suffix}"
    copy.write_bytes(path.read_bytes())
    how += ", " + data.draw(damage(copy))
    outcome = compare(copy, damaged=True)
    print(f"{outcome:24s} {how}")
