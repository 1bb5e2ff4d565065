"""Export a store as one HDF5 file, or as a store of chosen teachers, corpora and videos."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..pipeline.common.config import write_config
from ..pipeline.common.console import Console
from ..pipeline.common.errors import DistInitError, StoreError, UsageError
from ..pipeline.common.files import fsync_path, replacing
from ..pipeline.common.hdf5 import STRING, Hdf5Writer, open_hdf5
from ..pipeline.common.locks import locked
from ..pipeline.common.run_dir import config_next_to
from ..pipeline.common.urls import check_local
from ..pipeline.store.layout import is_started_store
from ..pipeline.store.reader import TargetStore
from ..pipeline.store.reencode import codecs_for
from ..pipeline.store.selection import choose_videos
from ..pipeline.store.store_options import ExportConfig, pca_components
from ..pipeline.store.subset import write_subset

# Rows that are copied at a time.
BLOCK = 4096
HDF5, ZARR = (".h5", ".hdf5"), ".zarr"


def targets_export(options: ExportConfig, console: Console) -> dict[str, Any]:
    """Write videos of the store to `out`, as HDF5 or as a store depending on its ending.

    HDF5 gets the usable videos, a store also the failed ones with their reasons. Pending videos are
    left out of both. `out` does not exist before it is finished.

    Raises:
        StoreError: There is no store, or another export is writing `out`.
        UsageError: The store lacks a teacher, corpus or video, or `out` cannot be written.
    """
    check_local(options.out)
    store, out = TargetStore.open(options.store), Path(os.path.abspath(options.out))
    requested = dict.fromkeys(options.teachers)
    names = [store.teacher(name).name for name in requested] or list(store.teachers)
    for name in names:
        if (mirrored := store.teacher(name).mirror_of) is not None and mirrored not in names:
            raise UsageError(
                f"--teacher {name}: holds the mirrored frames of {mirrored!r}: name that as well"
            )
    names = [name for name in store.teachers if name in names] if requested else names
    if out.suffix not in (*HDF5, ZARR):
        raise UsageError(
            f"--out {out}: must end in {', '.join(HDF5)} (one HDF5 file) or {ZARR} (a store)"
        )
    if out.suffix != ZARR and options.shard_rows is not None:
        raise UsageError(
            f"--shard-rows: {out.name} is an HDF5 file, only a store ({ZARR}) has shards"
        )
    if out.suffix != ZARR and options.encoding is not None:
        raise UsageError(
            f"--encoding {options.encoding}: {out.name} is an HDF5 file, whose rows are float16; "
            f"only a store ({ZARR}) has other encodings"
        )
    if out.is_symlink() and not out.exists():
        raise UsageError(f"--out {out}: exists already")
    videos = choose_videos(store, options.corpora, options.videos_from)
    record = config_next_to(out)
    finished = out.exists()
    if finished:
        result = _finished(store, out, names, videos, options, console)
    elif out.suffix in HDF5:
        result = _export_hdf5(store, out, names, videos, console)
    else:
        result = _export_store(store, out, names, videos, options, console)
    if not (finished and record.exists()):
        write_config(record, "targets-export", options)
    console.info(f"{options.out}: {result['videos']:,} videos, {result['rows']:,} frames")
    return result


def _finished(
    store: TargetStore,
    out: Path,
    names: list[str],
    chosen_videos: NDArray[np.int64],
    options: ExportConfig,
    console: Console,
) -> dict[str, Any]:
    """Return the result of an earlier run of the same export that was killed at its end.

    Raises:
        UsageError: `out` is not the result of this export.
    """
    hdf5 = out.suffix in HDF5
    videos = (
        np.intersect1d(store.usable(names), chosen_videos)
        if hdf5
        else _exportable(store, names, chosen_videos)
    )
    try:
        is_same = (
            _same_file(store, out, names, videos)
            if hdf5
            else _same_store(store, out, names, videos, options)
        )
    # Another file, or a damaged one.
    except DistInitError:
        is_same = False
    if not is_same:
        raise UsageError(
            f"--out {out}: exists already, and is not the result of this export; choose another --out"
        )
    console.info(f"{out} exists already and is this export, finished")
    files = [out] if hdf5 else [file for file in out.rglob("*") if file.is_file()]
    return {"out": str(out), "videos": len(videos), "rows": int(store.row_counts[videos].sum()), "teachers": names,
            "bytes": sum(file.stat().st_size for file in files)}  # fmt: skip


def _same_store(
    store: TargetStore,
    out: Path,
    names: list[str],
    videos: NDArray[np.int64],
    options: ExportConfig,
) -> bool:
    """Check whether a store is a finished export of these teachers and videos of another store."""
    exported = TargetStore.open(out)
    if (
        exported.attributes.get("exported_from") != store.attributes["store_id"]
        or set(exported.teachers) != set(names)
        or options.shard_rows not in (None, exported.index.shard_rows)
        or any(
            exported.teacher(name).encoding != _encoding(store, name, options.encoding)
            for name in names
        )
        or exported.index.n_videos != len(videos)
        or len(_exportable(exported, names, np.arange(len(videos)))) != len(videos)
    ):
        return False
    return np.array_equal(exported.row_counts, store.row_counts[videos]) and all(
        exported.place(i) == store.place(video) and exported.digest(i) == store.digest(video)
        for i, video in enumerate(videos.tolist())
    )


def _encoding(store: TargetStore, name: str, requested: str | None) -> str:
    """Return the encoding of a teacher in the export; pca:D applies to features alone."""
    record = store.teacher(name)
    if requested is None or (record.output == "logits" and pca_components(requested)):
        return record.encoding
    return requested


def _same_file(store: TargetStore, out: Path, names: list[str], videos: NDArray[np.int64]) -> bool:
    """Check whether an HDF5 file was exported from this store with these teachers and videos."""
    tables: dict[str, tuple[str, int]] = dict.fromkeys(
        ("videos/corpus", "videos/path"), (STRING, 1)
    )
    numbers = (
        "videos/frames",
        "videos/first_row",
        "videos/rows",
        "frames/video",
        "frames/index",
        "frames/pts",
    )
    tables |= dict.fromkeys(numbers, ("iu", 1))
    for name in names:
        group = f"teachers/{name}"
        tables[f"{group}/{store.teacher(name).output}"] = ("f", 2)
        if store.teacher(name).output == "logits":
            tables |= {f"{group}/class": (STRING, 1), f"{group}/entropy": ("f", 1)}
    groups = ("videos", "frames", "teachers", *(f"teachers/{name}" for name in names))
    with open_hdf5(out, tables, groups) as file:
        places = [store.place(int(video)) for video in videos]
        return bool(
            file.attrs["store_id"] == store.attributes["store_id"]
            and set(file["teachers"]) == set(names)
            and np.array_equal(file["videos/rows"][:], store.row_counts[videos])
            and all(
                [bytes(text) for text in file[f"videos/{key}"][start : start + BLOCK]]
                == [os.fsencode(place[column]) for place in places[start : start + BLOCK]]
                for column, key in enumerate(("corpus", "path"))
                for start in range(0, len(places), BLOCK)
            )
            and all(
                file[f"teachers/{name}/{store.teacher(name).output}"].shape
                == (len(file["frames/pts"]), store.teacher(name).codec.width)
                for name in names
            )
        )


def _exportable(
    store: TargetStore, names: list[str], chosen_videos: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the chosen videos that are not pending for any of the teachers."""
    return chosen_videos[~store.pending(names)[chosen_videos]]


