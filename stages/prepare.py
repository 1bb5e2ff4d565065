"""Make small, seekable copies of videos, each with a map to its source's frames."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from ..pipeline.config import Options
from ..pipeline.corpus.sources import VideoList, escape_path, list_videos, unescape_path
from ..pipeline.errors import UsageError, VideoError
from ..pipeline.video.container import digest
from ..pipeline.video.copymap import read_map
from ..pipeline.video.folders import FORMAT, MARKER, copy_name, read_marker
from ..pipeline.video.pool import DecodePool, Failed
from ..pipeline.video.prepare import NOT_WRITTEN, CopyOptions, copy_row
from .config import write_config
from .prepare_status import Row, StatusFile
from .screen import Screen

COMMAND = "prepare"
PARTIAL = ".partial"
_AHEAD = 256  # finished copies that may wait for one long video listed before them


class PrepareConfig(Options):
    """Everything that `distinit prepare` can be told."""

    sources: list[str] = Field(min_length=1)
    out: Path
    copies: CopyOptions = CopyOptions()
    workers: int | None = Field(None, ge=1, description="processes, each with an encoder; default one a core")
    timeout_s: float = Field(120.0, gt=0)
    memory_gb: float = Field(4.0, gt=0)
    retry_failed: bool = False
    replace: bool = False


def prepare(config: PrepareConfig, screen: Screen) -> dict[str, Any]:
    """Copy what is not copied yet; returns what the folder holds of these sources afterwards.

    Running it again goes on where it was stopped; a source that has changed is copied anew. Raises
    SourceError, and UsageError where `out` holds copies made with other options.
    """
    videos = _list(config, screen)
    with _claim(config) as out:
        _mark(out, config, videos)
        write_config(out / "config.yaml", COMMAND, config.model_copy(update={"out": out.absolute()}))
        status = StatusFile(out / "status.csv")
        began = time.monotonic()
        todo, tally = _plan(config, videos, out, status, screen)
        if len(todo) < len(videos) and todo:
            screen.say(f"{len(videos) - len(todo)} of {len(videos)} are done already")
        status.begin()
        _copy(config, videos, todo, out, status, tally, screen)
        status.finish(_keys(videos))
        return _summary(out, videos, len(todo), time.monotonic() - began, tally, screen)


class _Tally:
    """What is known of the copies so far; a few numbers a video."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.ok = self.frames = self.source_bytes = self.copy_bytes = 0
        self.seconds = 0.0
        self.quality: list[tuple[float, float]] = []

    def add(self, row: Row) -> None:
        if row["status"] != "ok":
            self.reasons[str(row["reason"])] += 1
            return
        self.ok += 1
        self.frames += int(row["frames"])
        self.seconds += float(row["seconds"])
        self.source_bytes += int(row["source_bytes"])
        self.copy_bytes += int(row["copy_bytes"])
        self.quality.append((float(row["psnr"]), float(row["ssim"])))


def _list(config: PrepareConfig, screen: Screen) -> VideoList:
    """The listed sources, without what lies in `out` itself."""
    videos = list_videos(config.sources)
    own = os.path.join(os.path.realpath(config.out), "")
    kept = [i for i in range(len(videos)) if not os.path.realpath(videos.absolute(i)).startswith(own)]
    if len(kept) < len(videos):
        screen.say(f"{len(videos) - len(kept)} videos lie in {config.out} itself and are left out")
        videos = VideoList(videos.corpora, videos.corpus[kept], [videos.paths[i] for i in kept], videos.ignored)
    names = ", ".join(corpus.name for corpus in videos.corpora)
    ignored = ", ".join(f"{n} {ext or 'without extension'}" for ext, n in sorted(videos.ignored.items()))
    screen.say(f"{len(videos)} videos in {names}" + (f" (not videos: {ignored})" if ignored else ""))
    if not len(videos):
        raise UsageError(f"--out {config.out} holds all of the sources: choose a folder outside of them")
    return videos


