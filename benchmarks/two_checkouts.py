"""Compare processor and wall time of whole commands in two checkouts of distinit.

    python benchmarks/two_checkouts.py ../before . --videos /data/clips --rounds 5

Every command runs in a separate process in both checkouts, in turn, on the same inputs. The table
has medians and the median of the ratios of the rounds (second over first). `{out}` is a new folder
per run, `{store}` is made once by the first checkout. A command that one of them lacks ends the
run.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import machine, table

TEACHER = "--teacher efficientnet_lite0 --every 8 --batch-size 8"
STUDENT = "--student r2plus1d_18 --width 0.125 --frames 8 --size 56 --epochs 1 --batch-size 8 --warmup-epochs 0"
PROBE = """
import sys
from distinit.pipeline.corpus.sources import list_videos
from distinit.pipeline.video.probe import probe

listed = list_videos(sys.argv[1:])
for number in range(len(listed)):
    probe(listed.absolute(number))
"""
# Programs that are no commands of distinit; the others are.
PROGRAMS = {"probe": ["-c", PROBE]}
COMMANDS = {
    "extract-targets": f"extract-targets {{videos}} {TEACHER} --out {{out}}/s.zarr",
    "prepare": "prepare {videos} --out {out}/copies",
    "train-student": f"train-student --set store={{store}} {STUDENT} --workers 1 --out {{out}}/run",
    "checkpoints": f"train-student --set store={{store}} {STUDENT} --workers 1 --out {{out}}/run"
    " --set loop.checkpoint_every=1",
    "probe": "{videos}",
    "verify": "targets verify {store}",
    "info": "targets info {store}",
}


def run(
    checkout: Path, words: list[str], scratch: Path, program: list[str] | None = None
) -> tuple[float, float]:
    """Return wall and processor seconds of one command of a checkout, with child processes."""
    home = scratch / checkout.resolve().name
    home.mkdir(exist_ok=True)
    if not (home / "distinit").exists():
        (home / "distinit").symlink_to(checkout.resolve())
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.run(
        [sys.executable, *(program or ["-m", "distinit"]), *words],
        cwd=scratch, env={**os.environ, "PYTHONPATH": str(home)}, capture_output=True, text=True,
    )  # fmt: skip
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode != 0:
        raise RuntimeError(
            f"{checkout}: {shlex.join(words)}: {process.stderr.strip().splitlines()[-1]}"
        )
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a table of the commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--videos", required=True, help="a folder of videos")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        values = {"videos": os.path.abspath(args.videos), "store": f"{scratch}/store/s.zarr"}
        run(
            args.first,
            shlex.split(COMMANDS["extract-targets"].format(**values, out=f"{scratch}/store")),
            scratch,
        )
        rows = []
        for command in args.only:
            times: dict[Path, list[tuple[float, float]]] = {args.first: [], args.second: []}
            for turn in range(args.rounds):
                for checkout in (
                    (args.first, args.second) if turn % 2 else (args.second, args.first)
                ):
                    with tempfile.TemporaryDirectory(dir=scratch) as out:
                        words = shlex.split(COMMANDS[command].format(**values, out=out))
                        program = PROGRAMS.get(command)
                        times[checkout].append(run(checkout, words, scratch, program))
            first, second = (list(zip(*times[c], strict=True)) for c in (args.first, args.second))
            ratios = [
                statistics.median(b / a for a, b in zip(first[k], second[k], strict=True))
                for k in (0, 1)
            ]
            cells = [f"{statistics.median(v):.2f}" for v in (*first, *second)]
            rows.append([command, *cells, *(f"{ratio:.3f}" for ratio in ratios)])
            print("; ".join(map(str, rows[-1])), file=sys.stderr)
    print(machine())
    head = [
        "command",
        "wall s",
        "processor s",
        "second: wall s",
        "processor s",
        "ratio of wall",
        "ratio of processor",
    ]
    print(table(head, rows))


if __name__ == "__main__":
    main()
