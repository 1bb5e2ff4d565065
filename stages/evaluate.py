"""Test a finetuned student again, fuse the predictions of several, or compare those of two."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
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
from ..pipeline.evaluation.classification import HEAD
from ..pipeline.evaluation.compare import compare, fuse
from ..pipeline.evaluation.evaluation_options import EvaluateConfig, EvaluationOptions
from ..pipeline.evaluation.labels import Labels, load_labels
from ..pipeline.evaluation.listing import short_dataset
from ..pipeline.evaluation.predictions import require_classes
from ..pipeline.evaluation.protocol import (
    evaluate_student,
    refuse_other,
    write_result,
)
from ..pipeline.evaluation.run_labels import RunLabels
from ..pipeline.evaluation.short_videos import count_some, warn_of_short_videos
from ..pipeline.evaluation.splits import ALL, split_folder, split_folders, summarise_splits
from ..pipeline.evaluation.test_overlap import overlap, require_own_labels
from ..pipeline.students.export import load_student
from ..pipeline.students.student import Student
from ..pipeline.training.checkpoint import read_identity
from ..pipeline.training.launch import run_distributed
from ..pipeline.training.loop_options import LoopOptions
from ..pipeline.training.seen_videos import SeenVideos


def evaluate(config: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Test a finished run or model again, or fuse or compare existing predictions.

    A test writes predictions.h5, and the metrics into result.json.

    Raises:
        UsageError: Not a finetuned run; another data set or protocol without `out`.
        CheckpointError: Another class list, no model.
        LabelsError: Of the data set.
        PredictionsError: Of a file of predictions.
        SourceError: A file of the run is a link out of its folder.
    """
    config = _without_runs_own_out(config)
    if config.fuse:
        return _fuse(config)
    if config.compare:
        return compare(config.runs[0], config.runs[1], config.out)
    return run_distributed(
        _evaluate, config, console, LoopOptions(device=config.device, gpus=config.gpus)
    )


def _without_runs_own_out(config: EvaluateConfig) -> EvaluateConfig:
    """Return the config without an `out` that is the tested run itself.

    Raises:
        UsageError: `out` is any other run, whose predictions or result would be lost.
    """
    if config.out is None:
        return config
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file, expected a folder")
    require_no_store(out)
    if not (out / CONFIG).exists() and not split_folders(out):
        return config
    single = not (config.fuse or config.compare)
    if single and os.path.realpath(out) == os.path.realpath(config.runs[0]):
        return config.model_copy(update={"out": None})
    raise UsageError(
        f"--out {out} is a run, which keeps its own predictions and result; choose another --out"
    )


def _fuse(config: EvaluateConfig) -> dict[str, Any]:
    """Fuse runs of one split, or of each split those that `finetune --split all` wrote."""
    splits = [split_folders(Path(run)) for run in config.runs]
    if config.out is None or not all(splits):
        return fuse(config.runs, config.weights, config.out)
    if any(each.keys() != splits[0].keys() for each in splits):
        held = "; ".join(
            f"{run}: {', '.join(map(str, each))}"
            for run, each in zip(config.runs, splits, strict=True)
        )
        raise UsageError(f"--fuse: the runs have other splits ({held})")
    out = Path(config.out)
    refuse_other(out, {"run": str(out)})
    with folder_lock(out):
        results = {
            split: fuse(
                [str(each[split]) for each in splits],
                config.weights,
                str(split_folder(out, split)),
            )
            for split in splits[0]
        }
        return summarise_splits(out, results, "late fusion")


def _evaluate(config: EvaluateConfig, console: Console, ranks: Ranks) -> dict[str, Any]:
    """Run one process of the test; rank 0 alone writes, and holds the locks of the folders."""
    with ExitStack() as stack:
        return _evaluate_locked(config, console, ranks, stack)


