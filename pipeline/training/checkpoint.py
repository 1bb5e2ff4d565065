"""Checkpoints of a run, which are written atomically and checked against the run that loads them.

RUN/checkpoints/last.pt and best.pt hold model, optimizer, the moving average of the weights (with
`ema`), counters, random states and the identity of the run, as a dict that torch loads with
weights_only=True. They are zip archives whose comment is a digest of the whole file, see `sealed`.
Those of version 0.1 have only the CRC-32 of each tensor.
"""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.config import current_keys
from ..common.distributed import SINGLE_PROCESS, Ranks
from ..common.errors import CheckpointError, StoreMismatchError, UsageError, first_line
from ..common.files import write_whole
from ..common.run_dir import LAST
from ..common.sealed import add_comment, check_seal, seal
from .loop_options import LoopOptions, Resume, Weights
from .optimizer import WeightAverage
from .train_state import TrainState

FORMAT_VERSION = 2
# Keys of an identity that describe the targets. If one differs, the store does not match.
STORE_KEYS = frozenset({"store", "teachers", "sampling"})
_KEY_TYPES: dict[str, type] = {
    "identity": str,
    "model": dict,
    "optimizer": dict,
    "state": dict,
    "rng": list,
}
log = logging.getLogger(__name__)


def read_identity(run_dir: Path) -> dict[str, Any] | None:
    """Return the identity in the last checkpoint of a run, or None before the first checkpoint."""
    path = run_dir / LAST
    if not path.exists():
        return None
    return _identity_of(_load(path))


def require_not_longer(run_dir: Path, options: LoopOptions) -> None:
    """Refuse a run with more steps than the options request, because its summary would be wrong.

    Raises:
        UsageError: The run is longer; the error names its number of epochs and steps.
    """
    path = run_dir / LAST
    if not path.exists():
        return
    steps = int(_load(path)["state"]["step"])
    if steps > options.total_steps:
        epochs = steps // options.steps_per_epoch
        raise UsageError(
            f"--epochs {options.epochs}: {run_dir} has already been trained for {epochs} epochs ({steps} steps); "
            f"--resume cannot shorten a run, choose another --out"
        )


