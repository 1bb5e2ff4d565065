"""Merge stores that separate machines extracted (`distinit targets merge`)."""

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
        StoreMismatchError: Parts do not match each other or `out`, or have a video in common.
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
    _warn_missing(stores, console)
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
    """Return the fingerprints of the teachers that have one in every part, by teacher.

    Raises:
        StoreMismatchError: The teachers of two parts computed different logits.
    """
    agreed = {}
    for name in stores[0].teachers:
        nodes = {
            store.name: node for store in stores if (node := store.fingerprint(name)) is not None
        }
        fingerprints = {
            part: Fingerprint.parse(node, f"{part}/teachers/{name}") for part, node in nodes.items()
        }
        first = next(iter(fingerprints), "")
        for part, fingerprint in fingerprints.items():
            if difference := fingerprints[first].differs(fingerprint):
                raise StoreMismatchError(
                    f"the parts do not match: teacher {name!r} of {part} has other logits than that of {first}: "
                    f"{difference}"
                )
        if without := [store.name for store in stores if store.name not in fingerprints]:
            console.warn(
                f"teacher {name!r}: no fingerprint in {', '.join(without)}, and so none in the merged store; the next "
                f"extract-targets adds it after a sample of rows was computed again from videos"
            )
            continue
        # A fingerprint that a user accepted remains one in the merged store.
        accepted = [
            part
            for part, fingerprint in fingerprints.items()
            if fingerprint.basis.get("kind") == "accepted"
        ]
        agreed[name] = nodes[accepted[0] if accepted else first]
    return agreed


def _warn_missing(stores: Sequence[TargetStore], console: Console) -> None:
    """Warn if the parts record their number, and some of them are missing."""
    parts = [str(store.attributes.get("part") or "") for store in stores]
    counts = {part.partition("/")[2] for part in parts}
    if len(counts) == 1 and (count := counts.pop()):
        names = [f"{i}/{count}" for i in range(1, int(count) + 1)]
        missing = [name for name in names if name not in parts]
        if missing:
            console.warn(f"parts are missing: {', '.join(missing)}")
