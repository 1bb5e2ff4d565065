"""Show the content of a store, as tables and as JSON (`distinit targets info`)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..pipeline.common.console import Console
from ..pipeline.store.index import FAILED, OK, PENDING
from ..pipeline.store.reader import TargetStore
from ..pipeline.store.stats import failures, teacher_stats
from ..pipeline.store.storage import LocalFiles
from ..pipeline.store.store_options import InfoConfig

# Failed videos that are listed.
LISTED = 1000
BARS = " ▁▂▃▄▅▆▇█"


def targets_info(options: InfoConfig, console: Console) -> dict[str, Any]:
    """Show counts, corpora, teachers, entropies and failures of a store.

    Raises:
        StoreError: The store cannot be read.
    """
    store = TargetStore.open(options.store)
    state = store.video_state
    reasons = store.index.video_reasons()
    corpus = store.column("corpus")
    info: dict[str, Any] = {
        "store": store.name,
        "format_version": store.attributes["version"],
        "store_id": store.attributes["store_id"],
        "created": store.attributes["created"],
        "sampling": store.sampling.describe(),
        "shard_rows": store.index.shard_rows,
        "shards": {"planned": store.index.n_shards, "committed": len(store.index.frame_commits)},
        "videos": _counts(state),
        "rows": store.n_rows,
        "hashed_rows": len(store.hashed_rows()),
        "bytes": _store_bytes(store),
        "corpora": [
            {
                "name": name,
                "root": root,
                **_counts(state[corpus == i]),
                "rows": int(store.row_counts[corpus == i].sum()),
            }
            for i, (name, root) in enumerate(store.corpora.items())
        ],
        "teachers": [_teacher(store, name) for name in store.teachers],
        "failures": dict(Counter(reasons.values()).most_common()),
    }
    info["bytes_a_row"] = round(info["bytes"] / max(store.n_rows, 1), 1)
    if options.list_failed:
        info["failed"] = [asdict(failure) for failure in failures(store)]
    _show(info, console)
    return info


def _encoding_text(teacher: dict[str, Any]) -> str:
    """Describe the encoding of a teacher and its error."""
    key, measure = (
        ("kl_mean", "KL") if teacher["output"] == "logits" else ("cosine_mean", "1 − cos")
    )
    error = teacher["encoding_error"][key]
    return teacher["encoding"] + (f", {measure} {error:.0e}" if error is not None else "")


def _store_bytes(store: TargetStore) -> int:
    """Return the size of the store's files, or of the committed shards of a remote store."""
    if isinstance(store.files, LocalFiles):
        return sum(
            _file_bytes(Path(folder, name))
            for folder, _, names in os.walk(store.path)
            for name in names
        )
    index = store.index
    commits = (
        index.frame_commits,
        index.hashes,
        *(teacher.commits for teacher in index.teachers.values()),
    )
    return sum(map(_committed_bytes, commits))


def _committed_bytes(commits: Mapping[int, dict[str, Any]]) -> int:
    """Return the size of committed shards."""
    return sum(file["size"] for node in commits.values() for file in node["files"].values())


def _file_bytes(path: Path) -> int:
    """Return the size of a file, 0 if it no longer exists: an extraction moves staged files."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _counts(state: np.ndarray) -> dict[str, int]:
    """Count videos by status."""
    codes = {"ok": OK, "failed": FAILED, "pending": PENDING}
    counts = {name: int((state == code).sum()) for name, code in codes.items()}
    return {"listed": len(state), **counts}


def _fingerprint(store: TargetStore, name: str) -> dict[str, Any] | None:
    """Return the conditions of a teacher's fingerprint, None if it has none."""
    node = store.fingerprint(name)
    return (
        None
        if node is None
        else {key: node.get(key) for key in ("probes", "torch", "device", "basis")}
    )


def _fingerprint_text(fingerprint: dict[str, Any] | None) -> str:
    """Describe a fingerprint: present or missing, and its basis unless the teacher computed it."""
    if fingerprint is None:
        return "missing"
    basis = fingerprint["basis"] or {}
    basis_texts: dict[Any, str] = {
        "rows": f" (after {basis.get('rows')} rows were computed again)",
        "accepted": " (--accept-teacher)",
    }
    return "present" + basis_texts.get(basis.get("kind"), "")


