"""Interrupt every command that writes, run it again, and compare with an uninterrupted run.

    python benchmarks/interruptions.py     # two trials per command and kind: an hour
    python benchmarks/interruptions.py --trials 5 --commands extract --kinds kill-change file-limit

Kinds of interruptions:

    kill-change   kill -9 immediately before the k-th change of a file that the client makes in
                  Python, k drawn at random
    kill-moment   kill -9 at a random moment of the work
    signal        INT, TERM, HUP or PIPE at a random moment of the work
    kill-child    kill -9, or a segmentation fault, of one process that the command started (a
                  decoder, a loader process, a dask worker, a process of flow) at a random moment;
                  the command may continue
    full-disk     a tmpfs of 2 to 90 % of the space that is needed; root only
    file-limit    no file may have more than 2 to 90 % of the largest file of the result
                  (RLIMIT_FSIZE)

Kills and signals go to the client or its whole process group in turn. The uninterrupted run records
when the client changes files. Moments are drawn from the time of its work and timed from the
previous change, so that quick commands are hit.

After each interruption, all processes of the command must end within ten seconds. The same command,
run again, must end with status 0, and its folder must equal that of the uninterrupted run bit by
bit: arrays, weights, predictions and copies, and no other file left over. If a command ends before
its interruption, the trial is drawn again. The script requires the demo's teacher and OpenCV (`pip
install distinit[demo,flow]`). The exit status is 0 if no trial failed.
"""

from __future__ import annotations

import argparse
import bisect
import os
import random
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import psutil
import zarr
from measuring import machine
from safetensors.numpy import load_file

from distinit.conf import __path__ as conf_folders

CORPUS = Path(next(iter(conf_folders))) / "demo_corpus"
GONE_S, LONGEST_S = 10.0, 600.0
REDRAWN = 4  # times that a trial which came too late is drawn again
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
SINGLE_PROCESS = ("kill-change", "kill-moment", "signal", "full-disk", "file-limit")
KINDS = (*SINGLE_PROCESS, "kill-child")
# Loaded by every Python that the command starts. In the client, it writes the moment of each change
# of a file below INTERRUPT_ROOT into a pipe, and kills at one of them.
COUNTER = """
import os, struct, sys, time
if os.environ.get("INTERRUPT_PARENT") == str(os.getppid()):
    root, left = os.environ["INTERRUPT_ROOT"], [int(os.environ["INTERRUPT_AT"])]
    client, pipe, who = os.getpid(), int(os.environ["INTERRUPT_PIPE"]), os.environ["INTERRUPT_WHO"]
    changes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}
    def count(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in changes:
            return
        if not isinstance(arguments[0], (str, bytes, os.PathLike)) or os.getpid() != client:
            return
        if os.path.abspath(os.fsdecode(arguments[0])).startswith(root):
            os.write(pipe, struct.pack("d", time.monotonic()))
            left[0] -= 1
            if left[0] == 0:
                os.killpg(0, 9) if who == "group" else os.kill(client, 9)
    sys.addaudithook(count)
"""
TEACHERS = """
import torch
from torch import nn

def teacher(k):
    torch.manual_seed(k)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, k))

other = lambda k: teacher(k + 1)
"""
STUDENT = {
    "student": "{architecture: r3d_18, width: 0.0625}",
    "clips": "{clip_frames: 4, size: 32}",
}
TEST = "--set=test={clips: 2, workers: 1}"
LOOP = "--set=loop={batch_size: 4, epochs: 2, epoch_clips: 8, workers: 1, device: cpu, threads: 1, checkpoint_every: 1}"
PLAN = f"""
title: t
base:
  finetune:
    student: {STUDENT["student"]}
    clips: {STUDENT["clips"]}
    test: {{clips: 1, workers: 0}}
    loop: {{batch_size: 4, epochs: 1, epoch_clips: 8, workers: 1, device: cpu, threads: 1}}
axes:
  what:
    one: {{finetune.init: scratch}}
    two: {{finetune.init: scratch, finetune.loop.lr: 0.1}}
"""


def differences_of_stores(a: Path, b: Path) -> list[str]:
    """Return the arrays of two stores that differ in shape or in any bit of any row."""
    differing = []
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
        return [f"different arrays: {sorted(set(arrays) ^ set(others))}"]
    for name in arrays:
        x, y = (np.asarray(zarr.open_array(root / name, mode="r")[:]) for root in (a, b))
        same = x.shape == y.shape and (
            x.tobytes() == y.tobytes() if x.dtype.kind in "iufb" else bool((x == y).all())
        )
        if not same:
            differing.append(name)
    return differing


