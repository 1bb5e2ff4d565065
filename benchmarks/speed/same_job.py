"""Compare distinit with programs that a user would write instead, on the same job.

    python benchmarks/speed/same_job.py FOLDER [--videos 300] [--teacher efficientnet_lite0]
        [--rounds 3] [--only distinit torchcodec opencv daft] [--json FILE]

The job is to compute the logits of every 8th frame of the videos of FOLDER in a whole process, from
its start to its end. The programs are in peers/: torchcodec in a DataLoader with 1 and 2 workers
(channels-last, batches of 8), OpenCV, one video after another, and Daft. They take turns. The table
has medians of wall and processor time, and the highest sum of the memory of all processes
(proportional set size, read once per second).

Rows are compared with those of a linear decode by the ffmpeg command, prepared as each contender
does, in all files that the command decodes without an error: `wrong` are rows that are missing,
superfluous, or off by more than 0.2 deviations of their row (a frame from another position in the
video is off by about 0.5). Then each is killed (SIGKILL, the whole group) after half of its time;
`left` are videos whose outputs are on the disk.

distinit's engine comes from the cache after the first run; `first run` includes the export.
ResNet-50 has random weights, which serve for speed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np
import psutil
import torch
import torchvision
from measuring import machine, table

from distinit.pipeline.corpus.sources import list_videos
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.teachers.teacher import load_teacher
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.container import rational
from distinit.pipeline.video.geometry import pixel_aspect, render

PEERS = Path(__file__).parent / "peers"
sys.path.insert(0, str(PEERS))
OFF = 0.2

Rows = dict[int, np.ndarray]


@dataclass
class Run:
    """The time and memory of one whole process."""

    seconds: float
    processor: float
    peak_mb: float


@dataclass
class Contender:
    """A program: its command line, and a reader of the rows [n, K] of its videos."""

    command: Callable[[Path], list[str]]
    read: Callable[[Path], Rows]
    runs: list[Run] = field(default_factory=list)


def run(command: list[str], *, kill_after: float | None = None, limit: float = 3600) -> Run:
    """Run a command in a separate process group."""
    began, peak = time.monotonic(), 0.0
    before = os.times()
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    last = 0.0
    while process.poll() is None:
        now = time.monotonic() - began
        if now > (kill_after or limit):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            break
        if now - last >= 1:
            last, peak = now, max(peak, memory_mb(process.pid))
        time.sleep(0.02)
    seconds, after = time.monotonic() - began, os.times()
    if process.returncode and kill_after is None:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    processor = after.children_user - before.children_user
    return Run(seconds, processor + after.children_system - before.children_system, peak)


def memory_mb(pid: int) -> float:
    """Return the proportional memory of a process and its descendants; 0 after its end."""
    total = 0.0
    # Processes end at any time.
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_full_info().pss / 2**20
    return total


def peers(args: argparse.Namespace, paths: list[str], folder: Path) -> dict[str, Contender]:
    """Return the other programs; torchcodec with 1 and with 2 workers."""
    (folder / "list.txt").write_text("\n".join(paths) + "\n")

    def peer(script: str, *words: str) -> Contender:
        def command(out: Path) -> list[str]:
            options = ["--teacher", args.teacher, "--every", str(args.every), *words]
            if args.weights:
                options += ["--weights", str(args.weights)]
            return [
                sys.executable,
                str(PEERS / script),
                str(folder / "list.txt"),
                str(out),
                *options,
            ]

        def read(out: Path) -> Rows:
            rows = {}
            for file in out.glob("*.npy"):
                try:
                    rows[int(file.stem)] = np.load(file)
                except (ValueError, EOFError):
                    # The file is incomplete.
                    continue
            return rows

        return Contender(command, read)

    scripts = {
        "torchcodec": ("torchcodec_loader.py",),
        "opencv": ("opencv_loop.py",),
        "daft": ("daft_udf.py",),
    }
    contenders = {}
    for name in [name for name in args.only if name in scripts]:
        counts = (1, 2) if name == "torchcodec" else (0,)
        for workers in counts:
            label = f"{name}, {workers} workers" if workers else name
            contenders[label] = peer(*scripts[name], "--workers", str(workers))
    return contenders


def ours(args: argparse.Namespace, paths: list[str], folder: Path) -> Contender:
    """Return distinit's command."""
    source = folder / "videos"
    source.mkdir()
    for i, path in enumerate(paths):
        (source / f"{i:05d}{Path(path).suffix}").symlink_to(path)
    teacher = args.teacher if args.weights is None else f"torchvision:{args.teacher}"

    def command(out: Path) -> list[str]:
        words = ["extract-targets", str(source), "--out", str(out), "--every", str(args.every)]
        words += ["--teacher", teacher, "--quiet"]
        if args.weights:
            words += ["--teacher-weights", str(args.weights)]
        return [sys.executable, "-m", "distinit", *words]

    def read(out: Path) -> Rows:
        if not out.exists():
            return {}
        store = TargetStore.open(out)
        if not store.teachers:
            return {}
        logits = {}
        (name,) = store.teachers
        # A killed run leaves whole shards, and videos that are whole in them.
        for i in store.usable():
            _, _, rows = store.frames(int(i))
            logits[int(Path(store.video_path(int(i))).stem)] = store.logits(name, rows)
        return logits

    return Contender(command, read)


