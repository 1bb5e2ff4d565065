"""Read frames of a clip out of an mp4 whose header lists all packets, without reading the rest.

It takes a tenth of the time to open such a file that way, and none to list its packets. The claims
of the header are compared with each packet that is fed to the decoder; where anything is in doubt,
NotAsPlanned leaves the file to a VideoReader, which reads and, if need be, decodes all of it.
"""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
from av.stream import Discard

from ..common.errors import VideoError
from .bitstream import b_picture_test, entry_test, in_doubt, must_be_first
from .container import rational, reason
from .decoder import Rows, VideoIndex, VideoReader
from .feed import NotAsPlanned, packet_ranges
from .mp4 import read_header

_BEGINNING = 2**16  # bytes of a packet that are looked at for what it is


class QuickReader(VideoReader):
    """As VideoReader, for `timeline`, `info` after a frame, and `frames_at`.

    Raises NotAsPlanned instead of decoding the whole file, and VideoError if the file cannot be
    opened.

    index: of the same file by a reader of this kind.
    """

    _header_only = True

    def __init__(self, path: str, *, index: VideoIndex | None = None) -> None:
        super().__init__(path, index=index)
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._container.close()
            raise VideoError(reason(error)) from error
        if index is None:
            try:
                self._plan()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Close the file."""
        super().close()
        os.close(self._file)

    def _plan(self) -> None:
        header = read_header(self._file, self._container, self._stream)
        if header is None:
            raise NotAsPlanned
        self._table, self._timeline = header
        # Else the first frames may never come out, and the others would have other indices.
        if not self._begins(0):
            raise NotAsPlanned

    def _open(self) -> None:
        super()._open()
        for stream in self._container.streams:
            if stream is not self._stream:
                stream.discard = Discard.all  # libavformat does not even read them

    def _aspect(self) -> Fraction | None:
        """Return the container's aspect, else that of the header's parameters.

        The decoder has these: `_begins` lets no others in.
        """
        return rational(self._stream.sample_aspect_ratio) or rational(
            self._context.sample_aspect_ratio
        )

    def index(self) -> VideoIndex:
        """For the next reader of the file."""
        return VideoIndex(self.packets, self.timeline(), from_header=True)

    def frames_at(self, indices: np.ndarray) -> Rows:
        """Yield (index, pts, frame) for all of int64 [N] ascending, distinct `indices`."""
        self._check_entries(indices)
        pts = self.timeline().pts
        for index, frame in self.shortcut(indices):
            yield index, int(pts[index]), frame

    def _check_entries(self, requested: np.ndarray) -> None:
        """Read the packets at which decoding is to begin.

        Those where it cannot begin stop being entries.
        """
        table = self.packets
        while True:
            ranges = packet_ranges(table, requested)
            wrong = [start for start, _ in ranges if not self._begins(start)]
            if not wrong:
                break
            table.entry[wrong] = False
        codec, extradata = self._context.codec.canonical_name, self._context.extradata
        is_b = b_picture_test(codec, extradata)
        for _, stop in ranges:
            # What is decoded is looked at on the way. If the packet after it is shown before it,
            # its pts must say so.
            after = stop + 1
            if (
                is_b
                and after < len(table.pts)
                and table.rising[after]
                and is_b(self._beginning(after))
            ):
                raise NotAsPlanned

    def _begins(self, position: int) -> bool:
        """Return whether decoding may begin at a packet.

        Parameters other than the header's are in doubt everywhere: what they omit (colours, the
        shape of pixels) stays as it was before.
        """
        codec, extradata, data = (
            self._context.codec.canonical_name,
            self._context.extradata,
            self._beginning(position),
        )
        if extradata is None or in_doubt(codec, extradata, data, int(self.packets.bytes[position])):
            raise NotAsPlanned
        if position == 0 and must_be_first(codec, extradata, data):
            raise NotAsPlanned
        test = entry_test(codec, extradata)
        return test is not None and test(data)

    def _beginning(self, position: int) -> memoryview:
        """Return the file's bytes in the place of a packet, as far as they identify the packet."""
        table = self.packets
        if table.place is None:
            raise NotAsPlanned
        size = min(int(table.bytes[position]), _BEGINNING)
        return memoryview(os.pread(self._file, size, int(table.place[position])))
