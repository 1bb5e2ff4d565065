"""Compare decoders on every 8th frame of short videos: this package, torchcodec, decord, OpenCV.

    pip install torchcodec decord opencv-python-headless
    python benchmarks/decode_alone.py /data/clips

From the videos of the folder, H.264 files of 340x256 and 10 s are encoded (x264's defaults,
B-frames included) with a key frame at least every 12 and every 250 frames. Each contender opens a
file and gives every 8th frame as RGB of 340x256; a check compares the frames. Each has one thread.
The table has the processor time of this process, as medians of rounds in which all take turns.
OpenCV decodes every frame (`grab`) and converts the selected ones (`retrieve`).

Goal: at least 1.3 times the frames of torchcodec and decord.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Set before torch is imported, because its threads would spin in a contender's processor time.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from measuring import in_turn, machine, medians, pictures, table

from distinit.pipeline.corpus.sources import list_videos
from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.geometry import Renderer, View

SIZE, FRAMES, EVERY = View(resize=(256, 340)), 250, 8
Decode = Callable[[str], np.ndarray]


def ours(path: str) -> np.ndarray:
    """Decode every 8th frame to RGB [n, 256, 340, 3], as the decoding processes of stage one."""
    with VideoReader(path) as reader:
        indices = np.arange(0, len(reader.timeline()), EVERY)
        out = np.empty((len(indices), 256, 340, 3), np.uint8)
        renderer: Renderer | None = None
        for n, (_, _, frame) in enumerate(reader.frames_at(indices)):
            renderer = renderer or reader.info.renderer()
            renderer.render(frame, SIZE, out=out[n])
        return out


def torchcodec(mode: str) -> Decode:
    """Return a decoder of torchcodec in one of its seek modes."""
    from torchcodec.decoders import VideoDecoder

    def decode(path: str) -> np.ndarray:
        decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode)
        return decoder.get_frames_at(range(0, len(decoder), EVERY)).data.numpy()

    return decode


def decord(path: str) -> np.ndarray:
    """Decode with decord."""
    import decord

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    return reader.get_batch(range(0, len(reader), EVERY)).asnumpy()


def opencv(path: str) -> np.ndarray:
    """Decode with OpenCV, converted from BGR."""
    import cv2

    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames = []
    for n in itertools.count():
        if not capture.grab():
            break
        if n % EVERY == 0:
            frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    return np.stack(frames)


def contenders(sample: str) -> dict[str, Decode]:
    """Return the installed contenders that can decode the sample."""
    decoders: dict[str, Decode] = {"distinit": ours}
    for name, make in (
        ("torchcodec, approximate", lambda: torchcodec("approximate")),
        ("torchcodec, exact", lambda: torchcodec("exact")),
        ("decord", lambda: __import__("decord") and decord),
        ("OpenCV", lambda: __import__("cv2") and opencv),
    ):
        try:
            decode = make()
            decode(sample)
            decoders[name] = decode
        except (ImportError, RuntimeError, OSError) as error:
            print(
                f"{name} is not installed or fails: {' '.join(str(error).split())[:100]}",
                file=sys.stderr,
            )
    return decoders


def main() -> None:
    """Print the machine and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a folder of videos, for real pictures")
    parser.add_argument("--videos", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    listed = list_videos([args.source])
    rows: list[list[object]] = []
    decoders: dict[str, Decode] = {}
    with tempfile.TemporaryDirectory() as folder:
        for gop in (12, 250):
            source = pictures([listed.absolute(i) for i in range(len(listed))], (256, 340))
            files = []
            for n in range(args.videos):
                files.append(str(Path(folder, f"gop{gop}-{n}.mp4")))
                write_video(files[-1], itertools.islice(source, FRAMES), fps=25, gop=gop)
            decoders = decoders or contenders(files[0])
            expected = [ours(file) for file in files]
            for name, decode in decoders.items():
                for file, frames in zip(files, expected, strict=True):
                    off = np.abs(decode(file).astype(int) - frames).mean()
                    # Converters differ by 1 to 2 of 255; another frame differs by far more.
                    if off > 3:
                        print(
                            f"GOP {gop}, {name}: different frames, off by {off:.1f} of 255",
                            file=sys.stderr,
                        )

            def measure(decode: Decode, files: list[str] = files) -> Callable[[], float]:
                def run() -> float:
                    began = time.process_time()
                    for file in files:
                        decode(file)
                    return 1000 * (time.process_time() - began) / len(files)

                return run

            cost = medians(
                in_turn({name: measure(decode) for name, decode in decoders.items()}, args.rounds)
            )
            for name, milliseconds in cost.items():
                frames_per_second = sum(map(len, expected)) / len(files) / milliseconds * 1000
                ratio = milliseconds / cost["distinit"]
                rows.append(
                    [gop, name, f"{milliseconds:.1f}", f"{frames_per_second:.0f}", f"{ratio:.2f}"]
                )
    print(machine())
    print(
        table(
            [
                "GOP",
                "reader",
                "processor ms per video",
                "sampled frames/s",
                "distinit is faster by",
            ],
            rows,
        )
    )


if __name__ == "__main__":
    main()