def _evaluate_locked(
    config: EvaluateConfig, console: Console, ranks: Ranks, stack: ExitStack
) -> dict[str, Any]:
    run = Path(config.runs[0])
    splits = {} if (run / CONFIG).exists() else split_folders(run)
    if splits and config.split in (None, ALL):
        if config.out is not None:
            ranks.on_main(lambda: refuse_other(Path(str(config.out)), {"run": str(config.out)}))
        outs = {
            n: None if config.out is None else str(split_folder(Path(config.out), n))
            for n in splits
        }
        configs = {
            n: config.model_copy(update={"split": None, "out": out}) for n, out in outs.items()
        }
        # What is wrong with the last is found before the first is tested.
        jobs = ranks.on_all_ranks(
            lambda: {n: _assemble(configs[n], folder) for n, folder in splits.items()}
        )
        ranks.on_main(lambda: stack.enter_context(folder_lock(config.out or run)))
        results = {
            n: _evaluate_split(configs[n], jobs[n], folder, console, ranks)
            for n, folder in splits.items()
        }
        title = short_dataset(next(iter(results.values()))["dataset"])
        return ranks.on_main(lambda: summarise_splits(Path(config.out or run), results, title))
    if config.split == ALL:
        raise UsageError(
            f"--split all: {run} was trained on one split; it cannot be tested on what it has seen"
        )
    if isinstance(config.split, int) and config.split in splits:
        run, config = splits[config.split], config.model_copy(update={"split": None})
    return _evaluate_split(
        config, ranks.on_all_ranks(lambda: _assemble(config, run)), run, console, ranks
    )


def _evaluate_split(
    config: EvaluateConfig, job: _Job, run: Path, console: Console, ranks: Ranks
) -> dict[str, Any]:
    with ExitStack() as stack:
        return _evaluate_split_locked(config, job, run, console, ranks, stack)


def _evaluate_split_locked(
    config: EvaluateConfig, job: _Job, run: Path, console: Console, ranks: Ranks, stack: ExitStack
) -> dict[str, Any]:
    out = Path(config.out or _folder(run))
    if config.out is not None:
        ranks.on_main(lambda: refuse_other(out, {"run": str(run)}))
    ranks.on_main(lambda: require_writable(out))
    ranks.on_main(lambda: stack.enter_context(folder_lock(out)))
    for note in (*job.labels.notes, *job.notes) if ranks.is_main else ():
        console.warn(note)
    length, channels = job.student.meta.clip_length, job.student.options.channels
    if ranks.is_main:
        counts = count_some(job.labels, job.labels.test)
        warn_of_short_videos(counts, len(job.labels.test), length, channels)
    known = ranks.on_main(lambda: _known(config, job, _folder(run)))
    metrics = evaluate_student(
        job.student,
        job.labels,
        view=job.view,
        length=length,
        options=job.options,
        device=ranks.on_all_ranks(lambda: resolve_device(config.device)),
        out=out,
        fresh=True,
        ranks=ranks,
    )
    found = {
        "run": str(run),
        "dataset": job.labels.dataset,
        "split": job.labels.split,
        "predictions": str(out / PREDICTIONS),
    } | ({"overlap": known} if known is not None else {})

    def finish() -> None:
        before = read_json(out / RESULT, Form)
        write_result(out, {**before, **found, "metrics": metrics})

    ranks.on_main(finish)
    return {**found, "metrics": metrics}


@dataclass(frozen=True)
class _Job:
    """What is tested on what, and how."""

    student: Student
    labels: Labels
    view: ClipView
    options: EvaluationOptions
    notes: tuple[str, ...] = ()


def _assemble(config: EvaluateConfig, run: Path) -> _Job:
    model, used = _opened(run)
    options = _options(config.test, used)
    _refuse_overwriting(config, options, used)
    student = load_student(model, factory=config.factory)
    classes = student.meta.classes.get(HEAD, [])
    if not classes:
        raise CheckpointError(f"{run}: no model of distinit finetune, for it has no labels")
    asked, own = config.model_fields_set, config.out is None
    labels = load_labels(
        config.dataset or used["dataset"],
        config.split if isinstance(config.split, int) else used.get("split"),
        copies=config.copies if "copies" in asked else used.get("copies"),
        root=config.root if "root" in asked or config.dataset else used.get("root"),
        partial=bool(used.get("partial") if config.partial is None else config.partial),
        classes=None if own else classes,
    )
    notes: tuple[str, ...] = ()
    if own:  # the run's result would be another's
        require_classes(labels.classes, classes, here=labels.dataset, there=str(run))
        folder = _folder(run)
        for name in (
            *TEST_FILES,
            LAST,
        ):  # what else of the run is read, before the test takes its time
            is_regular_file(folder / name, folder)
        require_own_labels(folder, read_identity(folder), labels, "give --out to test on them")
    elif used and config.dataset is None and config.split is None:
        notes = tuple(_other_labels(_folder(run), labels))
    clips = used.get("clips") or {"size": student.meta.clip_size, "resize": student.meta.resize}
    view = ClipView.model_validate(
        {key: clips.get(key) for key in ClipView.model_fields if key in clips}
    )
    return _Job(student, labels, view, options, notes)


