"""What is in a store, for a person and as JSON."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
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

LISTED = 1000
BARS = " ▁▂▃▄▅▆▇█"


def targets_info(options: InfoConfig, console: Console) -> dict[str, Any]:
    """Show counts, corpora, teachers, entropies and failures of a store. Raises StoreError."""
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
        "bytes": _bytes(store),
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


def _kept(teacher: dict[str, Any]) -> str:
    """Describe the encoding and what it costs."""
    key, word = ("kl_mean", "KL") if teacher["output"] == "logits" else ("cosine_mean", "1 − cos")
    error = teacher["encoding_error"][key]
    return teacher["encoding"] + (f", {word} {error:.0e}" if error is not None else "")


def _bytes(store: TargetStore) -> int:
    """Return the size of the store's files; of a remote store, of its committed shards alone."""
    if isinstance(store.files, LocalFiles):
        return sum(
            _file_bytes(Path(folder, name))
            for folder, _, names in os.walk(store.path)
            for name in names
        )
    index = store.index
    commits = (index.frame_commits, index.hashes, *(t.commits for t in index.teachers.values()))
    return sum(map(_committed_bytes, commits))


def _committed_bytes(commits: Mapping[int, dict[str, Any]]) -> int:
    """Return the size of committed shards."""
    return sum(file["size"] for node in commits.values() for file in node["files"].values())


def _file_bytes(path: Path) -> int:
    """0 for a file that is gone since it was listed: an extraction moves what it has staged."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _counts(state: np.ndarray) -> dict[str, int]:
    names = {"ok": OK, "failed": FAILED, "pending": PENDING}
    return {"listed": len(state), **{n: int((state == code).sum()) for n, code in names.items()}}


def _fingerprint(store: TargetStore, name: str) -> dict[str, Any] | None:
    """Return what a teacher's fingerprint records next to the logits; None if it has none."""
    node = store.fingerprint(name)
    return (
        None
        if node is None
        else {key: node.get(key) for key in ("probes", "torch", "device", "basis")}
    )


def _in_words(fingerprint: dict[str, Any] | None) -> str:
    """Present or missing, and what it rests on where that is not the teacher itself."""
    if fingerprint is None:
        return "missing"
    basis = fingerprint["basis"] or {}
    what: dict[Any, str] = {
        "rows": f" (after {basis.get('rows')} rows again)",
        "accepted": " (--accept-teacher)",
    }
    return "present" + what.get(basis.get("kind"), "")


def _bars(counts: list[int]) -> str:
    """Draw a histogram as one line of text; whatever is not empty shows."""
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
        **(_of_logits(store, name) if record.output == "logits" else {}),
    }


def _of_logits(store: TargetStore, name: str) -> dict[str, Any]:
    """Entropies and classes, of a teacher with logits alone."""
    found = teacher_stats(store, name)
    counts, edges = found.histogram()
    values = found.entropy[np.isfinite(found.entropy)]
    return {
        "entropy_nats": {
            "mean": float(values.mean()) if len(values) else None,
            **{f"q{round(q * 100):02d}": v for q, v in found.quantiles().items()},
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        },
        "most_frequent": [
            {"class": label, "share": share} for label, share in found.most_frequent(10)
        ],
    }


def _show(info: dict[str, Any], console: Console) -> None:
    videos = info["videos"]
    about = Table(title=info["store"], show_header=False)
    about.add_row("videos", f"{videos['listed']:,}: {videos['ok']:,} ok, {videos['failed']:,} failed, "
                  f"{videos['pending']:,} pending")  # fmt: skip
    about.add_row("cached frames", f"{info['rows']:,}, {info['sampling']}")
    about.add_row(
        "size", f"{info['bytes'] / 1e6:,.1f} MB, {info['bytes_a_row']:,.0f} bytes per frame"
    )
    shards = info["shards"]
    about.add_row(
        "shards", f"{shards['committed']} of {shards['planned']}, {info['shard_rows']} rows each"
    )
    about.add_row(
        "made",
        f"{info['created']}, format version {info['format_version']}, id {info['store_id'][:12]}",
    )
    about.add_row("hashes", f"{info['hashed_rows']:,} of {info['rows']:,} frames")
    words = [f"{t['name']} {_in_words(t['fingerprint'])}" for t in info["teachers"]]
    about.add_row("fingerprints", ", ".join(words) or "–")
    console.table(about)
    corpora = Table("corpus", "extracted from")
    for column in ("ok", "failed", "pending", "frames"):
        corpora.add_column(column, justify="right")
    for c in info["corpora"]:
        corpora.add_row(
            c["name"], c["root"], *(f"{c[k]:,}" for k in ("ok", "failed", "pending", "rows"))
        )
    console.table(corpora)
    # Two tables, so that both fit 80 columns.
    teachers = Table("teacher")
    for column in ("output", "view", "frames", "bytes per frame"):
        teachers.add_column(column, justify="right")
    contents = Table("teacher", "weights", "kept as", "most frequent classes")
    entropies = Table("teacher")
    for column in ("entropy median", "5 % to 95 %"):
        entropies.add_column(column, justify="right")
    # Bars in two lines would not be a histogram.
    entropies.add_column("histogram, to ln of the classes", no_wrap=True)
    for t in info["teachers"]:
        size = f"{t['bytes_a_row']:,.0f}" if t["rows"] else "–"
        weights = str(t["identity"].get("weights", ""))
        labels = ", ".join(f"{m['class']} {m['share']:.0%}" for m in t.get("most_frequent", [])[:4])
        what = f"{t['width']:,} {'classes' if t['output'] == 'logits' else 'features'}"
        teachers.add_row(t["name"], what, t["view"], f"{t['rows']:,}", size)
        contents.add_row(t["name"], weights, _kept(t), labels)
        if t["output"] != "logits":
            continue
        e = t["entropy_nats"]
        spread = f"{e['q05']:.2f} to {e['q95']:.2f}" if t["rows"] else "–"
        median = f"{e['q50']:.2f} nats" if t["rows"] else "–"
        histogram = e["histogram"]
        bars = f"0 ▕{_bars(histogram['counts'])}▏ {histogram['edges'][-1]:.1f} nats"
        entropies.add_row(t["name"], median, spread, bars)
    for table in (teachers, contents, entropies):
        console.table(table)
    failures = Counter(info["failures"])
    for t in info["teachers"]:
        failures.update(
            {f"{t['name']}: {r}": n for r, n in t["failures"].items() if r not in failures}
        )
    if failures:
        table = Table("videos", "failed because")
        for reason, count in failures.most_common(20):
            table.add_row(str(count), reason)
        console.table(table)
    if "failed" in info and not info["failed"]:
        console.info("no video failed")
    elif "failed" in info:
        table = Table("corpus", "file", "reason")
        for f in info["failed"][:LISTED]:
            table.add_row(f["corpus"], f["path"], f["reason"])
        console.table(table)
        if len(info["failed"]) > LISTED:
            console.info(f"{len(info['failed']) - LISTED} more; --json lists all")
