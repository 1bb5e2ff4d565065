"""Figure 5: t-SNE of features, of the training videos as in the paper, and of test videos.

Those of training videos are computed by `distinit embed`, which runs the network; a report runs
none.

Shapes: V videos, N clips, D features.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure as Canvas

from ...common.errors import UsageError
from ...evaluation.feature_files import FeatureFile, read_features
from ...evaluation.predictions import Predictions
from ...evaluation.run_labels import RunLabels
from ..runs import Run, short_path
from .canvas import MARKERS, Figure, colour, finish, new_canvas, short

FEATURES = "figure-5-features"
BACKBONE = "figure-5-backbone"
CLASSES = 10  # the paper's number
MIN_VIDEOS = 12
SEED = 0
READING = "The features distinguish classes that are separated; distances between groups and the axes have no meaning."
Features = Mapping[str, np.ndarray]
"""Video → its features [D]."""


def feature_map(a: Run, b: Run) -> Figure | None:
    """Draw a map of the features of each run.

    Returns:
        None if a run has no features, or the two share fewer than MIN_VIDEOS videos.
    """
    if a.predictions is None or b.predictions is None:
        return None
    first, second = (_means(run.predictions) for run in (a, b) if run.predictions is not None)
    both = sorted(first.keys() & second.keys())
    labels = dict(zip(a.predictions.videos, a.predictions.labels.tolist(), strict=True))
    present = np.bincount([labels[v] for v in both], minlength=1) if both else np.zeros(1, int)
    # The paper chose 10 classes at random; those with the most videos are more informative.
    order = np.argsort(-present, kind="stable")
    classes = [int(k) for k in order[:CLASSES] if present[k]]
    videos = [v for v in both if labels[v] in classes]
    if len(videos) < MIN_VIDEOS:
        return None
    canvas = _draw(
        [(a.name, first), (b.name, second)], videos, labels, {k: a.predictions.classes[k] for k in classes}
    )  # fmt: skip
    caption = (
        f"t-SNE of the features before the head, averaged over the clips of a video, for {len(videos)} test videos of "
        f"{len(classes)} classes (colour and shape): {a.name} on the left, {b.name} on the right. Both networks were "
        "finetuned on these classes; the paper’s Figure 5 shows the distilled backbone on training videos, as "
        f"--features FILE does here. {READING}"
    )
    title = "After Figure 5: features of test videos, of finetuned networks"
    return finish(canvas, FEATURES, title, caption, [a.name, b.name])


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


def backbone_map(
    named: Sequence[tuple[str, Features]],
    labels: Mapping[str, int],
    classes: Sequence[str],
    about: str,
) -> Figure | None:
    """Draw Figure 5 as the paper has it: features of training videos, of random classes.

    Args:
        named: Name of each network, and its features.
        labels: Class index of each training video.
        classes: Names of the classes.
        about: What the networks are, for the caption.

    Returns:
        None if the networks share fewer than MIN_VIDEOS labelled videos of these classes.
    """
    both = sorted(set(labels).intersection(*(features for _, features in named)))
    present = sorted({labels[video] for video in both})
    # Random ones, as in the paper, but the same in every report.
    order = np.random.default_rng(SEED).permutation(present)[:CLASSES]
    chosen = {int(k): classes[int(k)] for k in sorted(order)}
    videos = [video for video in both if labels[video] in chosen]
    if len(videos) < MIN_VIDEOS:
        return None
    caption = (
        f"t-SNE of the features before the head, averaged over the clips of a video, for {len(videos)} training videos "
        f"of {len(chosen)} random classes (colour and shape). {about} {READING}"
    )
    return finish(
        _draw(named, videos, labels, chosen), BACKBONE, "Figure 5: features of training videos", caption,
        [name for name, _ in named],
    )  # fmt: skip


def _draw(
    named: Sequence[tuple[str, Features]],
    videos: Sequence[str],
    labels: Mapping[str, int],
    classes: Mapping[int, str],
) -> Canvas:
    """Draw a map for each network, of the same videos."""
    canvas, axes = new_canvas(4.5 * len(named) if len(named) > 1 else 6, 4.6, 1, len(named))
    owner = np.array([labels[video] for video in videos])
    for ax, (name, features) in zip(axes, named, strict=True):
        places = embed(np.stack([features[video] for video in videos]))
        for i, (k, label) in enumerate(sorted(classes.items())):
            mine = places[owner == k]
            ax.scatter(
                mine[:, 0], mine[:, 1], s=34, color=colour(i), marker=MARKERS[i % len(MARKERS)], linewidths=0.4,
                edgecolors="white", label=short(label, 30) if ax is axes[0] else None,
            )  # fmt: skip
        ax.set_title(textwrap.fill(short(name, 96), 54), fontsize=11)
        ax.set_xticks([])
        ax.set_yticks([])
    canvas.legend(loc="outside lower center", ncols=4, fontsize=10)
    return canvas


def embed(features: np.ndarray) -> np.ndarray:
    """Embed features [V, D] in two dimensions [V, 2] by t-SNE with a fixed seed.

    Features are not normalised; the perplexity is 30, or less for few videos.
    """
    from sklearn.manifold import TSNE  # takes seconds

    perplexity = min(30.0, max(2.0, (len(features) - 1) / 4))
    found = TSNE(
        perplexity=perplexity, init="pca", random_state=SEED, learning_rate="auto"
    ).fit_transform(features)
    return np.asarray(found, dtype=np.float64)


def _means(found: Predictions) -> dict[str, np.ndarray]:
    """Return the features [D] of each video, averaged over its clips."""
    if not found.features.shape[2]:
        return {}
    means = found.features.astype(np.float64).mean(axis=1)
    good = (np.abs(means) < 1e15).all(axis=1)  # finite, and so are their squares
    return {video: mean for video, mean, ok in zip(found.videos, means, good, strict=True) if ok}
