"""Add the missing perceptual hashes of a store's cached frames; no teacher is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..pipeline.common.console import Console
from ..pipeline.common.processes import cores
from ..pipeline.extraction.planner import StorePlan, hashed_in_part, tasks
from ..pipeline.extraction.shard_filler import ShardFiller
from ..pipeline.extraction.teacher_runner import TeacherRunner
from ..pipeline.store.reader import TargetStore, check_video_roots
from ..pipeline.store.store_options import HashConfig
from ..pipeline.store.writer import StoreWriter
from ..pipeline.video.perceptual_hash import HASH_VIEW
from ..pipeline.video.pool.decode_pool import DecodePool

# Frames per batch.
BATCH = 64


def targets_hash(options: HashConfig, console: Console) -> dict[str, Any]:
    """Decode the cached frames of shards without hashes again, and commit the hashes of each shard.

    A store of version 1 becomes one of version 2. A run that was killed is continued by the next
    one, with the same result. A video that is missing or has changed gets no hashes, and the next
    run tries it again.

    Raises:
        StoreError: The store is damaged or another process writes it.
        UsageError: `video_roots` names a corpus that the store does not have.
    """
    store = TargetStore.open(options.store)
    check_video_roots(store, options.video_roots)
    with StoreWriter(Path(store.path), sampling=store.attributes["sampling"]) as writer:
        writer.upgrade()
        plan = StorePlan(writer)
        plan.roots.update(options.video_roots)
        for shard in hashed_in_part(plan):
            writer.drop_hashes(shard)
        shards = [
            shard
            for shard in sorted(writer.index.frame_commits)
            if shard not in writer.index.hashes
        ]
        num_before = len(store.hashed_rows())
        _hash_shards(plan, shards, options, console)
    store = TargetStore.open(options.store)
    index = store.index
    failed = {
        plan.path(int(index.video[segment])): reason
        for segment, reason in sorted(index.unhashed.items())
    }
    num_hashed = len(store.hashed_rows())
    console.info(
        f"{num_hashed} of {store.n_rows} rows have hashes, {num_hashed - num_before} of them new"
        + (f"; {len(failed)} videos cannot be hashed:" if failed else "")
    )
    for path, reason in failed.items():
        console.info(f"{path}: {reason}")
    return {"store": store.name, "rows": store.n_rows, "hashed": num_hashed, "failed": failed}


def _hash_shards(plan: StorePlan, shards: list[int], options: HashConfig, console: Console) -> None:
    """Decode the frames of these shards, and commit their hashes shard by shard."""
    writer, index = plan.writer, plan.writer.index
    total = int(index.rows[np.isin(index.shard, shards)].sum())
    with (
        DecodePool(processes=options.decoders or cores(), views=[HASH_VIEW]) as pool,
        TeacherRunner({}, [HASH_VIEW], batch_size=BATCH, threads=1) as runner,
        console.progress("hashing", total=total, unit="frames") as bar,
    ):
        filler = ShardFiller(
            writer.root,
            runner,
            pool,
            sampling=plan.sampling,
            shard_rows=writer.shard_rows,
            advance=bar.advance,
        )
        for result in filler.fill(tasks(plan, shards, [])):
            writer.commit(result, {})