def _other_labels(run: Path, labels: Labels) -> Iterator[str]:
    """Note where the file of the run's labels names other test videos by now."""
    record = RunLabels.read(run)
    if record is not None and (how := record.difference(labels, ("test",))):
        yield f"{labels.dataset}: not the test videos that {run} was trained to be tested on ({how})"


def _known(config: EvaluateConfig, job: _Job, run: Path) -> dict[str, int] | None:
    """Return how many of the test videos the run has seen, with a warning.

    None for its own test, which its training has compared, and for a run of which nothing is known.
    """
    if config.out is None:
        return None
    seen = SeenVideos.read(run)
    if seen is None:  # of distinit 0.1
        seen = _trained_on(config, run)
    if seen is None:
        return None
    return overlap(
        seen,
        job.labels,
        init_seen="the videos that the run's initialisation was trained on",
    )


def _trained_on(config: EvaluateConfig, run: Path) -> SeenVideos | None:
    """Return the training videos that the label file of a run without a record has today."""
    used = _run_config(run) if (run / CONFIG).is_file() else {}
    if not used:
        return None
    root = config.root if config.dataset is None and config.root is not None else used.get("root")
    try:
        own = load_labels(
            used["dataset"], used.get("split"), copies=used.get("copies"), root=root, partial=True
        )
    except (LabelsError, UsageError):  # its labels are not here any more: nothing to compare with
        return None
    return SeenVideos.of(
        [own.digest(video) for video in own.train], [own.absolute(video) for video in own.train]
    )


def _folder(run: Path) -> Path:
    return run.parent if run.is_file() else run


def _opened(run: Path) -> tuple[Path, dict[str, Any]]:
    """Return the model's file, and the config of its run; an empty one for a single file."""
    if run.is_file():
        beside = run.parent / CONFIG
        return run, (_run_config(run.parent) if run.name == MODEL_FILE and beside.is_file() else {})
    used = _run_config(run)
    if not is_regular_file(run / MODEL_FILE, run):
        raise CheckpointError(f"{run} holds no {MODEL_FILE}: the training is not finished")
    return run / MODEL_FILE, used


def _run_config(run: Path) -> dict[str, Any]:
    path = run / CONFIG
    try:
        content = load_yaml(read_bytes(path, run).decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{run} is not a run of distinit finetune: no readable config.yaml"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("finetune"), dict):
        raise UsageError(
            f"{run} is not a run of distinit finetune: its config.yaml has no section 'finetune'"
        )
    return current_keys(content["finetune"])


def _options(given: EvaluationOptions | None, used: dict[str, Any]) -> EvaluationOptions:
    """Return the run's test options, with what was given now."""
    asked = given.model_dump(include=given.model_fields_set) if given is not None else {}
    return EvaluationOptions.model_validate({**used.get("test", {}), **asked})


def _refuse_overwriting(
    config: EvaluateConfig, options: EvaluationOptions, used: dict[str, Any]
) -> None:
    """Check that another data set or protocol than the run's own has another `out`."""
    if not used and (config.dataset is None or config.out is None):
        raise UsageError(
            f"{config.runs[0]} is a model without its run: it needs --dataset and --out"
        )
    if config.out is not None:
        return
    if config.dataset is not None or config.split is not None or config.root is not None:
        raise UsageError(
            "another --dataset, --root or --split needs --out, for the run keeps its own predictions"
        )
    own = EvaluationOptions.model_validate(used.get("test", {})).protocol()
    for key, value in options.protocol().items():
        if value != own[key]:
            raise UsageError(
                f"test.{key}={value} needs --out, for the run keeps the predictions of its own protocol ({own[key]})"
            )
