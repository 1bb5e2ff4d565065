"""Write a store out as one HDF5 file: only rows that exist, only the corpora and teachers asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..pipeline.errors import UsageError
from ..pipeline.targets.store import TargetStore
from .screen import Screen

BLOCK = 4096  # rows copied at a time


def targets_export(
    store_path: str | Path,
    out: str | Path,
    screen: Screen,
    *,
    teachers: Sequence[str] = (),
    corpora: Sequence[str] = (),
) -> dict[str, Any]:
    """Write usable videos of the store to `out`.

    Layout: `videos/{corpus,path,frames,first_row,rows}` [V], `frames/{video,index,pts}` [N],
    `teachers/NAME/{logits [N, K] float16, entropy [N] float32, class [K]}`; `video` counts in `videos/`.
    Raises StoreError, and UsageError for a teacher or corpus that the store does not have.
    """
    store, out = TargetStore.open(store_path), Path(out)
    names = list(teachers) or list(store.teachers)
    for corpus in corpora:
        if corpus not in store.corpora:
            raise UsageError(f"--corpus {corpus}: the store has {', '.join(store.corpora)}")
    if out.exists():
        raise UsageError(f"--out {out}: exists already")
    usable = store.usable(names)
    if corpora:
        wanted = [list(store.corpora).index(c) for c in corpora]
        usable = usable[np.isin(store.column("corpus")[usable], wanted)]
    counts = store.row_counts[usable]
    part = out.with_name(f".{out.name}.part")
    try:
        with h5py.File(part, "w") as file, screen.progress("exporting", int(counts.sum()), "rows") as bar:
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
                    logits[at : at + BLOCK] = store.logits(name, some)
                    entropy[at : at + BLOCK] = store.entropy(name, some)
                    bar.advance(len(some) / len(names))
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return {"out": str(out), "videos": len(usable), "rows": len(rows), "teachers": names,
            "bytes": out.stat().st_size}  # fmt: skip


def _tables(
    file: h5py.File, store: TargetStore, usable: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Video and frame tables; returns the store's rows [N] in the order of the export."""
    parts = [store.frames(int(v)) for v in usable]
    empty = np.empty(0, np.int64)
    index, pts, rows = (np.concatenate([p[i] for p in parts] or [empty]) for i in range(3))
    records = [store.video(int(v)) for v in usable]
    text = h5py.string_dtype()
    videos = file.create_group("videos")
    videos.create_dataset("corpus", data=[r.corpus for r in records], dtype=text)
    videos.create_dataset("path", data=[os.fsencode(r.path) for r in records], dtype=text)
    videos.create_dataset("frames", data=store.frame_counts[usable])
    videos.create_dataset("first_row", data=np.cumsum(counts) - counts)
    videos.create_dataset("rows", data=counts)
    frames = file.create_group("frames")
    frames.create_dataset("video", data=np.repeat(np.arange(len(usable)), counts))
    frames.create_dataset("index", data=index)
    frames.create_dataset("pts", data=pts)
    return rows
