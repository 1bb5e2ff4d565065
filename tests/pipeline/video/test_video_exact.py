"""Frames by pts and index, pixel by pixel, against a plain PyAV decode written here."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distinit.pipeline.common.errors import VideoError
from distinit.pipeline.video import feed
from distinit.pipeline.video import packets as timeline
from distinit.pipeline.video.decoder import VideoIndex, VideoReader
from distinit.pipeline.video.encode import transcode, write_video
from distinit.pipeline.video.feed import NotAsPlanned
from distinit.pipeline.video.frames import count_frames
from distinit.pipeline.video.mp4 import QuickReader
from distinit.pipeline.video.probe import probe
from distinit.pipeline.video.sampling import Sampling

Row = tuple[int, int, bytes]
SAMPLINGS = [Sampling(every=4), Sampling(every=7), Sampling(fps=2), Sampling(keyframes=True)]


def moving(frames: int, seed: int = 0, height: int = 48, width: int = 64) -> Iterator[np.ndarray]:
    """Pictures with motion, noise and cuts, so that encoders use all their features."""
    random = np.random.default_rng(seed)
    for t in range(frames):
        if t % 23 == 0:
            scene = random.integers(0, 255, (height // 8, width // 8, 3)).repeat(8, 0).repeat(8, 1)
        noise = random.integers(0, 6, scene.shape)
        yield (np.roll(scene, (t, 2 * t), (0, 1)) + noise).clip(0, 255).astype(np.uint8)


def pixels(frame: av.VideoFrame) -> bytes:
    return frame.to_ndarray(format="gray16le" if "10" in frame.format.name else "yuv444p").tobytes()


def plain(path: Path) -> list[tuple[int | None, bytes]]:
    """Every frame of a linear decode; packets that fail are skipped, as by players."""
    rows = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
                rows += [
                    (f.pts, pixels(f))
                    for f in stream.codec_context.decode(packet if packet.size else None)
                ]
            except av.error.EOFError:
                break
            except StopIteration:
                break
            except av.FFmpegError:
                continue
    return rows


def rows(frames: Iterator[tuple[int, int, av.VideoFrame]]) -> list[Row]:
    return [(index, pts, pixels(frame)) for index, pts, frame in frames]


def check(path: Path, *, whole: bool = True, clock: str | None = None) -> int:
    """Compare all samplings and some clips of a file with the plain decode.

    `whole`: The file is undamaged. Returns how many of 6 clips a QuickReader could read.
    """
    by_header, num_quick = header(path) if path.suffix in (".mp4", ".mov") else None, 0
    truth = plain(path)
    with VideoReader(str(path)) as reader:
        line = reader.timeline()
        full = rows(reader.decode_plain())
    probed = probe(str(path))
    assert (probed.frames, probed.keyframes) == (len(line), int(line.key.sum()))
    with VideoReader(str(path)) as reader:
        info = reader.info
    assert Fraction(*probed.time_base) == line.time_base
    assert (probed.width, probed.height, probed.codec) == (info.width, info.height, info.codec)
    assert clock is None or line.clock == clock
    assert sorted(p for _, _, p in full) == sorted(p for _, p in truth)
    if whole:
        assert [i for i, _, _ in full] == list(range(len(truth)))
        assert len(line) == len(truth)
        assert [p for _, _, p in full] == [p for _, p in truth]
        if line.clock == "pts":
            assert [t for _, t, _ in full] == [t for t, _ in truth]
    by_index = {row[0]: row for row in full}
    with VideoReader(str(path)) as reader:
        for sampling in SAMPLINGS:
            chosen = sampling.select(line.pts, line.key, line.time_base)
            assert rows(reader.sample(sampling)) == [
                by_index[i] for i in chosen.tolist() if i in by_index
            ], sampling
    random = np.random.default_rng(1)
    for _ in range(3):
        start = int(random.integers(0, len(line)))
        clip = np.arange(start, min(start + 8, len(line)))
        expected = [by_index[i] for i in clip.tolist() if i in by_index]
        with VideoReader(str(path)) as reader:
            assert rows(reader.frames_at(clip)) == expected, clip
            info = reader.info
        if by_header is None:
            continue
        for index in (None, by_header):
            with contextlib.suppress(NotAsPlanned), QuickReader(str(path), index=index) as quick:
                assert rows(quick.frames_at(clip)) == expected, clip
                assert quick.info == info
                num_quick += 1
    return num_quick


def header(path: Path) -> VideoIndex | None:
    """The index from the header of a file, checked against its packets; None if it is not used."""
    try:
        with QuickReader(str(path)) as quick:
            index = quick.index()
    except NotAsPlanned:
        return None
    with VideoReader(str(path)) as reader:
        packets, line = reader.packets, reader.timeline()
    for name in ("pts", "dts", "shown", "num_bytes"):
        np.testing.assert_array_equal(getattr(index.packets, name), getattr(packets, name))
    np.testing.assert_array_equal(index.timeline.pts, line.pts)
    assert (index.timeline.time_base, index.timeline.clock) == (line.time_base, line.clock)
    assert line.reliable
    return index


@pytest.fixture(params=["in memory", "by seeking"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read small files both ways: from memory, as small files, and by seeking, as large ones."""
    if request.param == "by seeking":
        monkeypatch.setattr(timeline, "MAX_CACHED_BYTES", 0)
        monkeypatch.setattr(feed, "_MAX_DROPPED_PACKETS", 0)
        monkeypatch.setattr(feed, "_MAX_DROPPED_BYTES", 0)


