"""Measure the costs of a large store: commits, files, opening it and reading its first pick.

    python benchmarks/large_store.py --videos 1000000 --keep big.zarr    # makes it (15 minutes)
    python benchmarks/large_store.py --reuse big.zarr                    # measures it again
    python benchmarks/large_store.py --videos 10000 100000 1000000 --no-sync   # one after another

The stores, of a hundred million rows for a million videos, are made by the writer of extraction:
real tables of videos, segments and frames, and a commit per shard for the frames and for one
teacher. The logits are NaN, which takes no space, except for the last shard. `commit` is the
client's time per shard if workers fill the shards. `--no-sync` makes stores faster, without waiting
for the disk; commits are then faster, too. Each opening is a separate process; the files are in the
page cache. Goal for a million videos: under 3 s and 600 MB (peak resident memory of the process,
imports included).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measuring import machine, table, video_columns

from distinit.pipeline.store import layout as fmt
from distinit.pipeline.store.planning import FrameRange
from distinit.pipeline.store.staging import (
    FramesPart,
    ShardResult,
    TeacherPart,
    new_staging,
    stage_array,
)
from distinit.pipeline.store.writer import StoreWriter
from distinit.pipeline.video.sampling import Sampling

CLASSES = 1000
OPEN = r"""
import json, re, sys, time
began = time.perf_counter()
from distinit.pipeline.store.reader import TargetStore
imported = time.perf_counter()
store = TargetStore.open(sys.argv[1])
opened = time.perf_counter()
last = int(store.usable()[-1])
path, rows = store.video_path(last), store.frames(last)[2]
store.logits("t", rows[:1])
used = time.perf_counter()
# Not getrusage: its peak begins with that of the process that started this one.
peak = int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
print(json.dumps({
    "videos": store.n_videos, "rows": store.n_rows, "import": imported - began, "open": opened - imported,
    "first": used - opened, "mb": peak / 1024,
}))
"""


def make(root: Path, videos: int, rows: int) -> float:
    """Make a store of `videos` videos with `rows` cached frames each; return seconds per commit."""
    committing = 0.0
    columns = video_columns(
        [f"class_{i % 700:03d}/{i:011x}_{i % 300:06d}.mp4" for i in range(videos)], rows, seed=0
    )
    run = {"batch_size": 32}
    with StoreWriter(root, sampling=Sampling().model_dump()) as writer:
        writer.add_videos(columns, [{"name": "big", "root": "/data/big"}])
        writer.add_segments(FrameRange(v, 0, -1, rows) for v in range(videos))
        writer.add_teacher(
            "t", [f"class {i}" for i in range(CLASSES)], {"identity": {"name": "t"}, "run": run}
        )
        frames = np.arange(rows) * 4
        order = np.searchsorted(writer.index.shard, np.arange(writer.index.n_shards + 1))
        began = time.monotonic()
        for shard in range(writer.index.n_shards):
            segments = np.arange(order[shard], order[shard + 1])
            n = len(segments)
            values = {
                "video": np.repeat(segments, rows).astype(np.int32),
                "index": np.tile(frames, n),
                "pts": np.tile(frames * 512, n),
            }
            folder = new_staging(root, shard)
            files = [
                file
                for spec in fmt.frame_specs()
                for file in stage_array(folder, spec, shard, values[spec.name], writer.shard_rows)
            ]
            logits, entropy = fmt.teacher_specs("t", CLASSES)
            teacher_files = stage_array(
                folder, entropy, shard, np.full(n * rows, 2.5, np.float32), writer.shard_rows
            )
            # Only the last shard is read.
            if shard == writer.index.n_shards - 1:
                teacher_files += stage_array(
                    folder, logits, shard, np.ones((n * rows, CLASSES), "f2"), writer.shard_rows
                )
            part = FramesPart(
                segment=segments.tolist(), first_row=(np.arange(n) * rows).tolist(), rows=[rows] * n,
                frames=[rows * 4] * n, files=files,
            )  # fmt: skip
            started = time.monotonic()
            writer.commit(
                ShardResult(
                    shard, part, {"t": TeacherPart(rows=n * rows, files=teacher_files)}, str(folder)
                ),
                run,
            )
            committing += time.monotonic() - started
            if shard % 200 == 199:
                seconds = time.monotonic() - began
                print(
                    f"{shard + 1} of {writer.index.n_shards} shards, {seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
        return committing / max(writer.index.n_shards, 1)


def measure(root: Path, rounds: int) -> dict[str, float]:
    """Open a store in one process per round; return medians."""
    records = []
    for _ in range(rounds):
        words = [sys.executable, "-c", OPEN, str(root)]
        process = subprocess.run(words, check=True, capture_output=True, text=True)
        records.append(json.loads(process.stdout))
    return {key: statistics.median(each[key] for each in records) for key in records[0]}


def main() -> None:
    """Print the machine and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--rows", type=int, default=100, help="per video")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-sync", action="store_true", help="do not wait for the disk")
    parser.add_argument("--keep", type=Path, help="make the store here and keep it")
    parser.add_argument("--reuse", type=Path, help="measure this store")
    args = parser.parse_args()
    if args.keep and len(args.videos) > 1:
        parser.error("--keep takes one number of --videos")
    if args.no_sync:
        os.fsync = lambda descriptor: None
    lines = []
    for videos in [0] if args.reuse else args.videos:
        with tempfile.TemporaryDirectory(prefix="distinit-large-") as scratch:
            root = args.reuse or args.keep or Path(scratch, "large.zarr")
            commit = "–" if args.reuse else f"{1000 * make(root, videos, args.rows):.1f}"
            files = sum(len(names) for _, _, names in os.walk(root))
            medians = measure(root, args.rounds)
        lines.append(
            [f"{medians['videos']:.0f}", f"{medians['rows']:.0f}", commit, str(files),
             *(f"{medians[key]:.2f}" for key in ("import", "open", "first")), f"{medians['mb']:.0f}"]
        )  # fmt: skip
    print(machine())
    head = ["videos", "rows", "commit ms", "files", "import s", "open s", "first pick s", "peak MB"]
    print(table(head, lines))


if __name__ == "__main__":
    main()
