"""Check a store: structure, counts, digests, finiteness, entropies.

Damaged shards are dropped on request.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..pipeline.common.console import Console
from ..pipeline.store.layout import HASHES
from ..pipeline.store.reader import TargetStore
from ..pipeline.store.storage import store_files
from ..pipeline.store.store_options import VerifyConfig
from ..pipeline.store.verify import Finding, drop_commits, verify, without_digest
from ..pipeline.store.writer import StoreWriter


def targets_verify(options: VerifyConfig, console: Console) -> dict[str, Any]:
    """Print the findings of a store, a line each; `repair` drops the commits of damaged shards.

    The next `extract-targets` fills dropped shards again, `targets hash` dropped hashes of frames.
    With `frames` the frames of all videos are compared with their files (`frame_check`); with
    `deep` random videos are decoded and shown to the teachers once more (`deep_check`).

    Raises:
        StoreError: It is no store at all.
        UsageError: A corpus or teacher that it does not have.
    """
    store = TargetStore(store_files(options.store), damaged=True)
    writer: StoreWriter | None = None
    with ExitStack() as stack:
        if options.repair:  # nobody commits between what is found and what is dropped
            writer = stack.enter_context(
                StoreWriter(store.path, sampling=store.attributes["sampling"], damaged=True)
            )
            store = TargetStore(store_files(options.store), damaged=True)
        index = store.index
        with console.progress("verifying", total=index.n_shards, unit="shards") as bar:
            findings = list(verify(store.path, index, bar.advance))
        compared: dict[str, Any] = {}
        by_video: dict[int, list[Finding]] = {}
        if options.frames:
            from ..pipeline.extraction.deep_verify import frame_check, identify_again

            by_video = frame_check(store, options.video_roots)
            findings += [finding for of_video in by_video.values() for finding in of_video]
        if options.deep:
            from ..pipeline.extraction.deep_verify import deep_check

            found, compared = deep_check(
                store,
                options.deep,
                seed=options.seed,
                video_roots=options.video_roots,
                weights=options.weights,
                allow_teachers=options.allow_teachers,
                device=options.device,
            )
            findings += found
        for finding in findings:
            console.info(str(finding))
        dropped = 0
        if writer is not None and by_video and not index.faults:
            identify_again(store, writer, list(by_video), options.video_roots)
        if options.repair and any(finding.shard is not None for finding in findings):
            dropped = drop_commits(Path(store.path), findings)
            console.info(f"{dropped} commits dropped; {_how_to_fill(findings, store.name)}")
    unchecked = without_digest(store.files, index)
    if unchecked:
        console.info(
            f"{unchecked} files have no digest, as version 0.1 wrote them: not all of their bits can be checked"
        )
    if not findings:
        console.info(
            f"{store.n_rows} rows of {index.n_shards} shards and {len(index.teachers)} teachers: all good"
        )
    for name, c in compared.get("teachers", {}).items():
        if c["rows"]:
            console.info(f"{name}: {c['rows']} rows of {compared['videos']} videos computed again, "
                       f"{c['bit_equal']:.2%} of them equal to the bit")  # fmt: skip
    return {
        "store": str(store.path),
        "shards": index.n_shards,
        "rows": store.n_rows,
        "findings": [{"shard": f.shard, "teacher": f.teacher, "what": f.what} for f in findings],
        "dropped": dropped,
        "unchecked_files": unchecked,
        **({"deep": compared} if options.deep else {}),
        "ok": not findings,
    }


def _how_to_fill(findings: Sequence[Finding], store: str) -> str:
    """Return which commands fill dropped commits again: an extraction hashes what it decodes."""
    damaged = [finding for finding in findings if finding.shard is not None]
    extracted = {finding.shard for finding in damaged if finding.teacher != HASHES}
    commands = ["run the same extract-targets command again to fill them"] if extracted else []
    if {finding.shard for finding in damaged} - extracted:
        what = "hashes of frames alone" if extracted else "them"
        commands.append(f"`distinit targets hash {shlex.quote(store)}` fills in {what}")
    return "; ".join(commands)
