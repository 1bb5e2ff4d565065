"""Check that two checkouts of distinit compute the same numbers, bit by bit.

    python benchmarks/same_numbers.py ../before . [--videos DIR] [--keep DIR]

Both checkouts run in the Python that runs this script, on the same videos: by default 14 clips of
the demo corpus. Each one extracts a store, extends one that holds fewer videos, makes prepared
copies, trains a student, trains one that is killed after its first checkpoint, finetunes and tests.
The second one then takes over what the first one made: it reads its store, extends it, resumes its
killed run and tests its model again.

The script compares the arrays of stores, copies, drawn clips and their targets, checkpoints
(weights, optimizer, identity), exported weights, predictions and metrics; floats by their bits. If
anything differs, it is listed and the exit status is 1. Only ids of stores, paths and times are
ignored.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import torch
import zarr
from measuring import machine
from safetensors import safe_open

CLIPS_PER_CLASS = 2
# Spellings of one option, the oldest first; a command line takes the one that `--help` knows.
SPELLINGS = (
    ("--targets", "--store"),
    ("--filter-quantile", "--max-entropy-quantile"),
    ("--gpu-batch-size", "--micro-batch-size"),
)
# Keys of identities and metrics that were renamed, from old to new.
RENAMED = {
    "leave_out": "exclude",
    "length": "clip_frames",
    "filter": "filter_mode",
    "nats": "max_entropy",
    "gpu_batch_size": "micro_batch_size",
    "lr_batch_size": "lr_base_batch_size",
    "loss_of_a_constant": "baseline_loss",
    "loss_of_the_targets": "loss_lower_bound",
    "learned": "explained_fraction",
    "thresholds_nats": "max_entropy",
    "broken": "unreadable",
}
# Keys that differ between equal runs: rates, times and the random id of a store.
VOLATILE = frozenset(("id", "store_id", "clips_per_s", "data_share", "eta_s", "memory_gb"))
EXTRACT = "extract-targets --teacher efficientnet_lite0 --every 4 --batch-size 8 --device cpu"
STUDENT = "--student r2plus1d_18 --width 0.125 --frames 8 --size 56"
# On two cores one loader process leaves one thread; in several, batch norm has its own backward.
LOOP = (
    "--epochs 2 --epoch-clips 16 --warmup-epochs 1 --step-epochs 1 --batch-size 4 --checkpoint-every 2"
    " --workers 1 --device cpu"
)
TRAIN = (
    f"train-student {STUDENT} {LOOP} --picks random:2 --max-entropy-quantile 0.6 --held-out 0.2"
    " --set targets.quantile_draws=50"
)
FINETUNE = f"finetune {LOOP} --test-clips 3"
DRAWS = 40
# Draws clips and reads rows through the public Python API, which is the same in all versions.
PROBE = """
import hashlib, json, sys
import numpy as np
import distinit

def digest(values):
    values = np.ascontiguousarray(values)
    return f"{values.dtype} {values.shape} {hashlib.sha256(values.tobytes()).hexdigest()}"

store = distinit.TargetStore.open(sys.argv[1])
digests = {}
for video in range(store.n_videos):
    frames, pts, rows = store.frames(video)
    digests[f"rows of {store.video_path(video)}"] = [digest(frames), digest(pts)] + [
        digest(values(name, rows)) for name in store.teachers for values in (store.logits, store.entropy)
    ]
clips = distinit.student_clips(store, frames=8, size=56, picks="random:2", seed=3)
for sample in range(int(sys.argv[2])):
    clip = clips[1, sample]
    targets = {name: digest(value.numpy()) for name, value in clip["targets"].items()}
    digests[f"clip {sample}"] = [clip["name"], int(clip["start"]), digest(clip["clip"].numpy()), targets]
