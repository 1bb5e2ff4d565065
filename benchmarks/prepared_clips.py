"""Compare random 8-frame clips from originals and prepared copies: clips per second, and bytes.

    python benchmarks/prepared_clips.py FOLDER [--videos 8] [--seconds 10] [--clips 120]

From the videos of FOLDER, originals of 340x256 are encoded (H.264, x264's defaults: B-frames, one
key frame in 250; and one in 12), then copies of each as `distinit prepare` makes them, and variants
of copies. Every clip is read as if the loader read its video for the first time: only the set-up of
a decoder is kept from one clip to the next. The figures are CPU time of this process, as the median
of `--rounds` rounds in which the contenders take turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measuring import pictures

from distinit.pipeline.corpus.sources import list_videos
from distinit.pipeline.prepared import frame_map, make_copy
from distinit.pipeline.prepared.copies import read_copy
from distinit.pipeline.video import frames as clips
from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.frames import read_frames
from distinit.pipeline.video.geometry import Renderer, View

ORIGINAL = View(resize=(256, 340))
CLIP = View(resize=(128, 171))
T = 8
Read = Callable[[str, np.ndarray, View], object]

# Alternatives to the settings of copies: x264's defaults, and independent pictures.
CABAC = {"codec": "libx264", "gop": 12, "bframes": 0, "crf": 20}
MJPEG = {"codec": "mjpeg", "pix_fmt": "yuvj420p"}


def variant(source: str, target: str, encoder: dict[str, object], extra: dict[str, object]) -> None:
    """Make a copy with a frame map in another encoding."""
    with VideoReader(source) as reader:
        info, timeline, renderer = reader.info, reader.timeline(), Renderer()
        height, width = 128, 171
        view = View(resize=(height, width))
        frames = (
            make_copy._even(renderer.render(frame, view)) for _, _, frame in reader.decode_plain()
        )
        write_video(
            target,
            frames,
            fps=info.fps,
            extra={"f": "mp4", "fps_mode": "passthrough", **extra},
            **encoder,
        )
        n = len(timeline)
    offset, key, crc, codec, extradata = make_copy._packets(target)
    record = frame_map.SourceRecord(
        "", 0, 0, n, info.width, info.height, timeline.time_base, timeline.clock
    )
    copy_map = frame_map.FrameMap(
        record, np.arange(n), timeline.pts, offset, key, crc, width, height, codec, extradata
    )
    with open(target, "ab") as file:
        file.write(copy_map.pack())


def build(
    folder: Path, files: list[str], videos: int, seconds: float
) -> dict[str, tuple[Read, list[str]]]:
    """Return contender → its reader and its files, the same number for each."""
    source = pictures(files, (256, 340))
    contenders: dict[str, tuple[Read, list[str]]] = {}
    named = {f"copy, GOP {gop}": make_copy.CopyOptions(gop=gop) for gop in (1, 8, 12, 16)}
    named["copy, GOP 12, short side 128"] = make_copy.CopyOptions(short_side=128)
    for number in range(videos):
        frames = list(itertools.islice(source, int(seconds * 30)))
        for gop in (250, 12):
            path = os.fspath(folder / f"{number}-{gop}.mp4")
            write_video(path, frames, fps=30, gop=gop)
            contenders.setdefault(f"original, GOP {gop}", (read_frames, []))[1].append(path)
        original = os.fspath(folder / f"{number}-250.mp4")
        for name, options in named.items():
            path = os.fspath(folder / f"{number}-{name.replace(' ', '')}.mp4")
            make_copy.make_copy(original, path + ".part", path, options)
            contenders.setdefault(name, (read_copy, []))[1].append(path)
        for name, encoder, extra in (
            ("copy, CABAC and deblocking", CABAC, {}),
            ("copy, MJPEG q 3", MJPEG, {"q:v": 3}),
        ):
            path = os.fspath(folder / f"{number}-{name.replace(' ', '')}.mp4")
            variant(original, path, encoder, extra)
            contenders.setdefault(name, (read_copy, []))[1].append(path)
    return contenders


def measure(read: Read, files: list[str], count: int, seed: int) -> float:
    """Measure CPU milliseconds per clip."""
    random = np.random.default_rng(seed)
    frames = {path: clips.count_frames(path) for path in files}
    spent = 0.0
    for _ in range(count):
        path = files[int(random.integers(len(files)))]
        start = int(random.integers(frames[path] - T + 1))
        clips._indices = frame_map.LruCache()
        frame_map._maps = frame_map.LruCache()
        began = time.process_time()
        read(path, np.arange(start, start + T), CLIP)
        spent += time.process_time() - began
    return spent / count * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    listed = list_videos([args.folder])
    files = [listed.absolute(i) for i in range(len(listed))]
    np.random.default_rng(0).shuffle(files)
    with tempfile.TemporaryDirectory() as folder:
        contenders = build(Path(folder), files, args.videos, args.seconds)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(args.rounds):
            for name, (read, paths) in contenders.items():
                times[name].append(measure(read, paths, args.clips // args.rounds, turn))
        length = args.videos * args.seconds
        rows = []
        for name, (_, paths) in contenders.items():
            ms = float(np.median(times[name]))
            rows.append(
                {
                    "what": name,
                    "ms_a_clip": round(ms, 2),
                    "clips_a_second_and_core": round(1e3 / ms),
                    "kB_a_second": round(sum(map(os.path.getsize, paths)) / length / 1e3, 1),
                }
            )
    if args.json:
        print(json.dumps(rows))
        return
    slow = rows[0]["ms_a_clip"]
    print(f"{'':32} {'ms/clip':>8} {'clips/s/core':>13} {'faster':>7} {'kB/s':>7}")
    for row in rows:
        ms, rate, size = row["ms_a_clip"], row["clips_a_second_and_core"], row["kB_a_second"]
        print(f"{row['what']:32} {ms:8.2f} {rate:13d} {slow / ms:6.1f}x {size:7.1f}")


if __name__ == "__main__":
    main()