@dataclass(frozen=True)
class Command:
    """A command line without its --out.

    name: Name of its --out. before: A result that is copied into the folder first, under the name
    `copied` or that of --out. concurrent: The --out of a second command that writes to the folder
    at the same time, and its words.
    """

    words: list[str]
    name: str
    kinds: tuple[str, ...] = KINDS
    before: Path | None = None
    copied: str | None = None
    concurrent: tuple[str, list[str]] | None = None


def differences(a: Path, b: Path) -> list[str]:
    """Return the differences of two files or folders, except for files with times."""
    if a.is_dir() and a.suffix == ".zarr":
        left = [
            path.name for path in b.rglob("*") if "partial" in path.name or path.name == "staging"
        ]
        return differences_of_stores(a, b) + left
    if a.is_dir():
        x, y = ({p.name for p in folder.iterdir() if "tfevents" not in p.name} for folder in (a, b))
        lines = [f"only in one: {name}" for name in sorted(x ^ y)]
        return lines + [part for name in sorted(x & y) for part in differences(a / name, b / name)]
    read = {
        ".safetensors": load_file,
        ".h5": tables_of,
        ".mp4": lambda path: {"": np.fromfile(path, np.uint8)},
    }
    if a.suffix not in read:
        return []
    tables, others = (read[a.suffix](path) for path in (a, b))
    names = tables.keys() | others.keys()
    same = {n for n in tables.keys() & others.keys() if _bits(tables[n]) == _bits(others[n])}
    return [f"{a.name} {name}" for name in sorted(names - same)]


def _bits(values: np.ndarray) -> tuple[object, ...]:
    return (
        values.dtype,
        values.shape,
        values.tolist() if values.dtype.hasobject else values.tobytes(),
    )


def tables_of(path: Path) -> dict[str, np.ndarray]:
    """Return all data sets of an HDF5 file."""
    tables: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: tables.update(
                {name: item[()]} if isinstance(item, h5py.Dataset) else {}
            )
        )
    return {name: np.asarray(values) for name, values in tables.items()}


class TrialFailed(Exception):
    """The trial failed."""


class TooLate(Exception):
    """The command ended before its interruption."""


