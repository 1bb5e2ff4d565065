"""Encode and transcode: the only module that runs ffmpeg, with imageio-ffmpeg's binary."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import ffmpeg
import imageio_ffmpeg
import numpy as np

from ..common.errors import DecoderError, VideoError
from ..common.processes import end_with_parent
from .container import FORMATS

Path = str | os.PathLike[str]
# ffmpeg-python refuses names that are not UTF-8. These replace the names until the command is
# complete.
_SOURCE, _TARGET = "file:source", "file:target"
_MAX_TAIL_BYTES = 4000  # kept of ffmpeg's messages


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    *,
    fps: float = 25.0,
    codec: str = "libx264",
    gop: int | None = None,
    bframes: int | None = None,
    crf: int | None = None,
    pix_fmt: str = "yuv420p",
    extra: dict[str, Any] | None = None,
) -> int:
    """Encode RGB `frames` of one size, uint8 [h, w, 3] each (or [n, h, w, 3]); return their number.

    `extra`: further output options of ffmpeg by name, without the dash (`vf`, `x264opts`, …).

    Raises:
        VideoError: With the last lines of ffmpeg's output.
    """
    source = iter(frames)
    first = next(source, None)
    if first is None:
        raise VideoError("no frames to encode")
    height, width = first.shape[:2]
    stream = ffmpeg.input(
        "pipe:0",
        format="rawvideo",
        pix_fmt="rgb24",
        s=f"{width}x{height}",
        framerate=fps,
        threads=1,
    )
    options = _encoder_options(codec, gop, bframes, crf, pix_fmt)
    command = stream.output(_TARGET, **{**options, **(extra or {})})
    count = 0
    with _running(command, {_TARGET: path}, stdin=True) as process:
        pipe = process.stdin
        if pipe is None:
            raise VideoError("cannot write to ffmpeg")
        for frame in chain((first,), source):
            if frame.shape != (height, width, 3) or frame.dtype != np.uint8:
                raise VideoError(
                    f"frame {count} is {frame.dtype} {frame.shape}, expected uint8 {first.shape} as for the first"
                )
            try:
                pipe.write(np.ascontiguousarray(frame).tobytes())
            # ffmpeg has ended, and its stderr has the reason.
            except (BrokenPipeError, OSError):
                break
            count += 1
    return count


def transcode(
    source: Path,
    target: Path,
    *,
    short_side: int | None = None,
    codec: str = "libx264",
    gop: int | None = None,
    crf: int | None = None,
    input_options: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Encode a file again without its audio, with its timestamps and the given short side.

    Sizes become even. With codec "copy" the packets are only written into another container.
    """
    stream = ffmpeg.input(
        _SOURCE, format_whitelist=FORMATS, protocol_whitelist="file", **(input_options or {})
    ).video
    if short_side is not None:
        size = f"if(gt(iw,ih),-2,{short_side})", f"if(gt(iw,ih),{short_side},-2)"
        stream = stream.filter("scale", *size)
    options = _encoder_options(codec, gop, None, crf)
    command = stream.output(_TARGET, **{"fps_mode": "passthrough", **options, **(extra or {})})
    with _running(command, {_SOURCE: source, _TARGET: target}, stdin=False):
        # The context waits for the process to end.
        pass


def _as_file(path: Path) -> str:
    """Return the path in a form that ffmpeg always reads as a file."""
    return "file:" + os.path.abspath(path)


def _encoder_options(
    codec: str, gop: int | None, bframes: int | None, crf: int | None, pix_fmt: str = "yuv420p"
) -> dict[str, Any]:
    if codec == "copy":
        return {"vcodec": "copy", "an": None}
    encoder_settings = {"g": gop, "bf": bframes, "crf": crf}
    chosen = {name: value for name, value in encoder_settings.items() if value is not None}
    return {"vcodec": codec, "pix_fmt": pix_fmt, "threads": 1, "an": None, **chosen}


@contextlib.contextmanager
def _running(
    command: Any, paths: dict[str, Path], *, stdin: bool
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ffmpeg on `paths` (name in the command → path), and drain its stderr.

    On exit, wait for the process to end, and raise if it failed.
    """
    compiled = ffmpeg.compile(
        command.global_args("-hide_banner", "-loglevel", "error", "-nostdin"),
        cmd=imageio_ffmpeg.get_ffmpeg_exe(),
        overwrite_output=True,
    )
    try:
        process = subprocess.Popen(
            [_as_file(paths[word]) if word in paths else word for word in compiled],
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # If this process is killed, ffmpeg must end too: another process may write the same
            # file.
            preexec_fn=partial(end_with_parent, os.getpid()),
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise DecoderError(f"ffmpeg cannot be started: {error}") from error
    tail = bytearray()
    drain = threading.Thread(target=_drain, args=(process.stderr, tail), daemon=True)
    drain.start()
    try:
        yield process
    except BaseException:
        process.kill()
        raise
    finally:
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        process.wait()
        drain.join()
        if process.stderr is not None:
            process.stderr.close()
    # A limit such as `ulimit -f`, which ffmpeg does not report.
    if process.returncode == -signal.SIGXFSZ:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    if process.returncode != 0:
        words = tail.decode(errors="replace").strip().splitlines()
        raise VideoError(
            f"ffmpeg failed (status {process.returncode}): {' | '.join(words[-3:]) or 'no message'}"
        )


def _drain(stream: Any, tail: bytearray) -> None:
    """Keep the last bytes of a stream, so that the writer never waits for a reader."""
    for chunk in iter(lambda: stream.read1(65536), b""):
        tail += chunk
        del tail[:-_MAX_TAIL_BYTES]
