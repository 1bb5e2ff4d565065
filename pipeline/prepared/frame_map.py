"""The map inside a prepared copy: from its frames to the source's, and to its own bytes.

It is the last box of the copy itself, an mp4 file: a copy and its map are one file, written and
renamed as one, and players skip the box. docs/prepare.md describes the bytes.

Shapes: N frames of the copy, in presentation order, which is also the order of its packets.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
import zlib
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from ..common.errors import StoreMismatchError, VideoError
from ..common.sealed import sha256_of
from ..video.container import reason
from ..video.frames import LruCache

BOX = uuid.UUID("6bb1fa8c-5e0b-4f43-9d8c-2f3c5a7d1e90").bytes
MAGIC = b"distprep"
VERSION = 1
_START = struct.Struct(">I4s16s")  # box size, "uuid", which
_END = struct.Struct(">II8s")  # CRC-32 of the packed map, box size, magic
_TAIL = 2**14  # one read of this size holds the map of most videos
_MOST = 2**28  # bytes that a map may unpack to


@dataclass(frozen=True)
class SourceRecord:
    """The source of a copy: identity, frames in its timeline, size on display (pixels), clock."""

    digest: str
    size: int
    mtime_ns: int
    frames: int
    width: int
    height: int
    time_base: Fraction
    clock: Literal["pts", "counted"]
    note: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the record as a file holds it."""
        return {**self.__dict__, "time_base": [*self.time_base.as_integer_ratio()]}

    @classmethod
    def from_json(cls, head: dict[str, Any]) -> SourceRecord:
        """Return the record that `as_json` wrote."""
        return cls(**{**head, "time_base": Fraction(*head["time_base"])})

    def seconds(self, pts: np.ndarray) -> float:
        """Return the time from the first frame to the end of the last, given pts int64 [N].

        The last frame is taken to last as long as the others.
        """
        n = len(pts)
        return float((int(pts[-1]) - int(pts[0])) * self.time_base) * n / (n - 1) if n > 1 else 0.0

    def check(
        self,
        index: np.ndarray,
        pts: np.ndarray,
        expect: tuple[np.ndarray, np.ndarray] | None,
        digest: str | None,
    ) -> None:
        """Raise StoreMismatchError unless this is the source that `digest` or `expect` describe.

        index, pts int64 [N]: the frames that the copy has; a damaged frame has none. expect:
        indices and their pts.
        """
        if digest is not None and digest != self.digest:
            raise StoreMismatchError(
                f"a copy of another file: made from one with digest {self.digest}, "
                f"the teachers saw one with digest {digest}"
            )
        if expect is None:
            return
        at = np.searchsorted(index, expect[0])
        for place, number, expected in zip(
            at.tolist(), *(column.tolist() for column in expect), strict=True
        ):
            if place < len(index) and index[place] == number and pts[place] != expected:
                raise StoreMismatchError(
                    f"frame {number} has pts {expected} in the store, in the file that was copied it has {pts[place]}"
                )
            if number >= self.frames:
                raise StoreMismatchError(
                    f"frame {number} is in the store, the file that was copied has {self.frames} frames"
                )


