"""Profile the student's training step on a CPU, and compare other settings.

    python benchmarks/student_step.py [--student r2plus1d_18] [--widths 0.125 0.25 1]
        [--frames 8] [--size 56] [--batch-sizes 4 8 16 32] [--steps 4] [--rounds 3]

The step is that of the training loop (objective, backward, clipping, optimizer) on random clips.
For each width, the script prints the share of each kind of operator by torch.profiler at the
largest batch, and clips per second of every batch size and of other settings at the largest one, in
turn, as medians of rounds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command does, before torch is loaded

import torch
from measuring import in_turn, machine, medians, table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from distinit.pipeline.common.devices import keep_freed_memory
from distinit.pipeline.common.distributed import SINGLE_PROCESS
from distinit.pipeline.students.student import build_student
from distinit.pipeline.students.student_options import StudentOptions
from distinit.pipeline.training.batch_norm import ChannelsLastBatchNorm3d
from distinit.pipeline.training.distillation import Distillation
from distinit.pipeline.training.hardware import wrap
from distinit.pipeline.training.loop_options import LoopOptions
from distinit.pipeline.training.step import take_step

CPU = torch.device("cpu")
CLASSES = 1000
KINDS = (
    ("convolution, backward", ("convolution_backward",)),
    ("convolution, forward", ("convolution", "conv3d", "mkldnn")),
    ("batch norm", ("batch_norm", "foldedbackward")),
    ("ReLU", ("relu", "threshold", "clamp")),
    ("optimizer and clipping", ("_foreach", "linalg_vector_norm")),
    ("memory format and copies", ("copy_", "contiguous", "clone", "to_copy", "fill_", "zero_")),
)


class Step:
    """One student and a fixed batch."""

    def __init__(self, args: argparse.Namespace, width: float, batch: int, **settings: Any) -> None:
        self.threads = settings.pop("threads", torch.get_num_threads())
        own_norm = settings.pop("own_norm", True)
        clip = (args.frames, args.size)
        self.options = LoopOptions(batch_size=batch, device="cpu", clip_norm=5, **settings)
        torch.manual_seed(0)
        student = build_student(
            StudentOptions(architecture=args.student, width=width), {"t": CLASSES}, clip=clip
        )
        self.model: nn.Module = wrap(student, self.options, CPU, SINGLE_PROCESS).train()
        for module in self.model.modules():
            if isinstance(module, ChannelsLastBatchNorm3d) and not own_norm:
                module.__class__ = nn.BatchNorm3d
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True
        )
        self.objective = Distillation(("t",))
        self.batch: dict[str, Any] = {
            "clip": torch.randint(0, 256, (batch, 3, args.frames, args.size, args.size)).byte(),
            "targets": {"t": torch.randn(batch, CLASSES)},
            "weight": {"t": torch.ones(batch)},
            "rejected": torch.zeros(batch, dtype=torch.int64),
            "unreadable": [],
        }
        self.steps, self.size = args.steps, batch

    def run(self) -> None:
        take_step(
            self.model, self.objective, self.optimizer, self.batch, 1e-3, self.options, CPU,
            SINGLE_PROCESS,
        )  # fmt: skip

    def rate(self) -> float:
        """Measure clips per second, after a first step."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            self.run()
            began = time.perf_counter()
            for _ in range(self.steps):
                self.run()
            return self.steps * self.size / (time.perf_counter() - began)
        finally:
            torch.set_num_threads(before)


def shares(step: Step) -> dict[str, float]:
    """Return the share of each kind of operator in the time of steps."""
    step.run()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(step.steps):
            step.run()
    times: Counter[str] = Counter()
    for event in profiled.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS if any(w in name for w in words)), "other")
        times[kind] += event.self_cpu_time_total
    total = sum(times.values())
    return {kind: time / total for kind, time in times.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="r2plus1d_18")
    parser.add_argument("--widths", type=float, nargs="+", default=[0.125, 0.25, 1.0])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=56)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    keep_freed_memory()
    print(f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    for width in args.widths:
        largest = max(args.batch_sizes)
        print(f"width {width:g}, share of a step of {largest} clips:")
        operator_shares = shares(Step(args, width, largest))
        print(
            table(["operator", "share"], [[k, f"{v:.0%}"] for k, v in operator_shares.items()]),
            "\n",
        )
        settings: Mapping[str, Step] = {
            **{f"batches of {size}": Step(args, width, size) for size in args.batch_sizes},
            f"of {largest}, PyTorch's batch norm": Step(args, width, largest, own_norm=False),
            f"of {largest}, contiguous memory": Step(args, width, largest, channels_last=False),
            f"of {largest}, one thread": Step(args, width, largest, threads=1),
            f"of {largest}, bf16": Step(args, width, largest, precision="bf16"),
        }
        runs: dict[str, Callable[[], float]] = {name: step.rate for name, step in settings.items()}
        rates = medians(in_turn(runs, args.rounds))
        base_rate = rates[f"batches of {largest}"]
        rows = [[name, f"{rate:.1f}", f"{rate / base_rate:.2f}"] for name, rate in rates.items()]
        print(table(["setting", "clips/s", "ratio"], rows), "\n")


if __name__ == "__main__":
    main()
