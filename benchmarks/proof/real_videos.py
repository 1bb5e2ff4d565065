"""Compare DistInit with training from scratch on real labelled videos.

    python benchmarks/proof/real_videos.py FOLDER... --out OUT

A FOLDER has `labels.csv` with columns path, label, source, split1, split2, split3: three folds,
every video tested in one, no source on both sides. All videos of the folders (and of `--more`) are
the unlabelled corpus; the students of a split have not seen its test videos (`--seen` adds students
that have, without labels). The teacher is EfficientNet-Lite0 with its ImageNet weights. The
schedule of each initialisation is the best one on an inner split of the train side, by source, for
each data set and fold; an epoch there has two thirds of the clips, like the videos. With fewer
labels (`--shares`) it is chosen again among the same rates. `--starts scratch` with more `--epochs`
gives scratch as many clips as stages two and three have together. After an interruption the same
command resumes.

The primary measure, fixed before anything ran: top 1 of the three test folds pooled, the mean over
seeds, and the paired difference with a 95 % bootstrap interval over sources. OUT/results.json has
it, with a linear probe and finetuning on a tenth of the labels; OUT/reports a page of each
ablation. `--flow` does it with networks that see flow.

At the paper's size on a GPU, from a store and copies of short side 128 made before:

    python benchmarks/proof/real_videos.py FOLDER --out OUT --store STORE --copies COPIES \\
        --preset paper --device cuda --width 1 --size 112 --resize 128 171 --student r3d_18 \\
        --starts DistInit scratch inflated --inflate-from resnet18.pth --rates 0.02 --workers 1
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from folds import (
    SPLITS,
    few,
    gain,
    inner,
    interval,
    pooled,
    read_cells,
    read_labels,
    runs_of,
    write_excluded,
    write_predictions,
    write_rows,
)

from distinit.pipeline.common.config import preset_section

DISTINIT = "DistInit"
SCRATCH = "scratch"
INFLATED = "inflated"
EPOCH_CLIPS = 192
# Share of the labels → clips per epoch, epochs. Each video is drawn about as often.
FEW = {0.1: (48, 30), 0.3: (64, 60)}
TEACHER = "efficientnet_lite0"
STARTS = (DISTINIT, SCRATCH, INFLATED)
MEASURES = ("finetuned", "probe", "few")
RESULTS = "results.json"

Chosen = dict[tuple[int, str], tuple[int, float]]  # fold, start → epochs, learning rate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    seen = "also students that have seen the test videos without labels"
    parser.add_argument("--seen", action="store_true", help=seen)
    candidates = (
        "a start has the best of these, each with each of the {}; one candidate: nothing is chosen"
    )
    epochs = f"epochs of {EPOCH_CLIPS} clips: " + candidates.format("rates")
    parser.add_argument("--epochs", type=int, nargs="+", default=[60], help=epochs)
    rates = "learning rates of finetuning: " + candidates.format("epochs")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.06], help=rates)
    parser.add_argument(
        "--starts", nargs="+", choices=STARTS, default=STARTS[:2], help="some of the starts"
    )
    parser.add_argument(
        "--only", nargs="+", choices=MEASURES, default=MEASURES, help="some of the measures"
    )
    shares = "shares of the labels that `few` has, of {}"
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.1], choices=FEW, help=shares.format(list(FEW))
    )
    parser.add_argument("--flow", action="store_true", help="networks see flow, from either start")
    args = parser.parse_args()
    if args.seen and DISTINIT not in args.starts:
        parser.error(f"--seen: students are those of {DISTINIT}, which --starts does not name")
    measured = folders_of(args)
    out = args.out.resolve()
    lists = out / "lists"
    lists.mkdir(parents=True, exist_ok=True)
    began = time.time()
    sources = [f"{folder.name}={folder.resolve()}" for folder in [*args.folders, *args.more]]
    if not args.store:
        prepare_words = [
            "prepare",
            *sources,
            "--out",
            str(out / "copies"),
            "--size",
            "64x85",
            "--gop",
            "8",
        ]
        # Unreadable files are listed and skipped, with exit status 1.
        run_distinit(*prepare_words, check=False)
        extract_words = [
            "extract-targets",
            *sources,
            "--out",
            str(out / "targets.zarr"),
            "--every",
            "2",
        ]
        run_distinit(*extract_words, "--teacher", TEACHER, check=False)
    write_excluded(lists, args.folders)
    corpora = [source.partition("=")[0] for source in sources]
    proof = Proof(args, out, lists, corpora, flow=args.flow)
    measures = {"finetuned": proof.compare, "probe": proof.probe, "few": proof.few_labels}
    for name in args.only:
        for folder in measured:
            measures[name](folder)
    for folder in measured if args.seen else ():
        proof.seen(folder)
    print(json.dumps(proof.results, indent=1))
    print(f"{(time.time() - began) / 60:.0f} minutes in this run")


class Proof:
    """The ablations, all in OUT/runs, so that they share students."""

    def __init__(
        self,
        args: argparse.Namespace,
        out: Path,
        lists: Path,
        corpora: list[str],
        *,
        flow: bool = False,
    ) -> None:
        self.args, self.out, self.lists, self.corpora, self.flow = args, out, lists, corpora, flow
        kept = out / RESULTS
        self.results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
        self.chosen: dict[tuple[str, float], Chosen] = {}  # by data set and share of its labels

    def schedules(self, folder: Path, share: float = 1) -> Chosen:
        """Return the schedules of `choose`, which runs once."""
        key = (folder.name, share)
        if key not in self.chosen:
            self.chosen[key] = self.choose(folder, share)
        return self.chosen[key]

    def choose(self, folder: Path, share: float) -> Chosen:
        """Choose the schedule of each initialisation by top 1 on the inner test side, per fold.

        Networks are trained on a share of the inner train side; of equal schedules the first wins.
        """
        some = share < 1
        clips, epochs = (EPOCH_CLIPS, sorted(self.args.epochs))
        if some:
            clips, epochs = FEW[share][0], [FEW[share][1]]
        candidates = [(length, lr) for length in epochs for lr in sorted(self.args.rates)]
        if len(candidates) == 1:
            return {(k, name): candidates[0] for k in SPLITS for name in self.args.starts}
        videos = inner(read_labels(folder))
        prefix = f"share{share:g}-" if some else ""
        labels = write_rows(
            self.lists / f"{prefix}inner-{folder.name}.csv", few(videos, share) if some else videos
        )
        rows = {
            f"{name} {length} {lr:g}": (name, length, lr)
            for name in self.args.starts
            for length, lr in candidates
        }
        axis = {
            row: self.start(*mine) | {"finetune.loop.epoch_clips": clips * 2 // 3}
            for row, mine in rows.items()
        }
        name = f"{prefix}choose-{folder.name}" + ("" if some else f"-{self.length}")
        records = self.ablate(name, axis, labels, folder, seeds=[self.args.seeds[0]])
        chosen: Chosen = {}
        for k in SPLITS:
            scores: dict[str, float] = {}
            for record in records:
                if record["split"] == k and record["status"] == "done":
                    result = json.loads(
                        (self.out / "runs" / record["finetune"] / "result.json").read_text()
                    )
                    scores[record["row"]] = result["metrics"]["top1"]["value"]
            for each in self.args.starts:
                mine = [(row, rows[row][1:]) for row in scores if rows[row][0] == each]
                best = max(
                    mine, key=lambda item: round(scores[item[0]], 6)
                )  # the first of equal ones
                chosen[k, each] = best[1]
            print(
                f"{prefix}{folder.name}, fold {k}: {scores} -> {[chosen[k, each] for each in self.args.starts]}"
            )
        return chosen

    def compare(self, folder: Path) -> None:
        """Compute the primary measure."""
        self.measure(f"finetuned for {self.length}", folder, folder / "labels.csv", {})

    def probe(self, folder: Path) -> None:
        """Train only the head."""
        more = {
            "finetune.freeze": "backbone",
            "finetune.loop.epochs": 10,
            "finetune.loop.step_epochs": 4,
        }
        more["finetune.loop.lr"] = 0.1
        self.measure("linear probe", folder, folder / "labels.csv", more)

    def few_labels(self, folder: Path) -> None:
        """Finetune on a tenth of the labels, or on the given shares."""
        for share in self.args.shares:
            labels = write_rows(
                self.lists / f"share{share:g}-{folder.name}.csv", few(read_labels(folder), share)
            )
            more = {"finetune.loop.epoch_clips": FEW[share][0]}
            self.measure(f"{share:.0%} of the labels", folder, labels, more, share=share)

    def measure(
        self, name: str, folder: Path, labels: Path, more: dict[str, Any], *, share: float = 1
    ) -> None:
        """Run all folds and seeds with the schedules for a share of labels, and pool them."""
        chosen = self.schedules(folder, share)
        run_folders: dict[str, dict[tuple[int, int], Path]] = {}
        for k in SPLITS:
            axis = {init: self.start(init, *chosen[k, init]) | more for init in self.args.starts}
            records = self.ablate(
                f"{name}-{folder.name}-{k}", axis, labels, folder, seeds=self.args.seeds, split=k
            )
            for row, mine in runs_of(self.out / "runs", records).items():
                run_folders.setdefault(row, {}).update(mine)
        rows = read_labels(folder)
        pooled_rows = {row: pooled(runs, rows) for row, runs in run_folders.items()}
        name = self.named(name)
        write_predictions(
            self.out / "predictions" / f"{folder.name}-{_slug(name)}.csv", pooled_rows
        )
        self.results.setdefault(name, {})[folder.name] = {
            "accuracy": {
                row: interval(p.right.mean(axis=0), p.groups) for row, p in pooled_rows.items()
            },
            "by seed": {row: p.by_seed.tolist() for row, p in pooled_rows.items()},
            "gain": {
                row: gain(pooled_rows[DISTINIT], p)
                for row, p in pooled_rows.items()
                if DISTINIT in pooled_rows and row != DISTINIT
            },
            "schedules": {
                f"fold {k}": {init: chosen[k, init] for init in self.args.starts} for k in SPLITS
            },
        }
        self.write()
        print(name, folder.name, json.dumps(self.results[name][folder.name]["accuracy"]))

    def write(self) -> None:
        """Write OUT/results.json with all results so far, also those of earlier runs into OUT."""
        (self.out / RESULTS).write_text(json.dumps(self.results, indent=1))

    def seen(self, folder: Path) -> None:
        """Measure DistInit with students that have seen the test videos without their labels."""
        runs: dict[tuple[int, int], Path] = {}
        for k in SPLITS:
            axis = {DISTINIT: self.start(DISTINIT, *self.schedules(folder)[k, DISTINIT])}
            name, labels = f"seen-{folder.name}-{k}", folder / "labels.csv"
            records = self.ablate(
                name, axis, labels, folder, seeds=self.args.seeds, split=k, seen=True
            )
            runs.update(runs_of(self.out / "runs", records)[DISTINIT])
        predictions = pooled(runs, read_labels(folder))
        write_predictions(
            self.out / "predictions" / f"{folder.name}-{_slug(self.named('seen'))}.csv",
            {DISTINIT: predictions},
        )
        self.results.setdefault(self.named("test videos seen"), {})[folder.name] = {
            "accuracy": {DISTINIT: interval(predictions.right.mean(axis=0), predictions.groups)},
            "by seed": {DISTINIT: predictions.by_seed.tolist()},
        }
        self.write()

    def ablate(
        self,
        name: str,
        axis: dict[str, Any],
        labels: Path,
        root: Path,
        *,
        seeds: list[int],
        split: int | None = None,
        seen: bool = False,
    ) -> list[dict[str, Any]]:
        """Run one ablation over a plan that is stored in OUT/plans, and return its cells."""
        plans = self.out / "plans"
        plans.mkdir(exist_ok=True)
        name = self.named(name)
        plan = {
            "title": name,
            "base": self.base(seen=seen),
            "axes": {"start": axis},
            "seeds": seeds,
        }
        plan["splits"] = [split] if split is not None else list(SPLITS)
        file = plans / f"{_slug(name)}.yaml"
        file.write_text(yaml.safe_dump(plan, sort_keys=False))
        words = ["--store", str(self.args.store or self.out / "targets.zarr")]
        for corpus in self.corpora:
            words += ["--videos", f"{corpus}={self.copies}"]
        words += ["--dataset", f"csv:{labels.resolve()}={root.resolve()}"]
        return run_ablation(file, self.out, words, self.args.workers)

    def tested(self, run: Path, frames: str) -> Path:
        """Test a run on clips with shuffled or frozen frames, and return the folder."""
        folder = self.out / frames / run.name
        if not (folder / "result.json").exists():
            words = ["evaluate", str(run), "--test-frames", frames, "--out", str(folder)]
            run_distinit(*words, "--device", self.args.device, "--quiet")
        return folder

    def named(self, name: str) -> str:
        """Return the name of a measure, with a suffix for students of flow."""
        return f"flow {name}" if self.flow else name

    @property
    def length(self) -> str:
        """Return the numbers of epochs of finetuning, in words."""
        return " or ".join(map(str, sorted(self.args.epochs))) + " epochs"

    @property
    def copies(self) -> Path:
        return (self.args.copies or self.out / "copies").resolve()

    def base(self, *, seen: bool = False) -> dict[str, Any]:
        """Return the options of all runs; with `seen`, students have seen the test videos."""
        loop = {
            "clip_norm": 5.0,
            "workers": self.args.loaders,
            "threads": 1,
            "device": self.args.device,
            "precision": self.args.precision,
            "warmup_epochs": 1,
            "log_every": 50,
        }
        pretraining = {
            "batch_size": 16,
            "epochs": 10,
            "epoch_clips": self.args.clips // 10,
            "lr": self.args.lr,
        }
        student: dict[str, Any] = {
            "student": {"width": self.args.width, "architecture": self.args.student},
            "clips": {"clip_frames": 8, "size": self.args.size, "resize": self.args.resize},
            "targets": {"teachers": [TEACHER]},  # diagnostics.py may have added another
            "loop": {**loop, **pretraining, "step_epochs": 6, "gamma": 0.1},
        }
        if self.args.preset is not None:
            student |= self.by_preset(loop)
        if self.flow:
            student["student"]["channels"] = 2
        if not seen:
            student["exclude"] = str(self.lists / "test{split}.txt")
        tuning = {
            "copies": str(self.copies),
            "loop": {
                **loop,
                "batch_size": 16,
                "epoch_clips": EPOCH_CLIPS,
                "gamma": 0.1,
                "weight_decay": 0.005,
            },
            "test": {"clips": 5, "workers": self.args.loaders},
        }
        return {"train-student": student, "finetune": tuning}

    def by_preset(self, loop: dict[str, Any]) -> dict[str, Any]:
        """Return the keys of students by `--preset`, with the clips and the batch of this proof."""
        epochs = preset_section(self.args.preset, "train-student")["loop"]["epochs"]
        machine = ("workers", "threads", "device", "precision", "log_every", "clip_norm")
        changed = {
            "batch_size": self.args.batch_size,
            "micro_batch_size": None,
            "lr": self.args.lr,
            "epoch_clips": max(self.args.batch_size, self.args.clips // epochs),
        }
        student = {
            "width": self.args.width,
            "architecture": self.args.student,
            "variant": "torchvision",
        }
        return {
            "preset": self.args.preset,
            "student": student,
            "loop": {**{key: loop[key] for key in machine}, **changed},
        }

    def start(self, name: str, epochs: int, lr: float) -> dict[str, Any]:
        """Return the keys of finetuning from an initialisation, see `start`."""
        keys = start(name, epochs, lr)
        if name == INFLATED:
            keys["finetune.init"] = f"inflate:{self.args.inflate_from}"
        return keys


def _slug(name: str) -> str:
    return name.replace(" ", "-").replace("%", "")


def start(name: str, epochs: int, lr: float) -> dict[str, Any]:
    """Return the keys of finetuning: initialisation, epochs, and rate, divided by 10 per third."""
    keys: dict[str, Any] = {"finetune.loop.epochs": epochs, "finetune.loop.lr": lr}
    keys["finetune.loop.step_epochs"] = -(-epochs // 3)
    return keys | ({"finetune.init": "scratch"} if name == SCRATCH else {})


def run_distinit(*words: str, check: bool = True, cwd: Path | None = None) -> None:
    """Run a command; with `check=False` exit status 1 (skipped files) is accepted.

    Raises:
        SystemExit: It failed.
    """
    process = subprocess.run([sys.executable, "-m", "distinit", *words], cwd=cwd)
    if process.returncode and (check or process.returncode != 1):
        raise SystemExit(f"distinit {words[0]} ended with {process.returncode}")


def run_ablation(
    plan: Path, out: Path, words: list[str], workers: int, cwd: Path | None = None
) -> list[dict[str, Any]]:
    """Run `distinit ablate` in OUT/runs and `distinit report` in OUT/reports.

    A failed report does not end the proof.

    Returns:
        The cells, which are also stored next to the plan.
    """
    side_by_side = ["--workers", str(workers)] if workers > 1 else []
    run_distinit("ablate", str(plan), *words, "--out", str(out / "runs"), *side_by_side, cwd=cwd)
    cells = plan.with_suffix(".cells.json")
    shutil.copy(out / "runs" / "cells.json", cells)
    page = out / "reports" / plan.stem
    run_distinit("report", str(out / "runs"), "--out", str(page), "--quiet", check=False)
    return read_cells(cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that diagnostics.py has too."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--more", nargs="*", type=Path, default=[], help="more folders of unlabelled videos"
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        metavar="NAME",
        help="the labelled sets to measure; default all",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--store", type=Path, help="an existing store, with --copies; by default both are made"
    )
    parser.add_argument("--copies", type=Path)
    parser.add_argument("--width", type=float, default=0.125)
    parser.add_argument("--clips", type=int, default=25_000, help="clips of stage two")
    parser.add_argument("--lr", type=float, default=0.3, help="stage two's learning rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="parallel runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--loaders", type=int, default=0, help="loader processes of a run")
    parser.add_argument("--student", default="r2plus1d_18")
    parser.add_argument("--size", type=int, default=56, help="side of a clip")
    parser.add_argument("--resize", type=int, nargs=2, default=[64, 85], metavar=("H", "W"))
    parser.add_argument("--preset", help="of train-student, such as paper")
    parser.add_argument("--batch-size", type=int, default=96, help="of students with --preset")
    parser.add_argument(
        "--inflate-from",
        default="resnet18",
        help="weights of the start `inflated`: resnet18 or a file",
    )


def folders_of(args: argparse.Namespace) -> list[Path]:
    """Return the folders to measure, by `--sets`.

    Raises:
        SystemExit: A name is not that of a folder.
    """
    known = [folder.name for folder in args.folders]
    for name in args.sets or ():
        if name not in known:
            raise SystemExit(f"--sets {name}: not one of {', '.join(known)}")
    return [folder for folder in args.folders if folder.name in (args.sets or known)]


if __name__ == "__main__":
    main()
