"""Kill an extraction at random moments, run it again to its end, compare with an undisturbed run.

    python benchmarks/kill_and_resume.py SOURCE… --teacher efficientnet_lite0 --kills 20 --workers 2

`kill -9` goes to the client (`--who client`; without workers that is all there is, and its decoders
end with it), to a random dask worker (`worker`; the run continues), or to a worker and then the
client (`both`). The comparison reads both stores with plain zarr: every array, every row, bit for
bit. The result goes to docs/benchmarks.md.
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
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import zarr

VICTIMS = {"client": ("client",), "worker": ("worker", "worker"), "both": ("worker", "client")}


def command(args: argparse.Namespace, out: Path) -> list[str]:
    """Return the command line of the extraction."""
    teachers = [word for t in args.teacher for word in ("--teacher", t)]
    base = [sys.executable, "-m", "distinit", "extract-targets", *args.sources]
    workers = ["--workers", str(args.workers)] if args.workers else []
    return [*base, "--out", str(out), *teachers, *workers, *args.extra]


def differences(a: Path, b: Path) -> list[str]:
    """Arrays of two stores that differ in shape or in any bit of any row."""
    found = []
    arrays = sorted(
        p.parent.relative_to(a).as_posix()
        for p in a.rglob("zarr.json")
        if '"array"' in p.read_text()
    )
    others = sorted(
        p.parent.relative_to(b).as_posix()
        for p in b.rglob("zarr.json")
        if '"array"' in p.read_text()
    )
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


def workers_of(pid: int) -> list[psutil.Process]:
    """List the dask workers among the children of a client."""
    found = []
    for child in psutil.Process(pid).children():
        try:
            if any("spawn_main" in word for word in child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the client, and see to it that all that it started ends by itself."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    left = psutil.wait_procs(family, timeout=30)[1]
    if left:
        raise SystemExit(f"outlived their client by 30 s: {[p.cmdline() for p in left]}")


def kill_one(process: subprocess.Popen[bytes], who: str, rng: random.Random) -> bool:
    """Send `kill -9` to the client or a random worker; return False before it exists."""
    if who == "client":
        end(process)
        return True
    workers = workers_of(process.pid)
    if workers:
        rng.choice(workers).kill()
    return bool(workers)


def one_run(
    words: list[str], victims: tuple[str, ...], seconds: float, rng: random.Random
) -> tuple[list[str], bool]:
    """Run the command and kill the victims at random moments.

    Returns:
        The victims, and whether the command succeeded.
    """
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(words, stderr=stderr)
        killed = []
        moments = sorted(rng.uniform(0.05, 1.0) * seconds for _ in victims)
        began = time.monotonic()
        for moment, who in zip(moments, victims, strict=True):
            try:
                process.wait(timeout=max(0.0, moment - (time.monotonic() - began)))
                break
            except subprocess.TimeoutExpired:
                if kill_one(process, who, rng):
                    killed.append(f"{who} at {moment:.1f} s")
        code = process.wait()
        if code not in (0, -signal.SIGKILL):
            stderr.seek(0)
            sys.stderr.buffer.write(stderr.read())
            raise SystemExit(
                f"the extraction ended with status {code} after these kills: {', '.join(killed)}"
            )
        return killed, code == 0


def main() -> int:
    """Exit status 0 when the stores are equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--teacher", action="append", required=True)
    parser.add_argument("--kills", type=int, default=5, help="how often each of them is killed")
    parser.add_argument("--workers", type=int, default=0, help="dask workers; 0: none")
    parser.add_argument("--who", choices=tuple(VICTIMS), default="client")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--extra", action="append", default=[], help="more words for extract-targets, one each"
    )
    args = parser.parse_args()
    if args.who != "client" and not args.workers:
        parser.error(f"--who {args.who} needs --workers")
    rng = random.Random(args.seed)
    work = Path(tempfile.mkdtemp(prefix="distinit-kill-"))
    whole, broken = work / "whole.zarr", work / "broken.zarr"
    words = command(args, broken)
    kills: Counter[str] = Counter()
    try:
        began = time.monotonic()
        subprocess.run(command(args, whole), check=True)
        seconds = time.monotonic() - began
        print(f"undisturbed: {seconds:.1f} s, load {os.getloadavg()[0]:.1f}", flush=True)
        compared = 0
        while min(kills[who] for who in VICTIMS[args.who]) < args.kills:
            killed, ended = one_run(words, VICTIMS[args.who], seconds, rng)
            kills.update(text.split()[0] for text in killed)
            nodes = len(list(broken.glob("commits/frames/*/zarr.json")))
            print(
                f"killed: {', '.join(killed) or 'nothing in time'}; {nodes} shards committed",
                flush=True,
            )
            if ended:  # compare and start again, so that every kill hits a running extraction
                check(whole, broken)
                compared += 1
                shutil.rmtree(broken)
        subprocess.run(words, check=True)
        check(whole, broken)
    except BaseException:
        print(f"the stores are in {work}")
        raise
    counts = ", ".join(f"{n} kills of a {who}" for who, n in kills.items())
    print(
        f"{counts}: {compared + 1} finished stores, each equal to the undisturbed one, array by array"
    )
    shutil.rmtree(work)
    return 0


def check(whole: Path, broken: Path) -> None:
    """SystemExit where the stores differ or something was left behind."""
    found = differences(whole, broken)
    if (broken / "staging").exists():
        found.append("staging was left behind")
    if found:
        raise SystemExit(f"DIFFERENT: {', '.join(found)}")


if __name__ == "__main__":
    sys.exit(main())
