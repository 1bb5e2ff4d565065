"""Make small, seekable copies of videos, or files of their optical flow.

Each has a map to its source's frames.
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
_AHEAD = 256  # copies, finished or read, that may wait for one long video listed before them


def prepare(config: PrepareConfig, console: Console) -> dict[str, Any]:
    """Copy what is not copied yet; return what the folder holds of these sources afterwards.

    Running it again continues where it stopped; a source that has changed is copied again.

    Raises:
        SourceError: A source names nothing.
        UsageError: `out` holds copies made with other options.
    """
    check_local(config.out)
    if config.flow:
        require_opencv("prepare --flow")
    videos = _list(config, console)
    with _claim(config) as out:
        _mark(out, config, videos)
        write_config(out / CONFIG, COMMAND, config.model_copy(update={"out": out.absolute()}))
        status = StatusFile(out / "status.csv")
        began = time.monotonic()
        todo, tally = _plan(config, videos, out, status, console)
        if len(todo) < len(videos) and todo:
            console.info(f"{len(videos) - len(todo)} of {len(videos)} are done already")
        status.begin()
        _copy(config, videos, todo, out, status, tally, console)
        status.finish(_keys(videos))
        return summary(out, len(videos), len(todo), time.monotonic() - began, tally)


def _list(config: PrepareConfig, console: Console) -> VideoList:
    """Return the listed sources, without what is in `out` itself."""
    videos = list_videos(config.sources)
    own = os.path.join(os.path.realpath(config.out), "")
    kept = [
        i for i in range(len(videos)) if not os.path.realpath(videos.absolute(i)).startswith(own)
    ]
    if len(kept) < len(videos):
        console.info(
            f"{len(videos) - len(kept)} videos are located in {config.out} itself and are left out"
        )
        videos = VideoList(
            videos.corpora, videos.corpus[kept], [videos.paths[i] for i in kept], videos.ignored
        )
    console.info(videos.describe())
    if not len(videos):
        raise UsageError(
            f"--out {config.out} holds all of the sources: choose a folder outside of them"
        )
    return videos


@contextmanager
def _claim(config: PrepareConfig) -> Iterator[Path]:
    """Lock the output folder against a second run, and remove the leftovers of a killed one."""
    out = config.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file, expected a folder")
    if out.is_dir() and read_marker(out) is None and not _only_claimed(out):
        raise UsageError(f"--out {out}: holds other files; choose a new or empty folder")
    (out / PARTIAL).mkdir(parents=True, exist_ok=True)
    busy = UsageError(f"--out {out}: another run of distinit prepare is at work there")
    with locked(out / PARTIAL / LOCK, busy, make=True):
        _sweep(out)
        yield out
        _sweep(out)


def _only_claimed(out: Path) -> bool:
    """Check whether a folder without a marker is empty, but for leftovers of a killed run."""
    inside = [path.name for path in (out / PARTIAL).iterdir()] if (out / PARTIAL).is_dir() else []
    return {path.name for path in out.iterdir()} <= {PARTIAL} and set(inside) <= {LOCK, MARKER}


def _sweep(out: Path) -> None:
    sweep_run(out)
    for left in (out / PARTIAL).iterdir():
        if left.name != LOCK:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _mark(out: Path, config: PrepareConfig, videos: VideoList) -> None:
    """Write what the copies are like and which corpora there are; refuse to mix."""
    options = _options(config)
    marker: dict[str, Any] = read_marker(out) or {"options": options, "corpora": {}}
    if kind_of(marker["options"]) != kind_of(options):
        held, asked = ("copies", "--flow") if config.flow else ("optical flow", "copies")
        raise UsageError(f"--out {out}: holds {held}, asked for {asked}; choose another folder")
    for key, value in marker["options"].items():
        if options.get(key) != value:
            differ = f"--out {out}: its copies have {key}={value}, asked for {key}={options.get(key)}; choose another "
            if not config.replace:
                raise UsageError(f"{differ}folder, or --replace to make them again")
            if left := marker["corpora"].keys() - {corpus.name for corpus in videos.corpora}:
                raise UsageError(
                    f"{differ}folder, or name {', '.join(sorted(left))} as well: --replace is for all"
                )
    corpora = dict(marker["corpora"])
    for corpus in videos.corpora:
        before = unescape_path(corpora.get(corpus.name, {}).get("root", escape_path(corpus.root)))
        if before != corpus.root and os.path.isdir(before) and not config.replace:
            raise UsageError(
                f"--out {out}: corpus {corpus.name!r} there is {before}, not {corpus.root}; "
                f"give this one another name, as in new={corpus.root}"
            )
        corpora[corpus.name] = {"root": escape_path(corpus.root)}
    text = json.dumps(
        {"format": FORMAT, "version": 1, "options": options, "corpora": corpora}, indent=1
    )
    # In the folder that the next run sweeps: without its marker the folder may hold nothing else.
    with replacing(out / MARKER, out / PARTIAL / MARKER) as part:
        part.write_text(text + "\n", encoding="utf-8")


def _options(config: PrepareConfig) -> dict[str, Any]:
    """Return what makes two copies of one source differ."""
    if config.flow:
        return _flow_options(config).model_dump(mode="json")
    return config.copies.model_dump(mode="json", exclude={"quality_frames"})


def _flow_options(config: PrepareConfig) -> FlowOptions:
    if config.copies.size is None:
        raise UsageError("--flow with --short-side: flow is that of clips of one size, --size HxW")
    return FlowOptions(size=config.copies.size, bound=config.flow_bound)


def _keys(videos: VideoList) -> Iterator[tuple[str, str]]:
    for i, path in enumerate(videos.paths):
        yield escape_path(videos.corpora[int(videos.corpus[i])].name), escape_path(path)


def _target(config: PrepareConfig, out: Path, videos: VideoList, i: int) -> str:
    corpus = videos.corpora[int(videos.corpus[i])].name
    return os.path.join(
        os.path.abspath(out), corpus, copy_name(videos.paths[i], "flow" if config.flow else "copy")
    )


def _plan(
    config: PrepareConfig, videos: VideoList, out: Path, status: StatusFile, console: Console
) -> tuple[list[int], Tally]:
    """Return the videos to copy, and the tally of those that are done or have failed before."""
    todo, tally, options = [], Tally(), _options(config)
    unproved = 0

    def look(i: int) -> tuple[Row | None, bool]:
        return _done(_target(config, out, videos, i), videos.absolute(i), options)

    keys = _keys(videos)
    readers = ThreadPoolExecutor(cores())
    with readers, console.progress("checking existing copies", len(videos), "videos") as bar:
        for first in range(0, len(videos), _AHEAD):
            some = range(first, min(first + _AHEAD, len(videos)))
            for i, (row, proved) in zip(some, readers.map(look, some), strict=True):
                key = next(keys)
                if row is None and not config.retry_failed:
                    row = _failed_before(status.row(key), videos.absolute(i))
                if row is None:
                    todo.append(i)
                else:
                    status.set(key, row)
                    tally.add(row)
                    unproved += not proved and row["status"] == "ok"
                bar.advance()
    if unproved:
        console.info(
            f"{unproved} were made by distinit 0.1, without a digest: only checksums of frames were compared"
        )
    return todo, tally


def _done(target: str, source: str, options: dict[str, Any]) -> tuple[Row | None, bool]:
    """Return the row of a copy that is whole, and whether every byte of it has a checksum.

    It was made with these options, of the source as it is now. A damaged copy whose source is gone
    is kept: its other frames can still be read.
    """
    if not os.path.exists(target):
        return None, False
    flow = target.endswith(ENDINGS["flow"])
    try:
        copy: FrameMap | FlowMap = read_flow_map(target) if flow else read_map(target)
        if not _of_source(copy, source, options):
            return None, False
        proved = check_flow(target) if flow else check_copy(target)
        return {"status": "ok", **copy_row(copy, os.stat(target).st_size)}, proved
    except (VideoError, OSError) as error:
        if os.path.lexists(source):
            return None, False  # another file, or one that was damaged since: made again
        return {
            "status": "failed",
            "reason": f"{error}, and its source is gone: it cannot be made again",
        }, False


def _of_source(copy: FrameMap | FlowMap, source: str, options: dict[str, Any]) -> bool:
    """Return whether a copy was made with these options, of the source as it is now.

    One without a source may stay.
    """
    if {**copy.options, **options} != copy.options:
        return False
    try:
        now = os.stat(source)
        return now.st_size == copy.source.size and (
            now.st_mtime_ns == copy.source.mtime_ns or digest(source) == copy.source.digest
        )
    except FileNotFoundError:
        return True  # a list still names it: the copy outlives its source
    except (VideoError, OSError):
        return False  # the attempt to copy says why


def _failed_before(row: Row | None, source: str) -> Row | None:
    """Return the row of a source that failed, by its own fault, and has not changed since."""
    if (
        row is None
        or row["status"] != "failed"
        or not row["source_bytes"]
        or NOT_WRITTEN in row["reason"]
    ):
        return None
    try:
        now = os.stat(source)
    except OSError:
        return None
    same = str(now.st_size) == str(row["source_bytes"]) and str(now.st_mtime_ns) == str(
        row["source_mtime_ns"]
    )
    return row if same else None


def _copy(
    config: PrepareConfig,
    videos: VideoList,
    todo: list[int],
    out: Path,
    status: StatusFile,
    tally: Tally,
    console: Console,
) -> None:
    workers = min(config.workers or cores(), max(1, len(todo)))
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
        processes=workers,
        views=(),
        memory_gb=config.memory_gb,
        timeout_s=config.timeout_s,
        ahead=_AHEAD,
    )
    watch = SameFailure(0 if config.retry_failed else config.max_failures)
    held: list[tuple[int, Row]] = []

    def record() -> None:
        for i, row in held:
            if row["status"] == "failed":
                _drop(_target(config, out, videos, i))
            status.add(keys[i], row)
            tally.add(row)
        held.clear()

    with pool, console.progress("flow" if config.flow else "copying", len(todo), "videos") as bar:
        for i, answer in zip(todo, pool.copies(jobs), strict=True):
            if isinstance(answer, Failed):
                for number in (
                    errno.ENOSPC,
                    errno.EDQUOT,
                    errno.EFBIG,
                ):  # not the video's fault, nor one that passes
                    if os.strerror(number).lower() in answer.reason.lower():
                        raise OSError(number, os.strerror(number), str(out))
                row: Row = {
                    "status": "failed",
                    "reason": answer.reason,
                    **_as_it_is(videos.absolute(i)),
                }
            else:
                row = {"status": "ok", **answer}
            watch.add(i, row.get("reason"), videos.absolute(i))
            held.append((i, row))
            if not watch.watching:
                record()
            bar.advance(failed=sum(tally.reasons.values()))
        if not tally.ok:
            watch.finish()
        record()


def _as_it_is(source: str) -> Row:
    try:
        now = os.stat(source)
    except (OSError, ValueError):
        return {}
    return {"source_bytes": now.st_size, "source_mtime_ns": now.st_mtime_ns}


def _drop(target: str) -> None:
    """Remove the copy of an earlier state of the source.

    A copy of something else is worse than none.
    """
    if os.path.exists(target):
        os.unlink(target)
