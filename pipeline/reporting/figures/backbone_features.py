"""What Figure 5 requires: the features of files, the labels of their videos, and their networks.

Features are computed by `distinit embed`, which runs the network; a report runs none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...common.errors import UsageError
from ...evaluation.feature_files import FeatureFile, read_features
from ...evaluation.run_labels import RunLabels
from ..runs import Run, short_path
from .canvas import Figure
from .features import MIN_VIDEOS, backbone_map


def backbone_features(files: Sequence[str], runs: Sequence[Run]) -> Figure | None:
    """Draw Figure 5 of the networks whose features are in files; None without a file.

    The labels are those of the training videos of the first finetuned run that has enough of them.

    Args:
        files: Files of features that `distinit embed` wrote.
        runs: All runs.

    Raises:
        SourceError: A file cannot be read.
        UsageError: The files have too few training videos of a run in common.
        CheckpointError: The labels of a run are damaged.
    """
    if not files:
        return None
    read = [read_features(file) for file in files]
    names = _names(read, runs)
    for run in runs:
        record = RunLabels.read(run.path) if run.kind == "finetune" else None
        if record is None:
            continue
        labels = dict(record.train)
        features = [
            {label: found.features[at] for label, at in _matches(found.videos, labels).items()}
            for found in read
        ]
        about = " ".join(_about(name, found, runs) for name, found in zip(names, read, strict=True))
        figure = backbone_map(
            list(zip(names, features, strict=True)), labels, record.classes, about
        )
        if figure is not None:
            return figure
    raise UsageError(
        f"--features {' '.join(files)}: expected at least {MIN_VIDEOS} training videos of a finetuned run in every "
        "file; distinit embed STUDENT FOLDER --out FILE.h5 computes the features of a data set's videos"
    )


def _matches(videos: Sequence[str], labels: Mapping[str, int]) -> dict[str, int]:
    """Return labelled path → index of the video whose path ends with it."""
    found = {}
    for at, video in enumerate(videos):
        parts = video.split("/")
        for first in range(len(parts)):
            if (path := "/".join(parts[first:])) in labels:
                found[path] = at
                break
    return found


def _run_of(found: FeatureFile, runs: Sequence[Run]) -> Run | None:
    """Return the run whose model computed the features, if it is among the runs."""
    model = Path(str(found.about.get("model", ""))).resolve()
    return next((run for run in runs if model in (run.path, run.model.resolve())), None)


def _names(read: Sequence[FeatureFile], runs: Sequence[Run]) -> list[str]:
    names = []
    for found in read:
        run = _run_of(found, runs)
        names.append(run.name if run else short_path(str(found.about.get("model", ""))) or "?")
    # The same run may have been embedded with other clips.
    return [f"{name} ({at})" if names.count(name) > 1 else name for at, name in enumerate(names, 1)]


def _about(name: str, found: FeatureFile, runs: Sequence[Run]) -> str:
    """Describe what a network has learned from, for the caption."""
    run = _run_of(found, runs)
    if run is None:
        return f"{name}: not among the runs of this report."
    if run.kind == "student":
        return f"{name}: distilled, it has seen no action label."
    if run.config.get("freeze") == "backbone":
        return f"{name}: the unchanged backbone of {run.init}."
    return f"{name}: finetuned on these labels."
