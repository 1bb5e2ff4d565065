"""Compare students of logits and features, or of the views of a frame, on labelled videos.

    python benchmarks/proof/target_kinds.py FOLDER --out OUT [--compare views --only probe]

FOLDER has `labels.csv` as real_videos.py describes it, three folds by source. EfficientNet-Lite0
runs over every second frame. Each row of the comparison is a kind of target, which trains a student
per seed, with equal clips and an equal schedule (AdamW, whose steps do not depend on the scale of a
loss, cosine). `--compare kinds`: logits by cross-entropy, logits by cosine, features by cosine, and
the same features exported with `pca:128`. `--compare views`: features by cosine, of the frame's
centre, with the mirrored frame, with 4 x 4 cells, and with both. Students see all videos of FOLDER
without labels, those of the test sides too: one student serves the three folds, and what is
compared is the target alone.

Two measures, fixed before anything ran: logistic regression on the mean feature of a video's five
clips (`probe`), and finetuning, equally long for every start and for scratch. Both are the top 1 of
the three folds pooled, the mean over seeds, with a 95 % bootstrap interval over sources, and the
paired difference from the first row. After an interruption the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from folds import SPLITS, Pooled, pooled, read_labels, write_predictions
from real_videos import run_distinit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tables import of_videos

from distinit.pipeline.clips.clip_options import ClipView
from distinit.pipeline.clips.transforms import normalize_clip
from distinit.pipeline.evaluation.labelled_clips import EvaluationClips
from distinit.pipeline.evaluation.labels import load_labels
from distinit.pipeline.students.student_files import load_student

TEACHER = "efficientnet_lite0"
FEATURES = f"{TEACHER}.features"
# Name → store, teacher, loss.
COMPARISONS = {
    "kinds": {
        "logits, cross-entropy": ("targets.zarr", TEACHER, "cross-entropy"),
        "logits, cosine": ("targets.zarr", TEACHER, "cosine"),
        "features, cosine": ("targets.zarr", FEATURES, "cosine"),
        "features pca:128, cosine": ("pca128.zarr", FEATURES, "cosine"),
    },
    # If a store has mirrored frames, they are the targets of mirrored clips.
    "views": {
        "center": ("center.zarr", FEATURES, "cosine"),
        "center,flip": ("flip.zarr", FEATURES, "cosine"),
        "grid:4": ("grid.zarr", f"{FEATURES}.grid4", "cosine"),
        "grid:4,flip": ("grid-flip.zarr", f"{FEATURES}.grid4", "cosine"),
    },
}
# Store → the store that it is exported from, and the words of the command.
EXPORTED = {
    "pca128.zarr": ("targets.zarr", ("--encoding", "pca:128")),
    "center.zarr": ("views.zarr", ("--teacher", FEATURES)),
    "flip.zarr": ("views.zarr", ("--teacher", FEATURES, "--teacher", f"{FEATURES}.flip")),
    "grid.zarr": ("views.zarr", ("--teacher", f"{FEATURES}.grid4")),
    "grid-flip.zarr": (
        "views.zarr",
        ("--teacher", f"{FEATURES}.grid4", "--teacher", f"{FEATURES}.grid4.flip"),
    ),
}
OUTPUTS = {
    "targets.zarr": ("--teacher-output", "logits,features"),
    "views.zarr": ("--teacher-output", "features", "--views", "center,grid:4,flip"),
}
SCRATCH = "scratch"
LOOP = ("workers=0", "threads=1", "device=cpu", "log_every=50", "clip_norm=5")
CLIPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compare", choices=COMPARISONS, default="kinds")
    parser.add_argument("--clips", type=int, default=12_000, help="clips of stage two")
    parser.add_argument("--lr", type=float, default=0.004, help="stage two's learning rate")
    parser.add_argument("--epochs", type=int, default=20, help="of finetuning, 192 clips each")
    parser.add_argument("--finetune-lr", type=float, default=0.06)
    parser.add_argument("--width", type=float, default=0.125)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=("probe", "finetuned"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for store in dict.fromkeys(store for store, _, _ in COMPARISONS[args.compare].values()):
        make_store(args, store)
    for seed in args.seeds:
        for kind in COMPARISONS[args.compare]:
            train(args, kind, seed)
    measures = {"probe": probe, "finetuned": finetuned}
    for name in args.only or measures:
        predictions = measures[name](args)
        write_predictions(
            args.out / "predictions" / f"target-{args.compare}-{name}.csv", predictions
        )
        print(f"\n{name}\n\n{of_videos(predictions)}")


def make_store(args: argparse.Namespace, name: str) -> None:
    """Make the copies and a store of the comparison: by an extraction, or as an export."""
    source = f"{args.folder.name}={args.folder.resolve()}"
    if not (args.out / "copies" / "status.csv").exists():
        size = ("--size", "64x85", "--gop", "8")
        run_distinit("prepare", source, "--out", str(args.out / "copies"), *size, check=False)
    out = ("--out", str(args.out / name))
    if name in EXPORTED:
        whole, words = EXPORTED[name]
        make_store(args, whole)
        if not Path(out[1]).exists():
            run_distinit("targets", "export", str(args.out / whole), *out, *words)
        return
    words = ("--every", "2", "--teacher", TEACHER, *OUTPUTS[name], "--quiet")
    run_distinit("extract-targets", source, *out, *words)


def train(args: argparse.Namespace, kind: str, seed: int) -> None:
    """Train the student of a kind and a seed if it is missing; print its explained fraction."""
    store, teacher, loss = COMPARISONS[args.compare][kind]
    run = student_of(args, kind, seed)
    if not (run / "result.json").exists():
        words = ["--store", str(args.out / store), "--teacher", teacher, "--loss", loss]
        words += ["--videos", f"{args.folder.name}={args.out}/copies", "--out", str(run)]
        words += ["--set", "clips.resize=[64, 85]"]
        words += f"--width {args.width:g} --frames 8 --size 56 --seed {seed} --resume auto".split()
        words += f"--optimizer adamw --schedule cosine --lr {args.lr:g} --warmup-epochs 1".split()
        words += f"--epochs 10 --epoch-clips {args.clips // 10} --batch-size 16".split()
        run_distinit("train-student", *words, *settings(), "--quiet")
    result = json.loads((run / "result.json").read_text())
    print(f"{kind}, seed {seed}: explained {100 * result['explained_fraction']:.0f} %", flush=True)


def student_of(args: argparse.Namespace, kind: str, seed: int) -> Path:
    return Path(args.out, "students", f"{slug(kind)}-{seed}")


def slug(kind: str) -> str:
    return kind.replace(", ", "-").replace(",", "-").replace(" ", "-").replace(":", "")


def csv_of(args: argparse.Namespace) -> str:
    return f"csv:{args.folder.resolve()}/labels.csv"


def settings() -> list[str]:
    return [word for key in LOOP for word in ("--set", f"loop.{key}")]


def probe(args: argparse.Namespace) -> dict[str, Pooled]:
    """Fit a logistic regression to the students' frozen features, fold by fold."""
    rows = read_labels(args.folder)
    sides = {k: np.array([row[f"split{k}"] == "test" for row in rows]) for k in SPLITS}
    labels, sources = (
        np.array([row[key] for row in rows], dtype=object) for key in ("label", "source")
    )
    predictions = {}
    for kind in COMPARISONS[args.compare]:
        predicted = np.full((len(args.seeds), len(rows)), "", dtype=object)
        for i, seed in enumerate(args.seeds):
            means = video_features(args, student_of(args, kind, seed))
            for test in sides.values():
                model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.01))
                predicted[i, test] = model.fit(means[~test], labels[~test]).predict(means[test])
        names = [row["path"] for row in rows]
        predictions[kind] = Pooled(predicted, labels, names, sources, args.seeds)
    return predictions


