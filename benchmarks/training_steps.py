"""Compare training steps with loaded clips and with a fixed batch: does the loader limit training?

    python benchmarks/training_steps.py --store STORE [--student r2plus1d_18]
        [--width 0.25] [--size 56]
        [--batch-sizes 16] [--workers 0 1] [--steps 20] [--rounds 3] [--device cuda]
        [--settings bf16-last ...] [--copies FOLDER] [--json FILE]

Both are the step of the training loop: objective, backward, clipping, optimizer. "at once" repeats
the first real batch, which is already on the device. The two take turns. On a GPU every batch size
is also run in bf16, with and without channels-last memory and torch.compile (or with the given
`--settings`), and the achieved FLOP/s are compared with those of a large matrix product of the same
type on the same device. `--copies` reads clips from the copies of `distinit prepare`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command does, before torch is loaded

import torch
from measuring import in_turn, machine, medians, table, write_json

from distinit.pipeline.common.devices import keep_freed_memory, resolve_device
from distinit.pipeline.common.distributed import SINGLE_PROCESS
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.students.student import build_student
from distinit.pipeline.students.student_options import StudentOptions
from distinit.pipeline.targets.dataset import student_clips
from distinit.pipeline.training.distillation import Distillation
from distinit.pipeline.training.dry_run import footprint
from distinit.pipeline.training.hardware import torch_threads, wrap
from distinit.pipeline.training.loader import EpochBatchSampler, read_batches, to_device
from distinit.pipeline.training.loop_options import LoopOptions
from distinit.pipeline.training.step import take_step

WARM_UP = 3


def matrix_rate(device: torch.device, precision: str, side: int) -> float:
    """Measure the FLOP/s of a product of two square matrices, the best of five times."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    rates = []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        wait(device)
        rates.append(10 * 2 * side**3 / (time.perf_counter() - began))
    return max(rates[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Trainer:
    """One student and the steps that are timed."""

    def __init__(
        self, args: argparse.Namespace, store: TargetStore, options: LoopOptions, workers: int
    ) -> None:
        self.options, self.workers = options, workers
        self.device = resolve_device(options.device)
        heads = {name: len(teacher.classes) for name, teacher in store.teachers.items()}
        chosen = StudentOptions(architecture=args.student, width=args.width)
        student = build_student(chosen, heads, clip=(args.frames, args.size))
        self.shape = (options.batch_size, 3, args.frames, args.size, args.size)
        self.cost = footprint(student, self.shape)
        self.model = wrap(student, options, self.device, SINGLE_PROCESS).train()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True
        )
        self.objective = Distillation(tuple(heads))
        copies = getattr(args, "copies", None)
        roots = dict.fromkeys(store.corpora, copies) if copies else None
        self.clips = student_clips(
            store, frames=args.frames, size=args.size, epoch_clips=10**6, video_roots=roots
        )
        self.steps = args.steps
        keys = EpochBatchSampler(batch_size=options.batch_size, steps_per_epoch=1, epochs=1)
        self.batch = next(read_batches(self.clips, keys, workers=0, device=self.device))

    def step(self, batch: dict[str, Any]) -> None:
        take_step(
            self.model,
            self.objective,
            self.optimizer,
            batch,
            1e-3,
            self.options,
            self.device,
            SINGLE_PROCESS,
        )

    def at_once(self) -> float:
        """Measure steps per second with a batch on the device."""
        ready = to_device(self.batch, self.device)
        ready |= {"weight": self.batch["weight"], "rejected": self.batch["rejected"]}
        return self._rate(itertools.repeat(ready))

    def real(self) -> float:
        """Measure steps per second with decoded clips, after the workers of the loader started."""
        keys = EpochBatchSampler(
            batch_size=self.options.batch_size, steps_per_epoch=self.steps + WARM_UP, epochs=1
        )
        with closing(
            read_batches(self.clips, keys, workers=self.workers, device=self.device)
        ) as batches:
            return self._rate(batches)

    def _rate(self, batches: Iterator[dict[str, Any]]) -> float:
        for _ in range(WARM_UP):
            self.step(next(batches))
        wait(self.device)
        began = time.perf_counter()
        for _ in range(self.steps):
            self.step(next(batches))
        wait(self.device)
        return self.steps / (time.perf_counter() - began)


SETTINGS: dict[str, dict[str, Any]] = {
    "fp32-last": {"precision": "fp32", "channels_last": True},
    "bf16": {"precision": "bf16", "channels_last": False},
    "bf16-last": {"precision": "bf16", "channels_last": True},
    "bf16-last-compiled": {"precision": "bf16", "channels_last": True, "compile": "default"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True)
    parser.add_argument("--student", default="r2plus1d_18")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[24, 32, 64, 128])
    parser.add_argument("--workers", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, help="default: all on a GPU, fp32-last on a CPU"
    )
    parser.add_argument("--copies", help="folder of `distinit prepare`")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    keep_freed_memory()
    store, device = TargetStore.open(args.store), resolve_device(args.device)
    print(machine())
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device), torch.__version__)
    rows, results = [], []
    default_settings = list(SETTINGS) if device.type == "cuda" else ["fp32-last"]
    for batch_size, workers, setting in itertools.product(
        args.batch_sizes, args.workers, args.settings or default_settings
    ):
        setting_options = SETTINGS[setting]
        options = LoopOptions(
            batch_size=batch_size,
            device=args.device,
            clip_norm=5,
            epoch_clips=10**6,
            **setting_options,
        )
        with torch_threads(None, workers, device):
            trainer = Trainer(args, store, options, workers)
            rates = medians(
                in_turn({"real": trainer.real, "at once": trainer.at_once}, args.rounds)
            )
            peak = matrix_rate(device, options.precision, 8192 if device.type == "cuda" else 1024)
        flops = trainer.cost.flops * rates["at once"] if trainer.cost else float("nan")
        results.append(
            {
                "frames": args.frames, "size": args.size, "batch_size": batch_size, "workers": workers,
                "setting": setting, "clips_per_s": {k: v * batch_size for k, v in rates.items()},
                "real_over_at_once": rates["real"] / rates["at once"], "flops_per_s": flops,
                "matrix_flops_per_s": peak, "share_of_matrix_rate": flops / peak,
            }
        )  # fmt: skip
        write_json(args.json, device, results)
        rows.append(
            [
                batch_size,
                workers,
                options.precision,
                "yes" if options.channels_last else "no",
                options.compile,
                f"{rates['real'] * batch_size:.1f}",
                f"{rates['at once'] * batch_size:.1f}",
                f"{rates['real'] / rates['at once']:.2f}",
                f"{flops / 1e12:.3f}",
                f"{flops / peak:.0%}",
            ]
        )
    head = ["clips per step", "loader processes", "precision", "channels last", "compile", "clips/s, real",
            "clips/s, at once", "real / at once", "TFLOP/s", "of the matrix rate"]  # fmt: skip
    print(table(head, rows))


if __name__ == "__main__":
    main()
