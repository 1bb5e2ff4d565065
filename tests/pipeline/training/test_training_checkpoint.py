"""Checkpoints on a full disk, and files that are not checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from distinit.pipeline.common.errors import CheckpointError, UsageError
from distinit.pipeline.common.run_dir import claim_run_dir
from distinit.pipeline.training.checkpoint import (
    Checkpoints,
    load_weights,
    random_states,
    read_identity,
)
from distinit.pipeline.training.train_state import TrainState
from distinit.tests import warm

# A limit of the file size simulates a full disk: write() fails in the middle of the file.
FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from distinit.pipeline.common.errors import CheckpointError
from distinit.pipeline.common.run_dir import claim_run_dir
from distinit.pipeline.training.checkpoint import Checkpoints
from distinit.pipeline.training.train_state import TrainState

model = torch.nn.Linear(500, 500)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    Checkpoints(Path(sys.argv[1]), {"store": "a"}).save("last", model, optimizer, TrainState(step=9), [])
except CheckpointError as error:
    print(error)
"""


def start(run: Path, *, resume: bool = True) -> TrainState:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Checkpoints(run, {"store": "a"}).start(model, optimizer, resume=resume, max_unreadable=5)


def save(run: Path, step: int) -> nn.Module:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainState(step=step, unreadable={"a\udcff": "x"})
    Checkpoints(run, {"store": "a"}).save("last", model, optimizer, state, [random_states()])
    return model


@pytest.mark.slow
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    save(tmp_path, 4)
    process = warm.run(tmp_path, code=FULL_DISK)
    assert process.returncode == 0, process.stderr
    assert "last.pt: File too large; the existing file is unchanged" in process.stdout
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.pt"]
    assert start(tmp_path).step == 4
    assert start(tmp_path).unreadable == {"a\udcff": "x"}


def test_the_unreadable_videos_of_version_0_1_have_another_key():
    state = TrainState.from_dict({"step": 3, "broken": {"a": "x"}, "later": 1})
    assert (state.step, state.unreadable) == (3, {"a": "x"})


def test_weights_come_back_and_another_model_is_refused(tmp_path):
    model = save(tmp_path, 1)
    other = nn.Linear(3, 2)
    load_weights(tmp_path, "last", other)
    assert torch.equal(other.weight, model.weight)
    assert read_identity(tmp_path) == {"store": "a"}
    with pytest.raises(CheckpointError, match=r"last\.pt does not fit the model"):
        load_weights(tmp_path, "last", nn.Linear(4, 2))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x02cos\nsystem\n."])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    save(tmp_path, 1)
    path = tmp_path / "checkpoints" / "last.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pt is not a readable checkpoint: [^\n]+$"):
        start(tmp_path)


def test_a_folder_with_a_run_is_not_taken_without_resume(tmp_path):
    claim_run_dir(tmp_path / "new" / "run", resume=False)
    # The run was killed before its first checkpoint.
    assert start(tmp_path / "new" / "run").step == 0
    save(tmp_path, 1)
    with pytest.raises(
        UsageError, match=rf"{tmp_path} already holds a run \(checkpoints/last\.pt\)"
    ):
        claim_run_dir(tmp_path, resume=False)
    claim_run_dir(tmp_path, resume=True)
    claim_run_dir(tmp_path, resume="auto")
    claim_run_dir(tmp_path / "another", resume="auto")
    with pytest.raises(
        UsageError, match=r"--resume: .*another holds no run; --resume auto begins one"
    ):
        claim_run_dir(tmp_path / "another", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--out .*file"):
        claim_run_dir(tmp_path / "file", resume=False)
