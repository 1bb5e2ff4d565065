"""Compare the rate of stage one, end to end, with its parts alone on the same cores.

    python benchmarks/extraction_throughput.py /data/clips
    python benchmarks/extraction_throughput.py /data/clips --precision bf16 \\
        --teacher torchvision.models:resnet50

Rates are sampled frames per second. If decoders and teachers share the cores of a CPU, a frame
costs the time of both, so the rate is at most 1 / (1/D + 1/T), where D is the rate of decoding
alone and T that of the teachers alone, each on all cores. A GPU works in parallel to the decoders:
there the bound is min(D, T). D, T and the whole are measured in turn in one process, in wall time.
The ratio of processor times per frame (decoding + teacher, over the whole) excludes waiting, and
hardly depends on the load of the machine.

`--names N` lists every video N times under different names, for devices that finish a folder in
seconds. `--json FILE` writes the rates, and the number of cores that decoding needs to keep up with
the teacher.

Goal: at least 0.90 of the bound. `torchvision.models:resnet50` has random weights, which suffice to
measure speed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from measuring import in_turn, machine, medians, processor_seconds, table, write_json

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.devices import resolve_device
from distinit.pipeline.common.processes import cores
from distinit.pipeline.corpus.sources import list_videos
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.extraction.machine import default_decoders
from distinit.pipeline.extraction.teacher_runner import TeacherRunner, batch_threads
from distinit.pipeline.teachers.engines import use_engine
from distinit.pipeline.teachers.teacher import TeacherOutput, load_teacher
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.pool.decode_pool import Block, DecodeJob, DecodePool
from distinit.pipeline.video.sampling import Sampling
from distinit.stages.extract_targets import extract_targets


class Watch(Console):
    """A quiet console that measures the time of the decoding part of an extraction."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.seconds, self.processor = 0.0, 0.0

    @contextmanager
    def progress(
        self, description: str, total: float | None = None, unit: str = ""
    ) -> Iterator[Any]:
        """Show progress like Console, and measure the time of `extracting`."""
        with super().progress(description, total, unit) as bar:
            if description != "extracting":
                yield bar
                return
            began, processor = time.perf_counter(), processor_seconds()
            yield bar
            self.seconds += time.perf_counter() - began
            self.processor += processor_seconds() - processor


