"""Figure 5: t-SNE of the features of test videos for two finetuned runs.

Shapes: V videos, N clips, D features.
"""

from __future__ import annotations

import textwrap

import numpy as np

from ...evaluation.predictions import Predictions
from ..runs import Run
from .canvas import MARKERS, Figure, colour, finish, new_canvas, short

FEATURES = "figure-5-features"
CLASSES = 10  # the paper's number
MIN_VIDEOS = 12
SEED = 0


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
    canvas, axes = new_canvas(9, 4.6, 1, 2)
    owner = np.array([labels[v] for v in videos])
    for ax, run, features in zip(axes, (a, b), (first, second), strict=True):
        places = embed(np.stack([features[v] for v in videos]))
        for i, k in enumerate(sorted(classes)):
            mine = places[owner == k]
            ax.scatter(
                mine[:, 0], mine[:, 1], s=34, color=colour(i), marker=MARKERS[i % len(MARKERS)], linewidths=0.4,
                edgecolors="white", label=short(a.predictions.classes[k], 30) if run is a else None,
            )  # fmt: skip
        ax.set_title(textwrap.fill(short(run.name, 96), 54), fontsize=9.5)
        ax.set_xticks([])
        ax.set_yticks([])
    canvas.legend(loc="outside lower center", ncols=4, fontsize=8.5)
    caption = (
        f"t-SNE of the features before the head, averaged over the clips of a video, for {len(videos)} test videos of "
        f"{len(classes)} classes (colour and shape): {a.name} on the left, {b.name} on the right. Both networks were "
        "finetuned on these classes; the paper’s Figure 5 shows the distilled backbone, which has seen no action "
        "label, on training videos (a run of finetune --freeze backbone comes close). The features distinguish "
        "classes that are separated; distances between groups and the axes have no meaning."
    )
    title = "After Figure 5: features of test videos, of finetuned networks"
    return finish(canvas, FEATURES, title, caption, [a.name, b.name])


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