print(json.dumps(digests))
"""


@dataclass(frozen=True)
class Checkout:
    """A checkout, importable as `distinit` from `home`, and the folder of its results."""

    path: Path
    home: Path
    out: Path

    @cached_property
    def environment(self) -> dict[str, str]:
        self.home.mkdir(parents=True)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.home / "distinit").symlink_to(self.path.resolve())
        return {**os.environ, "PYTHONPATH": str(self.home), "CUDA_VISIBLE_DEVICES": ""}

    def words(self, line: str, **paths: Path) -> list[str]:
        """Return the words of a command line, with options as this checkout spells them."""
        words = [word.format(**paths) for word in line.split()]
        help_text = self._call([words[0], "--help"])
        for spellings in SPELLINGS:
            known = [s for s in spellings if f" {s} " in help_text]
            words = [known[-1] if known and word in spellings else word for word in words]
        # Another engine would change the last bits.
        return [*words, "--engine", "torch"] if " --engine " in help_text else words

    def run(self, line: str, **paths: Path) -> None:
        """Run one command to its end."""
        print(f"{self.path.name}: {line.format(**paths)}", file=sys.stderr)
        self._call([*self.words(line, **paths), "--quiet"])

    def kill_after(self, file: Path, line: str, **paths: Path) -> None:
        """Run one command and kill it once it has written `file`."""
        command = [sys.executable, "-m", "distinit", *self.words(line, **paths), "--quiet"]
        process = subprocess.Popen(command, env=self.environment, cwd=self.out)
        while process.poll() is None and not file.exists():
            time.sleep(0.01)
        process.kill()
        if process.wait() == 0:
            raise RuntimeError(f"the run ended before it was killed: {line}")

    def probe(self, store: Path) -> dict[str, Any]:
        """Return digests of rows and drawn clips."""
        command = [sys.executable, "-c", PROBE, str(store), str(DRAWS)]
        return dict(json.loads(self._checked(command)))

    def _call(self, words: list[str]) -> str:
        return self._checked([sys.executable, "-m", "distinit", *words])

    def _checked(self, command: list[str]) -> str:
        process = subprocess.run(
            command, env=self.environment, cwd=self.out, capture_output=True, text=True
        )
        if process.returncode != 0:
            raise RuntimeError(f"{self.path}: {' '.join(command[3:])}: {process.stderr[-2000:]}")
        return process.stdout


def choose_videos(videos: Path | None, folder: Path) -> dict[str, Path]:
    """Return the lists of videos, a short one and one of all, and the labels of the demo corpus."""
    demo = Path(__file__).parent.parent / "conf" / "demo_corpus"
    rows: list[dict[str, str]] = []
    with open(demo / "labels.csv", newline="") as file:
        all_rows = list(csv.DictReader(file))
    for side, per_class in (("train", CLIPS_PER_CLASS), ("test", 1)):
        taken: dict[str, int] = {}
        for row in all_rows:
            if row["split1"] == side and taken.get(row["label"], 0) < per_class:
                taken[row["label"]] = taken.get(row["label"], 0) + 1
                rows.append(row | {"path": str((demo / row["path"]).resolve())})
    labels = folder / "labels.csv"
    with open(labels, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    training = [row["path"] for row in rows if row["split1"] == "train"]
    if videos is not None:
        training = sorted(str(path) for path in videos.resolve().rglob("*") if path.is_file())
    lists = {"all": folder / "all.txt", "few": folder / "few.txt"}
    lists["all"].write_text("\n".join(training) + "\n")
    lists["few"].write_text("\n".join(training[: len(training) // 2]) + "\n")
    return {**lists, "labels": labels}


def make(checkout: Checkout, inputs: dict[str, Path]) -> None:
    """Make everything that a checkout can make by itself."""
    paths = {**inputs, "out": checkout.out}
    checkout.run(f"{EXTRACT} c={{all}} --out {{out}}/store.zarr", **paths)
    checkout.run(f"{EXTRACT} c={{few}} --out {{out}}/few.zarr", **paths)
    shutil.copytree(checkout.out / "few.zarr", checkout.out / "extended.zarr")
    checkout.run(f"{EXTRACT} c={{all}} --out {{out}}/extended.zarr", **paths)
    checkout.run("prepare c={all} --out {out}/copies", **paths)
    checkout.run(f"{TRAIN} --store {{out}}/store.zarr --out {{out}}/full", **paths)
    checkout.kill_after(
        checkout.out / "half" / "checkpoints" / "last.pt",
        f"{TRAIN} --store {{out}}/store.zarr --out {{out}}/half",
        **paths,
    )
    checkout.run(
        f"{FINETUNE} --init {{out}}/full --dataset csv:{{labels}} --out {{out}}/tuned", **paths
    )
    checkout.run("evaluate {out}/tuned --test-clips 2 --out {out}/again", **paths)


def take_over(first: Checkout, second: Checkout, inputs: dict[str, Path]) -> None:
    """Let the second checkout continue and test again what the first one made."""
    taken = second.out / "taken"
    taken.mkdir()
    shutil.copytree(first.out / "few.zarr", taken / "extended.zarr")
    shutil.copytree(first.out / "half", taken / "full")
    paths = {**inputs, "out": taken, "first": first.out}
    second.run(f"{EXTRACT} c={{all}} --out {{out}}/extended.zarr", **paths)
    second.run(f"{TRAIN} --store {{first}}/store.zarr --out {{out}}/full --resume", **paths)
    second.run("evaluate {first}/tuned --test-clips 2 --out {out}/again", **paths)


def arrays_of_store(path: Path) -> dict[str, Any]:
    """Return every array of a target store."""
    group = zarr.open_group(path, mode="r")
    arrays = {str(n): a for n, a in group.members(max_depth=None) if isinstance(a, zarr.Array)}
    return {name: np.asarray(array[:]) for name, array in sorted(arrays.items())}


def identity_of_teachers(path: Path) -> dict[str, Any]:
    """Return the identity of each teacher of a store."""
    nodes = {p.parent.name: p for p in sorted(path.glob("teachers/*/zarr.json"))}
    return {
        name: json.loads(node.read_text())["attributes"]["distinit"].get("identity")
        for name, node in nodes.items()
    }


def tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a .safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118


def checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint as a tree; its identity is JSON in the file."""
    content = torch.load(path, weights_only=True, map_location="cpu")
    return {**content, "identity": json.loads(content["identity"])}


