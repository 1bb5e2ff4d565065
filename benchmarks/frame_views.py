"""Measure the value of views of a frame: cached targets against the teacher on a student's crop.

    python benchmarks/frame_views.py FOLDER [--videos 30] [--frames 4]

A teacher in the training loop would see the same picture as the student: a random crop of the frame
(clips of 112 pixels cut from 128 × 171, as in training), mirrored or not. Its output for the crop
is compared with the target that a store gives the clip: of the centre, of the mirrored frame, or of
cells averaged under the crop. Features are compared by cosine; logits by the KL divergence of their
softmax from the live teacher's, and by the share of equal first classes. Logits of cells are the
output of the classifier (`_fc` of EfficientNet-Lite, which is linear) for their average. The row
`same picture` resizes the centre crop as the live teacher's crops are resized (PIL in place of
swscale): no cached target can be closer than this row. The table has means with 95 % intervals over
videos.
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
        indices = np.unique(np.linspace(last * 0.1, last * 0.9, count).astype(np.int64))
        return [
            (renderer.render(f, None).copy(), renderer.render(f, teacher.view).copy())
            for _, _, f in reader.frames_at(indices)
        ]


def cut(frame: np.ndarray, region: Region, size: tuple[int, int]) -> np.ndarray:
    """Cut a rectangle out of a frame and resize it as image libraries do."""
    height, width = frame.shape[:2]
    box = (region.left * width, region.top * height, region.right * width, region.bottom * height)
    inside = tuple(float(np.clip(v, 0, m)) for v, m in zip(box, (width, height) * 2, strict=True))
    picture = Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC, box=inside)
    return np.asarray(picture)


def compare(live: dict[str, Array], cached: dict[str, Array]) -> list[Array]:
    """Return cosine, KL and equal first classes of each row [n]."""
    return [
        1 - cosine_error(live["features"], cached["features"]),
        divergence(live["logits"], cached["logits"]),
        (live["logits"].argmax(1) == cached["logits"].argmax(1)).astype(np.float32),
    ]


def measure(teacher: Teacher, paths: list[str], count: int, num_videos: int) -> dict[str, Array]:
    """Return the three measures [3, n] of each target, and under "video" the video of each row."""
    student, random = ClipView(), np.random.default_rng(0)
    rows: dict[str, list[list[Array]]] = {}
    video: list[int] = []
    num_used = 0
    for path in paths:
        try:
            frames = frames_of(path, count, teacher)
        except (VideoError, IndexError, ValueError):
            continue
        for whole, prepared in frames:
            view_region = teacher.view.region(*whole.shape[:2])
            crop = Crop(random.random(), random.random(), False)
            region = student.region(crop)
            own_crop = cut(whole, region, teacher.input_shape)
            live = run(teacher, np.stack([own_crop, own_crop[:, ::-1]]))
            cached = run(
                teacher, np.stack([prepared, cut(whole, view_region, teacher.input_shape)]), "all"
            )
            relative_region = region.inside(view_region)
            for mirrored in (False, True):
                live_outputs = {k: v[int(mirrored)][None] for k, v in live.items()}
                targets = {"centre": one(cached), "mirrored frame": one(cached, ".flip")}
                for grid in GRIDS:
                    for name, end, box in (
                        (f"cells {grid} × {grid}", "", relative_region),
                        (f"cells {grid} × {grid}, mirrored", ".flip", relative_region.mirrored()),
                    ):
                        cells = cached[f"features.grid{grid}{end}"][:1]
                        features = roi_average(cells.reshape(1, grid, grid, -1), box)
                        targets[name] = {
                            "features": features,
                            "logits": classify(teacher, features),
                        }
                for name, target in targets.items():
                    key = f"{'mirrored' if mirrored else 'not mirrored'}: {name}"
                    rows.setdefault(key, []).append(compare(live_outputs, target))
            resized = {k: cached[k][1:] for k in ("features", "logits")}
            rows.setdefault("same picture, other resizer", []).append(compare(resized, one(cached)))
            video.append(num_used)
        num_used += 1
        if num_used == num_videos:
            break
    measures = {name: np.concatenate(each, axis=1) for name, each in rows.items()}
    return {**measures, "video": np.array(video, np.float32)}


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
    # Videos of one class are in one folder; a permutation spreads the sample over the classes.
    order = np.random.default_rng(0).permutation(len(listed))
    paths = [listed.absolute(int(i)) for i in order]
    results = measure(teacher, paths, args.frames, args.videos)
    video = results.pop("video")
    print(machine())
    print(f"{args.teacher}, {len(np.unique(video))} videos, {len(video)} frames, one crop of each")
    lines = []
    for name, measures in results.items():
        estimates = [estimate_mean(values.astype(np.float64), video) for values in measures]
        lines.append([name, *(f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in estimates)])
    print(table(["the clip and its target", "cosine", "KL, nats", "same first class"], lines))
    gains = []
    for name, measures in results.items():
        kind, _, way = name.partition(": ")
        if way not in ("", "centre"):
            differences = [
                m - c for m, c in zip(measures, results[f"{kind}: centre"], strict=True)
            ][:2]
            each = [estimate_mean(d.astype(np.float64), video, min_mean=-1) for d in differences]
            gains.append([name, *(f"{e.value:+.4f} [{e.low:+.4f}, {e.high:+.4f}]" for e in each)])
    print(table(["difference from the centre", "cosine", "KL, nats"], gains))


if __name__ == "__main__":
    main()
