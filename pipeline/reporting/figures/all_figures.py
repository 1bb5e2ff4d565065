"""Draw the figures of a report that its runs have data for."""

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
from .accuracy_figures import accuracies, class_gains, estimate_row, gains, paired
from .canvas import Figure, styled
from .entropy import StoreStats, densities, threshold_points
from .features import backbone_features, feature_map
from .filters import RGB, Filters, in_space, over_time, read_filters
from .learning_curves import learning_curves


@styled()
def draw_figures(
    runs: Sequence[Run],
    ablations: Sequence[Ablation],
    finetuned: Sequence[Run],
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
        finetuned: Finetuned runs that belong to no ablation.
        differences: Paired differences of these runs.
        stores: Stores by path.
        kinetics: File of R(2+1)D weights to compare with, if any.
        pair: The runs of Figures 5 and 7, by default those of the largest gain.
        features: Files of features of training videos, for Figure 5.

    Raises:
        WeightsError: `kinetics` cannot be read.
        UsageError: `kinetics` has other weights, or `features` are not of training videos.
        SourceError: A file of features cannot be read.
    """
    kinetics_filters = _kinetics_filters(kinetics) if kinetics is not None else None
    backbone = backbone_features(features, runs)
    figures: list[Figure | None] = [accuracies(finetuned), paired(differences)]
    figures += [_ablation(number, ablation) for number, ablation in enumerate(ablations, start=1)]
    filters = [each for run in runs for each in read_filters(run)]
    figures += [over_time(filters), in_space(filters, kinetics_filters), backbone]
    with_features = [
        run for run in runs if run.predictions is not None and run.predictions.features.shape[2]
    ]
    rows = rows_of_runs(ablations)
    mapped = pair or largest_gain(with_features, rows)
    if mapped is not None:
        figures.append(feature_map(*mapped))
    for number, (path, store) in enumerate(stores.items(), start=1):
        by_ablation = (threshold_points(ablation, path) for ablation in ablations)
        points = next((points for points in by_ablation if points), [])
        figures.append(densities(store.teachers or [], points, short_path(path), number))
    compared = pair or largest_gain(runs, rows)
    if compared is not None:
        figures.append(_class_gains(*compared))
    figures += [
        learning_curves(runs, "student", "Learning curves of distillation"),
        learning_curves(runs, "finetune", "Learning curves of finetuning"),
    ]
    return [figure for figure in figures if figure is not None]


def _class_gains(a: Run, b: Run) -> Figure | None:
    """Draw the gain of each class, None if a run was not evaluated."""
    if a.predictions is None or b.predictions is None:
        return None
    comparison = compare_predictions(a.predictions, b.predictions, (a.name, b.name))
    return class_gains(comparison, a, b)


def _ablation(number: int, ablation: Ablation) -> Figure | None:
    """Draw the gain of each row over the first, if there is a single data set."""
    if len(ablation.datasets) > 1:
        return None
    rows = [
        estimate_row(entry.row, entry.gain.estimate)
        for entry in ablation.entries
        if entry.gain is not None
    ]
    axis = f"difference in top 1 to “{ablation.rows[0]}”, points"
    return gains(rows, f"ablation-{number}", "Gain of each row over the first", axis)


def _kinetics_filters(path: str) -> Filters:
    # Imports torch, which takes seconds and which no other figure requires.
    from ...common.weights import load_weights

    stem = load_weights(path).state.get(STEM)
    if stem is None or stem.ndim != 5 or stem.shape[1] != RGB:
        raise UsageError(
            f"--kinetics {path}: has no {STEM}; expected weights of R(2+1)D for RGB in torchvision's names"
        )
    return Filters(short_path(path), stem.numpy().astype(np.float64), "Kinetics")
