"""The runs of the cells of an ablation; equal runs are shared.

A step is one run of train-student or finetune. Its key is the digest of everything that decides its
outcome: the config without paths and without options that may change on a resume; for train-student
the identity of the store; for finetune the labels and the initialisation (the key of the student's
step, or the digest of a file). Steps with equal keys share one run, also across cells and plans.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..clips.seeding import held_out_share
from ..common.config import first_keys, load_config, merge, preset_section
from ..common.run_dir import RESULT, STEP_FOLDERS, STUDENT_FILE
from ..common.settings import Options
from ..evaluation.finetune_options import FinetuneConfig
from ..evaluation.labels import Labels, canonical, hold_out, load_labels
from ..evaluation.run_labels import labels_digest, videos_digest
from ..evaluation.search import epochs_of_search
from ..evaluation.store_labels import canonical_exclude, exclude
from ..store.reader import TargetStore
from ..store.selection import Exclusion
from ..students.initialization import is_hub_init, student_file
from ..training.distillation_options import TrainConfig
from ..training.loop_options import FREE_ON_RESUME, SCHEDULE, LoopOptions
from .plan import SECTIONS, STUDENT, Cell

TRAIN, TUNE = SECTIONS
PATHS = {
    TRAIN: {"out", "resume", "video_roots", "store", "exclude", "exclude_split"},
    TUNE: {"out", "resume", "verbose", "copies", "init", "dataset", "root", "strict", "dry_run"},
}
MODELS: dict[str, type[Options]] = {TRAIN: TrainConfig, TUNE: FinetuneConfig}

FREE = FREE_ON_RESUME - {"epochs", "budget", "minutes"}


@dataclass(frozen=True)
class Step:
    """One run.

    Attributes:
        kind: Name of its command.
        key: Digest of everything that decides its outcome.
        config: Options of the command.
        clips: Number of clips to train on.
        network: Settings that decide its speed: `StudentOptions` and the shape of a batch.
        student_key: Key of the step of the student that it starts from, if any.
        store: Address of the store, which is not in `config` because it may have a password.
    """

    kind: str
    key: str
    config: dict[str, Any] = field(compare=False)
    clips: int = field(compare=False)
    network: dict[str, Any] = field(compare=False)
    student_key: str | None = None
    store: str | None = field(default=None, compare=False, repr=False)

    @property
    def folder(self) -> str:
        """Folder of the run, relative to that of the ablation."""
        return f"{STEP_FOLDERS[self.kind]}/{self.key}"

    def result(self, out: Path) -> dict[str, Any] | None:
        """Return the content of result.json of a finished run, else None."""
        try:
            return dict(json.loads((out / self.folder / RESULT).read_text()))
        except (OSError, ValueError, TypeError, RecursionError):
            return None


class StepMaker:
    """Make the steps of cells for one store.

    Args:
        store: The target store.
        video_roots: Where its corpora are located now.
        derive: Whether schedules and shares of held-out videos that the plan does not set are
            derived from the number of videos, as the commands do; otherwise the defaults of version
            0.1 apply.
    """

    def __init__(
        self, store: TargetStore, video_roots: dict[str, str], *, derive: bool = True
    ) -> None:
        self.store, self.video_roots, self.derive = store, video_roots, derive
        self._labels: dict[tuple[Any, ...], Labels] = {}
        self._exclusions: dict[tuple[Any, ...], Exclusion] = {}

    def student(self, cell: Cell) -> Step:
        """Return the training of the student of a cell.

        Raises:
            UsageError: The config is invalid.
        """
        config = self._config(
            TRAIN, cell, {"store": self.store.name, "out": ".", "video_roots": self.video_roots}
        )
        teachers = config.targets.teachers or self.store.target_names()
        identity = self.store.identity()
        usable = self.store.usable([name for name in teachers if name in self.store.teachers])
        inputs = {
            "store": identity["store_id"],
            "sampling": identity["sampling"],
            "teachers": {
                name: identity["teachers"].get(name) for name in self.store.with_mirrors(teachers)
            },
            "videos": len(usable),
        }
        if config.exclude is not None:
            config = config.model_copy(update={"exclude": canonical_exclude(config.exclude)})
            exclusion = self._exclusion(config.exclude, config.exclude_split)
            inputs["leave_out"] = exclusion.digest
            usable = exclusion.remove_from(usable)
        share = config.held_out or 0.0
        if self.derive:
            share = held_out_share(config.held_out, len(usable))
        config = config.model_copy(update={"held_out": share})
        config, loop = self._scheduled(config, int(len(usable) * (1 - share)))
        identity_options = _identity_options(config, TRAIN)
        # `inputs` has the names of the teachers. Naming all teachers of the store must give the key
        # of a plan that names none.
        if list(teachers) == [name for name in self.store.target_names() if name in teachers]:
            identity_options["targets"]["teachers"] = None
        key = _digest(identity_options, inputs)
        num_clips, address = loop.total_steps * loop.step_clips, self.store.files.address
        network = _network(config, config)
        return Step(TRAIN, key, _explicit_options(config), num_clips, network, store=address)

    def finetuning(self, cell: Cell, student: Step | None) -> Step:
        """Return the finetuning of a cell, from its student if it has one."""
        dataset, equals, root = cell.dataset.partition("=")
        # Absolute paths, since a worker may run in another folder.
        overrides: dict[str, Any] = {"dataset": canonical(dataset), "split": cell.split, "out": "."}
        overrides |= {"root": os.path.abspath(root)} if equals else {}
        if student is not None:
            overrides["init"] = "."
        train_config = self._config(TRAIN, cell, {"store": self.store.name, "out": "."})
        # Without a student, the network and the clips are those that the other cells train with.
        if student is None:
            section = fill_split(cell.sections[TUNE], cell.split)
            overrides |= (
                {}
                if "student" in section
                else {"student": train_config.student.model_dump(mode="json")}
            )
            clip_options = {
                key: value
                for key, value in train_config.clips.model_dump(mode="json").items()
                if key in ("clip_frames", "size", "resize")
            }
            overrides["clips"] = merge(clip_options, section.get("clips", {}))
        config = self._config(TUNE, cell, overrides)
        labels = self._labels_of(config)
        config, loop = self._scheduled(config, len(labels.train))
        init_key = student.key if student is not None else _init_digest(config.init)
        inputs = {"begins": init_key, "labels": labels_digest(labels)}
        if labels.val:
            inputs["validation"] = videos_digest(labels.val)
        key = _digest(_identity_options(config, TUNE), inputs)
        epochs = epochs_of_search(config) if config.search else loop.epochs
        num_clips = epochs * loop.clips_per_epoch
        student_key = student.key if student is not None else None
        network = _network(train_config, config)
        return Step(TUNE, key, _explicit_options(config), num_clips, network, student_key)

    def _config(self, command: str, cell: Cell, overrides: dict[str, Any]) -> Any:
        section = fill_split(cell.sections[command], cell.split)
        preset = section.pop("preset", None)
        if command == TUNE and section.get("init") == STUDENT:
            section.pop("init")
        layers = [(f"preset {preset}", preset_section(preset, command))] if preset else []
        loop = section.get("loop", {})
        if layers and (loop.get("budget") or loop.get("minutes")):
            # As on the command line, a budget replaces the schedule of a preset.
            defaults = layers[0][1]
            defaults["loop"] = {
                key: value for key, value in defaults.get("loop", {}).items() if key not in SCHEDULE
            }
        overrides = merge({"loop": {"seed": cell.seed}}, overrides)
        return load_config(
            MODELS[command],
            command,
            layers=[*layers, (f"plan, {cell.row}", section), ("", overrides)],
        )

    def _scheduled(self, config: Any, videos: int) -> tuple[Any, LoopOptions]:
        """Return the config, and its loop with the schedule for a number of videos.

        A derived schedule is part of the returned config. One that the plan sets stays in the
        config as it is, since the keys of existing runs depend on it.
        """
        derived = config.loop.with_derived_schedule() if self.derive else config.loop
        loop = derived.for_videos(videos)
        if derived is not config.loop:
            loop = loop.model_copy(update={"budget": None})
            config = config.model_copy(update={"loop": loop})
        return config, loop

    def _exclusion(self, source: str, split: int | str | None) -> Exclusion:
        if (source, split) not in self._exclusions:
            self._exclusions[source, split] = exclude(self.store, source, split, self.video_roots)
        return self._exclusions[source, split]

    def _labels_of(self, config: Any) -> Labels:
        cache_key = (
            config.dataset,
            config.split,
            config.copies,
            config.root,
            config.partial,
            config.held_out,
        )
        if cache_key not in self._labels:
            split = config.split if isinstance(config.split, int) else None
            labels = load_labels(
                config.dataset,
                split,
                copies=config.copies,
                root=config.root,
                partial=config.partial,
            )
            self._labels[cache_key] = hold_out(labels, config.held_out)
        return self._labels[cache_key]


def step_options(step: Step, out: Path) -> Any:
    """Return the validated options of the command that runs a step."""
    return MODELS[step.kind].model_validate(prepared_config(step, out))


def prepared_config(step: Step, out: Path) -> dict[str, Any]:
    """Return the options of the command that runs a step, with its paths."""
    init = {}
    if step.student_key is not None:
        init["init"] = str(out / STEP_FOLDERS[TRAIN] / step.student_key)
    store = {} if step.store is None else {"store": step.store}
    return {**step.config, **init, **store, "out": str(out / step.folder), "resume": "auto"}


def fill_split(section: Any, split: int) -> Any:
    """Replace {split} in the strings of a section, for options that depend on the split."""
    if isinstance(section, dict):
        return {key: fill_split(value, split) for key, value in section.items()}
    if isinstance(section, list):
        return [fill_split(value, split) for value in section]
    return section.replace("{split}", str(split)) if isinstance(section, str) else section


def _explicit_options(config: Options) -> dict[str, Any]:
    """Return the options set by preset and plan; finetune takes others from the initialisation."""
    options = dict(config.model_dump(mode="json", exclude_unset=True))
    loop = config.loop  # type: ignore[attr-defined]
    # Without a budget, default schedules are written out: the run must use the one in its key.
    if loop.budget is None and loop.minutes is None:
        options["loop"] = {key: getattr(loop, key) for key in SCHEDULE} | options.get("loop", {})
    return options


def _network(train_config: TrainConfig, config: Any) -> dict[str, Any]:
    """Return the settings that decide the speed of a run of `config`."""
    options = config.loop
    return {
        "student": train_config.student.model_dump(mode="json"),
        "clip_frames": train_config.clips.clip_frames,
        "size": train_config.clips.size,
        "micro_batch_size": options.clips_at_once(options.gpus),
        "precision": options.precision,
        "device": options.device,
    }


def _identity_options(config: Any, kind: str) -> dict[str, Any]:
    """Return the options that decide the outcome.

    They have the names of version 0.1, so that the keys of existing runs never change.
    """
    free = {**dict.fromkeys(PATHS[kind], True), "loop": set(FREE)}
    return first_keys(config.identity_dump(exclude=free))


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _init_digest(init: str) -> str:
    """Return the digest of the file of an initialisation, or its name if it has no file."""
    if is_hub_init(init):
        init = str(student_file(init))
    kind, colon, name = init.partition(":")
    for path in (init, name) if colon else (init,):
        path = os.path.join(path, STUDENT_FILE) if os.path.isdir(path) else path
        if os.path.isfile(path):
            with open(path, "rb") as file:
                return f"{kind if path == name else ''}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    return init
