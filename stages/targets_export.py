"""Write a store out: as one HDF5 file, or as a store of chosen teachers, corpora and videos."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..pipeline.errors import StoreError, UsageError
from ..pipeline.hdf5 import Hdf5Writer
from ..pipeline.locks import lock
from ..pipeline.targets.choose import choose_videos
from ..pipeline.targets.files import check_local
from ..pipeline.targets.format import fsync_path, is_ours
from ..pipeline.targets.index import PENDING
from ..pipeline.targets.store import TargetStore
from ..pipeline.targets.subset import write_subset
from .screen import Screen

BLOCK = 4096  # rows copied at a time
HDF5, ZARR = (".h5", ".hdf5"), ".zarr"


def targets_export(
    store_path: str | Path,
    out: str | Path,
    screen: Screen,
    *,
    teachers: Sequence[str] = (),
    corpora: Sequence[str] = (),
    videos_from: str | Path | None = None,
    shard_rows: int | None = None,
) -> dict[str, Any]:
    """Write videos of the store to `out`: HDF5 or a store, by its ending.

    teachers, corpora: only these (default all). videos_from: a list of videos, see `choose.choose_videos`.
    shard_rows: of a store that is written. HDF5 gets the usable videos, a store also those that failed, with their
    reasons; videos that are pending are left out of both. Nothing stands at `out` until it is finished.
    Raises StoreError, and UsageError for what the store does not have or `out` cannot be.
    """
    check_local(out)
    store, out = TargetStore.open(store_path), Path(os.path.abspath(out))
    names = [store.teacher(name).name for name in dict.fromkeys(teachers)] or list(store.teachers)
    if out.suffix not in (*HDF5, ZARR):
        raise UsageError(f"--out {out}: must end in {', '.join(HDF5)} (one HDF5 file) or {ZARR} (a store)")
    if out.suffix != ZARR and shard_rows is not None:
        raise UsageError(f"--shard-rows: {out.name} is an HDF5 file, only a store ({ZARR}) has shards")
    if out.exists():
        raise UsageError(f"--out {out}: exists already")
    chosen = choose_videos(store, corpora, videos_from)
    if out.suffix in HDF5:
        return _export_hdf5(store, out, names, chosen, screen)
    return _export_store(store, out, names, chosen, shard_rows, screen)


def _export_store(
    store: TargetStore, out: Path, names: list[str], chosen: NDArray[np.int64], shard_rows: int | None, screen: Screen
) -> dict[str, Any]:
    pending = store.video_state == PENDING
    for name in names:
        pending |= store.index.teacher_state(name) == PENDING
    videos = chosen[~pending[chosen]]
    if len(videos) < len(chosen):
        screen.warn(f"{len(chosen) - len(videos)} pending videos are left out")
    if len(videos) == 0:
        raise UsageError(f"{store.name}: no video is left to export")
    part = out.with_name(f".{out.name}.part")
    with _alone(out.with_name(f".{out.name}.export-lock"), out):
        _sweep(part)
        try:
            with screen.progress("exporting", int(store.row_counts[videos].sum()), "rows") as bar:
                rows = write_subset(store, part, videos, names, shard_rows=shard_rows, advance=bar.advance)
            os.rename(part, out)
            fsync_path(out.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    return {"out": str(out), "videos": len(videos), "rows": rows, "teachers": names, "bytes": size}


def _sweep(part: Path) -> None:
    """Remove what a killed export left behind; StoreError while another one is at work there."""
    if not part.exists():
        return
    if not is_ours(part):
        raise UsageError(f"--out: {part} is in the way, and is no part of an export; move it")
    descriptor = os.open(part, os.O_RDONLY)
    try:
        lock(descriptor, part, StoreError(f"{part}: another export is writing it"))
        shutil.rmtree(part)
    finally:
        os.close(descriptor)


def _export_hdf5(
    store: TargetStore, out: Path, names: list[str], chosen: NDArray[np.int64], screen: Screen
) -> dict[str, Any]:
    """Usable videos as one file.

    Layout: `videos/{corpus,path,frames,first_row,rows}` [V], `frames/{video,index,pts}` [N],
    `teachers/NAME/{logits [N, K] float16, entropy [N] float32, class [K]}`; `video` counts in `videos/`.
    """
    usable = np.intersect1d(store.usable(names), chosen)
    counts = store.row_counts[usable]
    part = out.with_name(f".{out.name}.part")
    with _alone(part, out):
        with Hdf5Writer(part) as writer, screen.progress("exporting", int(counts.sum()), "rows") as bar:
            file = writer.file
            file.attrs["format"] = "distinit-targets-export"
            file.attrs["store_id"] = store.attributes["store_id"]
            file.attrs["sampling"] = store.sampling.describe()
            rows = _tables(file, store, usable, counts)
            for name in names:
                record = store.teacher(name)
                group = file.create_group(f"teachers/{name}")
                group.create_dataset("class", data=list(record.classes), dtype=h5py.string_dtype())
                logits = group.create_dataset("logits", (len(rows), len(record.classes)), "f2")
                entropy = group.create_dataset("entropy", (len(rows),), "f4")
                for at in range(0, len(rows), BLOCK):
                    some = rows[at : at + BLOCK]
                    # Not by HDF5: 1.14.2 halves what float16 rounds up to a power of two.
                    logits[at : at + BLOCK] = store.logits(name, some).astype(np.float16)
                    entropy[at : at + BLOCK] = store.entropy(name, some)
                    writer.check()
                    bar.advance(len(some) / len(names))
        os.replace(part, out)
    return {"out": str(out), "videos": len(usable), "rows": len(rows), "teachers": names,
            "bytes": out.stat().st_size}  # fmt: skip


@contextmanager
def _alone(file: Path, out: Path) -> Iterator[None]:
    """Hold the lock of `file` while `out` is made; nothing is left of it. StoreError where another export holds it."""
    busy = StoreError(f"{out}: another export is writing it")
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        lock(descriptor, out, busy)
        try:
            mine = os.path.samestat(os.fstat(descriptor), os.stat(file))
        except FileNotFoundError:
            mine = False
        if not mine:  # another has finished meanwhile, and removed what is locked here
            raise busy
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _tables(
    file: h5py.File, store: TargetStore, usable: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Video and frame tables; returns the store's rows [N] in the order of the export."""
    rows = store.rows_of(usable)
    text = h5py.string_dtype()
    videos = file.create_group("videos")
    corpora, paths = (videos.create_dataset(name, (len(usable),), text) for name in ("corpus", "path"))
    for at in range(0, len(usable), BLOCK):
        places = [store.place(int(v)) for v in usable[at : at + BLOCK]]
        corpora[at : at + BLOCK] = [os.fsencode(corpus) for corpus, _ in places]
        paths[at : at + BLOCK] = [os.fsencode(path) for _, path in places]
    videos.create_dataset("frames", data=store.frame_counts[usable])
    videos.create_dataset("first_row", data=np.cumsum(counts) - counts)
    videos.create_dataset("rows", data=counts)
    frames = file.create_group("frames")
    number = frames.create_dataset("video", data=np.repeat(np.arange(len(usable)), counts))
    index, pts = (frames.create_dataset(name, (len(rows),), "i8") for name in ("index", "pts"))
    for at in range(0, len(rows), BLOCK):
        some = rows[at : at + BLOCK]
        if (store.read_table("video", some) != usable[number[at : at + BLOCK]]).any():
            raise StoreError(f"{store.name}: rows of a video belong to another; see `distinit targets verify`")
        index[at : at + BLOCK], pts[at : at + BLOCK] = (store.read_table(name, some) for name in ("index", "pts"))
    return rows
