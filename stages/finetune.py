"""Stage three: finetune a student on labels, from scratch or an initialisation, and test it."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..pipeline.common.config import write_config
from ..pipeline.common.console import Console
from ..pipeline.common.devices import resolve_device
from ..pipeline.common.distributed import SINGLE_PROCESS, Ranks
from ..pipeline.common.errors import UsageError
from ..pipeline.common.locks import folder_lock
from ..pipeline.common.run_dir import (
    CONFIG,
    LAST,
    MODEL_FILE,
    PREDICTIONS,
    RESULT,
    RUN_FILES,
    SEEN_VIDEOS,
    START,
    TEST_FILES,
    check_output_dir,
    run_dir_lock,
)
from ..pipeline.common.weights import state_sha256
from ..pipeline.evaluation.finetune_options import FinetuneConfig
from ..pipeline.evaluation.finetuning import Classification, dry_run, validation
from ..pipeline.evaluation.labelled_clips import (
    LabelledClips,
    count_sampled_frames,
    warn_of_short_videos,
)
from ..pipeline.evaluation.labels import (
    ALL,
    Labels,
    available_splits,
    canonical,
    hold_out,
    load_labels,
)
from ..pipeline.evaluation.listing import short_dataset
from ..pipeline.evaluation.metrics import MEASURES
from ..pipeline.evaluation.predictor import HEAD
from ..pipeline.evaluation.protocol import count_looks, evaluate_student, write_result
from ..pipeline.evaluation.run_labels import labels_digest, videos_digest
from ..pipeline.evaluation.search import FOLDER as SEARCH_FOLDER
from ..pipeline.evaluation.search import SearchRecord, epochs_of_search, search
from ..pipeline.evaluation.splits import split_folder, split_folders, summarise_splits
from ..pipeline.evaluation.test_overlap import (
    record_and_compare,
    refuse_overlap,
    require_same_labels,
)
from ..pipeline.students.initialization import (
    Initialization,
    canonical_init,
    resolve_init,
    student_file,
)
from ..pipeline.students.student import Student, build_student, count_parameters
from ..pipeline.students.student_files import InitReport, read_meta, save_start, save_student
from ..pipeline.students.student_options import SCRATCH, StudentMeta
from ..pipeline.training.batch_size import EXAMPLES, with_batch_size
from ..pipeline.training.checkpoint import (
    check_identity,
    load_weights,
    read_identity,
    require_not_longer,
)
from ..pipeline.training.launch import run_distributed
from ..pipeline.training.loop import FitResult, Stop, fit
from ..pipeline.training.loop_options import LoopOptions, Resume
from ..pipeline.training.metric_logger import log_final, require_trackers
from ..pipeline.training.training_time import (
    Rate,
    announce,
    clips_in,
    measure_rate,
    recorded_schedule,
)
from ..pipeline.video.flow import FLOW_CHANNELS, require_opencv

COMMAND = "finetune"
_WRITES = (*RUN_FILES, *TEST_FILES, START, SEEN_VIDEOS, SEARCH_FOLDER)


def finetune(config: FinetuneConfig, console: Console) -> dict[str, Any]:
    """Train on the train videos of a data set, and test on its test videos.

    With a validation side, the best checkpoint on that side is tested. With a search, the options
    are chosen on the validation side, and the last training uses train and validation videos. The
    test side is used once, at the end.

    Writes RUN/config.yaml, checkpoints, metrics.jsonl, model.safetensors, predictions.h5 and
    result.json; with `--split all` into a folder per split, and their mean into RUN/result.json.

    Returns:
        The content of result.json, and under `next` the commands to run next.

    Raises:
        UsageError: Options do not fit each other, the initialisation or the folder.
        LabelsError: The labels cannot be used.
        CheckpointError: A checkpoint or an initialisation cannot be used.
        TrainingError: The training fails.
        DeviceError: The device is missing.
        WeightsError: Weights cannot be loaded.
    """
    if config.dry_run:
        return _dry_run(config, console)
    require_trackers(config.loop.loggers)
    return run_distributed(_finetune, config, console, config.loop)


def _dry_run(config: FinetuneConfig, console: Console) -> dict[str, Any]:
    """Describe a finetuning and its first batch without training.

    With `--split all`, this is the finetuning on the first split.
    """
    if config.split == ALL:
        first = available_splits(config.dataset, config.root)[0]
        config = config.model_copy(update={"split": first})
    _check_run_kind(Path(config.out), config.split)
    config = _scheduled(config)
    job = _assemble(config, _load_labels(config))
    _, job, rate = _measured(config, job, SINGLE_PROCESS, config.loop.gpus)
    _describe_run(job, console)
    announce(job.student, job.clips(), job.options, job.total_clips(), SINGLE_PROCESS, rate)
    return dry_run(job.config, job.options, job.clips(), job.student)


def _finetune(config: FinetuneConfig, console: Console, ranks: Ranks) -> dict[str, Any]:
    """Run one process of the training and the test; only rank 0 writes and holds locks."""
    out = Path(config.out)
    ranks.on_main(lambda: _check_run_kind(out, config.split))
    if config.split != ALL:
        summary = _finetune_split(config, console, ranks)
        console.info(f"model: {summary['model']}, predictions: {summary['predictions']}")
        return _with_next(out, summary, f"distinit predict {shlex.quote(config.out)} VIDEO")
    has_runs = ranks.on_main(lambda: bool(split_folders(out)))
    if config.resume is True and not has_runs:
        raise UsageError(f"--resume: {out} has no run; --resume auto starts one")
    splits = ranks.on_all_ranks(lambda: _checked_splits(config))
    ranks.on_main(lambda: _check_split_folders(out, splits))
    with ranks.holding(folder_lock(out)):
        results = _finetune_splits(config, splits, console, ranks)
        title = short_dataset(config.dataset)
        summary = ranks.on_main(lambda: summarise_splits(out, results, title))
        console.info(f"result: {out / RESULT}, a run per split next to it")
        return _with_next(out, summary)


def _finetune_splits(
    config: FinetuneConfig, splits: Sequence[int], console: Console, ranks: Ranks
) -> dict[int, dict[str, Any]]:
    """Train and test on one split after another; return the result of each."""
    results = {}
    for split in splits:
        console.info(f"split {split}")
        # After an interruption some splits have not started: they cannot be resumed.
        update = {
            "split": split,
            "out": str(split_folder(Path(config.out), split)),
            "resume": "auto" if config.resume else False,
        }
        results[split] = _finetune_split(config.model_copy(update=update), console, ranks)
        if config.loop.batch_size == "auto":
            # All splits use the batch size of the first one, so that they are comparable.
            size = {"batch_size": results[split]["batch_size"]}
            config = config.model_copy(update={"loop": config.loop.model_copy(update=size)})
    return results


def _checked_splits(config: FinetuneConfig) -> tuple[int, ...]:
    """Return the splits of the data set after checking the labels of each."""
    splits = available_splits(config.dataset, config.root)
    for split in splits:
        _load_labels(config.model_copy(update={"split": split}))
    return splits


def _check_run_kind(out: Path, split: int | str | None) -> None:
    """Check that the folder has no run of another command, nor one of a single split with `all`.

    Runs of a single split and runs of all splits both write RUN/result.json.
    """
    splits = split_folders(out)
    check_output_dir(out, COMMAND, () if splits else _WRITES)
    if split == ALL and (out / CONFIG).exists():
        raise UsageError(
            f"--out {out}: has a run of one split; --split all requires another folder"
        )
    if split != ALL and splits:
        existing = ", ".join(map(str, splits))
        raise UsageError(
            f"--out {out}: has runs of the splits {existing}; a single split requires another folder"
        )


def _check_split_folders(out: Path, splits: Sequence[int]) -> None:
    """Check the folders of all splits before the first is trained."""
    for split in splits:
        check_output_dir(split_folder(out, split), COMMAND, _WRITES)


def _finetune_split(config: FinetuneConfig, console: Console, ranks: Ranks) -> dict[str, Any]:
    """Train and test on one split in a locked run folder."""
    config = ranks.on_main(lambda: _scheduled(config))
    device = ranks.on_all_ranks(lambda: resolve_device(config.loop.device))
    # Rank 0 first, so that an initialisation is downloaded once.
    if ranks.world > 1:
        ranks.on_main(lambda: resolve_init(config.init, config.student).options)
    job = ranks.on_all_ranks(lambda: _assemble(config, _load_labels(config)))
    with ranks.holding(run_dir_lock(Path(config.out), resume=config.resume)):
        config, job, rate = _measured(config, job, ranks, ranks.world)
        if config.loop.budget is not None:
            # From here on, the schedule replaces the budget.
            update = {"loop": job.options}
            config = config.model_copy(update=update)
            job = replace(job, config=job.config.model_copy(update=update))
        if ranks.is_main:
            _describe_run(job, console)
        if not Path(config.out, LAST).exists():
            announce(job.student, job.clips(), job.options, job.total_clips(), ranks, rate)
        return _train_and_test(config, job, device, console, ranks)


def _train_and_test(
    config: FinetuneConfig, job: _Job, device: torch.device, console: Console, ranks: Ranks
) -> dict[str, Any]:
    """Search, train, export and test; return the content of result.json."""
    run_dir = Path(config.out)
    record, stop = None, Stop(patience=config.patience)
    if config.search:
        record = _search(job, run_dir, console, ranks)
        stop = Stop(epochs=record.best.best_epoch)
        job = ranks.on_all_ranks(lambda: _final_job(config, job.labels, record))
    overlap = _record_run(job, run_dir, console, ranks)
    result = _train(job, run_dir, console, ranks, stop)
    config, labels, student = job.config, job.labels, job.student
    exported = _exported_checkpoint(job)
    if exported == "best":
        ranks.on_all_ranks(
            lambda: load_weights(run_dir, "best", student, weights=config.loop.weights)
        )
    ranks.on_main(lambda: _export(config, labels, student, run_dir))
    looks = ranks.on_main(lambda: count_looks(run_dir, is_new_test=not result.already_finished))
    metrics = evaluate_student(
        student,
        labels,
        view=config.clips,
        clip_frames=config.clips.clip_frames,
        options=config.test,
        device=device,
        out=run_dir,
        threads=config.loop.threads,
        ranks=ranks,
    )
    summary = _summary(config, labels, job.report, result, metrics) | {
        "overlap": overlap,
        "exported": exported,
        "validation": _validation_result(job, result),
        "search": None if record is None else _search_result(record),
        "test_looks": looks,
    }
    final = _final(metrics, result)
    ranks.on_main(lambda: write_result(run_dir, summary))
    ranks.on_main(lambda: log_final(config.loop.loggers, run_dir, result.steps, final))
    return summary


def _final(metrics: dict[str, Any], result: FitResult) -> dict[str, Any]:
    """Return the final numbers of test and validation for the trackers."""
    tested = {f"test/{name}": metrics[name]["value"] for name in MEASURES if name in metrics}
    validated = {f"validation/{name}": value for name, value in result.best_validation.items()}
    return {**tested, **validated, "clips_per_second": result.clips_per_second}


def _with_next(out: Path, summary: dict[str, Any], *commands: str) -> dict[str, Any]:
    """Return a summary with the commands to run next."""
    run = shlex.quote(str(out))
    return summary | {"next": [f"distinit report {run} --out report", *commands]}


def _record_run(job: _Job, run_dir: Path, console: Console, ranks: Ranks) -> dict[str, int]:
    """Check a resumed run, and write config, initial weights and labels into the run folder.

    Returns:
        Counts of test videos that the initialisation was trained on, see `record_and_compare`.
    """
    config, labels = job.config, job.labels
    saved = ranks.on_all_ranks(lambda: read_identity(run_dir) if config.resume else None)
    # Before the config of the run is overwritten.
    if saved is not None:
        identity = job.identity() | job.options.identity()
        ranks.on_all_ranks(lambda: _check_same(run_dir, saved, identity, labels))
        ranks.on_all_ranks(lambda: require_not_longer(run_dir, job.options))
    ranks.on_main(lambda: write_config(run_dir / CONFIG, COMMAND, config))
    # A report shows the inflated weights, which training changes.
    if config.init.startswith("inflate:"):
        ranks.on_main(lambda: save_start(run_dir / START, job.student))
    return ranks.on_main(
        lambda: record_and_compare(config.init, labels, run_dir, resumed=saved is not None)
    )


def _search(job: _Job, run_dir: Path, console: Console, ranks: Ranks) -> SearchRecord:
    """Choose the options of the run on the validation side."""
    config, labels = job.config, job.labels
    if not labels.val:
        raise UsageError(
            "--search: requires a validation side to choose on: --held-out 0.2, val in a column splitN, or "
            "a folder val/"
        )
    # The config identifies the folder as a run.
    ranks.on_main(lambda: write_config(run_dir / CONFIG, COMMAND, config))

    def train(options: FinetuneConfig, folder: Path, epochs: int) -> dict[str, Any]:
        # The results of candidates are in search.json, not in the trackers.
        quiet = options.loop.model_copy(update={"loggers": ()})
        options = options.model_copy(update={"loop": quiet})
        candidate = ranks.on_all_ranks(lambda: _assemble(options, labels))
        stop = Stop(epochs=epochs, patience=options.patience)
        result = _train(candidate, folder, console, ranks, stop, resume="auto")
        is_last = _exported_checkpoint(candidate) == "last"
        measures = result.validation if is_last else result.best_validation
        return {**measures, "best_epoch": result.epochs if is_last else result.best_epoch}

    identity = job.identity() | job.options.identity() | {"epochs": config.loop.epochs}
    identity |= {"stop": {"patience": config.patience, "export": config.export}}
    record = search(config, run_dir, identity, train, console.info, ranks)
    best = record.best
    console.info(
        f"search: chose {best.name} (validation loss {best.loss:.4f}, accuracy {best.accuracy:.3f}); now training on "
        f"{len(labels.train)} train and {len(labels.val)} validation videos for {best.best_epoch} epochs"
    )
    return record


def _final_job(config: FinetuneConfig, labels: Labels, record: SearchRecord) -> _Job:
    """Return the last training of a search: chosen options, train and validation videos."""
    chosen = record.config(config)
    return _assemble(chosen, labels.with_val_in_train())


def _exported_checkpoint(job: _Job) -> str:
    """Return the checkpoint that is exported and tested, "last" or "best".

    Without a validation side the best checkpoint is that of the lowest training loss.
    """
    return job.config.export or ("best" if job.labels.val else "last")


def _validation_result(job: _Job, result: FitResult) -> dict[str, Any] | None:
    """Return the measures on the validation side for result.json, None without that side."""
    if not job.labels.val:
        return None
    return {
        "videos": len(job.labels.val),
        "best_epoch": result.best_epoch,
        "best": result.best_validation,
        "last": result.validation,
    }


def _search_result(record: SearchRecord) -> dict[str, Any]:
    """Return the search for result.json."""
    return {
        "candidates": [asdict(candidate) for candidate in record.candidates],
        "chosen": record.best.options,
        "epochs": record.best.best_epoch,
        "epochs_of_candidates": record.epochs_trained,
    }


def _train(
    job: _Job,
    run_dir: Path,
    console: Console,
    ranks: Ranks,
    stop: Stop,
    resume: Resume | None = None,
) -> FitResult:
    """Train a student; by default `resume` is that of the config."""
    config, labels, student, options = job.config, job.labels, job.student, job.options
    console.info(f"{options.describe_steps(ranks.world)}; {options.describe_rate()}")
    measure = validation(
        student,
        labels,
        view=config.clips,
        clip_frames=config.clips.clip_frames,
        clips=config.val_clips,
        options=config.test,
        device=resolve_device(options.device),
        ranks=ranks,
    )
    result = fit(
        model=student,
        dataset=job.clips(),
        objective=Classification(),
        options=options,
        run_dir=run_dir,
        identity=job.identity(),
        resume=config.resume if resume is None else resume,
        validate=measure if labels.val else None,
        stop=stop,
        ranks=ranks,
    )
    if result.unreadable and ranks.is_main:
        console.warn(result.describe_unreadable())
    return result


@dataclass(frozen=True)
class _Job:
    """A student, the labels to train it on, and the config of the training.

    Attributes:
        config: The resolved config.
        labels: The data set.
        student: The student, initialised.
        report: Report of the initialisation, None from scratch.
        start: Digest of the weights before training, head included.
    """

    config: FinetuneConfig
    labels: Labels
    student: Student
    report: InitReport | None
    start: str

    @property
    def options(self) -> LoopOptions:
        """The options of the loop for the number of training videos."""
        return self.config.loop.for_videos(len(self.labels.train))

    def clips(self) -> LabelledClips:
        """Return the training clips."""
        config = self.config
        return LabelledClips(
            self.labels,
            config.clips,
            clip_frames=config.clips.clip_frames,
            seed=config.loop.seed,
            epoch_clips=self.options.clips_per_epoch,
            channels=self.student.options.channels,
        )

    def total_clips(self) -> int:
        """Return the number of clips of the training, including those of a search."""
        options = self.options
        epochs = epochs_of_search(self.config) if self.config.search else options.epochs
        return epochs * options.clips_per_epoch

    def identity(self) -> dict[str, Any]:
        """Return the properties that a resumed training must share, by top-level key.

        An error names the key that differs. The digest of the initial weights also reveals a
        changed seed or file.
        """
        return {
            "classes": list(self.labels.classes),
            "labels": labels_digest(self.labels),
            "split": self.labels.split,
            "init": {"from": SCRATCH if self.report is None else "file", "weights": self.start},
            "student": self.student.options.identity_dump(),
            "dropout": self.config.dropout,
            "freeze": self.config.freeze,
            "clips": self.config.clips.identity_dump(),
            **self._validation_identity(),
        }

    def _validation_identity(self) -> dict[str, Any]:
        """Return the part of the identity that describes the validation, {} without one."""
        config, labels = self.config, self.labels
        if labels.val:
            return {"validation": {"videos": videos_digest(labels.val), "clips": config.val_clips}}
        # The last training of a search also uses the validation videos.
        return {"train": videos_digest(labels.train)} if config.search else {}


def _scheduled(config: FinetuneConfig) -> FinetuneConfig:
    """Return the config with the recorded schedule of a resumed run, or with a budget."""
    loop = recorded_schedule(Path(config.out), COMMAND, config.loop, resume=config.resume)
    return config.model_copy(update={"loop": loop})


def _measured(
    config: FinetuneConfig, job: _Job, ranks: Ranks, world: int
) -> tuple[FinetuneConfig, _Job, Rate | None]:
    """Return config and job with numbers in place of `--batch-size auto` and `--minutes`.

    Args:
        config: The config.
        job: The job of this config.
        ranks: The processes; rank 0 measures.
        world: Number of processes of the training.

    Returns:
        Config, job, and the rate that was measured for `--minutes`, None without it.
    """
    labels, rate = job.labels, None
    if config.loop.batch_size == "auto":
        config = ranks.on_main(lambda: _sized(config, labels, world))
        job = ranks.on_all_ranks(lambda: _assemble(config, labels))
    if (minutes := config.loop.minutes) is not None:
        config, rate = ranks.on_main(lambda: _fitted(config, job, minutes, world))
        job = ranks.on_all_ranks(lambda: _assemble(config, labels))
    return config, job, rate


def _sized(config: FinetuneConfig, labels: Labels, world: int) -> FinetuneConfig:
    """Return the config with a number in place of `--batch-size auto`."""
    # Clips are drawn by number: they are the same for every batch size.
    small = config.loop.model_copy(update={"batch_size": EXAMPLES})
    job = _assemble(config.model_copy(update={"loop": small}), labels)
    loop = with_batch_size(
        config.loop, world, job.total_clips(), lambda: (job.student, job.clips(), Classification())
    )
    return config.model_copy(update={"loop": loop})


def _fitted(
    config: FinetuneConfig, job: _Job, minutes: float, world: int
) -> tuple[FinetuneConfig, Rate]:
    """Return the config with the budget of clips that fits into `--minutes`, and the rate."""
    loop, options = config.loop, job.options
    rate = measure_rate(job.student, job.clips(), options)
    clips = clips_in(minutes, rate, options, world)
    # A search divides the time between its candidates and the last training.
    clips = int(clips * options.epochs * options.clips_per_epoch / job.total_clips())
    fitted = loop.model_copy(update={"budget": max(1, clips), "minutes": None})
    return config.model_copy(update={"loop": fitted}), rate


def _load_labels(config: FinetuneConfig) -> Labels:
    """Load the labels, and hold out a validation side.

    Raises:
        LabelsError: The labels cannot be used; with --strict also if the initialisation was trained
            on test videos.
    """
    labels = load_labels(
        config.dataset,
        config.split if isinstance(config.split, int) else None,
        copies=config.copies,
        root=config.root,
        partial=config.partial,
    )
    if config.strict:
        for init in {config.init, *config.search.get("init", ())}:
            refuse_overlap(init, labels)
    return hold_out(labels, config.held_out)


def _assemble(config: FinetuneConfig, labels: Labels) -> _Job:
    init = resolve_init(config.init, config.student, config.inflation)
    resolved = _resolved(config, labels, init)
    student, report = _build(resolved, labels, init)
    return _Job(resolved, labels, student, report, state_sha256(student.state_dict()))


def _check_same(
    run_dir: Path, saved: dict[str, Any], identity: dict[str, Any], labels: Labels
) -> None:
    """Check the identity of a checkpoint; labels first, since their differences are explained."""
    require_same_labels(run_dir, saved, labels, "choose another --out")
    check_identity(run_dir, saved, identity)


def _resolved(config: FinetuneConfig, labels: Labels, init: Initialization) -> FinetuneConfig:
    """Return the config with the network and clips of the initialisation, and absolute paths."""
    update: dict[str, Any] = {
        "dataset": canonical(config.dataset),
        "root": None if config.root is None else os.path.abspath(config.root),
        "split": labels.split,
        "copies": labels.copies.folder if labels.copies is not None else None,
        "init": canonical_init(config.init),
        "student": init.options,
    }
    file = student_file(config.init)
    # Weights in torchvision's format have no record of clips.
    meta = read_meta(file) if file is not None else None
    if meta is not None:
        stored = {"clip_frames": meta.clip_length, "size": meta.clip_size, "resize": meta.resize}
        set_fields = config.clips.model_fields_set
        # The stored resize belongs to the stored size.
        if "size" in set_fields:
            stored.pop("resize")
        update["clips"] = config.clips.model_copy(
            update={k: v for k, v in stored.items() if k not in set_fields}
        )
    clips = update.get("clips", config.clips)
    try:
        clips.frame_view()
    except ValueError as error:
        raise UsageError(
            f"clips.resize: {error}; clips.size is by default that of {config.init}"
        ) from error
    return config.model_copy(update=update)


def _build(
    config: FinetuneConfig, labels: Labels, init: Initialization
) -> tuple[Student, InitReport | None]:
    """Build the student with a new head and, unless from scratch, the backbone of `init`."""
    if init.options.channels == FLOW_CHANNELS:
        require_opencv()
    torch.manual_seed(config.loop.seed)
    clip = (config.clips.clip_frames, config.clips.size)
    student = build_student(init.options, {HEAD: len(labels.classes)}, config.dropout, clip=clip)
    report = None if config.init == SCRATCH else init.fill(student)
    if config.freeze == "backbone":
        student.freeze_backbone()
    return student, report


def _describe_run(job: _Job, console: Console) -> None:
    """Log data set, network and initialisation, and the notes on the labels as warnings."""
    config, labels, student, report = job.config, job.labels, job.student, job.report
    for note in labels.notes:
        console.warn(note)
    console.info(
        f"{config.dataset}, split {labels.split}: {len(labels.classes)} classes, {len(labels.train)} train videos, "
        f"{f'{len(labels.val)} validation videos, ' if labels.val else ''}{len(labels.test)} test videos"
    )
    console.info(balance(labels))
    videos = [*labels.train, *labels.val, *labels.test]
    warn_of_short_videos(
        count_sampled_frames(labels, videos),
        len(videos),
        config.clips.clip_frames,
        student.options.channels,
    )
    frozen = ", backbone frozen" if config.freeze == "backbone" else ""
    console.info(
        f"{student.options.describe()}: {count_parameters(student) / 1e6:.1f} M parameters{frozen}"
    )
    if report is None:
        console.info("initialisation: from scratch")
        return
    # The heads of our own students are unused on purpose. Unused tensors of other files are logged.
    file = student_file(config.init)
    unused = () if file is not None and read_meta(file) is not None else report.left
    names = ", ".join(unused[:6]) + (", …" if len(unused) > 6 else "")
    skipped = f", not used: {names}" if unused else ""
    console.info(
        f"initialisation: {len(report.loaded)} tensors of {report.path}{skipped}; the head is new"
    )
    for line in report.lines if config.verbose else ():
        console.info(f"  {line}")


def balance(labels: Labels) -> str:
    """Describe the balance of the classes, and the accuracy of guessing the most frequent one."""
    counts = Counter(video.label for video in labels.train).most_common()
    (largest, max_videos), (smallest, min_videos) = counts[0], counts[-1]
    accuracy = sum(video.label == largest for video in labels.test) / len(labels.test)
    text = (
        f"{max_videos} train videos per class"
        if max_videos == min_videos
        else f"{min_videos} ({labels.classes[smallest]}) to {max_videos} ({labels.classes[largest]}) train videos "
        f"per class, {max_videos / min_videos:.1f} times as many"
    )
    guess = f"always guessing {labels.classes[largest]!r} is correct for {100 * accuracy:.1f} % of the test videos"
    return f"{text}; {guess}"


def _export(config: FinetuneConfig, labels: Labels, student: Student, run_dir: Path) -> None:
    clips = config.clips
    meta = StudentMeta(
        classes={HEAD: list(labels.classes)},
        clip_length=clips.clip_frames,
        clip_size=clips.size,
        resize=clips.frame_size(),
        extra={"dataset": config.dataset, "split": labels.split, "init": config.init},
    )
    save_student(run_dir / MODEL_FILE, student, meta)


def _summary(
    config: FinetuneConfig,
    labels: Labels,
    report: InitReport | None,
    result: FitResult,
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of result.json, which --json prints too."""
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
        "validation_videos": len(labels.val),
        "test_videos": len(labels.test),
        "metrics": metrics,
        "model": str(run_dir / MODEL_FILE),
        "predictions": str(run_dir / PREDICTIONS),
        "epochs": result.epochs,
        "steps": result.steps,
        "batch_size": config.loop.step_clips,
        "loss": result.train_loss,
        "unreadable": result.unreadable,
        "already_finished": result.already_finished,
        "resumed_from_step": result.resumed_from,
        "seconds": result.seconds,
        "clips_per_second": result.clips_per_second,
    }
