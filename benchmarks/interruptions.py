"""Interrupt every command that writes, run it again, compare with an undisturbed run, bit by bit.

    python benchmarks/interruptions.py                 # one trial per command and kind of harm, 20 minutes or so
    python benchmarks/interruptions.py --trials 5 --commands extract train --kinds kill-change full-disk

Kinds of harm:

    kill-change   kill -9 just before the k-th change of a file that the client makes in Python, k drawn at random;
                  the client alone or, every second time, its whole process group
    kill-moment   kill -9 at a random moment, the client or the group in turn
    signal        INT, TERM, HUP or PIPE at a random moment, to the client or the group in turn
    kill-child    kill -9, or a segmentation fault, of one process that the command started: a decoder, a loader
                  process, a dask worker, ffmpeg; the command may go on
    full-disk     2 to 90 % of the space that is needed, on a small tmpfs (root) or by a limit on the size of a file

After each, all processes of the command must be gone in ten seconds. The same command, run again, must end with
status 0, and its result equal that of the undisturbed run: every array of a store, every weight, every prediction,
every copy. A trial whose command was done before the harm came is drawn again. Needs the demo's teacher
(`pip install distinit[demo]`) and, for full disks, root. Exit status 0 when nothing fell.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import psutil
from kill_and_resume import differences as differences_of_stores
from measuring import machine
from safetensors.numpy import load_file

from distinit.conf import __path__ as conf_folders

CORPUS = Path(next(iter(conf_folders))) / "demo_corpus"
GONE_S = 10.0
# Loaded by every Python that the command starts; counts the changes that the client makes, and kills at one of them.
COUNTER = """
import os, sys
if os.environ.get("INTERRUPT_PARENT") == str(os.getppid()):
    root, left = os.environ["INTERRUPT_ROOT"], [int(os.environ["INTERRUPT_AT"])]
    whole = os.environ["INTERRUPT_WHO"] == "group"
    changes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}
    def count(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in changes:
            return
        if isinstance(arguments[0], (str, bytes, os.PathLike)) and os.fsdecode(arguments[0]).startswith(root):
            left[0] -= 1
            if left[0] == 0:
                os.killpg(0, 9) if whole else os.kill(os.getpid(), 9)
    sys.addaudithook(count)
"""
TINY_TEACHER = """
import torch
from torch import nn

def teacher(k):
    torch.manual_seed(k)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, k))
"""


@dataclass(frozen=True)
class Command:
    """A command line that writes OUT, what OUT is before it, and how two results are compared."""

    words: Callable[[Path], list[str]]
    differences: Callable[[Path, Path], list[str]]
    before: Path | None = None
    name: str = "out"


def differences_of_runs(a: Path, b: Path) -> list[str]:
    """Weights, predictions and the names of files that differ between two folders of runs."""
    found = []
    names = [sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and _lasts(p)) for root in (a, b)]
    if names[0] != names[1]:
        found.append(f"other files: {sorted(set(names[0]) ^ set(names[1]))}")
    for name in sorted(set(names[0]) & set(names[1])):
        if name.endswith(".safetensors"):
            x, y = load_file(a / name), load_file(b / name)
            if x.keys() != y.keys() or any(x[key].tobytes() != y[key].tobytes() for key in x):
                found.append(name)
        elif name.endswith(".h5"):
            found += [f"{name}: {part}" for part in differences_of_hdf5(a / name, b / name)]
    return found


def _lasts(path: Path) -> bool:
    """Whether a file is a result; logs and TensorBoard's events are named after the moment."""
    return path.suffix in (".safetensors", ".h5", ".pt", ".json") or ".partial" in path.name or path.suffix == ".tmp"


