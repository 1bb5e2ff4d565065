"""Compare a teacher's outputs after swscale's resize with those after its library's resize.

    python benchmarks/resize_difference.py [FOLDER] [--frames N] [--teacher NAME …]

The same decoded frames are resized by `resize_backend=swscale` and `pil` (antialiased, like the
transforms of torchvision, timm, open_clip and image processors). The table has 1 − cosine of the
features and KL of the logits, as medians and 99th percentiles over frames, and the same measures
for a frame and the next cached one. Models without local weights are initialised at random: they
show the effect of input size and filter, not that of a trained model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torchvision
from measuring import machine, table
from tolerances import frames_of

from distinit.pipeline.store.encoding import cosine_error, divergence
from distinit.pipeline.teachers.loaded_model import LoadedModel, preprocessing
from distinit.pipeline.teachers.teacher import Teacher, load_teacher
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.teachers.timm_models import _forward, _pooling, _view
from distinit.pipeline.teachers.torchvision_models import _features
from distinit.pipeline.video.geometry import View

DEMO = Path(__file__).parents[1] / "conf" / "demo_corpus"
BOTH = ("logits", "features")


def random_torchvision(name: str) -> Teacher:
    """Return a torchvision classifier at its ImageNet view, initialised at random."""
    module = torchvision.models.get_model(name).eval()
    recipe = LoadedModel(
        name, "random", module, preprocessing(View(resize=256, crop=224)), **_features(module)
    )
    return Teacher(f"torchvision {name}, random", recipe, BOTH)


def random_timm(name: str) -> Teacher:
    """Return a timm classifier at its default view, initialised at random."""
    import timm

    module = timm.create_model(name).eval()
    config = timm.data.resolve_model_data_config(module)
    recipe = LoadedModel(
        name, "random", module, preprocessing(_view(config), config["mean"], config["std"]),
        offers=BOTH, forward=_forward(module), pooling=_pooling(module),
    )  # fmt: skip
    return Teacher(f"timm {name}, random", recipe, BOTH)


def teachers(names: list[str]) -> dict[str, Teacher]:
    """Return teachers with their weights by name, and a random one of each library."""
    torch.manual_seed(0)
    loaded = {name: load_teacher(TeacherSpec(name=name, outputs=BOTH)) for name in names}
    for teacher in (random_torchvision("resnet18"), random_timm("vit_tiny_patch16_224")):
        loaded[teacher.name] = teacher
    return loaded


def compute(teacher: Teacher, folder: str, view: View, count: int) -> dict[str, np.ndarray]:
    """Return the outputs of `count` frames."""
    images = frames_of(folder, view, count)
    parts = [teacher.compute(images[i : i + 8]) for i in range(0, len(images), 8)]
    return {o: np.concatenate([p[o].numpy() for p in parts]) for o in BOTH}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default=str(DEMO))
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--teacher", action="append", default=None)
    args = parser.parse_args()
    rows = []
    for name, teacher in teachers(args.teacher or ["efficientnet_lite0"]).items():
        swscale_view = teacher.view
        pil_view = swscale_view.model_copy(
            update={"interpolation": f"pil-{swscale_view.interpolation}"}
        )
        a, b = (
            compute(teacher, args.folder, view, args.frames) for view in (swscale_view, pil_view)
        )
        cosine = cosine_error(b["features"], a["features"])
        kl = divergence(b["logits"], a["logits"])
        best = (a["logits"].argmax(1) == b["logits"].argmax(1)).mean()
        near = cosine_error(b["features"][::2], b["features"][1::2])
        next_kl = divergence(b["logits"][::2], b["logits"][1::2])
        rows.append(
            [name, f"{swscale_view.interpolation} {swscale_view.resize}→{swscale_view.crop}"]
            + [f"{np.median(v):.2g} / {np.quantile(v, 0.99):.2g}" for v in (cosine, kl)]
            + [f"{best:.0%}", f"{np.median(near):.2g}", f"{np.median(next_kl):.2g}"]
        )
    print(machine())
    columns = ["teacher", "view", "1 − cosine, median / p99", "KL in nats", "same best class",
               "1 − cosine of the next frame", "KL of it"]  # fmt: skip
    print(table(columns, rows))


if __name__ == "__main__":
    main()
