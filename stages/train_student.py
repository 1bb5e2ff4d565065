"""Stage two: train a student on clips whose targets come from the store."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..pipeline.clips.seeding import held_out_share, split_held_out
from ..pipeline.common.config import write_config
from ..pipeline.common.console import Console, plain
from ..pipeline.common.devices import resolve_device
from ..pipeline.common.distributed import SINGLE_PROCESS, Ranks
from ..pipeline.common.errors import StoreError, StoreMismatchError, UsageError
from ..pipeline.common.files import write_whole
from ..pipeline.common.run_dir import (
    CONFIG,
    RESULT,
    RUN_FILES,
    SEEN_VIDEOS,
    STUDENT_FILE,
    check_output_dir,
    run_dir_lock,
)
from ..pipeline.common.streams import counted
from ..pipeline.common.urls import check_local
from ..pipeline.evaluation.labelled_clips import warn_of_short_videos
from ..pipeline.evaluation.store_labels import canonical_exclude, optional_exclusion
from ..pipeline.store.reader import TargetStore, check_video_roots
from ..pipeline.store.selection import Exclusion
from ..pipeline.store.storage import absolute
from ..pipeline.students.student import Student, build_student, count_parameters
from ..pipeline.students.student_files import save_student
from ..pipeline.students.student_options import HeadMeta, StudentMeta
from ..pipeline.targets.class_head import ClassHead, read_heads
from ..pipeline.targets.dataset import StudentClips
from ..pipeline.targets.mixture import by_corpus
from ..pipeline.targets.picks import PickRule
from ..pipeline.targets.sampler import TargetSampler
from ..pipeline.targets.teacher_targets import TeacherTargets
from ..pipeline.training.batch_size import EXAMPLES, with_batch_size
from ..pipeline.training.checkpoint import (
    check_identity,
    load_weights,
    read_identity,
    require_not_longer,
)
from ..pipeline.training.distillation import Distillation, evaluate_distillation
from ..pipeline.training.distillation_options import TrainConfig
from ..pipeline.training.dry_run import dry_run
from ..pipeline.training.filter_thresholds import Filter, measure_thresholds
from ..pipeline.training.hardware import pick_workers
from ..pipeline.training.launch import run_distributed
from ..pipeline.training.loop import FitResult, fit
from ..pipeline.training.loop_options import LoopOptions
from ..pipeline.training.metric_logger import log_final, require_trackers
from ..pipeline.training.objective import (
    TOO_LITTLE,
    LossBounds,
    first_draws,
    loss_bounds,
    make_objective,
    measure_baselines,
    most_frequent_shares,
)
from ..pipeline.training.seen_videos import SEEN_BY_RUN, SeenVideos
from ..pipeline.training.training_time import (
    Rate,
    announce,
    clips_in,
    measure_rate,
    recorded_schedule,
)
from ..pipeline.video.flow import FLOW_CHANNELS, pictures_needed, require_opencv

COMMAND = "train-student"


@dataclass(frozen=True)
class _Parts:
    """The parts of a training, after the store was opened and the filter measured.

    Attributes:
        store: The target store.
        teachers: The teachers to learn from, in the store's order.
        train: The training clips.
        held_out: Clips of held-out videos, None if no such clip counts.
        held_out_share: Share of the videos that are held out.
        filter: Thresholds of the entropy filter, and the share of draws that they keep.
        excluded: The excluded videos, None without `exclude`.
        baselines: Loss of the best constant predictor by teacher, if losses are balanced.
    """

    store: TargetStore
    teachers: tuple[str, ...]
    train: StudentClips
    held_out: StudentClips | None
    held_out_share: float
    filter: Filter
    excluded: Exclusion | None
    baselines: dict[str, float]

    @property
    def targets(self) -> Mapping[str, TeacherTargets]:
        """The targets of each head, by teacher."""
        return self.train.sampler.targets

    @property
    def num_videos(self) -> int:
        """Number of videos to learn from."""
        return len(self.train.sampler.videos)


def train_student(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Train a student, export RUN/student.safetensors, and return a summary.

    With `loop.gpus` above 1, or under torchrun, several processes train one student.

    Raises:
        UsageError: Options do not fit each other, the store or the folder.
        StoreError: The store cannot be used.
        StoreMismatchError: The store has more videos than when the run began.
        CheckpointError: A checkpoint cannot be used.
        TrainingError: The training fails.
        DeviceError: The device is missing.
    """
    if config.dry_run:
        return _dry_run(config, console)
    require_trackers(config.loop.loggers)
    return run_distributed(_train, config, console, config.loop)