def decoded(path: str, every: int) -> tuple[list[av.VideoFrame], Fraction | None]:
    """Return every Nth frame of a linear decode by the ffmpeg command, and the shape of a pixel.

    There are no frames if it reports an error, because damaged frames make the count ambiguous. Raw
    frames have no colour space, which is taken from the first frame that PyAV decodes.
    """
    words = ["ffmpeg", "-v", "error", "-i", path, "-fps_mode", "passthrough", "-an", "-sn", "-dn"]
    words += ["-vf", f"select=not(mod(n\\,{every}))", "-c:v", "rawvideo", "-f", "nut", "-"]
    process = subprocess.run(words, capture_output=True, check=False)
    if process.stderr or not process.stdout:
        return [], None
    with av.open(path) as container:
        stream = container.streams.best("video")
        first = next(container.decode(stream))
        aspect = rational(stream.sample_aspect_ratio)
    with av.open(io.BytesIO(process.stdout)) as container:
        frames = list(container.decode(video=0))
    for frame in frames:
        frame.colorspace, frame.color_range = first.colorspace, first.color_range
    return frames, aspect


def wrong(rows_by_video: Rows, expected: Rows) -> int:
    """Return the number of rows that are missing, superfluous, or off by more than OFF."""
    count = 0
    for index, rows in expected.items():
        actual = rows_by_video.get(index, rows[:0])
        num_common = min(len(rows), len(actual))
        errors = np.sqrt(((actual[:num_common] - rows[:num_common]) ** 2).mean(1)) / rows[
            :num_common
        ].std(1)
        count += abs(len(rows) - len(actual)) + int((errors > OFF).sum())
    return count


def expected(args: argparse.Namespace, paths: list[str]) -> tuple[Rows, Rows]:
    """Return the rows of a linear decode, prepared as by distinit and as by the others."""
    from teacher import Teacher

    name = args.teacher if args.weights is None else f"torchvision:{args.teacher}"
    weights = str(args.weights) if args.weights else None
    our_teacher, other_teacher = (
        load_teacher(TeacherSpec(name=name, weights=weights)),
        Teacher(args.teacher, weights),
    )
    by_us, by_others = {}, {}
    for index, path in enumerate(paths):
        frames, aspect = decoded(path, args.every)
        if not frames:
            continue
        pictures = [render(f, our_teacher.view, pixel_aspect(aspect)) for f in frames]
        by_us[index] = our_teacher.logits(np.stack(pictures)).numpy()
        stacked = torch.from_numpy(np.stack([f.to_ndarray(format="rgb24") for f in frames]))
        stacked = stacked.permute(0, 3, 1, 2)
        by_others[index] = other_teacher.in_batches(stacked)
    return by_us, by_others


def resnet50_weights(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "resnet50.pth"
    torch.save(torchvision.models.resnet50().state_dict(), path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--videos", type=int, default=300)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--teacher", choices=("efficientnet_lite0", "resnet50"), default="efficientnet_lite0"
    )
    parser.add_argument(
        "--only", nargs="+", default=["distinit", "torchcodec", "opencv"],
        choices=("distinit", "torchcodec", "opencv", "daft"),
    )  # fmt: skip
    parser.add_argument("--limit", type=float, default=1800, help="seconds of one process at most")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args.weights = resnet50_weights(folder) if args.teacher == "resnet50" else None
        os.environ["DISTINIT_CACHE"] = str(folder / "cache")
        # Installed packages have their bytecode; a checkout has it after the first run.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        listed = list_videos([args.folder])
        paths = [os.path.abspath(listed.absolute(i)) for i in range(len(listed))][: args.videos]
        contenders = peers(args, paths, folder)
        if "distinit" in args.only:
            contenders = {"distinit": ours(args, paths, folder), **contenders}
            cold = run(contenders["distinit"].command(folder / "cold.zarr"), limit=args.limit)
            print(f"distinit, first run: {cold.seconds:.1f} s")
        rows: dict[str, Rows] = {}
        for number in range(args.rounds):
            for label, contender in contenders.items():
                out = folder / f"{number}-{label}"
                contender.runs.append(run(contender.command(out), limit=args.limit))
                rows[label] = contender.read(out)
                print(f"round {number}, {label}: {contender.runs[-1].seconds:.1f} s", flush=True)
        report(args, paths, folder, contenders, rows)


def report(
    args: argparse.Namespace,
    paths: list[str],
    folder: Path,
    contenders: dict[str, Contender],
    rows_of: dict[str, Rows],
) -> None:
    """Kill each contender once, and print the table."""
    by_us, by_others = expected(args, paths)
    total = sum(map(len, by_us.values()))
    lines, records = [], {}
    for label, contender in contenders.items():
        medians = {
            key: float(np.median([getattr(run, key) for run in contender.runs]))
            for key in ("seconds", "processor", "peak_mb")
        }
        out = folder / f"killed-{label}"
        run(contender.command(out), kill_after=medians["seconds"] / 2)
        num_left = len(contender.read(out))
        # Daft resizes frames differently, so its rows cannot be compared.
        rows = by_us if label == "distinit" else by_others
        num_wrong = wrong(rows_of[label], rows) if label != "daft" else "–"
        records[label] = {
            **medians,
            "wrong": num_wrong,
            "left": num_left,
            "runs": [vars(r) for r in contender.runs],
        }
        lines.append(
            [label, f"{medians['seconds']:.1f}", f"{total / medians['seconds']:.1f}",
             f"{medians['processor']:.1f}", f"{medians['peak_mb']:.0f}", num_wrong, f"{num_left} of {len(paths)}"]
        )  # fmt: skip
    print(
        f"\n{len(paths)} videos, {len(by_us)} of them without an error of ffmpeg, {total} frames\n"
    )
    head = ["program", "s", "frames/s", "processor s", "memory MB", "wrong", "left after a kill"]
    print(table(head, lines))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": records}, indent=1))


if __name__ == "__main__":
    main()
