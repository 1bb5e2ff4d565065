"""Read frames of prepared copies by the frame numbers of their sources.

A copy is decoded without opening its container: its map lists which bytes to read and how the
decoder is set up, so that a clip costs one read and the frames from the key frame before it.
Timestamps of the copy are ignored: frame k of the copy is the source frame that the map names.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from typing import cast

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import VideoReformatter

from ..common.errors import VideoError
from ..video.container import reason
from ..video.frames import Frames, fill_damaged
from ..video.geometry import Renderer, View, plane_rows
from .frame_map import FrameMap, map_of

_DECODERS = 8  # set up and kept in each thread: copies of one size and one set of options share one


def read_copy(
    path: str,
    indices: np.ndarray,
    view: View | None,
    *,
    expect: tuple[np.ndarray, np.ndarray] | None = None,
    digest: str | None = None,
) -> Frames:
    """Read frames of a source out of its copy, as `frames.read_frames` reads them from the source.

    Args:
        path: The copy.
        indices: Frames int64 [L] of the source.
        view: Applied to the size that the source has on display.
        expect: (indices, pts), int64 each, of the source.
        digest: The source's identity.

    Returns:
        The frames; pts and total are the source's.

    Raises:
        VideoError: With the reason.
        StoreMismatchError: The copy is not of the source that `expect` or `digest` describe.
    """
    requested = np.asarray(indices, np.int64).ravel()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise VideoError(f"no copy ({reason(error)}): see status.csv for the reason") from error
    try:
        frame_map = map_of(descriptor, path)
        frame_map.source.check(frame_map.index, frame_map.pts, expect, digest)
        return _frames(
            descriptor,
            frame_map,
            requested,
            view,
            expect[0] if expect is not None else requested[:0],
        )
    finally:
        os.close(descriptor)


def _frames(
    descriptor: int,
    frame_map: FrameMap,
    requested: np.ndarray,
    view: View | None,
    required: np.ndarray,
) -> Frames:
    source = frame_map.source
    distinct, place = np.unique(requested, return_inverse=True)
    if len(distinct) == 0:
        raise VideoError("no frames were asked for")
    if distinct[0] < 0 or distinct[-1] >= source.frames:
        raise VideoError(
            f"frames {distinct[0]}–{distinct[-1]} wanted, the video has {source.frames}"
        )
    at = np.minimum(np.searchsorted(frame_map.index, distinct), len(frame_map) - 1)
    decodable = frame_map.index[at] == distinct  # False: damaged in the source
    if not decodable.any():
        raise VideoError(f"frame {distinct[0]} cannot be decoded: damaged data in the source")
    display = (source.height, source.width)
    images = np.empty(
        (len(distinct), *(view.shape(*display) if view is not None else display), 3), np.uint8
    )
    rows = np.flatnonzero(decodable)
    copies = decode_copy(descriptor, frame_map, at[rows])
    for row, (frame, decoder) in zip(rows, copies, strict=True):
        decoder.render(frame, frame_map, view, display, images[row])
    pts = np.where(decodable, frame_map.pts[at], 0)
    if not decodable.all():
        fill_damaged(images, pts, decodable, distinct, required)
    if np.array_equal(distinct, requested):
        return Frames(images, pts, source.frames, int(np.sum(~decodable)))
    return Frames(images[place], pts[place], source.frames, int(np.sum(~decodable[place])))


def decode_copy(
    descriptor: int, frame_map: FrameMap, positions: np.ndarray
) -> Iterator[tuple[av.VideoFrame, CopyDecoder]]:
    """Decode the copy's own frames at `positions` int64 [n], ascending and distinct.

    Yields each with the decoder that renders it.

    Raises:
        VideoError: A packet is not what it was when the copy was made, or does not decode.
    """
    decoder = _decoder(frame_map)
    keys = np.flatnonzero(frame_map.key)
    entries = keys[np.searchsorted(keys, positions, side="right") - 1]
    first = 0
    while first < len(positions):
        # Packets are read at once as long as the next frame's group of pictures is the same, or
        # begins where this one is left.
        last = first
        while last + 1 < len(positions) and entries[last + 1] <= positions[last] + 1:
            last += 1
        yield from decoder.decode(
            descriptor, frame_map, int(entries[first]), positions[first : last + 1].tolist()
        )
        first = last + 1


class CopyDecoder:
    """A decoder that stays set up from one copy to the next, and the resizer of its frames."""

    def __init__(self, frame_map: FrameMap) -> None:
        context = cast(VideoCodecContext, av.CodecContext.create(frame_map.codec, "r"))
        context.extradata = frame_map.extradata
        context.thread_type = "NONE"
        context.thread_count = 1
        self._context = context
        self._renderer = Renderer()
        self._converter = VideoReformatter()

    def render(
        self,
        frame: av.VideoFrame,
        frame_map: FrameMap,
        view: View | None,
        display: tuple[int, int],
        out: np.ndarray,
    ) -> None:
        """Fill `out` uint8 [h, w, 3] with the view of a frame.

        display: the source's (height, width). Where the view asks for the copy's own size, only the
        colours are converted: ten times as fast as a resize. A copy of odd size is stored with one
        more row or column, which is cut off first.
        """
        size = (frame_map.height, frame_map.width)
        as_stored = (frame.height, frame.width) == size
        as_wanted = (view.scaled(*display) if view is not None else display) == size
        if as_wanted and (view is None or not view.crop):
            out[...] = self._colours(frame)[: size[0], : size[1]]
        elif as_stored:
            self._renderer.render(frame, view, out=out, display=display)
        else:
            picture = np.ascontiguousarray(self._colours(frame)[: size[0], : size[1]])
            self._renderer.render(
                av.VideoFrame.from_ndarray(picture, "rgb24"), view, out=out, display=display
            )

    def _colours(self, frame: av.VideoFrame) -> np.ndarray:
        """RGB of the stored size, a view of swscale's own buffer."""
        plane = self._converter.reformat(
            frame, format="rgb24", dst_color_range="JPEG", threads=1
        ).planes[0]
        lines = plane_rows(plane, frame.height)[:, : frame.width * 3]
        return lines.reshape(frame.height, frame.width, 3)

    def decode(
        self, descriptor: int, frame_map: FrameMap, entry: int, positions: list[int]
    ) -> Iterator[tuple[av.VideoFrame, CopyDecoder]]:
        """Decode from key frame `entry` to the last of `positions`, which come out in order."""
        offset = frame_map.offset[entry : positions[-1] + 2].tolist()
        data = _read(descriptor, offset[0], offset[-1])
        self._flush()
        queue = positions[::-1]
        for k, (start, stop) in enumerate(pairwise(offset)):
            packet = data[start - offset[0] : stop - offset[0]]
            if zlib.crc32(packet) != frame_map.crc[entry + k]:
                raise VideoError(
                    f"the copy is damaged at its frame {entry + k}: the checksum is wrong"
                )
            for frame in self._decode_packet(packet, entry + k):
                if queue and frame.pts == queue[-1]:
                    queue.pop()
                    yield frame, self
        for frame in self._decode_packet(None, positions[-1]) if queue else ():
            if queue and frame.pts == queue[-1]:
                queue.pop()
                yield frame, self
        if queue:
            raise VideoError(f"the copy's frame {queue[-1]} does not decode")

    def _decode_packet(self, data: bytes | None, position: int) -> list[av.VideoFrame]:
        packet = None
        if data is not None:
            packet = av.Packet(data)
            # It comes out again with the frame: the copy's own clock is not used.
            packet.pts = position
        try:
            return self._context.decode(packet)
        except av.FFmpegError as error:
            raise VideoError(
                f"the copy is damaged at its frame {position}: {reason(error)}"
            ) from error

    def _flush(self) -> None:
        if self._context.is_open:
            self._context.flush_buffers()


class _Kept(threading.local):
    """The decoders of one thread, the one used last at the end."""

    def __init__(self) -> None:
        self.decoders: OrderedDict[tuple[str, bytes], CopyDecoder] = OrderedDict()


_kept = _Kept()


def _decoder(frame_map: FrameMap) -> CopyDecoder:
    key = (frame_map.codec, frame_map.extradata)
    decoders = _kept.decoders
    if key not in decoders:
        decoders[key] = CopyDecoder(frame_map)
        if len(decoders) > _DECODERS:
            decoders.popitem(last=False)
    decoders.move_to_end(key)
    return decoders[key]


def _read(descriptor: int, start: int, stop: int) -> bytes:
    try:
        data = os.pread(descriptor, stop - start, start)
    except OSError as error:
        raise VideoError(reason(error)) from error
    if len(data) < stop - start:
        raise VideoError("the copy was cut off while it was read")
    return data
