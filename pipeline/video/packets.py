"""The frames of a video in presentation order, read from its packets without decoding.

A frame's identity is its pts; its index is the rank of that pts. A full decode decides where the
packets cannot be trusted: missing or duplicate pts, pts in decode order, times that restart,
damage, a start in mid-stream, fields, old AVI.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import av
import numpy as np

from .bitstream import (
    FROM_START,
    INTRA_ONLY,
    b_picture_test,
    entry_test,
    in_doubt,
    must_be_first,
    shown_test,
)
from .container import reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from av.container import InputContainer
    from av.video.stream import VideoStream

NO_PTS = np.iinfo(np.int64).min
# A step between two frames that is longer than this many usual steps is a gap.
_MAX_STEPS = 100
# Compressed video up to this size stays in memory between the demux and the decode.
MAX_CACHED_BYTES = 2**24
# Side data of a key frame that changes the decoder's settings. It is lost if the packet is skipped.
_CHANGES: tuple[Literal["new_extradata"], Literal["param_change"]] = (
    "new_extradata",
    "param_change",
)
_STORES_PTS = frozenset(("mov", "matroska", "nut", "ivf", "flv"))
_STORES_PTS_OF_H26X = frozenset(("mpegts",))
PROGRESSIVE = (0, 1)  # AVFieldOrder: unknown, progressive


@dataclass(frozen=True)
class Timeline:
    """pts int64 [T] strictly ascending, key bool [T], in the stream's `time_base`.

    `time_base`: seconds per tick. `reliable`: the packets alone determine it. `clock` is "counted"
    if the file has no usable pts: pts is then the index, one tick per frame.
    """

    pts: np.ndarray
    key: np.ndarray
    time_base: Fraction
    reliable: bool
    clock: Literal["pts", "counted"] = "pts"

    def __len__(self) -> int:
        return len(self.pts)


@dataclass
class PacketTable:
    """One row per packet in decode order: pts, dts, num_bytes int64 [P], and flags bool [P].

    trusted: Codec, container and flags leave no doubt that each shown packet is a frame, in order
        of pts. byte_position: The byte position of each packet in the file, int64 [P], if known;
        packets that are read must have it. order: Decode positions of the shown packets, by pts.
    """

    pts: np.ndarray
    dts: np.ndarray
    key: np.ndarray
    shown: np.ndarray
    entry: np.ndarray
    num_bytes: np.ndarray
    trusted: bool
    error: str | None = None
    cached_packets: list[av.Packet] | None = None
    byte_position: np.ndarray | None = None
    encrypted: bool = False
    order: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @cached_property
    def rising(self) -> np.ndarray:
        """Return whether each packet is shown after all earlier packets, bool [P].

        A bidirectional picture for which that holds has a made-up pts.
        """
        return np.r_[True, self.pts[1:] > np.maximum.accumulate(self.pts)[:-1]][: len(self.pts)]

    @property
    def step(self) -> Fraction:
        """Return the mean ticks from one frame to the next by the packets; 0 if unknown.

        The parts of a concatenated file are measured one by one, and a time far from all others is
        ignored.
        """
        in_order = bool(np.all(self.dts != NO_PTS) and np.all(np.diff(self.dts) >= 0))
        times = self.dts if in_order or not np.any(self.pts != NO_PTS) else self.pts
        has_time = times != NO_PTS
        times, key = times[has_time], self.key[has_time]
        restarts = np.flatnonzero(key[1:] & (times[1:] <= np.maximum.accumulate(times)[:-1])) + 1
        parts = [np.diff(np.sort(part)) for part in np.split(times, restarts)]
        steps = np.concatenate(parts)
        steps = steps[steps > 0]
        steps = steps[steps <= _MAX_STEPS * np.median(steps)] if len(steps) else steps
        return Fraction(int(steps.sum()), len(steps)) if len(steps) else Fraction(0)

    @cached_property
    def position_of(self) -> dict[int, int]:
        """Decode positions by pts."""
        return {int(p): k for k, p in enumerate(self.pts)}

    def timeline(self, time_base: Fraction) -> Timeline:
        """Return the shown packets by pts, and set `order` to their decode positions."""
        positions = np.flatnonzero(self.shown)
        pts = self.pts[positions]
        by_pts = np.argsort(pts, kind="stable")
        self.order = positions[by_pts]
        pts = pts[by_pts]
        reliable = self.trusted and bool(np.all(np.diff(pts) > 0))
        # Descending dts, or a key frame that is shown before an earlier packet, mean a clock that
        # restarts or a wrong time.
        dts = self.dts[self.dts != NO_PTS]
        reliable = (
            reliable and bool(np.all(np.diff(dts) >= 0)) and bool(self.rising[self.key].all())
        )
        if reliable and len(pts):
            # Decoding must be able to begin at the first packet, and nothing may be shown before
            # it.
            reliable = bool(self.entry[0]) and bool(self.pts[0] == self.pts.min())
        return Timeline(pts, self.key[self.order], time_base, reliable)


def read_packets(
    container: InputContainer, stream: VideoStream, progress: Callable[[], None] | None = None
) -> PacketTable:
    """Demux the whole stream; for bad data, record the error and keep the packets so far."""
    context = stream.codec_context
    codec = context.codec.canonical_name
    is_entry = entry_test(codec, context.extradata)
    is_shown = shown_test(codec)
    is_b = b_picture_test(codec, context.extradata)
    latest_pts = NO_PTS
    pts, dts, sizes = array("q"), array("q"), array("q")
    flags: list[tuple[bool, bool, bool]] = []  # key, shown, entry
    cached_packets: list[av.Packet] | None = []
    total_bytes, trusted, encrypted = 0, is_entry is not None, False
    # Whether packets, even key frames, now depend on what the decoder read earlier.
    depends_on_earlier = False
    error: str | None = None
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, MemoryError) as failure:
            error = reason(failure)
            break
        if packet is None:
            break
        size, key, entry = packet.size, packet.is_keyframe, False
        # The final flush, or an empty chunk of an AVI, which would end the decoder.
        if size == 0:
            continue
        if progress is not None:
            progress()
        if key or not flags:
            encrypted = encrypted or packet.has_sidedata("encryption_info")
            if flags:
                trusted = trusted and not any(packet.has_sidedata(kind) for kind in _CHANGES)
            elif codec in FROM_START:
                entry = key
            if key and is_entry is not None:
                entry = entry or is_entry(memoryview(packet))
            if not flags:
                depends_on_earlier = must_be_first(codec, context.extradata, memoryview(packet))
            elif not depends_on_earlier:
                depends_on_earlier = key and in_doubt(
                    codec, context.extradata, memoryview(packet), size
                )
            entry = entry and not (flags and depends_on_earlier)
        shown = not packet.is_discard and (is_shown is None or is_shown(memoryview(packet)))
        flags.append((key, shown, entry))
        if packet.pts is None or packet.is_corrupt:
            trusted = False
        elif packet.pts > latest_pts:
            latest_pts = packet.pts
            trusted = trusted and not (is_b is not None and is_b(memoryview(packet)))
        pts.append(NO_PTS if packet.pts is None else packet.pts)
        dts.append(NO_PTS if packet.dts is None else packet.dts)
        sizes.append(size)
        if cached_packets is not None:
            cached_packets.append(packet)
            total_bytes += size
            if total_bytes > MAX_CACHED_BYTES:
                cached_packets = None
    key_shown_entry = np.array(flags, bool).reshape(-1, 3)
    return PacketTable(
        pts=np.array(pts, np.int64),
        dts=np.array(dts, np.int64),
        num_bytes=np.array(sizes, np.int64),
        key=key_shown_entry[:, 0],
        shown=key_shown_entry[:, 1],
        entry=key_shown_entry[:, 2],
        trusted=trusted and error is None and pts_are_real(container, stream),
        error=error,
        cached_packets=cached_packets,
        encrypted=encrypted,
    )


def pts_are_real(container: InputContainer, stream: VideoStream) -> bool:
    """Return whether the container stores presentation times.

    Otherwise FFmpeg derives them from the decode order.
    """
    names = set(container.format.name.split(","))
    context = stream.codec_context
    codec = context.codec.canonical_name
    if names & _STORES_PTS or (names & _STORES_PTS_OF_H26X and codec in ("h264", "hevc")):
        # Coded fields may have separate packets, two per frame.
        return context.field_order in PROGRESSIVE or codec not in ("h264", "hevc")
    return "avi" in names and not context.reorder_depth and codec in INTRA_ONLY
