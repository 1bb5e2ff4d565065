"""Kill an extraction at random moments, run it again to its end, compare with an undisturbed run.

    python benchmarks/kill_and_resume.py SOURCE… --kills 5 --teacher efficientnet_lite0

`kill -9` goes to the whole process group of the command, decoders included. The comparison reads both
stores with plain zarr: every array, every row, bit for bit. The result goes to docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import zarr


def command(args: argparse.Namespace, out: Path) -> list[str]:
    """The extraction as a user would type it."""
    teachers = [word for t in args.teacher for word in ("--teacher", t)]
    base = [sys.executable, "-m", "distinit", "extract-targets", *args.sources]
    return [*base, "--out", str(out), *teachers, *args.extra]


def differences(a: Path, b: Path) -> list[str]:
    """Arrays of two stores that differ in shape or in any bit of any row."""
    found = []
    arrays = sorted(p.parent.relative_to(a).as_posix() for p in a.rglob("zarr.json") if '"array"' in p.read_text())
    others = sorted(p.parent.relative_to(b).as_posix() for p in b.rglob("zarr.json") if '"array"' in p.read_text())
    if arrays != others:
        return [f"other arrays: {sorted(set(arrays) ^ set(others))}"]
    for name in arrays:
        x, y = (np.asarray(zarr.open_array(root / name, mode="r")[:]) for root in (a, b))
        same = x.shape == y.shape and (
            x.tobytes() == y.tobytes() if x.dtype.kind in "iufb" else bool((x == y).all())
        )
        if not same:
            found.append(name)
    return found


def main() -> int:
    """Exit status 0 when the stores are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--teacher", action="append", required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extra", action="append", default=[], help="more words for extract-targets, one each")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    work = Path(tempfile.mkdtemp(prefix="distinit-kill-"))
    try:
        whole, broken = work / "whole.zarr", work / "broken.zarr"
        began = time.monotonic()
        subprocess.run(command(args, whole), check=True)
        seconds = time.monotonic() - began
        print(f"undisturbed: {seconds:.1f} s", flush=True)
        kills = 0
        while kills < args.kills:
            process = subprocess.Popen(command(args, broken), start_new_session=True, stderr=subprocess.DEVNULL)
            moment = rng.uniform(0.05, 1.0) * seconds
            try:
                process.wait(timeout=moment)
                print(f"finished before the moment of kill {kills + 1} ({moment:.1f} s)", flush=True)
                shutil.rmtree(broken)  # so that every kill hits a run at work
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                nodes = len(list(broken.glob("commits/frames/*/zarr.json")))
                print(f"kill {kills} after {moment:.1f} s: {nodes} shards committed", flush=True)
        subprocess.run(command(args, broken), check=True)
        found = differences(whole, broken)
    except BaseException:
        print(f"the stores are in {work}")
        raise
    if found:
        print(f"DIFFERENT: {', '.join(found)}; the stores are kept in {work}")
        return 1
    print("equal, array by array")
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
