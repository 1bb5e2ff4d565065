"""Figure 5: t-SNE of features of training videos, as in the paper, and of test videos.

A report runs no network. `distinit embed` computes the features of training videos; those of test
videos are part of the predictions.

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
# The number in the paper.
CLASSES = 10
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
    counts = np.bincount([labels[v] for v in both], minlength=1) if both else np.zeros(1, int)
    # The paper chose 10 classes at random; classes with many videos are more informative.
    order = np.argsort(-counts, kind="stable")
    classes = [int(k) for k in order[:CLASSES] if counts[k]]
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
    """Draw Figure 5 from files of features, or return None without a file.

    The labels are taken from the first finetuned run that has enough training videos in the files.

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
    feature_files = [read_features(path) for path in files]
    names = _names(feature_files, runs)
    for run in runs:
        record = RunLabels.read(run.path) if run.kind == "finetune" else None
        if record is None:
            continue
        labels = dict(record.train)
        features = [
            {label: file.features[index] for label, index in _matches(file.videos, labels).items()}
            for file in feature_files
        ]
        about = " ".join(
            _about(name, file, runs) for name, file in zip(names, feature_files, strict=True)
        )
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
    matches = {}
    for index, video in enumerate(videos):
        parts = video.split("/")
        for start in range(len(parts)):
            if (path := "/".join(parts[start:])) in labels:
                matches[path] = index
                break
    return matches


def _run_of(file: FeatureFile, runs: Sequence[Run]) -> Run | None:
    """Return the run whose model computed the features, if it is among the runs."""
    model = Path(str(file.about.get("model", ""))).resolve()
    return next((run for run in runs if model in (run.path, run.model.resolve())), None)


def _names(files: Sequence[FeatureFile], runs: Sequence[Run]) -> list[str]:
    names = []
    for file in files:
        run = _run_of(file, runs)
        names.append(run.name if run else short_path(str(file.about.get("model", ""))) or "?")
    # The same run may have been embedded several times, with different clips.
    return [
        f"{name} ({number})" if names.count(name) > 1 else name
        for number, name in enumerate(names, 1)
    ]


def _about(name: str, file: FeatureFile, runs: Sequence[Run]) -> str:
    """Describe the training of a network for the caption."""
    run = _run_of(file, runs)
    if run is None:
        return f"{name}: not among the runs of this report."
    if run.kind == "student":
        return f"{name}: distilled, it has seen no action label."
    if run.config.get("freeze") == "backbone":
        return f"{name}: the unchanged backbone of {run.init}."
    return f"{name}: finetuned on these labels."


def backbone_map(
    networks: Sequence[tuple[str, Features]],
    labels: Mapping[str, int],
    classes: Sequence[str],
    about: str,
) -> Figure | None:
    """Draw Figure 5 as in the paper: features of training videos of random classes.

    Args:
        networks: Name of each network, and its features.
        labels: Class index of each training video.
        classes: Names of the classes.
        about: Description of the networks for the caption.

    Returns:
        None if the networks share fewer than MIN_VIDEOS labelled videos of these classes.
    """
    both = sorted(set(labels).intersection(*(features for _, features in networks)))
    labels_present = sorted({labels[video] for video in both})
    # Random classes as in the paper, but the same in every report.
    order = np.random.default_rng(SEED).permutation(labels_present)[:CLASSES]
    chosen = {int(k): classes[int(k)] for k in sorted(order)}
    videos = [video for video in both if labels[video] in chosen]
    if len(videos) < MIN_VIDEOS:
        return None
    caption = (
        f"t-SNE of the features before the head, averaged over the clips of a video, for {len(videos)} training videos "
        f"of {len(chosen)} random classes (colour and shape). {about} {READING}"
    )
    return finish(
        _draw(networks, videos, labels, chosen), BACKBONE, "Figure 5: features of training videos", caption,
        [name for name, _ in networks],
    )  # fmt: skip


def _draw(
    networks: Sequence[tuple[str, Features]],
    videos: Sequence[str],
    labels: Mapping[str, int],
    classes: Mapping[int, str],
) -> Canvas:
    """Draw one map per network, all of the same videos."""
    canvas, axes = new_canvas(
        4.5 * len(networks) if len(networks) > 1 else 6, 4.6, 1, len(networks)
    )
    video_labels = np.array([labels[video] for video in videos])
    for ax, (network, features) in zip(axes, networks, strict=True):
        positions = embed(np.stack([features[video] for video in videos]))
        for i, (label, name) in enumerate(sorted(classes.items())):
            x, y = positions[video_labels == label].T
            ax.scatter(
                x, y, s=34, color=colour(i), marker=MARKERS[i % len(MARKERS)], linewidths=0.4,
                edgecolors="white", label=short(name, 30) if ax is axes[0] else None,
            )  # fmt: skip
        ax.set_title(textwrap.fill(short(network, 96), 54), fontsize=11)
        ax.set_xticks([])
        ax.set_yticks([])
    canvas.legend(loc="outside lower center", ncols=4, fontsize=10)
    return canvas


def embed(features: np.ndarray) -> np.ndarray:
    """Embed features [V, D] in two dimensions [V, 2] by t-SNE with a fixed seed.

    Features are not normalised; the perplexity is 30, or less for few videos.
    """
    # This import takes seconds.
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max(2.0, (len(features) - 1) / 4))
    positions = TSNE(
        perplexity=perplexity, init="pca", random_state=SEED, learning_rate="auto"
    ).fit_transform(features)
    return np.asarray(positions, dtype=np.float64)


def _means(predictions: Predictions) -> dict[str, np.ndarray]:
    """Return the features [D] of each video, averaged over its clips."""
    if not predictions.features.shape[2]:
        return {}
    means = predictions.features.astype(np.float64).mean(axis=1)
    # Finite features whose squares are finite too.
    drawable = (np.abs(means) < 1e15).all(axis=1)
    return {
        video: mean
        for video, mean, ok in zip(predictions.videos, means, drawable, strict=True)
        if ok
    }