class Parts:
    """The contenders for one teacher. Each returns frames per second.

    Each also records the processor time per frame.
    """

    def __init__(self, args: argparse.Namespace, name: str, folder: Path) -> None:
        self.args, self.device = args, resolve_device(args.device)
        self.spec = TeacherSpec(name=name)
        self.teacher = load_teacher(self.spec).to(self.device, args.precision)
        use_engine(self.teacher, args.engine, batch_size=args.batch_size)
        self.sampling = Sampling(every=args.every)
        self.decoders = args.decoders or default_decoders(self.device)
        self.processor: dict[str, list[float]] = {}
        listed = list_videos([args.source])
        paths = [os.path.abspath(listed.absolute(i)) for i in range(len(listed))]
        self.paths = paths + [
            _other_name(folder, path, n) for n in range(1, args.names) for path in paths
        ]

    def decode(self) -> float:
        """Decode without a teacher."""
        with DecodePool(processes=self.decoders, views=[self.teacher.view]) as pool:
            # Starts the decoding processes.
            list(pool.probe(self.paths[: 2 * self.decoders]))
            began, processor, rows = time.perf_counter(), processor_seconds(), 0
            for event in pool.stream(
                DecodeJob(i, p, self.sampling) for i, p in enumerate(self.paths)
            ):
                rows += len(event.index) if isinstance(event, Block) else 0
            return self._rate(
                "decode", rows, time.perf_counter() - began, processor_seconds() - processor
            )

    def teach(self) -> float:
        """Run the teacher on batches in memory."""
        images = np.random.default_rng(0).integers(
            0, 255, (*self.teacher.input_shape, 3), dtype=np.uint8
        )
        rows, waiting = 0, []
        with (
            batch_threads(self.device, cores()) as threads,
            TeacherRunner(
                {"t": TeacherOutput(self.teacher, "logits")},
                [self.teacher.view],
                batch_size=self.args.batch_size,
                threads=threads,
            ) as runner,
        ):
            began, processor = time.perf_counter(), processor_seconds()
            while rows == 0 or time.perf_counter() - began < self.args.seconds:
                batch = runner.take()
                batch.images[0][:] = images
                batch.count = self.args.batch_size
                waiting.append(runner.submit(batch, ["t"]))
                rows += self.args.batch_size
            for future in waiting:
                future.result()
            return self._rate(
                "teacher", rows, time.perf_counter() - began, processor_seconds() - processor
            )

    def whole(self) -> float:
        """Run stage one, from decoding to the committed store; listing and probing do not count."""
        folder = Path(tempfile.mkdtemp(prefix="distinit-speed-"))
        try:
            config = {
                "sources": self.paths,
                "out": folder / "s.zarr",
                "teachers": [self.spec],
                "sampling": self.sampling,
            }
            more = {
                "batch_size": self.args.batch_size,
                "precision": self.args.precision,
                "device": self.args.device,
                "engine": self.args.engine,
            }
            watch = Watch()
            result = extract_targets(
                ExtractConfig.model_validate({**config, **more, "decoders": self.decoders}), watch
            )
            return self._rate("whole", result["new_rows"], watch.seconds, watch.processor)
        finally:
            shutil.rmtree(folder)

    def _rate(self, part: str, rows: int, seconds: float, processor: float) -> float:
        self.processor.setdefault(part, []).append(1000 * processor / rows)
        print(
            f"{self.spec.name} {part}: {rows} frames in {seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )
        return rows / seconds

    def fit(self) -> None:
        """Select as many videos as keep the teacher busy for about `--seconds`."""
        rate = self.teach()
        few, self.paths = self.paths, self.paths[:: max(1, len(self.paths) // 16)][:16]
        with DecodePool(processes=1, views=[self.teacher.view]) as pool:
            frames = [self.sampling.rows_bound(p) for p in pool.probe(self.paths)]
        wanted = max(8, int(rate * self.args.seconds / max(1.0, float(np.mean(frames)))))
        step = max(1, len(few) // wanted)
        self.paths = few[::step][:wanted]
        self.processor.clear()


def _other_name(folder: Path, path: str, number: int) -> str:
    """Return the path of a link to a video, in one folder per number."""
    digest = hashlib.sha256(path.encode()).hexdigest()[:16]
    link = folder / str(number) / f"{digest}{Path(path).suffix}"
    link.parent.mkdir(exist_ok=True)
    if not link.exists():
        link.symlink_to(path)
    return str(link)


def main() -> None:
    """Print the machine and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a folder of videos")
    parser.add_argument(
        "--teacher",
        action="append",
        help="default: efficientnet_lite0, torchvision.models:resnet50",
    )
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument(
        "--batch-size", type=int, default=8, help="small, so that a short run has many"
    )
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--decoders", type=int, help="default: as extract-targets")
    parser.add_argument("--seconds", type=float, default=6, help="of the teacher per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", default="auto", help="as extract-targets")
    parser.add_argument("--names", type=int, default=1, metavar="N")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distinit-speed-") as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Print a table of all teachers; links to videos are made in `folder`."""
    rows, results = [], []
    for name in args.teacher or ["efficientnet_lite0", "torchvision.models:resnet50"]:
        parts = Parts(args, name, folder)
        parts.fit()
        rate = medians(
            in_turn(
                {"decode": parts.decode, "teacher": parts.teach, "whole": parts.whole}, args.rounds
            )
        )
        busy = medians(parts.processor)
        shared = parts.device.type == "cpu"
        bound = (
            1 / (1 / rate["decode"] + 1 / rate["teacher"])
            if shared
            else min(rate["decode"], rate["teacher"])
        )
        results.append(
            {
                "teacher": name, "precision": args.precision, "engine": args.engine, "batch_size": args.batch_size,
                "videos": len(parts.paths), "decoders": parts.decoders, "images_per_s": rate, "bound": bound,
                "whole_over_teacher": rate["whole"] / rate["teacher"], "whole_over_bound": rate["whole"] / bound,
                "cores_to_keep_up": rate["teacher"] * busy["decode"] / 1000, "processor_ms_per_frame": busy,
            }
        )  # fmt: skip
        write_json(args.json, parts.device, results)
        rows.append(
            [
                f"{name}, {args.precision}, {parts.device.type}",
                len(parts.paths),
                *(f"{rate[k]:.0f}" for k in ("decode", "teacher")),
                f"{bound:.1f}",
                f"{rate['whole']:.1f}",
                f"**{rate['whole'] / bound:.2f}**",
                f"{busy['decode']:.1f} + {busy['teacher']:.1f} / {busy['whole']:.1f} = "
                f"{(busy['decode'] + busy['teacher']) / busy['whole']:.2f}",
            ]
        )
    print(machine())
    head = [
        "teacher",
        "videos",
        "decoding alone",
        "teacher alone",
        "bound",
        "the whole, frames/s",
        "ratio",
    ]
    print(table([*head, "processor ms per frame"], rows))


if __name__ == "__main__":
    sys.exit(main())
