"""Read frames of one video by index and compare them with the records of a store."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sized
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from ..common.errors import StoreMismatchError, VideoError
from .container import digest as digest_of
from .container import is_mp4, reason
from .decoder import VideoIndex, VideoReader
from .feed import NotAsPlanned
from .geometry import View
from .mp4 import QuickReader

MAX_FRAMES = 2**18  # some 9 MB

T = TypeVar("T")
M = TypeVar("M", bound=Sized)
_Key = tuple[str, int, int]


class LruCache(Generic[M]):
    """The tables read last in this process, for `MAX_FRAMES` frames in total.

    Keys are (path, size, mtime_ns).
    """

    def __init__(self) -> None:
        self._tables: OrderedDict[_Key, M] = OrderedDict()
        self._frames = 0

    def get(self, key: _Key) -> M | None:
        """Return what is kept under `key`, or None."""
        if key in self._tables:
            self._tables.move_to_end(key)
        return self._tables.get(key)

    def add(self, key: _Key, table: M) -> None:
        """Keep a table and drop the oldest ones where there are too many frames."""
        if key in self._tables:
            self._frames -= len(self._tables[key])
        self._tables[key] = table
        self._frames += len(table)
        while self._frames > MAX_FRAMES and len(self._tables) > 1:
            self._frames -= len(self._tables.popitem(last=False)[1])


_indices: LruCache[VideoIndex] = LruCache()  # of the videos read last in this process, some 40 MB


@dataclass(frozen=True)
class Frames:
    """images uint8 [L, h, w, 3] RGB, their pts int64 [L], and the number of frames in the file.

    `repeated`: how many of the L are damaged in the file and shown as the decodable frame before
        them.
    """

    images: np.ndarray
    pts: np.ndarray
    total: int
    repeated: int = 0


def read_frames(
    path: str,
    indices: np.ndarray,
    view: View | None,
    *,
    expect: tuple[np.ndarray, np.ndarray] | None = None,
    digest: str | None = None,
) -> Frames:
    """Read frames of a video in any order, repeats allowed, with one open and one pass.

    A damaged frame inside a clip is shown as a player shows it, by the one before; it is an error
    if `expect` names it, or if more than half of the clip's frames are damaged.

    Args:
        path: The video.
        indices: Frame numbers int64 [L].
        view: None for the size on display.
        expect: (indices, pts), int64 each, that the file must agree with.
        digest: The file's identity as `container.digest` gives it.

    Raises:
        VideoError: With the reason.
        StoreMismatchError: The file is not the one that `expect` or `digest` describe.
    """
    requested = np.asarray(indices, np.int64).ravel()
    if digest is not None and (current := digest_of(path)) != digest:
        raise StoreMismatchError(
            f"the file has changed: its digest is {current}, the store has {digest}"
        )
    return _read(path, lambda reader: _frames(reader, requested, view, expect))


def count_frames(path: str) -> int:
    """Return how many frames a video has; VideoError with the reason if it has none."""
    return _read(path, lambda reader: len(reader.timeline()))


def _frames(
    reader: VideoReader,
    requested: np.ndarray,
    view: View | None,
    expect: tuple[np.ndarray, np.ndarray] | None,
) -> Frames:
    timeline = reader.timeline()
    total = len(timeline)
    if expect is not None:
        _check(timeline.pts, expect)
    distinct, place = np.unique(requested, return_inverse=True)
    if len(distinct) == 0:
        raise VideoError("no frames were asked for")
    if distinct[0] < 0 or distinct[-1] >= total:
        raise VideoError(f"frames {distinct[0]}–{distinct[-1]} wanted, the video has {total}")
    pts = timeline.pts[distinct].copy()
    decoded = np.zeros(len(distinct), bool)
    images: np.ndarray | None = None
    for index, _, frame in reader.frames_at(distinct):
        if images is None:
            info = reader.info
            display = (info.height, info.width)
            renderer = info.renderer()
            shape = view.shape(*display) if view is not None else display
            images = np.empty((len(distinct), *shape, 3), np.uint8)
        at = int(np.searchsorted(distinct, index))
        renderer.render(frame, view, out=images[at], display=display)
        decoded[at] = True
        del frame  # see VideoReader
    if images is None:
        raise VideoError(f"frame {distinct[0]} cannot be decoded: damaged data")
    if not decoded.all():
        required = expect[0] if expect is not None else np.zeros(0, np.int64)
        fill_damaged(images, pts, decoded, distinct, required)
    if len(distinct) == len(requested) and np.array_equal(distinct, requested):
        return Frames(images, pts, total, int(np.sum(~decoded)))
    return Frames(images[place], pts[place], total, int(np.sum(~decoded[place])))


def _read(path: str, use: Callable[[VideoReader], T]) -> T:
    """Use the file with a reader of its header, else with one that reads all packets.

    The second is used where the header is not enough or something is wrong. The table of packets is
    cached for the next clip of the file.
    """
    key = _key(path)
    stored_index = _indices.get(key)
    if stored_index.from_header if stored_index is not None else is_mp4(path):
        try:
            with QuickReader(path, index=stored_index) as quick:
                made = use(quick)
                if stored_index is None:
                    _indices.add(key, quick.index())
                return made
        except (NotAsPlanned, VideoError, StoreMismatchError, OSError):
            stored_index = None
    with VideoReader(path, index=stored_index) as reader:
        made = use(reader)
        if stored_index is None:  # compressed data is not kept
            _indices.add(
                key, VideoIndex(replace(reader.packets, cached_packets=None), reader.timeline())
            )
        return made


def _check(pts: np.ndarray, expect: tuple[np.ndarray, np.ndarray]) -> None:
    """Raise StoreMismatchError unless the file's pts at the expected indices are as expected."""
    for index, expected in zip(*expect, strict=True):
        actual = str(pts[index]) if 0 <= index < len(pts) else f"missing (it has {len(pts)} frames)"
        if actual != str(expected):
            raise StoreMismatchError(
                f"frame {index} has pts {expected} in the store, in the file it is {actual}: "
                "`distinit targets verify STORE --frames` lists all such videos"
            )


def fill_damaged(
    images: np.ndarray,
    pts: np.ndarray,
    decoded: np.ndarray,
    indices: np.ndarray,
    required: np.ndarray,
) -> None:
    """Fill the frames [n] that are not `decoded` with the one before, or the first decoded one.

    Raises what `check_damage` raises.
    """
    check_damage(decoded, indices, required)
    source = np.maximum.accumulate(np.where(decoded, np.arange(len(decoded)), -1))
    source[source < 0] = int(np.flatnonzero(decoded)[0])
    images[:] = images[source]
    pts[:] = pts[source]


def check_damage(decoded: np.ndarray, indices: np.ndarray, required: np.ndarray) -> None:
    """Raise VideoError if required frames are damaged, or more than half of all.

    decoded: bool [n], whether each frame of `indices` [n] could be decoded; required: indices.
    """
    missing = indices[~decoded]
    lacking = missing[np.isin(missing, required)]
    if len(lacking) or 2 * decoded.sum() < len(decoded):
        raise VideoError(
            f"frame {(*lacking, *missing)[0]} cannot be decoded: damaged data ({len(missing)} of {len(decoded)} frames)"
        )


def _key(path: str) -> _Key:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise VideoError(reason(error)) from error
    return os.path.abspath(path), status.st_size, status.st_mtime_ns
