"""Measure the loader of stage two: the cost of cached targets, their gain, and its memory.

    python benchmarks/loader.py /data/clips targets  # cached targets against the bare decode
    python benchmarks/loader.py /data/clips flat     # ten thousand clips: does memory grow?
    python benchmarks/loader.py /data/clips size     # memory and first batch by number of videos

`targets` and `flat` take the first --videos of the folder, extract every 4th frame with a small
linear teacher of 1000 classes, and read 8-frame clips from the videos and from prepared copies.
`size` makes stores of 10^3 and 10^6 videos whose paths all lead to a few of the folder's videos.
Times are processor time unless noted; contenders take turns.
Goals: targets under 3 % of the bare decode; memory that neither grows nor depends on the number of
videos.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Set before torch is imported, because its threads would spin in a contender's processor time.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import psutil
import torch
from large_store import make
from measuring import in_turn, machine, medians, table
from torchvision.models import resnet50

from distinit.pipeline.clips.clip_options import ClipView, Crop
from distinit.pipeline.clips.read import read_clip
from distinit.pipeline.common.console import Console
from distinit.pipeline.corpus.sources import list_videos
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.prepared.folders import VideoFile
from distinit.pipeline.prepared.prepare_options import PrepareConfig
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.targets.dataset import StudentClips, _Plan
from distinit.pipeline.targets.picks import PickRule
from distinit.pipeline.targets.sampler import ClipSample, TargetSampler
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.training.loader import EpochBatchSampler, read_batches
from distinit.pipeline.video.frames import count_frames, read_frames
from distinit.pipeline.video.geometry import View
from distinit.stages.extract_targets import extract_targets
from distinit.stages.prepare import prepare

VIEW, CPU = ClipView(), torch.device("cpu")
TEACHER = """
import torch
from torch import nn


