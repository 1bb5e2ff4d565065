"""Files whose times or container differ from the frames that a plain decode shows."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from distinit.pipeline.common.errors import VideoError
from distinit.pipeline.prepared.copies import read_copy
from distinit.pipeline.prepared.make_copy import make_copy
from distinit.pipeline.prepared.prepare_options import CopyOptions
from distinit.pipeline.video.bitstream import (
    NonReferencePictures,
    codes_frames_only,
    entry_test,
    in_doubt,
)
from distinit.pipeline.video.container import digest
from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.encode import transcode, write_video
from distinit.pipeline.video.frames import read_frames
from distinit.pipeline.video.geometry import Orientation, Renderer, View
from distinit.pipeline.video.pool.decode_pool import Block, DecodeJob, DecodePool
from distinit.pipeline.video.probe import probe
from distinit.pipeline.video.sampling import Sampling
from distinit.tests.thorough import some


def numbered(start: int, stop: int, height: int = 64, width: int = 128) -> Iterator[np.ndarray]:
    """Pictures that carry their number as eight grey columns, under a noise that moves."""
    noise = np.random.default_rng(0).integers(0, 200, (height // 2, width, 3))
    for number in range(start, stop):
        picture = np.empty((height, width, 3), np.uint8)
        bits = [255 * (number >> bit & 1) for bit in range(8)]
        picture[: height // 2] = np.repeat(bits, width // 8)[None, :, None]
        picture[height // 2 :] = np.roll(noise, (number, 3 * number), (0, 1))
        yield picture


def number(picture: np.ndarray) -> int:
    top = picture[2 : picture.shape[0] // 2 - 2].mean((0, 2)).reshape(8, -1)[:, 2:-2].mean(1)
    return int(sum(int(value > 127) << bit for bit, value in enumerate(top)))


def everything(path: Path) -> dict[str, list[int]]:
    """The numbers of the frames that each way of reading gives."""
    with VideoReader(str(path)) as reader:
        whole = [
            number(reader.info.renderer().render(frame, None))
            for _, _, frame in reader.decode_plain()
        ]
    with VideoReader(str(path)) as reader:
        fourth = [
            number(reader.info.renderer().render(f, None))
            for _, _, f in reader.sample(Sampling(every=4))
        ]
    clips = []
    for start in range(0, len(whole), 8):  # each opens the file again, as a loader does
        wanted = np.arange(start, min(start + 8, len(whole)))
        clips += [number(image) for image in read_frames(str(path), wanted, None).images]
    copy = path.with_name("copy.mp4")
    make_copy(str(path), str(copy) + ".part", str(copy), CopyOptions(size=(64, 128), crf=1))
    pictures = read_copy(str(copy), np.arange(len(whole)), None, digest=digest(str(path))).images
    copied = [number(image) for image in pictures]
    view = View(resize=(64, 128))
    with DecodePool(processes=1, views=[view]) as pool:
        job = DecodeJob(0, str(path), Sampling(every=1))
        blocks = (event for event in pool.stream([job]) if isinstance(event, Block))
        stored = [number(image) for block in blocks for image in block.images[0]]
    return {"whole": whole, "every 4th": fourth, "clips": clips, "copy": copied, "store": stored}


def linear(path: Path) -> list[int]:
    """The numbers of the frames that PyAV alone gives, from the first packet to the last."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        return [number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def assert_shows(path: Path, expected: list[int]) -> None:
    shown = everything(path)
    assert shown.pop("every 4th") == expected[::4]
    assert shown == dict.fromkeys(shown, expected)