X265 = "log-level=none"
DROPPED = {"vf": "select='not(eq(mod(n,3),1))'", "fps_mode": "passthrough"}
UNEVEN = {"vf": "setpts='PTS+floor(N/7)*0.2/TB+mod(N,3)*0.01/TB'", "fps_mode": "passthrough"}
HIDDEN = {"auto-alt-ref": 1, "lag-in-frames": 12, "b:v": "100k", "cpu-used": 5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "closed groups": ("a.mp4", {"gop": 12, "bframes": 2}),
    "one group": (
        "a.mkv",
        {"gop": 250, "bframes": 3, "extra": {"x264-params": "b-pyramid=strict"}},
    ),
    "open groups, H.264": (
        "a.mp4",
        {"gop": 10, "bframes": 3, "extra": {"x264-params": "open-gop=1:b-adapt=0"}},
    ),
    "intra refresh": ("a.mkv", {"gop": 20, "extra": {"x264-params": "intra-refresh=1"}}),
    "open groups, HEVC": (
        "a.ts",
        {"codec": "libx265", "gop": 8, "extra": {"x265-params": X265 + ":open-gop=1"}},
    ),
    "layers, HEVC": (
        "a.mov",
        {"codec": "libx265", "gop": 9, "extra": {"x265-params": X265 + ":temporal-layers=2"}},
    ),
    "MPEG-TS": ("a.ts", {"gop": 12, "bframes": 2}),
    "program stream": ("a.mpg", {"codec": "mpeg2video", "gop": 9, "bframes": 2}),
    "AVI with B-frames, no pts": ("a.avi", {"gop": 12, "bframes": 3}),
    "MPEG-4 in AVI": ("a.avi", {"codec": "mpeg4", "gop": 12, "bframes": 2}),
    "hidden frames": ("a.webm", {"codec": "libvpx", "gop": 20, "extra": HIDDEN}),
    "VP9": (
        "a.webm",
        {"codec": "libvpx-vp9", "gop": 15, "extra": {"cpu-used": 8, "lag-in-frames": 8}},
    ),
    "AV1": ("a.mp4", {"codec": "libsvtav1", "gop": 12, "extra": {"preset": 12}}),
    "GIF": ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
    "dropped frames": ("a.mp4", {"gop": 12, "bframes": 2, "extra": DROPPED}),
    "uneven times": ("a.mkv", {"gop": 12, "bframes": 2, "extra": UNEVEN}),
    "interlaced": ("a.mp4", {"gop": 12, "extra": {"flags": "+ilme+ildct"}}),
    "header behind, shifted": (
        "a.mp4",
        {"gop": 12, "bframes": 3, "extra": {"movflags": "negative_cts_offsets"}},
    ),
    "fragments": ("a.mp4", {"gop": 12, "extra": {"movflags": "frag_keyframe+empty_moov"}}),
}
QUICK = {
    "closed groups": 6,
    "layers, HEVC": 6,
    "dropped frames": 6,
    "header behind, shifted": 6,
    "fragments": 0,
}
QUICK |= {"open groups, H.264": 6, "AV1": 0, "interlaced": 0}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("reading")
def test_every_kind_of_stream(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    write_video(tmp_path / name, moving(50), **options)
    assert check(tmp_path / name, clock="counted" if "no pts" in case else "pts") == QUICK.get(
        case, 0
    )


@pytest.mark.usefixtures("reading")
def test_an_edit_list_hides_the_frames_before_its_start(tmp_path: Path) -> None:
    write_video(tmp_path / "long.mp4", moving(60), gop=30, bframes=2)
    # Cut without encoding again: the copy begins at the key frame and hides the frames before the
    # cut.
    transcode(
        tmp_path / "long.mp4", tmp_path / "cut.mp4", codec="copy", input_options={"ss": 1.7},
        extra={"fps_mode": "auto"},
    )  # fmt: skip
    assert check(tmp_path / "cut.mp4") == 6
    with VideoReader(str(tmp_path / "cut.mp4")) as reader:
        assert not reader.packets.shown.all()


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.mp4"])
def test_a_truncated_file_keeps_its_frames(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_video(
        path,
        moving(60),
        gop=12,
        bframes=2,
        extra={"movflags": "faststart"} if name == "a.mp4" else None,
    )
    os.truncate(path, path.stat().st_size * 2 // 3)
    check(path, whole=False)
    with VideoReader(str(path)) as reader:
        assert 20 < len(rows(reader.decode_plain())) < 60


def test_damage_does_not_shift_the_frames_after_it(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving(60), gop=20, bframes=0)
    with VideoReader(str(path)) as reader:
        whole = {index: pts for index, pts, _ in reader.decode_plain()}
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][25]
        position, size = packet.pos, packet.size
    with path.open("r+b") as file:
        file.seek(position)
        file.write(b"\xff" * size)
    check(path, whole=False)
    with VideoReader(str(path)) as reader:
        damaged = {index: pts for index, pts, _ in reader.decode_plain()}
        assert reader.truncated is not None
        assert "damaged data" in reader.truncated
    assert damaged.items() <= whole.items()
    assert 0 < len(whole) - len(damaged) < 5


@pytest.mark.parametrize(
    ("name", "quick"), [("a.mp4", 6), ("a.ts", 6)]
)  # MPEG-TS has parameters at every key frame
def test_pixel_aspect_ratio_without_one_in_the_header(
    name: str, quick: int, tmp_path: Path
) -> None:
    write_video(tmp_path / name, moving(40), gop=12, extra={"vf": "setsar=4/3"})
    transcode(tmp_path / name, tmp_path / "b.mp4", codec="copy")
    data = (tmp_path / "b.mp4").read_bytes().replace(b"pasp", b"free")
    width = data.index(b"tkhd") + 80  # of the display, 16.16
    (tmp_path / "b.mp4").write_bytes(
        data[:width] + (64 << 16).to_bytes(4, "big") + data[width + 4 :]
    )
    assert check(tmp_path / "b.mp4") == quick
    with VideoReader(str(tmp_path / "b.mp4")) as reader:
        assert reader.info.pixel_aspect == Fraction(4, 3)


def test_a_first_frame_that_never_comes_out_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving(40), gop=12, bframes=2)
    with av.open(str(path)) as container:
        first = next(container.demux(video=0))
    with path.open("r+b") as file:
        file.seek(first.pos)
        file.write(b"\xff" * first.size)
    assert check(path, whole=False) == 0
    assert count_frames(str(path)) == len(plain(path)) < 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", [{"vf": "setsar=1,format=yuv420p,setparams=range=unknown"}, {"qp": 0}], ids=str
)
def test_new_parameter_sets_keep_earlier_values_that_they_omit(
    other: dict[str, Any], tmp_path: Path
) -> None:
    first = (
        {"color_range": "pc", "vf": "setsar=1"} if "vf" in other else {"x264-params": "8x8dct=0"}
    )
    write_video(tmp_path / "a.ts", moving(20), gop=12, extra=first)
    write_video(tmp_path / "b.ts", moving(20), gop=12, extra={**other, "output_ts_offset": 2})
    (tmp_path / "ab.ts").write_bytes(
        b"".join((tmp_path / name).read_bytes() for name in ("a.ts", "b.ts"))
    )
    transcode(tmp_path / "ab.ts", tmp_path / "ab.mp4", codec="copy")
    check(tmp_path / "ab.mp4")