@torch.no_grad()
def video_features(args: argparse.Namespace, run: Path) -> np.ndarray:
    """Return the mean feature [V, D] of the clips of each row of labels.csv."""
    student = load_student(run).eval()
    labels = load_labels(csv_of(args), copies=str(args.out / "copies"))
    videos_by_path = {video.path: video for video in (*labels.train, *labels.test)}
    videos = [videos_by_path[row["path"]] for row in read_labels(args.folder)]
    view = ClipView(size=student.meta.clip_size, resize=student.meta.resize)
    clips = EvaluationClips(labels, videos, view, clip_frames=8, clips=CLIPS)
    means = [
        student.features(normalize_clip(clips[0, i]["clips"])).mean(0) for i in range(len(videos))
    ]
    return torch.stack(means).numpy()


def finetuned(args: argparse.Namespace) -> dict[str, Pooled]:
    """Finetune every student and scratch on every fold."""
    predictions = {}
    for kind in (*COMPARISONS[args.compare], SCRATCH):
        runs = {}
        for seed in args.seeds:
            for k in SPLITS:
                run = runs[k, seed] = args.out / "finetuned" / f"{slug(kind)}-{seed}-{k}"
                if (run / "result.json").exists():
                    continue
                words = ["--dataset", csv_of(args), "--split", str(k), "--out", str(run)]
                words += ["--copies", str(args.out / "copies"), "--set", "test.workers=0"]
                words += f"--epochs {args.epochs} --step-epochs {-(-args.epochs // 3)}".split()
                words += f"--lr {args.finetune_lr:g} --warmup-epochs 1 --epoch-clips 192".split()
                words += f"--batch-size 16 --test-clips {CLIPS} --seed {seed} --resume auto".split()
                if kind == SCRATCH:
                    words += ["--width", f"{args.width:g}", "--frames", "8", "--size", "56"]
                    words += ["--set", "clips.resize=[64, 85]"]
                else:
                    words += ["--init", str(student_of(args, kind, seed))]
                run_distinit("finetune", *words, *settings(), "--quiet")
        predictions[kind] = pooled(runs, read_labels(args.folder))
    return predictions


if __name__ == "__main__":
    sys.exit(main())