class Started:
    """A running command in a separate process group.

    at: Number of the change of a file at which the client is killed, 0 for none. group: Kill the
    whole process group.
    """

    def __init__(
        self,
        words: list[str],
        out: Path,
        environment: dict[str, str],
        at: int = 0,
        group: bool = False,
    ):
        self._moments, moments = os.pipe()
        self._output, output = os.pipe()  # not a file, whose size the kind file-limit would bound
        self.mark = f"{os.getpid()} {time.monotonic()}"
        interrupt = {"PARENT": os.getpid(), "ROOT": out.parent, "AT": at, "PIPE": moments}
        interrupt |= {"WHO": "group" if group else "client", "MARK": self.mark}
        self.began, self.folder = time.monotonic(), out.parent
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distinit", *words, "--out", str(out)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={
                **environment,
                **{f"INTERRUPT_{key}": str(value) for key, value in interrupt.items()},
            },
            pass_fds=(moments,),
            cwd=out.parent,
        )
        os.close(moments)
        os.close(output)
        self._read = {self._moments: b"", self._output: b""}
        self._pipes = selectors.DefaultSelector()
        for pipe in self._read:
            self._pipes.register(pipe, selectors.EVENT_READ)

    def follow(self, change: int | None = None, delay: float = 0.0) -> int | None:
        """Wait for the end, or for `delay` seconds after a change.

        Returns:
            The exit status, None while the command is running.
        """
        until = time.monotonic() + (delay if change == 0 else LONGEST_S)
        while self.process.poll() is None and (left := until - time.monotonic()) > 0:
            self._take(min(left, 0.1))
            if change and len(self.changes()) >= change:
                until, change = min(until, self.began + self.changes()[change - 1] + delay), 0
        if self.process.poll() is None and change is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise TrialFailed(f"no end after {LONGEST_S:g} s")
        self._take(0)
        return self.process.returncode

    def _take(self, seconds: float) -> None:
        for key, _ in self._pipes.select(seconds):
            new = os.read(key.fd, 2**20)
            self._read[key.fd] += new
            if not new:
                self._pipes.unregister(key.fd)

    def changes(self) -> list[float]:
        """Return the seconds after the start at which the client changed files."""
        return [at - self.began for (at,) in struct.iter_unpack("d", self._read[self._moments])]

    def output(self) -> str:
        return self._read[self._output].decode(errors="replace")

    def last_line(self) -> str:
        return ([line for line in self.output().splitlines() if line.strip()] or ["no output"])[-1]

    def family(self) -> list[psutil.Process]:
        """Return all running processes that it has started, also if their parents have ended."""
        processes = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                ours = (
                    process.environ().get("INTERRUPT_MARK") == self.mark
                    and process.pid != self.process.pid
                )
                processes += [process] if ours and process.status() != psutil.STATUS_ZOMBIE else []
        return processes

    def end(self, seconds: float = GONE_S) -> None:
        """Wait for the end of all its processes.

        Raises:
            TrialFailed: A process is still running.
        """
        self.follow(0, seconds)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise TrialFailed("does not end")
        until = time.monotonic() + GONE_S
        while (left := self.family()) and time.monotonic() < until:
            time.sleep(0.1)
        if left:
            words = []
            for each in left:
                with suppress(psutil.Error):
                    words.append(" ".join(each.cmdline()[:4]))
                    each.kill()
            raise TrialFailed(f"outlived the command by {GONE_S:g} s: {words}")

    def close(self) -> None:
        """End its remaining processes, after a trial that failed or came too late."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._pipes.close()
        for pipe in self._read:
            os.close(pipe)


class Workplace:
    """A folder with a corpus, and finished results for the commands that start from one."""

    def __init__(self, root: Path, clips: int) -> None:
        self.root, self.base, self.videos = root, root / "base", root / "videos"
        self.videos.mkdir(parents=True)
        labels = ["path,label,split1"]
        for folder in sorted(folder for folder in CORPUS.iterdir() if folder.is_dir())[:2]:
            for number, clip in enumerate(sorted(folder.glob("*.mp4"))[: clips // 2]):
                shutil.copy(clip, self.videos / f"{folder.name}-{number}.mp4")
                labels.append(
                    f"{folder.name}-{number}.mp4,{folder.name},{'test' if number % 3 == 0 else 'train'}"
                )
        (root / "labels.csv").write_text("\n".join(labels) + "\n")
        (root / "plan.yaml").write_text(PLAN)
        for folder, text in (
            ("modules/teachers.py", TEACHERS),
            ("modules/sitecustomize.py", COUNTER),
        ):
            (root / "modules").mkdir(exist_ok=True)
            (root / folder).write_text(text)
        # Import this package from the same folder as here, in any working folder.
        path = [str(root / "modules"), str(CORPUS.parents[2]), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }

    def commands(self) -> dict[str, Command]:
        """Return all commands by name; `recipes` holds those whose results others start from."""
        videos, one, run = str(self.videos), self.base / "one.zarr", self.base / "run"
        names = [f"teachers:{name}" for name in ("teacher", "other")]
        tiny, other = (["--teacher", name, "--teacher-option", f"{name}:k=200"] for name in names)
        extract = ["extract-targets", videos, "--every", "1", "--shard-rows", "256", *tiny]
        more = [*extract, *other]
        part, parts = (
            [[*extract, "--part", f"{i}/2"] for i in (1, 2)],
            [self.base / f"part{i}.zarr" for i in (1, 2)],
        )
        student = [f"--set={key}={value}" for key, value in STUDENT.items()]
        train = ["train-student", "--store", str(one), *student, LOOP, "--resume", "auto"]
        labels = ["--dataset", f"csv:{self.root / 'labels.csv'}", "--root", videos]
        finetune = ["finetune", *labels, *student, TEST, LOOP, "--resume", "auto"]
        dataset = f"csv:{self.root / 'labels.csv'}={videos}"
        ablate = [
            "ablate",
            str(self.root / "plan.yaml"),
            "--store",
            str(one),
            "--dataset",
            dataset,
        ]
        prepare = ["prepare", videos, "--workers", "2"]
        merge = ["targets", "merge", *map(str, parts)]
        export = ["targets", "export", str(one)]
        failed = self.base / "failed.zarr"
        self.recipes = {one: extract, run: finetune, failed: extract} | dict(
            zip(parts, part, strict=True)
        )
        demo = ["extract-targets", videos, "--teacher", "efficientnet_lite0", "--every", "8"]
        first = ["targets", "export", "s.zarr", "--teacher", "teachers-teacher"]
        changing = {"before": one, "copied": "s.zarr", "concurrent": ("s.zarr", more)}
        return {
            "extract": Command(demo, "t.zarr"),
            "extract-workers": Command([*extract, "--workers", "2"], "t.zarr"),
            "extract-teacher": Command(more, "t.zarr", before=one),
            "extract-retry": Command([*extract, "--retry-failed"], "t.zarr", before=failed),
            "extract-part": Command(part[0], "t.zarr"),
            "prepare": Command(prepare, "copies"),
            "prepare-flow": Command([*prepare, "--flow"], "flow"),
            "train": Command(train, "run"),
            "finetune": Command(finetune, "run"),
            "evaluate": Command(["evaluate", str(run), "--test-clips", "3"], "test"),
            "ablate": Command(ablate, "table"),
            "merge": Command(merge, "m.zarr", SINGLE_PROCESS),
            "export-zarr": Command(export, "e.zarr", SINGLE_PROCESS),
            "export-h5": Command(export, "e.h5", SINGLE_PROCESS),
            "export-changing": Command(first, "e.h5", SINGLE_PROCESS[:3], **changing),
        }

    def make_ready(self, command: Command) -> None:
        """Make the missing results that a command starts from."""
        for path, words in self.recipes.items():
            if (path != command.before and str(path) not in command.words) or path.exists():
                continue
            if path.name != "failed.zarr":
                self.make(words, path)
                continue
            # The file is moved, not rewritten: prepared copies record when their source changed.
            hurt = sorted(self.videos.iterdir())[1]
            hurt.rename(self.root / "aside")
            hurt.write_bytes(b"no video" * 99)
            self.make(words, path)
            (self.root / "aside").replace(hurt)

    def make(self, words: list[str], out: Path) -> Started:
        """Run a command to its end."""
        out.parent.mkdir(parents=True, exist_ok=True)
        started = Started(words, out, self.environment)
        status = started.follow()
        started.close()
        if status:
            raise TrialFailed(f"status {status} of {' '.join(words[:2])}: {started.last_line()}")
        return started


def _size(path: Path, biggest: bool = False) -> int:
    """Return the bytes of a file or folder in whole pages, as a tmpfs needs them.

    biggest: Return the bytes of the biggest file instead.
    """
    sizes = [each.stat().st_size for each in [path, *path.rglob("*")] if each.is_file()]
    return max(sizes) if biggest else sum(-(-size // 4096) * 4096 for size in sizes)


class Trials:
    """Uninterrupted results of the commands, and trials that interrupt them."""

    def __init__(self, place: Workplace, seed: int) -> None:
        self.place, self.random, self.number = place, random.Random(seed), 0
        self.commands = place.commands()
        # Seconds of the changes of the uninterrupted run, and of its end.
        self.moments: dict[str, list[float]] = {}

    def _prepared(self, command: Command, folder: Path) -> Path:
        """Copy the result that a command starts from into a folder, and return its --out."""
        out = folder / command.name
        if command.before is not None:
            shutil.copytree(command.before, folder / (command.copied or command.name))
        return out

    def whole(self, name: str) -> Path:
        """Return the uninterrupted result of a command."""
        command, folder = self.commands[name], self.place.root / "whole" / name
        if name not in self.moments:
            folder.mkdir(parents=True)
            self.place.make_ready(command)
            out = self._prepared(command, folder)
            if command.concurrent:
                self.place.make(command.concurrent[1], folder / command.concurrent[0])
            began = time.monotonic()
            done = self.place.make(command.words, out)
            self.moments[name] = [*done.changes(), time.monotonic() - began]
        return folder / command.name

    def run(self, name: str, kind: str) -> None:
        """Run one trial.

        Raises:
            TrialFailed: The trial failed.
            TooLate: The command ended before its interruption.
        """
        whole, command = self.whole(name), self.commands[name]
        self.number += 1
        folder = self.place.root / f"trial{self.number}"
        folder.mkdir()
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            if kind == "full-disk":
                before = _size(command.before) if command.before else 0
                size = before + int((_size(whole) - before) * self.random.uniform(0.02, 0.9)) + 4096
                subprocess.run(
                    ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True
                )
                stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
            out = self._prepared(command, folder)
            at = self.random.randint(1, len(self.moments[name]) - 1) if kind == "kill-change" else 0
            concurrent = command.concurrent and Started(
                command.concurrent[1], folder / command.concurrent[0], self.place.environment
            )
            started = Started(command.words, out, self.place.environment, at, group=self._group())
            try:
                getattr(self, "_" + kind.replace("-", "_"))(name, started)
                if concurrent and concurrent.follow():
                    raise TrialFailed(f"the concurrent command: {concurrent.last_line()}")
                if kind == "full-disk":
                    subprocess.run(["mount", "-o", "remount,size=90%", str(folder)], check=True)
                self.place.make(command.words, out)
                if different := differences(whole.parent, folder):
                    raise TrialFailed(f"different: {', '.join(different[:4])}")
            except TrialFailed as failed:
                raise TrialFailed(f"{failed} (after: {started.last_line()})") from None
            finally:
                for each in filter(None, (started, concurrent)):
                    each.close()

    # Kinds of interruptions

    def _kill_change(self, name: str, started: Started) -> None:
        started.follow()
        started.end()
        if started.process.returncode != -signal.SIGKILL:
            raise TooLate

    def _kill_moment(
        self, name: str, started: Started, number: signal.Signals = signal.SIGKILL
    ) -> None:
        self._wait(name, started)
        os.killpg(started.process.pid, number) if self._group() else started.process.send_signal(
            number
        )
        started.end(GONE_S if number == signal.SIGKILL else 60)

    def _signal(self, name: str, started: Started) -> None:
        self._kill_moment(name, started, self.random.choice(SIGNALS))

    def _kill_child(self, name: str, started: Started) -> None:
        self._wait(name, started)
        family = started.family()
        if not family:
            raise TooLate
        with suppress(psutil.NoSuchProcess):
            self.random.choice(family).send_signal(
                self.random.choice((signal.SIGKILL, signal.SIGSEGV))
            )
        status = started.follow()
        started.end()
        if status not in (0, 1):
            raise TrialFailed(f"status {status} after the death of a child")

    def _full_disk(self, name: str, started: Started) -> None:
        status = started.follow()
        started.end()
        if status == 0:
            if different := differences(self.whole(name).parent, started.folder):
                raise TrialFailed(
                    f"status 0 although a file could not be written: {', '.join(different[:4])}"
                )
            raise TooLate
        if status != 1 or "Traceback" in started.output():
            raise TrialFailed(f"status {status} after a file could not be written")

    def _file_limit(self, name: str, started: Started) -> None:
        limit = int(_size(self.whole(name), biggest=True) * self.random.uniform(0.02, 0.9))
        psutil.Process(started.process.pid).rlimit(psutil.RLIMIT_FSIZE, (limit, limit))
        self._full_disk(name, started)

    def _wait(self, name: str, started: Started) -> None:
        """Wait until a random moment of the work, timed from the previous change of a file."""
        moments = self.moments[name]
        moment = self.random.uniform(0.9 * moments[0], moments[-1])
        change = bisect.bisect(moments, moment)
        if started.follow(change, moment - (moments[change - 1] if change else 0)) is not None:
            raise TooLate

    def _group(self) -> bool:
        return self.number % 2 == 0


def main() -> int:
    """Run the trials; return 0 if none failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=2, help="of each kind for each command")
    parser.add_argument("--commands", nargs="+", help="default all")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--clips", type=int, default=8, help="of the demo's corpus")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no trial after so many")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # A shell that starts this script in the background, or nohup, makes its children ignore these
    # signals; the commands must not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if os.geteuid():
        args.kinds = [kind for kind in args.kinds if kind != "full-disk"]
    began = time.monotonic()
    tried, equal, late = Counter[tuple[str, str]](), Counter[tuple[str, str]](), 0
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="distinit-interrupt-") as root:
        trials = Trials(Workplace(Path(root).resolve(), args.clips), args.seed)
        names = args.commands or list(trials.commands)
        for name, kind in args.trials * [
            (n, k) for k in args.kinds for n in names if k in trials.commands[n].kinds
        ]:
            for _ in range(REDRAWN):
                if time.monotonic() - began > 60 * args.minutes:
                    break
                try:
                    trials.run(name, kind)
                    equal[name, kind] += 1
                    print(f"{time.strftime('%H:%M:%S')} equal: {name}, {kind}", flush=True)
                except TooLate:
                    late += 1
                    continue
                except (TrialFailed, OSError) as error:
                    failed.append(f"{name}, {kind}: {error}")
                    print(f"{time.strftime('%H:%M:%S')} FAILED: {failed[-1]}", flush=True)
                tried[name, kind] += 1
                break
    print(
        f"{machine()}; {sum(tried.values())} trials in {(time.monotonic() - began) / 60:.0f} minutes, {late} too late"
    )
    print(f"{'tried / equal':18}" + "".join(f"{kind:>14}" for kind in args.kinds))
    for name in names:
        print(
            f"{name:18}"
            + "".join(f"{f'{tried[name, k]} / {equal[name, k]}':>14}" for k in args.kinds)
        )
    print(f"failed: {len(failed)}")
    for line in failed:
        print(f"  {line}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