@contextmanager
def _claim(config: PrepareConfig) -> Iterator[Path]:
    """The output folder, locked against a second run, without the leftovers of a killed one."""
    out = config.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()) and read_marker(out) is None and not (out / PARTIAL).is_dir():
        raise UsageError(f"--out {out}: holds other files; choose a new or empty folder")
    (out / PARTIAL).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / PARTIAL / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"--out {out}: another run of distinit prepare is at work there") from None
        _sweep(out)
        yield out
        _sweep(out)
    finally:
        os.close(descriptor)


def _sweep(out: Path) -> None:
    for left in (out / PARTIAL).iterdir():
        if left.name != "lock":
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _mark(out: Path, config: PrepareConfig, videos: VideoList) -> None:
    """Write what the copies are like and which corpora there are; refuse to mix."""
    options = _options(config)
    marker: dict[str, Any] = read_marker(out) or {"options": options, "corpora": {}}
    if not config.replace:
        for key, value in marker["options"].items():
            if options.get(key) != value:
                raise UsageError(
                    f"--out {out}: its copies have {key}={value}, asked for {key}={options.get(key)}; choose another "
                    "folder, or --replace to make them again"
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
    text = json.dumps({"format": FORMAT, "version": 1, "options": options, "corpora": corpora}, indent=1)
    part = out / PARTIAL / MARKER
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, out / MARKER)


def _options(config: PrepareConfig) -> dict[str, Any]:
    """What makes two copies of one source differ."""
    return config.copies.model_dump(mode="json", exclude={"quality_frames"})


def _keys(videos: VideoList) -> Iterator[tuple[str, str]]:
    for i, path in enumerate(videos.paths):
        yield videos.corpora[int(videos.corpus[i])].name, escape_path(path)


def _target(out: Path, videos: VideoList, i: int) -> str:
    corpus = videos.corpora[int(videos.corpus[i])].name
    return os.path.join(os.path.abspath(out), corpus, copy_name(videos.paths[i]))


def _plan(
    config: PrepareConfig, videos: VideoList, out: Path, status: StatusFile, screen: Screen
) -> tuple[list[int], _Tally]:
    """The videos to copy, and the tally of those that are done or have failed before."""
    todo, tally, options = [], _Tally(), _options(config)
    with screen.progress("looking at what is there", len(videos), "videos") as bar:
        for i, key in enumerate(_keys(videos)):
            row = _done(_target(out, videos, i), videos.absolute(i), options)
            if row is None and not config.retry_failed:
                row = _failed_before(status.row(key), videos.absolute(i))
            if row is None:
                todo.append(i)
            else:
                status.set(key, row)
                tally.add(row)
            bar.advance()
    return todo, tally


def _done(target: str, source: str, options: dict[str, Any]) -> Row | None:
    """The row of a copy that is whole, made with these options, and of the source as it is now."""
    if not os.path.exists(target):
        return None
    try:
        copy = read_map(target)
        row: Row = {"status": "ok", **copy_row(copy, os.stat(target).st_size)}
    except (VideoError, OSError):
        return None  # another file, or one that was damaged since: made again
    if {**copy.options, **options} != copy.options:
        return None
    try:
        now = os.stat(source)
        same = now.st_size == copy.source.size and (
            now.st_mtime_ns == copy.source.mtime_ns or digest(source) == copy.source.digest
        )
    except FileNotFoundError:
        return row  # a list still names it: the copy outlives its source
    except (VideoError, OSError):
        return None  # the attempt to copy says why
    return row if same else None


def _failed_before(row: Row | None, source: str) -> Row | None:
    """The row of a source that failed, by its own fault, and has not changed since."""
    if row is None or row["status"] != "failed" or not row["source_bytes"] or NOT_WRITTEN in row["reason"]:
        return None
    try:
        now = os.stat(source)
    except OSError:
        return None
    same = str(now.st_size) == str(row["source_bytes"]) and str(now.st_mtime_ns) == str(row["source_mtime_ns"])
    return row if same else None


