"""Measure what views of a frame are worth: cached targets against the teacher on a student's crop.

    python benchmarks/frame_views.py FOLDER [--videos 30] [--frames 4]

The teacher in the loop would see what the student sees: a random crop of the frame (clips of 112
pixels cut from 128 × 171, as in training), mirrored or not. Its output there is compared with what
a store gives that clip: the centre, the mirrored frame, or cells averaged under the crop. Features
by cosine; logits by the KL divergence of their softmax from the live teacher's, and the share of
equal first classes. Logits of cells are their average through the classifier (`_fc` of
EfficientNet-Lite), which is linear. The row `same picture` resizes the centre crop as the live
teacher's crops are (PIL in place of swscale): no cached target can be nearer than such rows show.
Means with 95 % intervals over videos.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from measuring import machine, table
from numpy.typing import NDArray
from PIL import Image

from distinit.pipeline.clips.clip_options import ClipView, Crop
from distinit.pipeline.common.errors import VideoError
from distinit.pipeline.corpus.sources import list_videos
from distinit.pipeline.evaluation.metrics import estimate_mean
from distinit.pipeline.store.encoding import cosine_error, divergence, roi_average
from distinit.pipeline.teachers.teacher import Teacher, load_teacher
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.region import Region

GRIDS = (2, 4, 7)
Array = NDArray[np.float32]


def frames_of(path: str, count: int, teacher: Teacher) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return frames spread over a video, each whole and as the teacher sees it."""
    with VideoReader(path) as reader:
        renderer = reader.info.renderer()
        last = max(len(reader.timeline()) - 1, 0)
        at = np.unique(np.linspace(last * 0.1, last * 0.9, count).astype(np.int64))
        return [
            (renderer.render(f, None).copy(), renderer.render(f, teacher.view).copy())
            for _, _, f in reader.frames_at(at)
        ]


def cut(frame: np.ndarray, region: Region, size: tuple[int, int]) -> np.ndarray:
    """Cut a rectangle out of a frame and resize it as image libraries do."""
    height, width = frame.shape[:2]
    box = (region.left * width, region.top * height, region.right * width, region.bottom * height)
    inside = tuple(float(np.clip(v, 0, m)) for v, m in zip(box, (width, height) * 2, strict=True))
    picture = Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC, box=inside)
    return np.asarray(picture)


def compare(live: dict[str, Array], kept: dict[str, Array]) -> list[Array]:
    """Return cosine, KL and equal first classes of each row [n]."""
    return [
        1 - cosine_error(live["features"], kept["features"]),
        divergence(live["logits"], kept["logits"]),
        (live["logits"].argmax(1) == kept["logits"].argmax(1)).astype(np.float32),
    ]


def measure(teacher: Teacher, paths: list[str], count: int, wanted: int) -> dict[str, Array]:
    """Return the three measures [3, n] of each way, and under "video" the video of each row."""
    student, random = ClipView(), np.random.default_rng(0)
    rows: dict[str, list[list[Array]]] = {}
    video: list[int] = []
    used = 0
    for path in paths:
        try:
            frames = frames_of(path, count, teacher)
        except (VideoError, IndexError, ValueError):
            continue
        for whole, seen in frames:
            shown = teacher.view.region(*whole.shape[:2])
            crop = Crop(random.random(), random.random(), False)
            region = student.region(crop)
            mine = cut(whole, region, teacher.input_shape)
            live = run(teacher, np.stack([mine, mine[:, ::-1]]))
            cached = run(teacher, np.stack([seen, cut(whole, shown, teacher.input_shape)]), "all")
            place = region.inside(shown)
            for mirrored in (False, True):
                at = {k: v[int(mirrored)][None] for k, v in live.items()}
                ways = {"centre": one(cached), "mirrored frame": one(cached, ".flip")}
                for grid in GRIDS:
                    for name, end, box in (
                        (f"cells {grid} × {grid}", "", place),
                        (f"cells {grid} × {grid}, mirrored", ".flip", place.mirrored()),
                    ):
                        cells = cached[f"features.grid{grid}{end}"][:1]
                        features = roi_average(cells.reshape(1, grid, grid, -1), box)
                        ways[name] = {"features": features, "logits": classify(teacher, features)}
                for name, kept in ways.items():
                    key = f"{'mirrored' if mirrored else 'as it is'}: {name}"
                    rows.setdefault(key, []).append(compare(at, kept))
            resized = {k: cached[k][1:] for k in ("features", "logits")}
            rows.setdefault("same picture, other resizer", []).append(compare(resized, one(cached)))
            video.append(used)
        used += 1
        if used == wanted:
            break
    found = {name: np.concatenate(each, axis=1) for name, each in rows.items()}
    return {**found, "video": np.array(video, np.float32)}


def run(teacher: Teacher, images: np.ndarray, which: str = "center") -> dict[str, Array]:
    only = None if which == "all" else ("logits", "features")
    return {k: v.numpy() for k, v in teacher.compute(np.ascontiguousarray(images), only).items()}


def one(cached: dict[str, Array], end: str = "") -> dict[str, Array]:
    return {output: cached[output + end][:1] for output in ("features", "logits")}


def classify(teacher: Teacher, features: Array) -> Array:
    with torch.inference_mode():
        logits: torch.Tensor = teacher.module.get_submodule("_fc")(torch.from_numpy(features))
    return logits.numpy()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--videos", type=int, default=30)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--teacher", default="efficientnet_lite0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    grids = tuple(f"grid:{grid}" for grid in GRIDS)
    spec = TeacherSpec(
        name=args.teacher, outputs=("logits", "features"), views=("center", *grids, "flip")
    )
    teacher = load_teacher(spec)
    listed = list_videos([args.folder])
    # Spread over the classes, which are folders.
    order = np.random.default_rng(0).permutation(len(listed))
    paths = [listed.absolute(int(i)) for i in order]
    found = measure(teacher, paths, args.frames, args.videos)
    video = found.pop("video")
    print(machine())
    print(f"{args.teacher}, {len(np.unique(video))} videos, {len(video)} frames, one crop of each")
    lines = []
    for name, measures in found.items():
        estimates = [estimate_mean(values.astype(np.float64), video) for values in measures]
        lines.append([name, *(f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in estimates)])
    print(table(["the clip and its target", "cosine", "KL, nats", "same first class"], lines))
    gains = []
    for name, measures in found.items():
        kind, _, way = name.partition(": ")
        if way not in ("", "centre"):
            off = [m - c for m, c in zip(measures, found[f"{kind}: centre"], strict=True)][:2]
            each = [estimate_mean(d.astype(np.float64), video, min_mean=-1) for d in off]
            gains.append([name, *(f"{e.value:+.4f} [{e.low:+.4f}, {e.high:+.4f}]" for e in each)])
    print(table(["minus the centre", "cosine", "KL, nats"], gains))


if __name__ == "__main__":
    main()
