"""The figures of a report: each one for which the data are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...common.errors import UsageError
from ...evaluation.ensemble import compare_predictions
from ...students.student_options import STEM
from ..ablation_results import Ablation
from ..accuracy_tables import Difference
from ..run_pairs import Pair, largest_gain
from ..runs import Run, short_path
from .accuracy_figures import accuracies, class_gains, curves, gains, paired, points
from .canvas import Figure, styled
from .entropy import StoreSurvey, densities, threshold_points
from .features import feature_map
from .filters import Filters, in_space, over_time, read_filters


def draw_figures(
    runs: Sequence[Run],
    ablations: Sequence[Ablation],
    alone: Sequence[Run],
    differences: Sequence[Difference],
    stores: Mapping[str, StoreSurvey],
    kinetics: str | None,
    pair: Pair | None,
) -> list[Figure]:
    """In the order of the page. alone: finetuned runs of no ablation, differences: theirs; the rest
    as in `contents`.

    Raises WeightsError and UsageError for `kinetics`.
    """
    filters = _kinetics(kinetics) if kinetics is not None else None
    with styled():
        return _draw(runs, ablations, alone, differences, stores, filters, pair)


def _draw(
    runs: Sequence[Run],
    ablations: Sequence[Ablation],
    alone: Sequence[Run],
    differences: Sequence[Difference],
    stores: Mapping[str, StoreSurvey],
    kinetics: Filters | None,
    pair: Pair | None,
) -> list[Figure]:
    found: list[Figure | None] = [accuracies(alone), paired(differences)]
    found += [_ablation(number, ablation) for number, ablation in enumerate(ablations, start=1)]
    filters = [filters for run in runs for filters in read_filters(run)]
    found += [over_time(filters), in_space(filters, kinetics)]
    with_features = [
        run for run in runs if run.predictions is not None and run.predictions.features.shape[2]
    ]
    cells = [cell for ablation in ablations for cell in ablation.cells]
    alike = {cell.run.path: cell.record.row for cell in cells if cell.run is not None}
    mapped, best = pair or largest_gain(with_features, alike), pair or largest_gain(runs, alike)
    if mapped is not None:
        found.append(feature_map(*mapped))
    for number, (path, store) in enumerate(stores.items(), start=1):
        thresholds = next(
            (rows for rows in (threshold_points(each, path) for each in ablations) if rows), []
        )
        found.append(densities(store.surveys or [], thresholds, short_path(path), number))
    if best is not None and best[0].predictions is not None and best[1].predictions is not None:
        compared = compare_predictions(
            best[0].predictions, best[1].predictions, (best[0].name, best[1].name)
        )
        found.append(class_gains(compared, *best))
    found += [
        curves(runs, "student", "Loss of distillation"),
        curves(runs, "finetune", "Loss of finetuning"),
    ]
    return [figure for figure in found if figure is not None]


def _ablation(number: int, ablation: Ablation) -> Figure | None:
    """What each row gains over the first; of a single data set, so that the axis means one
    thing."""
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
    from ...common.weights import (
        load_weights,
    )  # with torch, which takes seconds and which no other figure needs

    stem = load_weights(path).state.get(STEM)
    if stem is None or stem.ndim != 5:
        raise UsageError(
            f"--kinetics {path}: has no {STEM}; expected weights of R(2+1)D in torchvision's names"
        )
    return Filters(short_path(path), stem.numpy().astype(np.float64), "Kinetics")
