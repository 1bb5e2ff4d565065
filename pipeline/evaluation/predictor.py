"""Score test videos with a model, and fill the tables of predictions.h5.

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
READ_AHEAD = 4  # batches that a loader process prefetches at most


class _Pending:
    """The videos without a result, numbered from 0."""

    def __init__(self, dataset: KeyedDataset, videos: list[int]) -> None:
        self.dataset = dataset
        self.videos = videos

    def __getitem__(self, key: Key) -> dict[str, Any] | None:
        return self.dataset[(0, self.videos[key[1]])]


def _rows(
    dataset: KeyedDataset, videos: list[int], workers: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield a row for each of `videos`, in order, also when a loader process dies."""

    def read(subset: list[int], processes: int) -> Iterator[dict[str, Any]]:
        return read_batches(
            _Pending(dataset, subset),
            SequentialBatchSampler(len(subset), 1),
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
            # One of the videos that were being read has crashed its decoder. Each of them is read
            # again in a process of its own: the one whose process dies again is unreadable.
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
    """Score videos, and enter the results into `predictions`.

    Scores are averaged over the clips of a video: softmax, or logits if `predictions.protocol` has
    "scores": "logits". The computation is in float32 whatever the precision of the training, so
    that scores differ by less than 1e-4 between batch sizes.

    Args:
        model: The student to test.
        dataset: dataset[(0, i)] gives the clips of the i-th video, see EvaluationClips.
        predictions: Tables to fill.
        videos: Indices of the videos to score, by default all pending ones.
        batch_size: Clips per forward pass.
        workers: Loader processes.
        device: Where to compute.
        done: Called with 1 after each video.
        save: Called about once a minute and on Ctrl-C.

    Raises:
        TrainingError: Scores are not finite, so that no accuracy would mean anything.
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
    """Score the clips of whole videos in passes of at most `batch_size` clips."""
    clips = torch.cat([row["clips"][0] for row in rows])  # [ΣN, C, T, H, W]
    parts = [
        clip_logits(model, part.to(device, non_blocking=True)) for part in clips.split(batch_size)
    ]
    counts = [row["clips"].shape[1] for row in rows]
    logits, features = (torch.cat(part).cpu().split(counts) for part in zip(*parts, strict=True))
    averaged = (
        logits
        if predictions.protocol.get("scores") == LOGITS
        else [each.softmax(dim=1) for each in logits]
    )
    for row, scores, feature in zip(rows, averaged, features, strict=True):
        video = int(row["video"][0])
        if not bool(torch.isfinite(scores).all()):
            raise TrainingError(
                f"the scores of {predictions.videos[video]!r} are not finite: the weights are damaged or have diverged"
            )
        starts = row["starts"][0].numpy().astype(np.int64)
        predictions.set_scores(
            video,
            scores.numpy(),
            starts,
            int(row["frames"][0]),
            note=row["note"][0],
            features=feature.numpy(),
        )
        done(1)


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


@contextmanager
def _on_interrupt(save: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        save()
        raise


@contextmanager
def _exact_float32(device: torch.device) -> Iterator[None]:
    """Turn TF32 off on a GPU, whose convolutions round differently for every batch size."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=False, allow_tf32=False
    ):
        yield
