"""Measure the basis of the tolerances of `distinit targets verify`.

    python benchmarks/tolerances.py FOLDER

The first table is for entropies against stored logits: the difference between the entropies of
float32 logits and of the stored ones, beyond the allowance of `entropy_tolerance` for first-order
rounding (its constant must be larger). Logits are random, from nearly certain to nearly uniform, of
2 to 20 000 classes, and those of the videos.

The second table is for `--deep`: the difference between logits of the same frames with another
batch size and in bf16, and between those of neighbouring frames and of different videos, as root
mean square over the classes in standard deviations of the row, with medians and extremes over rows.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from measuring import machine, table

from distinit.pipeline.common.errors import VideoError
from distinit.pipeline.common.numerics import entropy
from distinit.pipeline.corpus.sources import list_videos
from distinit.pipeline.store.encoding import Codec
from distinit.pipeline.store.verify import ENTROPY_TOLERANCE, entropy_tolerance
from distinit.pipeline.teachers.teacher import load_teacher
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.decoder import VideoReader


def frames_of(folder: str, view, count: int) -> np.ndarray:
    """Return RGB frames [count, h, w, 3], a pair of neighbouring frames from each video."""
    listed = list_videos([folder])
    images: list[np.ndarray] = []
    for i in range(len(listed)):
        try:
            with VideoReader(listed.absolute(i)) as reader:
                renderer = reader.info.renderer()
                pair = [
                    renderer.render(f, view).copy()
                    for _, _, f in reader.frames_at(np.array([4, 8]))
                ]
        except (VideoError, IndexError, ValueError):
            continue
        images += pair if len(pair) == 2 else []
        if len(images) >= count:
            break
    return np.stack(images[:count])


def beyond(logits: np.ndarray, encoding: str) -> float:
    """Return the largest excess over the first-order bound, in nats."""
    codec = Codec("logits", encoding, logits.shape[1])
    arrays = codec.encode(logits)
    decoded = codec.decode(arrays)
    granted = entropy_tolerance(decoded, codec.rounding(arrays)) - ENTROPY_TOLERANCE
    return float((np.abs(entropy(decoded) - entropy(logits)) - granted).max())


def main() -> None:
    """Print the machine and two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a folder of videos")
    parser.add_argument("--teacher", default="efficientnet_lite0")
    parser.add_argument("--frames", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = load_teacher(TeacherSpec(name=args.teacher))
    images = frames_of(args.source, teacher.view, args.frames)
    real = np.concatenate(
        [teacher.logits(images[i : i + 32]).numpy() for i in range(0, len(images), 32)]
    )
    random = np.random.default_rng(0)
    rows = []
    for encoding in ("float16", "int8"):
        worst = -np.inf
        for classes in (2, 10, 365, 1000, 20000):
            for spread in (0.01, 0.1, 1, 3, 10, 30, 100, 1000, 10000):
                z = random.normal(0, spread, (200, classes)).astype(np.float32)
                for shift in (0, 50):
                    z[::2, 0] += spread * shift / 10
                    worst = max(worst, beyond(z + np.float32(shift), encoding))
        rows.append([encoding, f"{worst:.1e}", f"{beyond(real, encoding):.1e}", ENTROPY_TOLERANCE])
    print(machine())
    print(table(["encoding", "random logits, nats", f"{args.teacher}, nats", "constant"], rows))
    deviation = real.std(axis=1)

    def off(other: np.ndarray, here: np.ndarray = real, scale: np.ndarray = deviation) -> list[str]:
        far = np.sqrt(((other - here) ** 2).mean(axis=1)) / scale
        return [f"{v:.2g}" for v in (far.min(), np.median(far), far.max())]

    batches_of_8 = np.concatenate(
        [teacher.logits(images[i : i + 8]).numpy() for i in range(0, len(images), 8)]
    )
    bf16_teacher = load_teacher(TeacherSpec(name=args.teacher)).to(torch.device("cpu"), "bf16")
    bf16 = np.concatenate(
        [bf16_teacher.logits(images[i : i + 32]).numpy() for i in range(0, len(images), 32)]
    )
    lines = [
        ["batches of 8 instead of 32, fp32", *off(batches_of_8)],
        ["bf16 instead of fp32", *off(bf16)],
        ["the next cached frame (4 further)", *off(real[1::2], real[::2], deviation[::2])],
        ["a frame of another video", *off(np.roll(real, 2, axis=0))],
    ]
    print(table(["rows", "least", "median", "most"], lines))


if __name__ == "__main__":
    main()
