"""Measure seconds and memory of the commands that read a whole store, by its number of videos.

    python benchmarks/store_commands.py --videos 25000 100000
    python benchmarks/store_commands.py --videos 1000000 --rounds 1     # an hour

The stores have two cached frames per video and eight classes, and one video of a hundred has
failed: the benchmark measures the cost per video, not per row. Each command is a separate process,
and each round has all sizes; the table has medians. "first row" is the time until the command has
read or written its first rows. The last column is the time per video as a multiple of that at the
first size: above 1 a command does not scale. `--package DIR` measures another version of distinit
(DIR holds the folder `distinit`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from measuring import machine, table, video_columns

from distinit.pipeline.common.numerics import entropy
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

ROWS, CLASSES = 2, 8
COMMANDS = ("open", "video", "info", "browse", "verify", "export .h5", "export .zarr", "merge")
MEASURE = """
import contextlib, json, re, sys, time
from pathlib import Path
from distinit.pipeline.common.console import Console
from distinit.pipeline.store.store_options import (
    BrowseConfig, ExportConfig, InfoConfig, MergeConfig, VerifyConfig
)
from distinit.stages.targets_browse import targets_browse
from distinit.stages.targets_export import targets_export
from distinit.stages.targets_info import targets_info
from distinit.stages.targets_merge import targets_merge
from distinit.stages.targets_verify import targets_verify
from distinit.pipeline.store.reader import TargetStore

command, store, other, out = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
first = []

class Bar:
    def advance(self, n=1, **fields):
        first.append(time.perf_counter()) if not first else None
    update = set_total = lambda self, value: None

class Watched(Console):
    @contextlib.contextmanager
    def progress(self, *args, **named):
        yield Bar()
    def table(self, renderable):
        pass

def videos():
    opened = TargetStore.open(store)
    for i in range(0, opened.n_videos, max(opened.n_videos // 1000, 1)):
        opened.video(i)

screen = Watched(quiet=True)
sys.stderr = open("/dev/null", "w")
run = {
    "open": lambda: TargetStore.open(store),
    "video": videos,
    "info": lambda: targets_info(InfoConfig(store=store, list_failed=True), screen),
    "browse": lambda: targets_browse(BrowseConfig(store=store, out=str(out / "browse")), screen),
    "verify": lambda: targets_verify(VerifyConfig(store=store), screen),
    "export .h5": lambda: targets_export(ExportConfig(store=store, out=str(out / "x.h5")), screen),
    "export .zarr": lambda: targets_export(ExportConfig(store=store, out=str(out / "x.zarr")), screen),
    "merge": lambda: targets_merge(MergeConfig(parts=[store, other], out=str(out / "m.zarr")), screen),
}[command]
began = time.perf_counter()
with screen:
    run()
seconds = time.perf_counter() - began
# Not getrusage: its peak begins with that of the process that started this one.
peak = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps({
    "seconds": seconds, "first": first[0] - began if first else None, "mb": peak / 1024,
}))
"""


def make(root: Path, videos: int, number: int) -> None:
    """Make a store of `videos` videos; their names and contents depend on `number`."""
    columns = video_columns(
        [f"class_{i % 700:03d}/{number}-{i:011x}.mp4" for i in range(videos)], ROWS, seed=number
    )
    run = {"batch_size": 32}
    with StoreWriter(root, sampling=Sampling().model_dump()) as writer:
        writer.add_videos(columns, [{"name": "big", "root": "/data/big"}])
        writer.add_segments(FrameRange(v, 0, -1, ROWS) for v in range(videos))
        writer.add_teacher(
            "t", [f"class {i}" for i in range(CLASSES)], {"identity": {"name": "t"}, "run": run}
        )
        order = np.searchsorted(writer.index.shard, np.arange(writer.index.n_shards + 1))
        for shard in range(writer.index.n_shards):
            segments = np.arange(order[shard], order[shard + 1])
            writer.commit(shard_of(root, writer, shard, segments, number), run)


def shard_of(
    root: Path, writer: StoreWriter, shard: int, segments: np.ndarray, number: int
) -> ShardResult:
    """Stage one shard with the rows of segments [n], one per video."""
    good = segments % 100 != 3
    counts = np.where(good, ROWS, 0)
    frame = np.tile(np.arange(ROWS) * 4, int(good.sum()))
    values = {
        "video": np.repeat(segments, counts).astype(np.int32),
        "index": frame,
        "pts": frame * 512,
    }
    z = (
        np.random.default_rng([number, shard])
        .normal(0, 3, (len(frame), CLASSES))
        .astype(np.float16)
    )
    folder = new_staging(root, shard)
    logits, nats = fmt.teacher_specs("t", CLASSES)
    teacher_files = stage_array(folder, logits, shard, z, writer.shard_rows)
    teacher_files += stage_array(
        folder, nats, shard, entropy(z.astype(np.float32)), writer.shard_rows
    )
    part = FramesPart(
        segment=segments.tolist(),
        first_row=np.where(good, np.cumsum(counts) - counts, 0).tolist(),
        rows=counts.tolist(),
        frames=np.where(good, ROWS * 4, -1).tolist(),
        failed={int(s): "no frame could be decoded" for s in segments[~good]},
    )
    for spec in fmt.frame_specs():
        part.files += stage_array(folder, spec, shard, values[spec.name], writer.shard_rows)
    error = {"kl_mean": 0.0, "kl_p99": 0.0}
    return ShardResult(
        shard, part, {"t": TeacherPart(rows=len(z), files=teacher_files, error=error)}, str(folder)
    )


def measured(command: str, stores: list[Path], package: Path | None) -> dict[str, float | None]:
    """Return seconds, seconds to the first row, and peak memory of one command."""
    environment = {**os.environ, "PYTHONPATH": str(package)} if package else None
    with tempfile.TemporaryDirectory(dir=stores[0].parent) as out:
        arguments = [sys.executable, "-P", "-c", MEASURE, command, *map(str, stores), out]
        done = subprocess.run(
            arguments, check=True, capture_output=True, text=True, env=environment
        )
    record: dict[str, float | None] = json.loads(done.stdout)
    return record


def main() -> None:
    """Print the machine and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, nargs="+", default=[25_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--package", type=Path)
    parser.add_argument(
        "--work", type=Path, help="keep the stores in this folder, and use existing ones"
    )
    args = parser.parse_args()
    scratch = tempfile.TemporaryDirectory(prefix="distinit-commands-")
    work = args.work or Path(scratch.name)
    stores = {n: [work / f"{n}-{number}.zarr" for number in range(2)] for n in args.videos}
    for n, pair in stores.items():
        for number, path in enumerate(pair):
            if not path.exists():
                make(path, n, number)
    rounds = [
        {(c, n): measured(c, stores[n], args.package) for c in args.commands for n in args.videos}
        for _ in range(args.rounds)
    ]
    rows = []
    base: dict[str, float] = {}
    for command, n in rounds[0]:
        every = [each[command, n] for each in rounds]
        seconds, mb = (
            statistics.median(float(each[key] or 0) for each in every) for key in ("seconds", "mb")
        )
        first = [each["first"] for each in every if each["first"] is not None]
        ratio = seconds / n / base.setdefault(command, seconds / n)
        shown = f"{statistics.median(first):.1f}" if first else "–"
        rows.append([command, f"{n:,}", f"{seconds:.1f}", shown, f"{mb:.0f}", f"{ratio:.2f}"])
    print(machine())
    print(table(["command", "videos", "s", "first row s", "peak MB", "time per video"], rows))
    scratch.cleanup()


if __name__ == "__main__":
    main()
