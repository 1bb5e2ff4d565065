"""Stage three: finetune a student on labels, and test it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..pipeline.clips.clip_options import ClipView
from ..pipeline.common.config import write_config
from ..pipeline.common.console import Console
from ..pipeline.common.devices import resolve_device
from ..pipeline.common.distributed import Ranks
from ..pipeline.common.errors import UsageError
from ..pipeline.common.locks import folder_lock
from ..pipeline.common.run_dir import (
    CONFIG,
    MODEL_FILE,
    PREDICTIONS,
    RUN_FILES,
    SEEN_VIDEOS,
    START,
    TEST_FILES,
    check_output_dir,
    run_dir_lock,
)
from ..pipeline.common.weights import state_sha256
from ..pipeline.evaluation.classification import HEAD, Classification
from ..pipeline.evaluation.finetune_options import FinetuneConfig
from ..pipeline.evaluation.labelled_clips import LabelledClips
from ..pipeline.evaluation.labels import Labels, available_splits, canonical, load_labels
from ..pipeline.evaluation.listing import short_dataset
from ..pipeline.evaluation.protocol import evaluate_student, write_result
from ..pipeline.evaluation.run_labels import labels_digest
from ..pipeline.evaluation.short_videos import count_some, warn_of_short_videos
from ..pipeline.evaluation.splits import ALL, split_folder, split_folders, summarise_splits
from ..pipeline.evaluation.test_overlap import record_and_compare, require_own_labels
from ..pipeline.students.export import InitReport, read_meta, save_start, save_student
from ..pipeline.students.initialization import (
    Initialization,
    canonical_init,
    resolve_init,
    student_file,
)
from ..pipeline.students.student import Student, build_student, count_parameters
from ..pipeline.students.student_options import SCRATCH, StudentMeta
from ..pipeline.training.checkpoint import (
    check_identity,
    read_identity,
    require_not_longer,
)
from ..pipeline.training.launch import run_distributed
from ..pipeline.training.loop import FitResult, fit
from ..pipeline.video.flow import FLOW_CHANNELS, require_opencv

COMMAND = "finetune"
_WRITES = (*RUN_FILES, *TEST_FILES, START, SEEN_VIDEOS)


def finetune(config: FinetuneConfig, console: Console) -> dict[str, Any]:
    """Trains on the train videos, tests on the test videos, and says how it went.

    Writes RUN/config.yaml, checkpoints and metrics.jsonl, model.safetensors, predictions.h5,
    result.json; with all splits each into a folder of its own, and into RUN/result.json their mean.
    Raises UsageError, LabelsError, CheckpointError, TrainingError, DeviceError, WeightsError.
    """
    return run_distributed(_finetune, config, console, config.loop)


def _finetune(config: FinetuneConfig, console: Console, ranks: Ranks) -> dict[str, Any]:
    """Run one process of the training and the test.

    Rank 0 alone writes, and holds the locks of the run folders.
    """
    with ExitStack() as stack:
        return _finetune_locked(config, console, ranks, stack)


def _finetune_locked(
    config: FinetuneConfig, console: Console, ranks: Ranks, stack: ExitStack
) -> dict[str, Any]:
    out, results = Path(config.out), {}
    ranks.on_main(lambda: _require_fitting(out, config.split))
    if config.split != ALL:
        return _finetune_split(config, console, ranks, stack)
    begun = ranks.on_main(lambda: bool(split_folders(out)))
    if config.resume is True and not begun:
        raise UsageError(f"--resume: {out} holds no run; --resume auto begins one")
    splits = ranks.on_all_ranks(lambda: _checked_splits(config))
    ranks.on_main(lambda: _require_own_splits(out, splits))
    ranks.on_main(lambda: stack.enter_context(folder_lock(out)))
    for split in splits:
        console.say(f"split {split}")
        # Interrupted, some splits have not begun.
        update = {
            "split": split,
            "out": str(split_folder(out, split)),
            "resume": "auto" if config.resume else False,
        }
        own = config.model_copy(update=update)
        with ExitStack() as split_stack:
            results[split] = _finetune_split(own, console, ranks, split_stack)
    title = short_dataset(config.dataset)
    return ranks.on_main(lambda: summarise_splits(out, results, title))


def _checked_splits(config: FinetuneConfig) -> tuple[int, ...]:
    """Return the splits of the data set, each of which was read.

    What is wrong with the last is found before the first is trained.
    """
    splits = available_splits(config.dataset, config.root)
    for split in splits:
        load_labels(
            config.dataset, split, copies=config.copies, root=config.root, partial=config.partial
        )
    return splits


def _require_fitting(out: Path, split: int | str | None) -> None:
    """Check that the folder is one of this command, with one split or with all, as asked for.

    Both write RUN/result.json.

    Raises:
        UsageError: It is not.
    """
    splits = split_folders(out)
    check_output_dir(out, COMMAND, () if splits else _WRITES)
    if split == ALL and (out / CONFIG).exists():
        raise UsageError(
            f"--out {out} holds a run of one split; --split all needs a folder of its own"
        )
    if split != ALL and splits:
        held = ", ".join(map(str, splits))
        raise UsageError(
            f"--out {out} holds runs of the splits {held}; one split needs a folder of its own"
        )


def _require_own_splits(out: Path, splits: Sequence[int]) -> None:
    """Check the folders of all splits before the first of them is trained.

    Raises:
        UsageError: One is not a folder that --split all wrote.
    """
    for split in splits:
        check_output_dir(split_folder(out, split), COMMAND, _WRITES)


def _finetune_split(
    config: FinetuneConfig, console: Console, ranks: Ranks, stack: ExitStack
) -> dict[str, Any]:
    run_dir = Path(config.out)
    device = ranks.on_all_ranks(lambda: resolve_device(config.loop.device))
    if ranks.world > 1:  # rank 0 first, alone: what has to be fetched is fetched once
        ranks.on_main(lambda: resolve_init(config.init, config.student).options)
    job = ranks.on_all_ranks(lambda: _assemble(config))
    config, labels, student = job.config, job.labels, job.student
    ranks.on_main(lambda: stack.enter_context(run_dir_lock(run_dir, resume=config.resume)))
    saved = ranks.on_all_ranks(lambda: read_identity(run_dir) if config.resume else None)
    options = config.loop.for_videos(len(labels.train))
    identity = _identity(config, labels, student, job.report)
    if saved is not None:  # before the run's config is overwritten
        ranks.on_all_ranks(
            lambda: _check_same(run_dir, saved, identity | options.identity(), labels)
        )
        ranks.on_all_ranks(lambda: require_not_longer(run_dir, options))
    ranks.on_main(lambda: write_config(run_dir / CONFIG, COMMAND, config))
    overlap = ranks.on_main(
        lambda: record_and_compare(config.init, labels, run_dir, again=saved is not None)
    )
    if config.init.startswith("inflate:"):  # what a report shows of inflation: training changes it
        ranks.on_main(lambda: save_start(run_dir / START, student))

    if ranks.is_main:
        _announce(config, labels, student, job.report, console)
        videos = [*labels.train, *labels.test]
        counts = count_some(labels, videos)
        warn_of_short_videos(
            counts, len(videos), config.clips.clip_frames, student.options.channels
        )
    console.say(f"{options.describe_steps(ranks.world)}; {options.describe_rate()}")
    result = fit(
        model=student,
        dataset=LabelledClips(
            labels,
            config.clips,
            length=config.clips.clip_frames,
            seed=config.loop.seed,
            epoch_clips=options.clips_per_epoch,
            channels=student.options.channels,
        ),
        objective=Classification(),
        options=options,
        run_dir=run_dir,
        identity=identity,
        resume=config.resume,
        ranks=ranks,
    )
    if result.broken and ranks.is_main:
        console.warn(result.unread())
    ranks.on_main(lambda: _export(config, labels, student, run_dir))
    metrics = evaluate_student(
        student,
        labels,
        view=config.clips,
        length=config.clips.clip_frames,
        options=config.test,
        device=device,
        out=run_dir,
        threads=config.loop.threads,
        ranks=ranks,
    )
    summary = _summary(config, labels, job.report, result, metrics) | {"overlap": overlap}
    ranks.on_main(lambda: write_result(run_dir, summary))
    return summary


@dataclass(frozen=True)
class _Job:
    """What is trained on what. report: None from scratch."""

    config: FinetuneConfig
    labels: Labels
    student: Student
    report: InitReport | None


def _assemble(config: FinetuneConfig) -> _Job:
    labels = load_labels(
        config.dataset,
        config.split if isinstance(config.split, int) else None,
        copies=config.copies,
        root=config.root,
        partial=config.partial,
    )
    start = resolve_init(config.init, config.student, config.inflation)
    resolved = _resolved(config, labels, start)
    student, report = _build(resolved, labels, start)
    return _Job(resolved, labels, student, report)


def _check_same(
    run_dir: Path, saved: dict[str, Any], identity: dict[str, Any], labels: Labels
) -> None:
    """Check the labels first: a difference there has a message of its own."""
    require_own_labels(run_dir, saved, labels, "choose another --out")
    check_identity(run_dir, saved, identity)


def _resolved(config: FinetuneConfig, labels: Labels, start: Initialization) -> FinetuneConfig:
    """Return the config with what the initialisation decides.

    Its paths hold from any folder.
    """
    update: dict[str, Any] = {
        "dataset": canonical(config.dataset),
        "root": None if config.root is None else os.path.abspath(config.root),
        "split": labels.split,
        "copies": labels.copies.folder if labels.copies is not None else None,
        "init": canonical_init(config.init),
        "student": start.options,
    }
    file = student_file(config.init)
    meta = _meta(file) if file is not None else None
    if meta is not None:
        theirs = {"clip_frames": meta.clip_length, "size": meta.clip_size, "resize": meta.resize}
        given = config.clips.model_fields_set
        if "size" in given:  # another size wants its own resize, not the file's
            theirs.pop("resize")
        update["clips"] = config.clips.model_copy(
            update={k: v for k, v in theirs.items() if k not in given}
        )
    clips = update.get("clips", config.clips)
    try:
        clips.frame_view()
    except ValueError as error:
        raise UsageError(
            f"clips.resize: {error}; clips.size is that of {config.init} unless it is given"
        ) from error
    return config.model_copy(update=update)


def _meta(init: str) -> StudentMeta | None:
    """Return what the file records of its clips; None where it has torchvision's names alone."""
    return read_meta(init)


