"""Compare decoding by a GPU's decoder with decoding on a core, at several sizes of videos.

    python benchmarks/speed/nvdec.py FOLDER [--videos 16] [--heights 256 720 1080] [--json FILE]

Some videos of FOLDER are encoded again at each height (H.264), and all their frames are decoded in
order by one process: by PyAV on one core (as stage one does), by PyAV with its hardware decoder and
by torchcodec's CUDA decoder. A missing decoder is recorded with the reason. Frames stay where the
decoder puts them; `torchcodec` gives RGB on the device, PyAV frames in memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import torch
from measuring import in_turn, machine, medians, table, write_json

from distinit.pipeline.common.errors import in_one_line
from distinit.pipeline.corpus.sources import list_videos
from distinit.pipeline.video.encode import write_video


def scaled(source: str, target: Path, height: int, max_frames: int = 120) -> None:
    """Encode the first frames of a video again at a height."""
    with av.open(source) as container:
        frames = []
        for frame in container.decode(video=0):
            width = 2 * round(frame.width * height / frame.height / 2)
            frames.append(frame.reformat(width, height, "rgb24").to_ndarray())
            if len(frames) == max_frames:
                break
    write_video(target, frames, gop=12)


def on_a_core(path: Path) -> int:
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        return sum(1 for _ in container.decode(video=0))


def by_pyav(path: Path) -> int:
    from av.codec.hwaccel import HWAccel

    hardware = HWAccel("cuda", allow_software_fallback=False)
    with av.open(str(path), hwaccel=hardware) as container:
        return sum(1 for _ in container.decode(video=0))


def by_torchcodec(path: Path) -> int:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), device="cuda")
    count = sum(1 for _ in decoder)
    torch.cuda.synchronize()
    return count


CONTENDERS: dict[str, Callable[[Path], int]] = {
    "PyAV, one core": on_a_core,
    "PyAV, cuda": by_pyav,
    "torchcodec, cuda": by_torchcodec,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--heights", type=int, nargs="+", default=[256, 720, 1080])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    listed = list_videos([args.source])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, results = [], []
    for height in args.heights:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / f"{n}.mp4" for n in range(min(args.videos, len(listed)))]
            for number, file in enumerate(files):
                scaled(listed.absolute(number), file, height)
            reasons: dict[str, str] = {}
            decoders = {}
            for name, decode in CONTENDERS.items():
                try:
                    decode(files[0])  # opens the device, too
                    decoders[name] = decode
                # A missing library, driver or decoder can raise anything; the error is a result.
                except Exception as error:
                    reasons[name] = in_one_line(error)

            def rate(decode: Callable[[Path], int], files: list[Path] = files) -> float:
                began = time.perf_counter()
                return sum(map(decode, files)) / (time.perf_counter() - began)

            rates = medians(in_turn({n: lambda d=d: rate(d) for n, d in decoders.items()}, args.rounds))  # fmt: skip
        results.append({"height": height, "frames_per_s": rates, "absent": reasons})
        write_json(args.json, device, results)
        rows.append([height, *(f"{rates[n]:.0f}" if n in rates else "absent" for n in CONTENDERS)])
    print(machine())
    print(table(["height", *CONTENDERS], rows))


if __name__ == "__main__":
    main()