STREAMS = {
    "H.264": ("libx264", "a.avi", {"x264-params": "b-adapt=0"}),
    "raw H.264": ("libx264", "a.h264", {"x264-params": "b-adapt=0"}),
    "raw HEVC": ("libx265", "a.hevc", {"x265-params": "log-level=none:bframes=3:b-adapt=0"}),
    "XviD": ("libxvid", "a.avi", {}),
    "MPEG-4": ("mpeg4", "a.avi", {"mbd": "rd"}),
    "raw MPEG-2": ("mpeg2video", "a.m2v", {}),
}
TAKEN = {"XviD": ["mp4", "mov", "mkv", "3gp"], "raw MPEG-2": ["mp4", "mov", "mkv", "ts"]}


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
def test_times_that_are_the_decode_order_are_not_believed(stream: str, tmp_path: Path) -> None:
    codec, name, extra = STREAMS[stream]
    bframes = None if codec == "libx265" else 2
    write_video(tmp_path / name, numbered(0, 44), codec=codec, gop=12, bframes=bframes, extra=extra)
    # Every container with half of the streams, and the other way round.
    endings = TAKEN.get(stream, ["mp4", "mov", "mkv", "flv", "ts", "3gp"])
    for ending in some(endings, 2, first=list(STREAMS).index(stream) % 2):
        path = tmp_path / f"b.{ending}"
        options = {"fflags": "+genpts"}
        try:
            transcode(
                tmp_path / name,
                path,
                codec="copy",
                input_options=options,
                extra={"fps_mode": "auto"},
            )
        except VideoError:
            continue  # not every container takes every stream
        shown = linear(path)
        assert shown == sorted(shown)
        assert len(shown) >= 42  # an edit list may hide the first ones
        assert_shows(path, shown)
        assert probe(str(path)).fps == pytest.approx(25, rel=0.03)


def test_a_stream_that_only_looks_so_keeps_its_times(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered(0, 30), gop=12, bframes=0)
    with VideoReader(str(tmp_path / "a.mp4")) as reader:
        assert (reader.timeline().reliable, reader.timeline().clock) == (True, "pts")


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["ts", "mkv", "webm"])
def test_a_clock_that_starts_again(ending: str, tmp_path: Path) -> None:
    codec = "libvpx" if ending == "webm" else "libx264"
    for name, numbers, offset in (("a", (0, 40), 0.0), ("b", (100, 140), 0.013)):
        write_video(
            tmp_path / f"{name}.{ending}", numbered(*numbers), codec=codec, gop=12,
            bframes=None if codec == "libvpx" else 2, extra={"output_ts_offset": offset},
        )  # fmt: skip
    path = tmp_path / f"both.{ending}"
    path.write_bytes(b"".join((tmp_path / f"{name}.{ending}").read_bytes() for name in "ab"))
    assert_shows(path, [*range(40), *range(100, 140)])
    assert probe(str(path)).fps == pytest.approx(25, rel=0.02)


def test_the_rate_of_a_counted_clock_is_that_of_the_times(tmp_path: Path) -> None:
    write_video(
        tmp_path / "a.mp4", numbered(0, 50), gop=12, bframes=2, extra={"x264-params": "b-adapt=0"}
    )
    transcode(tmp_path / "a.mp4", tmp_path / "b.avi", codec="copy")
    probed = probe(str(tmp_path / "b.avi"))
    with av.open(str(tmp_path / "b.avi")) as container:
        assert float(container.streams.video[0].average_rate) > 100  # the rate of the header
    assert (probed.fps, probed.frames) == (25, 50)
    assert probed.duration == pytest.approx(2.0)
    with VideoReader(str(tmp_path / "b.avi")) as reader:
        assert reader.timeline().time_base == Fraction(1, 25)
        assert [index for index, _, _ in reader.sample(Sampling(fps=2))] == [0, 12, 25, 37]


def box(kind: bytes, content: bytes) -> bytes:
    return (len(content) + 8).to_bytes(4, "big") + kind + content