def _build(
    config: FinetuneConfig, labels: Labels, start: Initialization
) -> tuple[Student, InitReport | None]:
    """Build the student with a new head and, unless from scratch, the initial backbone."""
    if start.options.channels == FLOW_CHANNELS:
        require_opencv()
    torch.manual_seed(config.loop.seed)
    clip = (config.clips.clip_frames, config.clips.size)
    student = build_student(start.options, {HEAD: len(labels.classes)}, config.dropout, clip=clip)
    report = None if config.init == SCRATCH else start.fill(student)
    if config.freeze == "backbone":
        student.freeze_backbone()
    return student, report


def _identity(
    config: FinetuneConfig, labels: Labels, student: Student, report: InitReport | None
) -> dict[str, Any]:
    """Return what a resume must share, by top-level key: a refusal names what differs."""
    # The digest is that of the weights as they begin, head included: a seed or a file that changed
    # shows.
    return {
        "classes": list(labels.classes),
        "labels": labels_digest(labels),
        "split": labels.split,
        "init": {
            "from": SCRATCH if report is None else "file",
            "weights": state_sha256(student.state_dict()),
        },
        "student": student.options.identity_dump(),
        "dropout": config.dropout,
        "freeze": config.freeze,
        "clips": config.clips.identity_dump(),
    }