def _dry_run(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Describe a training and its first batch without training."""
    check_local(config.out)
    config = _scheduled(config)
    store, teachers, _ = _open(config)
    assemble = partial(_assemble, store=store, teachers=teachers, saved=None, console=console)
    config, parts, rate = _measured(config, assemble, SINGLE_PROCESS, config.loop.gpus)
    student = _build(config, parts.targets)
    options = config.loop.for_videos(parts.num_videos)
    clips = options.total_steps * options.step_clips
    announce(student, parts.train, options, clips, SINGLE_PROCESS, rate)
    return dry_run(config, parts.train, student)


def _train(config: TrainConfig, console: Console, ranks: Ranks) -> dict[str, Any]:
    """Run one process of the training; only rank 0 writes and holds the lock of the run folder."""
    run_dir = Path(config.out)
    ranks.on_main(lambda: check_output_dir(run_dir, COMMAND, (*RUN_FILES, SEEN_VIDEOS, RESULT)))
    config = ranks.on_main(lambda: _scheduled(config))
    store, teachers, device = ranks.on_all_ranks(lambda: _open(config))
    with ranks.holding(run_dir_lock(run_dir, resume=config.resume)):
        return _train_locked(config, store, teachers, device, console, ranks)


def _train_locked(
    config: TrainConfig,
    store: TargetStore,
    teachers: tuple[str, ...],
    device: torch.device,
    console: Console,
    ranks: Ranks,
) -> dict[str, Any]:
    """Train, export and summarise in a locked run folder."""
    run_dir = Path(config.out)
    saved = ranks.on_all_ranks(lambda: read_identity(run_dir) if config.resume else None)
    assemble = partial(_assemble, store=store, teachers=teachers, saved=saved, console=console)
    config, parts, rate = _measured(config, assemble, ranks, ranks.world)
    options = config.loop.for_videos(parts.num_videos)
    # With a budget, the schedule that follows from it is recorded.
    loop = config.loop if config.loop.budget is None else options
    config = config.model_copy(update={"loop": loop, "held_out": parts.held_out_share})
    identity = _identity(config, parts, options)
    _record_run(config, parts, options, saved, identity, ranks)

    student = ranks.on_all_ranks(lambda: _build(config, parts.targets))
    _describe_training(config, parts, student, options, ranks, console)
    if saved is None:
        clips = options.total_steps * options.step_clips
        announce(student, parts.train, options, clips, ranks, rate)
    objective = make_objective(config.targets, parts.targets, parts.baselines)
    bounds = ranks.on_main(lambda: _bounds(parts.train.sampler, objective, console))
    result = fit(
        model=student,
        dataset=parts.train,
        objective=objective,
        options=options,
        run_dir=run_dir,
        identity=identity,
        resume=config.resume,
        validate=_validation(parts.held_out, student, objective, options, device, ranks),
        ranks=ranks,
    )

    def finish() -> dict[str, Any]:
        if result.unreadable:
            console.warn(result.describe_unreadable())
        exported = _export(config, parts, student, objective)
        summary = _summary(config, parts, result, exported)
        summary |= _explained(bounds, result, teachers, config.export, console)
        summary["most_frequent_class"] = _show_agreement(parts, objective, result, console)
        write_whole(run_dir / RESULT, json.dumps(plain(summary), indent=1).encode())
        log_final(options.loggers, run_dir, result.steps, _final(summary))
        console.info(f"student: {exported}")
        run = shlex.quote(config.out)
        finetuning = f"distinit finetune --init {run} --dataset csv:labels.csv --out runs/finetuned"
        return summary | {"next": [finetuning]}

    return ranks.on_main(finish)


def _record_run(
    config: TrainConfig,
    parts: _Parts,
    options: LoopOptions,
    saved: dict[str, Any] | None,
    identity: dict[str, Any],
    ranks: Ranks,
) -> None:
    """Check a run that is resumed, and write the config and the training videos into its folder.

    Args:
        config: The config with the schedule that is recorded.
        parts: The parts of the training.
        options: The loop for the number of videos.
        saved: Identity in the checkpoint of a resumed run, else None.
        identity: Identity of this training.
        ranks: The processes; rank 0 writes.
    """
    run_dir = Path(config.out)
    # Before the config of the run is overwritten.
    if saved is not None:
        ranks.on_all_ranks(lambda: _check_same(run_dir, saved, identity))
        ranks.on_all_ranks(lambda: require_not_longer(run_dir, options))
    ranks.on_main(lambda: write_config(run_dir / CONFIG, COMMAND, _absolute(config)))
    if saved is None or not (run_dir / SEEN_VIDEOS).exists():
        videos = parts.train.sampler.videos
        ranks.on_main(lambda: _seen(parts.store, videos, config.video_roots).write(run_dir))


def _describe_training(
    config: TrainConfig,
    parts: _Parts,
    student: Student,
    options: LoopOptions,
    ranks: Ranks,
    console: Console,
) -> None:
    """Log the student, its heads and the schedule."""
    console.info(
        f"{config.student.describe()}: {count_parameters(student) / 1e6:.1f} M parameters, "
        f"heads {', '.join(f'{name} [{k}]' for name, k in student.classes.items())}; "
        f"{options.describe_epochs()} from {counted(parts.num_videos, 'video')}"
    )
    console.info(f"{options.describe_steps(ranks.world)}; {options.describe_rate()}")


def _validation(
    held_out: StudentClips | None,
    student: Student,
    objective: Distillation,
    options: LoopOptions,
    device: torch.device,
    ranks: Ranks,
) -> Callable[[], dict[str, float]] | None:
    """Return the function that measures a student on held-out clips, None without such clips."""
    if held_out is None:
        return None
    return lambda: evaluate_distillation(
        student,
        objective,
        held_out,
        len(held_out.sampler.videos),
        batch_size=options.clips_at_once(ranks.world),
        workers=pick_workers(options.workers, device),
        device=device,
        precision=options.precision,
        ranks=ranks,
    )


def _scheduled(config: TrainConfig) -> TrainConfig:
    """Return the config with the recorded schedule of a resumed run, or with a budget."""
    loop = recorded_schedule(Path(config.out), COMMAND, config.loop, resume=config.resume)
    return config.model_copy(update={"loop": loop})


def _measured(
    config: TrainConfig, assemble: Callable[[TrainConfig], _Parts], ranks: Ranks, world: int
) -> tuple[TrainConfig, _Parts, Rate | None]:
    """Return the config with numbers in place of `--batch-size auto` and `--minutes`.

    Args:
        config: The config.
        assemble: Function from a config to its parts.
        ranks: The processes; rank 0 measures.
        world: Number of processes of the training.

    Returns:
        Config, its parts, and the rate that was measured for `--minutes`, None without it.
    """
    if config.loop.batch_size == "auto":
        config = ranks.on_main(lambda: _sized(config, assemble, world))
    parts, rate = ranks.on_all_ranks(lambda: assemble(config)), None
    if (minutes := config.loop.minutes) is not None:
        config, rate = ranks.on_main(lambda: _fitted(config, parts, minutes, world))
        parts = ranks.on_all_ranks(lambda: assemble(config))
    return config, parts, rate


def _sized(
    config: TrainConfig, assemble: Callable[[TrainConfig], _Parts], world: int
) -> TrainConfig:
    """Return the config with a number in place of `--batch-size auto`."""
    # Clips are drawn by number: they are the same for every batch size.
    small = config.loop.model_copy(update={"batch_size": EXAMPLES})
    parts = assemble(config.model_copy(update={"loop": small}))

    def example() -> tuple[Student, StudentClips, Distillation]:
        objective = make_objective(config.targets, parts.targets, parts.baselines)
        return _build(config, parts.targets), parts.train, objective

    schedule = small.for_videos(parts.num_videos)
    clips = schedule.epochs * schedule.clips_per_epoch
    loop = with_batch_size(config.loop, world, clips, example)
    return config.model_copy(update={"loop": loop})


def _fitted(
    config: TrainConfig, parts: _Parts, minutes: float, world: int
) -> tuple[TrainConfig, Rate]:
    """Return the config with the budget of clips that fits into `--minutes`, and the rate."""
    loop, student = config.loop, _build(config, parts.targets)
    rate = measure_rate(student, parts.train, loop)
    budget = clips_in(minutes, rate, loop, world)
    fitted = loop.model_copy(update={"budget": budget, "minutes": None})
    return config.model_copy(update={"loop": fitted}), rate


def _open(config: TrainConfig) -> tuple[TargetStore, tuple[str, ...], torch.device]:
    """Return the store, the teachers to learn from, and the device."""
    device = resolve_device(config.loop.device)
    store = TargetStore.open(config.store)
    check_video_roots(store, config.video_roots)
    return store, _teachers(config, store), device


def _absolute(config: TrainConfig) -> TrainConfig:
    """Return the config with absolute paths."""
    video_roots = {name: os.path.abspath(folder) for name, folder in config.video_roots.items()}
    paths: dict[str, Any] = {
        "store": absolute(config.store),
        "out": os.path.abspath(config.out),
        "video_roots": video_roots,
    }
    if config.targets.heads:
        files = {name: os.path.abspath(file) for name, file in config.targets.heads.items()}
        paths["targets"] = config.targets.model_copy(update={"heads": files})
    if config.exclude is not None:
        paths["exclude"] = canonical_exclude(config.exclude)
    return config.model_copy(update=paths)


def _teachers(config: TrainConfig, store: TargetStore) -> tuple[str, ...]:
    """Return the teachers to learn from, in the store's order, whatever the order of the option.

    Raises:
        StoreError: The store has no teachers.
        UsageError: The store lacks a teacher, or an option names another one.
    """
    names = store.target_names(config.targets.teachers)
    if not names:
        raise StoreError(f"{store.name} has no teachers; run distinit extract-targets first")
    names = tuple(name for name in store.teachers if name in names)
    options = {
        f"targets.{key}": getattr(config.targets, key)
        for key in ("max_entropy", "max_entropy_quantile", "loss_weights", "loss")
    }
    for key, value in {**options, "student_head": config.student_head}.items():
        for name in value if isinstance(value, dict) else ():
            if name not in names:
                raise UsageError(f"{key} names {name!r}; the heads are: {', '.join(names)}")
    return names


@dataclass(frozen=True)
class _Videos:
    """The videos of a training.

    Attributes:
        train: Videos to learn from, by their index in the store.
        shares: The training videos of each corpus, and its share of the clips; None if `corpora` is
            not given.
        held_out: Held-out videos.
        held_out_share: Share of the usable videos that are held out.
        excluded: The excluded videos, None without `exclude`.
    """

    train: np.ndarray
    shares: tuple[list[np.ndarray], list[float]] | None
    held_out: np.ndarray
    held_out_share: float
    excluded: Exclusion | None


def _choose_videos(
    config: TrainConfig,
    store: TargetStore,
    teachers: tuple[str, ...],
    saved: dict[str, Any] | None,
    console: Console,
) -> _Videos:
    """Choose the videos to learn from and those that are held out.

    Args:
        config: The config.
        store: The target store.
        teachers: The teachers to learn from.
        saved: Identity in the checkpoint of a resumed run, whose held-out share is the default.
        console: The console.

    Raises:
        UsageError: No video is left to learn from.
    """
    usable = store.usable(teachers)
    excluded = optional_exclusion(store, config.exclude, config.exclude_split, config.video_roots)
    if excluded is not None:
        console.info(excluded.describe())
        usable = excluded.remove_from(usable)
    recorded = saved["held_out"]["share"] if saved is not None else None
    share = held_out_share(recorded if config.held_out is None else config.held_out, len(usable))
    videos, held_out = split_held_out(usable, share, config.loop.seed)
    if len(usable) and not len(videos):
        raise UsageError(f"--held-out {share:g} leaves none of {len(usable)} videos to learn from")
    shares = None
    if config.targets.corpora is not None:
        corpus, names = store.column("corpus"), list(store.corpora)
        shares = by_corpus(videos, corpus, names, config.targets.corpora)
        videos = np.concatenate(shares[0])
        chosen = [names.index(name) for name in config.targets.corpora]
        held_out = held_out[np.isin(corpus[held_out], chosen)]
    return _Videos(videos, shares, held_out, share, excluded)


def _assemble(
    config: TrainConfig,
    store: TargetStore,
    teachers: tuple[str, ...],
    saved: dict[str, Any] | None,
    console: Console,
) -> _Parts:
    """Return the parts of a training, with the filter's thresholds in nats."""
    channels = config.student.channels
    if channels == FLOW_CHANNELS:
        require_opencv()
    videos = _choose_videos(config, store, teachers, saved, console)
    options = config.loop.for_videos(len(videos.train))
    heads = _class_heads(config, store, teachers)

    def sampler(
        ids: np.ndarray, thresholds: dict[str, float], fixed: bool = False
    ) -> TargetSampler:
        return TargetSampler(
            store,
            teachers=teachers,
            picks=PickRule.parse(config.targets.picks),
            clip_frames=config.clips.clip_frames,
            videos=ids,
            seed=config.loop.seed,
            epoch_clips=options.clips_per_epoch,
            flip=config.clips.flip,
            view=config.clips,
            max_entropy=thresholds,
            filter_mode=config.targets.filter_mode,
            fixed=fixed,
            shares=None if fixed else videos.shares,
            ahead=pictures_needed(0, channels),
            teacher_dropping=config.targets.teacher_dropping,
            heads=heads,
        )

    def clips(sampler: TargetSampler) -> StudentClips:
        return StudentClips(sampler, config.clips, config.video_roots, channels=channels)

    unfiltered = sampler(videos.train, {})
    unfiltered.check_windows()
    filter_ = measure_thresholds(config.targets, unfiltered, saved)
    train = clips(sampler(videos.train, filter_.thresholds))
    for line in train.missing():
        console.warn(line)
    counts = store.frame_counts[videos.train].tolist()
    warn_of_short_videos(counts, len(videos.train), config.clips.clip_frames, channels)
    held_out_ids = _usable_held_out(
        videos.held_out,
        lambda ids: sampler(ids, filter_.thresholds, fixed=True),
        config.held_out_clips,
    )
    held_out = None
    if len(held_out_ids):
        held_out = clips(sampler(held_out_ids, filter_.thresholds, fixed=True))
    elif videos.held_out_share > 0:
        console.warn(
            f"held_out={videos.held_out_share:g}: no clip of these videos counts; best is by training loss"
        )
    return _Parts(
        store=store,
        teachers=teachers,
        train=train,
        held_out=held_out,
        held_out_share=videos.held_out_share,
        filter=filter_,
        excluded=videos.excluded,
        baselines=measure_baselines(config.targets, train.sampler, saved),
    )


def _class_heads(
    config: TrainConfig, store: TargetStore, teachers: tuple[str, ...]
) -> dict[str, ClassHead]:
    """Return the heads that compute logits from features, by teacher.

    Raises:
        UsageError: The filter requires a head that was not given.
    """
    records = {name: store.teachers[name] for name in teachers}
    outputs = {name: record.output for name, record in records.items()}
    widths = {name: record.width for name, record in records.items()}
    heads = read_heads(config.targets.heads, widths, outputs)
    for key in ("max_entropy", "max_entropy_quantile"):
        limit = getattr(config.targets, key)
        filtered = () if limit is None else limit if isinstance(limit, dict) else teachers
        for name in filtered:
            if outputs[name] == "features" and name not in heads:
                raise UsageError(
                    f"--{key.replace('_', '-')} {limit}: teacher {name!r} gives features, which have "
                    f"no entropy; --head {name}=FILE makes logits of them, or name the teachers that "
                    f"are filtered, as in --set 'targets.{key}={{NAME: X}}'"
                )
    return heads


def _seen(store: TargetStore, videos: np.ndarray, video_roots: dict[str, str]) -> SeenVideos:
    """Return the videos that a student learns from, without those held out or excluded."""
    paths = [store.video_path(int(video), video_roots) for video in videos]
    # With video roots, a corpus may have moved, or prepared copies of it may be read.
    if video_roots:
        originals = [store.video_path(int(video)) for video in videos]
        paths = [
            path if os.path.exists(path) else original
            for path, original in zip(paths, originals, strict=True)
        ]
    return SeenVideos(
        store.column("digest")[videos], paths, np.full(len(videos), SEEN_BY_RUN, np.uint8)
    )


def _usable_held_out(
    ids: np.ndarray, make_sampler: Callable[[np.ndarray], TargetSampler], max_videos: int
) -> np.ndarray:
    """Return the first `max_videos` held-out videos with a window and a clip that the filter keeps.

    Without this check, which decodes nothing, a training whose held-out clips are all rejected
    would fail after its first epoch.
    """
    if len(ids) == 0:
        return ids
    sampler = make_sampler(ids)
    usable = (
        int(video)
        for k, video in enumerate(ids)
        if sampler.has_window(int(video)) and sampler.draw(0, k).counts
    )
    return np.array(list(islice(usable, max_videos)), np.int64)


def _bounds(sampler: TargetSampler, objective: Distillation, console: Console) -> LossBounds | None:
    """Log and return the two reference losses of the first draws."""
    bounds = loss_bounds(first_draws(sampler), objective)
    if bounds is not None:
        console.info(
            f"reference losses: best constant predictor {bounds.constant:.3f}, lower bound {bounds.perfect:.3f}"
        )
    return bounds


def _explained(
    bounds: LossBounds | None,
    result: FitResult,
    teachers: tuple[str, ...],
    export: str,
    console: Console,
) -> dict[str, Any]:
    """Return the reference losses and the explained fraction for result.json.

    The fraction is that of the held-out loss if every teacher has held-out clips, else that of the
    training loss. A fraction near 0 causes a warning.
    """
    if bounds is None:
        return dict.fromkeys(
            ("baseline_loss", "loss_lower_bound", "explained_fraction", "explained_by")
        )
    has_held_out = all(f"loss/{name}" in result.validation for name in teachers)
    loss, kind = result.train_loss, "training"
    if has_held_out:
        loss, kind = result.best if export == "best" else result.validation["loss"], "held-out"
    fraction = bounds.explained_fraction(loss)
    if fraction < TOO_LITTLE:
        console.warn(
            f"the student has learned next to nothing: {kind} loss {loss:.3f}, the best constant predictor has "
            f"{bounds.constant:.3f}; try more loop.epochs, another loop.lr or a larger student.width"
        )
    else:
        training_text = (
            f" ({bounds.explained_fraction(result.train_loss):.0%} by the training loss)"
            if has_held_out
            else ""
        )
        console.info(
            f"explained fraction {fraction:.0%}, from the best constant predictor (0 %) to the lower bound (100 %), "
            f"by the {kind} loss{training_text}"
        )
    return {
        "baseline_loss": bounds.constant,
        "loss_lower_bound": bounds.perfect,
        "explained_fraction": fraction,
        "explained_by": kind,
    }


def _show_agreement(
    parts: _Parts, objective: Distillation, result: FitResult, console: Console
) -> dict[str, float]:
    """Log the agreement on held-out clips, compared with always guessing the same class.

    Returns:
        Teacher → the share of its most frequent class.
    """
    if parts.held_out is None:
        return {}
    sampler = parts.held_out.sampler
    draws = (sampler.draw(0, k) for k in range(len(sampler.videos)))
    names = [name for name, head in objective.heads.items() if head.output == "logits"]
    shares = most_frequent_shares(draws, names)
    for name, share in shares.items():
        agreement = result.validation.get(f"agreement/{name}")
        if agreement is not None:
            console.info(
                f"{counted(len(sampler.videos), 'held-out clip')}: agrees with {name} on {100 * agreement:.1f} %, "
                f"always guessing its most frequent class would on {100 * share:.1f} %"
            )
    return shares


def _build(config: TrainConfig, targets: Mapping[str, TeacherTargets]) -> Student:
    """Build the student with new weights from the seed."""
    torch.manual_seed(config.loop.seed)
    return build_student(
        config.student,
        {name: each.width for name, each in targets.items()},
        clip=(config.clips.clip_frames, config.clips.size),
        head_kinds=config.student_head,
    )


def _identity(config: TrainConfig, parts: _Parts, options: LoopOptions) -> dict[str, Any]:
    """Return the properties that a resumed training must share, by top-level key.

    An error names the key that differs.
    """
    store, teachers = parts.store.identity(), parts.store.with_mirrors(parts.teachers)
    heads = {name: each.head for name, each in parts.targets.items()}
    digests = {name: head.digest for name, head in heads.items() if head is not None}
    return {
        "store": {"id": store["store_id"], "videos": parts.num_videos},
        "sampling": store["sampling"],
        "teachers": {name: store["teachers"][name] for name in teachers},
        "student": config.student.identity_dump(),
        "clips": config.clips.identity_dump(),
        "targets": config.targets.identity_dump(exclude={"teachers", "heads"}),
        "filter": {
            "quantile": config.targets.max_entropy_quantile,
            "nats": parts.filter.thresholds,
        },
        "exclude": parts.excluded.digest if parts.excluded is not None else None,
        "held_out": {"share": config.held_out, "clips": config.held_out_clips},
        **({"heads": digests} if digests else {}),
        **({"baselines": parts.baselines} if config.targets.balance_losses else {}),
        **options.identity(),
        **({} if config.student_head == "linear" else {"student_head": config.student_head}),
    }


def _check_same(run_dir: Path, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    """Check the identity of a resumed run; a store with more videos has an error of its own.

    With more videos an epoch would have different clips.
    """
    before, now = saved["store"], identity["store"]
    grown = before["id"] == now["id"] and before["videos"] < now["videos"]
    if (
        grown
        and saved["exclude"] == identity["exclude"]
        and saved["held_out"] == identity["held_out"]
    ):
        raise StoreMismatchError(
            f"{run_dir} was trained on {before['videos']} videos of the store, which now has {now['videos']}; "
            "a run cannot be resumed with other videos: start a new one with another --out"
        )
    check_identity(run_dir, saved, identity)


def _export(config: TrainConfig, parts: _Parts, student: Student, objective: Distillation) -> Path:
    """Write RUN/student.safetensors with the last or the best weights; return its path."""
    path = Path(config.out, STUDENT_FILE)
    if config.export == "best":
        load_weights(path.parent, "best", student, weights=config.loop.weights)
    meta = StudentMeta(
        classes={name: list(each.classes) for name, each in parts.targets.items() if each.classes},
        heads=_head_metas(objective),
        clip_length=config.clips.clip_frames,
        clip_size=config.clips.size,
        resize=config.clips.frame_size(),
        extra={
            "store": parts.store.identity()["store_id"],
            "targets": config.targets.model_dump(mode="json"),
        },
    )
    scales = {
        name: (head.mean, head.scale)
        for name, head in objective.heads.items()
        if head.mean is not None
    }
    save_student(path, student, meta, scales)
    return path


def _head_metas(objective: Distillation) -> dict[str, HeadMeta]:
    """Return output and loss of each head, {} if all heads have logits, as in version 0.1."""
    if all(head.output == "logits" for head in objective.heads.values()):
        return {}
    return {
        name: HeadMeta.model_validate({"output": head.output, "loss": head.loss})
        for name, head in objective.heads.items()
    }


def _final(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the final numbers of a training for the trackers."""
    names = ("loss", "best", "best_epoch", "explained_fraction", "kept_share", "clips_per_second")
    held_out = {f"held_out/{name}": value for name, value in summary["held_out"].items()}
    return {**{name: summary[name] for name in names}, **held_out}


def _summary(
    config: TrainConfig, parts: _Parts, result: FitResult, exported: Path
) -> dict[str, Any]:
    """Return the summary that --json prints."""
    return {
        "run": config.out,
        "student": str(exported),
        "exported": config.export,
        "weights": config.loop.weights,
        "epochs": result.epochs,
        "steps": result.steps,
        "videos": parts.num_videos,
        "held_out_videos": len(parts.held_out.sampler.videos) if parts.held_out is not None else 0,
        "excluded_videos": len(parts.excluded.videos) if parts.excluded is not None else 0,
        "loss": result.train_loss,
        "best": result.best,
        "best_epoch": result.best_epoch,
        "held_out": result.validation,
        "max_entropy": parts.filter.thresholds,
        "kept_share": parts.filter.kept,
        "kept_share_by_teacher": parts.filter.kept_by,
        "unreadable": result.unreadable,
        "already_finished": result.already_finished,
        "resumed_from_step": result.resumed_from,
        "seconds": result.seconds,
        "clips_per_second": result.clips_per_second,
    }