def teacher():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 1000))
"""


def sampler_of(store: TargetStore, epoch_clips: int | None = None) -> TargetSampler:
    """Return a sampler of random picks from all videos with 8-frame clips."""
    videos = store.usable()
    return TargetSampler(
        store, teachers=tuple(store.teachers), picks=PickRule.parse("random"), clip_frames=8, videos=videos, seed=0,
        epoch_clips=epoch_clips or len(videos),
    )  # fmt: skip


def build(source: str, count: int, folder: Path) -> tuple[TargetStore, Path]:
    """Make a store of the first videos of a folder, and their copies."""
    (folder / "linear_teacher.py").write_text(TEACHER)
    sys.path.insert(0, str(folder))
    listed = list_videos([source])
    paths = [listed.absolute(i) for i in range(min(count, len(listed)))]
    (folder / "list.txt").write_text("\n".join(paths) + "\n")
    spec = TeacherSpec(name="linear_teacher:teacher", options={"input_size": "112"})
    quiet = Console(quiet=True)
    sources = [f"v=@{folder / 'list.txt'}"]
    extract_targets(
        ExtractConfig(sources=sources, out=folder / "targets.zarr", teachers=[spec]), quiet
    )
    prepare(PrepareConfig.model_validate({"sources": sources, "out": folder / "small"}), quiet)
    return TargetStore.open(str(folder / "targets.zarr")), folder / "small"


def targets(source: str, videos: int, rounds: int, count: int) -> None:
    """Measure the cost of targets, and of an online teacher."""
    with tempfile.TemporaryDirectory() as name:
        store, small = build(source, videos, Path(name))
        net = resnet50().eval()
        rows: list[list[object]] = []
        for where, video_roots in (("videos", None), ("prepared copies", {"v": str(small)})):
            clips = StudentClips(sampler_of(store, count), VIEW, video_roots)
            drawn = [clips.sampler.draw(0, k) for k in range(count)]

            def bare(clips: StudentClips = clips, drawn: list[ClipSample] = drawn) -> float:
                began = time.process_time()
                for draw in drawn:
                    read_clip(
                        clips.file(draw.video),
                        draw.indices,
                        VIEW,
                        crop=Crop(draw.top, draw.left, draw.flip),
                    )
                return (time.process_time() - began) / len(drawn) * 1000

            def cached(clips: StudentClips = clips) -> float:
                clips.sampler._known.clear()
                began = time.process_time()
                for first in range(0, count, 10):
                    clips.__getitems__([(0, k) for k in range(first, min(first + 10, count))])
                return (time.process_time() - began) / count * 1000

            @torch.inference_mode()
            def online(clips: StudentClips = clips, drawn: list[ClipSample] = drawn) -> float:
                """Read a clip and its picked frame at 224 pixels, for a ResNet-50."""
                began = time.process_time()
                few, images = drawn[:16], []
                for draw in few:
                    read_clip(
                        clips.file(draw.video),
                        draw.indices,
                        VIEW,
                        crop=Crop(draw.top, draw.left, draw.flip),
                    )
                    path = store.video_path(draw.video)
                    images.append(
                        read_frames(path, draw.picked[:1], View(resize=256, crop=224)).images[0]
                    )
                net(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255))
                return (time.process_time() - began) / len(few) * 1000

            # Lists the packets of all videos, so that both contenders begin with them.
            bare()
            costs = medians(in_turn({"bare decode": bare, "cached targets": cached}, rounds))
            costs |= medians(in_turn({"online ResNet-50, fp32": online}, max(2, rounds // 3)))
            for contender, milliseconds in costs.items():
                overhead = milliseconds / costs["bare decode"] - 1
                rows.append(
                    [
                        where,
                        contender,
                        f"{milliseconds:.2f}",
                        f"{1000 / milliseconds:.1f}",
                        f"{overhead:+.1%}",
                    ]
                )
        print(machine())
        print(
            table(
                ["from", "contender", "ms per clip", "clips/s per core", "over bare decode"], rows
            )
        )


def workers_memory() -> list[tuple[float, float]]:
    """Return (unshared, resident) memory of each child process in MB."""
    sizes = []
    for child in psutil.Process().children():
        memory = child.memory_full_info()
        sizes.append((memory.uss / 1e6, memory.rss / 1e6))
    return sizes


def flat(source: str, videos: int, count: int) -> None:
    """Measure the memory of 2 workers and of the main process over many clips."""
    with tempfile.TemporaryDirectory() as name:
        store, small = build(source, videos, Path(name))
        rows: list[list[object]] = []
        for where, video_roots, clips_read in (
            ("prepared copies", {"v": str(small)}, count),
            ("videos", None, count // 5),
        ):
            clips = StudentClips(sampler_of(store), VIEW, video_roots)
            steps = EpochBatchSampler(batch_size=10, steps_per_epoch=clips_read // 10, epochs=1)
            began = time.monotonic()
            for step, _ in enumerate(read_batches(clips, steps, workers=2, device=CPU), 1):
                if step in (10, 100) or step * 10 % (clips_read // 5) == 0:
                    memory = workers_memory()
                    main = psutil.Process().memory_info().rss / 1e6
                    rows.append([where, step * 10, *(f"{uss:.0f}" for uss, _ in memory), f"{main:.0f}",
                                 f"{time.monotonic() - began:.0f}"])  # fmt: skip
                    print(" | ".join(map(str, rows[-1])), file=sys.stderr, flush=True)
        print(machine())
        print(
            table(
                [
                    "from",
                    "clips",
                    "worker 1: private MB",
                    "worker 2",
                    "main process: MB",
                    "seconds",
                ],
                rows,
            )
        )


class OneOfFew(StudentClips):
    """Clips of a store whose videos are mapped to a few existing ones."""

    files: list[str]

    def file(self, video: int) -> VideoFile:
        return VideoFile(self.files[video % len(self.files)])

    def _clip(self, plan: _Plan) -> torch.Tensor:
        return read_clip(plan.file, plan.draw.indices, VIEW, crop=plan.crop)


def size(source: str, numbers: list[int]) -> None:
    """Measure the memory of a worker by the number of videos."""
    listed = list_videos([source])
    files = [listed.absolute(i) for i in range(len(listed))]
    files = [file for file in files[:40] if count_frames(file) >= 32][:8]
    rows: list[list[object]] = []
    for number in numbers:
        with tempfile.TemporaryDirectory() as name:
            make(Path(name, "big.zarr"), number, 8)
            _link_logits(Path(name, "big.zarr", "teachers/t/logits/c"))
            began = time.monotonic()
            store = TargetStore.open(str(Path(name, "big.zarr")))
            opened = time.monotonic() - began
            clips = OneOfFew(sampler_of(store), VIEW)
            clips.files = files
            steps = EpochBatchSampler(batch_size=10, steps_per_epoch=50, epochs=1)
            memory: list[Any] = []
            began = time.monotonic()
            for step, _ in enumerate(read_batches(clips, steps, workers=2, device=CPU), 1):
                if step == 1:
                    first = time.monotonic() - began
                if step == 40:
                    memory = workers_memory()
            main = psutil.Process().memory_info().rss / 1e6
            rows.append(
                [
                    number,
                    f"{opened:.2f}",
                    f"{first:.2f}",
                    f"{max(m[0] for m in memory):.0f}",
                    f"{main:.0f}",
                ]
            )
            print(" | ".join(map(str, rows[-1])), file=sys.stderr, flush=True)
    print(machine())
    print(
        table(
            [
                "videos",
                "opened in s",
                "first batch after s",
                "worker: private MB",
                "main process: MB",
            ],
            rows,
        )
    )


def _link_logits(shards: Path) -> None:
    """Link the logits of the last shard, the only ones that `make` writes, to all shards."""
    last = max(shards.iterdir(), key=lambda shard: int(shard.name))
    for number in range(int(last.name)):
        (shards / str(number)).mkdir(exist_ok=True)
        if not (shards / str(number) / "0").exists():
            os.link(last / "0", shards / str(number) / "0")


def main() -> None:
    """Run one of the three measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a folder of videos")
    parser.add_argument("what", choices=("targets", "flat", "size"))
    parser.add_argument("--videos", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clips", type=int, help="per round (60), or in total (10000)")
    parser.add_argument("--numbers", type=int, nargs="+", default=[1000, 1_000_000])
    args = parser.parse_args()
    if args.what == "targets":
        targets(args.source, args.videos, args.rounds, args.clips or 60)
    elif args.what == "flat":
        flat(args.source, args.videos, args.clips or 10_000)
    else:
        size(args.source, args.numbers)


if __name__ == "__main__":
    main()
