"""Compare readers of random clips: this package, prepared copies, torchcodec, decord and OpenCV.

    pip install torchcodec decord opencv-python-headless
    python benchmarks/clips_against_others.py /data/clips

From the videos of the folder, H.264 files of 10 s are encoded (x264's defaults, B-frames included)
at 340x256 and at 1280x720, with a key frame at least every 250 and every 12 frames, and copies of
the former by `distinit prepare`. Each contender gives the same consecutive frames, RGB of 128x171,
with its own resize if it has one; a check compares the frames. One decoder thread; nothing is
cached from one clip to the next, as in a corpus of many videos. Processor time per clip: alone in
one process, and in the 2 workers of a DataLoader at once.

Goals: 1.2 times the best other reader in every cell; 1.3 ms per clip of 8 frames from a copy.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Set before torch is imported, because its threads would spin in a contender's processor time.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from measuring import in_turn, machine, medians, pictures, table
from torch.utils.data import DataLoader, Dataset

from distinit.pipeline.corpus.sources import list_videos
from distinit.pipeline.prepared import frame_map, make_copy
from distinit.pipeline.prepared.copies import read_copy
from distinit.pipeline.video import frames as clips
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.geometry import View

SIZE = (128, 171)
CLIP = View(resize=SIZE)
Read = Callable[[str, int, int], np.ndarray]  # path, first frame, frames → uint8 [T, 128, 171, 3]


def ours(path: str, start: int, length: int) -> np.ndarray:
    """Read a video for the first time."""
    clips._indices = frame_map.LruCache()
    return clips.read_frames(path, np.arange(start, start + length), CLIP).images


def ours_again(path: str, start: int, length: int) -> np.ndarray:
    """Read a video whose packets this process has listed before."""
    return clips.read_frames(path, np.arange(start, start + length), CLIP).images


def ours_by_packets(path: str, start: int, length: int) -> np.ndarray:
    """Read a video for the first time, by its packets instead of its mp4 header."""
    is_mp4 = clips.is_mp4
    clips.is_mp4 = lambda path: False
    try:
        return ours(path, start, length)
    finally:
        clips.is_mp4 = is_mp4


def copy(path: str, start: int, length: int) -> np.ndarray:
    """Read a prepared copy for the first time."""
    frame_map._maps = frame_map.LruCache()
    return read_copy(path, np.arange(start, start + length), CLIP).images


def torchcodec(mode: str) -> Read:
    """Return a reader of torchcodec in one of its seek modes, with its own resize."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    def read(path: str, start: int, length: int) -> np.ndarray:
        decoder = VideoDecoder(
            path,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            seek_mode=mode,
            transforms=[Resize(SIZE)],
        )
        return decoder.get_frames_in_range(start, start + length).data.numpy()

    return read


def decord(path: str, start: int, length: int) -> np.ndarray:
    """Read with decord, which resizes while it decodes."""
    import decord

    reader = decord.VideoReader(
        path, ctx=decord.cpu(0), num_threads=1, width=SIZE[1], height=SIZE[0]
    )
    return reader.get_batch(range(start, start + length)).asnumpy()


def opencv(path: str, start: int, length: int) -> np.ndarray:
    """Read with OpenCV and area resize, as its bilinear resize skips pixels."""
    import cv2

    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    capture.set(cv2.CAP_PROP_POS_FRAMES, start)
    small = (
        cv2.resize(capture.read()[1], SIZE[::-1], interpolation=cv2.INTER_AREA)
        for _ in range(length)
    )
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for frame in small])


def contenders(sample: str) -> dict[str, Read]:
    """Return the installed contenders that can read the sample."""
    readers: dict[str, Read] = {
        "distinit": ours,
        "distinit, packets known": ours_again,
        "distinit, packets read": ours_by_packets,
    }
    for name, make in (
        ("torchcodec, approximate", lambda: torchcodec("approximate")),
        ("torchcodec, exact", lambda: torchcodec("exact")),
        ("decord", lambda: __import__("decord") and decord),
        ("OpenCV", lambda: __import__("cv2") and opencv),
    ):
        try:
            read = make()
            read(sample, 3, 2)
            readers[name] = read
        except (ImportError, RuntimeError, OSError) as error:
            print(
                f"{name} is not installed or fails: {' '.join(str(error).split())[:200]}",
                file=sys.stderr,
            )
    return readers


