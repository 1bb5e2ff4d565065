"""`finetune --held-out`: take a validation side out of the train side of labels."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

from ..common.errors import UsageError
from .labels import Labelled, Labels


def hold_out(labels: Labels, share: float) -> Labels:
    """Move a share of the train side to the validation side.

    All videos of one recording (`source`) stay on one side, every class keeps a train video, and
    each class gives its share as far as recordings allow. The choice depends on the names of
    recordings and videos alone, so that runs with other seeds or options share one validation side.

    Args:
        labels: A data set without a validation side.
        share: Share of the train videos to hold out; 0 returns `labels`.

    Raises:
        UsageError: The labels have a validation side already, or no recording can be spared.
    """
    if share == 0:
        return labels
    if labels.val:
        raise UsageError(
            f"--held-out {share:g}: {labels.dataset} has a validation side of {len(labels.val)} videos already"
        )
    held = _chosen(_recordings(labels.train), share)
    if not held:
        raise UsageError(
            f"--held-out {share:g}: takes none of the {len(labels.train)} train videos of {labels.dataset}; "
            "a class keeps one recording for training, give a larger share or more videos"
        )
    val = tuple(video for video in labels.train if video in held)
    train = tuple(video for video in labels.train if video not in held)
    return replace(labels, train=train, val=val, listed_train=labels.train)


def _recordings(videos: tuple[Labelled, ...]) -> list[list[Labelled]]:
    """Return the videos of each recording, in an order by the digest of its name."""
    groups: dict[tuple[bool, str], list[Labelled]] = {}
    for video in videos:
        groups.setdefault((bool(video.source), video.source or video.path), []).append(video)

    def digest(name: tuple[bool, str]) -> bytes:
        return hashlib.sha256(name[1].encode(errors="surrogateescape")).digest()

    return [groups[name] for name in sorted(groups, key=digest)]


def _chosen(recordings: list[list[Labelled]], share: float) -> set[Labelled]:
    """Take each recording that brings the classes nearer to their shares."""
    left = Counter(video.label for recording in recordings for video in recording)
    # At least one video of a small class, if another is left to train on.
    missing = {label: max(1, round(share * n)) for label, n in left.items()}
    held: set[Labelled] = set()
    for recording in recordings:
        counts = Counter(video.label for video in recording)
        nearer = sum(missing[k] ** 2 - (missing[k] - n) ** 2 for k, n in counts.items()) > 0
        if nearer and all(left[k] > n for k, n in counts.items()):
            held.update(recording)
            left.subtract(counts)
            for label, n in counts.items():
                missing[label] -= n
    return held
