"""RUN/labels.json: the labels of a run, so that later changes of their source are noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..common.documents import is_regular_file
from ..common.errors import CheckpointError
from ..common.files import write_whole
from ..common.run_dir import LABELS
from ..common.streams import as_json
from ..corpus.sources import escape_path
from .labels import Labelled, Labels

Pair = tuple[str, int]


@dataclass(frozen=True)
class RunLabels:
    """Data set, split, classes, and (percent-escaped path, class index) of the videos of each side.

    `digest` is that of `labels_digest`.
    """

    dataset: str
    split: int
    classes: list[str]
    train: list[Pair]
    test: list[Pair]
    digest: str

    @classmethod
    def from_labels(cls, labels: Labels) -> RunLabels:
        """Return the record of labels."""
        train, test = _pairs(labels.listed), _pairs(labels.test)
        dataset = escape_path(labels.dataset)
        return cls(dataset, labels.split, list(labels.classes), train, test, labels_digest(labels))

    @classmethod
    def read(cls, run: Path) -> RunLabels | None:
        """Load the record of a run folder; None if it has none, as in runs of distinit 0.1.

        Raises:
            CheckpointError: The file is damaged.
            SourceError: The file is a link out of the folder.
        """
        path = run / LABELS
        if not is_regular_file(path, run):
            return None
        try:
            content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            sides = {
                side: [(str(name), int(label)) for name, label in content[side]]
                for side in ("train", "test")
            }
            return cls(**{**content, **sides})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def write(self, run: Path) -> None:
        """Write RUN/labels.json atomically."""
        write_whole(run / LABELS, as_json(asdict(self), indent=0).encode())

    def difference(self, labels: Labels, sides: Sequence[str] = ("train", "test")) -> str:
        """Describe how labels differ from the record on some sides, "" if they are equal."""
        if list(labels.classes) != self.classes:
            old, new = set(self.classes), set(labels.classes)
            parts = _counts({"removed": old - new, "added": new - old})
            return f"different classes: {parts or 'another order'}"
        recorded, current = (
            {side: dict(pairs[side]) for side in sides}
            for pairs in (self._sides(), RunLabels.from_labels(labels)._sides())
        )
        old, new = (set().union(*each.values()) for each in (recorded, current))
        changed = {
            path
            for path in old & new
            if any(recorded[s].get(path) != current[s].get(path) for s in sides)
        }
        parts = _counts(
            {
                "videos with another side or label": changed,
                "videos added": new - old,
                "videos removed": old - new,
            }
        )
        if not parts and any(list(recorded[s]) != list(current[s]) for s in sides):
            return "the same videos in another order"
        return parts

    def _sides(self) -> dict[str, list[Pair]]:
        return {"train": self.train, "test": self.test}


def labels_digest(labels: Labels) -> str:
    """Return the sha256 of classes, train and test lists in hex; independent of the root folder."""
    content = [
        list(labels.classes),
        *([[v.path, v.label] for v in side] for side in (labels.listed, labels.test)),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def videos_digest(videos: Sequence[Labelled]) -> str:
    """Return the sha256 of the paths and labels of videos in hex."""
    return hashlib.sha256(json.dumps([[v.path, v.label] for v in videos]).encode()).hexdigest()


def _counts(names: Mapping[str, set[str]]) -> str:
    """Return "N DESCRIPTION ('FIRST NAME')" for each set that is not empty."""
    return ", ".join(
        f"{len(each)} {description} ({min(each)!r})" for description, each in names.items() if each
    )


def _pairs(side: Sequence[Labelled]) -> list[Pair]:
    return [(escape_path(video.path), video.label) for video in side]
