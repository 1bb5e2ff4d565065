"""Every flipped bit of a checkpoint, model, predictions file, copy or flow file is detected."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distinit.pipeline.common.errors import CheckpointError, DistInitError, VideoError, WeightsError
from distinit.pipeline.common.hdf5 import Hdf5Writer
from distinit.pipeline.common.sealed import BLANK, KEY, check_seal, seal
from distinit.pipeline.common.weights import load_weights as load_weights_file
from distinit.pipeline.evaluation import predictions
from distinit.pipeline.evaluation.predictions import (
    Predictions,
    PredictionsError,
    metrics_from_file,
)
from distinit.pipeline.prepared import flow_files as flowfile
from distinit.pipeline.prepared import frame_map as frame_map
from distinit.pipeline.prepared.copies import read_copy
from distinit.pipeline.prepared.flow_files import check_flow, read_flow
from distinit.pipeline.prepared.frame_map import check_copy, read_map
from distinit.pipeline.prepared.make_copy import make_copy, make_flow
from distinit.pipeline.prepared.prepare_options import CopyOptions, FlowOptions
from distinit.pipeline.reporting.figures.filters import _stem
from distinit.pipeline.students.student import build_student
from distinit.pipeline.students.student_files import (
    load_backbone,
    load_student,
    read_meta,
    save_start,
    save_student,
)
from distinit.pipeline.students.student_options import STEM, StudentOptions
from distinit.pipeline.training.checkpoint import (
    Checkpoints,
    load_weights,
    random_states,
    read_identity,
)
from distinit.pipeline.training.train_state import TrainState
from distinit.pipeline.video.encode import write_video
from distinit.tests.flips import Flip, flips

OPTIONS = StudentOptions(width=0.02)


def clear_cached_maps() -> None:
    """Clear the cache of maps, whose key has the time: tests change files within one clock tick."""
    for module in (frame_map, flowfile):
        module._maps._tables.clear()


def make_checkpoint(root: Path) -> Path:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = TrainState(step=3)
    return Checkpoints(root / "run", {"store": "a"}).save(
        "last", model, optimizer, state, [random_states()]
    )


def make_student(root: Path) -> Path:
    save_student(
        root / "student.safetensors",
        build_student(OPTIONS, {"t": 3}),
        {"classes": {"t": ["a", "b", "c"]}},
    )
    return root / "student.safetensors"


def make_start(root: Path) -> Path:
    save_start(root / "start.safetensors", build_student(OPTIONS, {}))
    return root / "start.safetensors"


def make_predictions(root: Path) -> Path:
    scores = Predictions.empty(
        ["a", "b"], ["1.mp4", "2.mp4"], [0, 1], 2, protocol={"clips": 2}, identity={}, features=3
    )
    for video in (0, 1):
        scores.set_scores(
            video, np.full((2, 2), 0.5, np.float32), np.arange(2), 9, features=np.ones((2, 3))
        )
    scores.write(root / "predictions.h5")
    return root / "predictions.h5"


def make_video(root: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (1, 40, 56, 3), np.uint8)
    write_video(
        root / "v.mp4", np.concatenate([np.roll(noise, 2 * t, axis=2) for t in range(7)]), gop=4
    )
    return root / "v.mp4"


def make_a_copy(root: Path) -> Path:
    options = CopyOptions(size=(32, 32), gop=3)
    make_copy(str(make_video(root)), str(root / "part"), str(root / "copy.mp4"), options)
    return root / "copy.mp4"


def make_a_flow(root: Path) -> Path:
    pytest.importorskip("cv2")
    make_flow(
        str(make_video(root)), str(root / "part"), str(root / "flow.h5"), FlowOptions(size=(16, 24))
    )
    return root / "flow.h5"


def read_checkpoint(path: Path) -> object:
    model = nn.Linear(3, 2)
    load_weights(path.parent.parent, "last", model)
    return model.weight.tolist()


def resume(path: Path) -> object:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = path.parent.parent
    return (
        Checkpoints(run, read_identity(run) or {})
        .start(model, optimizer, resume=True, max_unreadable=1)
        .step
    )


def read_copy_frames(path: Path) -> object:
    return read_copy(str(path), np.arange(7), None).images.tobytes()


def read_flow_frames(path: Path) -> object:
    return read_flow(str(path), np.arange(7))[0].tobytes()


def refusal(read: Callable[[], object], error: type[DistInitError]) -> str | None:
    """Return the message of an error of this type, None without an error."""
    try:
        read()
    except error as refused:
        return str(refused)
    return None


Make = Callable[[Path], Path]
# Functions that make and read a file, and the error of a damaged one.
READERS: dict[str, tuple[Make, Callable[[Path], object], type[DistInitError]]] = {
    "checkpoint's weights": (make_checkpoint, read_checkpoint, CheckpointError),
    "checkpoint, resumed": (make_checkpoint, resume, CheckpointError),
    "student": (make_student, load_student, CheckpointError),
    "student's backbone": (
        make_student,
        lambda p: load_backbone(build_student(OPTIONS, {}), p),
        CheckpointError,
    ),
    "student's header": (make_student, read_meta, CheckpointError),
    "student's stem": (make_student, _stem, CheckpointError),
    "student as weights": (make_student, load_weights_file, WeightsError),
    "start": (make_start, _stem, CheckpointError),
    "predictions": (make_predictions, metrics_from_file, PredictionsError),
    "copy": (make_a_copy, lambda p: check_copy(str(p)), VideoError),
    "flow": (make_a_flow, lambda p: check_flow(str(p)), VideoError),
}


def all_flips(path: Path, folder: Path, count: int) -> Iterator[Flip]:
    target = (
        folder / path.name if path.suffix != ".pt" else folder / "run" / "checkpoints" / path.name
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    for flip in flips(path, target, per_kind=count, seed=0):
        clear_cached_maps()
        yield flip


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_every_flipped_bit_is_refused(kind: str, tmp_path: Path) -> None:
    make, read, error = READERS[kind]
    path = make(tmp_path)
    read(path)
    (tmp_path / "flipped").mkdir()
    unmarked = 0
    for flip in all_flips(path, tmp_path / "flipped", count=60):
        message = refusal(lambda path=flip.path: read(path), error)
        if message is None:
            # Only a flip in the name of the digest, a key in JSON, is not detected. It changes
            # nothing else.
            assert flip.path.suffix == ".safetensors", flip
            assert not check_seal(flip.path, error), flip
            unmarked += 1
        else:
            assert kind in ("copy", "flow") or flip.path.name in message, flip
    assert unmarked <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "read"),
    [(make_a_copy, read_copy_frames), (make_a_flow, read_flow_frames)],
    ids=["copy", "flow"],
)
def test_a_reader_of_clips_returns_the_written_frames_or_none(
    make: Make, read, tmp_path: Path
) -> None:
    """A loader reads a small part of a file, and compares the checksums of that part."""
    path = make(tmp_path)
    expected = read(path)
    refused = 0
    (tmp_path / "flipped").mkdir()
    for flip in all_flips(path, tmp_path / "flipped", count=300):
        try:
            frames = read(flip.path)
        except VideoError:
            refused += 1
        else:
            assert frames == expected, flip
    assert refused > 100


def without_digest(path: Path) -> bytes:
    """Return the bytes of a checkpoint or student as version 0.1 wrote them, others unchanged."""
    data = path.read_bytes()
    if path.suffix == ".pt":
        end = data.rindex(b"PK\5\6")
        return data[: end + 20] + struct.pack("<H", 0)
    if path.suffix == ".h5":
        return data
    with io.BytesIO(data) as file:
        length = struct.unpack("<Q", file.read(8))[0]
        metadata = json.loads(file.read(length))["__metadata__"]
    del metadata[KEY]
    other = path.with_name("other")
    save_file(load_file(path), other, metadata)
    return other.read_bytes()


@pytest.mark.parametrize("kind", ["checkpoint's weights", "student", "predictions"])
def test_files_of_version_0_1_are_read_with_a_warning(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, read, error = READERS[kind]
    if kind == "predictions":
        monkeypatch.setattr(predictions, "Hdf5Writer", lambda path, sealed: Hdf5Writer(path))
    path = make(tmp_path)
    read(path)
    path.write_bytes(without_digest(path))
    assert not check_seal(path, error)
    caplog.clear()
    read(path)
    assert [
        str(path) in record.getMessage() and "0.1" in record.getMessage()
        for record in caplog.records
    ] == [True]


def test_tensors_of_a_checkpoint_of_version_0_1_have_the_checksums_of_the_archive(
    tmp_path: Path,
) -> None:
    path = make_checkpoint(tmp_path)
    data = bytearray(without_digest(path))
    weight = np.float32(
        torch.load(path, weights_only=True)["model"]["weight"][0, 0].item()
    ).tobytes()
    data[data.index(weight)] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        read_checkpoint(path)


def test_other_readers_ignore_the_digest(tmp_path: Path) -> None:
    student, checkpoint, scores = (
        make_student(tmp_path),
        make_checkpoint(tmp_path),
        make_predictions(tmp_path),
    )
    assert STEM in load_file(student)
    assert torch.load(checkpoint, weights_only=True)["state"]["step"] == 3
    with h5py.File(scores) as file:
        assert file["labels"][:].tolist() == [0, 1]


def test_a_value_of_the_metadata_is_not_taken_for_the_digest(tmp_path: Path) -> None:
    text = json.dumps({KEY: BLANK})
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2)}, path, {"about": text, KEY: BLANK, "z": text})
    with open(path, "r+b") as file:
        seal(file)
    assert check_seal(path, CheckpointError)
    assert (
        json.loads(path.read_bytes()[8:].split(b"}}")[0].decode() + "}}")["__metadata__"]["about"]
        == text
    )


def test_a_copy_of_version_0_1_has_the_checksums_of_its_packets(tmp_path: Path) -> None:
    path = make_a_copy(tmp_path)
    frames = read_map(str(path))
    packed = frames.pack()
    data = path.read_bytes()
    frames.__dict__["sha256"] = None
    path.write_bytes(data[: -len(packed)] + frames.pack())
    clear_cached_maps()
    assert check_copy(str(path)) is False
    data = bytearray(path.read_bytes())
    data[int(frames.offset[2]) + 5] ^= 8
    path.write_bytes(data)
    clear_cached_maps()
    with pytest.raises(VideoError):
        check_copy(str(path))