class Clips(Dataset[Any]):
    """The drawn clips as tensors, for a DataLoader."""

    def __init__(self, read: Read, drawn: list[tuple[str, int, int]]) -> None:
        self.read, self.drawn = read, drawn

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, k: int) -> tuple[torch.Tensor, float]:
        torch.set_num_threads(1)
        began = time.process_time()
        clip = torch.from_numpy(np.ascontiguousarray(self.read(*self.drawn[k])))
        return clip, 1000 * (time.process_time() - began)


def alone(read: Read, drawn: list[tuple[str, int, int]]) -> float:
    """Measure processor milliseconds per clip in this process."""
    began = time.process_time()
    for clip in drawn:
        read(*clip)
    return 1000 * (time.process_time() - began) / len(drawn)


def loaded(read: Read, drawn: list[tuple[str, int, int]]) -> float:
    """Measure processor milliseconds per clip in 2 workers, after the first two clips of each."""
    loader = DataLoader(Clips(read, [*drawn[:4], *drawn]), batch_size=2, num_workers=2)
    spent = torch.cat([milliseconds for _, milliseconds in loader])
    return float(spent[4:].mean())


def draw(files: list[str], frames: int, length: int, count: int) -> list[tuple[str, int, int]]:
    """Draw random clips, the same for all contenders."""
    random = np.random.default_rng(length)
    return [(files[int(random.integers(len(files)))], int(random.integers(frames - length + 1)), length)
            for _ in range(count)]  # fmt: skip


def check(read: dict[str, Read], drawn: list[tuple[str, int, int]], where: str) -> None:
    """Check that all contenders give the frames of this package."""
    for name, each in read.items():
        off = max(float(np.abs(each(*clip).astype(int) - ours(*clip)).mean()) for clip in drawn[:6])
        # Resizers differ by 1 to 3 of 255; another frame differs by more.
        if off > 6:
            print(f"{where}, {name}: different frames, off by {off:.1f} of 255", file=sys.stderr)


def main() -> None:
    """Print the machine and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a folder of videos, for real pictures")
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--clips", type=int, default=24, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heights", type=int, nargs="+", default=[256, 720], choices=(256, 720))
    args = parser.parse_args()
    listed = list_videos([args.source])
    paths = [listed.absolute(i) for i in range(len(listed))]
    rows: list[list[object]] = []
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        for height, gop in itertools.product(args.heights, (250, 12)):
            width = {256: 340, 720: 1280}[height]
            files, copies = [], []
            source = pictures(paths, (height, width))
            for n in range(args.videos if height < 720 else max(1, args.videos // 2)):
                files.append(str(Path(folder, f"{height}-{gop}-{n}.mp4")))
                write_video(files[-1], itertools.islice(source, args.frames), fps=30, gop=gop)
                copies.append(f"{files[-1]}.copy.mp4")
                make_copy.make_copy(
                    files[-1], f"{folder}/part", copies[-1], make_copy.CopyOptions()
                )
            small = dict(zip(files, copies, strict=True))
            read = contenders(files[0])

            def prepared(
                path: str, start: int, length: int, small: dict[str, str] = small
            ) -> np.ndarray:
                return copy(small[path], start, length)

            read["distinit, prepared copy"] = prepared
            count = args.clips if height < 720 else max(4, args.clips // 3)
            for length in (8, 32):
                drawn = draw(files, args.frames, length, count)
                check(read, drawn, f"{width}x{height}, GOP {gop}")
                one = medians(
                    in_turn({n: partial(alone, r, drawn) for n, r in read.items()}, args.rounds)
                )
                two = medians(
                    in_turn({n: partial(loaded, r, drawn) for n, r in read.items()}, args.rounds)
                )
                for name in read:
                    rows.append([f"{width}x{height}", gop, length, name, f"{one[name]:.1f}",
                                 f"{one[name] / one['distinit']:.2f}", f"{two[name]:.1f}",
                                 f"{two[name] / two['distinit']:.2f}"])  # fmt: skip
                    print(" | ".join(map(str, rows[-1])), file=sys.stderr, flush=True)
    print(machine())
    head = [
        "size",
        "GOP",
        "frames",
        "reader",
        "alone: ms",
        "times distinit",
        "2 workers: ms",
        "times distinit",
    ]
    print(table(head, rows))


if __name__ == "__main__":
    main()