def check_identity(run_dir: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare the identity in a run's checkpoint with that of the current command.

    Raises:
        CheckpointError: They differ; the error names the first key that does (StoreMismatchError: a
            key of the store).
    """
    current = json.loads(json.dumps(current))
    for key in sorted(current.keys() | saved.keys()):
        difference = _difference(saved.get(key), current.get(key), key)
        if difference is None:
            continue
        key_path, old, new = difference
        error = StoreMismatchError if key in STORE_KEYS else CheckpointError
        raise error(
            f"{run_dir} holds another run: it was trained with {key_path} = {_short(old)}, "
            f"now it is {_short(new)}; resume with the same or choose another --out"
        )


class Checkpoints:
    """The last and the best checkpoint of one run.

    Args:
        run_dir: The folder of the run.
        identity: JSON-able. The values that a resume must share, under the keys store, teachers,
            sampling, student, …
    """

    def __init__(self, run_dir: Path, identity: Mapping[str, Any]) -> None:
        self.folder = run_dir / "checkpoints"
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    def start(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        average: WeightAverage | None = None,
        resume: Resume,
        max_unreadable: int,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> TrainState:
        """Return a new state, or restore the arguments from last.pt and return its state.

        With `resume` and no checkpoint (killed before the first one) the run starts from the
        beginning. If the number of processes has changed, new random states are drawn for dropout.

        Args:
            model: Its weights are restored.
            optimizer: Its state is restored.
            average: The moving average, which is restored.
            resume: See `Resume`.
            max_unreadable: Number of unreadable videos that the state allows.
            ranks: The processes that train together.

        Raises:
            UsageError: There is a checkpoint and `resume` is off.
            CheckpointError: The checkpoint is damaged or of another run (StoreMismatchError: of
                another store).
        """
        path = self.folder / "last.pt"
        if not path.exists():
            return TrainState(max_unreadable=max_unreadable)
        if not resume:
            raise UsageError(
                f"{self.folder.parent} already holds a run (checkpoints/last.pt); add --resume to continue it"
            )
        saved = _load(path)
        check_identity(self.folder.parent, _identity_of(saved), self.identity)
        try:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            if average is not None:
                average.load_state_dict(saved["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} does not fit the model: {first_line(error)}") from error
        state = TrainState.from_dict(saved["state"])
        state.max_unreadable = max_unreadable
        if len(saved["rng"]) == ranks.world:
            states = saved["rng"][ranks.rank]
            torch.set_rng_state(states["cpu"])
            if states["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"])
        else:
            torch.manual_seed(torch.initial_seed() + state.step * ranks.world)
        return state

    def save(
        self,
        which: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
        rng: Sequence[dict[str, Any]],
        *,
        average: WeightAverage | None = None,
    ) -> Path:
        """Write the `last` or `best` checkpoint and return its path.

        Args:
            which: "last" or "best".
            model: The model; its weights are saved.
            optimizer: The optimizer; its state is saved.
            state: The counters.
            rng: The `random_states` of each rank.
            average: The moving average, if the run has one.

        Raises:
            CheckpointError: The file cannot be written; the previous checkpoint stays intact.
        """
        path = self.folder / f"{which}.pt"
        buffer = io.BytesIO()
        content = {
            "format_version": FORMAT_VERSION,
            "identity": json.dumps(self.identity),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "state": state.to_dict(),
            "rng": list(rng),
        }
        if average is not None:
            content["ema"] = average.state_dict()
        torch.save(content, buffer)
        add_comment(buffer)
        seal(buffer)
        write_whole(path, buffer.getbuffer(), CheckpointError)
        return path


def random_states() -> dict[str, Any]:
    """Return the states of torch's random generators in this process, on the CPU and on its GPU."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def load_weights(
    run_dir: Path, which: str, model: nn.Module, *, weights: Weights = "trained"
) -> None:
    """Load the weights of the `last` or `best` checkpoint, or their average, into `model`.

    Raises:
        CheckpointError: The checkpoint is damaged, has no average, or does not fit the model.
    """
    path = run_dir / "checkpoints" / f"{which}.pt"
    saved = _load(path)
    key = "ema" if weights == "ema" else "model"
    if key not in saved:
        raise CheckpointError(f"{path} holds no moving average: it was trained without --ema")
    try:
        model.load_state_dict(saved[key])
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model: {first_line(error)}") from error


def _load(path: Path) -> dict[str, Any]:
    sealed = check_seal(path, CheckpointError)
    try:
        # torch.load compares no checksums.
        if not sealed:
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"the CRC-32 of {damaged} is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    # torch and zipfile raise errors of many types for a damaged file.
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {first_line(error)}"
        ) from error
    if not sealed:
        log.warning(
            "%s: written by distinit 0.1, without a digest: only the CRC-32 of its tensors was compared",
            path,
        )
    if not isinstance(saved, dict) or saved.get("format_version") != FORMAT_VERSION:
        version = saved.get("format_version") if isinstance(saved, dict) else None
        raise CheckpointError(
            f"{path} has checkpoint format {version}, this version of distinit reads {FORMAT_VERSION}"
        )
    wrong = [key for key, kind in _KEY_TYPES.items() if not isinstance(saved.get(key), kind)]
    if wrong:
        raise CheckpointError(f"{path} is not a checkpoint of distinit: it has no {wrong[0]!r}")
    return saved


def _identity_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a checkpoint, with its keys under their current names."""
    return current_keys(json.loads(saved["identity"]))


def _difference(saved: Any, current: Any, key_path: str) -> tuple[str, Any, Any] | None:
    """Return the alphabetically first key at which two JSON values differ, and both values."""
    if saved == current:
        return None
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(saved.keys() | current.keys()):
            difference = _difference(saved.get(key), current.get(key), f"{key_path}.{key}")
            if difference is not None:
                return difference
    return key_path, saved, current


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "…"