def test_faults_of_early_encoders_are_reproduced_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving(40), gop=10, bframes=2, pix_fmt="yuv444p")
    path.write_bytes(re.sub(rb"(?<=x264 - core )\d{3}", b"148", path.read_bytes()))
    assert check(path) == 0


def test_deeply_nested_boxes_are_left_to_libavformat(tmp_path: Path) -> None:
    path, nested = tmp_path / "a.mp4", b""
    write_video(path, moving(20), gop=12)
    for _ in range(2000):
        nested = (len(nested) + 8).to_bytes(4, "big") + b"trak" + nested
    data = path.read_bytes()
    start = data.rindex(b"moov") - 4
    size = (len(data) - start + len(nested)).to_bytes(4, "big")
    path.write_bytes(data[:start] + size + data[start + 4 :] + nested)
    assert check(path) == 0


def test_a_header_that_points_elsewhere_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving(40), gop=12, bframes=2)
    index_by_header = header(path)
    assert index_by_header is not None
    for name, position, clip in (
        ("byte_position", 14, [12, 13, 14, 15]),
        ("pts", 15, [12, 13, 14, 15]),
        ("entry", 6, [9, 10]),
    ):
        table = replace(
            index_by_header.packets,
            entry=index_by_header.packets.entry.copy(),
            pts=index_by_header.packets.pts.copy(),
        )
        table.byte_position = (
            index_by_header.packets.byte_position + (np.arange(40) == position)
            if name == "byte_position"
            else index_by_header.packets.byte_position
        )
        if name == "pts":
            table.pts[position] += 1
        if name == "entry":
            table.entry[position] = True
        with QuickReader(
            str(path), index=VideoIndex(table, index_by_header.timeline, from_header=True)
        ) as quick:
            if name == "entry":  # a wrong entry: decoding begins at the one before it
                assert [i for i, _, _ in quick.frames_at(np.array(clip))] == clip
                assert not table.entry[position]
            else:
                with pytest.raises(NotAsPlanned):
                    list(quick.frames_at(np.array(clip)))


