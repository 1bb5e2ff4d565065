"""Daft: `read_video_frames`, which resizes to the teacher's input, and a teacher in a class UDF."""

from __future__ import annotations

from collections import defaultdict

import daft
import numpy as np
import torch
from teacher import BATCH, Teacher, arguments, save


def main() -> None:
    args = arguments()

    @daft.cls
    class Model:
        def __init__(self) -> None:
            self.teacher = Teacher(args.teacher, args.weights)

        @daft.method.batch(
            return_dtype=daft.DataType.list(daft.DataType.float32()), batch_size=BATCH
        )
        def logits(self, frames: daft.Series) -> list[list[float]]:
            pictures = torch.from_numpy(np.stack(frames.to_pylist())).permute(0, 3, 1, 2)
            return self.teacher(pictures).tolist()

    frames = daft.read_video_frames(args.paths, image_height=224, image_width=224)
    frames = frames.where(daft.col("frame_index") % args.every == 0)
    outputs = frames.select("path", "frame_index", Model().logits(daft.col("data")).alias("logits"))
    rows = defaultdict(dict)
    for row in outputs.iter_rows():
        rows[row["path"].removeprefix("file://")][row["frame_index"]] = row["logits"]
    for index, path in enumerate(args.paths):
        if path in rows:
            save(args, index, np.array([rows[path][i] for i in sorted(rows[path])], np.float32))


if __name__ == "__main__":
    main()