def _export_store(
    store: TargetStore,
    out: Path,
    names: list[str],
    chosen_videos: NDArray[np.int64],
    options: ExportConfig,
    console: Console,
) -> dict[str, Any]:
    videos = _exportable(store, names, chosen_videos)
    if len(videos) < len(chosen_videos):
        console.warn(f"{len(chosen_videos) - len(videos)} pending videos are left out")
    if len(videos) == 0:
        raise UsageError(f"{store.name}: no video is left to export")
    codecs = codecs_for(store, names, options.encoding, videos)
    partial = out.with_name(f".{out.name}.part")
    with _export_lock(out):
        _remove_leftovers(partial)
        try:
            with console.progress("exporting", int(store.row_counts[videos].sum()), "rows") as bar:
                rows = write_subset(
                    store,
                    partial,
                    videos,
                    names,
                    shard_rows=options.shard_rows,
                    codecs=codecs,
                    advance=bar.advance,
                )
            os.rename(partial, out)
            fsync_path(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"out": str(out), "videos": len(videos), "rows": rows, "teachers": names, "bytes": size}


def _remove_leftovers(partial: Path) -> None:
    """Remove the leftovers of a killed export.

    Raises:
        StoreError: Another export is writing there.
        UsageError: The folder is not that of an export.
    """
    if not partial.exists():
        return
    if not is_started_store(partial):
        raise UsageError(f"--out: {partial} exists, and is not an unfinished export; move it")
    with locked(partial, StoreError(f"{partial}: another export is writing it")):
        shutil.rmtree(partial)


