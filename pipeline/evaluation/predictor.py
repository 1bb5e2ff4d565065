"""From a model and test videos to the tables of predictions.h5.

Shapes: B clips of a forward pass, N clips of a video, C channels, T frames, H W pixels, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clips.seeding import Key
from ..clips.transforms import normalize_clip
from ..common.errors import TrainingError, WorkerDied
from ..students.student import Student
from ..training.loader import KeyedDataset, SequentialBatchSampler, read_batches
from .classification import HEAD
from .predictions import LOGITS, Predictions

SAVE_EVERY_S = 60.0
READ_AHEAD = 4  # batches that a loader process has under way, at most


class _Pending:
    """The videos that still lack a result, renumbered from 0."""

    def __init__(self, dataset: KeyedDataset, videos: list[int]) -> None:
        self.dataset = dataset
        self.videos = videos

    def __getitem__(self, key: Key) -> dict[str, Any] | None:
        return self.dataset[(0, self.videos[key[1]])]


def _rows(
    dataset: KeyedDataset, videos: list[int], workers: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """A row for each of `videos`, in order, also when a loader process dies.

    Then one of the videos under way has crashed its decoder: those are read again, each in a
    process of its own, and the one whose process dies again is at fault.
    """

    def read(some: list[int], processes: int) -> Iterator[dict[str, Any]]:
        return read_batches(
            _Pending(dataset, some),
            SequentialBatchSampler(len(some), 1),
            workers=processes,
            device=device,
        )

    left = list(videos)
    while left:
        try:
            for row in read(list(left), workers):
                left.pop(0)
                yield row
        except WorkerDied:
            for video in left[: workers * READ_AHEAD + 1]:
                left.pop(0)
                try:
                    yield from read([video], 1)
                except WorkerDied as died:
                    reason = died.reason or "its decoder crashed"
                    yield {"video": torch.tensor([video]), "error": [reason]}


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
    done: Callable[[int], None] = lambda videos: None,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Fills in `videos`, by default all pending ones, of `predictions` from dataset[(0, video)]
    (see EvaluationClips).

    What is averaged over a video's clips is told by `predictions.protocol`: the softmax, or with
    "scores": "logits" the logits. Always float32, whatever the training's precision: scores then
    differ by less than 1e-4 between batch sizes. done(1) is called after each video, save() about
    once a minute and on Ctrl-C. Raises TrainingError when the model's scores are not finite, for no
    accuracy of such a model means anything.
    """
    model.to(device).eval()
    waiting: list[dict[str, Any]] = []
    saved = time.monotonic()
    with _exact_float32(device), _on_interrupt(save):
        for row in _rows(
            dataset, predictions.pending if videos is None else videos, workers, device
        ):
            video = int(row["video"][0])
            if "error" in row:
                predictions.fail(video, row["error"][0])
                done(1)
            else:
                waiting.append(row)
            if sum(r["clips"].shape[1] for r in waiting) >= batch_size:
                _score(model, waiting, predictions, batch_size, device, done)
                waiting = []
            if time.monotonic() - saved > SAVE_EVERY_S:
                save()
                saved = time.monotonic()
        if waiting:
            _score(model, waiting, predictions, batch_size, device, done)


def _score(
    model: Student,
    rows: list[dict[str, Any]],
    predictions: Predictions,
    batch_size: int,
    device: torch.device,
    done: Callable[[int], None],
) -> None:
    """Scores the clips of whole videos in passes of at most `batch_size` clips."""
    clips = torch.cat([row["clips"][0] for row in rows])  # [ΣN, C, T, H, W]
    parts = [
        clip_logits(model, part.to(device, non_blocking=True)) for part in clips.split(batch_size)
    ]
    counts = [row["clips"].shape[1] for row in rows]
    logits, features = (torch.cat(found).cpu().split(counts) for found in zip(*parts, strict=True))
    averaged = (
        logits
        if predictions.protocol.get("scores") == LOGITS
        else [each.softmax(dim=1) for each in logits]
    )
    for row, own, feature in zip(rows, averaged, features, strict=True):
        video = int(row["video"][0])
        if not bool(torch.isfinite(own).all()):
            raise TrainingError(
                f"the scores of {predictions.videos[video]!r} are not finite: the weights are damaged or have diverged"
            )
        starts = row["starts"][0].numpy().astype(np.int64)
        predictions.set_scores(
            video,
            own.numpy(),
            starts,
            int(row["frames"][0]),
            note=row["note"][0],
            features=feature.numpy(),
        )
        done(1)


def clip_logits(model: Student, clips: Tensor) -> tuple[Tensor, Tensor]:
    """clips uint8 [B, C, T, H, W] -> float32 logits [B, K] of the labels and features [B, D] of
    each clip."""
    features = model.features(normalize_clip(clips, torch.float32)).float()
    logits: Tensor = model.head(HEAD)(features)
    return logits.float(), features


@contextmanager
def _on_interrupt(save: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        save()
        raise


@contextmanager
def _exact_float32(device: torch.device) -> Iterator[None]:
    """No TF32 on a GPU: its convolutions round differently for every batch size."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=False, allow_tf32=False
    ):
        yield
