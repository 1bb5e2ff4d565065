"""Write a store out: as one HDF5 file, or as a store of chosen teachers, corpora and videos."""

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

BLOCK = 4096  # rows copied at a time
HDF5, ZARR = (".h5", ".hdf5"), ".zarr"


def targets_export(options: ExportConfig, console: Console) -> dict[str, Any]:
    """Write videos of the store to `out`: HDF5 or a store, by its ending.

    HDF5 gets the usable videos, a store also those that failed, with their reasons; videos that are
    pending are left out of both. Nothing exists at `out` until it is finished.

    Raises:
        StoreError: There is no store, or another export is writing `out`.
        UsageError: The store lacks what was asked for, or `out` cannot be written.
    """
    check_local(options.out)
    store, out = TargetStore.open(options.store), Path(os.path.abspath(options.out))
    wanted = dict.fromkeys(options.teachers)
    names = [store.teacher(name).name for name in wanted] or list(store.teachers)
    for name in names:
        if (of := store.teacher(name).mirror_of) is not None and of not in names:
            raise UsageError(
                f"--teacher {name}: holds the mirrored frames of {of!r}: name that as well"
            )
    names = [name for name in store.teachers if name in names] if wanted else names
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
            f"only a store ({ZARR}) has another"
        )
    if out.is_symlink() and not out.exists():
        raise UsageError(f"--out {out}: exists already")
    chosen = choose_videos(store, options.corpora, options.videos_from)
    record = config_next_to(out)
    finished = out.exists()
    if finished:
        result = _finished(store, out, names, chosen, options, console)
    elif out.suffix in HDF5:
        result = _export_hdf5(store, out, names, chosen, console)
    else:
        result = _export_store(store, out, names, chosen, options, console)
    if not (finished and record.exists()):
        write_config(record, "targets-export", options)
    console.info(f"{options.out}: {result['videos']:,} videos, {result['rows']:,} frames")
    return result


def _finished(
    store: TargetStore,
    out: Path,
    names: list[str],
    chosen: NDArray[np.int64],
    options: ExportConfig,
    console: Console,
) -> dict[str, Any]:
    """Return the result of an earlier run of the same export that was killed at its end.

    Raises:
        UsageError: `out` is something else.
    """
    hdf5 = out.suffix in HDF5
    videos = (
        np.intersect1d(store.usable(names), chosen) if hdf5 else _exportable(store, names, chosen)
    )
    try:
        same = (
            _same_file(store, out, names, videos)
            if hdf5
            else _same_store(store, out, names, videos, options)
        )
    except DistInitError:  # another file, or a damaged one
        same = False
    if not same:
        raise UsageError(
            f"--out {out}: exists already, and is another export or none; choose another --out"
        )
    console.info(f"{out} exists already and is this export, finished")
    files = [out] if hdf5 else [f for f in out.rglob("*") if f.is_file()]
    return {"out": str(out), "videos": len(videos), "rows": int(store.row_counts[videos].sum()), "teachers": names,
            "bytes": sum(f.stat().st_size for f in files)}  # fmt: skip


def _same_store(
    store: TargetStore,
    out: Path,
    names: list[str],
    videos: NDArray[np.int64],
    options: ExportConfig,
) -> bool:
    """Check whether a store is a finished export of this one, of these teachers and videos."""
    made = TargetStore.open(out)
    if (
        made.attributes.get("exported_from") != store.attributes["store_id"]
        or set(made.teachers) != set(names)
        or options.shard_rows not in (None, made.index.shard_rows)
        or any(
            made.teacher(name).encoding != _encoding(store, name, options.encoding)
            for name in names
        )
        or made.index.n_videos != len(videos)
        or len(_exportable(made, names, np.arange(len(videos)))) != len(videos)
    ):
        return False
    return np.array_equal(made.row_counts, store.row_counts[videos]) and all(
        made.place(v) == store.place(int(video)) and made.digest(v) == store.digest(int(video))
        for v, video in enumerate(videos)
    )


