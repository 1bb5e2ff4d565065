"""Run a model over the clips of videos, and fill the tables of predictions.h5.

Shapes: B clips of a forward pass, N clips of a video, C channels, T frames, H W pixels, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clips.seeding import Key
from ..clips.transforms import normalize_clip
from ..common.errors import TrainingError, WorkerDied
from ..students.student import Student
from ..training.loader import KeyedDataset, SequentialBatchSampler, read_batches
from .predictions import LOGITS, Predictions

HEAD = "label"
"""Name of the one head of a finetuned student."""

SAVE_EVERY_S = 60.0


class _Subset:
    """Some videos of a dataset, numbered from 0."""

    def __init__(self, dataset: KeyedDataset, videos: list[int]) -> None:
        self.dataset = dataset
        self.videos = videos

    def __getitem__(self, key: Key) -> dict[str, Any] | None:
        return self.dataset[(0, self.videos[key[1]])]


def _rows(
    dataset: KeyedDataset, videos: list[int], workers: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield a row for each of `videos`, in order, even if a loader process dies."""

    def read(subset: list[int], processes: int) -> Iterator[dict[str, Any]]:
        return read_batches(
            _Subset(dataset, subset),
            SequentialBatchSampler(len(subset), 1),
            workers=processes,
            device=device,
        )

    remaining = list(videos)
    while remaining:
        try:
            for row in read(list(remaining), workers):
                remaining.pop(0)
                yield row
        except WorkerDied:
            # The next video may have crashed the decoder. It is read again in a process of its own,
            # and reported as unreadable if that process dies too.
            video = remaining.pop(0)
            try:
                yield from read([video], 1)
            except WorkerDied as error:
                reason = error.reason or "its decoder crashed"
                yield {"video": torch.tensor([video]), "error": [reason]}


@dataclass(frozen=True)
class VideoOutputs:
    """The outputs of a model for the N clips of one video.

    Attributes:
        video: Index of the video in the dataset.
        error: Why the video is unreadable; the other attributes are then empty.
        outputs: Tensors of the forward pass, each float32 [N, …].
        starts: First frame of each clip, int64 [N].
        frames: Number of frames of the video.
        note: Which part of the video cannot be decoded, "" if none.
    """

    video: int
    error: str = ""
    outputs: tuple[Tensor, ...] = ()
    starts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    frames: int = -1
    note: str = ""


@torch.inference_mode()
def predict(
    model: Student,
    dataset: KeyedDataset,
    predictions: Predictions,
    *,
    videos: list[int] | None = None,
    batch_size: int,
    workers: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda num_videos: None,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Score videos, and record the results in `predictions`.

    Scores are averaged over the clips of a video: softmax, or logits if `predictions.protocol` has
    "scores": "logits".

    Args:
        model: The student to test.
        dataset: dataset[(0, i)] gives the clips of the i-th video, see EvaluationClips.
        predictions: Tables to fill.
        videos: Indices of the videos to score, by default all pending ones.
        batch_size: Clips per forward pass.
        workers: Loader processes.
        device: Where to compute.
        advance: Called with 1 after each video, for a progress bar.
        save: Called about once a minute and on Ctrl-C.

    Raises:
        TrainingError: Scores are not finite, so that no accuracy can be computed.
    """
    model.to(device).eval()
    last_save = time.monotonic()
    try:
        for result in video_outputs(
            lambda clips: clip_logits(model, clips),
            dataset,
            predictions.pending if videos is None else videos,
            batch_size=batch_size,
            workers=workers,
            device=device,
        ):
            _record(result, predictions)
            advance(1)
            if time.monotonic() - last_save > SAVE_EVERY_S:
                save()
                last_save = time.monotonic()
    except KeyboardInterrupt:
        save()
        raise


def _record(result: VideoOutputs, predictions: Predictions) -> None:
    if result.error:
        predictions.fail(result.video, result.error)
        return
    logits, features = result.outputs
    scores = logits if predictions.protocol.get("scores") == LOGITS else logits.softmax(dim=1)
    require_finite(scores, predictions.videos[result.video], "scores")
    predictions.set_scores(
        result.video,
        scores.numpy(),
        result.starts,
        result.frames,
        note=result.note,
        features=features.numpy(),
    )


def require_finite(values: Tensor, video: str, name: str) -> None:
    """Check that the values of a video are finite.

    Args:
        values: The values.
        video: Path of the video, for the message.
        name: Name of the values in the message.

    Raises:
        TrainingError: A value is not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise TrainingError(
            f"the {name} of {video!r} are not finite: the weights are damaged or have diverged"
        )


@torch.inference_mode()
def video_outputs(
    forward: Callable[[Tensor], tuple[Tensor, ...]],
    dataset: KeyedDataset,
    videos: list[int],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Iterator[VideoOutputs]:
    """Yield the outputs of a model for each video, in order; an unreadable video has an error.

    Outputs are computed in float32, whatever the precision of the training was, so that they differ
    by less than 1e-4 between batch sizes.

    Args:
        forward: Function from clips uint8 [B, C, T, H, W] on the device to tensors [B, …].
        dataset: dataset[(0, i)] gives the clips of the i-th video, see EvaluationClips.
        videos: Indices of the videos.
        batch_size: Clips per forward pass.
        workers: Loader processes.
        device: Where to compute.
    """
    batch: list[dict[str, Any]] = []
    for row in _rows(dataset, videos, workers, device):
        if "error" in row:
            yield VideoOutputs(int(row["video"][0]), error=row["error"][0])
            continue
        batch.append(row)
        if sum(each["clips"].shape[1] for each in batch) >= batch_size:
            yield from _compute(forward, batch, batch_size, device)
            batch = []
    if batch:
        yield from _compute(forward, batch, batch_size, device)


def _compute(
    forward: Callable[[Tensor], tuple[Tensor, ...]],
    rows: list[dict[str, Any]],
    batch_size: int,
    device: torch.device,
) -> list[VideoOutputs]:
    """Compute the outputs of whole videos, in passes of at most `batch_size` clips."""
    clips = torch.cat([row["clips"][0] for row in rows])  # [ΣN, C, T, H, W]
    with _exact_float32(device):
        passes = [forward(part.to(device, non_blocking=True)) for part in clips.split(batch_size)]
    counts = [row["clips"].shape[1] for row in rows]
    outputs = [torch.cat(parts).cpu().split(counts) for parts in zip(*passes, strict=True)]
    return [
        VideoOutputs(
            int(row["video"][0]),
            outputs=tensors,
            starts=row["starts"][0].numpy().astype(np.int64),
            frames=int(row["frames"][0]),
            note=row["note"][0],
        )
        for row, tensors in zip(rows, zip(*outputs, strict=True), strict=True)
    ]


def clip_logits(model: Student, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Compute logits and features of clips.

    Args:
        model: A finetuned student.
        clips: uint8 [B, C, T, H, W].

    Returns:
        Logits of the labels, float32 [B, K], and features [B, D].
    """
    features = model.features(normalize_clip(clips, torch.float32)).float()
    logits: Tensor = model.head(HEAD)(features)
    return logits.float(), features


def _exact_float32(device: torch.device) -> AbstractContextManager[None]:
    """Turn off TF32 on a GPU, whose rounding in convolutions depends on the batch size."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=False, allow_tf32=False
    )
