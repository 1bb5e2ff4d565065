"""Make OUT.zip, the artifacts of version 0.1 that tests read; run once, with a checkout of it.

    PYTHONPATH=LINKS:OUT python make_v01.py CORPUS OUT

LINKS holds a link `distinit` to the checkout, CORPUS is a copy of conf/demo_corpus. OUT gets a
store, a run of train-student, one of finetune, and recorded.json: what version 0.1 read from the
store, drew from it, and counted in the predictions.
No value in it depends on the processor: rows are read and not computed, draws are integers of a
counter-based generator, and targets are means of two numbers.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TEACHER = '''"""A teacher of six classes with fixed weights, for make_v01.py."""

import torch
from torch import nn


def build() -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(48, 6)
    linear.weight.data.mul_(4)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), linear)
'''
TRAINING = [
    "Clapping/full-baseline_Clapping-002-s1002.mp4",
    "Clapping/full-baseline_Clapping-004-s1004.mp4",
    "Sitting/full-baseline_Sitting-000-s1000.mp4",
    "Sitting/full-baseline_Sitting-004-s1004.mp4",
]
TESTING = [
    "Clapping/full-baseline_Clapping-003-s1003.mp4",
    "Clapping/full-lora_Clapping-000-s1000.mp4",
    "Sitting/full-baseline_Sitting-005-s1005.mp4",
    "Sitting/full-lora_Sitting-003-s1003.mp4",
]
LOOP = "--epochs 1 --epoch-clips 4 --batch-size 4 --workers 0 --device cpu --seed 5"
STUDENT = "--student r2plus1d_18 --width 0.01 --frames 8 --size 32"
DRAWS = {
    "random": {"picks": "random", "seed": 0},
    "random:2": {"picks": "random:2", "seed": 1},
    "uniform:2": {"picks": "uniform:2", "seed": 2},
    "filtered": {"picks": "random", "seed": 3, "max_entropy": {"tiny": 1.3}},
    "zero-weight": {
        "picks": "random",
        "seed": 3,
        "max_entropy": {"tiny": 1.3},
        "reject": "zero-weight",
    },
}


def distinit(line: str, cwd: Path) -> None:
    """Run one command."""
    subprocess.run([sys.executable, "-m", "distinit", *line.split()], cwd=cwd, check=True)


def record(out: Path) -> dict[str, Any]:
    """Return what version 0.1 reads from its artifacts."""
    import numpy as np

    from distinit import TargetStore, student_clips
    from distinit.pipeline.evaluation.predictions import metrics_from_file

    store = TargetStore.open(out / "store.zarr")
    videos = []
    for number in range(store.n_videos):
        frames, pts, rows = store.frames(number)
        videos.append(
            {
                "path": store.video(number).path,
                "frames": frames.tolist(),
                "pts": pts.tolist(),
                "logits": store.logits("tiny", rows).tolist(),
                "entropy": store.entropy("tiny", rows).tolist(),
            }
        )
    draws = {}
    for name, options in DRAWS.items():
        sampler = student_clips(store, frames=16, size=32, epoch_clips=6, **options).sampler
        draws[name] = [
            {
                key: value.tolist() if isinstance(value, np.ndarray) else value
                for key, value in vars(sampler.draw(epoch, sample)).items()
                if key != "logits"
            }
            | {"logits": sampler.draw(epoch, sample).logits["tiny"].tolist()}
            for epoch in (0, 1, 7)
            for sample in range(6)
        ]
    metrics = metrics_from_file(out / "finetuned" / "predictions.h5")
    return {"videos": videos, "draws": draws, "metrics": metrics}


def main() -> None:
    """Write OUT."""
    corpus, out = (Path(name).resolve() for name in sys.argv[1:])
    out.mkdir()
    (out / "tiny.py").write_text(TEACHER)
    (corpus / "unreadable.mp4").write_bytes(b"not a video")
    (corpus / "list.txt").write_text("\n".join([*TRAINING, "unreadable.mp4"]) + "\n")
    with open(corpus / "split.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split1"])
        for side, paths in (("train", TRAINING), ("test", TESTING)):
            writer.writerows([path, path.split("/")[0], side] for path in paths)
    distinit(
        f"extract-targets demo={corpus}/list.txt --out store.zarr --teacher tiny:build --every 4"
        " --teacher-option tiny:build:name=tiny --batch-size 8 --device cpu --shard-rows 256",
        cwd=out,
    )
    distinit(
        f"train-student --targets store.zarr --out student {STUDENT} {LOOP} --picks random:2"
        " --filter-quantile 0.8 --set targets.quantile_draws=40",
        cwd=out,
    )
    distinit(
        f"finetune --init student --dataset csv:{corpus}/split.csv --out finetuned {LOOP}"
        " --test-clips 2 --test-scores logits",
        cwd=out,
    )
    (out / "recorded.json").write_text(json.dumps(record(out)))
    for pattern in (
        "finetuned/checkpoints",
        "*/checkpoints/best.pt",
        "*/tensorboard",
        "tiny.py",
        "__pycache__",
    ):
        for path in out.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.make_archive(str(out), "zip", out)


if __name__ == "__main__":
    main()
