"""Optical flow of a whole video in one file, so that it is not computed again for each clip.

Each video has one HDF5 file, which h5py or any other reader opens; docs/prepare.md describes it.
The flow is computed as by `flow.optical_flow`, between each decodable frame and the next, resized
but not cropped. It has 8 bits per component: value = (stored − 128) · bound / 127 pixels. Zero
motion is therefore stored exactly, and mirroring a stored flow loses nothing.

Shapes: N decodable frames, L frames of a clip, H W pixels; component 0 is x, 1 is y.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from ..common.errors import VideoError
from ..common.hdf5 import Hdf5Error, Hdf5Writer, open_hdf5
from ..common.sealed import check_seal
from ..video.container import reason
from ..video.decoder import VideoReader
from ..video.flow import flow_between, grey
from ..video.frames import LruCache, check_damage
from ..video.geometry import Renderer, View
from .frame_map import SourceRecord
from .prepare_options import FlowOptions

FORMAT = "distinit optical flow"
VERSION = 1
STILL = 128  # the stored value of zero motion
STEPS = 127  # stored values from zero motion to the bound
_BLOCK_ROWS = 64  # by which the data set grows, and that are read at once
_TABLES = {"flow": ("u", 4), "index": ("i", 1), "pts": ("i", 1)}


@dataclass(frozen=True)
class FlowMap:
    """The source frames of a flow file and the scale of its flow.

    index, pts int64 [N]: the source frames; flow row k leads from frame index[k] to index[k + 1].
    bound: pixels; clipped: share of values beyond it; size: (height, width).
    """

    source: SourceRecord
    index: np.ndarray
    pts: np.ndarray
    bound: float
    clipped: float
    size: tuple[int, int]
    options: dict[str, Any]

    def __len__(self) -> int:
        return len(self.index)


class FlowWriter:
    """Writes the flow of frames one by one; `finish` completes the file."""

    def __init__(self, path: str, options: FlowOptions) -> None:
        self._options = options
        self._writer = Hdf5Writer(path, sealed=True, libver="latest")
        self._file = self._writer.file
        height, width = options.size
        self._flow = self._file.create_dataset(
            "flow", (0, 2, height, width), "u1", maxshape=(None, 2, height, width), chunks=(1, 2, height, width),
            compression="gzip", compression_opts=1, fletcher32=True,
        )  # fmt: skip
        self._previous: np.ndarray | None = None
        self._rows = self._clipped = 0
        self._index: list[int] = []
        self._pts: list[int] = []

    def add(self, index: int, pts: int, picture: np.ndarray) -> None:
        """Add the next frame, uint8 [H, W, 3] RGB."""
        current = grey(picture)
        if self._previous is not None:
            stored, num_clipped = quantise(
                flow_between(self._previous, current), self._options.bound
            )
            if self._rows == len(self._flow):
                self._flow.resize(self._rows + _BLOCK_ROWS, axis=0)
            self._flow[self._rows] = stored.transpose(2, 0, 1)
            self._writer.check()
            self._rows += 1
            self._clipped += num_clipped
        self._previous = current
        self._index.append(index)
        self._pts.append(pts)

    def finish(self, source: SourceRecord) -> FlowMap:
        """Write the header of the file and its remaining data."""
        self._flow.resize(self._rows, axis=0)
        share = self._clipped / max(1, self._flow.size)
        self._flow.attrs.update(bound=self._options.bound, clipped=share, still=STILL, steps=STEPS)
        index, pts = np.array(self._index, np.int64), np.array(self._pts, np.int64)
        self._file.create_dataset("index", data=index, fletcher32=True)
        self._file.create_dataset("pts", data=pts, fletcher32=True)
        options = self._options.model_dump(mode="json")
        # HDF5 stores bytes of fixed length where a checksum covers them, text of variable length
        # elsewhere.
        texts = {
            "source": np.bytes_(json.dumps(source.as_json())),
            "options": np.bytes_(json.dumps(options)),
        }
        self._file.attrs.update(format=FORMAT, version=VERSION, **texts)
        self.close()
        return FlowMap(source, index, pts, self._options.bound, share, self._options.size, options)

    def close(self) -> None:
        """Close the file, finished or not.

        Raises:
            OSError: Usually because the disk is full.
        """
        self._writer.close()


def quantise(flow: np.ndarray, bound: float) -> tuple[np.ndarray, int]:
    """Return flow (float32 pixels, any shape) as uint8, and how many values exceed the bound."""
    steps = np.rint(flow * np.float32(STEPS / bound))
    num_clipped = int(np.count_nonzero(np.abs(flow) > bound))
    return (steps.clip(-STEPS, STEPS) + STILL).astype(np.uint8), num_clipped


def write_flow(
    reader: VideoReader, part: str, options: FlowOptions, record_source: Callable[[], SourceRecord]
) -> FlowMap:
    """Write the flow of a video to the file `part`.

    record_source: Returns the record of the source; called after the source has been read.
    """
    writer = FlowWriter(part, options)
    try:
        renderer: Renderer | None = None
        for index, pts, frame in reader.decode_plain():
            info = reader.info
            renderer = renderer or info.renderer()
            view = View(resize=options.size)
            picture = renderer.render(frame, view, display=(info.height, info.width))
            del frame  # see VideoReader
            writer.add(index, pts, picture)
        if renderer is None:
            raise VideoError(f"none of its frames could be decoded: {reader.damage}")
        return writer.finish(record_source())
    finally:
        writer.close()


_maps: LruCache[FlowMap] = LruCache()


def read_flow_map(path: str) -> FlowMap:
    """Read the header of a flow file.

    Raises:
        VideoError: The file does not exist or is damaged.
    """
    with _open(path) as (_, flow_map):
        return flow_map


def check_flow(path: str) -> bool:
    """Read the whole file; return False if its header has no checksum, as in version 0.1.

    Raises:
        VideoError: The file is damaged.
    """
    with _open(path) as (file, _):
        if check_seal(path, VideoError):
            return True
        for first in range(0, len(file["flow"]), _BLOCK_ROWS):
            file["flow"][first : first + _BLOCK_ROWS]
        return False


def read_flow(
    path: str,
    frames: np.ndarray,
    *,
    expect: tuple[np.ndarray, np.ndarray] | None = None,
    digest: str | None = None,
) -> tuple[np.ndarray, float, int]:
    """Read the flow between consecutive frames int64 [L] of the source; the last may be repeated.

    A damaged frame is replaced by the one before it, so that the flow to it is zero.

    Returns:
        The flow uint8 [L − 1, 2, H, W], the bound in pixels, and the number of damaged frames.

    Raises:
        VideoError: With the reason.
        StoreMismatchError: The file was not made from the source of `expect` or `digest`.
    """
    requested = np.asarray(frames, np.int64)
    with _open(path) as (file, flow_map):
        flow_map.source.check(flow_map.index, flow_map.pts, expect, digest)
        if len(requested) < 2 or requested.min() < 0 or requested.max() >= flow_map.source.frames:
            raise VideoError(
                f"frames {requested.min()}–{requested.max()} wanted, the video has {flow_map.source.frames}"
            )
        position = np.minimum(np.searchsorted(flow_map.index, requested), len(flow_map) - 1)
        decodable = flow_map.index[position] == requested
        check_damage(decodable, requested, expect[0] if expect is not None else requested[:0])
        moves = (np.diff(requested) > 0) & decodable[1:] & np.maximum.accumulate(decodable)[:-1]
        out = np.full((len(requested) - 1, 2, *flow_map.size), STILL, np.uint8)
        _fill(file, out, np.flatnonzero(moves), position[1:] - 1)
        return out, flow_map.bound, int(np.sum(~decodable))


def _fill(file: h5py.File, out: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> None:
    """Copy flow row rows[p] to out[p] for each position p, with one read per run of rows."""
    stored = file["flow"]
    for run in np.split(
        positions, np.flatnonzero((np.diff(rows[positions]) != 1) | (np.diff(positions) != 1)) + 1
    ):
        if len(run):
            first = int(rows[run[0]])
            out[run[0] : run[-1] + 1] = stored[first : first + len(run)]


@contextmanager
def _open(path: str) -> Iterator[tuple[h5py.File, FlowMap]]:
    """Open a flow file and read its header; VideoError if it does not exist or is damaged."""
    try:
        status = os.stat(path)
        key = (path, status.st_size, status.st_mtime_ns)
        flow_map = _maps.get(key)
        with open_hdf5(path, _TABLES, checked=flow_map is not None) as file:
            if flow_map is None:
                flow_map = _load(file)
                _maps.add(key, flow_map)
            yield file, flow_map
    except FileNotFoundError as error:
        raise VideoError(
            "no flow file: see status.csv of `distinit prepare` for the reason"
        ) from error
    except Hdf5Error as error:
        raise VideoError(f"the flow is damaged, or the file holds no flow: {error}") from error
    except OSError as error:
        raise VideoError(reason(error)) from error


def _load(file: h5py.File) -> FlowMap:
    if file.attrs.get("format") != FORMAT or file.attrs.get("version") != VERSION:
        raise VideoError(f"not a file of format {FORMAT!r}, version {VERSION}")
    flow = file["flow"]
    flow_map = FlowMap(
        source=SourceRecord.from_json(json.loads(file.attrs["source"])),
        index=file["index"][:],
        pts=file["pts"][:],
        bound=float(flow.attrs["bound"]),
        clipped=float(flow.attrs["clipped"]),
        size=(int(flow.shape[2]), int(flow.shape[3])),
        options=json.loads(file.attrs["options"]),
    )
    if len(flow_map.index) != len(flow_map.pts) or len(flow) != len(flow_map) - 1:
        raise VideoError(
            f"its header is damaged: {len(flow_map.index)} frames, {len(flow)} flows between them"
        )
    return flow_map
