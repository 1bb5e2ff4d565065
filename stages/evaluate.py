"""Test a finetuned student again, fuse the predictions of several runs, or compare two runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..pipeline.clips.clip_options import ClipView
from ..pipeline.common.config import current_keys
from ..pipeline.common.console import Console
from ..pipeline.common.devices import resolve_device
from ..pipeline.common.distributed import Ranks
from ..pipeline.common.documents import Form, is_regular_file, load_yaml, read_bytes, read_json
from ..pipeline.common.errors import CheckpointError, LabelsError, UsageError
from ..pipeline.common.locks import folder_lock
from ..pipeline.common.run_dir import (
    CONFIG,
    LAST,
    MODEL_FILE,
    PREDICTIONS,
    RESULT,
    TEST_FILES,
    require_no_store,
    require_writable,
)
from ..pipeline.evaluation.compare import compare, fuse
from ..pipeline.evaluation.evaluation_options import EvaluateConfig, EvaluationOptions
from ..pipeline.evaluation.labelled_clips import count_sampled_frames, warn_of_short_videos
from ..pipeline.evaluation.labels import ALL, Labels, load_labels
from ..pipeline.evaluation.listing import short_dataset
from ..pipeline.evaluation.predictions import require_classes
from ..pipeline.evaluation.predictor import HEAD
from ..pipeline.evaluation.protocol import (
    check_result_dir,
    count_looks,
    evaluate_student,
    write_result,
)
from ..pipeline.evaluation.run_labels import RunLabels
from ..pipeline.evaluation.splits import split_folder, split_folders, summarise_splits
from ..pipeline.evaluation.test_overlap import overlap, require_same_labels
from ..pipeline.students.student import Student
from ..pipeline.students.student_files import load_student
from ..pipeline.students.student_hub import hub_model, is_hub_address
from ..pipeline.training.checkpoint import read_identity
from ..pipeline.training.launch import run_distributed
from ..pipeline.training.loop_options import LoopOptions
from ..pipeline.training.seen_videos import SeenVideos


def evaluate(config: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Test a finished run or model again, or fuse or compare existing predictions.

    A test writes predictions.h5, and its metrics into result.json.

    Returns:
        The content of result.json.

    Raises:
        UsageError: A run is not one of finetune, or `out` is missing with another data set or
            protocol.
        CheckpointError: The model is missing, or has other classes.
        LabelsError: The labels cannot be used.
        PredictionsError: Predictions cannot be used.
        SourceError: A file of the run is a link that leads out of its folder.
    """
    config = _without_own_run(config)
    if config.fuse:
        return _fuse(config)
    if config.compare:
        return compare(config.runs[0], config.runs[1], config.out)
    return run_distributed(
        _evaluate, config, console, LoopOptions(device=config.device, gpus=config.gpus)
    )


def _without_own_run(config: EvaluateConfig) -> EvaluateConfig:
    """Return the config without an `out` that is the tested run itself.

    Raises:
        UsageError: `out` is another run, whose predictions and result would be overwritten.
    """
    if config.out is None:
        return config
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file, expected a folder")
    require_no_store(out)
    if not (out / CONFIG).exists() and not split_folders(out):
        return config
    is_test = not (config.fuse or config.compare)
    if is_test and os.path.realpath(out) == os.path.realpath(config.runs[0]):
        return config.model_copy(update={"out": None})
    raise UsageError(
        f"--out {out}: is a run, whose predictions and result would be overwritten; choose another --out"
    )


def _fuse(config: EvaluateConfig) -> dict[str, Any]:
    """Fuse runs of one split, or runs of `finetune --split all` split by split."""
    folders = [split_folders(Path(run)) for run in config.runs]
    if config.out is None or not all(folders):
        return fuse(config.runs, config.weights, config.out)
    if any(by_split.keys() != folders[0].keys() for by_split in folders):
        listed = "; ".join(
            f"{run}: {', '.join(map(str, by_split))}"
            for run, by_split in zip(config.runs, folders, strict=True)
        )
        raise UsageError(f"--fuse: the runs have different splits ({listed})")
    out = Path(config.out)
    check_result_dir(out, {"run": str(out)})
    with folder_lock(out):
        results = {
            split: fuse(
                [str(by_split[split]) for by_split in folders],
                config.weights,
                str(split_folder(out, split)),
            )
            for split in folders[0]
        }
        return summarise_splits(out, results, "late fusion")


