"""Merge the stores of machines that shared nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..pipeline.common.config import write_config
from ..pipeline.common.console import Console
from ..pipeline.common.errors import StoreMismatchError, UsageError
from ..pipeline.common.run_dir import config_next_to
from ..pipeline.common.urls import check_local
from ..pipeline.store.index import FAILED, OK
from ..pipeline.store.merge import check_parts, copy_shards, place, plan_merge, reading
from ..pipeline.store.reader import TargetStore
from ..pipeline.store.store_options import MergeConfig
from ..pipeline.store.writer import StoreWriter
from ..pipeline.teachers.fingerprint import Fingerprint


def targets_merge(options: MergeConfig, console: Console) -> dict[str, Any]:
    """Merge finished stores into `out`, or continue an interrupted merge of the same parts.

    Raises:
        StoreError: A part is unfinished, damaged or being written.
        StoreMismatchError: Parts do not fit each other or `out`, or a video is in two of them.
        UsageError: `out` is a part, or a part is given twice.
    """
    check_local(options.out)
    out = Path(options.out)
    record = config_next_to(out)
    stores = [TargetStore.open(part) for part in options.parts]
    if any(Path(store.name) == out.absolute() for store in stores):
        raise UsageError(f"--out {out}: is one of the parts")
    check_parts(stores, allow_different_numerics=options.allow_different_numerics)
    fingerprints = _fingerprints(stores, console)
    _say_missing(stores, console)
    placed, corpora = place(stores)
    first = stores[0].attributes
    origin = {"merged_from": [_identity(store) for store in stores]}
    with ExitStack() as stack:
        for store in stores:
            stack.enter_context(reading(store))
        writer = stack.enter_context(
            StoreWriter(
                out, sampling=first["sampling"], shard_rows=first["shard_rows"], origin=origin
            )
        )
        plan_merge(writer, placed, corpora, fingerprints)
        shards = sum(store.index.n_shards for store in stores)
        with console.progress("merging", total=shards, unit="shards") as bar:
            copied = copy_shards(writer, placed, bar.advance)
        write_config(record, "targets-merge", options)
    merged = TargetStore.open(out)
    console.info(
        f"{merged.n_videos} videos, {merged.n_rows} rows, {shards} shards from {len(stores)} parts in {out}"
    )
    return {
        "store": merged.name,
        "parts": [store.name for store in stores],
        "videos": merged.n_videos,
        "ok": int(np.sum(merged.video_state == OK)),
        "failed": int(np.sum(merged.video_state == FAILED)),
        "rows": merged.n_rows,
        "shards": shards,
        "copied": copied,
    }


def _identity(store: TargetStore) -> dict[str, Any]:
    index = store.index
    counts = {"videos": index.n_videos, "segments": len(index.video), "shards": index.n_shards}
    return {"store_id": store.attributes["store_id"], **counts}


def _fingerprints(stores: Sequence[TargetStore], console: Console) -> dict[str, dict[str, Any]]:
    """Return the fingerprint of each teacher that all parts agree on; none where a part has none.

    Raises:
        StoreMismatchError: The teachers of two parts computed different logits.
    """
    agreed = {}
    for name in stores[0].teachers:
        nodes = {
            store.name: node for store in stores if (node := store.fingerprint(name)) is not None
        }
        known = {
            where: Fingerprint.parse(node, f"{where}/teachers/{name}")
            for where, node in nodes.items()
        }
        first = next(iter(known), "")
        for where, other in known.items():
            if how := known[first].differs(other):
                raise StoreMismatchError(
                    f"the parts do not fit: teacher {name!r} of {where} says other logits than that of {first}: {how}"
                )
        if without := [store.name for store in stores if store.name not in known]:
            console.warn(
                f"teacher {name!r}: no fingerprint in {', '.join(without)}, and so none in the merged store; the next "
                f"extract-targets adds it after a sample of rows was computed again from videos"
            )
        else:  # what a user accepted is not proven by being merged
            doubtful = [
                where for where, other in known.items() if other.basis.get("kind") == "accepted"
            ]
            agreed[name] = nodes[doubtful[0] if doubtful else first]
    return agreed


def _say_missing(stores: Sequence[TargetStore], console: Console) -> None:
    """Warn where the parts record how many they are, and not all were given."""
    parts = [str(store.attributes.get("part") or "") for store in stores]
    counts = {part.partition("/")[2] for part in parts}
    if len(counts) == 1 and (of := counts.pop()):
        missing = [f"{i}/{of}" for i in range(1, int(of) + 1) if f"{i}/{of}" not in parts]
        if missing:
            console.warn(f"not all parts are here; missing: {', '.join(missing)}")
