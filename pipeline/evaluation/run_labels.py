"""RUN/labels.json: the label list that a run was trained on, whatever becomes of the file that it
was read from."""

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
    """dataset, split, classes, and of each side (path, index of the class), paths percent-escaped.
    digest: see `labels_digest`."""

    dataset: str
    split: int
    classes: list[str]
    train: list[Pair]
    test: list[Pair]
    digest: str

    @classmethod
    def of(cls, labels: Labels) -> RunLabels:
        """What `write` keeps of labels."""
        train, test = _pairs(labels.train), _pairs(labels.test)
        dataset = escape_path(labels.dataset)
        return cls(dataset, labels.split, list(labels.classes), train, test, labels_digest(labels))

    @classmethod
    def read(cls, run: Path) -> RunLabels | None:
        """Return what a run folder recorded; None where it has no record, as runs of distinit 0.1.
        CheckpointError, and SourceError for a link that leads out of the folder."""
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
        """Write RUN/labels.json, whole or not at all. CheckpointError."""
        write_whole(run / LABELS, as_json(asdict(self), indent=0).encode())

    def difference(self, labels: Labels, sides: Sequence[str] = ("train", "test")) -> str:
        """How labels differ from these, in words; "" where they do not. sides: those that are
        compared."""
        if list(labels.classes) != self.classes:
            gone = sorted(set(self.classes) - set(labels.classes))
            new = sorted(set(labels.classes) - set(self.classes))
            parts = [
                f"{len(names)} {what} ({names[0]!r})"
                for what, names in (("gone", gone), ("new", new))
                if names
            ]
            return f"other classes: {', '.join(parts) or 'another order'}"
        before, now = (
            {s: dict(pairs[s]) for s in sides}
            for pairs in (self._sides(), RunLabels.of(labels)._sides())
        )
        were, are = (set().union(*(set(side) for side in each.values())) for each in (before, now))
        changed = sorted(
            p for p in were & are if any(before[s].get(p) != now[s].get(p) for s in sides)
        )
        parts = [
            f"{len(names)} videos {what} ({names[0]!r})"
            for names, what in (
                (changed, "with another side or label"),
                (sorted(are - were), "new"),
                (sorted(were - are), "gone"),
            )
            if names
        ]
        if not parts and any(list(before[s]) != list(now[s]) for s in sides):
            return "the same videos in another order"
        return ", ".join(parts)

    def _sides(self) -> dict[str, list[Pair]]:
        return {"train": self.train, "test": self.test}


def labels_digest(labels: Labels) -> str:
    """sha256 of classes and of both lists, in hex: the same labels wherever the files lie."""
    content = [
        list(labels.classes),
        *([[v.path, v.label] for v in side] for side in (labels.train, labels.test)),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _pairs(side: Sequence[Labelled]) -> list[Pair]:
    return [(escape_path(video.path), video.label) for video in side]