def with_clap(path: Path, width: int, height: int, right: int, down: int) -> None:
    """Give an mp4 a clean aperture of that size, centred `right` and `down` of the picture's
    centre."""
    data = path.read_bytes()
    clap = box(b"clap", struct.pack(">IIIIiIiI", width, 1, height, 1, right, 1, down, 1))
    for kind in (b"avc1", b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        position = data.rindex(kind) - 4
        data = (
            data[:position]
            + (int.from_bytes(data[position : position + 4], "big") + len(clap)).to_bytes(4, "big")
            + data[position + 4 :]
        )
        if kind == b"avc1":
            entry = data.index(b"avcC") - 4
            data = data[:entry] + clap + data[entry:]
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_cropping_of_the_container_is_applied(ending: str, tmp_path: Path) -> None:
    def framed() -> Iterator[np.ndarray]:
        for picture in numbered(0, 16):
            yield np.pad(picture, ((16, 32), (64, 32), (0, 0)), constant_values=255)

    path = tmp_path / "a.mp4"
    write_video(path, framed(), gop=8, bframes=2, crf=10)
    with_clap(
        path, 128, 64, 16, -8
    )  # the middle of 224x112 is at (112, 56), that of the rest at (128, 48)
    if ending == "mkv":
        transcode(path, tmp_path / "a.mkv", codec="copy", extra={"fps_mode": "passthrough"})
        path = tmp_path / "a.mkv"
    with VideoReader(str(path)) as reader:
        assert (reader.info.width, reader.info.height) == (128, 64)
    probed = probe(str(path))
    assert (probed.width, probed.height) == (128, 64)
    assert_shows(path, list(range(16)))


def test_a_damaged_intra_picture_is_left_out_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    write_video(path, numbered(0, 24), codec="mjpeg", pix_fmt="yuvj420p", extra={"q:v": 3})
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][8]
        position, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[position + size // 2 : position + size // 2 + 400] = bytes(400)
    path.write_bytes(data)
    with VideoReader(str(path)) as reader:
        whole = [index for index, _, _ in reader.decode_plain()]
        assert whole == [index for index in range(24) if index != 8]
        assert reader.truncated is not None
    with VideoReader(str(path)) as reader:
        assert [index for index, _, _ in reader.sample(Sampling(every=4))] == [0, 4, 12, 16, 20]
        assert reader.truncated is not None
    clip = read_frames(str(path), np.arange(6, 14), None)
    assert [number(image) for image in clip.images] == [6, 7, 7, 9, 10, 11, 12, 13]
    assert clip.repeated == 1


def test_a_concealed_picture_does_not_depend_on_the_sampling(tmp_path: Path) -> None:
    path = tmp_path / "a.asf"  # FFmpeg reads it as a raw stream with junk between its packets
    random = np.random.default_rng(0)
    scenes = random.integers(0, 255, (3, 6, 8, 3)).repeat(8, 1).repeat(8, 2)
    moving = [
        np.roll(scenes[t // 17], (t, 2 * t), (0, 1)) + random.integers(0, 6, (48, 64, 3))
        for t in range(40)
    ]
    images = np.stack(moving).clip(0, 255).astype(np.uint8)
    write_video(tmp_path / "a.mpg", images, codec="mpeg2video", gop=9, bframes=2)
    transcode(tmp_path / "a.mpg", path, codec="copy")
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)

    def pictures(sampling: Sampling) -> dict[int, bytes]:
        rendered = {}
        with VideoReader(str(path)) as reader:
            for index, _, frame in reader.sample(sampling):
                rendered[index] = reader.info.renderer().render(frame, None).tobytes()
                del frame
        assert reader.truncated is not None
        return rendered

    alone: list[bytes] = []
    renderer = Renderer(orientation=Orientation())
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        context.thread_type, context.thread_count = "NONE", 1
        for packet in container.demux(video=0):
            with contextlib.suppress(av.FFmpegError):
                alone += [
                    renderer.render(f, None).tobytes()
                    for f in context.decode(packet if packet.size else None)
                ]
    whole = pictures(Sampling(every=1))
    assert len(whole) > 8
    assert list(whole.values()) == alone
    for every in (3, 4, 7):
        sampled = pictures(Sampling(every=every))
        assert sampled == {index: whole[index] for index in sampled}


def test_frames_that_never_come_out_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, numbered(0, 40), gop=40, bframes=0)
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for position, packet in enumerate(source.demux(video=0)):
            if packet.size == 0:
                continue
            packet.stream = stream
            if position == 20:  # an access unit delimiter alone: no error, and no frame
                empty = av.Packet((2).to_bytes(4, "big") + b"\x09\x10")
                empty.pts, empty.dts, empty.time_base, empty.stream = (
                    packet.pts,
                    packet.dts,
                    packet.time_base,
                    stream,
                )
                packet = empty
            target.mux(packet)
    with VideoReader(str(tmp_path / "b.mkv")) as reader:
        decoded = [index for index, _, _ in reader.decode_plain()]
        assert len(decoded) == 39
        assert reader.truncated is not None
        assert "1 of 40" in reader.truncated


STREAMS_WITH_B = {
    "mp4": {"x264-params": "b-adapt=0"},
    "mkv": {"x264-params": "b-pyramid=normal:b-adapt=0:ref=4"},
    "flv": {"x264-params": "cqm=jvt:slices=2:b-adapt=0"},
    "ts": {"x264-params": "open-gop=1:b-adapt=0"},
}


def packets_of(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def slice_of(packet: bytes, ending: str) -> bytes:
    """The slice of a packet: the first unit, in MPEG-TS the last."""
    return packet.split(b"\0\0\1")[-1] if ending == "ts" else packet[4:]


@pytest.mark.parametrize("ending", STREAMS_WITH_B)
def test_non_reference_pictures_are_known_by_their_numbers(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    write_video(path, numbered(0, 40, 32, 64), gop=16, bframes=3, extra=STREAMS_WITH_B[ending])
    with VideoReader(str(path)) as reader:
        extradata = reader.stream.codec_context.extradata
    pictures, packets = NonReferencePictures(extradata), packets_of(path)
    allowed = [pictures.may_leave_out(memoryview(packet), wanted=False) for packet in packets]
    heads = [slice_of(packet, ending)[0] for packet in packets]
    assert allowed == [head == 1 for head in heads]
    assert 10 < sum(map(bool, allowed)) < 35
    header = extradata or b""
    for cut in range(len(header)):  # with a truncated header, no other picture is left out
        pictures = NonReferencePictures(header[:cut])
        for packet, expected in zip(packets[:20], allowed, strict=False):
            assert expected or not pictures.may_leave_out(memoryview(packet), wanted=False)
    for packet in packets[:20]:
        for cut in range(min(len(packet), 40)):
            pictures = NonReferencePictures(header)
            for damaged in (packet, packet[:cut], packet[:cut] + bytes(30), packet):
                pictures.may_leave_out(memoryview(damaged), wanted=False)


@pytest.mark.slow
@pytest.mark.parametrize("ending", STREAMS_WITH_B)
def test_a_reference_picture_that_looks_like_none_is_decoded(ending: str, tmp_path: Path) -> None:
    whole, path = tmp_path / f"whole.{ending}", tmp_path / f"a.{ending}"
    write_video(whole, numbered(0, 40, 32, 64), gop=16, bframes=3, extra=STREAMS_WITH_B[ending])
    data, num_tried = whole.read_bytes(), 0
    # Slices of reference pictures, whose header's bits 5 and 6 (nal_ref_idc) become 0.
    heads = {slice_of(packet, ending)[:12] for packet in packets_of(whole)}
    for head in sorted(
        head for head in heads if head[0] & 0x1F == 1 and head[0] & 0x60 and data.count(head) == 1
    ):
        position = data.index(head)
        path.write_bytes(data[:position] + bytes([1]) + data[position + 1 :])
        with VideoReader(str(path)) as reader:
            plain = {index: digest_of(frame) for index, _, frame in reader.decode_plain()}
        for every in (3, 4, 7):
            with VideoReader(str(path)) as reader:
                sampled = {
                    index: digest_of(frame)
                    for index, _, frame in reader.sample(Sampling(every=every))
                }
            assert sampled == {
                index: plain[index] for index in range(0, 40, every) if index in plain
            }
        num_tried += 1
    assert num_tried > 3


def digest_of(frame: av.VideoFrame) -> str:
    return hashlib.md5(frame.to_ndarray().tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("codec", "slice_"), [("h264", b"\x65\x88\x80"), ("hevc", b"\x26\x01\xaf")]
)
def test_two_start_codes_in_a_row_are_one(codec: str, slice_: bytes) -> None:
    plain, doubled = (memoryview(b"\0\0\1" * n + slice_) for n in (1, 2))
    is_entry = entry_test(codec, None)
    assert is_entry is not None
    assert is_entry(plain)
    assert is_entry(doubled)
    assert not in_doubt(codec, None, doubled, len(doubled))


@pytest.mark.parametrize(
    ("parameters", "frames_only"),
    [
        ("bframes=2", True),
        ("bframes=0", True),  # another pic_order_cnt_type
        ("cqm=jvt", True),  # scaling lists come first
        ("interlaced=1", False),
        ("interlaced=1:bframes=0", False),
    ],
)
def test_fields_are_known_by_the_header(parameters: str, frames_only: bool, tmp_path: Path) -> None:
    write_video(
        tmp_path / "v.mp4",
        numbered(0, 8),
        fps=25,
        codec="libx264",
        extra={"x264-params": parameters},
    )
    with av.open(str(tmp_path / "v.mp4")) as container:
        extradata = container.streams.video[0].codec_context.extradata or b""
    assert codes_frames_only(extradata) == frames_only
    for length in range(len(extradata)):  # a truncated header is not believed, or still complete
        assert codes_frames_only(extradata[:length]) in (False, frames_only)