def _encoding(store: TargetStore, name: str, wanted: str | None) -> str:
    """Return the encoding of a teacher of the export; pca:D is for features alone."""
    record = store.teacher(name)
    if wanted is None or (record.output == "logits" and pca_components(wanted)):
        return record.encoding
    return wanted


def _same_file(store: TargetStore, out: Path, names: list[str], videos: NDArray[np.int64]) -> bool:
    """Return whether an HDF5 file was exported from this store, with these teachers and videos."""
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
                [bytes(text) for text in file[f"videos/{key}"][at : at + BLOCK]]
                == [os.fsencode(place[i]) for place in places[at : at + BLOCK]]
                for i, key in enumerate(("corpus", "path"))
                for at in range(0, len(places), BLOCK)
            )
            and all(
                file[f"teachers/{name}/{store.teacher(name).output}"].shape
                == (len(file["frames/pts"]), store.teacher(name).codec.width)
                for name in names
            )
        )


def _exportable(
    store: TargetStore, names: list[str], chosen: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return those of the chosen videos that are pending for none of the teachers."""
    return chosen[~store.pending(names)[chosen]]


def _export_store(
    store: TargetStore,
    out: Path,
    names: list[str],
    chosen: NDArray[np.int64],
    options: ExportConfig,
    console: Console,
) -> dict[str, Any]:
    videos = _exportable(store, names, chosen)
    if len(videos) < len(chosen):
        console.warn(f"{len(chosen) - len(videos)} pending videos are left out")
    if len(videos) == 0:
        raise UsageError(f"{store.name}: no video is left to export")
    codecs = codecs_for(store, names, options.encoding, videos)
    part = out.with_name(f".{out.name}.part")
    with _alone(out):
        _sweep(part)
        try:
            with console.progress("exporting", int(store.row_counts[videos].sum()), "rows") as bar:
                rows = write_subset(
                    store,
                    part,
                    videos,
                    names,
                    shard_rows=options.shard_rows,
                    codecs=codecs,
                    advance=bar.advance,
                )
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
    if not is_started_store(part):
        raise UsageError(f"--out: {part} is in the way, and is no part of an export; move it")
    with locked(part, StoreError(f"{part}: another export is writing it")):
        shutil.rmtree(part)


def _export_hdf5(
    store: TargetStore, out: Path, names: list[str], chosen: NDArray[np.int64], console: Console
) -> dict[str, Any]:
    """Usable videos as one file.

    Layout: `videos/{corpus,path,frames,first_row,rows}` [V], `frames/{video,index,pts}` [N],
    `teachers/NAME/{logits [N, K] float16, entropy [N] float32, class [K]}` or
    `teachers/NAME/features [N, K] float16`; `video` counts in `videos/`.
    """
    usable = np.intersect1d(store.usable(names), chosen)
    counts = store.row_counts[usable]
    part = out.with_name(f".{out.name}.part")
    with _alone(out), replacing(out, part):
        # From HDF5 1.10 on the structure of a file has checksums; those of the values are asked
        # for.
        writer = Hdf5Writer(part, libver=("v110", "v110"))
        with writer, console.progress("exporting", int(counts.sum()), "rows") as bar:
            file = writer.file
            file.attrs["format"] = "distinit-targets-export"
            file.attrs["store_id"] = store.attributes["store_id"]
            file.attrs["sampling"] = store.sampling.describe()
            rows = _tables(file, store, usable, counts)
            for name in names:
                record = store.teacher(name)
                group = file.create_group(f"teachers/{name}")
                shape = (len(rows), record.codec.width)
                if record.grid:
                    group.attrs["grid"] = record.grid
                if record.mirror_of is not None:
                    group.attrs["mirror_of"] = record.mirror_of
                values = group.create_dataset(record.output, shape, "f2", **_checked(shape, 2))
                entropy = None
                if record.output == "logits":
                    _text(group, "class", [name.encode() for name in record.classes])
                    entropy = group.create_dataset(
                        "entropy", (len(rows),), "f4", **_checked((len(rows),), 4)
                    )
                for at in range(0, len(rows), BLOCK):
                    some = rows[at : at + BLOCK]
                    # Not by HDF5: 1.14.2 halves what float16 rounds up to a power of two.
                    values[at : at + BLOCK] = store.values(name, some).astype(np.float16)
                    if entropy is not None:
                        entropy[at : at + BLOCK] = store.entropy(name, some)
                    writer.check()
                    bar.advance(len(some) / len(names))
    return {"out": str(out), "videos": len(usable), "rows": len(rows), "teachers": names,
            "bytes": out.stat().st_size}  # fmt: skip


def _text(group: h5py.Group, name: str, texts: list[bytes]) -> None:
    """Write texts of one length, which have checksums; of those of any length HDF5 has none.

    Compressed, for each is padded to the longest, and a few at a time, for that is true in memory
    as well.
    """
    kind = h5py.string_dtype("utf-8", max(1, *map(len, texts)) if texts else 1)
    options = _checked((len(texts),), kind.itemsize)
    packed = {"compression": "gzip", "compression_opts": 1} if options else {}
    table = group.create_dataset(name, (len(texts),), kind, **options, **packed)
    for at in range(0, len(texts), BLOCK):
        table[at : at + BLOCK] = np.array(texts[at : at + BLOCK], kind)


def _checked(shape: tuple[int, ...], item_bytes: int) -> dict[str, Any]:
    """Return the options of a table with checksums, one per chunk of about 256 kB.

    An empty table has none.
    """
    if 0 in shape:
        return {}
    rows = 2**18 // (math.prod(shape[1:]) * item_bytes)
    return {"chunks": (max(1, min(rows, shape[0])), *shape[1:]), "fletcher32": True}


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold a lock next to `out` while it is made; nothing is left of it.

    Raises:
        StoreError: Another export holds it.
    """
    busy = StoreError(f"{out}: another export is writing it")
    file = out.with_name(f".{out.name}.export-lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file, busy, make=True) as descriptor:
        try:
            mine = os.path.samestat(os.fstat(descriptor), os.stat(file))
        except FileNotFoundError:
            mine = False
        # Otherwise another has finished meanwhile, and removed what is locked here.
        if not mine or out.exists():
            raise busy
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _tables(
    file: h5py.File, store: TargetStore, usable: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Video and frame tables; returns the store's rows [N] in the order of the export."""
    rows = store.rows_of(usable)
    videos = file.create_group("videos")
    places = [store.place(int(v)) for v in usable]
    _text(videos, "corpus", [os.fsencode(corpus) for corpus, _ in places])
    _text(videos, "path", [os.fsencode(path) for _, path in places])
    columns = {
        "frames": store.frame_counts[usable],
        "first_row": np.cumsum(counts) - counts,
        "rows": counts,
    }
    for name, values in columns.items():
        videos.create_dataset(name, data=values, **_checked(values.shape, values.itemsize))
    frames = file.create_group("frames")
    checked = _checked((len(rows),), 8)
    number = frames.create_dataset(
        "video", data=np.repeat(np.arange(len(usable)), counts), **checked
    )
    index, pts = (
        frames.create_dataset(name, (len(rows),), "i8", **checked) for name in ("index", "pts")
    )
    for at in range(0, len(rows), BLOCK):
        some = rows[at : at + BLOCK]
        if (store.read_table("video", some) != usable[number[at : at + BLOCK]]).any():
            raise StoreError(
                f"{store.name}: rows of a video belong to another; see `distinit targets verify`"
            )
        index[at : at + BLOCK], pts[at : at + BLOCK] = (
            store.read_table(name, some) for name in ("index", "pts")
        )
    return rows