def _export_hdf5(
    store: TargetStore,
    out: Path,
    names: list[str],
    chosen_videos: NDArray[np.int64],
    console: Console,
) -> dict[str, Any]:
    """Write the usable videos as one HDF5 file.

    Layout: `videos/{corpus,path,frames,first_row,rows}` [V], `frames/{video,index,pts}` [N],
    `teachers/NAME/{logits [N, K] float16, entropy [N] float32, class [K]}` or
    `teachers/NAME/features [N, K] float16`; `video` counts in `videos/`.
    """
    usable = np.intersect1d(store.usable(names), chosen_videos)
    counts = store.row_counts[usable]
    partial = out.with_name(f".{out.name}.part")
    with _export_lock(out), replacing(out, partial):
        # From HDF5 1.10 on the structure of a file has checksums. Tables request their own.
        writer = Hdf5Writer(partial, libver=("v110", "v110"))
        with writer, console.progress("exporting", int(counts.sum()), "rows") as bar:
            file = writer.file
            file.attrs["format"] = "distinit-targets-export"
            file.attrs["store_id"] = store.attributes["store_id"]
            file.attrs["sampling"] = store.sampling.describe()
            rows = _write_tables(file, store, usable, counts)
            for name in names:
                record = store.teacher(name)
                group = file.create_group(f"teachers/{name}")
                shape = (len(rows), record.codec.width)
                if record.grid:
                    group.attrs["grid"] = record.grid
                if record.mirror_of is not None:
                    group.attrs["mirror_of"] = record.mirror_of
                values = group.create_dataset(
                    record.output, shape, "f2", **_checksum_options(shape, 2)
                )
                entropy = None
                if record.output == "logits":
                    _text(group, "class", [name.encode() for name in record.classes])
                    entropy = group.create_dataset(
                        "entropy", (len(rows),), "f4", **_checksum_options((len(rows),), 4)
                    )
                for start in range(0, len(rows), BLOCK):
                    block = rows[start : start + BLOCK]
                    # NumPy converts the values, since HDF5 1.14.2 halves values that float16 rounds
                    # up to a power of two.
                    values[start : start + BLOCK] = store.values(name, block).astype(np.float16)
                    if entropy is not None:
                        entropy[start : start + BLOCK] = store.entropy(name, block)
                    writer.check()
                    bar.advance(len(block) / len(names))
    return {"out": str(out), "videos": len(usable), "rows": len(rows), "teachers": names,
            "bytes": out.stat().st_size}  # fmt: skip


def _text(group: h5py.Group, name: str, texts: list[bytes]) -> None:
    """Write texts of a fixed length, since HDF5 has no checksums of texts of variable length.

    Each text is padded to the longest one. The table is therefore compressed, and written in blocks
    to save memory.
    """
    kind = h5py.string_dtype("utf-8", max(1, *map(len, texts)) if texts else 1)
    options = _checksum_options((len(texts),), kind.itemsize)
    compression = {"compression": "gzip", "compression_opts": 1} if options else {}
    table = group.create_dataset(name, (len(texts),), kind, **options, **compression)
    for start in range(0, len(texts), BLOCK):
        table[start : start + BLOCK] = np.array(texts[start : start + BLOCK], kind)


def _checksum_options(shape: tuple[int, ...], item_bytes: int) -> dict[str, Any]:
    """Return the options of a table with a checksum per chunk of 256 kB, {} for an empty table."""
    if 0 in shape:
        return {}
    rows = 2**18 // (math.prod(shape[1:]) * item_bytes)
    return {"chunks": (max(1, min(rows, shape[0])), *shape[1:]), "fletcher32": True}


@contextmanager
def _export_lock(out: Path) -> Iterator[None]:
    """Hold a lock next to `out` while it is written, and remove the lock at the end.

    Raises:
        StoreError: Another export holds the lock.
    """
    busy = StoreError(f"{out}: another export is writing it")
    file = out.with_name(f".{out.name}.export-lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file, busy, make=True) as descriptor:
        try:
            is_current = os.path.samestat(os.fstat(descriptor), os.stat(file))
        except FileNotFoundError:
            is_current = False
        # Another export may have finished meanwhile, and removed the file that is locked here.
        if not is_current or out.exists():
            raise busy
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _write_tables(
    file: h5py.File, store: TargetStore, usable: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Write the tables of videos and frames; return the store's rows [N] in the export's order."""
    rows = store.rows_of(usable)
    videos = file.create_group("videos")
    places = [store.place(int(video)) for video in usable]
    _text(videos, "corpus", [os.fsencode(corpus) for corpus, _ in places])
    _text(videos, "path", [os.fsencode(path) for _, path in places])
    columns = {
        "frames": store.frame_counts[usable],
        "first_row": np.cumsum(counts) - counts,
        "rows": counts,
    }
    for name, values in columns.items():
        videos.create_dataset(name, data=values, **_checksum_options(values.shape, values.itemsize))
    frames = file.create_group("frames")
    checksums = _checksum_options((len(rows),), 8)
    number = frames.create_dataset(
        "video", data=np.repeat(np.arange(len(usable)), counts), **checksums
    )
    index, pts = (
        frames.create_dataset(name, (len(rows),), "i8", **checksums) for name in ("index", "pts")
    )
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        if (store.read_table("video", block) != usable[number[start : start + BLOCK]]).any():
            raise StoreError(
                f"{store.name}: rows of a video belong to another; see `distinit targets verify`"
            )
        index[start : start + BLOCK], pts[start : start + BLOCK] = (
            store.read_table(name, block) for name in ("index", "pts")
        )
    return rows
