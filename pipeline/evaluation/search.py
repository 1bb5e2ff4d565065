"""`finetune --search`: choose options on the validation side by successive halving.

All candidates are trained for a part of their schedule. The better half resumes from its
checkpoints until twice that part, and so on until the last candidates have finished.

RUN/search.json has the results so far, so that an interrupted search can be resumed. RUN/search/N
is the folder of candidate N, which is removed when the candidate is out of the search.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..common.config import known_keys, merge, nested
from ..common.distributed import Ranks
from ..common.documents import is_regular_file
from ..common.errors import CheckpointError, TrainingError, UsageError, WorkerDied
from ..common.files import write_whole
from ..common.run_dir import SEARCH
from ..common.streams import as_json
from ..training.checkpoint import check_identity
from ..training.loop_options import FREE_ON_RESUME
from .finetune_options import FinetuneConfig

FOLDER = "search"
GROUPS = ("loop", "student", "clips")
TOP_LEVEL_KEYS = ("dropout", "freeze", "init", "inflation")
NOT_SEARCHED = {f"loop.{name}" for name in FREE_ON_RESUME - {"epochs"}} | {"loop.seed"}


@dataclass
class Candidate:
    """A combination of the values of a search.

    Attributes:
        options: Map from dotted key to value.
        epochs: Number of epochs that it was trained for.
        loss: Validation loss of `best_epoch`; None if it has not been trained, or failed.
        accuracy: Accuracy on the validation side after `best_epoch`.
        best_epoch: The epoch to export, counted from 1: the best so far, or the last with
            --export last.
        failed: The error that ended its training, "" without one.
    """

    options: dict[str, Any]
    epochs: int = 0
    loss: float | None = None
    accuracy: float | None = None
    best_epoch: int = 0
    failed: str = ""

    @property
    def rank(self) -> float:
        """The loss, or infinity without one; the candidate with the lowest rank is chosen."""
        return math.inf if self.loss is None else self.loss

    @property
    def name(self) -> str:
        """The values in the form of the command line."""
        return " ".join(f"{key}={value}" for key, value in self.options.items())


@dataclass
class SearchRecord:
    """The content of RUN/search.json; `chosen` is an index of `candidates`."""

    identity: dict[str, Any]
    candidates: list[Candidate]
    chosen: int | None = None
    epochs_trained: int = 0

    @classmethod
    def read(cls, run_dir: Path) -> SearchRecord | None:
        """Load the record of a run folder; None if it has none.

        Raises:
            CheckpointError: The file has another form.
            SourceError: The file is a link out of the folder.
        """
        path = run_dir / SEARCH
        if not is_regular_file(path, run_dir):
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            candidates = [Candidate(**each) for each in content.pop("candidates")]
            return cls(**content, candidates=candidates)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def write(self, run_dir: Path) -> None:
        """Write RUN/search.json atomically."""
        write_whole(run_dir / SEARCH, as_json(asdict(self), indent=1).encode())

    @property
    def best(self) -> Candidate:
        """The chosen candidate of a finished search."""
        if self.chosen is None:
            raise ValueError("the search has not chosen yet")
        return self.candidates[self.chosen]

    def config(self, config: FinetuneConfig) -> FinetuneConfig:
        """Return a config with the chosen values."""
        return candidate_configs(config)[self.candidates.index(self.best)][1]


TrainCandidate = Callable[[FinetuneConfig, Path, int], Mapping[str, Any]]


def candidate_configs(config: FinetuneConfig) -> list[tuple[dict[str, Any], FinetuneConfig]]:
    """Return the values and the config of every combination.

    Raises:
        UsageError: A key cannot be searched, or a value is not allowed.
    """
    keys = {_full_key(key): values for key, values in config.search.items()}
    base_options = config.model_dump(exclude_unset=True)
    configs = []
    for values in itertools.product(*keys.values()):
        options = dict(zip(keys, values, strict=True))
        merged = base_options
        for key, value in options.items():
            merged = merge(merged, nested(key, value))
        try:
            configs.append((options, FinetuneConfig.model_validate(merged)))
        except ValidationError as error:
            problem = error.errors()[0]
            location = ".".join(map(str, problem["loc"]))
            raise UsageError(
                f"--search {Candidate(options).name}: {location}: {problem['msg']}"
            ) from None
    return configs


def rungs(candidates: int) -> list[tuple[float, int]]:
    """Return (share of the schedule, number of candidates that reach it) of each rung.

    The candidates of the last rung finish their schedule.

    Example:
        >>> rungs(6)
        [(0.25, 6), (0.5, 3), (1.0, 2)]
    """
    steps = max(1, math.ceil(math.log2(candidates)))
    counts = [candidates]
    for _ in range(steps - 1):
        counts.append(math.ceil(counts[-1] / 2))
    return [(0.5 ** (steps - 1 - i), count) for i, count in enumerate(counts)]


def epochs_of_search(config: FinetuneConfig) -> int:
    """Return the total number of epochs of a search, including its final training."""
    epochs = sorted((each.loop.epochs for _, each in candidate_configs(config)), reverse=True)
    total, previous = 0, 0.0
    for share, count in rungs(len(epochs)):
        total += sum(
            _epochs_until(n, share) - (_epochs_until(n, previous) if previous else 0)
            for n in epochs[:count]
        )
        previous = share
    return total + epochs[0]


def search(
    config: FinetuneConfig,
    run_dir: Path,
    identity: dict[str, Any],
    train: TrainCandidate,
    report: Callable[[str], None],
    ranks: Ranks,
) -> SearchRecord:
    """Train the candidates, and choose the one with the lowest validation loss.

    Args:
        config: Options with a search.
        run_dir: The folder of the run.
        identity: Record of all that must be equal when a search is resumed, JSON-serializable.
        train: Function that trains a candidate in a folder until an epoch, from its checkpoint if
            it has one, and returns `loss`, `accuracy` and `best_epoch`. It is called on all ranks.
        report: Function that logs a line.
        ranks: The processes that train together.

    Raises:
        CheckpointError: The folder has a different search.
        TrainingError: Every candidate that remained until the end failed.
    """
    candidates = ranks.on_all_ranks(lambda: candidate_configs(config))
    record = ranks.on_main(
        lambda: _load_or_create(run_dir, identity, [each for each, _ in candidates])
    )
    remaining = list(range(len(candidates)))
    for share, count in rungs(len(candidates)) if record.chosen is None else ():
        remaining = sorted(remaining, key=lambda i: record.candidates[i].rank)[:count]
        ranks.on_main(partial(_remove_others, run_dir, remaining, len(candidates)))
        for i in sorted(remaining):
            candidate, options = record.candidates[i], candidates[i][1]
            epochs = _epochs_until(options.loop.epochs, share)
            if candidate.failed or candidate.epochs >= epochs:
                continue
            report(f"search: {candidate.name}, until epoch {epochs} of {options.loop.epochs}")
            record.epochs_trained += epochs - candidate.epochs
            try:
                measured = train(options, run_dir / FOLDER / str(i), epochs)
                candidate.loss, candidate.accuracy = measured["loss"], measured["accuracy"]
                candidate.best_epoch = measured["best_epoch"]
            except WorkerDied:
                raise
            except TrainingError as error:
                # The search continues with the others. A candidate that fails, such as one that
                # diverges, must not be chosen by its loss in an earlier rung.
                candidate.failed = str(error)
                candidate.loss = candidate.accuracy = None
                candidate.best_epoch = 0
                report(f"search: {candidate.name} failed: {error}")
            candidate.epochs = epochs
            ranks.on_main(lambda: record.write(run_dir))
    if record.chosen is None:
        record.chosen = min(remaining, key=lambda i: record.candidates[i].rank)
        if record.best.loss is None:
            raise TrainingError(f"--search: every remaining candidate failed: {record.best.failed}")
        ranks.on_main(lambda: record.write(run_dir))
    ranks.on_main(lambda: shutil.rmtree(run_dir / FOLDER, ignore_errors=True))
    return record


def _load_or_create(
    run_dir: Path, identity: dict[str, Any], options: list[dict[str, Any]]
) -> SearchRecord:
    """Return the record of an interrupted search, or a new one."""
    identity = json.loads(json.dumps({**identity, "search": options}))
    saved = SearchRecord.read(run_dir)
    if saved is None:
        return SearchRecord(identity, [Candidate(each) for each in options])
    check_identity(run_dir, saved.identity, identity)
    return saved


def _remove_others(run_dir: Path, remaining: list[int], candidates: int) -> None:
    for i in set(range(candidates)) - set(remaining):
        shutil.rmtree(run_dir / FOLDER / str(i), ignore_errors=True)


def _epochs_until(epochs: int, share: float) -> int:
    return math.ceil(epochs * share)


def _full_key(key: str) -> str:
    """Return the dotted key of an option: `lr` is `loop.lr`.

    Raises:
        UsageError: The key does not exist, or cannot be searched.
    """
    keys = {
        name
        for name in known_keys(FinetuneConfig)
        if (name.partition(".")[0] in GROUPS and "." in name) or name in TOP_LEVEL_KEYS
    } - NOT_SEARCHED
    flags = {"frames": "clips.clip_frames", "student": "student.architecture"}
    candidates = (key, flags.get(key, ""), *(f"{group}.{key}" for group in GROUPS))
    matches = [name for name in candidates if name in keys]
    if not matches:
        raise UsageError(
            f"--search {key}: cannot be searched; expected one of {', '.join(sorted(keys))}"
        )
    return matches[0]