def _evaluate(config: EvaluateConfig, console: Console, ranks: Ranks) -> dict[str, Any]:
    """Run one process of the test; only rank 0 writes and holds locks."""
    address = config.runs[0]
    run = ranks.on_main(lambda: hub_model(address) if is_hub_address(address) else Path(address))
    splits = {} if (run / CONFIG).exists() else split_folders(run)
    if splits and config.split in (None, ALL):
        return _evaluate_all_splits(config, run, splits, console, ranks)
    if config.split == ALL:
        raise UsageError(
            f"--split all: {run} was trained on one split, and its training videos include test videos of the others"
        )
    if isinstance(config.split, int) and config.split in splits:
        run, config = splits[config.split], config.model_copy(update={"split": None})
    return _evaluate_split(
        config, ranks.on_all_ranks(lambda: _assemble(config, run)), run, console, ranks
    )


def _evaluate_all_splits(
    config: EvaluateConfig,
    run: Path,
    splits: dict[int, Path],
    console: Console,
    ranks: Ranks,
) -> dict[str, Any]:
    out = None if config.out is None else Path(config.out)
    if out is not None:
        ranks.on_main(lambda: check_result_dir(out, {"run": str(out)}))
    configs = {
        split: config.model_copy(
            update={"split": None, "out": None if out is None else str(split_folder(out, split))}
        )
        for split in splits
    }
    # All splits are checked before the first is tested.
    jobs = ranks.on_all_ranks(
        lambda: {split: _assemble(configs[split], folder) for split, folder in splits.items()}
    )
    with ranks.holding(folder_lock(out or run)):
        results = {
            split: _evaluate_split(configs[split], jobs[split], folder, console, ranks)
            for split, folder in splits.items()
        }
        title = short_dataset(next(iter(results.values()))["dataset"])
        return ranks.on_main(lambda: summarise_splits(out or run, results, title))


def _evaluate_split(
    config: EvaluateConfig, job: _Job, run: Path, console: Console, ranks: Ranks
) -> dict[str, Any]:
    out = Path(config.out or _folder(run))
    if config.out is not None:
        ranks.on_main(lambda: check_result_dir(out, {"run": str(run)}))
    ranks.on_main(lambda: require_writable(out))
    with ranks.holding(folder_lock(out)):
        return _test(config, job, run, out, console, ranks)


def _test(
    config: EvaluateConfig, job: _Job, run: Path, out: Path, console: Console, ranks: Ranks
) -> dict[str, Any]:
    """Test a student, and write its predictions and result into `out`."""
    for note in (*job.labels.notes, *job.notes) if ranks.is_main else ():
        console.warn(note)
    clip_frames, channels = job.student.meta.clip_length, job.student.options.channels
    if ranks.is_main:
        counts = count_sampled_frames(job.labels, job.labels.test)
        warn_of_short_videos(counts, len(job.labels.test), clip_frames, channels)
    seen_counts = ranks.on_main(lambda: _count_seen(config, job, _folder(run)))
    is_own_split = config.dataset is None and config.split is None
    looks = ranks.on_main(lambda: count_looks(_folder(run)) if is_own_split else None)
    metrics = evaluate_student(
        job.student,
        job.labels,
        view=job.view,
        clip_frames=clip_frames,
        options=job.options,
        device=ranks.on_all_ranks(lambda: resolve_device(config.device)),
        out=out,
        fresh=True,
        ranks=ranks,
    )
    result: dict[str, Any] = {
        "run": str(run),
        "dataset": job.labels.dataset,
        "split": job.labels.split,
        "predictions": str(out / PREDICTIONS),
        **({} if seen_counts is None else {"overlap": seen_counts}),
        **({} if looks is None else {"test_looks": looks}),
        "metrics": metrics,
    }
    ranks.on_main(lambda: write_result(out, {**read_json(out / RESULT, Form), **result}))
    return result


@dataclass(frozen=True)
class _Job:
    """A student, the labels to test it on, and the test protocol."""

    student: Student
    labels: Labels
    view: ClipView
    options: EvaluationOptions
    notes: tuple[str, ...] = ()


def _assemble(config: EvaluateConfig, run: Path) -> _Job:
    model, recorded = _open_run(run)
    options = _options(config.test, recorded)
    _refuse_overwriting(config, options, recorded)
    student = load_student(model, factory=config.factory)
    classes = student.meta.classes.get(HEAD, [])
    if not classes:
        raise CheckpointError(f"{run}: expected a model of distinit finetune, it has no labels")
    set_fields, in_place = config.model_fields_set, config.out is None
    labels = load_labels(
        config.dataset or recorded["dataset"],
        config.split if isinstance(config.split, int) else recorded.get("split"),
        copies=config.copies if "copies" in set_fields else recorded.get("copies"),
        root=config.root if "root" in set_fields or config.dataset else recorded.get("root"),
        partial=bool(recorded.get("partial") if config.partial is None else config.partial),
        classes=None if in_place else classes,
    )
    notes: tuple[str, ...] = ()
    # A test without --out replaces the result of the run, so that the labels must be the same.
    if in_place:
        require_classes(labels.classes, classes, origin=labels.dataset, expected_origin=str(run))
        folder = _folder(run)
        # Check now the files that are read after the test.
        for name in (*TEST_FILES, LAST):
            is_regular_file(folder / name, folder)
        require_same_labels(folder, read_identity(folder), labels, "give --out to test on them")
    elif recorded and config.dataset is None and config.split is None:
        notes = tuple(_other_labels(_folder(run), labels))
    clips = recorded.get("clips") or {"size": student.meta.clip_size, "resize": student.meta.resize}
    view = ClipView.model_validate(
        {key: clips.get(key) for key in ClipView.model_fields if key in clips}
    )
    return _Job(student, labels, view, options, notes)


