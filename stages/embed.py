"""Write the features that a student computes for videos."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from ..pipeline.clips.transforms import normalize_clip
from ..pipeline.common.console import Console
from ..pipeline.common.devices import resolve_device
from ..pipeline.common.errors import DistInitError, UsageError, first_line
from ..pipeline.common.files import replacing, write_whole
from ..pipeline.common.hdf5 import Hdf5Writer
from ..pipeline.corpus.sources import escape_path
from ..pipeline.evaluation.evaluation_options import EmbedConfig
from ..pipeline.evaluation.feature_files import FORMAT, FORMAT_VERSION
from ..pipeline.evaluation.own_videos import claim_file, list_paths, log_problems, make_clips
from ..pipeline.evaluation.predictions import FAILED, OK
from ..pipeline.evaluation.predictor import require_finite, video_outputs
from ..pipeline.students.student import Student
from ..pipeline.students.student_files import load_student
from ..pipeline.training.hardware import pick_workers, torch_threads

ENDINGS = {".h5": "HDF5", ".hdf5": "HDF5", ".npz": "NumPy"}
# Largest number of values in a chunk of a table.
CHUNK = 2**16


def embed(config: EmbedConfig, console: Console) -> dict[str, Any]:
    """Write the features of each video into one file.

    Features are the input of the student's heads: means over time and space of each clip, and
    without `per_clip` also over the clips. Clips are evenly spread, with the frames and size of the
    student's training.

    Returns:
        Path, shape and failures; `ok` is False if a video is unreadable.

    Raises:
        CheckpointError: There is no student.
        SourceError: A source has no videos.
        UsageError: `out` cannot be written.
        DeviceError: The device is missing.
    """
    student = load_student(config.model, factory=config.factory)
    paths = list_paths(config.sources)
    out = claim_file(config.out, ENDINGS, "embed", config)
    views = config.clips * config.crops
    shape: tuple[int, ...] = (len(paths), student.feature_size)
    if config.per_clip:
        shape = (len(paths), views, student.feature_size)
    about = {
        "model": str(Path(config.model)),
        "student": student.options.describe(),
        "clip_frames": student.meta.clip_length,
        "clip_size": student.meta.clip_size,
        **config.model_dump(include={"clips", "crops", "per_clip"}),
    }
    with _feature_file(out, shape, views, about) as (numbers, texts):
        texts["videos"] = [escape_path(path) for path in paths]
        texts["status"], texts["reasons"] = _fill(numbers, student, paths, config, console)
    failed, truncated = (
        [
            {"video": video, "reason": reason}
            for video, status, reason in zip(*texts.values(), strict=True)
            if status == kind and reason
        ]
        for kind in (FAILED, OK)
    )
    log_problems(failed, truncated)
    console.info(f"features {list(shape)} of {len(paths)} videos: {out}")
    return {
        "ok": not failed,
        "out": str(out),
        "features": list(shape),
        **about,
        "failed": failed,
        "truncated": truncated,
    }


def _fill(
    numbers: dict[str, Any],
    student: Student,
    paths: list[str],
    config: EmbedConfig,
    console: Console,
) -> tuple[list[str], list[str]]:
    """Fill the tables of numbers; return status and reason of each video."""
    device = resolve_device(config.device)
    student.to(device)
    clips = make_clips(student, paths, clips=config.clips, crops=config.crops)
    # A single video is read without a loader process.
    workers = min(pick_workers(config.workers, device), len(paths) - 1)
    status, reasons = [FAILED] * len(paths), [""] * len(paths)
    with (
        torch_threads(None, workers, device),
        console.progress("embedding", len(paths), "videos") as bar,
    ):
        for result in video_outputs(
            lambda part: (student.features(normalize_clip(part, torch.float32)).float(),),
            clips,
            list(range(len(paths))),
            batch_size=config.batch_size,
            workers=workers,
            device=device,
        ):
            video = result.video
            reasons[video] = result.error or result.note
            if not result.error:
                features = result.outputs[0]  # [N, D]
                require_finite(features, paths[video], "features")
                status[video] = OK
                numbers["features"][video] = features if config.per_clip else features.mean(0)
                numbers["starts"][video], numbers["frames"][video] = result.starts, result.frames
            bar.advance()
    return status, reasons


@contextmanager
def _feature_file(
    out: Path, shape: tuple[int, ...], views: int, about: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], dict[str, list[str]]]]:
    """Yield arrays to fill and texts to add; the complete file appears when the block ends.

    HDF5 writes each row when it is assigned, so that memory does not grow with the videos.

    Args:
        out: The file.
        shape: Shape of the features.
        views: Clips times crops per video.
        about: Description of the features, stored as JSON.
    """
    videos = shape[0]
    empty: dict[str, tuple[tuple[int, ...], np.generic]] = {
        "features": (shape, np.float32(np.nan)),
        "starts": ((videos, views), np.int64(-1)),
        "frames": ((videos,), np.int64(-1)),
    }
    texts: dict[str, list[str]] = {}
    if out.suffix == ".npz":
        arrays = {name: np.full(*each) for name, each in empty.items()}
        yield arrays, texts
        data = io.BytesIO()
        arrays |= {name: np.array(column) for name, column in texts.items()}
        arrays["about"] = np.array(json.dumps(about))
        np.savez(data, **arrays)  # type: ignore[arg-type]
        write_whole(out, data.getbuffer(), UsageError)
        return
    try:
        with replacing(out) as part, Hdf5Writer(part, sealed=True) as writer:
            file = writer.file
            tables = {
                name: file.create_dataset(
                    name,
                    size,
                    fill.dtype,
                    chunks=(max(1, min(size[0], CHUNK // math.prod(size[1:]))), *size[1:]),
                    fillvalue=fill,
                    fletcher32=True,
                )
                for name, (size, fill) in empty.items()
            }
            yield tables, texts
            for name, column in texts.items():
                file.create_dataset(name, data=column, dtype=h5py.string_dtype())
            file.attrs["format"], file.attrs["format_version"] = FORMAT, FORMAT_VERSION
            file.attrs["about"] = json.dumps(about)
    except OSError as error:
        if isinstance(error, DistInitError):
            raise
        raise UsageError(f"--out {out}: cannot be written ({first_line(error)})") from error
