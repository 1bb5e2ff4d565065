"""Measure the peak memory of an extraction's processes at different numbers of videos.

    python benchmarks/extraction_memory.py FOLDER --videos 300 30000 --workers 1

The videos of FOLDER are hard-linked under the given number of names, and extracted with a teacher
that costs nothing. Only key frames are extracted, because the question is memory per video, not per
frame. The kernel's high-water mark (VmHWM) of every process is read four times per second. Linux
only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
from measuring import machine, table

TEACHER = """
import torch


class Mean(torch.nn.Module):
    def forward(self, images):
        return images.mean((2, 3)).repeat(1, 4)


def build():
    return Mean()
"""


def link(videos: list[Path], folder: Path, count: int) -> None:
    """Link the videos under `count` names."""
    for i in range(count):
        source = videos[i % len(videos)]
        target = folder / f"{i // 1000:03d}" / f"{i:06d}{source.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)


def role(process: psutil.Process, client: int) -> str:
    """Return the role of a process of the extraction."""
    if process.pid == client:
        return "client"
    words = " ".join(process.cmdline())
    if "distinit.pipeline.video" in words or "child" in words:
        return "decoder"
    return "worker" if "spawn_main" in words else "other"


def peaks(words: list[str], environment: dict[str, str]) -> tuple[dict[str, float], float]:
    """Run a command; return the highest VmHWM in MB of its processes by role, and its seconds."""
    peak_mb: dict[str, float] = defaultdict(float)
    began = time.monotonic()
    with tempfile.TemporaryFile() as stderr:
        run = subprocess.Popen(words, env=environment, stderr=stderr)
        while run.poll() is None:
            for process in [
                psutil.Process(run.pid),
                *psutil.Process(run.pid).children(recursive=True),
            ]:
                try:
                    text = Path(f"/proc/{process.pid}/status").read_text()
                    name = role(process, run.pid)
                except (OSError, psutil.Error):
                    continue
                mark = [
                    int(line.split()[1]) / 1024
                    for line in text.splitlines()
                    if line.startswith("VmHWM")
                ]
                peak_mb[name] = max(peak_mb[name], *mark, 0.0)
            time.sleep(0.25)
        if run.returncode:
            stderr.seek(0)
            sys.stderr.buffer.write(stderr.read())
            raise SystemExit(run.returncode)
    return dict(peak_mb), time.monotonic() - began


def main() -> None:
    """Print the machine and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--videos", type=int, nargs="+", default=[300, 30000])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--work",
        type=Path,
        help="scratch folder on the file system of FOLDER, for hard links (default: next to it)",
    )
    args = parser.parse_args()
    videos = sorted(
        p for p in args.folder.rglob("*") if p.suffix in (".mp4", ".avi", ".mkv", ".webm", ".mov")
    )
    if not videos:
        parser.error(f"no videos in {args.folder}")
    work = Path(tempfile.mkdtemp(prefix="distinit-memory-", dir=args.work or args.folder.parent))
    lines = []
    try:
        (work / "costs_nothing.py").write_text(TEACHER)
        environment = {**os.environ, "PYTHONPATH": f"{work}:{os.environ.get('PYTHONPATH', '')}"}
        for count in args.videos:
            folder = work / f"{count}"
            link(videos, folder, count)
            words = [
                sys.executable,
                "-m",
                "distinit",
                "extract-targets",
                str(folder),
                "--out",
                f"{folder}.zarr",
            ]
            words += ["--teacher", "costs_nothing:build", "--keyframes"]
            words += ["--workers", str(args.workers)] if args.workers else []
            peak_mb, seconds = peaks(words, environment)
            sizes = [f"{peak_mb.get(name, 0):.0f}" for name in ("client", "worker", "decoder")]
            lines.append([count, *sizes, f"{seconds:.0f}"])
    finally:
        shutil.rmtree(work)
    print(machine())
    print(table(["videos", "client MB", "worker MB", "decoder MB", "seconds"], lines))


if __name__ == "__main__":
    main()