@pytest.mark.slow
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    codec=st.sampled_from(["libx264", "libx264", "libx265", "mpeg4", "libvpx"]),
    gop=st.sampled_from([1, 2, 5, 12, 250]),
    bframes=st.integers(0, 4),
    frames=st.integers(1, 60),
    rate=st.sampled_from([10, 25, 29.97]),
    keep=st.sampled_from([0, 2**24]),
    cut=st.sampled_from([0, 0, 0.4, 0.8]),
    seed=st.integers(0, 9),
)
def test_random_streams(
    codec: str, gop: int, bframes: int, frames: int, rate: float, keep: int, cut: float, seed: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(timeline, "MAX_CACHED_BYTES", keep)
    path = tmp_path / "a.mkv"
    extra = (
        {"x265-params": "log-level=none"}
        if codec == "libx265"
        else {"cpu-used": 5}
        if codec == "libvpx"
        else {}
    )
    write_video(
        path, moving(frames, seed), fps=rate, codec=codec, gop=gop, extra=extra,
        bframes=None if codec == "libvpx" else bframes,
    )  # fmt: skip
    if cut:
        os.truncate(path, int(path.stat().st_size * cut))
        try:
            with VideoReader(str(path)) as reader:
                reader.timeline()
        except VideoError:
            with contextlib.suppress(av.FFmpegError):  # unreadable in a plain decode too
                assert plain(path) == []
            return
    check(path, whole=not cut)
