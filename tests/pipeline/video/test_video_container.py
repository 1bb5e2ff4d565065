"""Which files and names can be opened, and the reasons why others cannot."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from distinit.pipeline.common.errors import VideoError
from distinit.pipeline.video.container import digest
from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.encode import transcode, write_video
from distinit.pipeline.video.probe import probe


def grey(path: Path, frames: int = 10, codec: str = "libx264", **options: object) -> Path:
    pictures = [np.full((48, 64, 3), 7 * i % 255, np.uint8) for i in range(frames)]
    write_video(path, pictures, codec=codec, **options)  # type: ignore[arg-type]
    return path


def ffmpeg(*arguments: object) -> None:
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True
    )


def reason(path: Path) -> str:
    probed = probe(os.fspath(path))
    assert probed.error is not None, probed
    with pytest.raises(VideoError, match=r".") as error, VideoReader(os.fspath(path)) as reader:
        reader.timeline()
    assert str(error.value) == probed.error
    return probed.error


def test_a_read_error_of_the_header_is_left_to_the_full_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.fspath(grey(tmp_path / "v.mp4"))
    expected = probe(path)

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", pread)
    assert probe(path) == expected
    assert expected.error is None


def test_playlists_are_not_followed(tmp_path: Path) -> None:
    grey(tmp_path / "other.mp4")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    (tmp_path / "concat.mkv").write_text(f"ffconcat version 1.0\nfile '{tmp_path}/other.mp4'\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for name in ("list.mp4", "list.m3u8", "list.ts"):
            (tmp_path / name).write_text(
                f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n"
            )
        (tmp_path / "session.mp4").write_text(
            "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"
        )
        for name in ("concat.mp4", "concat.mkv", "list.mp4", "list.m3u8", "list.ts", "session.mp4"):
            assert reason(tmp_path / name) == "a playlist or text file, not a video"
            with pytest.raises(VideoError, match="Error opening input"):
                transcode(tmp_path / name, tmp_path / "copy.mkv")
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "name", [b"-y.mp4", b"http:x.mp4", b"a b\n.mp4", b"\xff\xfe.mp4", b"pipe:0", b"%d.mp4"]
)
def test_a_name_is_just_a_name(
    name: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.rename(grey(tmp_path / "plain.mp4"), name)
    path = os.fsdecode(name)
    with VideoReader(path) as reader:
        assert len(list(reader.decode_plain())) == 10
    if name != b"pipe:0":
        transcode(path, path + ".mkv", short_side=32)
        assert probe(path + ".mkv").frames == 10


def test_reasons(tmp_path: Path) -> None:
    whole = grey(tmp_path / "whole.mp4", frames=30).read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    ffmpeg("-f", "lavfi", "-i", "anullsrc=d=0.2", tmp_path / "sound.mp4")
    ffmpeg("-f", "lavfi", "-i", "color=red:s=32x32:d=1:r=1", "-frames:v", 1, tmp_path / "cover.png")
    ffmpeg(
        "-i", tmp_path / "sound.mp4", "-i", tmp_path / "cover.png", "-map", 0, "-map", 1,
        "-c:a", "copy", "-c:v", "png", "-disposition:v:0", "attached_pic", tmp_path / "cover.mp4",
    )  # fmt: skip
    ffmpeg(
        "-i", tmp_path / "whole.mp4", "-c", "copy", "-encryption_scheme", "cenc-aes-ctr",
        "-encryption_key", "0" * 32, "-encryption_kid", "1" * 32, tmp_path / "locked.mp4",
    )  # fmt: skip
    expected = {
        "gone.mp4": "no such file",
        "empty.mp4": "empty file",
        "folder.mp4": "is a folder, not a file",
        "pipe.mp4": "is not a regular file",
        "noise.mp4": "not a video container FFmpeg knows",
        "cut.mp4": "no index (moov box): the recording or download was cut off",
        "sound.mp4": "no video stream (audio only)",
        "cover.mp4": "no video stream (cover art only)",
        "locked.mp4": "encrypted",
    }
    assert {name: reason(tmp_path / name) for name in expected} == expected


def test_subtitles_and_cover_art_first(tmp_path: Path) -> None:
    grey(tmp_path / "a.mp4")
    (tmp_path / "s.srt").write_text("1\n00:00:00,000 --> 00:00:02,000\nhello\n")
    ffmpeg(
        "-f", "lavfi", "-i", "color=red:s=512x512:d=1:r=1", "-frames:v", 1, tmp_path / "cover.png"
    )
    ffmpeg(
        "-i",
        tmp_path / "s.srt",
        "-i",
        tmp_path / "a.mp4",
        "-map",
        0,
        "-map",
        1,
        "-c:v",
        "copy",
        tmp_path / "b.mkv",
    )
    ffmpeg(
        "-i", tmp_path / "cover.png", "-i", tmp_path / "a.mp4", "-map", 0, "-map", 1, "-c:v:0", "png",
        "-c:v:1", "copy", "-disposition:v:0", "attached_pic", tmp_path / "b.mp4",
    )  # fmt: skip
    for name in ("b.mkv", "b.mp4"):
        probed = probe(str(tmp_path / name))
        assert (probed.error, probed.frames, probed.width, probed.height) == (None, 10, 64, 48)


def test_headers_with_false_claims(tmp_path: Path) -> None:
    for side, words in (
        (100_000, "the header is damaged"),
        (12_000, "the header claims frames of 12000x12000"),
    ):
        (tmp_path / "big.y4m").write_bytes(
            b"YUV4MPEG2 W%d H%d F25:1 Ip C420\nFRAME\n" % (side, side) + bytes(9999)
        )
        assert words in reason(tmp_path / "big.y4m")
    data = bytearray(grey(tmp_path / "a.mp4").read_bytes())
    position = data.find(b"stsz")
    struct.pack_into(
        ">II", data, position + 8, 1, 2**31 - 1
    )  # every sample one byte, 2³¹ − 1 of them
    position = data.find(b"stts")
    struct.pack_into(">I", data, position + 12, 2**31 - 1)
    (tmp_path / "many.mp4").write_bytes(data)
    assert "the header promises 2147483647 frames" in reason(tmp_path / "many.mp4")


def test_the_digest_covers_size_head_and_tail(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(200_000))
    digests = {digest(str(path))}
    for change in ((0, b"x"), (199_999, b"y")):
        with path.open("r+b") as file:
            file.seek(change[0])
            file.write(change[1])
        digests.add(digest(str(path)))
    path.write_bytes(path.read_bytes() + b"y")
    digests.add(digest(str(path)))
    assert len(digests) == 4
    assert all(len(d) == 32 for d in digests)
    with pytest.raises(VideoError, match="no such file"):
        digest(str(tmp_path / "gone"))


def test_messages_of_ffmpeg_are_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="No such file or directory"):
        grey(tmp_path / "nowhere" / "a.mp4")
    (tmp_path / "noise").write_bytes(b"x" * 1000)
    with pytest.raises(VideoError, match="Invalid data found"):
        transcode(tmp_path / "noise", tmp_path / "a.mp4")
