"""Compare batches in separate threads with torch's threads for a teacher on a CPU.

    python benchmarks/teacher_on_cpu.py --teacher efficientnet_lite0

Each contender is a separate process that runs the teacher for some seconds, on idle cores and next
to as many busy processes as there are cores (like decoders). `malloc's default` is stage one
without `keep_freed_memory`. Medians of rounds in which all take turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

from measuring import in_turn, machine, medians, table

from distinit.pipeline.common.processes import cores

RUN = """
import sys, time
import numpy as np, torch
from distinit.pipeline.common import devices
from distinit.pipeline.teachers.teacher import TeacherOutput, TeacherSpec, load_teacher
from distinit.pipeline.extraction import teacher_runner
name, way, batch_size, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
if way == "default":
    teacher_runner.keep_freed_memory = lambda: None
teacher = load_teacher(TeacherSpec(name=name))
images = np.random.default_rng(0).integers(0, 255, (batch_size, *teacher.input_shape, 3), np.uint8)
count = len(__import__("os").sched_getaffinity(0))
if way == "torch":
    torch.set_num_threads(count)
    teacher.logits(images)
    began, rows = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        teacher.logits(images)
        rows += batch_size
else:
    outputs = {"t": TeacherOutput(teacher, "logits")}
    with (
        teacher_runner.batch_threads(torch.device("cpu"), count) as threads,
        teacher_runner.TeacherRunner(outputs, [teacher.view], batch_size=batch_size, threads=threads) as runner,
    ):
        teacher.logits(images)
        began, rows, waiting = time.perf_counter(), 0, []
        while time.perf_counter() - began < seconds:
            batch = runner.take()
            batch.images[0][:] = images
            batch.count = batch_size
            waiting.append(runner.submit(batch, ["t"]))
            rows += batch_size
        for future in waiting:
            future.result()
print(rows / (time.perf_counter() - began))
"""
WAYS = {
    "batches in threads": "threads",
    "the same, malloc's default": "default",
    "torch's threads": "torch",
}


def main() -> None:
    """Print the machine and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="efficientnet_lite0")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    def measure(way: str, busy: int) -> Callable[[], float]:
        def run() -> float:
            others = [
                subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)
            ]
            try:
                time.sleep(0.2)
                words = [
                    sys.executable,
                    "-c",
                    RUN,
                    args.teacher,
                    way,
                    str(args.batch_size),
                    str(args.seconds),
                ]
                return float(
                    subprocess.run(
                        words, check=True, capture_output=True, text=True
                    ).stdout.split()[-1]
                )
            finally:
                for other in others:
                    other.kill()
                    other.wait()

        return run

    ways = {(n, busy): measure(w, busy) for n, w in WAYS.items() for busy in (0, cores())}
    rate = medians(in_turn({f"{n}|{busy}": run for (n, busy), run in ways.items()}, args.rounds))
    rows = [[n, *(f"{rate[f'{n}|{busy}']:.1f}" for busy in (0, cores()))] for n in WAYS]
    print(machine())
    print(table([args.teacher, "frames/s, cores idle", f"next to {cores()} busy processes"], rows))


if __name__ == "__main__":
    main()
