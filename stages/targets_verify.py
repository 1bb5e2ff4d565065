"""Check a store: structure, counts, digests, finiteness, entropies (`distinit targets verify`).

With `--repair`, the commits of damaged shards are dropped.
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
    """Print a line per finding; with `repair`, also drop the commits of damaged shards.

    The next `extract-targets` fills dropped shards again, the next `targets hash` dropped hashes.
    With `frames`, the frames of all videos are compared with their files (`frame_check`). With
    `deep`, random videos are decoded and given to the teachers once more (`deep_check`).

    Raises:
        StoreError: It is no store at all.
        UsageError: The store does not have a corpus or teacher.
    """
    store = TargetStore(store_files(options.store), damaged=True)
    writer: StoreWriter | None = None
    with ExitStack() as stack:
        # With a writer, no other process commits between the checks and the repair.
        if options.repair:
            writer = stack.enter_context(
                StoreWriter(store.path, sampling=store.attributes["sampling"], damaged=True)
            )
            store = TargetStore(store_files(options.store), damaged=True)
        findings, deep = _check(store, options, writer, console)
        num_dropped = 0
        if options.repair and any(finding.shard is not None for finding in findings):
            num_dropped = drop_commits(Path(store.path), findings)
            console.info(f"{num_dropped} commits dropped; {_how_to_fill(findings, store.name)}")
    num_unchecked = without_digest(store.files, store.index)
    _show_summary(store, findings, deep, num_unchecked, console)
    return {
        "store": str(store.path),
        "shards": store.index.n_shards,
        "rows": store.n_rows,
        "findings": [{"shard": f.shard, "teacher": f.teacher, "what": f.what} for f in findings],
        "dropped": num_dropped,
        "unchecked_files": num_unchecked,
        **({"deep": deep} if options.deep else {}),
        "ok": not findings,
    }


def _check(
    store: TargetStore, options: VerifyConfig, writer: StoreWriter | None, console: Console
) -> tuple[list[Finding], dict[str, Any]]:
    """Run the requested checks of a store, and print a line per finding.

    With a writer, the identities of files that `frames` finds changed are written again if the
    teachers were run on the same videos.

    Returns:
        The findings, and the result of `deep_check`, {} without it.
    """
    index = store.index
    with console.progress("verifying", total=index.n_shards, unit="shards") as bar:
        findings = list(verify(store.path, index, bar.advance))
    by_video: dict[int, list[Finding]] = {}
    if options.frames:
        from ..pipeline.extraction.deep_verify import frame_check, identify_again

        by_video = frame_check(store, options.video_roots)
        findings += [finding for video in by_video.values() for finding in video]
    deep: dict[str, Any] = {}
    if options.deep:
        from ..pipeline.extraction.deep_verify import deep_check

        deep_findings, deep = deep_check(
            store,
            options.deep,
            seed=options.seed,
            video_roots=options.video_roots,
            weights=options.weights,
            allow_teachers=options.allow_teachers,
            device=options.device,
        )
        findings += deep_findings
    for finding in findings:
        console.info(str(finding))
    if writer is not None and by_video and not index.faults:
        identify_again(store, writer, list(by_video), options.video_roots)
    return findings, deep


def _show_summary(
    store: TargetStore,
    findings: Sequence[Finding],
    deep: dict[str, Any],
    num_unchecked: int,
    console: Console,
) -> None:
    """Log files without digests, the result of a store without findings, and the deep check."""
    if num_unchecked:
        console.info(
            f"{num_unchecked} files of version 0.1 have no digest: not all of their bits can be checked"
        )
    if not findings:
        console.info(
            f"{store.n_rows} rows of {store.index.n_shards} shards and {len(store.index.teachers)} teachers: "
            "no findings"
        )
    for name, compared in deep.get("teachers", {}).items():
        if compared["rows"]:
            console.info(
                f"{name}: {compared['rows']} rows of {deep['videos']} videos computed again, "
                f"{compared['bit_equal']:.2%} of them bit-equal"
            )


def _how_to_fill(findings: Sequence[Finding], store: str) -> str:
    """Return the commands that fill dropped commits again.

    An extraction also hashes the frames that it decodes.
    """
    damaged = [finding for finding in findings if finding.shard is not None]
    extracted = {finding.shard for finding in damaged if finding.teacher != HASHES}
    commands = ["run the same extract-targets command again to fill them"] if extracted else []
    if {finding.shard for finding in damaged} - extracted:
        missing = "hashes of frames alone" if extracted else "them"
        commands.append(f"`distinit targets hash {shlex.quote(store)}` fills in {missing}")
    return "; ".join(commands)
