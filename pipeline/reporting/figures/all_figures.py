"""The figures of a report, as far as there is data for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...common.errors import UsageError
from ...evaluation.ensemble import compare_predictions
from ...students.student_options import STEM
from ..ablation_results import Ablation
from ..accuracy_tables import Difference
from ..run_pairs import Pair, largest_gain, rows_of_runs
from ..runs import Run, short_path
from .accuracy_figures import accuracies, class_gains, gains, paired, points
from .canvas import Figure, styled
from .entropy import StoreStats, densities, threshold_points
from .features import backbone_features, feature_map
from .filters import RGB, Filters, in_space, over_time, read_filters
from .learning_curves import learning_curves


@styled()
def draw_figures(
    runs: Sequence[Run],
    ablations: Sequence[Ablation],
    alone: Sequence[Run],
    differences: Sequence[Difference],
    stores: Mapping[str, StoreStats],
    kinetics: str | None,
    pair: Pair | None,
    features: Sequence[str],
) -> list[Figure]:
    """Draw the figures in the order of the page.

    Args:
        runs: All runs.
        ablations: The ablations.
        alone: Finetuned runs of no ablation.
        differences: Paired differences of these.
        stores: Stores by path.
        kinetics: File of R(2+1)D weights to compare with, if any.
        pair: The runs of Figures 5 and 7, by default those of the largest gain.
        features: Files of features of training videos, for Figure 5.

    Raises:
        WeightsError: `kinetics` cannot be read.
        UsageError: `kinetics` has other weights, or `features` are not of training videos.
        SourceError: A file of features cannot be read.
    """
    others = _kinetics(kinetics) if kinetics is not None else None
    backbone = backbone_features(features, runs)
    found: list[Figure | None] = [accuracies(alone), paired(differences)]
    found += [_ablation(number, ablation) for number, ablation in enumerate(ablations, start=1)]
    filters = [each for run in runs for each in read_filters(run)]
    found += [over_time(filters), in_space(filters, others), backbone]
    with_features = [
        run for run in runs if run.predictions is not None and run.predictions.features.shape[2]
    ]
    rows = rows_of_runs(ablations)
    mapped = pair or largest_gain(with_features, rows)
    best = pair or largest_gain(runs, rows)
    if mapped is not None:
        found.append(feature_map(*mapped))
    for number, (path, store) in enumerate(stores.items(), start=1):
        thresholds = next(
            (some for some in (threshold_points(each, path) for each in ablations) if some), []
        )
        found.append(densities(store.teachers or [], thresholds, short_path(path), number))
    if best is not None and best[0].predictions is not None and best[1].predictions is not None:
        compared = compare_predictions(
            best[0].predictions, best[1].predictions, (best[0].name, best[1].name)
        )
        found.append(class_gains(compared, *best))
    found += [
        learning_curves(runs, "student", "Learning curves of distillation"),
        learning_curves(runs, "finetune", "Learning curves of finetuning"),
    ]
    return [figure for figure in found if figure is not None]


def _ablation(number: int, ablation: Ablation) -> Figure | None:
    """Draw the gain of each row over the first, if there is a single data set."""
    if len(ablation.datasets) > 1:
        return None
    rows = [
        points(entry.row, entry.gain.estimate)
        for entry in ablation.entries
        if entry.gain is not None
    ]
    axis = f"difference in top 1 to “{ablation.rows[0]}”, points"
    return gains(rows, f"ablation-{number}", "Gain of each row over the first", axis)


def _kinetics(path: str) -> Filters:
    # Imports torch, which takes seconds and which no other figure requires.
    from ...common.weights import load_weights

    stem = load_weights(path).state.get(STEM)
    if stem is None or stem.ndim != 5 or stem.shape[1] != RGB:
        raise UsageError(
            f"--kinetics {path}: has no {STEM}; expected weights of R(2+1)D for RGB in torchvision's names"
        )
    return Filters(short_path(path), stem.numpy().astype(np.float64), "Kinetics")