def _announce(
    config: FinetuneConfig,
    labels: Labels,
    student: Student,
    report: InitReport | None,
    console: Console,
) -> None:
    for note in labels.notes:
        console.warn(note)
    console.say(
        f"{config.dataset}, split {labels.split}: {len(labels.classes)} classes, {len(labels.train)} train videos, "
        f"{len(labels.test)} test videos"
    )
    console.say(balance(labels))
    frozen = ", the backbone frozen" if config.freeze == "backbone" else ""
    console.say(
        f"{student.options.describe()}: {count_parameters(student) / 1e6:.1f} M parameters{frozen}"
    )
    if report is None:
        console.say("from scratch: fresh weights")
        return
    left = (
        f"; left: {', '.join(report.left[:6])}{', …' if len(report.left) > 6 else ''}"
        if report.left
        else ""
    )
    console.say(f"from {report.path}: {len(report.loaded)} tensors loaded{left}; the head is new")
    for line in report.lines if config.verbose else ():
        console.say(f"  {line}")


def balance(labels: Labels) -> str:
    """Describe how even the classes are, and the score of always guessing the most frequent."""
    counts = Counter(video.label for video in labels.train)
    (most, count), (fewest, few) = counts.most_common()[0], counts.most_common()[-1]
    guess = sum(video.label == most for video in labels.test) / len(labels.test)
    each = (
        f"{count} train videos in every class"
        if count == few
        else f"{few} ({labels.classes[fewest]}) to {count} ({labels.classes[most]}) train videos a class, "
        f"{count / few:.1f} times as many"
    )
    return f"{each}; always guessing {labels.classes[most]!r} is right for {100 * guess:.1f} % of the test videos"


def _export(config: FinetuneConfig, labels: Labels, student: Student, run_dir: Path) -> None:
    clips = config.clips
    meta = StudentMeta(
        classes={HEAD: list(labels.classes)},
        clip_length=clips.clip_frames,
        clip_size=clips.size,
        resize=_pair(clips),
        extra={"dataset": config.dataset, "split": labels.split, "init": config.init},
    )
    save_student(run_dir / MODEL_FILE, student, meta)


def _pair(clips: ClipView) -> tuple[int, int] | None:
    """Height and width that a frame is resized to."""
    resize = clips.frame_view().resize
    return resize if isinstance(resize, tuple) else None


def _summary(
    config: FinetuneConfig,
    labels: Labels,
    report: InitReport | None,
    result: FitResult,
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """Return what --json prints and result.json holds."""
    run_dir = Path(config.out)
    return {
        "run": config.out,
        "init": config.init,
        "tensors_loaded": len(report.loaded) if report else 0,
        "tensors_left": list(report.left) if report else [],
        "dataset": config.dataset,
        "split": labels.split,
        "classes": len(labels.classes),
        "train_videos_of_class": {
            name: sum(video.label == k for video in labels.train)
            for k, name in enumerate(labels.classes)
        },
        "train_videos": len(labels.train),
        "test_videos": len(labels.test),
        "metrics": metrics,
        "model": str(run_dir / MODEL_FILE),
        "predictions": str(run_dir / PREDICTIONS),
        "epochs": result.epochs,
        "steps": result.steps,
        "loss": result.train_loss,
        "unreadable": result.broken,
        "already_finished": result.already_finished,
        "resumed_from_step": result.resumed_from,
        "seconds": result.seconds,
        "clips_per_second": result.clips_per_second,
    }
