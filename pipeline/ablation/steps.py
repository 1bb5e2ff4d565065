"""The runs of the cells of an ablation; equal runs are shared.

A step is one run of train-student or finetune. Its key is the digest of everything that decides its
outcome: the config without paths and without options that may change on a resume, the identity of
the store, and for finetune the labels and the initialisation (key of the student's step, or digest
of a file). Steps with equal keys are one run, whatever cells and plans they belong to.
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
        kind: Its command.
        key: Digest of everything that decides its outcome.
        config: Options of the command.
        clips: Number of clips to train on.
        network: Settings that decide its speed: `StudentOptions` and the shape of a batch.
        needs: Key of the student that it starts from.
        store: Address of the store, which is not in `config` because it may have a password.
    """

    kind: str
    key: str
    config: dict[str, Any] = field(compare=False)
    clips: int = field(compare=False)
    network: dict[str, Any] = field(compare=False)
    needs: str | None = None
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
        derive: Whether a schedule and a share of held-out videos that a plan leaves open follow the
            number of videos, as they do in the commands; else they are those of version 0.1.
    """

    def __init__(
        self, store: TargetStore, video_roots: dict[str, str], *, derive: bool = True
    ) -> None:
        self.store, self.video_roots, self.derive = store, video_roots, derive
        self._labels: dict[tuple[Any, ...], Labels] = {}
        self._left: dict[tuple[Any, ...], Exclusion] = {}

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
        seen = {
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
            seen["leave_out"] = exclusion.digest
            usable = exclusion.remove_from(usable)
        share = config.held_out or 0.0
        if self.derive:
            share = held_out_share(config.held_out, len(usable))
        config = config.model_copy(update={"held_out": share})
        config, loop = self._scheduled(config, int(len(usable) * (1 - share)))
        bare = _bare(config, TRAIN)
        # `seen` has the teachers, whether the plan names them or uses all of the store.
        if list(teachers) == [name for name in self.store.target_names() if name in teachers]:
            bare["targets"]["teachers"] = None
        key = _digest(bare, seen)
        clips, address = loop.total_steps * loop.step_clips, self.store.files.address
        return Step(TRAIN, key, _given(config), clips, _network(config, config), store=address)

    def finetuning(self, cell: Cell, student: Step | None) -> Step:
        """Return the finetuning of a cell, from its student if it has one."""
        dataset, equals, root = cell.dataset.partition("=")
        # Absolute paths, since a worker may run in another folder.
        forced: dict[str, Any] = {"dataset": canonical(dataset), "split": cell.split, "out": "."}
        forced |= {"root": os.path.abspath(root)} if equals else {}
        if student is not None:
            forced["init"] = "."
        ours = self._config(TRAIN, cell, {"store": self.store.name, "out": "."})
        # Without a student, network and clips are those of the students of other cells.
        if student is None:
            section = filled_in(cell.sections[TUNE], cell.split)
            forced |= (
                {} if "student" in section else {"student": ours.student.model_dump(mode="json")}
            )
            clips = {
                k: v
                for k, v in ours.clips.model_dump(mode="json").items()
                if k in ("clip_frames", "size", "resize")
            }
            forced["clips"] = merge(clips, section.get("clips", {}))
        config = self._config(TUNE, cell, forced)
        labels = self._labels_of(config)
        config, loop = self._scheduled(config, len(labels.train))
        begins = student.key if student is not None else _of_file(config.init)
        seen = {"begins": begins, "labels": labels_digest(labels)}
        if labels.val:
            seen["validation"] = videos_digest(labels.val)
        key = _digest(_bare(config, TUNE), seen)
        epochs = epochs_of_search(config) if config.search else loop.epochs
        total = epochs * loop.clips_per_epoch
        needs = student.key if student is not None else None
        return Step(TUNE, key, _given(config), total, _network(ours, config), needs)

    def _config(self, command: str, cell: Cell, forced: dict[str, Any]) -> Any:
        section = filled_in(cell.sections[command], cell.split)
        preset = section.pop("preset", None)
        if command == TUNE and section.get("init") == STUDENT:
            section.pop("init")
        layers = [(f"preset {preset}", preset_section(preset, command))] if preset else []
        loop = section.get("loop", {})
        if layers and (loop.get("budget") or loop.get("minutes")):
            # As on the command line: a budget replaces the schedule of a preset.
            below = layers[0][1]
            below["loop"] = {k: v for k, v in below.get("loop", {}).items() if k not in SCHEDULE}
        forced = merge({"loop": {"seed": cell.seed}}, forced)
        return load_config(
            MODELS[command],
            command,
            layers=[*layers, (f"plan, {cell.row}", section), ("", forced)],
        )

    def _scheduled(self, config: Any, videos: int) -> tuple[Any, LoopOptions]:
        """Return the config with the schedule that follows from the number of videos, and its loop.

        The config keeps a schedule that the plan gives, since digests of stored runs have it.
        """
        derived = config.loop.with_derived_schedule() if self.derive else config.loop
        loop = derived.for_videos(videos)
        if derived is not config.loop:
            loop = loop.model_copy(update={"budget": None})
            config = config.model_copy(update={"loop": loop})
        return config, loop

    def _exclusion(self, source: str, split: int | str | None) -> Exclusion:
        if (source, split) not in self._left:
            self._left[source, split] = exclude(self.store, source, split, self.video_roots)
        return self._left[source, split]

    def _labels_of(self, config: Any) -> Labels:
        place = (
            config.dataset,
            config.split,
            config.copies,
            config.root,
            config.partial,
            config.held_out,
        )
        if place not in self._labels:
            split = config.split if isinstance(config.split, int) else None
            labels = load_labels(
                config.dataset,
                split,
                copies=config.copies,
                root=config.root,
                partial=config.partial,
            )
            self._labels[place] = hold_out(labels, config.held_out)
        return self._labels[place]


def step_options(step: Step, out: Path) -> Any:
    """Return the options of the command that does a step."""
    return MODELS[step.kind].model_validate(prepared_config(step, out))


def prepared_config(step: Step, out: Path) -> dict[str, Any]:
    """Return the options of the command of a step, with its paths."""
    init = {} if step.needs is None else {"init": str(out / STEP_FOLDERS[TRAIN] / step.needs)}
    store = {} if step.store is None else {"store": step.store}
    return {**step.config, **init, **store, "out": str(out / step.folder), "resume": "auto"}


def filled_in(section: Any, split: int) -> Any:
    """Replace {split} in the texts of a section, for options that depend on the split."""
    if isinstance(section, dict):
        return {key: filled_in(value, split) for key, value in section.items()}
    if isinstance(section, list):
        return [filled_in(value, split) for value in section]
    return section.replace("{split}", str(split)) if isinstance(section, str) else section


def _given(config: Options) -> dict[str, Any]:
    """Return the keys set by preset and plan; finetune takes others from the initialisation."""
    given = dict(config.model_dump(mode="json", exclude_unset=True))
    loop = config.loop  # type: ignore[attr-defined]
    # A schedule that the plan leaves to the defaults is that of the cell's digest, and no other.
    if loop.budget is None and loop.minutes is None:
        given["loop"] = {key: getattr(loop, key) for key in SCHEDULE} | given.get("loop", {})
    return given


def _network(trained: TrainConfig, tuned: Any) -> dict[str, Any]:
    """Return the settings that decide the speed of a run."""
    options = tuned.loop
    return {
        "student": trained.student.model_dump(mode="json"),
        "clip_frames": trained.clips.clip_frames,
        "size": trained.clips.size,
        "micro_batch_size": options.clips_at_once(options.gpus),
        "precision": options.precision,
        "device": options.device,
    }


def _bare(config: Any, kind: str) -> dict[str, Any]:
    """Return the options that decide the outcome, under the names of version 0.1.

    A digest never changes.
    """
    free = {**dict.fromkeys(PATHS[kind], True), "loop": set(FREE)}
    return first_keys(config.identity_dump(exclude=free))


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _of_file(init: str) -> str:
    """Return the name of an initialisation, or the digest of its file if it has one."""
    if is_hub_init(init):
        init = str(student_file(init))
    kind, colon, rest = init.partition(":")
    for path in (init, rest) if colon else (init,):
        path = os.path.join(path, STUDENT_FILE) if os.path.isdir(path) else path
        if os.path.isfile(path):
            with open(path, "rb") as file:
                return f"{kind if path == rest else ''}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    return init