def _copy(
    config: PrepareConfig,
    videos: VideoList,
    todo: list[int],
    out: Path,
    status: StatusFile,
    tally: _Tally,
    screen: Screen,
) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(config.workers or cores, max(1, len(todo)))
    parts = os.path.join(os.path.abspath(out), PARTIAL)
    jobs = (
        {
            "source": videos.absolute(i),
            "part": os.path.join(parts, f"{os.getpid()}-{i}"),
            "target": _target(out, videos, i),
            "options": config.copies.model_dump(mode="json"),
        }
        for i in todo
    )
    keys = list(_keys(videos)) if todo else []
    pool = DecodePool(
        processes=workers, views=(), memory_gb=config.memory_gb, timeout_s=config.timeout_s, ahead=_AHEAD
    )
    with pool, screen.progress("copying", len(todo), "videos") as bar:
        for i, answer in zip(todo, pool.copies(jobs), strict=True):
            if isinstance(answer, Failed):
                if "no space left" in answer.reason.lower():  # not the video's fault, nor one that passes
                    raise OSError(errno.ENOSPC, "No space left on device", str(out))
                row: Row = {"status": "failed", "reason": answer.reason, **_as_it_is(videos.absolute(i))}
                _drop(_target(out, videos, i))
            else:
                row = {"status": "ok", **answer}
            status.add(keys[i], row)
            tally.add(row)
            bar.advance(failed=sum(tally.reasons.values()))


def _as_it_is(source: str) -> Row:
    try:
        now = os.stat(source)
    except (OSError, ValueError):
        return {}
    return {"source_bytes": now.st_size, "source_mtime_ns": now.st_mtime_ns}


def _drop(target: str) -> None:
    """Remove the copy of what the source was before: a copy of something else is worse than none."""
    if os.path.exists(target):
        os.unlink(target)


def _summary(
    out: Path, videos: VideoList, new: int, seconds: float, tally: _Tally, screen: Screen
) -> dict[str, Any]:
    failed = sum(tally.reasons.values())
    if failed:
        screen.say(f"{failed} videos failed; {out / 'status.csv'} lists them:")
        for reason, count in tally.reasons.most_common(10):
            screen.say(f"  {count:6d}  {reason}")
    quality = np.array(tally.quality).reshape(-1, 2)
    result: dict[str, Any] = {
        "out": str(out),
        "videos": len(videos),
        "ok": tally.ok,
        "failed": failed,
        "failures": dict(tally.reasons.most_common(100)),
        "new": new,
        "seconds": round(seconds, 2),
        "frames": tally.frames,
        "video_seconds": round(tally.seconds, 2),
        "source_bytes": tally.source_bytes,
        "copy_bytes": tally.copy_bytes,
        "bytes_per_second": round(tally.copy_bytes / tally.seconds) if tally.seconds else None,
    }
    for name, column in (("psnr", quality[:, 0]), ("ssim", quality[:, 1])):
        low = float(np.quantile(column, 0.05)) if len(column) else None
        mean = float(column.mean()) if len(column) else None
        result[name] = {"mean": mean, "worst_5_percent": low}
    if not new:
        screen.say("nothing to do: every video has its copy or a reason why not")
    if tally.ok:
        factor = tally.source_bytes / max(1, tally.copy_bytes)
        screen.say(
            f"{tally.ok} copies, {tally.copy_bytes / 1e6:.1f} MB for {tally.source_bytes / 1e6:.1f} MB of sources "
            f"({factor:.1f} times smaller, {tally.copy_bytes / max(tally.seconds, 1e-9) / 1e3:.1f} kB a second)"
        )
        screen.say(
            f"against the scaled source: PSNR {result['psnr']['mean']:.1f} dB, SSIM {result['ssim']['mean']:.3f}; "
            f"the worst 5 % of the videos below {result['psnr']['worst_5_percent']:.1f} dB, "
            f"{result['ssim']['worst_5_percent']:.3f}"
        )
    return result