@dataclass(frozen=True)
class FrameMap:
    """index, pts int64 [N]: the source frame that each frame of the copy shows; ascending.

    offset int64 [N + 1]: where each packet begins, and where the last ends; key bool [N]; crc
    uint32 [N] of each packet. width, height: of the copy's pictures. extradata: what its decoder is
    set up with. quality: PSNR and SSIM against the scaled source frames. options: how it was
    encoded. sha256: of all bytes of the file before the map; None in maps of version 0.1.
    """

    source: SourceRecord
    index: np.ndarray
    pts: np.ndarray
    offset: np.ndarray
    key: np.ndarray
    crc: np.ndarray
    width: int
    height: int
    codec: str
    extradata: bytes
    options: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    sha256: str | None = None

    def __len__(self) -> int:
        return len(self.index)

    def pack(self) -> bytes:
        """Return the box."""
        head = json.dumps(
            {
                "version": VERSION,
                "frames": len(self),
                "first_byte": int(self.offset[0]),
                "width": self.width,
                "height": self.height,
                "codec": self.codec,
                "extradata": self.extradata.hex(),
                "source": self.source.as_json(),
                "options": self.options,
                "quality": self.quality,
                "sha256": self.sha256,
            }
        ).encode("ascii")
        columns = (
            np.diff(self.index, prepend=0).astype("<i8"),
            np.diff(self.pts, prepend=0).astype("<i8"),
            np.diff(self.offset).astype("<u4"),
            self.crc.astype("<u4"),
            np.packbits(self.key),
        )
        packed = zlib.compress(
            struct.pack("<I", len(head)) + head + b"".join(c.tobytes() for c in columns), 6
        )
        size = _START.size + len(packed) + _END.size
        return _START.pack(size, b"uuid", BOX) + packed + _END.pack(zlib.crc32(packed), size, MAGIC)

    @classmethod
    def unpack(cls, packed: bytes) -> FrameMap:
        """Read a map from the bytes that `pack` compressed.

        Raises:
            ValueError, KeyError, IndexError or another: The bytes are something else.
        """
        unzip = zlib.decompressobj()
        data = unzip.decompress(packed, _MOST)
        if unzip.unconsumed_tail or not unzip.eof:
            raise ValueError("too long")
        (length,) = struct.unpack_from("<I", data)
        head = json.loads(data[4 : 4 + length])
        if head["version"] != VERSION:
            raise VideoError(f"its map has version {head['version']}, this program reads {VERSION}")
        n, at = int(head["frames"]), 4 + length
        index = np.cumsum(np.frombuffer(data, "<i8", n, at), dtype=np.int64)
        pts = np.cumsum(np.frombuffer(data, "<i8", n, at + 8 * n), dtype=np.int64)
        sizes = np.frombuffer(data, "<u4", n, at + 16 * n)
        crc = np.frombuffer(data, "<u4", n, at + 20 * n)
        key = np.unpackbits(np.frombuffer(data, np.uint8, -(-n // 8), at + 24 * n), count=n).view(
            bool
        )
        offset = np.empty(n + 1, np.int64)
        offset[0] = head["first_byte"]
        np.cumsum(sizes, out=offset[1:])
        offset[1:] += offset[0]
        if n == 0 or not key[0]:
            raise ValueError("no key frame to begin with")
        return cls(
            source=SourceRecord.from_json(head["source"]),
            index=index,
            pts=pts,
            offset=offset,
            key=key,
            crc=crc,
            width=int(head["width"]),
            height=int(head["height"]),
            codec=head["codec"],
            extradata=bytes.fromhex(head["extradata"]),
            options=head["options"],
            quality=head["quality"],
            sha256=head.get("sha256"),
        )


_maps: LruCache[FrameMap] = LruCache()


def read_map(path: str) -> FrameMap:
    """Read the map of a copy.

    Raises:
        VideoError: The file does not exist, or has no whole map at its end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise VideoError(reason(error)) from error
    try:
        return map_of(descriptor, path)
    finally:
        os.close(descriptor)


def check_copy(path: str) -> bool:
    """Read a whole copy; return False if only its packets have checksums, as version 0.1 wrote it.

    Raises:
        VideoError: A byte differs from what was written.
    """
    frame_map = read_map(path)
    try:
        with open(path, "rb") as file:
            file.seek(-_END.size, os.SEEK_END)
            box = _END.unpack(file.read())[1]
            size = file.seek(-box, os.SEEK_END)
            whole = _START.unpack(file.read(_START.size)) == (box, b"uuid", BOX)
            if frame_map.sha256 is not None:
                whole = whole and frame_map.sha256 == sha256_of(path, size)
            else:
                file.seek(int(frame_map.offset[0]))
                sizes = np.diff(frame_map.offset).tolist()
                whole = whole and all(
                    zlib.crc32(file.read(n)) == c for n, c in zip(sizes, frame_map.crc, strict=True)
                )
    except (OSError, struct.error) as error:
        raise VideoError(reason(error)) from error
    if not whole:
        raise VideoError("the copy is damaged: its checksum is wrong")
    return frame_map.sha256 is not None


def map_of(descriptor: int, path: str) -> FrameMap:
    """Return the map of an open copy. The maps read last are cached in this process."""
    status = os.fstat(descriptor)
    key = (path, status.st_size, status.st_mtime_ns)
    frame_map = _maps.get(key)
    if frame_map is None:
        frame_map = _load(descriptor, status.st_size)
        _maps.add(key, frame_map)
    return frame_map


def _load(descriptor: int, size: int) -> FrameMap:
    try:
        tail = os.pread(descriptor, _TAIL, max(0, size - _TAIL))
        if len(tail) < _START.size + _END.size:
            raise VideoError(_NONE)
        crc, box, magic = _END.unpack(tail[-_END.size :])
        if magic != MAGIC or not _START.size + _END.size <= box <= min(size, _MOST):
            raise VideoError(_NONE)
        if box > len(tail):
            tail = os.pread(descriptor, box, size - box)
    except OSError as error:
        raise VideoError(reason(error)) from error
    if len(tail) < box:
        raise VideoError(_NONE)
    packed = tail[len(tail) - box + _START.size : -_END.size]
    if zlib.crc32(packed) != crc:
        raise VideoError("the copy's map is damaged: its checksum is wrong")
    try:
        frame_map = FrameMap.unpack(packed)
    except VideoError:
        raise
    # JSON, zlib and numpy raise exceptions of many kinds for other bytes.
    except Exception as error:
        raise VideoError(f"the copy's map is damaged: {reason(error)}") from error
    if frame_map.offset[0] < 0 or frame_map.offset[-1] > size - box:
        raise VideoError("the copy's map is damaged: it points beyond the file")
    return frame_map


_NONE = "no map at the end of the file: not a copy by `distinit prepare`, or cut off"