def differences_of_hdf5(a: Path, b: Path) -> list[str]:
    """Data sets of two HDF5 files that differ."""

    def content(path: Path) -> dict[str, bytes]:
        arrays: dict[str, bytes] = {}

        def take(name: str, item: h5py.Dataset | h5py.Group) -> None:
            if isinstance(item, h5py.Dataset):
                arrays[name] = repr(item[()].tolist()).encode() if item.dtype.hasobject else np.asarray(item).tobytes()

        with h5py.File(path) as file:
            file.visititems(take)
        return arrays

    x, y = content(a), content(b)
    return [name for name in sorted(x.keys() | y.keys()) if x.get(name) != y.get(name)]


def differences_of_copies(a: Path, b: Path) -> list[str]:
    """Prepared copies and their maps that differ in any byte, and what one folder has alone."""
    files = [{str(p.relative_to(r)): p for p in r.rglob("*") if p.is_file()} for r in (a, b)]
    found = [f"only in one: {name}" for name in files[0].keys() ^ files[1].keys()]
    media = [name for name in files[0].keys() & files[1].keys() if name.endswith(".mp4")]
    return found + [name for name in media if files[0][name].read_bytes() != files[1][name].read_bytes()]


def differences_of_exports(a: Path, b: Path) -> list[str]:
    return differences_of_stores(a, b) if a.is_dir() else differences_of_hdf5(a, b)


