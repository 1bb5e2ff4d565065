"""Compare one extraction and N trainings from the store with N trainings with an online teacher.

    python benchmarks/offline_online.py SOURCE --store STORE [--teacher efficientnet_lite0]
        [--width 0.25] [--size 56] [--batch-size 16] [--steps 8] [--rounds 3] [--videos 300000]
        [--frames-a-video 62] [--device cuda] [--precision bf16] [--workers 12] [--copies FOLDER]
        [--json FILE]
        [--epochs 45] [--epoch-clips 1000000]

STORE holds targets of SOURCE by that teacher. Three rates are measured: frames per second of an
extraction of SOURCE (the whole stage, with its start), clips per second of training from the store,
and clips per second of the same training with the teacher run on one frame of each clip, enlarged
to its input size. The last two take turns. The hours are computed for a corpus and a schedule, by
default the paper's: 300 000 videos of 10 s, every 4th frame cached, 45 epochs of a million clips.
Both sides train on the same clips.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command does, before torch is loaded

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import in_turn, machine, medians, table, write_json
from torch.nn.functional import interpolate
from training_steps import Trainer

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.devices import keep_freed_memory, resolve_device
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.teachers.teacher import load_teacher
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.training.hardware import autocast, torch_threads
from distinit.pipeline.training.loop_options import LoopOptions
from distinit.stages.extract_targets import extract_targets

TRAININGS = (1, 5, 20)


class Online(Trainer):
    """Training with the teacher in the loop."""

    teacher: Any
    side: int

    def step(self, batch: dict[str, Any]) -> None:
        middle = batch["clip"][:, :, batch["clip"].shape[2] // 2]
        middle = middle.to(self.device, non_blocking=True).float() / 255
        with torch.inference_mode(), autocast(self.device, self.options.precision):
            self.teacher(interpolate(middle, (self.side, self.side), mode="bilinear"))
        super().step(batch)


def extraction_rate(args: argparse.Namespace) -> float:
    """Measure frames per second of the whole stage."""
    with tempfile.TemporaryDirectory() as folder:
        config = ExtractConfig(
            sources=[args.source],
            out=Path(folder) / "t.zarr",
            teachers=[TeacherSpec(name=args.teacher)],
            sampling={"every": args.every},
            device=args.device,
            precision=args.precision,
        )
        began = time.perf_counter()
        extract_targets(config, Console(quiet=True))
        return TargetStore.open(config.out).n_rows / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("--store", required=True)
    parser.add_argument("--teacher", default="efficientnet_lite0")
    parser.add_argument("--student", default="r2plus1d_18")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=56)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--videos", type=int, default=300_000)
    parser.add_argument("--frames-a-video", type=int, default=62)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--epoch-clips", type=int, default=1_000_000)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--copies", help="folder of `distinit prepare`")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    keep_freed_memory()
    print(machine())
    store = TargetStore.open(args.store)
    device = resolve_device(args.device)
    options = LoopOptions(
        batch_size=args.batch_size,
        device=args.device,
        precision=args.precision,
        clip_norm=5,
        epoch_clips=10**6,
    )
    frames = extraction_rate(args)
    teacher = load_teacher(TeacherSpec(name=args.teacher)).to(device)
    with torch_threads(None, args.workers, device):
        cached, online = (kind(args, store, options, args.workers) for kind in (Trainer, Online))
        assert isinstance(online, Online)
        online.teacher = teacher.recipe.module.eval()
        online.side = teacher.recipe.preprocessing.view.crop
        rates = medians(in_turn({"cached": cached.real, "online": online.real}, args.rounds))
    cached_rate, online_rate = (rates[name] * args.batch_size for name in ("cached", "online"))
    print(
        f"extraction {frames:.1f} frames/s; training {cached_rate:.1f} clips/s cached, {online_rate:.1f} online"
    )
    write_json(
        args.json,
        device,
        [{"extraction_frames_per_s": frames, "cached_clips_per_s": cached_rate, "online_clips_per_s": online_rate}],
    )  # fmt: skip
    extraction = args.videos * args.frames_a_video / frames / 3600
    clips = args.epochs * args.epoch_clips / 3600
    rows = []
    for n in TRAININGS:
        offline, loop = extraction + n * clips / cached_rate, n * clips / online_rate
        rows.append(
            [n, f"{extraction:.0f}", f"{offline:.0f}", f"{loop:.0f}", f"{loop / offline:.2f}"]
        )
    print(
        table(
            [
                "trainings",
                "extraction, h",
                "extraction + trainings, h",
                "teacher in the loop, h",
                "ratio",
            ],
            rows,
        )
    )


if __name__ == "__main__":
    main()