def _other_labels(run: Path, labels: Labels) -> Iterator[str]:
    """Yield a note if the label file of the run has changed its test videos since the training."""
    record = RunLabels.read(run)
    if record is not None and (difference := record.difference(labels, ("test",))):
        yield (
            f"{labels.dataset}: the test videos differ from those of the labels that {run} was trained with "
            f"({difference})"
        )


def _count_seen(config: EvaluateConfig, job: _Job, run: Path) -> dict[str, int] | None:
    """Count the test videos that the run was trained on, and warn if there are any.

    Returns:
        The counts of `overlap`. None without `out`, since the training has counted them, and for
        runs without a record.
    """
    if config.out is None:
        return None
    seen = SeenVideos.read(run)
    # Runs of version 0.1 have no record.
    if seen is None:
        seen = _trained_on(config, run)
    if seen is None:
        return None
    return overlap(
        seen,
        job.labels,
        init_seen="the videos that the run's initialisation was trained on",
    )


def _trained_on(config: EvaluateConfig, run: Path) -> SeenVideos | None:
    """Return the training videos in the label file of a run, None if it cannot be read."""
    recorded = _run_config(run) if (run / CONFIG).is_file() else {}
    if not recorded:
        return None
    root = (
        config.root if config.dataset is None and config.root is not None else recorded.get("root")
    )
    try:
        labels = load_labels(
            recorded["dataset"],
            recorded.get("split"),
            copies=recorded.get("copies"),
            root=root,
            partial=True,
        )
    except (LabelsError, UsageError):
        return None
    return SeenVideos.from_digests(
        [labels.digest(video) for video in labels.train],
        [labels.absolute(video) for video in labels.train],
    )


def _folder(run: Path) -> Path:
    return run.parent if run.is_file() else run


def _open_run(run: Path) -> tuple[Path, dict[str, Any]]:
    """Return the model file, and the recorded config of its run, {} for a file without a run."""
    if run.is_file():
        is_in_run = run.name == MODEL_FILE and (run.parent / CONFIG).is_file()
        return run, (_run_config(run.parent) if is_in_run else {})
    recorded = _run_config(run)
    if not is_regular_file(run / MODEL_FILE, run):
        raise CheckpointError(f"{run}: has no {MODEL_FILE}, the training is not finished")
    return run / MODEL_FILE, recorded


def _run_config(run: Path) -> dict[str, Any]:
    path = run / CONFIG
    try:
        content = load_yaml(read_bytes(path, run).decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{run} is not a run of distinit finetune: its config.yaml is unreadable"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("finetune"), dict):
        raise UsageError(
            f"{run} is not a run of distinit finetune: its config.yaml has no section 'finetune'"
        )
    return current_keys(content["finetune"])


def _options(test: EvaluationOptions | None, recorded: dict[str, Any]) -> EvaluationOptions:
    """Return the recorded test options of the run, updated with those set in `test`."""
    update = test.model_dump(include=test.model_fields_set) if test is not None else {}
    return EvaluationOptions.model_validate({**recorded.get("test", {}), **update})


def _refuse_overwriting(
    config: EvaluateConfig, options: EvaluationOptions, recorded: dict[str, Any]
) -> None:
    """Check that `out` is given for a test whose data or protocol differ from those of the run."""
    if not recorded and (config.dataset is None or config.out is None):
        raise UsageError(f"{config.runs[0]} is a model without its run: give --dataset and --out")
    if config.out is not None:
        return
    if config.dataset is not None or config.split is not None or config.root is not None:
        raise UsageError(
            "--dataset, --root and --split require --out: the run keeps the predictions of its own data"
        )
    protocol = EvaluationOptions.model_validate(recorded.get("test", {})).protocol()
    for key, value in options.protocol().items():
        if value != protocol[key]:
            raise UsageError(
                f"test.{key}={value} requires --out: the run keeps the predictions of test.{key}={protocol[key]}"
            )
