"""Compare numbers of images that ONNX Runtime computes at a time, for a teacher on a CPU.

    python benchmarks/images_at_once.py --teacher efficientnet_lite0 --at-once 4 8 32

As in stage one, each core runs batches of 32 in a separate thread. The table has images per second
of a core, by the processor time of the threads, as medians of rounds in turn. Outputs must be equal
bit by bit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from measuring import in_turn, machine, medians, table

from distinit.pipeline.common.processes import cores
from distinit.pipeline.teachers.engines import onnx_engine
from distinit.pipeline.teachers.teacher import load_teacher
from distinit.pipeline.teachers.teacher_options import TeacherSpec

BATCH = 32


def main() -> None:
    """Print the machine and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="efficientnet_lite0")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the teacher"
    )
    parser.add_argument("--at-once", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--batches", type=int, default=3, help="per thread and round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    options = dict(option.split("=", 1) for option in args.option)
    teacher = load_teacher(TeacherSpec(name=args.teacher, options=options))
    run: Callable[..., dict[str, torch.Tensor]] = onnx_engine(teacher, if_faster=False).run
    random = np.random.default_rng(0)
    images = torch.from_numpy(
        random.integers(0, 256, (BATCH, *teacher.input_shape, 3), dtype=np.uint8)
    )
    expected = run(images, BATCH)

    def seconds(at_once: int) -> float:
        began = time.thread_time()
        for _ in range(args.batches):
            outputs = run(images, at_once)
        assert all(torch.equal(outputs[output], rows) for output, rows in expected.items())
        return time.thread_time() - began

    def measure(at_once: int) -> Callable[[], float]:
        def rate() -> float:
            with ThreadPoolExecutor(cores()) as threads:
                total = sum(threads.map(seconds, [at_once] * cores()))
            return cores() * args.batches * BATCH / total

        return rate

    rates = medians(in_turn({str(n): measure(n) for n in args.at_once}, args.rounds))
    print(machine())
    print(
        table(
            [args.teacher, *rates], [["images/s per core", *(f"{r:.1f}" for r in rates.values())]]
        )
    )


if __name__ == "__main__":
    main()
