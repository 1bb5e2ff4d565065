"""Prove a store: structure, counts, digests, crc, finiteness, entropies; drop broken shards on
request."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..pipeline.common.console import Console
from ..pipeline.common.errors import UsageError
from ..pipeline.store.reader import TargetStore
from ..pipeline.store.storage import store_files
from ..pipeline.store.verify import Finding, drop_commits, verify, without_digest
from ..pipeline.store.writer import StoreWriter


def targets_verify(
    store_path: str | Path,
    console: Console,
    *,
    repair: bool = False,
    frames: bool = False,
    deep: int = 0,
    seed: int = 0,
    moved: Mapping[str, str] | None = None,
    weights: Mapping[str, str] | None = None,
    allow_teachers: Collection[str] = (),
    device: str = "auto",
) -> dict[str, Any]:
    """Findings of a store, each a line; `repair` drops the commits of broken shards.

    The next `extract-targets` fills dropped shards again. frames: the frames of all videos are held
    against their files (see `targets_frames`). deep: so many random videos are decoded and shown to
    the teachers once more (see `targets_deep`, also for the other arguments). Raises StoreError if
    it is no store at all, UsageError for a corpus or teacher it does not have.
    """
    if (moved and not (deep or frames)) or ((weights or allow_teachers) and not deep):
        raise UsageError(
            "--videos needs --frames or --deep N; --teacher-weights and --allow-teacher need --deep N"
        )
    store = TargetStore(store_files(store_path), damaged=True)
    writer: StoreWriter | None = None
    with ExitStack() as stack:
        if repair:  # nobody commits between what is found and what is dropped
            writer = stack.enter_context(
                StoreWriter(store.path, sampling=store.attributes["sampling"], damaged=True)
            )
            store = TargetStore(store_files(store_path), damaged=True)
        index = store.index
        with console.progress("verifying", total=index.n_shards, unit="shards") as bar:
            findings = list(verify(store.path, index, bar.advance))
        compared: dict[str, Any] = {}
        by_video: dict[int, list[Finding]] = {}
        if frames:
            from ..pipeline.extraction.frame_check import frame_check, identify_again

            by_video = frame_check(store, console, moved)
            findings += [finding for of_video in by_video.values() for finding in of_video]
        if deep:
            from ..pipeline.extraction.deep_verify import deep_check

            found, compared = deep_check(
                store,
                deep,
                console,
                seed=seed,
                moved=moved,
                weights=weights,
                allow_teachers=allow_teachers,
                device=device,
            )
            findings += found
        for finding in findings:
            console.say(str(finding))
        dropped = 0
        if writer is not None and by_video and not index.broken:
            identify_again(store, writer, list(by_video), moved)
        if repair and any(finding.shard is not None for finding in findings):
            dropped = drop_commits(Path(store.path), findings)
            console.say(
                f"{dropped} commits dropped; run the same extract-targets command again to fill them"
            )
    unchecked = without_digest(store.files, index)
    if unchecked:
        console.say(
            f"{unchecked} files have no digest, as version 0.1 wrote them: not all of their bits can be checked"
        )
    if not findings:
        console.say(
            f"{store.n_rows} rows of {index.n_shards} shards and {len(index.teachers)} teachers: all good"
        )
    for name, c in compared.get("teachers", {}).items():
        if c["rows"]:
            console.say(f"{name}: {c['rows']} rows of {compared['videos']} videos computed again, "
                       f"{c['bit_equal']:.2%} of them equal to the bit")  # fmt: skip
    return {
        "store": str(store.path),
        "shards": index.n_shards,
        "rows": store.n_rows,
        "findings": [{"shard": f.shard, "teacher": f.teacher, "what": f.what} for f in findings],
        "dropped": dropped,
        "unchecked_files": unchecked,
        **({"deep": compared} if deep else {}),
        "ok": not findings,
    }
