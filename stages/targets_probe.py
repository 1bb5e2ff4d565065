"""Probe cached targets on a user's labels (`distinit targets probe`)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from ..pipeline.common.console import Console
from ..pipeline.common.tables import Table, columns
from ..pipeline.evaluation.evaluation_options import ALL_FRAMES, ProbeConfig
from ..pipeline.evaluation.listing import short_dataset
from ..pipeline.evaluation.metrics import brackets
from ..pipeline.evaluation.store_labels import StoreLabels, match_labels
from ..pipeline.evaluation.target_probe import ProbeResult, probe_teacher
from ..pipeline.store.reader import TargetStore, check_video_roots


def targets_probe(options: ProbeConfig, console: Console) -> dict[str, Any]:
    """Show the accuracy of a linear probe for each teacher and number of frames.

    Raises:
        StoreError: The store cannot be read.
        UsageError: An option has a value that is not allowed, or no labelled video is in the store.
        LabelsError: The labels cannot be read.
    """
    store = TargetStore.open(options.store)
    check_video_roots(store, options.video_roots)
    labels = match_labels(
        store,
        options.dataset,
        root=options.root,
        split=options.split,
        video_roots=options.video_roots,
    )
    labels = _sampled(labels, options)
    names = store.target_names(options.teachers)
    counts, results = options.frame_counts(), list[ProbeResult]()
    notes = list(labels.notes)
    with console.progress("probing", len(names) * len(counts), "probes") as bar:
        for name in names:
            has_targets = np.isin(labels.videos, store.usable([name]))
            if not has_targets.all():
                notes.append(f"{(~has_targets).sum()} labelled videos have no targets of {name}")
            for result in probe_teacher(
                store,
                name,
                labels.choose(has_targets),
                counts,
                folds=options.folds,
                seed=options.seed,
            ):
                results.append(result)
                bar.advance(1)
    unfit = _unfit_teachers(results)
    _show(options, labels, results, notes, console)
    for name, best in unfit.items():
        console.warn(
            f"teacher {name} cannot distinguish these classes: a linear probe of its targets reaches "
            f"{best.accuracy.percent()}, the most frequent class has {100 * best.most_frequent:.1f} %; "
            f"expect little of its students on these labels"
        )
    return {
        "store": store.name,
        "dataset": options.dataset,
        "split": options.split,
        "folds": options.folds if options.split is None else None,
        "videos": len(labels.videos),
        "groups": len(np.unique(labels.group)),
        "classes": list(labels.classes),
        "probes": [_as_dict(result) for result in results],
        "cannot_tell_apart": list(unfit),
        "notes": notes,
    }


def _sampled(labels: StoreLabels, options: ProbeConfig) -> StoreLabels:
    """Choose at most `sample` videos, so that the probe of a large data set is quick."""
    count = len(labels.videos)
    if count <= options.sample:
        return labels
    is_sampled = np.zeros(count, bool)
    is_sampled[np.random.default_rng(options.seed).permutation(count)[: options.sample]] = True
    labels.notes.append(f"{options.sample} of {count} labelled videos are used; see --sample")
    return labels.choose(is_sampled)


def _unfit_teachers(results: list[ProbeResult]) -> dict[str, ProbeResult]:
    """Return the best probe of each teacher whose probes do not beat the most frequent class."""
    best: dict[str, ProbeResult] = {}
    for result in results:
        previous = best.setdefault(result.teacher, result)
        gain = result.accuracy.low - result.most_frequent
        if gain > previous.accuracy.low - previous.most_frequent:
            best[result.teacher] = result
    return {name: result for name, result in best.items() if not result.beats_most_frequent}


def _show(
    options: ProbeConfig,
    labels: StoreLabels,
    results: list[ProbeResult],
    notes: list[str],
    console: Console,
) -> None:
    num_tested = len(results[0].correct) if results else 0
    protocol = f"split {options.split}" if options.split is not None else f"{options.folds} folds"
    table = Table(
        f"linear probe of cached targets on {short_dataset(options.dataset)}, {protocol}, "
        f"{num_tested} test videos of {len(labels.classes)} classes, "
        f"{len(np.unique(labels.group))} sources",
        columns(
            "teacher", "output", "kept as", ">width", ">frames", ">accuracy, %", ">95 % interval"
        ),
        notes=[*_baselines(results, labels), *notes],
    )
    for result in results:
        table.add(
            result.teacher,
            result.output,
            result.encoding,
            f"{result.width}",
            ALL_FRAMES if result.frames is None else str(result.frames),
            f"{100 * result.accuracy.value:.1f}",
            brackets(result.accuracy.low, result.accuracy.high),
        )
    console.table(table.to_rich())


def _baselines(results: list[ProbeResult], labels: StoreLabels) -> list[str]:
    shares = Counter(round(100 * each.most_frequent, 1) for each in results)
    if not shares:
        return []
    return [
        f"most frequent class {', '.join(map(str, shares))} %, chance "
        f"{100 / len(labels.classes):.1f} %"
    ]


def _as_dict(result: ProbeResult) -> dict[str, Any]:
    return {
        "teacher": result.teacher,
        "output": result.output,
        "encoding": result.encoding,
        "width": result.width,
        "frames": ALL_FRAMES if result.frames is None else result.frames,
        "accuracy": result.accuracy.as_dict(),
        "most_frequent_class": result.most_frequent,
        "tells_apart": result.beats_most_frequent,
    }
