"""Prove a store: structure, counts, digests, crc, finiteness, entropies; drop broken shards on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..pipeline.targets.index import load_index
from ..pipeline.targets.store import TargetStore
from ..pipeline.targets.verify import drop_commits, verify
from ..pipeline.targets.writer import StoreWriter
from .screen import Screen


def targets_verify(store_path: str | Path, screen: Screen, *, repair: bool = False) -> dict[str, Any]:
    """Findings of a store, each a line; `repair` drops the commits of broken shards.

    The next `extract-targets` fills dropped shards again. Raises StoreError if it is no store at all.
    """
    store = TargetStore.open(store_path)
    index = load_index(store.path)
    with screen.progress("verifying", total=index.n_shards, unit="shards") as bar:
        findings = list(verify(store.path, index, bar.advance))
    for finding in findings:
        screen.say(str(finding))
    dropped = 0
    if repair and findings:
        with StoreWriter(store.path, sampling=store.attributes["sampling"]) as writer:
            dropped = drop_commits(writer.root, findings)
        screen.say(f"{dropped} commits dropped; run the same extract-targets command again to fill them")
    if not findings:
        screen.say(f"{store.n_rows} rows of {index.n_shards} shards and {len(index.teachers)} teachers: all good")
    return {
        "store": str(store.path),
        "shards": index.n_shards,
        "rows": store.n_rows,
        "findings": [{"shard": f.shard, "teacher": f.teacher, "what": f.what} for f in findings],
        "dropped": dropped,
        "ok": not findings,
    }