class Workplace:
    """A folder with a corpus, and finished results for the commands that start from one."""

    def __init__(self, root: Path, clips: int) -> None:
        self.root, self.base = root, root / "base"
        self.videos = root / "videos"
        self.videos.mkdir(parents=True)
        labels = ["path,label,split1"]
        classes = sorted(folder for folder in CORPUS.iterdir() if folder.is_dir())[:2]
        for folder in classes:
            for number, clip in enumerate(sorted(folder.glob("*.mp4"))[: clips // 2]):
                shutil.copy(clip, self.videos / f"{folder.name}-{number}.mp4")
                labels.append(f"{folder.name}-{number}.mp4,{folder.name},{'test' if number % 3 == 0 else 'train'}")
        (root / "labels.csv").write_text("\n".join(labels) + "\n")
        (root / "modules").mkdir()
        (root / "modules" / "tiny_teacher.py").write_text(TINY_TEACHER)
        (root / "modules" / "sitecustomize.py").write_text(COUNTER)
        (root / "plan.yaml").write_text(
            "title: t\nbase:\n  finetune:\n    student: {architecture: r3d_18, width: 0.0625}\n"
            "    clips: {length: 4, size: 32}\n    test: {clips: 1, workers: 0}\n"
            "    loop: {batch_size: 4, epochs: 1, epoch_clips: 8, workers: 1, device: cpu, threads: 1}\n"
            "axes:\n  what:\n    one: {finetune.init: scratch}\n    "
            "two: {finetune.init: scratch, finetune.loop.lr: 0.1}\n"
        )
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # This package from where it is imported here, whatever the working folder.
        path = [str(root / "modules"), str(CORPUS.parents[2]), os.environ.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))

    def commands(self) -> dict[str, Command]:
        """All commands by name, after what they start from has been made."""
        videos, base = str(self.videos), self.base
        extract = ["extract-targets", videos, "--teacher", "efficientnet_lite0", "--every", "8"]
        more = [*extract, "--teacher", "tiny_teacher:teacher", "--teacher-option", "tiny_teacher:teacher:k=5"]
        tiny = ["--teacher", "tiny_teacher:teacher", "--teacher-option", "k=5"]
        shards = ["extract-targets", videos, *tiny, "--every", "1", "--shard-rows", "256"]
        loop = {"batch_size": 4, "epochs": 2, "epoch_clips": 12, "workers": 2, "device": "cpu", "threads": 1}
        loop_words = [f"--set=loop.{key}={value}" for key, value in (loop | {"checkpoint_every": 1}).items()]
        net = ["--set=clips.size=32"]
        student = ["--set=student.width=0.125", "--set=clips.length=8", *net]
        small = ["--set=student={architecture: r3d_18, width: 0.0625}", "--set=clips.length=4", *net]
        labels = ["--dataset", f"csv:{self.root / 'labels.csv'}", "--root", videos]
        test = ["--set=test.clips=2", "--set=test.workers=1"]
        one, parts, run = base / "one.zarr", [base / f"part{i}.zarr" for i in (1, 2)], base / "run"
        self.make([*extract, "--out", str(one)])
        for i, part in enumerate(parts, 1):
            self.make([*extract, "--part", f"{i}/2", "--out", str(part)])
        self.make(["finetune", *labels, *small, *loop_words, *test, "--out", str(run)])
        hurt = self.videos / sorted(os.listdir(self.videos))[1]
        whole = hurt.read_bytes()
        hurt.write_bytes(b"no video" * 99)
        self.make([*extract, "--out", str(base / "failed.zarr")])
        hurt.write_bytes(whole)
        train = ["train-student", "--targets", str(one), *student, *loop_words, "--resume", "auto"]
        store, runs = differences_of_stores, differences_of_runs
        finetune = ["finetune", *labels, *small, *loop_words, *test, "--resume", "auto"]
        ablate = ["ablate", str(self.root / "plan.yaml"), "--targets", str(one), *labels[:1], f"{labels[1]}={videos}"]
        return {
            "extract": Command(lambda out: [*extract, "--out", str(out)], store, name="t.zarr"),
            "extract-workers": Command(
                lambda out: [*shards, "--workers", "2", "--out", str(out)], store, name="t.zarr"
            ),
            "extract-teacher": Command(lambda out: [*more, "--out", str(out)], store, one, "t.zarr"),
            "extract-retry": Command(
                lambda out: [*extract, "--retry-failed", "--out", str(out)], store, base / "failed.zarr", "t.zarr"
            ),
            "extract-part": Command(lambda out: [*extract, "--part", "1/2", "--out", str(out)], store, name="t.zarr"),
            "prepare": Command(
                lambda out: ["prepare", videos, "--workers", "2", "--out", str(out)], differences_of_copies
            ),
            "train": Command(lambda out: [*train, "--out", str(out)], runs),
            "finetune": Command(lambda out: [*finetune, "--out", str(out)], runs),
            "evaluate": Command(lambda out: ["evaluate", str(run), "--out", str(out), "--test-clips", "3"], runs),
            "ablate": Command(lambda out: [*ablate, "--out", str(out)], runs),
            "merge": Command(
                lambda out: ["targets", "merge", *map(str, parts), "--out", str(out)], store, name="m.zarr"
            ),
            "export-h5": Command(
                lambda out: ["targets", "export", str(one), "--out", str(out)], differences_of_exports, name="e.h5"
            ),
            "export-zarr": Command(
                lambda out: ["targets", "export", str(one), "--out", str(out)], differences_of_exports, name="e.zarr"
            ),
        }

    def start(self, words: list[str], log: Path, limit: int | None = None, **more: str) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own. limit: bytes that a file may have."""

        def small_files() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        with open(log, "ab") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "distinit", *words],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
                env={**self.environment, **more},
                preexec_fn=small_files,
                cwd=self.root,
            )

    def make(self, words: list[str]) -> float:
        """Run a command to its end; returns its seconds."""
        began, log = time.monotonic(), self.root / "log"
        log.unlink(missing_ok=True)
        code = self.start(words, log).wait()
        if code:
            raise Fell(f"status {code} of {' '.join(words[:2])}: {_last_line(log)}")
        return time.monotonic() - began


class Fell(Exception):
    """A trial that did not hold."""


class TooLate(Exception):
    """The command was done before the harm came."""


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no word"


def _copy(before: Path | None, out: Path) -> None:
    if before is not None:
        shutil.copytree(before, out)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


class Trials:
    """Undisturbed results of the commands, and harm done to others."""

    def __init__(self, place: Workplace, seed: int) -> None:
        self.place, self.random = place, random.Random(seed)
        self.commands = place.commands()
        self.seconds: dict[str, float] = {}
        self.number = 0

    def whole(self, name: str) -> Path:
        """The undisturbed result of a command."""
        out = self.place.root / "whole" / name / self.commands[name].name
        if name not in self.seconds:
            out.parent.mkdir(parents=True)
            _copy(self.commands[name].before, out)
            self.seconds[name] = self.place.make(self.commands[name].words(out))
        return out

    def run(self, name: str, kind: str) -> None:
        """One trial. Raises Fell, or TooLate."""
        whole, command = self.whole(name), self.commands[name]
        self.number += 1
        folder = self.place.root / f"trial{self.number}"
        folder.mkdir()
        try:
            out = folder / "disk" / command.name
            mounted = kind == "full-disk" and self._mount(out.parent, whole, command.before)
            out.parent.mkdir(exist_ok=True)
            _copy(command.before, out)
            try:
                harm = getattr(self, "_" + kind.replace("-", "_"))
                harm(name, command.words(out), out, folder / "log")
                if mounted:
                    subprocess.run(["mount", "-o", "remount,size=90%", str(out.parent)], check=True)
                self._again(command, whole, out)
            finally:
                if mounted:
                    subprocess.run(["umount", "--lazy", str(out.parent)], check=True)
        except Fell as fell:
            raise Fell(f"{fell} (after: {_last_line(folder / 'log')})") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _again(self, command: Command, whole: Path, out: Path) -> None:
        """The same command once more; one that finds a finished export is content."""
        log = self.place.root / "log"
        log.unlink(missing_ok=True)
        code = self.place.start(command.words(out), log).wait()
        if code and not (command.differences is differences_of_exports and "already" in _last_line(log)):
            raise Fell(f"the same command again: status {code}, {_last_line(log)}")
        found = command.differences(whole, out)
        if found:
            raise Fell(f"different: {', '.join(found[:4])}")

    # Kinds of harm

    def _kill_change(self, name: str, words: list[str], out: Path, log: Path) -> None:
        changes = {"INTERRUPT_PARENT": str(os.getpid()), "INTERRUPT_ROOT": str(out)}
        changes |= {"INTERRUPT_AT": str(int(2 ** self.random.uniform(0, 6))), "INTERRUPT_WHO": self._who()}
        process = self.place.start(words, log, **changes)
        family = self._watched(process, None)
        self._all_gone(process, family)
        if process.returncode != -signal.SIGKILL:
            raise TooLate

    def _kill_moment(self, name: str, words: list[str], out: Path, log: Path) -> None:
        self._signalled(name, words, log, signal.SIGKILL)

    def _signal(self, name: str, words: list[str], out: Path, log: Path) -> None:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
        self._signalled(name, words, log, self.random.choice(numbers))

    def _signalled(self, name: str, words: list[str], log: Path, number: signal.Signals) -> None:
        process = self.place.start(words, log)
        family = self._watched(process, self.random.uniform(0.05, 1.0) * self.seconds[name])
        if process.poll() is not None:
            raise TooLate
        os.killpg(process.pid, number) if self._who() == "group" else process.send_signal(number)
        self._all_gone(process, family, slow=number != signal.SIGKILL)

    def _kill_child(self, name: str, words: list[str], out: Path, log: Path) -> None:
        process = self.place.start(words, log)
        family = self._watched(process, self.random.uniform(0.05, 1.0) * self.seconds[name])
        family = [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        number = self.random.choice((signal.SIGKILL, signal.SIGSEGV))
        if family:
            with suppress(psutil.NoSuchProcess):
                self.random.choice(family).send_signal(number)
        family += self._watched(process, None)
        self._all_gone(process, family)
        if not family:
            raise TooLate
        if process.returncode not in (0, 1):
            raise Fell(f"status {process.returncode} after the death of a child")

    def _full_disk(self, name: str, words: list[str], out: Path, log: Path) -> None:
        limit = None
        if not out.parent.is_mount():
            limit = max(1, int(_size(self.whole(name)) * self.random.uniform(0.02, 0.5)))
        process = self.place.start(words, log, limit)
        family = self._watched(process, None)
        self._all_gone(process, family)
        if process.returncode == 0:
            raise TooLate
        if process.returncode != 1 or "Traceback" in log.read_text(errors="replace"):
            raise Fell(f"status {process.returncode} with a full disk")

    def _who(self) -> str:
        return "group" if self.number % 2 else "client"

    def _mount(self, folder: Path, whole: Path, before: Path | None) -> bool:
        """A tmpfs with 2 to 90 % of the space that the command adds; False where only root may."""
        if os.geteuid():
            return False
        folder.mkdir()
        start = 0 if before is None else _blocks(before)
        size = start + int((_blocks(whole) - start) * self.random.uniform(0.02, 0.9)) + 2**14
        return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]).returncode == 0

    def _watched(self, process: subprocess.Popen[bytes], seconds: float | None) -> list[psutil.Process]:
        """Wait for the end of a command, or so long; returns all processes that it had in this time."""
        until = time.monotonic() + (seconds if seconds is not None else 600)
        family: set[psutil.Process] = set()
        while process.poll() is None and time.monotonic() < until:
            with suppress(psutil.Error):
                family |= set(psutil.Process(process.pid).children(recursive=True))
            time.sleep(0.05)
        if seconds is None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            raise Fell("no end after 600 s")
        return list(family)

    def _all_gone(self, process: subprocess.Popen[bytes], family: list[psutil.Process], slow: bool = False) -> None:
        try:
            process.wait(timeout=60 if slow else GONE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise Fell("does not end") from None
        left = [each for each in psutil.wait_procs(family, timeout=GONE_S)[1] if each.status() != psutil.STATUS_ZOMBIE]
        if left:
            words = [" ".join(each.cmdline()[:4]) for each in left]
            for each in left:
                each.kill()
            raise Fell(f"outlived the command by {GONE_S:g} s: {words}")


def _blocks(path: Path) -> int:
    """What a tmpfs needs for it: whole pages."""
    files = [path] if path.is_file() else list(path.rglob("*"))
    return sum(-(-each.stat().st_size // 4096) * 4096 if each.is_file() else 0 for each in files)


KINDS = ("kill-change", "kill-moment", "kill-child", "signal", "full-disk")
REDRAWN = 4  # times that a trial which came too late is drawn again


def main() -> int:
    """Exit status 0 when nothing fell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1, help="of each kind for each command")
    parser.add_argument("--commands", nargs="+", help="default all")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--clips", type=int, default=12, help="of the demo's corpus")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no trial after so many")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    tried, equal, late = Counter[tuple[str, str]](), Counter[tuple[str, str]](), 0
    fell: list[str] = []
    with tempfile.TemporaryDirectory(prefix="distinit-interrupt-") as root:
        trials = Trials(Workplace(Path(root).resolve(), args.clips), args.seed)
        names = args.commands or list(trials.commands)
        for name, kind in [(n, k) for _ in range(args.trials) for n in names for k in args.kinds]:
            for _ in range(REDRAWN):
                if time.monotonic() - began > 60 * args.minutes:
                    break
                try:
                    trials.run(name, kind)
                except TooLate:
                    late += 1
                    continue
                except Fell as error:
                    fell.append(f"{name}, {kind}: {error}")
                    print(f"FELL {fell[-1]}", flush=True)
                else:
                    equal[name, kind] += 1
                tried[name, kind] += 1
                break
    print(
        f"{machine()}; {sum(tried.values())} trials in {(time.monotonic() - began) / 60:.0f} minutes, {late} too late"
    )
    print(f"{'tried / equal':18}" + "".join(f"{kind:>14}" for kind in args.kinds))
    for name in names:
        print(f"{name:18}" + "".join(f"{f'{tried[name, k]} / {equal[name, k]}':>14}" for k in args.kinds))
    print(f"fell: {len(fell)}")
    for line in fell:
        print(f"  {line}")
    return bool(fell)


if __name__ == "__main__":
    sys.exit(main())
