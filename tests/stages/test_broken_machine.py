"""Faults of this package or of the machine are never recorded as faults of a video.

A module that Python loads at its start puts the faults into the decoding processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import DecoderError, DistInitError, SameFailure
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.prepared.prepare_options import PrepareConfig
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.pool import decode_pool
from distinit.pipeline.video.pool.process import ForkServerProcess
from distinit.stages.extract_targets import extract_targets
from distinit.stages.prepare import prepare
from distinit.tests.thorough import is_thorough

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
BREAK = """
import sys
if any("pipeline.video.pool.fork_server" in arg for arg in sys.orig_argv):
    import av
    opened, real = [], av.open
    def failing(file, *args, **kwargs):
        opened.append(str(file))
        if {condition}:
            raise {error}
        return real(file, *args, **kwargs)
    av.open = failing
"""


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(4):
        shades = np.random.default_rng(number).integers(0, 255, (12, 6, 8, 3), np.uint8)
        write_video(folder / f"v{number}.mp4", shades.repeat(8, 1).repeat(8, 2), gop=6)
    return folder


def break_decoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, condition: str, error: str
) -> None:
    """Let `av.open` raise `error` in the decoding processes where `condition` is true."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        BREAK.format(condition=condition, error=error)
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(decode_pool, "ForkServerProcess", ForkServerProcess)


def extract(videos: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Extract every 4th frame of `videos` with a teacher of 4 classes."""
    options.setdefault("teachers", [teacher()])
    return extract_targets(ExtractConfig(sources=[str(videos)], out=out, **options), QUIET)


def teacher(**options: str) -> TeacherSpec:
    return TeacherSpec(
        name="random_teachers:teacher",
        options={"name": "t", "k": "4", "input_size": "32", **options},
    )


@pytest.mark.usefixtures("random_teachers")
@pytest.mark.parametrize(
    ("condition", "error", "workers", "resumed"),
    [
        # A process that cannot begin.
        ("True", "TypeError('open() got an unexpected keyword argument')", None, False),
        ("True", "TypeError('open() got an unexpected keyword argument')", 1, False),
        # A library that fails during the work.
        ("len(opened) > 2", "AttributeError('moved')", None, True),
        ("'v1' in opened[-1]", "ImportError('libx264.so')", None, False),
        ("'v1' in opened[-1]", "OSError(24, 'Too many open files')", None, False),
    ],
)
def test_a_fault_of_the_machine_stops_the_run_and_nothing_is_recorded(
    condition: str,
    error: str,
    workers: int | None,
    resumed: bool,
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "t.zarr"
    with monkeypatch.context() as patch:
        break_decoders(tmp_path, patch, condition, error)
        with pytest.raises(DecoderError):
            extract(videos, out, workers=workers)
        if workers is None:
            with pytest.raises(DecoderError):
                prepare(PrepareConfig(sources=[str(videos)], out=tmp_path / "copies"), QUIET)
    assert not list(TargetStore.open(out).index.reason)
    # If nothing is recorded, the run resumes from the same state after every fault.
    if not (resumed or is_thorough()):
        return
    result = extract(videos, out)
    assert (result["complete"], result["ok"], result["failed"]) == (True, 4, 0)
    copies = prepare(PrepareConfig(sources=[str(videos)], out=tmp_path / "copies"), QUIET)
    assert (copies["complete"], copies["ok"], copies["failed"]) == (True, 4, 0)


@pytest.mark.usefixtures("random_teachers")
def test_an_unexpected_exception_for_one_video_is_an_internal_error(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "t.zarr"
    with monkeypatch.context() as patch:
        break_decoders(tmp_path, patch, "'v1' in opened[-1]", "KeyError('surprise')")
        result = extract(videos, out)
    assert (result["complete"], result["ok"], result["failed"]) == (False, 3, 1)
    (reason,) = result["failures"]
    assert reason.startswith("internal error: KeyError")
    assert any("Traceback" in record.getMessage() for record in caplog.records)
    result = extract(videos, out, retry_failed=True)
    assert (result["complete"], result["ok"]) == (True, 4)


@pytest.mark.usefixtures("random_teachers")
def test_videos_that_all_fail_for_one_reason_are_recorded_only_on_request(
    videos: Path, tmp_path: Path
) -> None:
    for number in range(4):
        (videos / f"v{number}.mp4").write_bytes(b"no video" * (9 + number))
    out = tmp_path / "t.zarr"
    with pytest.raises(DistInitError) as stopped:
        extract(videos, out)
    assert "--max-failures" in str(stopped.value)
    assert TargetStore.open(out).n_videos == 0
    result = extract(videos, out, max_failures=0)
    assert (result["complete"], result["ok"], result["failed"]) == (False, 0, 4)
    with pytest.raises(DistInitError):
        prepare(PrepareConfig(sources=[str(videos)], out=tmp_path / "copies"), QUIET)


@pytest.mark.usefixtures("random_teachers")
def test_a_teacher_without_finite_outputs_stops_the_run(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.zarr"
    with pytest.raises(DistInitError):
        # Its outputs are NaN for every image.
        extract(videos, out, teachers=[teacher(broken="-100")])
    assert TargetStore.open(out).n_rows == 0


@pytest.mark.parametrize(
    "reason",
    [
        "{path}: no such thing",
        "cannot open {name} ({n} bytes)",
        "[h264 @ 0x55d1ab4{n}] no frame",
        'what is "{name}"?',
    ],
)
def test_reasons_that_differ_in_names_numbers_and_addresses_are_equal(reason: str) -> None:
    watch = SameFailure(3)
    paths = [f"/some where/a b{n}.mp4" for n in range(3)]
    reasons = [reason.format(path=path, name=Path(path).name, n=n) for n, path in enumerate(paths)]
    for n in (0, 1):
        watch.add(n, reasons[n], paths[n])
    with pytest.raises(DistInitError):
        watch.add(2, reasons[2], paths[2])
    watch = SameFailure(3)
    watch.add(0, "one reason", "a.mp4")
    watch.add(1, "another", "b.mp4")
    assert not watch.watching