def tables(path: Path) -> dict[str, Any]:
    """Return the tables of predictions.h5."""
    with h5py.File(path) as file:
        return {name: np.asarray(table[()]) for name, table in file.items()}


def metrics(path: Path) -> list[Any]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def frames_of_copies(path: Path) -> dict[str, Any]:
    """Return the frames of every prepared copy; its other bytes may hold a version."""
    frames: dict[str, Any] = {}
    for file in sorted(path.rglob("*.mp4")):
        with av.open(str(file)) as container:
            images = [[f.pts, f.to_ndarray()] for f in container.decode(video=0)]
        frames[str(file.relative_to(path))] = images
    return frames


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value) for every leaf of a tree of dicts and lists, by new names of keys."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key not in VOLATILE:
                yield from leaves(value, f"{name}/{RENAMED.get(str(key), key)}")
    elif isinstance(tree, (list, tuple)) and not isinstance(tree, str):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{name}/{number}")
    else:
        yield name, tree


def bits(value: Any) -> Any:
    """Return a leaf in a form that is equal for leaves with the same bits."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        # Versions may store texts with different lengths.
        content = value.tolist() if value.dtype.kind in "OSTU" else value.tobytes()
        kind = "text" if value.dtype.kind in "OSTU" else str(value.dtype)
        return kind, value.shape, content
    return repr(value)


def differences(first: Any, second: Any) -> tuple[int, list[str]]:
    """Return the number of equal leaves and a line for each one that differs."""
    one, two = dict(leaves(first)), dict(leaves(second))
    lines = [f"{name}: only in the first" for name in one if name not in two]
    lines += [f"{name}: only in the second" for name in two if name not in one]
    both = [name for name in one if name in two]
    different = [name for name in both if bits(one[name]) != bits(two[name])]
    for name in different:
        short = [repr(value).replace("\n", " ")[:60] for value in (one[name], two[name])]
        lines.append(f"{name}: {short[0]} | {short[1]}")
    return len(both) - len(different), lines


def comparisons(first: Checkout, second: Checkout) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Return the comparisons: a name → a function that reads both sides."""

    def files(read: Callable[[Path], Any], name: str, taken: bool = False) -> Any:
        other = second.out / "taken" if taken else second.out
        return lambda: (read(first.out / name), read(other / name))

    return {
        "store": files(arrays_of_store, "store.zarr"),
        "store, extended": files(arrays_of_store, "extended.zarr"),
        "store of the first, extended by the second": files(
            arrays_of_store, "extended.zarr", taken=True
        ),
        "teachers": files(identity_of_teachers, "store.zarr"),
        "rows and draws": lambda: (
            first.probe(first.out / "store.zarr"),
            second.probe(second.out / "store.zarr"),
        ),
        "rows and draws of the first's store, by both": lambda: (
            first.probe(first.out / "store.zarr"),
            second.probe(first.out / "store.zarr"),
        ),
        "frames of copies": files(frames_of_copies, "copies"),
        "checkpoint": files(checkpoint, "full/checkpoints/last.pt"),
        "checkpoint, resumed by the second": files(
            checkpoint, "full/checkpoints/last.pt", taken=True
        ),
        "student": files(tensors, "full/student.safetensors"),
        "student, resumed by the second": files(tensors, "full/student.safetensors", taken=True),
        "metrics": files(metrics, "full/metrics.jsonl"),
        "finetuned model": files(tensors, "tuned/model.safetensors"),
        "finetuning metrics": files(metrics, "tuned/metrics.jsonl"),
        "predictions": files(tables, "tuned/predictions.h5"),
        "predictions, tested again": files(tables, "again/predictions.h5"),
        "predictions of the first's model by the second": files(
            tables, "again/predictions.h5", taken=True
        ),
    }


def main() -> int:
    """Run both checkouts and print the differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--videos", type=Path, help="unlabelled videos instead of the demo's")
    parser.add_argument("--keep", type=Path, help="folder to keep the results in")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = args.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        checkouts = [
            Checkout(path, folder / side / "home", folder / side / "out")
            for side, path in (("first", args.first), ("second", args.second))
        ]
        inputs = choose_videos(args.videos, folder)
        for checkout in checkouts:
            make(checkout, inputs)
        take_over(*checkouts, inputs)
        print(machine())
        for subject, read in comparisons(*checkouts).items():
            equal, lines = differences(*read())
            failed |= bool(lines)
            print(f"{subject}: {equal} equal, {len(lines)} different")
            for line in lines[:12]:
                print(f"    {line}")
            if len(lines) > 12:
                print(f"    … and {len(lines) - 12} more")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
