"""Compare DistInit, inflated and scratch on the object × motion corpus.

    python benchmarks/proof/motion.py --out OUT [--actions motions]

The corpus is that of motion_corpus.py. The teacher knows only the objects: it is a narrow ResNet-18
trained on still digits (object_teacher.py), from which the inflated network is made too. All three
initialisations are r3d_18 of equal width. Each has the learning rate that was best on an inner
split of the training videos (split2) with one seed, and is then trained on split1 with all seeds.
The networks are also tested on clips whose frames are shuffled or frozen, and the variation of
their first filters over time is measured. After an interruption the same command resumes.
OUT/results.json has the figures, which are printed too; OUT/reports has a page per ablation.

The primary measure, fixed before the starts were compared: top 1 on the test side of split1, the
mean over seeds, the paired difference of two starts with a 95 % bootstrap interval over videos
(each has a scan of its own).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import motion_corpus
import numpy as np
import object_teacher
import tables
import yaml
from diagnostics import of_students, select, variants
from folds import Pooled, gain, interval, runs_of, top_classes, write_predictions
from object_teacher import RESIZED, SIDE
from real_videos import run_ablation, run_distinit

from distinit.pipeline.evaluation.predictions import Predictions
from distinit.pipeline.reporting.figures.filters import variation_over_time
from distinit.pipeline.students.student_files import load_student

HERE = Path(__file__).resolve().parent
STARTS = {"DistInit": "student", "inflated": "inflate:{teacher}", "scratch": "scratch"}
RATE = 0.1  # of stage two
EPOCHS = 20  # of finetuning, 256 clips each


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backgrounds", type=Path, default=motion_corpus.DEMO)
    parser.add_argument("--width", type=float, default=0.25)
    motion_corpus.add_arguments(parser)
    parser.add_argument("--clips", type=int, default=30_000, help="clips of stage two")
    parser.add_argument(
        "--images", type=int, default=48_000, help="still images that the teacher learns from"
    )
    rates = "learning rates of finetuning to choose from, the same for every initialisation"
    parser.add_argument("--rates", nargs="+", type=float, default=[0.02, 0.05, 0.15], help=rates)
    before = f"rates that were chosen before, for {', '.join(STARTS)} and rows of --vary (default: DistInit's)"
    parser.add_argument("--chosen", nargs="+", metavar="START=RATE", help=before)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="parallel runs")
    known = variants([], RATE)
    rows = "also DistInit with one change in stage two, each with its own rate: all, or some of "
    rows += ", ".join(known)
    parser.add_argument("--vary", nargs="*", metavar="ROW", help=rows)
    args = parser.parse_args()
    vary = select(known, args.vary) if args.vary is not None else {}
    before = rates_of(args.chosen, list(vary)) if args.chosen else None
    out = args.out.resolve()
    corpus, teacher = out / "corpus", out / "object_teacher.pt"
    motion_corpus.make(corpus, args)
    if not teacher.exists():
        right = object_teacher.train(
            teacher, args.backgrounds, width=args.width, images=args.images
        )
        (out / "teacher.json").write_text(json.dumps({"accuracy": right}))
    words = ["--teacher", "object_teacher:build", "--teacher-option", f"width={args.width:g}"]
    words += ["--teacher-option", f"input_size={object_teacher.RESIZED}"]
    words += ["--teacher-option", f"resize={object_teacher.RESIZED}"]
    for key in ("mean", "std"):
        words += [
            "--teacher-option",
            f"{key}={','.join(map(str, getattr(object_teacher, key.upper())))}",
        ]
    run_distinit("extract-targets", f"motion={corpus}", "--out", str(out / "targets.zarr"), *words, "--every", "2",
                 "--teacher-weights", str(teacher), cwd=HERE)  # fmt: skip
    proof = Proof(args, out, corpus, teacher)
    chosen = before or proof.choose("choose", proof.starts)
    results = proof.compare(chosen)
    if vary:
        if before:
            rates = {
                row: chosen.get(row, chosen[keys.get("finetune.init", "DistInit")])
                for row, keys in vary.items()
            }
        else:
            rates = proof.choose("choose-varied", vary)
        results["varied"] = proof.vary(vary, chosen | rates)
    results["teacher"] = json.loads((out / "teacher.json").read_text())
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print(tables.motion(results))


def rates_of(words: list[str], rows: list[str]) -> dict[str, float]:
    """Parse `--chosen`: initialisation, or one of these rows, → learning rate.

    Raises:
        SystemExit: An initialisation is missing, a name unknown, or a rate not a positive number.
    """
    texts = dict(word.partition("=")[::2] for word in words)
    if not STARTS.keys() <= texts.keys() <= STARTS.keys() | set(rows):
        expected = f"START=RATE for each of {', '.join(STARTS)}" + (
            f" and any of {', '.join(rows)}" if rows else ""
        )
        raise SystemExit(f"--chosen {' '.join(words)}: expected {expected}")
    try:
        rates = {start: float(rate) for start, rate in texts.items()}
    except ValueError as error:
        raise SystemExit(f"--chosen {' '.join(words)}: {error}") from None
    if min(rates.values()) <= 0:
        raise SystemExit(f"--chosen {' '.join(words)}: expected rates above 0")
    return rates


class Proof:
    """The ablations, in OUT/runs."""

    def __init__(self, args: argparse.Namespace, out: Path, corpus: Path, teacher: Path) -> None:
        self.args, self.out, self.corpus = args, out, corpus
        inits = {start: init.format(teacher=teacher) for start, init in STARTS.items()}
        self.starts = {
            start: {"finetune.init": init} if start != "DistInit" else {}
            for start, init in inits.items()
        }

    def choose(self, name: str, rows: dict[str, dict[str, Any]]) -> dict[str, float]:
        """Return the learning rate with the best top 1 on the inner split for each row of a plan.

        Of equal ones the lower is chosen.
        """
        if len(self.args.rates) == 1:
            return dict.fromkeys(rows, self.args.rates[0])
        candidates = {f"{row} {lr:g}": (row, lr) for row in rows for lr in self.args.rates}
        axis = {each: rows[row] | schedule(lr) for each, (row, lr) in candidates.items()}
        scores: dict[str, dict[float, float]] = defaultdict(dict)
        for record in self.ablate(name, axis, self.args.seeds[:1], 2):
            row, lr = candidates[record["row"]]
            result = json.loads(
                (self.out / "runs" / record["finetune"] / "result.json").read_text()
            )
            scores[row][lr] = result["metrics"]["top1"]["value"]
        print(
            {
                row: {f"{lr:g}": round(v, 3) for lr, v in rates.items()}
                for row, rates in scores.items()
            }
        )
        return {
            row: max(rates, key=lambda lr: (round(rates[lr], 6), -lr))
            for row, rates in scores.items()
        }

    def compare(self, chosen: dict[str, float]) -> dict[str, Any]:
        """Measure each initialisation with frames ordered, shuffled and frozen, and its filters."""
        axis = {start: keys | schedule(chosen[start]) for start, keys in self.starts.items()}
        records = self.ablate("compare", axis, self.args.seeds, 1)
        runs = runs_of(self.out / "runs", records)
        results = {start: {"ordered": self.right(mine.values())} for start, mine in runs.items()}
        for start, mine in runs.items():
            for frames in ("shuffled", "frozen"):
                print(f"{start}, frames of the test clips {frames}:", flush=True)
                tested = [self.tested(run, frames) for run in mine.values()]
                results[start][frames] = self.right(tested)
        rows = {
            f"{start}, {frames}": p for start, mine in results.items() for frames, p in mine.items()
        }
        write_predictions(self.out / "predictions" / f"{self.args.actions}.csv", rows)
        students = {
            start: [self.student_of(run) for run in mine.values()] for start, mine in runs.items()
        }
        return {
            "rates": {start: chosen[start] for start in axis},
            "accuracy": {
                start: {
                    frames: interval(p.right.mean(axis=0), p.groups) for frames, p in mine.items()
                }
                for start, mine in results.items()
            },
            "what is right": {start: of_parts(mine["ordered"]) for start, mine in results.items()},
            "by seed": {start: mine["ordered"].by_seed.tolist() for start, mine in results.items()},
            "gain": {
                f"{a} over {b}": gain(results[a]["ordered"], results[b]["ordered"])
                for a, b in (
                    ("DistInit", "inflated"),
                    ("DistInit", "scratch"),
                    ("inflated", "scratch"),
                )
            },
            "explained_fraction": of_students(self.out / "runs", records)["explained_fraction"],
            "filters vary in time": {
                start: [variation_over_time(_first_filters(run)) for run in mine]
                for start, mine in students.items()
            },
        }

    def vary(self, rows: dict[str, dict[str, Any]], rates: dict[str, float]) -> dict[str, Any]:
        """Measure rows with one change in stage two, each finetuned with its own rate.

        The result has accuracies, gains over the unchanged row, and seconds and explained fractions
        of the students.
        """
        axis = {row: keys | schedule(rates[row]) for row, keys in ({"DistInit": {}} | rows).items()}
        records = self.ablate("vary", axis, self.args.seeds, 1)
        results = {
            row: self.right(mine.values())
            for row, mine in runs_of(self.out / "runs", records).items()
        }
        write_predictions(self.out / "predictions" / f"{self.args.actions}-varied.csv", results)
        return {
            "rates": {row: rates[row] for row in axis},
            "accuracy": {
                row: interval(p.right.mean(axis=0), p.groups) for row, p in results.items()
            },
            "by seed": {row: p.by_seed.tolist() for row, p in results.items()},
            "what is right": {row: of_parts(p) for row, p in results.items()},
            "gain": {
                row: gain(p, results["DistInit"]) for row, p in results.items() if row != "DistInit"
            },
            **of_students(self.out / "runs", records),
        }

    def ablate(
        self, name: str, axis: dict[str, Any], seeds: list[int], split: int
    ) -> list[dict[str, Any]]:
        """Run `distinit ablate` and its report in OUT/reports, and return the cells."""
        loop = {
            "clip_norm": 5.0,
            "workers": 0,
            "threads": 1,
            "device": "cpu",
            "warmup_epochs": 1,
            "gamma": 0.1,
        }
        loop |= {"batch_size": 16, "log_every": 50}
        pretraining = {
            "epochs": 10,
            "epoch_clips": self.args.clips // 10,
            "lr": RATE,
            "step_epochs": 6,
        }
        base = {
            "train-student": {
                "student": {"architecture": "r3d_18", "width": self.args.width},
                "clips": {
                    "clip_frames": 8,
                    "size": SIDE,
                    "resize": [RESIZED, RESIZED],
                    "flip": 0.0,
                },
                "exclude": str(self.corpus / "test.txt"),
                "loop": {**loop, **pretraining},
            },
            # Mirroring would turn left into right.
            "finetune": {
                "clips": {"flip": 0.0},
                "loop": {**loop, "epoch_clips": 256, "weight_decay": 0.005},
                "test": {"clips": 5, "workers": 0},
            },
        }
        plan = {
            "title": name,
            "base": base,
            "axes": {"start": axis},
            "seeds": seeds,
            "splits": [split],
        }
        file = self.out / f"{name}.yaml"
        file.write_text(yaml.safe_dump(plan, sort_keys=False))
        words = [
            "--store",
            str(self.out / "targets.zarr"),
            "--dataset",
            f"csv:{self.corpus / 'labels.csv'}",
        ]
        return run_ablation(file, self.out, words, self.args.workers, cwd=HERE)

    def tested(self, run: Path, frames: str) -> Path:
        """Test a run on clips with shuffled or frozen frames, and return the folder."""
        folder = self.out / frames / run.name
        if not (folder / "result.json").exists():
            words = ["evaluate", str(run), "--test-frames", frames, "--out", str(folder)]
            run_distinit(*words, "--device", "cpu", "--quiet", cwd=HERE)
        return folder

    def right(self, runs: Iterable[Path]) -> Pooled:
        """Collect the predictions of one fold, a run per seed."""
        predictions = [Predictions.read(run / "predictions.h5") for run in runs]
        first = predictions[0]
        order = [[each.videos.index(video) for video in first.videos] for each in predictions]
        predicted = np.array(
            [
                np.array(top_classes(each), object)[positions]
                for each, positions in zip(predictions, order, strict=True)
            ]
        )
        labels, sources = (
            np.array(first.classes, object)[first.labels],
            np.array(first.sources, object),
        )
        return Pooled(predicted, labels, first.videos, sources, self.args.seeds[: len(predictions)])

    def student_of(self, run: Path) -> Path:
        """Return the student of a run for its filters, or the finetuned network without one."""
        init = yaml.safe_load((run / "config.yaml").read_text())["finetune"]["init"]
        return Path(init) if Path(init).is_dir() else run


def schedule(lr: float) -> dict[str, Any]:
    """Return the keys of finetuning's schedule: the rate is divided by 10 after each third."""
    keys = {"epochs": EPOCHS, "lr": lr, "step_epochs": -(-EPOCHS // 3)}
    return {f"finetune.loop.{key}": value for key, value in keys.items()}


def of_parts(pooled: Pooled) -> dict[str, float]:
    """Measure how often object and motion are correct, each by itself, if labels name both."""
    if not all("-" in label for label in pooled.labels):
        return {}
    parts = {"object": 0, "motion": 2}
    of_labels = np.array([label.partition("-") for label in pooled.labels], object)
    of_predicted = np.array(
        [[each.partition("-") for each in seed] for seed in pooled.predicted], object
    )
    return {
        name: float((of_predicted[..., part] == of_labels[:, part]).mean())
        for name, part in parts.items()
    }


def _first_filters(run: Path) -> np.ndarray:
    """Return the first convolution, [filters, 3, t, h, w]."""
    return np.asarray(load_student(run).backbone.stem[0].weight.detach())


if __name__ == "__main__":
    main()
