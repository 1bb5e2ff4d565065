"""Encrypted Matroska and WebM files are reported as encrypted, not as damaged."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from distinit.pipeline.video.probe import probe

TRACKS, ENTRY = b"\x16\x54\xae\x6b", b"\xae"


def element(name: bytes, content: bytes) -> bytes:
    return name + bytes([0x80 | len(content)]) + content


def encrypted(content: bytes) -> bytes:
    """The file with a ContentEncryption (AES, a key id) in the entry of its one track."""
    key = element(b"\x47\xe1", b"\5") + element(b"\x47\xe2", b"key of someone")
    kind = element(b"\x50\x33", b"\1") + element(b"\x50\x31", b"\0") + element(b"\x50\x32", b"\1")
    added = element(b"\x6d\x80", element(b"\x62\x40", kind + element(b"\x50\x35", key)))
    tracks = content.index(TRACKS, content.index(TRACKS) + 1)  # the first is in the seek table
    entry = content.index(ENTRY + b"\1\0\0\0\0\0\0", tracks)
    size = int.from_bytes(content[entry + 2 : entry + 9], "big")
    new_entry = (
        ENTRY
        + b"\1"
        + (size + len(added)).to_bytes(7, "big")
        + added
        + content[entry + 9 : entry + 9 + size]
    )
    # The length of all tracks has 8 bytes; the elements after them stay as they are.
    return content[:tracks] + TRACKS + b"\1" + len(new_entry).to_bytes(7, "big") + new_entry + content[
        entry + 9 + size :
    ]  # fmt: skip


@pytest.mark.parametrize("ending", ["webm", "mkv"])
def test_an_encrypted_track_is_called_encrypted(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"v.{ending}"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert probe(str(path)).error is None
    path.write_bytes(encrypted(path.read_bytes()))
    assert probe(str(path)).error == "encrypted"
