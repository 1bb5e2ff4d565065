"""Make small, seekable copies of videos, or files of their optical flow.

Each file has a map to the frames of its source.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..pipeline.common.config import write_config
from ..pipeline.common.console import Console
from ..pipeline.common.errors import SameFailure, UsageError, VideoError
from ..pipeline.common.files import replacing, sweep_run
from ..pipeline.common.locks import locked
from ..pipeline.common.processes import cores
from ..pipeline.common.run_dir import CONFIG
from ..pipeline.common.urls import check_local
from ..pipeline.corpus.sources import MARKER, VideoList, escape_path, list_videos, unescape_path
from ..pipeline.prepared.flow_files import FlowMap, check_flow, read_flow_map
from ..pipeline.prepared.folders import ENDINGS, FORMAT, copy_name, kind_of, read_marker
from ..pipeline.prepared.frame_map import FrameMap, check_copy, read_map
from ..pipeline.prepared.make_copy import NOT_WRITTEN, copy_row
from ..pipeline.prepared.prepare_options import FlowOptions, PrepareConfig
from ..pipeline.prepared.status import Row, StatusFile, Tally, summary
from ..pipeline.video.container import digest
from ..pipeline.video.flow import require_opencv
from ..pipeline.video.pool.decode_pool import DecodePool, Failed

COMMAND = "prepare"
PARTIAL, LOCK = ".partial", "lock"
# Finished copies that may wait for a long video that is listed before them.
_AHEAD = 256


def prepare(config: PrepareConfig, console: Console) -> dict[str, Any]:
    """Copy the sources that have no copy yet; return a summary of the copies of all sources.

    Another run continues an interrupted one. A source that has changed is copied again.

    Raises:
        SourceError: A source has no videos.
        UsageError: `out` holds copies with other options.
    """
    check_local(config.out)
    if config.flow:
        require_opencv("prepare --flow")
    videos = _list(config, console)
    with _claim(config) as out:
        _mark(out, config, videos)
        write_config(out / CONFIG, COMMAND, config.model_copy(update={"out": out.absolute()}))
        status = StatusFile(out / "status.csv")
        started = time.monotonic()
        todo, tally = _plan(config, videos, out, status, console)
        if len(todo) < len(videos) and todo:
            console.info(f"{len(videos) - len(todo)} of {len(videos)} videos are done already")
        status.begin()
        _copy_videos(config, videos, todo, out, status, tally, console)
        status.finish(_keys(videos))
        return summary(out, len(videos), len(todo), time.monotonic() - started, tally)


def _list(config: PrepareConfig, console: Console) -> VideoList:
    """List the sources, without the videos in `out` itself."""
    videos = list_videos(config.sources)
    out = os.path.join(os.path.realpath(config.out), "")
    outside = [
        i for i in range(len(videos)) if not os.path.realpath(videos.absolute(i)).startswith(out)
    ]
    if len(outside) < len(videos):
        console.info(
            f"{len(videos) - len(outside)} videos are located in {config.out} itself and are left out"
        )
        paths = [videos.paths[i] for i in outside]
        videos = VideoList(videos.corpora, videos.corpus[outside], paths, videos.ignored)
    console.info(videos.describe())
    if not len(videos):
        raise UsageError(
            f"--out {config.out} holds all of the sources: choose a folder outside of them"
        )
    return videos


@contextmanager
def _claim(config: PrepareConfig) -> Iterator[Path]:
    """Yield the locked output folder, without leftovers of a killed run."""
    out = config.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file, expected a folder")
    if out.is_dir() and read_marker(out) is None and not _only_claimed(out):
        raise UsageError(f"--out {out}: holds other files; choose a new or empty folder")
    (out / PARTIAL).mkdir(parents=True, exist_ok=True)
    busy = UsageError(f"--out {out}: another run of distinit prepare is writing it")
    with locked(out / PARTIAL / LOCK, busy, make=True):
        _sweep(out)
        yield out
        _sweep(out)


def _only_claimed(out: Path) -> bool:
    """Check whether a folder without a marker has nothing but leftovers of a killed run."""
    names = {path.name for path in out.iterdir()}
    partial = out / PARTIAL
    partial_names = {path.name for path in partial.iterdir()} if partial.is_dir() else set()
    return names <= {PARTIAL} and partial_names <= {LOCK, MARKER}


def _sweep(out: Path) -> None:
    """Remove unfinished files."""
    sweep_run(out)
    for path in (out / PARTIAL).iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _mark(out: Path, config: PrepareConfig, videos: VideoList) -> None:
    """Write the options of the copies and their corpora into the marker of the folder.

    Raises:
        UsageError: The folder has copies with other options, or other corpora of these names.
    """
    options = _options(config)
    marker: dict[str, Any] = read_marker(out) or {"options": options, "corpora": {}}
    if kind_of(marker["options"]) != kind_of(options):
        existing, requested = ("copies", "--flow") if config.flow else ("optical flow", "copies")
        raise UsageError(
            f"--out {out}: holds {existing}, but {requested} was requested; choose another folder"
        )
    for key, value in marker["options"].items():
        if options.get(key) != value:
            advice = (
                f"--out {out}: its copies have {key}={value}, requested was {key}={options.get(key)}; choose another "
                "folder"
            )
            if not config.replace:
                raise UsageError(f"{advice}, or --replace to make them again")
            if missing := marker["corpora"].keys() - {corpus.name for corpus in videos.corpora}:
                raise UsageError(
                    f"{advice}, or name {', '.join(sorted(missing))} as well: --replace is for all corpora"
                )
    corpora = dict(marker["corpora"])
    for corpus in videos.corpora:
        root = unescape_path(corpora.get(corpus.name, {}).get("root", escape_path(corpus.root)))
        if root != corpus.root and os.path.isdir(root) and not config.replace:
            raise UsageError(
                f"--out {out}: its corpus {corpus.name!r} was copied from {root}, not {corpus.root}; "
                f"give this one another name, as in new={corpus.root}"
            )
        corpora[corpus.name] = {"root": escape_path(corpus.root)}
    text = json.dumps(
        {"format": FORMAT, "version": 1, "options": options, "corpora": corpora}, indent=1
    )
    # The temporary file is in the folder that the next run sweeps, since an output folder without a
    # marker must hold nothing else.
    with replacing(out / MARKER, out / PARTIAL / MARKER) as file:
        file.write_text(text + "\n", encoding="utf-8")


def _options(config: PrepareConfig) -> dict[str, Any]:
    """Return the options that a copy depends on, as plain data."""
    if config.flow:
        return _flow_options(config).model_dump(mode="json")
    return config.copies.model_dump(mode="json", exclude={"quality_frames"})


def _flow_options(config: PrepareConfig) -> FlowOptions:
    if config.copies.size is None:
        raise UsageError("--flow with --short-side: optical flow requires a fixed size, --size HxW")
    return FlowOptions(size=config.copies.size, bound=config.flow_bound)


def _keys(videos: VideoList) -> Iterator[tuple[str, str]]:
    """Yield the key of each video in the status file: escaped corpus and path."""
    for i, path in enumerate(videos.paths):
        yield escape_path(videos.corpora[int(videos.corpus[i])].name), escape_path(path)


def _target(config: PrepareConfig, out: Path, videos: VideoList, i: int) -> str:
    """Return the path of the copy of a video."""
    corpus = videos.corpora[int(videos.corpus[i])].name
    return os.path.join(
        os.path.abspath(out), corpus, copy_name(videos.paths[i], "flow" if config.flow else "copy")
    )


def _plan(
    config: PrepareConfig, videos: VideoList, out: Path, status: StatusFile, console: Console
) -> tuple[list[int], Tally]:
    """Return the videos to copy, and the tally of the others: done, or failed before."""
    todo, tally, options = [], Tally(), _options(config)
    num_unproved = 0

    def check(i: int) -> tuple[Row | None, bool]:
        return _existing_row(_target(config, out, videos, i), videos.absolute(i), options)

    keys = _keys(videos)
    readers = ThreadPoolExecutor(cores())
    with readers, console.progress("checking existing copies", len(videos), "videos") as bar:
        for first in range(0, len(videos), _AHEAD):
            block = range(first, min(first + _AHEAD, len(videos)))
            for i, (row, proved) in zip(block, readers.map(check, block), strict=True):
                key = next(keys)
                if row is None and not config.retry_failed:
                    row = _failed_before(status.row(key), videos.absolute(i))
                if row is None:
                    todo.append(i)
                else:
                    status.set(key, row)
                    tally.add(row)
                    num_unproved += not proved and row["status"] == "ok"
                bar.advance()
    if num_unproved:
        console.info(
            f"{num_unproved} copies of distinit 0.1 have no digest: only checksums of their frames were compared"
        )
    return todo, tally


def _existing_row(target: str, source: str, options: dict[str, Any]) -> tuple[Row | None, bool]:
    """Return the row of an existing copy, and whether a checksum covers each of its bytes.

    The row is None if the copy is missing or damaged, or has other options or another state of the
    source: it has to be made again. A damaged copy whose source no longer exists is kept, since its
    other frames can still be read; its row has the status "failed".
    """
    if not os.path.exists(target):
        return None, False
    flow = target.endswith(ENDINGS["flow"])
    try:
        copy: FrameMap | FlowMap = read_flow_map(target) if flow else read_map(target)
        if not _matches(copy, source, options):
            return None, False
        proved = check_flow(target) if flow else check_copy(target)
        return {"status": "ok", **copy_row(copy, os.stat(target).st_size)}, proved
    except (VideoError, OSError) as error:
        if os.path.lexists(source):
            # The target is another file, or a copy that is damaged.
            return None, False
        reason = f"{error}, and its source is missing: it cannot be made again"
        return {"status": "failed", "reason": reason}, False


def _matches(copy: FrameMap | FlowMap, source: str, options: dict[str, Any]) -> bool:
    """Check whether a copy has these options and the current state of its source.

    A copy whose source no longer exists matches.
    """
    if {**copy.options, **options} != copy.options:
        return False
    try:
        stat = os.stat(source)
        return stat.st_size == copy.source.size and (
            stat.st_mtime_ns == copy.source.mtime_ns or digest(source) == copy.source.digest
        )
    # The source still is in a list, but no longer exists.
    except FileNotFoundError:
        return True
    # The attempt to copy will report the error.
    except (VideoError, OSError):
        return False


def _failed_before(row: Row | None, source: str) -> Row | None:
    """Return the row of a source that could not be copied and has not changed since, else None."""
    if (
        row is None
        or row["status"] != "failed"
        or not row["source_bytes"]
        or NOT_WRITTEN in row["reason"]
    ):
        return None
    try:
        stat = os.stat(source)
    except OSError:
        return None
    is_unchanged = str(stat.st_size) == str(row["source_bytes"]) and str(stat.st_mtime_ns) == str(
        row["source_mtime_ns"]
    )
    return row if is_unchanged else None


def _copy_videos(
    config: PrepareConfig,
    videos: VideoList,
    todo: list[int],
    out: Path,
    status: StatusFile,
    tally: Tally,
    console: Console,
) -> None:
    """Copy the videos `todo`, and record the row of each.

    Raises:
        OSError: The disk is full.
        DistInitError: The same failure repeats, see `SameFailure`.
    """
    parts = os.path.join(os.path.abspath(out), PARTIAL)
    options = _flow_options(config) if config.flow else config.copies
    jobs = (
        {
            "source": videos.absolute(i),
            "part": os.path.join(parts, f"{os.getpid()}-{i}"),
            "target": _target(config, out, videos, i),
            "flow": config.flow,
            "options": options.model_dump(mode="json"),
        }
        for i in todo
    )
    keys = list(_keys(videos)) if todo else []
    pool = DecodePool(
        processes=min(config.workers or cores(), max(1, len(todo))),
        views=(),
        memory_gb=config.memory_gb,
        timeout_s=config.timeout_s,
        ahead=_AHEAD,
    )
    watch = SameFailure(0 if config.retry_failed else config.max_failures)
    # Rows are recorded once it is known that the failures are not all the same.
    pending: list[tuple[int, Row]] = []

    def record() -> None:
        for i, row in pending:
            if row["status"] == "failed":
                _drop(_target(config, out, videos, i))
            status.add(keys[i], row)
            tally.add(row)
        pending.clear()

    with pool, console.progress("flow" if config.flow else "copying", len(todo), "videos") as bar:
        for i, answer in zip(todo, pool.copies(jobs), strict=True):
            source = videos.absolute(i)
            row: Row = {"status": "ok"}
            if isinstance(answer, Failed):
                _raise_disk_error(answer.reason, out)
                row = {"status": "failed", "reason": answer.reason, **_source_state(source)}
            else:
                row |= answer
            watch.add(i, row.get("reason"), source)
            pending.append((i, row))
            if not watch.watching:
                record()
            bar.advance(failed=sum(tally.reasons.values()))
        if not tally.ok:
            watch.finish()
        record()


def _raise_disk_error(reason: str, out: Path) -> None:
    """Raise OSError if the reason of a failure is a full disk, a quota or a limit of file sizes.

    Such a failure is not the fault of the video, and would repeat for all others.
    """
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if os.strerror(number).lower() in reason.lower():
            raise OSError(number, os.strerror(number), str(out))


def _source_state(source: str) -> Row:
    """Return size and time of a source for its row, {} if it does not exist."""
    try:
        stat = os.stat(source)
    except (OSError, ValueError):
        return {}
    return {"source_bytes": stat.st_size, "source_mtime_ns": stat.st_mtime_ns}


def _drop(target: str) -> None:
    """Remove the copy of an earlier state of a source that cannot be copied again."""
    if os.path.exists(target):
        os.unlink(target)