def _bars(counts: list[int]) -> str:
    """Draw a histogram as one line of text; every bin that is not empty has a bar."""
    highest = max(counts, default=0) or 1
    return "".join(BARS[-(-n * (len(BARS) - 1) // highest)] for n in counts)


def _teacher(store: TargetStore, name: str) -> dict[str, Any]:
    record = store.teachers[name]
    rows = len(store.committed_rows(name))
    return {
        "name": name,
        "output": record.output,
        "width": record.width,
        "view": record.view,
        "classes": len(record.classes),
        "identity": record.identity,
        "run": record.run,
        "fingerprint": _fingerprint(store, name),
        "encoding": record.encoding,
        "encoding_error": store.encoding_error(name),
        **_counts(store.index.teacher_state(name)),
        "rows": rows,
        "bytes": (size := _committed_bytes(store.index.teachers[name].commits)),
        "bytes_a_row": round(size / max(rows, 1), 1),
        "failures": dict(Counter(store.index.video_reasons(name).values()).most_common()),
        **(_logit_stats(store, name) if record.output == "logits" else {}),
    }


def _logit_stats(store: TargetStore, name: str) -> dict[str, Any]:
    """Return entropies and most frequent classes of a teacher with logits."""
    stats = teacher_stats(store, name)
    counts, edges = stats.histogram()
    values = stats.entropy[np.isfinite(stats.entropy)]
    return {
        "entropy_nats": {
            "mean": float(values.mean()) if len(values) else None,
            **{
                f"q{round(quantile * 100):02d}": value
                for quantile, value in stats.quantiles().items()
            },
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        },
        "most_frequent": [
            {"class": name, "share": share} for name, share in stats.most_frequent(10)
        ],
    }


def _show(info: dict[str, Any], console: Console) -> None:
    _show_store(info, console)
    _show_corpora(info["corpora"], console)
    _show_teachers(info["teachers"], console)
    _show_failures(info, console)


def _show_store(info: dict[str, Any], console: Console) -> None:
    videos, shards = info["videos"], info["shards"]
    fingerprints = [f"{t['name']} {_fingerprint_text(t['fingerprint'])}" for t in info["teachers"]]
    rows = {
        "videos": f"{videos['listed']:,}: {videos['ok']:,} ok, {videos['failed']:,} failed, "
        f"{videos['pending']:,} pending",
        "cached frames": f"{info['rows']:,}, {info['sampling']}",
        "size": f"{info['bytes'] / 1e6:,.1f} MB, {info['bytes_a_row']:,.0f} bytes per frame",
        "shards": f"{shards['committed']} of {shards['planned']}, {info['shard_rows']} rows each",
        "created": f"{info['created']}, format version {info['format_version']}, id {info['store_id'][:12]}",
        "hashes": f"{info['hashed_rows']:,} of {info['rows']:,} frames",
        "fingerprints": ", ".join(fingerprints) or "–",
    }
    table = Table(title=info["store"], show_header=False)
    for row in rows.items():
        table.add_row(*row)
    console.table(table)


def _show_corpora(corpora: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table("corpus", "extracted from")
    for title in ("ok", "failed", "pending", "frames"):
        table.add_column(title, justify="right")
    for corpus in corpora:
        counts = (f"{corpus[key]:,}" for key in ("ok", "failed", "pending", "rows"))
        table.add_row(corpus["name"], corpus["root"], *counts)
    console.table(table)


def _show_teachers(teachers: Sequence[dict[str, Any]], console: Console) -> None:
    """Show several tables, so that each fits 80 columns."""
    sizes = Table("teacher")
    for title in ("output", "view", "frames", "bytes per frame"):
        sizes.add_column(title, justify="right")
    contents = Table("teacher", "weights", "kept as", "most frequent classes")
    entropies = Table("teacher")
    for title in ("entropy median", "5 % to 95 %"):
        entropies.add_column(title, justify="right")
    # Bars in two lines would not be a histogram.
    entropies.add_column("histogram, to ln of the classes", no_wrap=True)
    for teacher in teachers:
        name, has_rows = teacher["name"], bool(teacher["rows"])
        output = (
            f"{teacher['width']:,} {'classes' if teacher['output'] == 'logits' else 'features'}"
        )
        row_bytes = f"{teacher['bytes_a_row']:,.0f}" if has_rows else "–"
        sizes.add_row(name, output, teacher["view"], f"{teacher['rows']:,}", row_bytes)
        weights = str(teacher["identity"].get("weights", ""))
        frequent = teacher.get("most_frequent", [])[:4]
        classes = ", ".join(f"{each['class']} {each['share']:.0%}" for each in frequent)
        contents.add_row(name, weights, _encoding_text(teacher), classes)
        if teacher["output"] != "logits":
            continue
        entropy, histogram = teacher["entropy_nats"], teacher["entropy_nats"]["histogram"]
        median = f"{entropy['q50']:.2f} nats" if has_rows else "–"
        spread = f"{entropy['q05']:.2f} to {entropy['q95']:.2f}" if has_rows else "–"
        bars = f"0 ▕{_bars(histogram['counts'])}▏ {histogram['edges'][-1]:.1f} nats"
        entropies.add_row(name, median, spread, bars)
    for table in (sizes, contents, entropies):
        console.table(table)


def _show_failures(info: dict[str, Any], console: Console) -> None:
    """Show the reasons of failures, and with `--failed` the videos."""
    num_videos = Counter(info["failures"])
    for teacher in info["teachers"]:
        num_videos.update(
            {
                f"{teacher['name']}: {reason}": count
                for reason, count in teacher["failures"].items()
                if reason not in num_videos
            }
        )
    if num_videos:
        table = Table("videos", "failed because")
        for reason, count in num_videos.most_common(20):
            table.add_row(str(count), reason)
        console.table(table)
    if "failed" not in info:
        return
    failed = info["failed"]
    if not failed:
        console.info("no video failed")
        return
    table = Table("corpus", "file", "reason")
    for failure in failed[:LISTED]:
        table.add_row(failure["corpus"], failure["path"], failure["reason"])
    console.table(table)
    if len(failed) > LISTED:
        console.info(f"{len(failed) - LISTED} more; --json lists all")
